"""The Flax NNX adapters: the same numbers as the functions, and Flax's own tools on top."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from members import D, H, draw_carry, draw_params, draw_x, some_members
from test_linen import BATCH, KEY, LENGTHS, TIME, XS, Named, close, equal, program, weighted

import jaxrnn
import jaxrnn.linen
import jaxrnn.nnx
from jaxrnn import GRU, LSTM, Bidirectional, Dropout, Elman, LearnedCarry, Linear, LSTMCarry, Stack
from jaxrnn.flax.bridge import TAKEN
from jaxrnn.nnx import RNN, FlaxCarry, NNXCell, from_nnx

NOISY = Stack((Dropout(0.5), Linear(D, H)))
MODEL = Stack((GRU(D, H), Dropout(0.5), LSTM(H, 4)))


@some_members("gru", "two_inputs", "apply_callable", "classifier", "everything", "zoneout_own")
def test_the_module_is_the_function(cell):
    params = draw_params(cell)
    xs = draw_x(cell, 1, BATCH, TIME)
    carry = draw_carry(cell, params, BATCH)
    reset = np.zeros((BATCH, TIME), bool)
    reset[:, 2] = True

    def module(params, carry, xs):
        model = RNN(cell, params=params, reverse=True, remat_every=2, deterministic=True)
        return model.scan(xs, seq_lengths=LENGTHS, reset=reset, initial_carry=carry)

    def function(params, carry, xs):
        options = {"lengths": LENGTHS, "reset": reset, "reverse": True, "remat_every": 2, "time_axis": 1}
        return jaxrnn.scan(cell, params, carry, xs, **options)

    assert program(module, params, carry, xs) == program(function, params, carry, xs)
    equal(RNN(cell, params=params).params(), params)


def test_paths_and_state():
    cell = LearnedCarry(Stack((jaxrnn.Embed(7, D), Dropout(0.1), Bidirectional(LSTM(D, H), Linear(D, 2)))))
    model = RNN(cell, rngs=nnx.Rngs(0))
    _, params, rest = nnx.split(model, nnx.Param, ...)
    assert {"/".join(path) for path, _ in nnx.to_flat_state(params)} == {
        "cell_/layer_0/w",
        *(f"cell_/layer_2/forward/{name}" for name in ("w_x", "w_h", "b")),
        *(f"cell_/layer_2/backward/{name}" for name in ("w", "b")),
        *(f"carry/layer_2/forward/{name}" for name in "hc"),
    }
    assert [path for path, _ in nnx.to_flat_state(rest)] == [("rngs", "count"), ("rngs", "key")]
    assert not nnx.split(RNN(GRU(D, H), rngs=nnx.Rngs(0)), nnx.Param, ...)[2]  # no noise, no stream
    assert {name for name in dir(model) if not name.startswith("_")} - {"cell_", "carry"} <= TAKEN
    paths = {path for path, _ in nnx.to_flat_state(nnx.state(RNN(Named(), rngs=nnx.Rngs(0))))}
    assert paths == {("scan_", "3", "w"), ("scan_", "3", "decay"), ("w", "layer_0")}
    pure = nnx.to_pure_dict(params)
    equal(jaxrnn.nnx.to_params(cell, pure), model.params())
    equal(jaxrnn.nnx.from_params(cell, model.params()), pure)


def test_the_params_begin_as_the_cell_draws_them():
    cell = GRU(D, H)
    model = RNN(cell, rngs=nnx.Rngs(0, params=1), param_dtype=jnp.bfloat16)
    equal(model.params(), cell.init(nnx.Rngs(0, params=1).params(), jnp.bfloat16))
    bare = RNN(cell, params=model.params()._replace(b=None))
    assert bare.params().b is None
    assert {path for path, _ in nnx.to_flat_state(nnx.state(bare))} == {("w_x",), ("w_h",), ("b_hn",)}


def test_dropout_comes_from_a_stream():
    def model(seed=0, **keywords):
        return RNN(NOISY, rngs=nnx.Rngs(params=0, dropout=seed), **keywords)

    one = model()
    first, second = one(XS), one(XS)
    assert (first != second).any()  # the stream goes on
    same = model()
    equal((same(XS), same(XS)), (first, second))
    assert (model(1)(XS) != first).any()
    equal(model()(XS, rngs=nnx.Rngs(dropout=0).dropout()), model(1)(XS, rngs=nnx.Rngs(dropout=0)))
    equal(model()(XS, rngs=nnx.Rngs(dropout=0).dropout), model(1)(XS, rngs=nnx.Rngs(dropout=0)))
    noise = RNN(NOISY, rngs=nnx.Rngs(params=0, noise=3), rng_collection="noise")
    equal(noise(XS, rngs=nnx.Rngs(noise=3)), model()(XS, rngs=nnx.Rngs(dropout=3)))
    rngs = nnx.Rngs(params=0, dropout=0)
    own = RNN(NOISY, rngs=rngs)
    count = int(rngs.dropout.count[...])
    own(XS)
    assert rngs.dropout.count[...] == count  # forked, so no other module's stream moves
    none = jaxrnn.scan(NOISY, one.params(), None, XS, time_axis=1)[1]
    equal(one(XS, deterministic=True), none)
    one.eval()
    equal(one(XS), none)
    equal(nnx.view(model(), deterministic=True)(XS), none)
    assert (one(XS, deterministic=False) != none).any()
    one.train()
    assert (one(XS) != none).any()


def test_missing_streams():
    silent = RNN(NOISY, params=draw_params(NOISY))
    with pytest.raises(ValueError, match=r"rngs: .* draws noise; give rngs to RNN or to the call, or determ"):
        silent(XS)
    with pytest.raises(ValueError, match=r"deterministic: expected True or False.*got neither"):
        RNN(NOISY, params=draw_params(NOISY), deterministic=None)(XS)
    with pytest.raises(
        TypeError, match=r"rngs: expected flax.nnx.Rngs to draw the params from, or params; got neither"
    ):
        RNN(NOISY)
    with pytest.raises(TypeError, match=r"rngs: expected flax.nnx.Rngs, got PRNGKeyArray"):
        RNN(NOISY, rngs=KEY)
    with pytest.raises(ValueError, match=r"^seq_lengths: expected the batch shape \(4,\), got \(3,\)"):
        silent(XS, seq_lengths=LENGTHS[:3], deterministic=True)
    with pytest.raises(ValueError, match=r"^initial_carry: expected the structure"):
        silent(XS, initial_carry=XS, deterministic=True)


@jax.numpy_dtype_promotion("standard")  # Adam of Optax mixes dtypes
def test_training():
    class Tagger(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(7, D, rngs=rngs)
            self.rnn = RNN(Stack((GRU(D, H), Dropout(0.1))), rngs=rngs)
            self.head = nnx.Linear(H, 1, rngs=rngs)

        def __call__(self, tokens, lengths):
            return self.head(self.rnn(self.embed(tokens), seq_lengths=lengths))

    tokens = draw_x(jaxrnn.Embed(7, D), 1, BATCH, TIME)
    model = Tagger(nnx.Rngs(0))

    def decays(path, _):
        return path[-1].startswith("w")

    mask = nnx.map_state(decays, nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(model, optax.adamw(0.05, weight_decay=0.1, mask=mask), wrt=nnx.Param)
    before, count = model.rnn.params(), model.rnn.rngs.count[...]

    @nnx.jit
    def train_step(model, optimizer):
        loss, gradient = nnx.value_and_grad(lambda model: jnp.mean((model(tokens, LENGTHS) - 1) ** 2))(model)
        optimizer.update(model, gradient)
        return loss

    losses = [train_step(model, optimizer) for _ in range(4)]
    assert losses[3] < losses[0]
    assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, (before, model.rnn.params())), strict=True))
    assert model.rnn.rngs.count[...] == count + 4
    split = nnx.split(model)
    model.eval()
    merged = nnx.merge(*split)
    merged.eval()
    equal(merged(tokens, LENGTHS), model(tokens, LENGTHS))


def test_the_gradient_is_the_function_s():
    cell = LearnedCarry(GRU(D, H))
    params = draw_params(cell)
    model = RNN(cell, params=params, implementation={"gated_scan": "xla"})
    assert hash(nnx.graphdef(model)) == hash(
        nnx.graphdef(RNN(cell, params=params, implementation=model.implementation))
    )

    @nnx.jit
    def ours(model):
        return nnx.grad(lambda model: weighted(model.scan(XS, seq_lengths=LENGTHS)))(model)

    @jax.jit
    def theirs(params):
        return jax.grad(lambda p: weighted(jaxrnn.scan(cell, p, None, XS, lengths=LENGTHS, time_axis=1)))(params)

    close(jaxrnn.nnx.to_params(cell, nnx.to_pure_dict(ours(model))), theirs(params))


def test_streaming_is_the_whole():
    model = RNN(MODEL, params=draw_params(MODEL))
    end, ys = model.scan(XS, deterministic=True)
    step = nnx.jit(lambda model, carry, x: model.step(carry, x))
    carry, outputs = None, []
    for t in range(TIME):
        carry, y = step(model, carry, XS[:, t])
        outputs.append(y)
    close((carry, np.stack(outputs, 1)), (end, ys))
    first = RNN(MODEL, params=model.params(), time_major=True)
    close(first(np.moveaxis(XS, 1, 0), deterministic=True), np.moveaxis(ys, 1, 0))


def test_layers_by_vmap_and_scan():
    cell = jaxrnn.Residual(Elman(D, D))

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def create(rngs):
        return RNN(cell, rngs=rngs)

    layers = create(nnx.Rngs(0))
    assert layers.w_x.shape == (3, D, D)

    @nnx.jit
    def run(layers):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(ys, layer):
            return nnx.remat(lambda layer, ys: layer(ys))(layer, ys)

        return forward(XS, layers), nnx.vmap(lambda layer: layer(XS))(layers)

    deep, wide = run(layers)
    ys = XS
    for k in range(3):
        params = jax.tree.map(lambda leaf: leaf[k], layers.params())
        close(wide[k], jaxrnn.scan(cell, params, None, XS, time_axis=1)[1])
        ys = jaxrnn.scan(cell, params, None, ys, time_axis=1)[1]
    close(deep, ys)


def test_serialization():
    model, other = (RNN(MODEL, params=draw_params(MODEL, seed)) for seed in (1, 2))
    data = serialization.to_bytes(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    state = nnx.state(other, nnx.Param)
    nnx.replace_by_pure_dict(state, serialization.from_bytes(nnx.to_pure_dict(state), data))
    nnx.update(other, state)
    equal(other.params(), model.params())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_orbax(tmp_path):
    import orbax.checkpoint as orbax

    model = RNN(MODEL, rngs=nnx.Rngs(0), params=draw_params(MODEL))
    graphdef, state = nnx.split(model)
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: state))
    again = nnx.merge(graphdef, restored)
    equal(again.params(), model.params())
    equal(jax.random.key_data(again.rngs()), jax.random.key_data(model.rngs()))


# The other direction: Flax's cells as cells.


class Own(nnx.RNNCellBase):
    """A user's own cell, which learns where it starts and has a layer of dropout."""

    def __init__(self, rngs, rate=0.0):
        self.linear = nnx.Linear(D, H, rngs=rngs)
        self.start = nnx.Param(jnp.full(H, 0.5))
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def initialize_carry(self, input_shape, rngs=None, carry_init=None):
        return jnp.broadcast_to(self.start[...], (*input_shape[:-1], H))

    def __call__(self, carry, x):
        h = jnp.tanh(carry + self.dropout(self.linear(x)))
        return h, 2 * h

    num_feature_axes = 1


FLAX = {
    "lstm": nnx.LSTMCell,
    "optimized": nnx.OptimizedLSTMCell,
    "gru": nnx.GRUCell,
    "simple": nnx.SimpleCell,
}


@pytest.mark.parametrize("name", [n if n == "optimized" else pytest.param(n, marks=pytest.mark.full) for n in FLAX])
def test_a_flax_cell_gives_what_flax_gives(name):
    module, lengths = FLAX[name](D, H, rngs=nnx.Rngs(0)), np.array([5, 2, 3, 1])
    cell, params = from_nnx(module)
    assert (cell, cell.recurrent_state, cell.output_size) == (from_nnx(module)[0], "h", H)
    assert hash(cell) == hash(from_nnx(FLAX[name](D, H, rngs=nnx.Rngs(1)))[0])
    valid = (np.arange(TIME) < lengths[:, None])[..., None]

    @nnx.jit
    def flax(module):
        def loss(module):
            carry, ys = nnx.RNN(module, return_carry=True)(XS, seq_lengths=lengths)
            return weighted(jnp.where(valid, ys, 0)), (carry, jnp.where(valid, ys, 0))

        return nnx.grad(loss, has_aux=True)(module)

    @jax.jit
    def ours(params):
        def loss(params):
            carry, ys = jaxrnn.scan(cell, params, None, XS, lengths=lengths, time_axis=1)
            return weighted(ys), (carry, ys)

        return jax.grad(loss, has_aux=True)(params)

    (d_module, (flax_carry, flax_ys)), (d_params, (carry, ys)) = flax(module), ours(params)
    close(carry, LSTMCarry(*flax_carry[::-1]) if "LSTM" in type(module).__name__ else FlaxCarry(flax_carry))
    close((d_params, ys), (nnx.to_pure_dict(nnx.state(d_module, nnx.Param)), flax_ys))


def test_a_flax_cell_gets_everything():
    cell, params = from_nnx(Own(nnx.Rngs(0)), D, create=Own)
    assert (cell.recurrent_state, cell.output_size) == (None, H)  # puts out 2 h and not h
    close(cell.initial_carry(params, (4,)).h, np.full((4, H), 0.5))
    equal(cell.init(KEY), from_nnx(Own(nnx.Rngs(KEY)), D)[1])
    assert cell.init(KEY, jnp.bfloat16)["start"].dtype == jnp.bfloat16
    model = Stack((Bidirectional(jaxrnn.Zoneout(cell, 0.2), cell), Linear(2 * H, 1)))
    reset = np.arange(TIME) == np.array([[2], [1], [1], [0]])

    def run(params, key=None):
        options = {"lengths": LENGTHS, "reset": reset, "time_axis": 1, "remat_every": 2, "key": key}
        return jaxrnn.scan(model, params, None, XS, **options)

    @jax.jit
    def everything(keys):
        params = jax.vmap(model.init)(keys)
        return params, jax.vmap(run)(params), jax.grad(lambda p: weighted(jax.vmap(run)(p, keys)))(params)

    params, (_, ys), gradient = everything(jax.random.split(KEY, 2))
    assert all(leaf.any() for leaf in jax.tree.leaves(gradient))

    def first(params):  # row 3 by hand: one valid step, which starts anew
        params = jax.tree.map(lambda leaf: leaf[0], params)
        both, head = params

        def tanh(own, rate):
            h = jnp.tanh(own["start"] + XS[3, 0] @ own["linear"]["kernel"] + own["linear"]["bias"])
            return 2 * h

        return jnp.concatenate([tanh(both.forward, 0.2), tanh(both.backward, 0.0)]) @ head.w + head.b

    close(ys[0, 3, 0], first(params))
    assert not ys[:, 3, 1:].any()


def test_a_flax_cell_in_the_adapters():
    below, params = from_nnx(
        nnx.SimpleCell(D, H, rngs=nnx.Rngs(0)), create=lambda rngs: nnx.SimpleCell(D, H, rngs=rngs)
    )
    cell = Stack((below, jaxrnn.linen.LinenCell(nn.SimpleCell(H), H)))
    model = RNN(cell, rngs=nnx.Rngs(0))
    assert {path[:2] for path, _ in nnx.to_flat_state(nnx.state(model))} == {
        ("layer_0", "dense_h"),
        ("layer_0", "dense_i"),
        ("layer_1", "h"),
        ("layer_1", "i"),
    }
    equal(jax.tree.map(jnp.shape, model.params()[0]), jax.tree.map(jnp.shape, params))
    variables = {"params": jaxrnn.linen.from_params(cell, model.params())}
    equal(jaxrnn.linen.RNN(cell).apply(variables, XS), model(XS))


def test_init_without_create():
    cell, params = from_nnx(nnx.LSTMCell(D, H, rngs=nnx.Rngs(0)))
    shapes = jax.eval_shape(cell.init, KEY)
    equal(jax.tree.map(jnp.shape, shapes), jax.tree.map(jnp.shape, params))
    jaxrnn.Zoneout(cell, 0.1)  # which asks for shapes
    with pytest.raises(TypeError, match=r"init: NNXCell\(LSTMCell, input_size=2\) was made of a module"):
        cell.init(KEY)
    with pytest.raises(jax.errors.JaxRuntimeError, match="give from_nnx `create`"):
        jax.block_until_ready(jax.jit(cell.init)(KEY))


class Other(Own):
    def __init__(self, rngs):
        Own.__init__(self, rngs)
        self.norm = nnx.BatchNorm(H, rngs=rngs)


class Drawn(Own):
    def initialize_carry(self, input_shape, rngs=None, carry_init=None):
        return jax.random.normal(rngs.carry(), (*input_shape[:-1], H))


def test_refused_flax_cells():
    with pytest.raises(TypeError, match=r"module: expected a flax.nnx.RNNCellBase, got Linear"):
        from_nnx(nnx.Linear(D, H, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match=r"input_size: expected the size of one x, since Own has no in_features"):
        from_nnx(Own(nnx.Rngs(0)))
    with pytest.raises(TypeError, match=r"expected no state but nnx.Param in Other, got BatchStat \('norm', 'mean'\)"):
        from_nnx(Other(nnx.Rngs(0)), D)
    with pytest.raises(ValueError, match="NNXCell: expected a carry that begins the same every time"):
        from_nnx(Drawn(nnx.Rngs(0)), D)
    with pytest.raises(ValueError, match="create: expected a module like the one that was given to from_nnx"):
        from_nnx(Own(nnx.Rngs(0)), D, create=lambda rngs: nnx.GRUCell(D, H, rngs=rngs))
    # A step that draws has nothing to draw from: it is refused and not without noise.
    noisy = Own(nnx.Rngs(0), 0.5)
    with pytest.raises(ValueError, match="`deterministic` is False, but no `rngs`"):
        jaxrnn.scan(*from_nnx(noisy, D), None, XS)
    noisy.eval()
    assert isinstance(from_nnx(noisy, D)[0], NNXCell)
    assert noisy.dropout.rngs is not None  # the module itself is left as it was
