"""Flax's modules and ours: the same numbers and gradients, there and back; and what is refused."""

import subprocess
import sys
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conversion import assert_close, assert_weight_gradients, redraw, run
from damage import damaged
from flax import nnx
from flax.core import freeze

import jaxrnn
from jaxrnn import GRU, LSTM, Apply, Backward, Bidirectional, ConvLSTM, Dropout, Elman, Embed, LayerNorm, Linear, Stack
from jaxrnn import linen as our_linen
from jaxrnn import nnx as our_nnx
from jaxrnn.compose.parallel import BidirectionalPair
from jaxrnn.convert.flax import from_flax, to_flax
from jaxrnn.convert.trees import leaves, nested

X64 = True
PROMOTION = "standard"

T, B, D, H, G, V, E = 6, 3, 2, 5, 4, 8, 7
SPATIAL = (4, 3)
KINDS = {
    nn: ("SimpleCell", "LSTMCell", "OptimizedLSTMCell", "GRUCell", "ConvLSTMCell"),
    nnx: ("SimpleCell", "LSTMCell", "OptimizedLSTMCell", "GRUCell"),
}
FUNCTIONS = (nn.tanh, nn.relu, nn.soft_sign, nn.elu, nn.leaky_relu)
GATES = (nn.sigmoid, nn.hard_sigmoid, nn.tanh)


class Configuration(NamedTuple):
    """One model: a world, the layout ("rnn", "bidirectional" or "model"), cells, and how it is run."""

    world: Any
    layout: str
    cells: tuple[tuple[str, dict], ...]
    merge: Any
    reverse: bool
    time_major: bool
    tokens: bool
    lengths: bool
    initial: bool
    dtype: Any


def configuration(seed):
    rng = np.random.default_rng(seed)
    world, layout = (nn, nnx)[seed % 2], ("rnn", "bidirectional", "model")[seed // 2 % 3]
    cells = tuple(cell_options(rng, world, seed // 2 + k, layout == "rnn") for k in range(2))
    dtype = jnp.float32 if seed % 5 == 4 else jnp.float64
    merge = (None, jnp.multiply)[rng.integers(2)]
    reverse, time_major, tokens, lengths, initial = (bool(rng.integers(2)) for _ in range(5))
    if layout == "model":
        lengths = initial = False
    return Configuration(world, layout, cells, merge, reverse, time_major, tokens, lengths, initial, dtype)


def cell_options(rng, world, number, convolution):
    kinds = KINDS[world]
    kind = kinds[number % len(kinds)]
    if kind == "ConvLSTMCell":
        if convolution:
            return kind, {"kernel_size": (3, 2), "use_bias": bool(rng.integers(2))}
        kind = "LSTMCell"
    options = {"activation_fn": FUNCTIONS[rng.integers(len(FUNCTIONS))]}
    if kind == "SimpleCell":
        options["residual"] = bool(rng.integers(2))
    else:
        options["gate_fn"] = GATES[rng.integers(len(GATES))]
    return kind, options


def build(config):
    """The module, its weights by path, and xs."""
    world, dtype = config.world, config.dtype
    dtypes = {"param_dtype": dtype} | ({"dtype": dtype} if world is nnx else {})
    rngs = {"rngs": nnx.Rngs(0)} if world is nnx else {}

    def make(kind, *sizes, **options):
        sizes = sizes[1:] if world is nn and kind not in ("Embed", "LayerNorm") else sizes
        sizes = () if world is nn and kind == "LayerNorm" else sizes
        return getattr(world, kind)(*sizes, **options, **dtypes, **rngs)

    def rnn(number, size, **options):
        kind, given = config.cells[number]
        hidden = H if number == 0 or config.merge else G
        return world.RNN(make(kind, size, hidden, **given), time_major=config.time_major, **options)

    def both(size, **options):
        merge = {"merge_fn": config.merge} if config.merge else {}
        return world.Bidirectional(rnn(0, size), rnn(1, size), time_major=config.time_major, **merge, **options)

    convolution = config.layout == "rnn" and config.cells[0][0] == "ConvLSTMCell"
    shape, last = (T, B) if config.time_major else (B, T), (*SPATIAL, D) if convolution else (D,)
    xs = np.random.default_rng(1).normal(size=(*shape, *last)).astype(dtype)
    if config.layout == "rnn":
        module = rnn(0, D, reverse=config.reverse, keep_order=config.reverse, return_carry=True)
    elif config.layout == "bidirectional":
        module = both(D, return_carry=True)
    else:
        size = H if config.merge else H + G
        first = (
            make("Embed", V, D) if config.tokens else make("Dense" if world is nn else "Linear", E, D, use_bias=False)
        )
        dropout = world.Dropout(0.3, deterministic=True)
        above = make("LayerNorm", size, epsilon=1e-3), make("Dense" if world is nn else "Linear", size, E)
        module = [first, nn.tanh, both(D), dropout, *above]
        module = nn.Sequential(module) if world is nn else nnx.Sequential(*module)
        xs = np.random.default_rng(2).normal(size=(*shape, E)).astype(dtype)
        xs = np.random.default_rng(3).integers(0, V, shape) if config.tokens else xs
    if world is nn:
        tree = jax.eval_shape(module.init, jax.random.key(0), xs)["params"]
    else:
        tree = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    return module, redraw(4, leaves(tree)), xs


def variables_of(module, weights):
    return {"params": nested(weights)} if isinstance(module, nn.Module) else nnx_tree(module, weights)


def nnx_tree(module, weights):
    tree = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    return jax.tree_util.tree_map_with_path(lambda path, _: weights["/".join(str(key.key) for key in path)], tree)


def apply(module, variables, xs, **options):
    if isinstance(module, nn.Module):
        return module.apply(variables, xs, **options)
    graph, _, rest = nnx.split(module, nnx.Param, ...)
    return nnx.merge(graph, nnx.State(variables), rest, copy=True)(xs, **options)


def to_states(carry):
    """Our carry as Flax's."""
    match carry:
        case BidirectionalPair(forward=a, backward=b):
            return to_states(a), to_states(b)
        case jaxrnn.LSTMCarry(h=h, c=c) | jaxrnn.ConvLSTMCarry(h=h, c=c):
            return c, h
    return carry.h


def to_carry(states, like):
    """Flax's carry as ours."""
    match like:
        case BidirectionalPair(forward=a, backward=b):
            return BidirectionalPair(to_carry(states[0], a), to_carry(states[1], b))
        case jaxrnn.LSTMCarry() | jaxrnn.ConvLSTMCarry():
            return type(like)(states[1], states[0])
    return type(like)(states)


def check(seed):
    config = configuration(seed)
    module, weights, xs = build(config)
    lengths = np.array([4, 1, 5]) if config.lengths else None

    def convert(weights):
        return from_flax(module, variables_of(module, weights), spatial_shape=SPATIAL)[1]

    cell, params = from_flax(module, variables_of(module, weights), spatial_shape=SPATIAL)
    assert all(leaf.dtype == config.dtype for leaf in jax.tree.leaves(params))
    whole = config.layout == "model"
    start = None if whole else cell.initial_carry(params, (B,))
    carry = redraw(5, start) if config.initial else None
    keep = 1.0
    if config.lengths:
        keep = (np.arange(T) < lengths[:, None]).astype(config.dtype)
        keep = keep.T if config.time_major else keep
        keep = keep.reshape(*keep.shape, *[1] * (xs.ndim - 2))

    def theirs(weights, carry, xs):
        options = {} if carry is None else {"initial_carry": to_states(carry)}
        if lengths is not None:
            options["seq_lengths"] = lengths
        out = apply(module, variables_of(module, weights), xs, **options)
        if whole:
            return (), out
        return to_carry(out[0], start), out[1]

    factors = redraw(6, jax.eval_shape(theirs, weights, carry, xs), 1.0)

    def loss(weights, carry, xs):
        new, ys = theirs(weights, carry, xs)
        terms = jax.tree.map(jnp.vdot, factors, (new, ys * keep))
        return sum(jax.tree.leaves(terms)), (new, ys)

    given = [k for k, each in enumerate((weights, carry, xs)) if each is not None]
    given = given if jnp.issubdtype(xs.dtype, jnp.floating) else given[:-1]
    gradients, (new, ys) = jax.jit(jax.grad(loss, argnums=given, has_aux=True))(weights, carry, xs)
    gradients = dict(zip(given, gradients, strict=True))

    options = {"lengths": lengths, "time_axis": 0 if config.time_major else 1}
    unseen = jax.tree.map(jnp.zeros_like, cell.initial_carry(params, (B,)))
    ours_factors = (unseen, factors[1]) if whole else factors
    (ours_new, ours_ys), (p, c, x) = run(cell, params, carry, xs, ours_factors, keep, **options)
    assert_close(ours_ys * keep, ys * keep, "ys")
    if not whole:
        assert_close(ours_new, new, "carry")
    assert_weight_gradients(convert, weights, p, gradients[0])
    for k, each in ((1, c), (2, x)):
        if k in gradients:
            assert_close(each, gradients[k], f"gradient {k}")
    check_round_trip(config, module, cell, params, weights)


def check_round_trip(config, module, cell, params, weights):
    back = to_flax(cell, params, module=module)
    assert back[0] is module
    again = from_flax(*back, spatial_shape=SPATIAL)
    assert again[0] == cell
    assert_close(again[1], params)
    tree = leaves(back[1]["params"] if isinstance(module, nn.Module) else back[1])
    assert tree.keys() == weights.keys()
    if config.cells[0][0] != "ConvLSTMCell":  # the two biases become one
        assert_close(tree, {name: weights[name] for name in tree})
    again = from_flax(*to_flax(cell, params), spatial_shape=SPATIAL)
    assert again[0] == cell
    if config.world is nn:
        assert_close(again[1], params)


@pytest.mark.parametrize("seed", range(2))
def test_random_models(seed):
    check(seed)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(2, 28))
def test_more_random_models(seed):
    check(seed)


def linen_tree(module, shape=(2, 3, 4), dtype=np.float64):
    xs = jax.ShapeDtypeStruct(shape, np.float32)
    return redraw(
        7, jax.tree.map(lambda leaf: np.zeros(leaf.shape, dtype), jax.eval_shape(module.init, jax.random.key(0), xs))
    )


def lstm(**options):
    return nn.RNN(nn.LSTMCell(3, **options))


def nnx_lstm(**options):
    return nnx.RNN(nnx.LSTMCell(4, 3, rngs=nnx.Rngs(0), **options))


DENSE = nn.Dense(4)
SHARED = nnx.Linear(4, 4, rngs=nnx.Rngs(0))


class Mine(nn.LSTMCell):
    """A cell of the user's own."""


class MyRNN(nn.RNN):
    """A layer of Flax with a `__call__` of the user's own."""

    def __call__(self, xs):
        return nn.relu(super().__call__(xs))


class MyModel(nn.Module):
    """A module whose `__call__` does more than its submodules."""

    def setup(self):
        self.layers = [nn.RNN(nn.LSTMCell(3))]

    def __call__(self, xs):
        return self.layers[0](xs)[-1]


class MySequential(nnx.Sequential):
    """NNX modules with a `__call__` of the user's own around them."""

    def __call__(self, xs):
        return nnx.relu(super().__call__(xs))


MODULES = {
    "no module": (lambda: 3, TypeError, "module: expected a module of flax.linen or flax.nnx, got int"),
    "another module": (lambda: nn.Conv(3, (2,)), ValueError, "module: Conv: it has no counterpart"),
    "inside": (lambda: nn.Sequential([nn.Dense(3), nn.Conv(3, (2,))]), ValueError, "module/layers_1: Conv: it has no"),
    "subclass": (lambda: nn.RNN(Mine(3)), ValueError, "module/cell: Mine: the cell has no counterpart"),
    "own call": (lambda: MyRNN(nn.LSTMCell(3)), ValueError, "module: MyRNN: it has no counterpart"),
    "own model": (MyModel, ValueError, "module: MyModel: it has no counterpart"),
    "own inside": (lambda: nn.Sequential([MyModel()]), ValueError, "module/layers_0: MyModel: it has no counterpart"),
    "nnx own call": (lambda: MySequential(SHARED), ValueError, "module: MySequential: it has no counterpart"),
    "MGU": (lambda: nn.RNN(nn.MGUCell(3)), ValueError, "module/cell: MGUCell: its gate resets after the product"),
    "bare cell": (lambda: nn.Sequential([nn.LSTMCell(3)]), ValueError, "module/layers_0: LSTMCell: a cell runs over"),
    "function": (
        lambda: nn.Sequential([nn.glu]),
        ValueError,
        "module/layers_0: expected an activation of JAX, one of identity, .*; got glu",
    ),
    "gate_fn": (lambda: lstm(gate_fn=nn.softmax), ValueError, "module/cell/gate_fn: expected an activation.*softmax"),
    "activation_fn": (lambda: lstm(activation_fn=abs), ValueError, "module/cell/activation_fn: .* got abs"),
    "carry_init": (
        lambda: lstm(carry_init=nn.initializers.ones),
        ValueError,
        "module/cell: LSTMCell: carry_init=<function ones .*> has no counterpart",
    ),
    "dtype": (
        lambda: lstm(dtype=jnp.bfloat16),
        ValueError,
        "module/cell: LSTMCell: it computes in bfloat16, and its weights are float64",
    ),
    "reverse": (
        lambda: nn.RNN(nn.LSTMCell(3), reverse=True),
        ValueError,
        "module: RNN: reverse=True without keep_order=True puts its outputs out from the end",
    ),
    "variable_axes": (
        lambda: nn.RNN(nn.LSTMCell(3), variable_broadcast=False, variable_axes={"params": 0}),
        ValueError,
        "module: RNN: variable_broadcast=False has no counterpart",
    ),
    "variable_axes alone": (
        lambda: nn.RNN(nn.LSTMCell(3), variable_axes={"cache": 0}),
        ValueError,
        "module: RNN: variable_axes and split_rngs",
    ),
    "return_carry": (
        lambda: nn.Sequential([nn.RNN(nn.LSTMCell(4), return_carry=True), nn.Dense(2)]),
        ValueError,
        "module: RNN: return_carry=True hands the next layer a carry",
    ),
    "time_major": (
        lambda: nn.Sequential([nn.RNN(nn.LSTMCell(4), time_major=True), nn.RNN(nn.LSTMCell(4))]),
        ValueError,
        "module: Sequential: some of its layers are time-major",
    ),
    "twice": (lambda: nn.Sequential([DENSE, DENSE]), ValueError, "module/layers_1: Dense: it is there twice"),
    "empty": (lambda: nn.Sequential([]), ValueError, "module: Sequential: expected at least one layer"),
    "merge_fn": (
        lambda: nn.Bidirectional(lstm(), lstm(), lambda a, b: a),
        ValueError,
        "module: Bidirectional: merge_fn=.*: expected the default",
    ),
    "no RNN": (
        lambda: nn.Bidirectional(our_linen.RNN(GRU(4, 3)), lstm()),
        ValueError,
        "module/forward_rnn: RNN: expected an RNN",
    ),
    "broadcast_dims": (
        lambda: nn.Dropout(0.5, broadcast_dims=(1,)),
        ValueError,
        r"module: Dropout: broadcast_dims=\(1,\) has no counterpart",
    ),
    "rate": (lambda: nn.Dropout(1.0), ValueError, r"Dropout.rate: expected a number in \[0, 1\)"),
    "use_scale": (lambda: nn.LayerNorm(use_scale=False), ValueError, "module: LayerNorm: use_scale=False has no"),
    "reduction_axes": (lambda: nn.LayerNorm(reduction_axes=(1, 2)), ValueError, "LayerNorm: reduction_axes="),
    "dot_general": (lambda: nn.Dense(3, dot_general=jax.lax.dot), ValueError, "module: Dense: dot_general="),
    "features": (lambda: lstm().clone(cell=nn.LSTMCell(0)), ValueError, "LSTMCell.features: expected at least 1"),
    "strides": (
        lambda: nn.RNN(nn.ConvLSTMCell(3, (2,), strides=(2,))),
        ValueError,
        r"module/cell: ConvLSTMCell: strides=\(2,\) has no counterpart",
    ),
    "padding": (lambda: nn.RNN(nn.ConvLSTMCell(3, (2,), padding="VALID")), ValueError, "padding='VALID' has no"),
    "spatial_shape": (
        lambda: nn.RNN(nn.ConvLSTMCell(3, (2,))),
        ValueError,
        "module/cell: ConvLSTMCell: its weights do not tell the shape of an image; give spatial_shape",
    ),
    "nnx twice": (lambda: nnx.Sequential(SHARED, SHARED), ValueError, "module/layers/1: Linear: it is there twice"),
    "nnx dtype": (
        lambda: nnx.SimpleCell(2, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
        ValueError,
        "module: SimpleCell: it computes in bfloat16, and its weights are float32",
    ),
    "nnx reverse": (
        lambda: nnx.RNN(nnx.LSTMCell(4, 3, rngs=nnx.Rngs(0)), reverse=True),
        ValueError,
        "module: RNN: reverse=True without",
    ),
    "nnx activation": (lambda: nnx_lstm(activation_fn=nnx.glu), ValueError, "module/cell/activation_fn: .* got glu"),
}


@pytest.mark.parametrize(("make", "error", "message"), list(MODULES.values()), ids=list(MODULES))
def test_module_is_refused(make, error, message):
    module = make()
    variables = None
    if message.endswith("float64"):
        variables = linen_tree(module.clone(cell=nn.LSTMCell(3)))
    with pytest.raises(error, match=message):
        from_flax(module, {"params": {}} if variables is None and isinstance(module, nn.Module) else variables)


def changed(path, value):
    """The tree of an LSTM with one entry of it replaced, or removed if the value is `del`."""
    tree = linen_tree(lstm())
    *above, last = path.split("/")
    node = tree
    for name in above:
        node = node[name]
    if isinstance(value, str) and value == "del":
        del node[last]
    else:
        node[last] = value
    return tree


KERNEL = "params/cell/if/kernel"
TREES = {
    "nothing": (None, TypeError, "variables: expected {'params': ...} of the linen module, got NoneType"),
    "bare": ({}, ValueError, "params: 'cell/ii/kernel' is missing; there are none"),
    "collection": (
        {"params": {}, "batch_stats": {"a": 1}},
        ValueError,
        "variables: expected 'params' alone, got 'batch_stats' too",
    ),
    "missing": (changed(KERNEL, "del"), ValueError, "params: 'cell/if/kernel' is missing; there are"),
    "extra": (changed("params/cell/x", np.ones(2)), ValueError, "params: unexpected arrays: 'cell/x'"),
    "shape": (
        changed(KERNEL, np.ones((5, 3))),
        ValueError,
        r"params: cell/if/kernel: expected shape \(4, 3\), got \(5, 3\)",
    ),
    "width": (
        changed("params/cell/hi/bias", np.ones(2)),
        ValueError,
        r"cell/hi/bias: expected shape \(3\), got \(2,\)",
    ),
    "NaN": (changed(KERNEL, np.full((4, 3), np.nan)), ValueError, "params: cell/if/kernel: expected finite numbers"),
    "no dict": ({"params": 3}, TypeError, "params: expected nested dicts of arrays, got int"),
    "mixed": (changed(KERNEL, np.ones((4, 3), "f")), ValueError, "params: cell/if/kernel is float32, and .* float64"),
    "integers": (
        changed(KERNEL, np.ones((4, 3), int)),
        TypeError,
        "cell/if/kernel: expected floating numbers, got int64",
    ),
    "None": (changed("params/cell/x", None), ValueError, "params: cell/x: expected an array, got None"),
    "deep": (
        changed("params/cell/x", nested({"/".join("a" * 5000): 1.0})),
        ValueError,
        "params: cell/x/a.*nested more than 64 levels deep",
    ),
}


@pytest.mark.parametrize(("tree", "error", "message"), list(TREES.values()), ids=list(TREES))
def test_variables_are_refused(tree, error, message):
    with pytest.raises(error, match=message):
        from_flax(lstm(), tree)


def test_variables_that_are_traced():
    with pytest.raises(TypeError, match=r"cell/hf/bias: expected numbers, got a tracer: convert outside of jax.jit"):
        jax.jit(lambda tree: from_flax(lstm(), tree)[1])(linen_tree(lstm()))


def test_float64_needs_x64():
    tree = linen_tree(lstm())
    with jax.enable_x64(False), pytest.raises(ValueError, match=r"is float64: convert under jax\.enable_x64"):
        from_flax(lstm(), tree)


PARTS = (Embed(5, 4), GRU(4, 3), Dropout(0.5), Linear(3, 2))
MODEL = Stack(PARTS)
SMALL = LSTM(4, 3)


def random_params(cell, dtype=np.float32):
    shapes = jaxrnn.check.shapes_of_params(cell)
    return redraw(8, jax.tree.map(lambda leaf: np.zeros(leaf.shape, dtype), shapes))


EXPORTS = {
    "peephole": (LSTM(4, 3, peephole=True), None, "cell: LSTM.*peephole=True.*OptimizedLSTMCell, which computes LSTM"),
    "inside": (
        Stack((Linear(2, 4), Bidirectional(LSTM(4, 3, projection_size=2), GRU(4, 2)))),
        None,
        r"cell.cells\[1\].forward: LSTM\(.*projection_size=2\): ",
    ),
    "reset before": (GRU(4, 3, reset_after=False), None, "cell: GRU.*: cell is a GRUCell, which computes GRU"),
    "cell": (jaxrnn.MGU(4, 3), None, "cell: MGU.*: it has no counterpart in Flax"),
    "pool": (jaxrnn.Pool(GRU(4, 3)), None, "cell: Pool.*: it has no counterpart in Flax"),
    "skip": (Stack((GRU(4, 3), GRU(7, 3)), skip=True), None, "cell: Stack.*: it has no counterpart in Flax"),
    "activation": (Elman(4, 3, "affine"), None, "cell: Elman.*: 'affine' is no activation of JAX"),
    "per_sequence": (Dropout(0.5, per_sequence=True), None, "cell: Dropout.*: it has no counterpart in Flax"),
    "strides": (ConvLSTM((6,), 2, 3, strides=2), None, "cell: ConvLSTM.*strides=2.*, which computes ConvLSTM"),
    "other cell": (GRU(4, 3), lstm(), "cell: GRU.*: cell is a LSTMCell"),
    "other size": (LSTM(4, 5), lstm(), "cell: LSTM.*: cell is a LSTMCell, which computes LSTM.*hidden_size=3"),
    "other function": (SMALL, lstm(activation_fn=nn.relu), "cell: LSTM.*which computes LSTM.*activation='relu'"),
    "other layers": (MODEL, nn.Sequential([nn.Dense(3)]), "cell: Stack.*: the module is a sequence of 1 layers"),
    "other direction": (SMALL, nn.RNN(nn.LSTMCell(3), reverse=True, keep_order=True), "cell: .* runs in reverse"),
    "other merge": (
        Bidirectional(SMALL, SMALL, "sum"),
        nn.Bidirectional(lstm(), lstm()),
        "cell: Bidirectional.*: the module is a Bidirectional that merges by 'concat'",
    ),
    "other rate": (Dropout(0.1), nn.Dropout(0.2), r"cell: Dropout.*: the module is Dropout\(rate=0.2\)"),
    "no bias": (Linear(4, 3), nn.Dense(3, use_bias=False), "cell: Linear.*: b is not zero, and a Dense at the module"),
    "dtype": (SMALL, lstm(dtype=jnp.bfloat16), "LSTMCell: it computes in bfloat16, and its weights are float64"),
    "nnx b_hn": (
        GRU(4, 3),
        nnx.RNN(nnx.GRUCell(4, 3, rngs=nnx.Rngs(0))),
        "cell: GRU.*: b_hn is not zero, and a GRUCell at cell has no such weights",
    ),
    "own": (SMALL, our_linen.RNN(GRU(4, 3)), r"cell: LSTM.*: the module is GRU\(input_size=4, hidden_size=3\)"),
}


@pytest.mark.parametrize(("cell", "module", "message"), list(EXPORTS.values()), ids=list(EXPORTS))
def test_export_is_refused(cell, module, message):
    params = random_params(cell, np.float64)
    with pytest.raises(ValueError, match=message):
        to_flax(cell, params, module=module)


def test_params_are_checked():
    params = random_params(SMALL)
    with pytest.raises(TypeError, match="takes GRUParams, got LSTMParams"):
        to_flax(GRU(4, 3), params)
    with pytest.raises(ValueError, match="finite"):
        to_flax(SMALL, params._replace(b=np.full(12, np.nan, np.float32)))
    with pytest.raises(TypeError, match=r"params.w_x: expected numbers, got a tracer: convert outside of jax.jit"):
        jax.jit(lambda params: to_flax(SMALL, params)[1])(params)
    for missing in (params._replace(w_h=None), params._replace(w_x=None)):
        with pytest.raises(ValueError, match=r"params.*\.w_.: .* got None"):
            to_flax(SMALL, missing)


@pytest.mark.parametrize(
    "cell",
    [
        Stack((PARTS[0], PARTS[1], PARTS[3], Apply("softplus"), LayerNorm(2, 1e-3))),
        Stack((Stack((Elman(4, 3, "relu"),)), Backward(LSTM(3, 2, gate_activation="keras_hard_sigmoid")))),
        Bidirectional(GRU(4, 3), Elman(4, 3), "average"),
        Backward(ConvLSTM((5, 4), 2, 3, (2, 3))),
        Embed(5, 3),
    ],
    ids=repr,
)
def test_modules_that_are_built(cell):
    params = random_params(cell)
    module, variables = to_flax(cell, params)
    xs = np.ones((2, 3), int)
    if cell.input_ndim:
        xs = np.ones((2, 3, *np.atleast_1d(cell.input_size)), np.float32)
    drop = {"rngs": {"dropout": jax.random.key(0)}}
    shapes = (
        jax.eval_shape(lambda: module.init({"params": jax.random.key(0), **drop["rngs"]}, xs))
        if "Dropout" not in repr(cell)
        else variables
    )
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes)
    again = from_flax(module, variables, spatial_shape=(5, 4))
    assert again[0] == cell
    assert_close(again[1], params)


def test_biases_that_are_none():
    params = random_params(SMALL)._replace(b=None)
    cell, again = from_flax(*to_flax(SMALL, params))
    assert cell == SMALL
    assert (again.b == 0).all()
    dense = Linear(3, 2)
    module, variables = to_flax(dense, random_params(dense)._replace(b=None))
    assert not module.use_bias
    assert from_flax(module, variables)[1].b is None


def test_nnx_gru_has_no_bias_inside_the_reset():
    module = nnx.GRUCell(4, 3, rngs=nnx.Rngs(0))
    cell, params = from_flax(module)
    assert params.b_hn is None
    _, state = to_flax(cell, params._replace(b_hn=jnp.zeros(3, jnp.float32)), module=module)
    assert (state["dense_i"]["bias"] == params.b).all()


def test_nnx_update_goes_back_into_the_module():
    module = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx_lstm())
    module.layers[1] = nnx.RNN(nnx.LSTMCell(3, 3, rngs=nnx.Rngs(1)))
    cell, params = from_flax(module)
    given, state = to_flax(cell, redraw(3, params), module=module)
    nnx.update(given, state)
    assert_close(from_flax(module)[1], redraw(3, params))
    assert_close(from_flax(module, nnx.state(module, nnx.Param))[1], redraw(3, params))


@pytest.mark.parametrize("absent", [False, True], ids=["whole", "without a bias"])
def test_own_modules_give_back_their_own(absent):
    cell = Stack((GRU(4, 3), jaxrnn.LearnedCarry(Elman(3, 2))))
    params = random_params(cell, np.float64)
    if absent:
        params = (params[0]._replace(b=None), params[1])
    variables = {"params": our_linen.from_params(cell, params)}
    for module, given in ((our_linen.RNN(cell), variables), (our_nnx.RNN(cell, params=params), None)):
        found, again = from_flax(module, given)
        assert found == cell
        assert_close(again, params)
        assert leaves(to_flax(cell, params, module=module)[1]).keys() >= leaves(given or {}).keys()
    both = nn.Sequential([our_linen.RNN(cell, reverse=True), nn.Dense(3)])
    tree = {"layers_0": variables["params"], "layers_1": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}}
    assert from_flax(both, {"params": tree})[0] == Stack((Backward(cell), Linear(2, 3)))


def test_frozen_and_boxed_variables():
    module = nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.ones, (None, "x")))
    variables = module.init(jax.random.key(0), jnp.ones((2, 4)))
    assert isinstance(variables["params"]["kernel"], nn.Partitioned)
    for given in (variables, freeze(variables)):
        assert from_flax(module, given)[1].w.shape == (4, 3)


def test_unused_options_of_inner_modules():
    inner = nn.RNN(nn.LSTMCell(3), reverse=True, time_major=True)
    module = nn.Bidirectional(nn.RNN(nn.LSTMCell(3)), inner)
    assert from_flax(module, linen_tree(module))[0] == Bidirectional(SMALL, SMALL)


@pytest.mark.parametrize("part", range(4))
def test_damaged_variables(part):
    module = nn.Sequential([nn.Dense(4, use_bias=False), nn.RNN(nn.GRUCell(4)), nn.LayerNorm()])
    tree = linen_tree(module)
    good = 0
    for seed in range(250 * part, 250 * part + 250):
        try:
            cell, params = from_flax(module, damaged(seed, tree))
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
import jaxrnn
before = set(sys.modules)
from jaxrnn.convert.flax import from_flax
assert not [name for name in set(sys.modules) - before if not name.startswith("jaxrnn.convert")]
import numpy as np, flax.linen as nn
tree = {"params": {"kernel": np.ones((3, 2), np.float32), "bias": np.ones(2, np.float32)}}
assert from_flax(nn.Dense(2), tree)[1].w.shape == (3, 2)
"""


def test_only_flax_is_needed():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
