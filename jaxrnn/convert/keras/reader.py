"""Reads a Keras model layer by layer: the cells so far, and the facts that the next layer needs."""

from __future__ import annotations

from collections.abc import Callable
from reprlib import repr as short
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxrnn.cell import output_size
from jaxrnn.compose.parallel import Bidirectional, BidirectionalPair
from jaxrnn.compose.pool import Pool
from jaxrnn.compose.repeat import Repeat
from jaxrnn.compose.wrap import Backward
from jaxrnn.convert.cells import stacked
from jaxrnn.convert.keras.config import Fields, is_size, list_of
from jaxrnn.convert.keras.graph import chain
from jaxrnn.convert.keras.layers import (
    CONVOLUTIONS,
    POINTWISE,
    POOLINGS,
    RECURRENT,
    Pieces,
    Recurrent,
    Weights,
    directions,
    read_recurrent,
    spatial_dropout,
)
from jaxrnn.layers import Apply, Embed, EmbedParams, Layer, LayerNorm, Linear
from jaxrnn.typing import PyTree, Size, WithParams

DEEPEST = 32  # models within models


class KerasMask(NamedTuple):
    """A function of xs that returns the mask for `jaxrnn.scan`.

    The mask is true where x ≠ value; x is the token, or any feature of the step.

    Examples:
      >>> import numpy as np
      >>> KerasMask(0.0)(np.array([[[1.0, 0.0], [0.0, 0.0]]]))
      Array([[ True, False]], dtype=bool)
    """

    value: float = 0.0
    tokens: bool = False

    def __call__(self, xs: PyTree) -> Array:
        differs = jnp.asarray(xs) != self.value
        return differs if self.tokens else differs.any(-1)


class Reader:
    """Reads layer by layer. It holds the cells so far, and the facts that the next layer needs."""

    def __init__(self, weights: Weights):
        self.weights = weights
        self.cells: Pieces = []  # since the last RepeatVector
        self.repeated: list[tuple[Pieces, int]] = []  # what was below each RepeatVector, and its number of steps
        self.mask: KerasMask | None = None
        self.masked = False  # whether the mask still matters
        self.flipped = False  # whether Keras' sequence is in the opposite order here
        self.timed = True
        self.forked = False  # whether there are two outputs here
        self.shape: tuple[PyTree, ...] | None = None  # of Keras' input here, where it is known

    def layer(self, fields: Fields, depth: int) -> None:
        """Reads one layer or model."""
        if depth > DEEPEST:
            raise ValueError(f"{fields.place}: expected at most {DEEPEST} models within models")
        if fields.kind in ("Sequential", "Functional", "Model"):
            layers = list_of(fields, "layers") if fields.kind == "Sequential" else chain(fields)
            for k, inner in enumerate(layers):
                self.layer(fields.inside(f"layers[{k}]", inner), depth + 1)
            return
        if self.shape is None and fields.input_shape is not None:
            self.see(fields, fields.input_shape)
        read = READERS.get(fields.kind)
        if read is None:
            raise ValueError(f"{fields.place}: a layer of this class cannot be converted")
        if self.forked:
            raise ValueError(f"{fields.place}: the layer before it has two outputs, as merge_mode=None asks for")
        read(self, fields)
        fields.finish()

    def see(self, fields: Fields, shape: Any) -> None:
        """Notes the shape of Keras' input, which is now known."""
        if not isinstance(shape, (list, tuple)) or len(shape) < 2 or not all(n is None or is_size(n) for n in shape):
            fields.refuse("shape", shape, "(batch, time, ...), each a size or None")
        known = self.shape if self.shape is not None else (None,) * len(shape)
        if len(known) != len(shape) or any(None not in (a, b) and a != b for a, b in zip(known, shape, strict=False)):
            fields.refuse("shape", shape, f"{short(known)}, which comes here")
        self.shape = tuple(a if b is None else b for a, b in zip(known, shape, strict=True))

    def add(self, pieces: Pieces) -> None:
        """Adds cells on top of the others."""
        for cell, params in pieces:
            self.cells.append((cell, params))
            if self.shape is None or cell.keeps_size or isinstance(cell, Apply):
                continue
            lead = 2 if self.timed and not cell.ends_time else 1
            inside = self.shape[2:] if self.timed else self.shape[1:]
            size = output_size(cell, inside if isinstance(cell, Linear) else None)
            self.shape = (*self.shape[:lead], *(size if isinstance(size, tuple) else (size,)))

    def input(self, fields: Fields) -> None:
        fields.take("dtype", None)  # of tokens it is one of integers
        if (shape := fields.take("batch_shape", None)) is not None:
            self.see(fields, shape)

    def needs(self, fields: Fields, *, rank: int | None = None, size: int | None = None) -> None:
        """Raises unless the input has a time axis, this rank, and this last size."""
        if not self.timed or (rank is not None and self.shape is not None and len(self.shape) != rank):
            expected = "a time axis" if rank is None else f"{rank} axes, batch and time first"
            fields.refuse("input", "none any more" if not self.timed else self.shape, expected)
        if size is not None and self.shape is not None and self.shape[-1] not in (None, size):
            fields.refuse("input", self.shape, f"(..., {size})")

    def embedding(self, fields: Fields) -> None:
        vocabulary, size = fields.size("input_dim"), fields.size("output_dim")
        if self.cells or self.mask:
            raise ValueError(f"{fields.place}: expected to be the first layer: a sequence of tokens has no features")
        self.needs(fields, rank=2)
        if fields.flag("mask_zero", False):
            self.mask, self.masked = KerasMask(0, tokens=True), True
        w = self.weights.take(fields, "embeddings", vocabulary, size)
        self.cells.append((Embed(vocabulary, size), EmbedParams(w)))
        self.shape = None if self.shape is None else (*self.shape, size)

    def masking(self, fields: Fields) -> None:
        if self.cells or self.mask:
            raise ValueError(f"{fields.place}: expected to be the first layer: its mask is a function of xs")
        self.needs(fields, rank=3)
        self.mask, self.masked = KerasMask(fields.number("mask_value", 0.0)), True

    def keeps_size(self, fields: Fields) -> None:
        """Reads a layer without time."""
        if not self.cells and self.shape is not None and len(self.shape) == 2:
            self.timed = False
        read = spatial_dropout if fields.kind == "SpatialDropout1D" else POINTWISE[fields.kind]
        pieces = read(fields, self.weights, self.shape, self.timed)
        for cell, _ in pieces:
            if isinstance(cell, (Linear, LayerNorm)):
                self.fits(fields, cell)
        self.add(pieces)

    def fits(self, fields: Fields, cell: Any) -> None:
        """Raises unless the last axis has the size that the cell reads."""
        if self.shape is not None and self.shape[-1] not in (None, cell.input_size):
            fields.refuse("input", self.shape, f"(..., {cell.input_size})")

    def time_distributed(self, fields: Fields) -> None:
        inner = fields.inside("layer", fields.take("layer"))
        if inner.kind not in POINTWISE:
            raise ValueError(f"{inner.place}: expected one of {sorted(POINTWISE)} in TimeDistributed")
        self.needs(fields)
        step = None if self.shape is None else (self.shape[0], *self.shape[2:])
        pieces = POINTWISE[inner.kind](inner, self.weights, step, False)
        inner.finish()
        self.add(pieces)

    def recurrent(self, fields: Fields) -> None:
        kind = fields.kind
        layer = read_recurrent(fields, self.weights, self.shape)
        self.run(fields, kind, layer)

    def bidirectional(self, fields: Fields) -> None:
        merges = {"concat": "concat", "sum": "sum", "mul": "mul", "ave": "average", None: "tuple"}
        merge = fields.choice("merge_mode", "concat", merges)
        forward, backward = directions(fields, fields.take("layer"), fields.take("backward_layer", None))
        a, b = (read_recurrent(each, self.weights, self.shape) for each in (forward, backward))
        if a.go_backwards == b.go_backwards or a.return_sequences != b.return_sequences:
            raise ValueError(
                f"{fields.place}: expected its layers to differ in go_backwards and agree in return_sequences"
            )
        # Keras overrides zero_output_for_mask here.
        (f, p), (g, q) = (stacked(each.pieces) for each in (a, b))
        if merge == "tuple" and not a.return_sequences:
            f, g = Pool(f), Pool(g)
        cell = (Bidirectional(f, g, merge), BidirectionalPair(p, q))
        self.run(fields, forward.kind, a._replace(pieces=[cell], zero_output=False))
        self.forked = merge == "tuple"

    def run(self, fields: Fields, kind: str, layer: Recurrent) -> None:
        """Adds a recurrent layer: its direction in the time of xs, and the outputs that it returns."""
        first = next(cell for cell, _ in layer.pieces if not isinstance(cell, Layer))
        size: Size = getattr(first, "input_size", None)
        self.needs(fields, rank=2 + first.input_ndim, size=size[-1] if isinstance(size, tuple) else size)
        if self.masked and kind in CONVOLUTIONS:
            raise ValueError(f"{fields.place}: a mask reaches it, which Keras cannot apply to images")
        if self.masked and self.flipped:
            raise ValueError(f"{fields.place}: a layer before it has turned the sequence round, and not the mask")
        self.flipped ^= layer.go_backwards
        pieces = [(Backward(c) if self.flipped and not isinstance(c, Layer) else c, p) for c, p in layer.pieces]
        if layer.return_sequences:
            self.add(pieces)
        else:
            top, params = pieces.pop()
            pool = top if top.ends_time else Pool(top, "end" if layer.zero_output else "last")
            self.add([*pieces, (pool, params)])
            self.timed = self.masked = False

    def repeat(self, fields: Fields) -> None:
        """Begins a new sequence, all steps of which read the same vector. The layers above belong to this sequence."""
        if self.timed or not self.cells:
            fields.refuse("input", self.shape, "one vector for each sequence, like that of a layer before it")
        if self.shape is not None and len(self.shape) != 2:
            fields.refuse("input", self.shape, "(batch, features)")
        length = fields.size("n")
        self.repeated.append((self.cells, length))
        self.cells, self.timed, self.flipped = [], True, False
        self.shape = None if self.shape is None else (self.shape[0], length, self.shape[1])

    def finish(self) -> WithParams:
        """The cell of the whole model, and its params."""
        self.weights.finish()
        while self.repeated:
            cell, params = stacked(self.cells or [(Apply("identity"), ())])
            self.cells, length = self.repeated.pop()
            self.cells.append((Repeat(cell, length), params))
        if not self.cells:
            raise ValueError("source: expected at least one layer that computes something")
        return stacked(self.cells)

    def pooling(self, fields: Fields) -> None:
        self.pool(fields, self.way(fields))

    def concatenate(self, fields: Fields) -> None:
        """Reads several poolings of one sequence, which `chain` has put into this layer."""
        if fields.take("axis", -1) not in (-1, 1):
            raise ValueError(f"{fields.place}: axis: expected -1, the last axis")
        ways = [fields.inside(f"layers[{k}]", inner) for k, inner in enumerate(list_of(fields, "layers"))]
        self.pool(fields, tuple(map(self.way, ways)))
        for way in ways:
            way.finish()

    def way(self, fields: Fields) -> str:
        """The way in which one layer pools."""
        if fields.kind not in POOLINGS:
            raise ValueError(f"{fields.place}: expected one of {sorted(POOLINGS)}")
        fields.channels_last()
        if self.masked and POOLINGS[fields.kind] == "max":
            raise ValueError(f"{fields.place}: a mask reaches it, which Keras does not apply here")
        return POOLINGS[fields.kind]

    def pool(self, fields: Fields, how: str | tuple[str, ...]) -> None:
        """Ends the time axis by pooling."""
        self.needs(fields, rank=3)
        if self.masked and self.flipped:
            raise ValueError(f"{fields.place}: a layer before it has turned the sequence round, and not the mask")
        for k in reversed(range(len(self.cells))):
            cell, params = stacked(self.cells[k:])
            if output_size(cell) is not None:
                del self.cells[k:]
                self.add([(Pool(cell, how), params)])
                self.timed = self.masked = False
                return
        raise ValueError(f"{fields.place}: expected a layer before it whose output size is known")


READERS: dict[str, Callable[[Reader, Fields], None]] = {
    "InputLayer": Reader.input,
    "Embedding": Reader.embedding,
    "Masking": Reader.masking,
    "TimeDistributed": Reader.time_distributed,
    "Bidirectional": Reader.bidirectional,
    "Concatenate": Reader.concatenate,
    "RepeatVector": Reader.repeat,
    **dict.fromkeys(POOLINGS, Reader.pooling),
    **dict.fromkeys(RECURRENT, Reader.recurrent),
    **dict.fromkeys([*POINTWISE, "SpatialDropout1D"], Reader.keeps_size),
}
