"""Models in files: the cell as JSON, and its params as raw numbers beside it. Nothing in a file is ever run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

import jaxrnn
from jaxrnn import check
from jaxrnn.cell import Cell
from jaxrnn.engines.arrays import on_device
from jaxrnn.training.processes import by_first, spread, to_host
from jaxrnn.typing import Foreign, Named, PyTree, WithParams

FORMAT, VERSION = "jaxrnn", 1
INDEX = "cell.json"
ARRAYS = re.compile(r"params-[0-9a-f]{64}\.bin")
INDEX_LIMIT = 2**20
"""The largest size of the JSON in bytes: enough for 2000 layers, and for computing shapes in less than a minute."""

_NAMES = """
    bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 int2 int4 uint2 uint4 float16 float32 float64 bfloat16
    complex64 complex128 float4_e2m1fn float8_e3m4 float8_e4m3 float8_e4m3b11fnuz float8_e4m3fn float8_e4m3fnuz
    float8_e5m2 float8_e5m2fnuz float8_e8m0fnu
"""
DTYPES = {name: jnp.dtype(name) for name in _NAMES.split()}
KINDS = (np.bool_, jnp.integer, jnp.floating, jnp.complexfloating)


def save(path: str | os.PathLike, cell: Cell, params: PyTree) -> None:
    """Writes a model to the directory `path`, from which `load` reads it.

    The directory holds `cell.json`, with the fields of the cell and the index of the params, and one file with the
    bytes of the params, which `cell.json` names by its SHA-256. `cell.json` is written last, in one atomic step, so an
    interrupted call leaves the model that was there before, or none. If the params lie on devices of several processes,
    all of them call it, and process 0 writes.

    Args:
      path: A directory that does not exist yet or is empty, or one that `save` wrote, whose model is replaced.
      cell: Any cell or composition. Its fields must be None, booleans, numbers, strings, cells, or tuples of these.
      params: Params with the shapes of `cell.init`, in any dtype of the same kind; None may stand in place of an array.
        Or the params of many models, with a leading axis of members on every array.

    Raises:
      TypeError: If a field is something else, like a function; the message names it. Use the name of an activation
        instead.
      TypeError: If the params are not those of the cell; the message names the leaf.
      ValueError: If the params are not those of the cell; the message names the leaf.
      FileExistsError: If there is something else at `path`. It is left as it is.

    Examples:
      >>> import jax, jaxrnn, tempfile
      >>> from jaxrnn.training.saving import load, save
      >>> cell = jaxrnn.Stack((jaxrnn.LSTM(3, 4), jaxrnn.Linear(4, 2)))
      >>> params = cell.init(jax.random.key(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(f"{folder}/model", cell, params)
      ...     again, loaded = load(f"{folder}/model")
      >>> again == cell, bool((loaded[0].w_x == params[0].w_x).all())
      (True, True)
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: expected that of a directory, got {check.brief(path)}; it comes first")
    path = os.path.abspath(os.fspath(path))
    check.a_cell("cell", cell)
    index = {"format": FORMAT, "version": VERSION, "cell": _encode(cell, type(cell).__name__)}
    arrays = [None if leaf is None else _native(to_host(leaf)) for _, _, leaf in _matched(cell, _shapes(cell), params)]
    by_first(functools.partial(_write, path, index, arrays), several=spread(params))


def _write(path: str, index: Named, arrays: list[np.ndarray | None]) -> None:
    index["params"] = [None if a is None else {"dtype": a.dtype.name, "shape": list(a.shape)} for a in arrays]

    # Written into a directory of its own where there is none yet, so that `path` appears complete or not at all.
    new = not os.path.lexists(path) or (os.path.isdir(path) and not os.listdir(path))
    if not new and not _is_save(path):
        raise FileExistsError(
            f"{path}: expected nothing or a saved model there; it is something else and is left alone"
        )
    directory = f"{path}.{secrets.token_hex(8)}.tmp" if new else path
    try:
        if new:
            os.makedirs(directory)
        name = _write_arrays(directory, arrays)
        text = json.dumps(index | {"arrays": name}, allow_nan=False, indent=1).encode()
        if len(text) > INDEX_LIMIT:
            raise ValueError(f"cell: expected at most {INDEX_LIMIT} bytes of JSON, which `load` reads, got {len(text)}")
        with _replacing(os.path.join(directory, INDEX)) as file:
            file.write(text)
        if new:
            os.rename(directory, path)
    except BaseException:
        if new:
            shutil.rmtree(directory, ignore_errors=True)
        raise
    for other in os.listdir(path):
        if ARRAYS.fullmatch(other) and other != name:
            os.remove(os.path.join(path, other))


def load(path: str | os.PathLike, *, cells: Sequence[type[Cell]] = ()) -> WithParams:
    """Reads the cell and the params that `save` wrote to `path`.

    A file can name only cells of jaxrnn, and those that `cells` lists. It holds nothing but the values of their fields,
    and its params are read only if the shapes of `cell.init` agree with the sizes of the files. So a file from
    elsewhere can neither run code nor take more memory than its own size.

    Args:
      path: The directory.
      cells: Your own cell classes that the model is made of. They are known by their names alone.

    Returns:
      The cell, equal to the saved one, and its params, as JAX arrays with the dtypes and bits that were saved.

    Raises:
      FileNotFoundError: If nothing is there.
      ValueError: If it is not a model, is damaged, or names an unknown cell; the message says what is wrong. Also if it
        holds 64-bit numbers and `jax.enable_x64` is off.

    Examples:
      >>> import jax, jaxrnn, tempfile
      >>> from jaxrnn.training import load, save
      >>> cell = jaxrnn.GRU(3, 4)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(f"{folder}/model", cell, cell.init(jax.random.key(0)))
      ...     load(f"{folder}/model")[0]
      GRU(input_size=3, hidden_size=4)
    """
    path = os.path.abspath(os.fspath(path))
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{path}: no saved model there")
    known = _known(cells)
    try:
        index = _read_index(path)
        cell = _decode(index["cell"], known)
        if not isinstance(cell, Cell):
            raise ValueError(f"{INDEX}: expected a cell, got {cell!r:.80}")
        try:
            expected = _shapes(cell)
        except Exception as error:  # whatever the init of a cell raises at fields that it was not made for
            raise ValueError(f"{cell!r:.200} has no params: {error}") from error
        return cell, _read_arrays(path, index, cell, expected)
    except RecursionError:
        raise ValueError(f"{path}: cells are nested too deeply") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error


def _encode(value: Any, name: str) -> PyTree:
    """Encodes a field's value as JSON: a cell as an object with its class, infinity or NaN as one with a string."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if type(value) is tuple:
        return [_encode(each, f"{name}[{k}]") for k, each in enumerate(value)]
    if isinstance(value, Cell):
        kind = type(value)
        fields = {
            f.name: _encode(getattr(value, f.name), f"{name}.{f.name}") for f in dataclasses.fields(value) if f.init
        }
        return {"cell": f"jaxrnn.{kind.__name__}" if kind in _builtin().values() else kind.__name__, "fields": fields}
    advice = "; a callable cannot be saved, an activation's name can" if callable(value) else ""
    raise TypeError(
        f"{name}: expected None, a boolean, number, string, cell or tuple of these, got {value!r:.80}{advice}"
    )


def _decode(value: Any, known: dict[str, type[Cell]]) -> PyTree:
    """The inverse of `_encode`."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case list():
            return tuple(_decode(each, known) for each in value)
        case {"float": "nan" | "inf" | "-inf" as number, **more} if not more:
            return float(number)
        case {"cell": str(name), "fields": dict(fields), **more} if not more:
            if name not in known:
                own = "" if name.startswith("jaxrnn.") else f"; if {name} is a cell of yours, pass cells=({name},)"
                raise ValueError(f"{INDEX}: unknown cell {name!r:.80}{own}")
            kind = known[name]
            wrong = set(fields) - {field.name for field in dataclasses.fields(kind) if field.init}
            if wrong:
                raise ValueError(f"{INDEX}: {name} has no fields {sorted(wrong)!r:.80}")
            values = {field: _decode(each, known) for field, each in fields.items()}
            try:
                return kind(**values)
            except Exception as error:  # whatever a cell's own checks raise
                raise ValueError(f"{INDEX}: {name} cannot have these fields: {error}") from error
    raise ValueError(f"{INDEX}: expected a value or a cell, got {value!r:.80}")


def _builtin() -> dict[str, type[Cell]]:
    things = {f"jaxrnn.{name}": getattr(jaxrnn, name) for name in jaxrnn.__all__}
    return {name: thing for name, thing in things.items() if _is_concrete(thing)}


def _is_concrete(thing: Any) -> bool:
    return isinstance(thing, type) and issubclass(thing, Cell) and not inspect.isabstract(thing)


def _known(cells: Sequence[type[Cell]]) -> dict[str, type[Cell]]:
    known = _builtin()
    for k, kind in enumerate(cells):
        if not _is_concrete(kind):
            raise TypeError(f"cells[{k}]: expected a class of cells, got {kind!r}")
        if known.setdefault(kind.__name__, kind) is not kind:
            raise ValueError(f"cells: two classes are named {kind.__name__}")
    return known


def _shapes(cell: Cell) -> PyTree:
    return jax.eval_shape(cell.init, check.shape_of_key())


def _leaves(tree: PyTree):
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: leaf is None)


def _matched(cell: Cell, expected: Any, params: PyTree) -> Iterator[tuple[str, PyTree, PyTree]]:
    """Yields for each leaf its name, the leaf of `cell.init`, and the leaf of `params`, which fits."""
    (wanted, structure), (given, given_structure) = _leaves(expected), _leaves(params)
    if structure != given_structure:
        raise TypeError(f"params: {cell!r:.200} takes {structure}, got {given_structure}")
    for path, have in given:
        if have is not None and (
            not isinstance(have, (np.ndarray, np.generic, jax.Array)) or isinstance(have, jax.core.Tracer)
        ):
            raise TypeError(f"{_named(path)}: expected an array, got {type(have).__name__}")
    members = _members((want, have) for (_, want), (_, have) in zip(wanted, given, strict=True))
    for (path, want), (_, have) in zip(wanted, given, strict=True):
        if have is not None:
            _check_leaf(_named(path), members, want, have)
        yield _named(path), want, have


def _named(path: Any) -> str:
    return f"params{jax.tree_util.keystr(path)}"


def _members(leaves: Iterable[tuple[PyTree, PyTree]]) -> tuple[int, ...]:
    """(M,) if the first array has an axis of M members in front of the expected shape, else ()."""
    for want, have in leaves:
        if want is not None and have is not None:
            return have.shape[:1] if have.shape[1:] == want.shape and have.shape else ()
    return ()


def _check_leaf(name: str, members: tuple[int, ...], want: Any, have: Any) -> None:
    """Checks that `have`, read or given, has the kind and the shape of `want`, with the axis of members."""
    if want is None:
        raise ValueError(f"{name}: expected None, got shape {have.shape}")
    if have.shape != (*members, *want.shape):
        raise ValueError(f"{name}: expected shape {(*members, *want.shape)}, got {have.shape}")
    kinds = any(jnp.issubdtype(have.dtype, kind) and jnp.issubdtype(want.dtype, kind) for kind in KINDS)
    if have.dtype.name not in DTYPES or not kinds:
        raise ValueError(f"{name}: expected a dtype of the kind of {want.dtype}, got {have.dtype}")


def _native(array: np.ndarray) -> np.ndarray:
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _is_save(path: str) -> bool:
    with contextlib.suppress(ValueError, OSError, RecursionError):
        _read_index(path)
        return True
    return False


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[BinaryIO]:
    """Opens a file that replaces the one at `path` when it is complete."""
    temporary = f"{path}.{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def _write_arrays(directory: str, arrays: list[np.ndarray | None]) -> str:
    """Writes the bytes of all arrays to one file, and returns its name, which contains their hash."""
    total = hashlib.sha256()
    blocks = [np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for array in arrays if array is not None]
    for block in blocks:
        total.update(block)
    name = f"params-{total.hexdigest()}.bin"
    with _replacing(os.path.join(directory, name)) as file:
        for block in blocks:
            file.write(block)
    return name


def _open(path: str, name: str) -> BinaryIO:
    path = os.path.join(path, name)
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{name}: expected a file")
    return open(path, "rb")


def _read_index(path: str) -> Named:
    with _open(path, INDEX) as file:
        text = file.read(INDEX_LIMIT + 1)
    if len(text) > INDEX_LIMIT:
        raise ValueError(f"{INDEX}: longer than {INDEX_LIMIT} bytes")

    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    try:
        index = json.loads(text, parse_constant=refuse)
    except ValueError as error:
        raise ValueError(f"{INDEX}: expected JSON: {error}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"{INDEX}: not a model of jaxrnn")
    if index.get("version") != VERSION:
        raise ValueError(f"{INDEX}: expected version {VERSION}, got {index.get('version')!r:.80}")
    if set(index) != {"format", "version", "cell", "params", "arrays"}:
        raise ValueError(f"{INDEX}: expected format, version, cell, params and arrays, got {sorted(index)!r:.80}")
    return index


def _read_arrays(path: str, index: Named, cell: Cell, expected: Any) -> PyTree:
    """Reads the params, in the structure of `expected`; everything is checked before the first array is read."""
    wanted, structure = _leaves(expected)
    name, entries = index["arrays"], index["params"]
    if not isinstance(name, str) or not ARRAYS.fullmatch(name):
        raise ValueError(f"{INDEX}: arrays: expected the name of a file of params, got {name!r:.80}")
    if not isinstance(entries, list) or len(entries) != len(wanted):
        raise ValueError(f"{INDEX}: params: expected a list of {len(wanted)}, those of {cell!r:.200}")
    kept = [_entry(leaf, entry) for (leaf, _), entry in zip(wanted, entries, strict=True)]
    members = _members((want, each) for (_, want), each in zip(wanted, kept, strict=True))
    for (leaf, want), each in zip(wanted, kept, strict=True):
        if each is None:
            continue
        _check_leaf(f"{INDEX}: {_named(leaf)}", members, want, each)
        if jax.dtypes.canonicalize_dtype(each.dtype) != each.dtype:
            raise ValueError(f"{_named(leaf)} is {each.dtype}: load it under jax.enable_x64(True)")
    sizes = [0 if each is None else math.prod(each.shape) * each.dtype.itemsize for each in kept]
    with _open(path, name) as file:
        size = os.fstat(file.fileno()).st_size
        if size != sum(sizes):
            raise ValueError(f"{name}: expected {sum(sizes)} bytes, got {size}: truncated or of another model")
        blocks = [file.read(size) for size in sizes]
    total = hashlib.sha256()
    for block in blocks:
        total.update(block)
    if name != f"params-{total.hexdigest()}.bin":
        raise ValueError(f"{name}: the bytes are not those that were written")
    leaves = [
        None if each is None else on_device(np.frombuffer(block, np.uint8).view(each.dtype).reshape(each.shape))
        for each, block in zip(kept, blocks, strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)


class _Entry(NamedTuple):
    """The entry of the index for one array of the params."""

    shape: tuple[int, ...]
    dtype: np.dtype


def _entry(path: Any, entry: Foreign) -> _Entry | None:
    """Reads the entry for a leaf of the params; None if the leaf is None."""
    match entry:
        case None:
            return None
        case {"dtype": str(kind), "shape": list(shape), **more} if (
            not more and kind in DTYPES and all(type(size) is int and size >= 0 for size in shape)
        ):
            dtype = DTYPES[kind]
        case _:
            raise ValueError(f"{INDEX}: {_named(path)}: expected null or dtype and shape, got {entry!r:.80}")
    return _Entry(tuple(shape), dtype)
