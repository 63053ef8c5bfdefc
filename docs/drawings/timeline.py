"""Lengths, masks, resets and reverse: how many steps of its sequence a cell has seen at each step, by `scan` itself."""

import jax.numpy as jnp
import numpy as np

import jaxrnn
from drawings._shapes import BLUE, GREY, LIGHT, RED, box, canvas

STEPS = 10


class Count(jaxrnn.Cell):
    """It counts the steps since its sequence began."""

    def init(self, key, dtype=jnp.float32):
        return ()

    def initial_carry(self, params, batch_shape=()):
        return jnp.zeros(batch_shape)

    def step(self, params, carry, x, noise=None):
        return carry + 1, (carry + 1)[..., None]


def flags(*at):
    return np.isin(np.arange(STEPS), at)


ROWS = [
    ("no option", {}),
    ("lengths=7", {"lengths": 7}),
    ("mask, in any pattern", {"mask": ~flags(0, 4, 5)}),
    ("reset at 4 and 7", {"reset": flags(4, 7)}),
    ("reverse=True", {"reverse": True}),
    ("lengths=7, reverse=True", {"lengths": 7, "reverse": True}),
    ("reset at 4 and 7, reverse=True", {"reset": flags(4, 7), "reverse": True}),
]


def draw():
    figure, axes = canvas(6.3, 3.5, 17, 9.4)
    for t in range(STEPS):
        axes.text(6.5 + t, 8.7, str(t), ha="center", color=GREY, fontsize=8)
    axes.text(5.8, 8.7, "t =", ha="right", color=GREY, fontsize=8)
    for row, (name, options) in enumerate(ROWS):
        y = 7.4 - 1.2 * row
        carry, seen = jaxrnn.scan(Count(), (), None, jnp.zeros((STEPS, 1)), **options)
        axes.text(5.8, y + 0.45, name, ha="right", va="center", fontsize=8)
        for t in range(STEPS):
            count = int(seen[t, 0])
            text = str(count) if count else "0"
            box(
                axes, 6.05 + t, y, 0.9, 0.9, text, "white" if not count else "#dbe7f3", BLUE if count else LIGHT, size=8
            )
            if options.get("reset", flags())[t]:
                axes.plot([6 + t, 6 + t], [y - 0.1, y + 1.0], color=RED, lw=1.6)
        way = "←" if options.get("reverse") else "→"
        axes.text(16.25, y + 0.45, f"{way}  {int(carry)}", va="center", fontsize=8, color=GREY)
    axes.text(16.25, 8.7, "carry", color=GREY, fontsize=8)
    return figure
