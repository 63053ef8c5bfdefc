"""Several processes that train one model together: what must be equal in all of them, and what one does for all."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxrnn.typing import PyTree

SHOWN = 300
"""How many bytes of a description an error shows."""


class ProcessError(RuntimeError):
    """Another process of the same training has failed or ended; none of them can go on alone."""


def spread(tree: PyTree) -> bool:
    """Whether an array of `tree` lies on devices of several processes."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    return any(not (isinstance(leaf, jax.core.Tracer) or leaf.is_fully_addressable) for leaf in arrays)


def agree(name: str, said: str) -> None:
    """Raises in every process if `said` is not the same text in all of them; it names the first line that differs."""
    digest = np.frombuffer(hashlib.blake2b(said.encode(), digest_size=16).digest(), np.uint32)
    if (_gathered(digest) == digest).all():
        return
    texts = [text.splitlines() for text in texts_of_all(said)]
    other = next(k for k, lines in enumerate(texts) if lines != texts[0])
    pairs = itertools.zip_longest(texts[0], texts[other], fillvalue="nothing")
    first, second = next((a, b) for a, b in pairs if a != b)
    raise ValueError(
        f"{name}: expected the same in all processes; process 0 has {first[:SHOWN]}, "
        f"process {other} has {second[:SHOWN]}"
    )


def agree_on(name: str, tree: PyTree) -> None:
    """Raises in every process if the numbers of an array of `tree` are not the same in all of them."""
    agree(name, described(tree))


def described(tree: PyTree) -> str:
    """A line for every array of a tree: its path, dtype and shape, and a digest of its numbers if it is not global."""

    def line(path, leaf):
        if spread(leaf):
            return f"{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)} on all devices".lstrip()
        keys = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if keys else leaf)
        digest = hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=8).hexdigest()
        text = f"{jax.tree_util.keystr(path)} {array.dtype}{list(array.shape)} with the numbers of digest {digest}"
        return text.lstrip()

    return "\n".join(line(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree))


def merged(said: Mapping[str, str]) -> dict[str, str]:
    """The lines of all processes: one that is equal in all of them as it is, of another those of each process."""
    every = [json.loads(text) for text in texts_of_all(json.dumps(dict(said)))]

    def line(name):
        each = [lines.get(name, "nothing") for lines in every]
        return each[0] if len(set(each)) == 1 else "; ".join(each)

    return {name: line(name) for name in dict.fromkeys(itertools.chain(*every))}


def by_first(function: Callable[[], Any], *, several: bool = True) -> Any:
    """What `function()` gives in process 0, a JSON value, in every process; its exception is raised in all of them.

    If not `several`, it is what it gives here.
    """
    if not several:
        return function()
    error, answer = None, {}
    if jax.process_index() == 0:
        try:
            answer = {"value": function()}
        except Exception as raised:  # whatever it is, the others must not wait
            error, answer = raised, {"error": f"{type(raised).__name__}: {raised}"}
    answer = json.loads(texts_of_all(json.dumps(answer))[0])
    if error is not None:
        raise error
    if "error" in answer:
        raise ProcessError(f"process 0 raised {answer['error']}")
    return answer["value"]


def to_host(tree: PyTree) -> PyTree:
    """`tree` with NumPy arrays, also of what lies on devices of several processes, which must all ask for it."""
    from jax.experimental.multihost_utils import process_allgather

    def pulled(leaf):
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return np.asarray(process_allgather(leaf, tiled=True))

    return jax.tree.map(pulled, tree)


@contextlib.contextmanager
def in_all(*, several: bool = True) -> Iterator[None]:
    """An exception that one of several processes raises in this block ends all of them, so that none waits for it."""
    error = None
    try:
        yield
    except Exception as raised:  # whatever it is
        error = raised
    if several:
        texts = texts_of_all("" if error is None else f"{type(error).__name__}: {error}")
        failed = next((k for k, text in enumerate(texts) if text), None)
        if error is None and failed is not None:
            raise ProcessError(f"process {failed} raised {texts[failed]}")
    if error is not None:
        raise error


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Turns the error of a connection that another process has closed into one that says so."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).strip().splitlines()[0][:SHOWN]
        raise ProcessError(
            f"process {jax.process_index()} of {jax.process_count()} lost another one, which failed or was ended: "
            f"{reason}. Start all processes again; with checkpoints= they continue from the last one"
        ) from error


def texts_of_all(text: str) -> list[str]:
    """The texts of all processes."""
    data = text.encode()
    sizes = _gathered(np.array([len(data)], np.int32))[:, 0]
    rows = _gathered(np.frombuffer(data.ljust(int(sizes.max())), np.uint8))
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def _gathered(array: np.ndarray) -> np.ndarray:
    """The arrays of all processes, (processes, ...)."""
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(array))
