"""How many times as long as jaxrnn others take: the geometric means of RESULTS.md."""

import numpy as np
from matplotlib.figure import Figure

from drawings._shapes import BLUE, table

TITLES = {"lstm": "LSTM", "gru": "GRU", "elman": "Elman"}
MEAN = "geometric mean, B ≥ 16"
OTHERS = ["torch", "onnxruntime", "keras", "flax", "haiku", "equinox"]
NAMES = ["PyTorch", "ONNX Runtime", "Keras on JAX", "Flax", "Haiku", "Equinox"]


def draw():
    rows = table("One layer against its peers", MEAN)
    figure = Figure(figsize=(6.3, 3.4), layout="constrained")
    panels = figure.subplots(2, 3, sharey=True, sharex=True)
    for k, row in enumerate(rows):
        axes, values = panels[k % 2, k // 2], [row[f"{name} / native"] for name in OTHERS]
        for place, value in enumerate(values):
            if value:
                bars = axes.bar(place, float(value), color=BLUE)
                axes.bar_label(bars, [value], fontsize=7)
        axes.margins(y=0.2)
        axes.axhline(1, color="0.45", lw=0.8, ls=":")
        axes.set_title(f"{TITLES[row[MEAN]]}, {row['pass']}")
        axes.set_xticks(np.arange(len(OTHERS)), NAMES, rotation=60, ha="right", fontsize=7)
    figure.supylabel("time / that of jaxrnn", fontsize=9)
    return figure
