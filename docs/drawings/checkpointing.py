"""Gradient checkpointing: what is kept and what is computed again, and the memory that was measured."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from drawings._shapes import BLUE, GREY, LIGHT, RED, table

STEPS, EVERY = 16, 4


def _kept(axes, y, every, name):
    for t in range(STEPS):
        full = every is None or t % every == 0
        face, edge = (BLUE, BLUE) if full else ("white", GREY)
        axes.add_patch(Rectangle((t, y), 0.8, 0.8, facecolor=face, edgecolor=edge, lw=0.8))
    axes.text(-0.7, y + 0.4, name, ha="right", va="center", fontsize=8)


def draw():
    figure = Figure(figsize=(6.3, 3.6), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[1, 2])
    _kept(above, 1.6, None, "all kept")
    _kept(above, 0.2, EVERY, f"remat_every={EVERY}")
    chunk = 2 * EVERY
    above.plot([chunk, chunk, chunk + 3.8, chunk + 3.8], [0, -0.2, -0.2, 0], color=RED, lw=1.0)
    above.text(chunk + 1.9, -0.95, "computed again, one chunk at a time", ha="center", fontsize=8, color=RED)
    above.set_xlim(-5.5, STEPS)
    above.set_ylim(-1.2, 2.7)
    above.set_aspect("equal")
    above.axis("off")
    rows = table("Memory of a training step", "T, MiB that the step takes")
    names = ["native", "native-remat", "xla", "xla-remat", "torch", "keras", "flax"]
    place = np.arange(len(names))
    for k, row in enumerate(rows):
        values = [float(row[name]) for name in names]
        bars = below.bar(place + 0.4 * k - 0.2, values, 0.38, color=(LIGHT, BLUE)[k], edgecolor=BLUE, lw=0.6)
        below.bar_label(bars, [f"{value:.0f}" for value in values], fontsize=7)
        bars.set_label(f"{row['T, MiB that the step takes']} steps")
    below.set_xticks(place, names)
    below.set_ylabel("MiB of a training step")
    below.legend()
    return figure
