"""What noise is drawn for one row of six units over twelve steps, by the layers themselves."""

import jax
import numpy as np
from matplotlib.figure import Figure

import jaxrnn

STEPS, UNITS = 12, 6


def kept(cell):
    """Which entries a layer keeps, (T, H)."""
    _, ys = jaxrnn.scan(cell, (), None, jax.numpy.ones((STEPS, UNITS)), key=jax.random.key(3))
    return np.asarray(ys) != 0


def draw():
    figure = Figure(figsize=(6.3, 1.7), layout="constrained")
    drawn = [("Dropout(0.4)", jaxrnn.Dropout(0.4))]
    drawn += [("Dropout(0.4, per_sequence=True)", jaxrnn.Dropout(0.4, per_sequence=True))]
    for axes, (title, cell) in zip(figure.subplots(1, 2), drawn, strict=True):
        axes.imshow(kept(cell).T, cmap="Blues", vmin=-0.3, vmax=1.6, aspect="equal")
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.set_yticks([0, UNITS - 1])
        axes.set_ylabel("unit")
    return figure
