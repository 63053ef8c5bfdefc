"""Equinox's modules and ours: the same numbers and gradients, there and back; and what is refused."""

import functools
import subprocess
import sys
from typing import Any, NamedTuple

import conversion
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conversion import assert_close, assert_weight_gradients, redraw, run
from damage import broken_leaf
from jax import lax

import jaxrnn
from jaxrnn import GRU, LSTM, Apply, Bidirectional, Dropout, Elman, Embed, LayerNorm, Linear, Stack
from jaxrnn.convert.equinox import from_equinox, to_equinox

X64 = True
PROMOTION = "standard"

T, B, D, V, E = 6, 3, 2, 8, 7


@pytest.fixture
def eqx():
    return conversion.peer("equinox")


class Configuration(NamedTuple):
    """One model: recurrent cells of sizes 5, 4, ..., what is around them, and how it is run."""

    cells: tuple[str, ...]
    below: str | None
    norm: str | None
    function: str | None
    biases: tuple[bool, ...]
    initial: bool
    dtype: Any


def configuration(seed):
    rng = np.random.default_rng(seed)
    kinds = ("LSTMCell", "GRUCell")
    cells = (kinds[seed % 2], *(kinds[k] for k in rng.integers(0, 2, rng.integers(0, 2))))
    below = (None, "Linear", "Embedding")[rng.integers(3)]
    norm = (None, "both", "weight", "bias")[rng.integers(4)]
    function = (None, "relu", "tanh", "softplus")[rng.integers(4)]
    biases = tuple(bool(each) for each in rng.integers(0, 4, 4) > 0)
    dtype = jnp.float32 if seed % 5 == 4 else jnp.float64
    return Configuration(cells, below, norm, function, biases, bool(rng.integers(2)), dtype)


def build(eqx, config):
    """The modules in order, and xs."""
    key, dtype = jax.random.key(0), config.dtype
    rng = np.random.default_rng(1)
    modules, size = [], D
    xs = rng.normal(size=(T, B, D)).astype(dtype)
    if config.below == "Linear":
        modules.append(eqx.filter_eval_shape(eqx.nn.Linear, E, D, config.biases[0], dtype=dtype, key=key))
        xs = rng.normal(size=(T, B, E)).astype(dtype)
    elif config.below == "Embedding":
        modules.append(eqx.filter_eval_shape(eqx.nn.Embedding, V, D, dtype=dtype, key=key))
        xs = rng.integers(0, V, (T, B))
    for k, kind in enumerate(config.cells):
        make = getattr(eqx.nn, kind)
        modules.append(eqx.filter_eval_shape(make, size, 5 - k, config.biases[k + 1], dtype=dtype, key=key))
        size = 5 - k
    if config.norm:
        weight, bias = config.norm != "bias", config.norm != "weight"
        modules.append(eqx.nn.LayerNorm(size, eps=1e-3, use_weight=weight, use_bias=bias, dtype=dtype))
        modules.append(eqx.nn.Dropout(0.4, inference=True))
    if config.function:
        functions = eqx.nn.Lambda(getattr(jax.nn, config.function)), eqx.nn.Identity()
        modules.append(eqx.nn.Sequential(functions))
    return (tuple(modules) if len(modules) > 1 else modules[0]), xs


def weights_of(eqx, module):
    """The arrays by place, and the way back."""
    arrays, rest = eqx.partition(module, lambda leaf: hasattr(leaf, "shape"))
    leaves, structure = jax.tree.flatten(arrays)

    def rebuild(weights):
        return eqx.combine(jax.tree.unflatten(structure, [weights[str(k)] for k in range(len(leaves))]), rest)

    return redraw(2, {str(k): np.zeros(leaf.shape, leaf.dtype) for k, leaf in enumerate(leaves)}), rebuild


def apply(module, carry, xs):
    """A module over a sequence of a batch, with our carry."""
    if isinstance(module, tuple):
        carries = []
        for each, given in zip(module, carry, strict=True):
            new, xs = apply(each, given, xs)
            carries.append(new)
        return tuple(carries), xs
    if isinstance(carry, jaxrnn.LSTMCarry | jaxrnn.GRUCarry):

        def step(carry, x):
            given = tuple(carry) if isinstance(carry, jaxrnn.LSTMCarry) else carry.h
            states = jax.vmap(module)(x, given)
            new = type(carry)(*(states if isinstance(states, tuple) else (states,)))
            return new, new.h

        return lax.scan(step, carry, xs)
    return carry, jax.vmap(jax.vmap(module))(xs)


def check(eqx, seed):
    config = configuration(seed)
    module, xs = build(eqx, config)
    weights, rebuild = weights_of(eqx, module)

    def convert(weights):
        return from_equinox(rebuild(weights))[1]

    cell, params = from_equinox(rebuild(weights))
    assert all(leaf.dtype == config.dtype for leaf in jax.tree.leaves(params))
    carry = cell.initial_carry(params, (B,))
    carry = redraw(3, carry) if config.initial else jax.tree.map(np.asarray, carry)

    def theirs(weights, carry, xs):
        return apply(rebuild(weights), carry, xs)

    factors = redraw(4, jax.eval_shape(theirs, weights, carry, xs), 1.0)

    def loss(weights, carry, xs):
        result = theirs(weights, carry, xs)
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, factors, result))), result

    floating = jnp.issubdtype(xs.dtype, jnp.floating)
    gradients, result = jax.jit(jax.grad(loss, (0, 1, 2) if floating else (0, 1), has_aux=True))(weights, carry, xs)
    ours, (p, c, x) = run(cell, params, carry if config.initial else None, xs, factors)
    assert_close(ours, result)
    assert_weight_gradients(convert, weights, p, gradients[0])
    if config.initial:
        assert_close(c, gradients[1], "gradient of the carry")
    if floating:
        assert_close(x, gradients[2], "gradient of xs")

    again = from_equinox(to_equinox(cell, params))
    assert again[0] == cell
    assert_close(again[1], params)
    if config.norm != "bias":  # which gets a weight of ones
        back, _ = eqx.partition(to_equinox(cell, params), eqx.is_array)
        assert_close(jax.tree.leaves(back), list(weights.values()))


@pytest.mark.parametrize("seed", range(2))
def test_random_models(eqx, seed):
    check(eqx, seed)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(2, 28))
def test_more_random_models(eqx, seed):
    check(eqx, seed)


KEY = functools.partial(jax.random.key, 0)
IMPORTS = {
    "no module": (
        lambda eqx: 3,
        TypeError,
        "module: expected a module of Equinox, or a tuple or list of them, got int",
    ),
    "inside": (lambda eqx: [eqx.nn.Identity(), abs], TypeError, r"module\[1\]: expected a module of Equinox"),
    "none": (lambda eqx: (), ValueError, "module: expected at least one module"),
    "another": (
        lambda eqx: eqx.nn.Conv1d(1, 1, 1, key=KEY()),
        ValueError,
        "module: Conv1d has no counterpart: expected LSTMCell, GRUCell",
    ),
    "subclass": (
        lambda eqx: type("Mine", (eqx.nn.Identity,), {"__module__": "mine"})(),
        ValueError,
        "module: Mine has no counterpart",
    ),
    "own call": (
        lambda eqx: (eqx.nn.Identity(), type("Sequential", (eqx.nn.Sequential,), {"__call__": abs})([])),
        ValueError,
        r"module\[1\]: Sequential has no counterpart",
    ),
    "function": (
        lambda eqx: eqx.nn.Sequential([eqx.nn.Lambda(jax.nn.glu)]),
        ValueError,
        r"module.layers\[0\].fn: expected an activation of JAX.*; got glu",
    ),
    "scalar": (lambda eqx: eqx.nn.Linear("scalar", 3, key=KEY()), ValueError, "module: Linear of a 'scalar' has no"),
    "shape": (lambda eqx: eqx.nn.LayerNorm((3, 4)), ValueError, r"module: LayerNorm over the shape \(3, 4\) has no"),
    "rate": (lambda eqx: eqx.nn.Dropout(1.0), ValueError, r"Dropout.rate: expected a number in \[0, 1\)"),
    "sizes": (
        lambda eqx: (eqx.nn.Linear(2, 3, key=KEY()), eqx.nn.Linear(4, 2, key=KEY())),
        ValueError,
        r"Stack: cells\[1\] reads size 4 and gets 3",
    ),
    "itself": (lambda eqx: containing_itself(), ValueError, r"module\[0\]: list contains itself"),
    "mixed": (
        lambda eqx: (eqx.nn.Linear(2, 3, key=KEY()), eqx.nn.Linear(3, 2, key=KEY(), dtype=jnp.float32)),
        ValueError,
        r"Equinox: module\[1\].weight is float32, and module\[0\].weight is float64",
    ),
}


def containing_itself():
    modules = []
    modules.append(modules)
    return modules


@pytest.mark.parametrize(("make", "error", "message"), list(IMPORTS.values()), ids=list(IMPORTS))
def test_import_is_refused(eqx, make, error, message):
    with pytest.raises(error, match=message):
        from_equinox(make(eqx))


def random_params(cell):
    shapes = jaxrnn.check.shapes_of_params(cell)
    return redraw(6, jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes))


EXPORTS = {
    "peephole": (LSTM(3, 4, peephole=True), "cell: LSTM.*: peephole=True: equinox.nn.LSTMCell has no such option"),
    "inside": (
        Stack((Linear(2, 3), GRU(3, 4, False))),
        r"cell.cells\[1\]: GRU.*: reset_after=False: equinox.nn.GRUCell",
    ),
    "Elman": (Elman(3, 4), "cell: Elman.*: it has no counterpart in Equinox"),
    "direction": (Bidirectional(GRU(3, 4), GRU(3, 4)), "cell: Bidirectional.*: it has no counterpart in Equinox"),
    "skip": (Stack((GRU(3, 4), GRU(7, 4)), skip=True), "cell: Stack.*: it has no counterpart in Equinox"),
    "per_sequence": (Dropout(0.1, per_sequence=True), "cell: Dropout.*: it has no counterpart"),
    "activation": (Apply(("hard_tanh", -0.5)), "cell: Apply.*: it has no counterpart"),
}


@pytest.mark.parametrize(("cell", "message"), list(EXPORTS.values()), ids=list(EXPORTS))
def test_export_is_refused(eqx, cell, message):
    with pytest.raises(ValueError, match=message):
        to_equinox(cell, random_params(cell))


def test_weights_that_are_traced(eqx):
    params = random_params(GRU(3, 4))
    with pytest.raises(TypeError, match=r"params.w_x: expected numbers, got a tracer: convert outside of jax.jit"):
        jax.jit(lambda params: to_equinox(GRU(3, 4), params))(params)
    with pytest.raises(
        TypeError, match=r"module.weight_ih: expected numbers, got a tracer: convert outside of jax.jit"
    ):
        jax.jit(lambda module: from_equinox(module)[1])(to_equinox(GRU(3, 4), params))


def test_missing_weights(eqx):
    params = random_params(GRU(3, 4))
    with pytest.raises(ValueError, match=r"params\.w_h: .* got None"):
        to_equinox(GRU(3, 4), params._replace(w_h=None))
    again = from_equinox(to_equinox(GRU(3, 4), params._replace(b_hn=None)))[1]
    assert (again.b == params.b).all()
    assert (again.b_hn == 0).all()
    assert from_equinox(to_equinox(GRU(3, 4), params._replace(b=None, b_hn=None)))[1].b is None


def test_every_kind_of_module(eqx):
    parts = (Embed(5, 3), LSTM(3, 4), Apply("identity"), Apply("elu"), Dropout(0.25), LayerNorm(4, 1e-2), Linear(4, 2))
    cell = Stack((*parts, Stack((Linear(2, 3),))))
    params = random_params(cell)
    found, again = from_equinox(to_equinox(cell, params))
    assert found == cell
    assert_close(again, params)


@pytest.mark.parametrize("part", range(4))
def test_damaged_modules(eqx, part):
    cell = Stack((Embed(5, 3), GRU(3, 4), LSTM(4, 3), LayerNorm(3), Linear(3, 2)))
    module = jax.tree.map(np.asarray, to_equinox(cell, random_params(cell)))
    leaves, structure = jax.tree.flatten(module)
    good = 0
    for seed in range(250 * part, 250 * part + 250):
        rng = np.random.default_rng(seed)
        broken = list(leaves)
        k = rng.integers(len(leaves))
        broken[k] = broken_leaf(rng, leaves[k]) if rng.random() < 0.8 else leaves[rng.integers(len(leaves))]
        try:
            found, params = from_equinox(jax.tree.unflatten(structure, broken))
        except (TypeError, ValueError):
            continue
        assert isinstance(found, jaxrnn.Cell)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
        good += 1
    assert 0 < good < 100


SCRIPT = """
import sys
for name in ("torch", "keras", "haiku", "equinox", "onnx"):
    sys.modules[name] = None
import jaxrnn.convert
from jaxrnn.convert.equinox import from_equinox
try:
    from_equinox(3)
except TypeError as error:
    assert "expected a module of Equinox" in str(error)
"""


def test_equinox_is_not_imported():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
