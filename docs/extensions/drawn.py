"""Draws the figures of the pages before they are read: every function `draw` of `drawings/` makes one SVG."""

import importlib
from pathlib import Path

import matplotlib.pyplot as plt

from jaxrnn.analysis import STYLE

DRAWINGS = Path(__file__).parent.parent / "drawings"
SETTINGS = STYLE | {"svg.fonttype": "none", "svg.hashsalt": "jaxrnn", "font.family": "sans-serif"}


def draw_all(app):
    folder = Path(app.srcdir) / "_drawings"
    folder.mkdir(exist_ok=True)
    for path in sorted(DRAWINGS.glob("[a-z]*.py")):
        with plt.rc_context(SETTINGS):
            figure = importlib.import_module(f"drawings.{path.stem}").draw()
            figure.savefig(folder / f"{path.stem}.svg", metadata={"Date": None})
            plt.close(figure)


def setup(app):
    app.connect("builder-inited", draw_all)
    return {"parallel_read_safe": True}
