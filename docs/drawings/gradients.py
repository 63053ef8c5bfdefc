"""The norm of ∂L/∂h_t for a loss at the last step: Elman with recurrent weights of three scales, and LSTM."""

import jax
import numpy as np
from matplotlib.figure import Figure

import jaxrnn
from jaxrnn.analysis import gradient_flow

STEPS, SIZE = 60, 32


def norms(cell, scale):
    params = cell.init(jax.random.key(0))
    params = params._replace(w_h=scale * params.w_h)
    xs = jax.random.normal(jax.random.key(1), (STEPS, 16, 3))
    flow = gradient_flow(cell, params, None, xs, loss=lambda carry, ys: ys[-1].sum())
    return np.median(np.asarray(flow.total), 1)


def draw():
    figure = Figure(figsize=(6.3, 2.6), layout="constrained")
    axes = figure.subplots()
    linear = jaxrnn.Elman(3, SIZE, activation="identity")
    for scale in (0.9, 1.0, 1.1):
        axes.plot(norms(linear, scale), label=f"Elman, linear, eigenvalues of size {scale}")
    axes.plot(norms(jaxrnn.Elman(3, SIZE), 1.0), label="Elman, tanh", ls="--")
    axes.plot(norms(jaxrnn.LSTM(3, SIZE), 1.0), label="LSTM, fresh", ls=":")
    axes.set_yscale("log")
    axes.set_xlabel("step t")
    axes.set_ylabel("‖∂L/∂carry‖ at t")
    axes.legend()
    return figure
