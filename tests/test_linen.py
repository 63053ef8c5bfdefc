"""The Flax linen adapters: the same numbers as the functions, and Flax's own tools on top."""

import re
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_contract
from flax import nnx, serialization
from flax.core import freeze
from flax.traverse_util import flatten_dict, path_aware_map
from members import MEMBERS, D, H, OwnParams, draw_carry, draw_params, draw_x, some_members, weighted_sum
from tiers import in_full

import jaxrnn
import jaxrnn.linen
from jaxrnn import GRU, LSTM, Bidirectional, Cell, ConvLSTM, Dropout, Elman, LearnedCarry, Linear, LSTMCarry, Stack
from jaxrnn.flax.bridge import TAKEN, draws
from jaxrnn.linen import RNN, FlaxCarry, LinenCell, from_params, to_params
from jaxrnn.nnx import from_nnx

KEY = jax.random.key(0)
BATCH, TIME = 4, 5
LENGTHS = np.array([5, 0, 3, 1])
XS = draw_x(GRU(D, H), 1, BATCH, TIME)
MODEL = Stack((GRU(D, H), Dropout(0.5), LSTM(H, 4)))


def equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def close(tree, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), tree, other)


def program(function, *arguments):
    """The traced program as text, without addresses."""
    return " ".join(re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(function)(*arguments))).split())


def weighted(tree):
    return weighted_sum(tree)


@some_members("gru", "conv_lstm_2d", "two_inputs", "apply_callable", "classifier", "everything", "zoneout_own")
def test_the_module_is_the_function(cell):
    params = draw_params(cell)
    xs = draw_x(cell, 1, BATCH, TIME)
    carry = draw_carry(cell, params, BATCH)
    reset = np.zeros((BATCH, TIME), bool)
    reset[:, 2] = True

    def module(params, carry, xs):
        variables = {"params": from_params(cell, params)}
        model = RNN(cell, reverse=True, remat_every=2, deterministic=True)
        return model.apply(variables, xs, seq_lengths=LENGTHS, reset=reset, initial_carry=carry, method="scan")

    def function(params, carry, xs):
        options = {"lengths": LENGTHS, "reset": reset, "reverse": True, "remat_every": 2, "time_axis": 1}
        return jaxrnn.scan(cell, params, carry, xs, **options)

    def gradient(run):
        return jax.grad(lambda params: weighted(run(params, carry, xs)))

    assert draws(cell) == any(name in repr(cell) for name in ("Dropout(", "WeightDrop(", "Zoneout("))
    assert program(module, params, carry, xs) == program(function, params, carry, xs)
    if jax.tree.leaves(params):
        assert program(gradient(module), params) == program(gradient(function), params)


def test_values_gradients_lengths_and_carry():
    cell = LearnedCarry(Stack((GRU(D, H), Bidirectional(Elman(H, 2), Elman(H, 4)))))
    model, params = RNN(cell), draw_params(cell)
    carry = draw_carry(cell, params, BATCH)
    variables = {"params": from_params(cell, params)}

    @jax.jit
    def both(variables, params, carry):
        def module(variables, carry):
            out = model.apply(variables, XS, seq_lengths=LENGTHS, initial_carry=carry, method="scan")
            return weighted(out), out

        def function(params, carry):
            out = jaxrnn.scan(cell, params, carry, XS, lengths=LENGTHS, time_axis=1)
            return weighted(out), out

        ours = jax.value_and_grad(module, (0, 1), has_aux=True)(variables, carry)
        return ours, jax.value_and_grad(function, (0, 1), has_aux=True)(params, carry)

    ((_, ours), (d_variables, d_carry)), ((_, theirs), (d_params, d_carry_too)) = both(variables, params, carry)
    close((ours, d_carry, to_params(cell, d_variables["params"])), (theirs, d_carry_too, d_params))
    end, ys = ours
    equal(jax.tree.map(lambda leaf: leaf[1], end), jax.tree.map(lambda leaf: leaf[1], carry))
    assert not ys[1].any()
    assert ys[0].all()


@pytest.mark.parametrize("cell", MEMBERS.values(), ids=MEMBERS)
def test_params_go_to_flax_and_back(cell):
    params = draw_params(cell)
    tree = from_params(cell, params)
    equal(to_params(cell, freeze(tree)), params)
    assert len(flatten_dict(tree)) == len(jax.tree.leaves(params))


class Named(Cell):
    """A cell whose params are dicts, with names that Flax uses."""

    def init(self, key, dtype=jnp.float32):
        return {"scan": {3: OwnParams(jnp.ones(2, dtype), jnp.ones(1, dtype))}, "w": (jnp.zeros(3, dtype), None)}

    def initial_carry(self, params, batch_shape=()):
        return ()

    def step(self, params, carry, x, noise=None):
        return carry, x


class Leaky(Named):
    def init(self, key, dtype=jnp.float32):
        return jnp.ones(2, dtype)


def test_paths():
    norm = LSTM(D, H, layer_norm=True, peephole=True)
    cell = LearnedCarry(Stack((jaxrnn.Embed(7, D), Dropout(0.1), norm, Bidirectional(Elman(H, 2), Linear(H, 2)))))
    variables = jax.eval_shape(lambda: RNN(cell, deterministic=True).init(KEY, jnp.zeros((1, 1), int)))
    assert set(variables) == {"params"}
    forward = ["w_x", "w_h", "b"]
    assert {"/".join(path) for path in flatten_dict(variables["params"])} == {
        "cell_/layer_0/w",
        *(f"cell_/layer_2/{name}" for name in ("w_x", "w_h", "b", "peephole")),
        *(f"cell_/layer_2/norm/{name}" for name in ("x", "h", "c", "b_c")),
        *(f"cell_/layer_3/forward/{name}" for name in forward),
        *(f"cell_/layer_3/backward/{name}" for name in ("w", "b")),
        *(f"carry/layer_2/{name}" for name in "hc"),
        "carry/layer_3/forward/h",
    }

    def names(cell):
        return {"/".join(path) for path in flatten_dict(from_params(cell, cell.init(KEY)))}

    assert names(Named()) == {"scan_/3/w", "scan_/3/decay", "w/layer_0"}
    assert names(Leaky()) == {"w"}
    assert {name for name in dir(RNN(cell)) if not name.startswith("_")} <= TAKEN


def test_the_params_begin_as_the_cell_draws_them():
    class Probe(nn.Module):
        def __call__(self):
            return self.make_rng("params")

    class Counting(GRU):
        def init(self, key, dtype=jnp.float32):
            calls.append(key)
            return GRU.init(self, key, dtype)

    calls = []
    model = RNN(Counting(D, H), param_dtype=jnp.bfloat16)
    variables = model.init(KEY, XS)
    drawn = [key for key in calls if not isinstance(key, jax.core.Tracer)]
    assert len(drawn) == 1
    key = Probe().init_with_output(KEY)[0]
    equal(to_params(model.cell, variables["params"]), GRU(D, H).init(key, jnp.bfloat16))
    calls.clear()
    model.apply(variables, XS.astype(jnp.bfloat16))
    assert not calls
    equal(model.apply(variables, method="params"), to_params(model.cell, variables["params"]))


def test_an_absent_bias():
    cell = GRU(D, H)
    params = draw_params(cell)._replace(b=None)
    tree = from_params(cell, params)
    assert tree["b"] is None
    assert to_params(cell, tree).b is None
    close(RNN(cell).apply({"params": tree}, XS), jaxrnn.scan(cell, params, None, XS, time_axis=1)[1])


@pytest.mark.parametrize("shape", [(TIME,), (BATCH, TIME), *in_full([(2, BATCH, TIME)])], ids=len)
def test_layouts(shape):
    for cell in (GRU(D, H), ConvLSTM((4,), D, H)):
        xs = draw_x(cell, 1, *shape)
        params = draw_params(cell)
        variables = {"params": from_params(cell, params)}
        ys = jax.eval_shape(RNN(cell).apply, variables, xs)
        assert ys.shape == (*shape, *xs.shape[len(shape) : -1], H)
        first = np.moveaxis(xs, len(shape) - 1, 0)
        ys = jax.eval_shape(RNN(cell, time_major=True).apply, variables, first)
        assert ys.shape == (*first.shape[:-1], H)
    if len(shape) == 3:  # with numbers: lengths of the shape of the batch axes
        lengths = np.array([LENGTHS, LENGTHS[::-1]])
        cell, xs = GRU(D, H), draw_x(GRU(D, H), 1, *shape)
        variables = {"params": from_params(cell, draw_params(cell))}
        ys = RNN(cell).apply(variables, xs, seq_lengths=lengths)
        close(ys[1, 1], RNN(cell).apply(variables, xs[1, 1], seq_lengths=lengths[1, 1]))
        assert not ys[1, 2].any()


def test_streaming_is_the_whole():
    model = RNN(MODEL)
    variables = {"params": from_params(MODEL, draw_params(MODEL))}
    end, ys = model.apply(variables, XS, deterministic=True, method="scan")
    step = jax.jit(lambda carry, x: model.apply(variables, carry, x, method="step"))
    carry, outputs = None, []
    for t in range(TIME):
        carry, y = step(carry, XS[:, t])
        outputs.append(y)
    close((carry, np.stack(outputs, 1)), (end, ys))


def test_dropout_comes_from_a_stream():
    cell = Stack((Dropout(0.5), Linear(D, H)))
    params = {"params": from_params(cell, draw_params(cell))}

    def run(key=None, *, attribute=None, argument=None, stream="dropout"):
        model = RNN(cell, deterministic=attribute, rng_collection=stream)
        return model.apply(params, XS, deterministic=argument, rngs=None if key is None else {stream: key})

    one = run(KEY, argument=False)
    equal(one, run(KEY, attribute=False))
    equal(one, run(KEY, argument=False, stream="dropout"))
    assert (run(jax.random.key(1), argument=False) != one).any()
    none = run(argument=True)
    equal(none, run(attribute=True))
    equal(none, jaxrnn.scan(cell, to_params(cell, params["params"]), None, XS, time_axis=1)[1])
    assert (one != none).any()
    with pytest.raises(nn.module.errors.InvalidRngError, match='needs PRNG for "noise"'):
        run(argument=False, stream="noise")
    with pytest.raises(ValueError, match="passed to the constructor and at call time"):
        run(KEY, argument=False, attribute=False)
    with pytest.raises(ValueError, match=r"deterministic: expected True or False.*draws noise; got neither"):
        run(KEY)
    with pytest.raises(ValueError, match="deterministic"):
        RNN(cell).init(KEY, XS)
    RNN(Stack((Linear(D, H), Dropout(0.0)))).init(KEY, XS)  # draws none, so nobody need say


def decays(path, _):
    return path[-1].startswith("w")


@jax.numpy_dtype_promotion("standard")  # Adam of Optax mixes dtypes
def test_sequential_optax_and_masks():
    model = nn.Sequential([nn.Embed(7, D), RNN(LSTM(D, H)), nn.Dense(1)])
    tokens = draw_x(jaxrnn.Embed(7, D), 1, BATCH, TIME)
    params = jax.jit(model.init)(KEY, tokens)["params"]
    mask = path_aware_map(decays, params)
    assert flatten_dict(mask["layers_1"]) == {("w_x",): True, ("w_h",): True, ("b",): False}
    optimizer = optax.chain(
        optax.adamw(0.1, weight_decay=0.5, mask=mask),
        optax.masked(
            optax.set_to_zero(),
            {"layers_0": True}
            | {name: jax.tree.map(lambda _: False, params[name]) for name in ("layers_1", "layers_2")},
        ),
    )

    @jax.jit
    def train_step(params, state):
        loss, gradient = jax.value_and_grad(lambda p: jnp.mean((model.apply({"params": p}, tokens) - 1) ** 2))(params)
        updates, state = optimizer.update(gradient, state, params)
        still = optimizer.update(jax.tree.map(jnp.zeros_like, gradient), optimizer.init(params), params)[0]
        return optax.apply_updates(params, updates), state, loss, still

    state, losses = optimizer.init(params), []
    for _ in range(3):
        params, state, loss, still = train_step(params, state)
        losses.append(loss)
    assert losses[2] < losses[1] < losses[0]
    # With no gradient only the decay acts, and only where the mask says so.
    assert {"/".join(path): bool(leaf.any()) for path, leaf in flatten_dict(still["layers_1"]).items()} == {
        "w_x": True,
        "w_h": True,
        "b": False,
    }
    assert not still["layers_0"]["embedding"].any()


def test_scan_over_layers_remat_and_vmap():
    cell = jaxrnn.Residual(Elman(D, D))

    class Block(nn.Module):
        @nn.compact
        def __call__(self, xs, _):
            return nn.remat(RNN)(cell)(xs, seq_lengths=LENGTHS), None

    axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    layers, many = nn.scan(Block, **axes, length=3)(), nn.vmap(RNN, **axes, in_axes=None, axis_size=3)(cell)

    @jax.jit
    def init(key):
        return layers.init(key, XS, None)["params"], many.init(key, XS)["params"]

    (stacked,), own = (params.values() if k == 0 else params for k, params in enumerate(init(KEY)))
    for params in (stacked, own):
        assert params["w_x"].shape == (3, D, D)
        assert len({leaf.tobytes() for leaf in np.asarray(params["w_x"])}) == 3
    (name,) = jax.eval_shape(init, KEY)[0]

    @jax.jit
    def run(params):
        def scanned(params):
            return weighted(layers.apply({"params": {name: params}}, XS, None)[0])

        def unrolled(params):
            ys = XS
            for k in range(3):
                layer = to_params(cell, jax.tree.map(lambda leaf: leaf[k], params))
                ys = jaxrnn.scan(cell, layer, None, ys, lengths=LENGTHS, time_axis=1)[1]
            return weighted(ys)

        one = RNN(cell).apply({"params": jax.tree.map(lambda leaf: leaf[1], params)}, XS)
        return jax.grad(scanned)(params), jax.grad(unrolled)(params), many.apply({"params": params}, XS)[1], one

    scanned, unrolled, vmapped, one = run(stacked)
    close((scanned, vmapped), (unrolled, one))


def test_a_module_of_a_user():
    class Tagger(nn.Module):
        def setup(self):
            self.rnn = RNN(Stack((Elman(D, H), Dropout(0.5))))
            self.head = nn.Dense(2)

        def __call__(self, xs, train, lengths=None):
            return self.head(self.rnn(xs, deterministic=not train, seq_lengths=lengths))

        def stream(self, carry, x):
            carry, y = self.rnn.step(carry, x)
            return carry, self.head(y)

    model = Tagger()
    variables = model.init({"params": KEY, "dropout": KEY}, XS, True)
    ys = model.apply(variables, XS, False)
    _, y = model.apply(variables, None, XS[:, 0], method="stream")
    close(y, ys[:, 0])


def test_sharding_and_hashing():
    cell, implementation = Stack((Dropout(0.0), Linear(D, H))), {"gated_scan": "xla"}
    model = RNN(cell, implementation=implementation)
    assert hash(model) == hash(RNN(cell, implementation=dict(implementation)))
    variables = {"params": from_params(cell, draw_params(cell))}

    def box(path, leaf):
        return nn.Partitioned(leaf, ("rows", "columns")[-leaf.ndim :]) if path[-1] == "w" else leaf

    boxed = path_aware_map(box, variables)
    assert nn.get_partition_spec(boxed)["params"]["layer_1"]["w"] == jax.P("rows", "columns")
    equal(model.apply(boxed, XS), model.apply(variables, XS))


def test_serialization():
    variables, other = ({"params": from_params(MODEL, draw_params(MODEL, seed))} for seed in (1, 2))
    restored = serialization.from_bytes(other, serialization.to_bytes(variables))
    equal(restored, variables)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_orbax(tmp_path):
    import orbax.checkpoint as orbax

    variables = jax.tree.map(jnp.asarray, {"params": from_params(MODEL, draw_params(MODEL))})
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "variables", variables)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "variables", jax.eval_shape(lambda: variables))
    equal(restored, variables)


def test_rows_padded_in_front_are_the_rows_alone():
    """By a mask, in both adapters."""
    cell = GRU(D, H)
    params = draw_params(cell)
    front = np.full(XS.shape, np.nan, np.float32)
    mask = np.arange(TIME) >= TIME - 3
    front[:, mask] = XS[:, :3]
    mask = np.broadcast_to(mask, XS.shape[:2])
    want = jaxrnn.scan(cell, params, None, XS[:, :3], time_axis=1)[1]
    linen = RNN(cell).apply({"params": from_params(cell, params)}, front, mask=mask)
    for ys in (linen, jaxrnn.nnx.RNN(cell, params=params)(front, mask=mask)):
        close(ys[:, -3:], want)
        assert not ys[:, :-3].any()


@pytest.mark.parametrize(
    ("run", "error", "words"),
    [
        (lambda m, v: m.apply(v, XS, seq_lengths=LENGTHS[:3]), ValueError, r"^seq_lengths: expected the batch shape"),
        (lambda m, v: m.apply(v, XS, seq_lengths=LENGTHS[None]), ValueError, r"^seq_lengths: .* got \(1, 4\)"),
        (lambda m, v: m.apply(v, XS, seq_lengths=LENGTHS + 1), ValueError, "^seq_lengths: expected 0 to 5, got 1 to 6"),
        (lambda m, v: m.apply(v, XS, seq_lengths=LENGTHS / 1), TypeError, "^seq_lengths: expected integers"),
        (lambda m, v: m.apply(v, XS, initial_carry=XS), ValueError, "^initial_carry: expected the structure"),
        (
            lambda m, v: m.apply(v, XS, initial_carry=jaxrnn.GRUCarry(XS)),
            ValueError,
            r"^initial_carry.h: expected shape \(4, 3\)",
        ),
        (lambda m, v: m.apply(v, XS, mask=XS), TypeError, "^mask: expected bool"),
        (
            lambda m, v: m.apply(v, XS, mask=XS[..., 0] > 0, seq_lengths=LENGTHS),
            ValueError,
            "^mask: expected seq_lengths or mask, got both",
        ),
        (lambda m, v: m.apply(v, XS[0, 0]), ValueError, r"^xs: .* takes a time axis and 1 more, got shape \(2,\)"),
        (lambda m, v: m.apply({"params": {"w_x": XS}}, XS), ValueError, "^params: .* expects w_h; put None there"),
        (lambda m, v: m.apply({"params": v["params"] | {"w_x": XS}}, XS), ValueError, r"^params.w_x: .* expects shape"),
        (lambda m, v: m.apply({}, XS), nn.module.errors.ScopeCollectionNotFound, "w_x"),
        (lambda m, v: m.apply({"params": {"other": XS}}, XS), nn.module.errors.ScopeParamNotFoundError, "w_x"),
        (lambda m, v: to_params(m.cell, v["params"] | {"w": {"z": XS}}), ValueError, "^params: .* has no w/z"),
        (lambda m, v: from_params(m.cell, {"w_x": XS}), ValueError, r"^params: .* has no \['w_x'\]"),
    ],
)
def test_errors(run, error, words):
    model = RNN(GRU(D, H))
    with pytest.raises(error, match=words):
        run(model, {"params": from_params(model.cell, draw_params(model.cell))})


# The other direction: Flax's cells as cells.


class Peephole(nn.RNNCellBase):
    """A user's own cell, whose carry is (h, c) and whose state is two named arrays."""

    features: int

    @nn.compact
    def __call__(self, carry, x):
        h, c = carry
        gates = nn.Dense(2 * self.features)(jnp.concatenate([x, h, c], -1))
        f, g = jnp.split(gates, 2, -1)
        c = nn.sigmoid(f) * c + jnp.tanh(g)
        h = jnp.tanh(c)
        return (h, c), h

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        ones = jnp.ones((*input_shape[:-1], self.features))
        return ones, 0 * ones

    @property
    def num_feature_axes(self):
        return 1


FLAX = {
    "lstm": nn.LSTMCell(H),
    "optimized": nn.OptimizedLSTMCell(H),
    "gru": nn.GRUCell(H),
    "mgu": nn.MGUCell(H),
    "simple": nn.SimpleCell(H),
    "own": Peephole(H),
}


@pytest.mark.parametrize(
    "name", [n if n in ("optimized", "gru", "own") else pytest.param(n, marks=pytest.mark.full) for n in FLAX]
)
def test_a_flax_cell_gives_what_flax_gives(name):
    module, lengths = FLAX[name], np.array([5, 2, 3, 1])  # none of 0, where Flax returns what comes after padding
    cell = LinenCell(module, D)
    assert cell == LinenCell(module.clone(), D)
    assert hash(cell) == hash(LinenCell(module.clone(), D))
    params = cell.init(KEY)
    theirs = nn.RNN(module, return_carry=True)

    @jax.jit
    def both(params):
        def loss(params, model, **keywords):
            carry, ys = model.apply({"params": params}, XS, seq_lengths=lengths, **keywords)
            ys = jnp.where((np.arange(TIME) < lengths[:, None])[..., None], ys, 0)
            return weighted(ys), (carry, ys)

        d_flax, out = jax.grad(loss, has_aux=True)({"cell": params}, theirs)
        return (d_flax["cell"], *out), jax.grad(loss, has_aux=True)(params, RNN(cell), method="scan")

    (d_flax, flax_carry, flax_ys), (d_params, (carry, ys)) = both(params)
    close((ys, d_params), (flax_ys, d_flax))
    if name in ("gru", "mgu", "simple"):
        assert type(carry) is FlaxCarry
        close(carry.h, flax_carry)
    else:
        assert type(carry) is LSTMCarry
        h, c = flax_carry if name == "own" else flax_carry[::-1]
        close(carry, LSTMCarry(h, c))
    assert cell.recurrent_state == "h"
    assert cell.output_size == H
    assert str(cell).startswith(f"LinenCell({type(module).__name__}(features=3), input_size=2")


def as_lstm(params):
    """The params of jaxrnn's LSTM from Flax's."""
    w_x, w_h = (jnp.concatenate([params[side + gate]["kernel"] for gate in "ifgo"], -1) for side in "ih")
    return (
        LSTM(D, H)
        .init(KEY)
        ._replace(w_x=w_x, w_h=w_h, b=jnp.concatenate([params[f"h{gate}"]["bias"] for gate in "ifgo"]))
    )


@pytest.mark.full
def test_a_flax_cell_gets_everything():
    flax = LinenCell(nn.OptimizedLSTMCell(H), D)
    params = flax.init(KEY)
    lengths, reset = LENGTHS, np.arange(TIME) == np.array([[2], [1], [1], [0]])

    def model(cell):
        below = Bidirectional(jaxrnn.Zoneout(cell, (0.2, 0.4)), LearnedCarry(cell))
        return Stack((below, Linear(2 * H, 2)))

    start, head = draw_carry(LSTM(D, H), draw_params(LSTM(D, H))), draw_params(Linear(2 * H, 2))

    def run(cell, params, key=None):
        own = params if cell is flax else as_lstm(params)
        both = jaxrnn.BidirectionalPair(own, jaxrnn.LearnedCarryParams(own, start))
        options = {"lengths": lengths, "reset": reset, "time_axis": 1, "remat_every": 2, "key": key}
        out = jaxrnn.scan(model(cell), (both, head), None, XS, **options)
        return weighted(out), out

    @jax.jit
    def everything(params, keys):
        ours, native = (jax.value_and_grad(lambda p: run(cell, p), has_aux=True)(params) for cell in (flax, LSTM(D, H)))
        many = jax.tree.map(lambda p: jnp.stack([p, p, p]), params)
        return ours, native, jax.vmap(lambda p, key: run(flax, p, key)[0])(many, keys)

    keys = jax.random.split(KEY, 2)[np.array([0, 0, 1])]
    ((_, out), gradient), ((_, native), native_gradient), noisy = everything(params, keys)
    close((out, gradient), (native, native_gradient))
    assert noisy[0] == noisy[1] != noisy[2]


class State(NamedTuple):
    memory: jax.Array
    h: jax.Array
    trace: jax.Array


class Odd(nn.RNNCellBase):
    """Carries of other kinds: `carry` gives one, `h` finds h in it."""

    kind: str

    def initialize_carry(self, rng, input_shape):
        zeros = jnp.zeros((*input_shape[:-1], D))
        match self.kind:
            case "tuple":
                return (zeros, [zeros, zeros])
            case "named":
                return State(zeros, zeros, zeros)
            case "hidden":
                return (zeros, zeros)
            case _:
                return {"h": zeros, "c": zeros}

    def __call__(self, carry, x):
        leaves, structure = jax.tree.flatten(carry)
        leaves = [(k + 1) * leaf + x for k, leaf in enumerate(leaves)]
        return jax.tree.unflatten(structure, leaves), 2 * x if self.kind == "hidden" else leaves[1]

    num_feature_axes = 1


@pytest.mark.parametrize(
    ("kind", "carry", "state"),
    [
        ("tuple", {"carry_0": 1.0, "carry_1": {"carry_0": 1.0, "carry_1": 1.0}}, None),
        ("named", State(1.0, 1.0, 1.0), "h"),
        ("hidden", {"carry_0": 1.0, "carry_1": 1.0}, None),  # puts out neither of the two, so neither is h
        ("dict", {"h": 1.0, "c": 1.0}, None),
    ],
)
def test_names_of_carries(kind, carry, state):
    cell = LinenCell(Odd(kind), D)
    assert cell.recurrent_state == state
    new, _ = jaxrnn.step(cell, {}, None, jnp.ones(D))
    equal(new, jax.tree.map(lambda one: np.full(D, one), carry))
    new, _ = jaxrnn.step(cell, {}, new, jnp.ones(D))
    theirs = Odd(kind).apply({}, Odd(kind).initialize_carry(KEY, (D,)), jnp.ones(D))[0]
    equal(jax.tree.leaves(new), jax.tree.leaves(Odd(kind).apply({}, theirs, jnp.ones(D))[0]))


def test_dtypes_of_a_flax_cell():
    cell = LinenCell(nn.LSTMCell(H), D)
    params = cell.init(KEY, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    carry, ys = jax.eval_shape(lambda: jaxrnn.scan(cell, params, None, XS.astype(jnp.bfloat16), time_axis=1))
    assert ys.dtype == jnp.bfloat16
    assert carry.h.dtype == carry.c.dtype == jnp.float32
    init = nn.initializers.lecun_normal()  # Flax's own takes a QR, of which JAX 0.11 has none in bfloat16
    half = LinenCell(nn.GRUCell(H, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, recurrent_kernel_init=init), D)
    carry, ys = jax.eval_shape(lambda: jaxrnn.scan(half, half.init(KEY), None, XS, time_axis=1))
    assert ys.dtype == carry.h.dtype == jnp.float32


def test_the_carry_of_a_flax_cell_keeps_its_dtypes():
    cell = LinenCell(nn.LSTMCell(H), D)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), draw_carry(LSTM(D, H), draw_params(LSTM(D, H))))
    carry, y = jax.eval_shape(lambda: cell.step(cell.init(KEY), half, XS[0, 0]))
    assert (carry.h.dtype, carry.c.dtype, y.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    with jax.enable_x64(True):
        carry = jax.eval_shape(lambda: cell.initial_carry(cell.init(KEY, jnp.float64)))
        assert carry.h.dtype == carry.c.dtype == jnp.float64


@pytest.mark.full
@pytest.mark.parametrize(
    "cell",
    [
        LinenCell(nn.OptimizedLSTMCell(H), D),
        jaxrnn.Zoneout(LinenCell(nn.GRUCell(H), D), 0.2),
        from_nnx(nnx.GRUCell(D, H, rngs=nnx.Rngs(0)), create=lambda rngs: nnx.GRUCell(D, H, rngs=rngs))[0],
    ],
    ids=repr,
)
def test_flax_cells_keep_the_contract(cell):
    with jax.enable_x64(True):
        test_contract.test_scan_is_the_loop_of_steps(cell, True)
        for keeps in (
            test_contract.test_lengths_are_a_mask,
            test_contract.test_split_is_whole,
            test_contract.test_split_is_whole_in_reverse,
            test_contract.test_batch_axes_and_time_axis,
            test_contract.test_vmap_is_batch,
            test_contract.test_gradients_are_finite_differences,
            test_contract.test_second_order,
            test_contract.test_remat_changes_nothing,
            test_contract.test_padding_reaches_nothing,
            test_contract.test_nothing_crosses_a_reset,
            test_contract.test_nothing_crosses_a_reset_in_reverse,
            test_contract.test_noise_is_a_value,
            test_contract.test_inside_a_scan_and_a_checkpoint,
        ):
            keeps(cell)


def test_a_convolutional_flax_cell():
    module = nn.ConvLSTMCell(H, (3,))
    cell = LinenCell(module, (4, D))
    xs = draw_x(ConvLSTM((4,), D, H), 1, BATCH, TIME)
    params = cell.init(KEY)
    assert cell.output_size == (4, H)
    ys = jax.jit(RNN(cell).apply)({"params": params}, xs)
    close(ys, jax.jit(nn.RNN(module).apply)({"params": {"cell": params}}, xs))


def test_a_flax_cell_made_inside_a_module():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, xs):
            return RNN(LinenCell(nn.GRUCell(H), D), name="rnn")(xs)

    variables = Model().init(KEY, XS)
    assert set(variables["params"]) == {"rnn"}
    ys = jax.jit(Model().apply)(variables, XS)
    close(ys, nn.RNN(nn.GRUCell(H)).apply({"params": {"cell": variables["params"]["rnn"]}}, XS))


class Normed(Peephole):
    @nn.compact
    def __call__(self, carry, x):
        h = nn.BatchNorm(use_running_average=False)(x)
        return carry, h


def test_refused_flax_cells():
    normal = nn.initializers.normal()
    with pytest.raises(ValueError, match=r"LinenCell: expected a carry that begins the same .* LearnedCarry or"):
        LinenCell(nn.GRUCell(H, carry_init=normal), D)
    with pytest.raises(ValueError, match="draws it at random"):  # seen under a trace too
        jax.eval_shape(lambda: LinenCell(nn.LSTMCell(H, carry_init=normal), D).init(KEY))
    with pytest.raises(TypeError, match=r"LinenCell.module: expected a flax.linen.RNNCellBase, got"):
        LinenCell(nn.Dense(H), D)
    with pytest.raises(TypeError, match=r"also has \['batch_stats'\]"):
        LinenCell(Normed(D), D)
    with pytest.raises(ValueError, match=r"LinenCell\.input_size: expected at least 1, got 0"):
        LinenCell(nn.GRUCell(H), 0)
    cell = jaxrnn.RecurrentDropout(LinenCell(nn.GRUCell(H), D), 0.5)
    with pytest.raises(TypeError, match=r"noise: .* has no place for it"):
        jaxrnn.scan(cell, cell.init(KEY), None, XS, key=KEY)
    with pytest.raises(ValueError, match=r"xs: LinenCell\(GRUCell.* expects \(..., 2\), got shape \(4, 5, 3\)"):
        RNN(LinenCell(nn.GRUCell(H), D)).init(KEY, np.ones((4, 5, 3), np.float32))
