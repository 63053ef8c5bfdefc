"""What the drawings share: boxes, arrows and the rows of RESULTS.md."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from jaxrnn.analysis.plots import COLORS

BLUE, RED, GREY, LIGHT = COLORS[0], COLORS[1], "0.45", "0.92"
RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "RESULTS.md"


def canvas(width, height, right, top):
    """An empty drawing, in units of its own."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_xlim(0, right)
    axes.set_ylim(0, top)
    axes.set_aspect("equal")
    axes.axis("off")
    return figure, axes


def box(axes, x, y, width, height, text="", color=LIGHT, edge=GREY, size=9, **options):
    """A box with its lower left corner at (x, y)."""
    shape = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, facecolor=color, edgecolor=edge, lw=0.8))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, **options)


def arrow(axes, start, end, color=GREY, text="", **options):
    style = {"arrowstyle": "-|>", "color": color, "shrinkA": 0, "shrinkB": 0, "lw": 1.0} | options
    axes.annotate("", xy=end, xytext=start, arrowprops=style)
    if text:
        axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.1, text, ha="center", va="bottom", fontsize=8)


def table(heading, first):
    """The rows of the table of RESULTS.md below `heading` whose first column is named `first`."""
    text = RESULTS.read_text().split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = text.splitlines()
    at = next(k for k, line in enumerate(lines) if line.startswith(f"| {first} |"))
    names = _cells(lines[at])
    rows = []
    for line in lines[at + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(dict(zip(names, _cells(line), strict=True)))
    return rows


def _cells(line):
    return [each.strip() for each in line.strip("|\n ").split("|")]
