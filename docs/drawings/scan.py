"""A cell over time: one step after another, with the same params."""

from drawings._shapes import BLUE, arrow, box, canvas


def draw():
    figure, axes = canvas(6.3, 2.3, 12.6, 4.6)
    box(axes, 1.9, 3.6, 8.2, 0.7, "params", color="white")
    for t in range(4):
        x = 2 + 2.2 * t
        box(axes, x, 1.7, 1.4, 1.0, "step", color="#dbe7f3", edge=BLUE)
        arrow(axes, (x + 0.7, 3.6), (x + 0.7, 2.7))
        arrow(axes, (x + 0.45, 0.75), (x + 0.45, 1.7))
        axes.text(x + 0.45, 0.45, f"x$_{t}$", ha="center", fontsize=9)
        arrow(axes, (x + 1.0, 1.7), (x + 1.0, 0.75), color=BLUE)
        axes.text(x + 1.0, 0.45, f"y$_{t}$", ha="center", fontsize=9, color=BLUE)
        arrow(axes, (x - 0.8, 2.2), (x, 2.2))
    arrow(axes, (10, 2.2), (10.8, 2.2))
    axes.text(1.1, 2.2, "carry", ha="right", va="center", fontsize=9)
    axes.text(10.9, 2.2, "carry'", ha="left", va="center", fontsize=9)
    return figure
