"""Haiku's parameters and ours: the same numbers and gradients, there and back; and what is refused."""

import subprocess
import sys
from typing import Any, NamedTuple

import conversion
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conversion import assert_close, assert_weight_gradients, redraw, run
from damage import damaged

import jaxrnn
from jaxrnn import GRU, LSTM, Bidirectional, ConvLSTM, Dropout, Elman, Embed, LayerNorm, Linear, Stack
from jaxrnn.convert.haiku import from_haiku, to_haiku

X64 = True
PROMOTION = "standard"

T, B, D, H, G, V, E = 6, 3, 2, 5, 4, 8, 7
SPATIAL = (4, 3, 5)
LSTM_CARRIES = (jaxrnn.LSTMCarry, jaxrnn.ConvLSTMCarry)


@pytest.fixture
def haiku():
    return conversion.peer("haiku")


class Configuration(NamedTuple):
    """One model: its cores, what is around them, and how it is run."""

    cores: tuple[str, ...]
    below: str | None
    norm: bool
    options: dict
    names: bool
    initial: bool
    dtype: Any


KINDS = ("LSTM", "GRU", "VanillaRNN", "ConvLSTM")


def configuration(seed):
    rng = np.random.default_rng(seed)
    kind = KINDS[seed % 4]
    if kind == "ConvLSTM":
        cores, below, norm, names = (f"Conv{seed // 4 % 3 + 1}DLSTM",), None, False, False
    else:
        others = [KINDS[k] for k in rng.integers(0, 3, rng.integers(0, 3))]
        cores = (kind, *others)
        below, norm = (None, "linear", "embed")[rng.integers(3)], bool(rng.integers(2))
        names = bool(rng.integers(2))
    options = {"double_bias": bool(rng.integers(2))}
    dtype = jnp.float32 if seed % 5 == 4 else jnp.float64
    return Configuration(cores, below, norm, options, names, bool(rng.integers(2)), dtype)


def build(hk, config):
    """The function of (states, xs) that the model is, its modules in order, and xs."""
    names = [f"core{k}" for k in range(len(config.cores))]

    def model(states, xs):
        cores = []
        for k, kind in enumerate(config.cores):
            name = {"name": names[k]} if config.names else {}
            given = config.options if kind == "VanillaRNN" else {}
            if kind.startswith("Conv"):
                cores.append(getattr(hk, kind)(SPATIAL[: int(kind[4])], output_channels=H, kernel_shape=3))
            else:
                cores.append(getattr(hk, kind)(H - k, **name, **given))
        if config.below == "embed":
            xs = hk.Embed(V, D)(xs)
        elif config.below == "linear":
            xs = hk.Linear(D, with_bias=False)(xs)
        core = hk.DeepRNN(cores) if len(cores) > 1 else cores[0]
        ys, states = hk.dynamic_unroll(core, xs, states)
        return (hk.LayerNorm(-1, True, True, eps=1e-3)(ys) if config.norm else ys), states

    rng = np.random.default_rng(1)
    size = (*SPATIAL[: int(config.cores[0][4])], D) if config.cores[0].startswith("Conv") else (D,)
    xs = rng.normal(size=(T, B, *size)).astype(config.dtype)
    if config.below == "embed":
        xs = rng.integers(0, V, (T, B))
    elif config.below == "linear":
        xs = rng.normal(size=(T, B, E)).astype(config.dtype)
    around = ([config.below] if config.below else []), (["layer_norm"] if config.norm else [])
    kinds = {name: snake(kind) for name, kind in zip(names, config.cores, strict=True)}
    modules = {**dict(zip(around[0], around[0], strict=True)), **kinds, **dict(zip(around[1], around[1], strict=True))}
    return hk.without_apply_rng(hk.transform(model)), modules if config.names else None, xs


def snake(kind):
    return {"VanillaRNN": "vanilla_rnn"}.get(kind, kind.lower())


def to_states(hk, carry):
    """Our carry as Haiku's states."""
    if isinstance(carry, LSTM_CARRIES):
        return hk.LSTMState(carry.h, carry.c)
    if type(carry) is tuple:
        return tuple(to_states(hk, each) for each in carry if each != ())
    return carry.h


def to_carry(states, like):
    """Haiku's states as our carry."""
    if isinstance(like, LSTM_CARRIES):
        return type(like)(*states)
    if type(like) is tuple:
        rest = iter(states)
        return tuple(() if each == () else to_carry(next(rest), each) for each in like)
    return type(like)(states)


def inner(carry):
    """The carries of the cores, as one or a tuple."""
    cores = tuple(each for each in carry if each != ()) if type(carry) is tuple else (carry,)
    return cores if len(cores) > 1 else cores[0]


def flat(tree):
    return {f"{module}:{name}": array for module, named in tree.items() for name, array in named.items()}


def unflat(weights):
    tree = {}
    for name, array in weights.items():
        module, below = name.split(":")
        tree.setdefault(module, {})[below] = array
    return tree


def zero_carry(config):
    parts = []
    for k, kind in enumerate(config.cores):
        if kind.startswith("Conv"):
            shape = (B, *SPATIAL[: int(kind[4])], H)
            parts.append(jaxrnn.ConvLSTMCarry(np.zeros(shape, config.dtype), np.zeros(shape, config.dtype)))
        else:
            zeros = np.zeros((B, H - k), config.dtype)
            carries = {"LSTM": jaxrnn.LSTMCarry, "GRU": jaxrnn.GRUCarry, "VanillaRNN": jaxrnn.ElmanCarry}
            parts.append(jaxrnn.LSTMCarry(zeros, zeros) if kind == "LSTM" else carries[kind](zeros))
    return tuple(parts) if len(parts) > 1 else parts[0]


def check(hk, seed):
    config = configuration(seed)
    model, modules, xs = build(hk, config)
    start = zero_carry(config)
    order = []

    def init(key):
        weights = model.init(key, to_states(hk, start), xs)
        order.extend(weights)  # which eval_shape sorts
        return weights

    shapes = jax.eval_shape(init, jax.random.key(0))
    # Haiku's arrays have the dtype of what they meet first, and tokens have none.
    shapes = jax.tree.map(lambda leaf: np.zeros(leaf.shape, config.dtype), shapes)
    weights = flat({name: redraw(2, shapes)[name] for name in order})
    spatial = SPATIAL[: int(config.cores[0][4])] if config.cores[0].startswith("Conv") else None
    given = {"spatial_shape": spatial, "epsilon": 1e-3, "modules": modules or ordered(config, order)}

    def convert(weights):
        return from_haiku(unflat(weights), **given)[1]

    cell, params = from_haiku(unflat(weights), **given)
    assert all(leaf.dtype == config.dtype for leaf in jax.tree.leaves(params))
    begin = cell.initial_carry(params, (B,))
    carry = redraw(3, begin)

    def theirs(weights, carry, xs):
        ys, states = model.apply(unflat(weights), to_states_of(hk, carry), xs)
        return to_carry_of(states, begin), ys

    factors = redraw(4, jax.eval_shape(theirs, weights, carry, xs), 1.0)

    def loss(weights, carry, xs):
        result = theirs(weights, carry, xs)
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, factors, result))), result

    floating = jnp.issubdtype(xs.dtype, jnp.floating)
    argnums = (0, 1, 2) if floating else (0, 1)
    gradients, (new, ys) = jax.jit(jax.grad(loss, argnums, has_aux=True))(weights, carry, xs)
    (ours_new, ours_ys), (p, c, x) = run(cell, params, carry, xs, factors)
    assert_close((ours_new, ours_ys), (new, ys))
    assert_weight_gradients(convert, weights, p, gradients[0])
    assert_close(c, gradients[1], "gradient of the carry")
    if floating:
        assert_close(x, gradients[2], "gradient of xs")

    back = to_haiku(cell, params, modules=modules, epsilon=1e-3)
    again = from_haiku(back, **given | {"modules": modules or given["modules"]})
    assert again[0] == cell
    assert_close(again[1], params)
    assert {name: array.shape for name, array in flat(back).items()}.items() >= {
        name: array.shape for name, array in weights.items()
    }.items()


def ordered(config, order):
    """What a user says where the dict does not: the modules in order, if there are several."""
    return None if order != sorted(order) else tuple(dict.fromkeys(module_of(name) for name in order))


def module_of(name):
    above, _, last = name.rpartition("/")
    return above if above and last in ("linear", "linear_1", "input_to_hidden", "hidden_to_hidden") else name


def to_states_of(hk, carry):
    return to_states(hk, inner(carry))


def to_carry_of(states, begin):
    cores = to_carry(states, inner(begin))
    if type(begin) is not tuple:
        return cores
    rest = iter(cores if isinstance(inner(begin), tuple) and not hasattr(inner(begin), "_fields") else (cores,))
    return tuple(() if each == () else next(rest) for each in begin)


@pytest.mark.parametrize("seed", range(4))
def test_random_models(haiku, seed):
    check(haiku, seed)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(4, 28))
def test_more_random_models(haiku, seed):
    check(haiku, seed)


def arrays(*shapes, seed=5, dtype=np.float64):
    return [redraw(seed, np.zeros(shape, dtype)) for shape in shapes]


def lstm(size=3, hidden=4):
    w, b = arrays((size + hidden, 4 * hidden), (4 * hidden,))
    return {"w": w, "b": b}


def linear(size=4, output=2):
    w, b = arrays((size, output), (output,))
    return {"w": w, "b": b}


GRU_WEIGHTS = dict(zip(("w_i", "w_h", "b"), arrays((3, 12), (4, 12), (12,)), strict=True))
ONE = {"lstm/linear": lstm()}
TWO = {"a/lstm/linear": lstm(), "a/linear": linear()}
IMPORTS = {
    "no dict": ([], {}, TypeError, "params: expected module names with dicts of arrays, got list"),
    "no module": (
        {"w": np.ones(3)},
        {},
        TypeError,
        "params: expected module names with dicts of arrays, got 'w': ndarray",
    ),
    "deep": ({"lstm/linear": {"w": {"x": 1}}}, {}, TypeError, "params: lstm/linear: w: expected an array, got a dict"),
    "empty": ({}, {}, ValueError, "params: expected at least one module, got none"),
    "unknown": ({"conv2_d": linear()}, {}, ValueError, "params: 'conv2_d' has no counterpart: expected lstm, gru"),
    "renamed": (
        {"encoder/linear": lstm()},
        {},
        ValueError,
        "params: 'encoder/linear' may be a Linear in 'encoder', or part of a core of that name: give modules=",
    ),
    "MLP": ({"mlp/~/linear_0": linear()}, {}, ValueError, "params: 'mlp/~/linear_0': an MLP has activations between"),
    "alphabetical": (
        {"linear": linear(3, 3), "lstm/linear": lstm(3, 3)},
        {},
        ValueError,
        "params: the names are in alphabetical order, as jax.tree.map leaves them",
    ),
    "kind": (ONE, {"modules": {"lstm": "rnn"}}, ValueError, "modules: lstm: expected a kind of lstm, .*, got 'rnn'"),
    "other": (ONE, {"modules": ("lstm_1",)}, ValueError, r"modules: expected each of \['lstm'\], got \['lstm_1'\]"),
    "twice": (ONE, {"modules": ("lstm", "lstm")}, ValueError, "modules: expected names, each once"),
    "no name": (ONE, {"modules": (1,)}, TypeError, "modules: expected names, got 1"),
    "missing": ({"lstm/linear": {"w": ONE["lstm/linear"]["w"]}}, {}, ValueError, "'lstm/linear: b' is missing"),
    "extra": ({"gru": GRU_WEIGHTS | {"x": np.ones(2)}}, {}, ValueError, "unexpected arrays: 'gru: x'"),
    "gates": (
        {"lstm/linear": linear(7, 15)},
        {},
        ValueError,
        "linear: w of lstm: expected 4 gates of one size, got 15 columns",
    ),
    "rows": (
        {"lstm/linear": linear(4, 16)},
        {},
        ValueError,
        "lstm/linear: w: expected more than 4 rows, those of x and of h, got 4",
    ),
    "w_h": (
        {"gru": GRU_WEIGHTS | {"w_h": np.ones((5, 12))}},
        {},
        ValueError,
        r"gru: w_h: expected shape \(4, 12\), got \(5, 12\)",
    ),
    "NaN": (
        {"gru": GRU_WEIGHTS | {"b": np.full(12, np.nan)}},
        {},
        ValueError,
        "Haiku: gru: b: expected finite numbers",
    ),
    "mixed": (
        {"gru": GRU_WEIGHTS | {"b": np.ones(12, "f")}},
        {},
        ValueError,
        "gru: b is float32, and gru: w_i is float64",
    ),
    "integers": ({"gru": GRU_WEIGHTS | {"b": np.ones(12, int)}}, {}, TypeError, "gru: b: expected floating numbers"),
    "sizes": (
        {"lstm/linear": lstm(), "linear": linear(3)},
        {"modules": ("lstm", "linear")},
        ValueError,
        r"Stack: cells\[1\] reads size 3 and gets 4",
    ),
    "spatial_shape": (
        {"conv1_dlstm/input_to_hidden": linear(), "conv1_dlstm/hidden_to_hidden": linear()},
        {},
        ValueError,
        "spatial_shape: the weights of conv1_dlstm do not tell the shape of an image",
    ),
}


@pytest.mark.parametrize(("params", "options", "error", "message"), list(IMPORTS.values()), ids=list(IMPORTS))
def test_import_is_refused(params, options, error, message):
    with pytest.raises(error, match=message):
        from_haiku(params, **options)


def random_params(cell):
    shapes = jaxrnn.check.shapes_of_params(cell)
    return redraw(6, jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes))


EXPORTS = {
    "peephole": (LSTM(3, 4, peephole=True), {}, "cell: LSTM.*: peephole=True: hk.LSTM has no such option"),
    "inside": (
        Stack((LSTM(3, 4), Stack((LSTM(4, 4, cell_clip=1.0),)))),
        {},
        r"cell.cells\[1\].cells\[0\]: LSTM.*: cell_clip=1.0: hk.LSTM has no",
    ),
    "reset": (GRU(3, 4), {}, "cell: GRU.*: hk.GRU resets before the product, which is another function"),
    "layer_norm": (GRU(3, 4, reset_after=False, layer_norm=True), {}, "cell: GRU.*: layer_norm=True: hk.GRU has no"),
    "tanh": (Elman(3, 4), {}, "cell: Elman.*: hk.VanillaRNN has the activation 'relu'"),
    "strides": (ConvLSTM((6,), 2, 3, strides=2), {}, "cell: ConvLSTM.*: strides: hk.Conv"),
    "padding": (ConvLSTM((6,), 2, 3, padding="VALID"), {}, "cell: ConvLSTM.*: padding='VALID': hk.Conv"),
    "epsilon": (LayerNorm(3, 1e-3), {}, "cell: LayerNorm.*: epsilon: expected 1e-05; give epsilon=0.001"),
    "direction": (Bidirectional(LSTM(3, 4), LSTM(3, 4)), {}, "cell: Bidirectional.*: it has no counterpart in Haiku"),
    "dropout": (
        Stack((LSTM(3, 4), Dropout(0.1))),
        {},
        r"cell.cells\[1\]: Dropout.*: it has no params, so Haiku's dict",
    ),
    "names": (LSTM(3, 4), {"modules": ("a", "b")}, "modules: expected 1 names, one for each layer, got 2"),
    "skip": (Stack((LSTM(3, 4), LSTM(7, 4)), skip=True), {}, "cell: Stack.*: skip connections have no counterpart"),
}


@pytest.mark.parametrize(("cell", "options", "message"), list(EXPORTS.values()), ids=list(EXPORTS))
def test_export_is_refused(cell, options, message):
    with pytest.raises(ValueError, match=message):
        to_haiku(cell, random_params(cell), **options)


def test_missing_weights_are_refused():
    params = random_params(LSTM(3, 4))
    with pytest.raises(ValueError, match="params: w_h is None"):
        to_haiku(LSTM(3, 4), params._replace(w_h=None))
    assert (to_haiku(LSTM(3, 4), params._replace(b=None))["lstm/linear"]["b"] == np.repeat([0, 0, -1, 0], 4)).all()


def test_weights_that_are_traced():
    cell, params = from_haiku(ONE)
    with pytest.raises(TypeError, match=r"params.w_x: expected numbers, got a tracer: convert outside of jax.jit"):
        jax.jit(lambda params: to_haiku(cell, params))(params)
    with pytest.raises(TypeError, match=r"lstm/linear: b: expected numbers, got a tracer: convert outside of jax.jit"):
        jax.jit(lambda weights: from_haiku(weights)[1])(ONE)


def test_the_order_of_modules():
    weights = {f"a/lstm{number}/linear": lstm(4, 4) for number in ("", "_1", "_10", "_2")}
    weights["a/lstm_2/linear"] = {"w": np.ones((8, 16)), "b": np.ones(16)}
    assert list(weights) == sorted(weights)
    _, params = from_haiku(weights)
    assert (params[2].w_x == 1).all()
    cell, params = from_haiku(
        TWO | {"b/embed": {"embeddings": np.ones((5, 3))}}, modules=("b/embed", "a/lstm", "a/linear")
    )
    assert cell == Stack((Embed(5, 3), LSTM(3, 4), Linear(4, 2)))


def test_kinds_are_said():
    weights = {"encoder/linear": lstm()}
    assert from_haiku(weights, modules={"encoder": "lstm"})[0] == LSTM(3, 4)
    assert from_haiku(weights, modules={"encoder/linear": "linear"})[0] == Linear(7, 16)
    assert from_haiku(weights, modules="encoder/linear")[0] == Linear(7, 16)
    assert from_haiku({"my/~/linear": linear()})[0] == Linear(4, 2)
    assert from_haiku({"my/~/lstm_3/linear": lstm()})[0] == LSTM(3, 4)


@pytest.mark.parametrize("part", range(4))
def test_damaged_parameters(part):
    given = {
        "embed": {"embeddings": arrays((5, 3))[0]},
        "gru": GRU_WEIGHTS,
        "lstm/linear": lstm(4, 4),
        "linear": linear(),
    }
    good = 0
    for seed in range(250 * part, 250 * part + 250):
        try:
            cell, params = from_haiku(damaged(seed, given))
        except (TypeError, ValueError):
            continue
        assert isinstance(cell, jaxrnn.Cell)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
        good += 1
    assert 0 < good < 100


SCRIPT = """
import sys
for name in ("torch", "keras", "haiku", "equinox", "onnx"):
    sys.modules[name] = None
import numpy as np
from jaxrnn.convert.haiku import from_haiku, to_haiku
weights = {"lstm/linear": {"w": np.ones((7, 16), np.float32), "b": np.ones(16, np.float32)}}
cell, params = from_haiku(weights)
assert params.b[5] == 2
assert (to_haiku(cell, params)["lstm/linear"]["b"] == 1).all()
"""


def test_haiku_is_not_needed():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
