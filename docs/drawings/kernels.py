"""How a kernel divides a recurrence: tiles of a product, threads of a team, chunks of time."""

from matplotlib.patches import Rectangle

from drawings._shapes import BLUE, GREY, LIGHT, RED, arrow, canvas

HUES = ["#dbe7f3", "#f7d9c6", "#cfeae0", "#f0dcea"]


def cells(axes, x, y, columns, rows, colors, edge=GREY, size=0.5):
    """A grid, from its lower left corner; `colors(column, row)` fills it."""
    for i in range(columns):
        for j in range(rows):
            place = x + size * i, y + size * j
            axes.add_patch(Rectangle(place, size, size, facecolor=colors(i, j), edgecolor=edge, lw=0.6))


def tile(axes):
    axes.text(0, 9.9, "A tile: 6 rows × 4 gates, 24 sums in registers", fontsize=8.5)
    cells(axes, 0.0, 6.4, 5, 6, lambda i, j: LIGHT)
    axes.text(1.25, 6.0, "h: rows × units", ha="center", va="top", fontsize=7.5)
    axes.text(3.0, 7.9, "×", ha="center", va="center", fontsize=10)
    cells(axes, 3.5, 6.65, 4, 5, lambda i, j: HUES[i])
    axes.text(4.5, 6.0, "packed weights\nof i, f, g, o", ha="center", va="top", fontsize=7.5)
    axes.text(6.0, 7.9, "=", ha="center", va="center", fontsize=10)
    cells(axes, 6.5, 6.4, 4, 6, lambda i, j: HUES[i], edge=RED)
    axes.text(7.5, 6.0, "sums; then\ngates, c', h'", ha="center", va="top", fontsize=7.5)


def team(axes):
    for x, title, below, color in (
        (10.6, "A team by rows", "threads never wait", lambda i, j: HUES[j // 3]),
        (15.0, "or by units", "they wait once a step", lambda i, j: HUES[i // 3]),
    ):
        axes.text(x, 9.9, title, fontsize=8.5)
        cells(axes, x, 6.4, 6, 6, color)
        axes.text(x + 1.5, 6.0, f"rows × units\n{below}", ha="center", va="top", fontsize=7.5)


def chunks(axes):
    axes.text(0, 4.4, "Chunks of time: the products of several steps with x at once, then step by step", fontsize=8.5)
    for k in range(3):
        x = 5.9 * k
        axes.add_patch(Rectangle((x, 2.7), 5.6, 0.9, facecolor="#dbe7f3", edgecolor=BLUE, lw=0.8))
        axes.text(x + 2.8, 3.15, "u = x w_x + b, one product", ha="center", va="center", fontsize=7.5)
        for t in range(4):
            axes.add_patch(Rectangle((x + 1.4 * t, 1.0), 1.1, 0.9, facecolor=HUES[1], edgecolor=GREY, lw=0.6))
            axes.text(x + 1.4 * t + 0.55, 1.45, "step", ha="center", va="center", fontsize=7)
            arrow(axes, (x + 1.4 * t + 0.55, 2.7), (x + 1.4 * t + 0.55, 1.9))
            if k or t:
                arrow(axes, (x + 1.4 * t - (0.3 if t else 0.6), 1.45), (x + 1.4 * t, 1.45))
    axes.text(8.7, 0.5, "time", ha="center", va="top", fontsize=7.5, color=GREY)


def draw():
    figure, axes = canvas(6.3, 3.7, 18.2, 10.6)
    tile(axes)
    team(axes)
    chunks(axes)
    return figure
