"""The cells with a matrix as state, and the blocks around them, against others' code: results, states and gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conversion import peer

import jaxrnn

X64 = True

T, B, D = 70, 2, 7  # more steps than the 64 of a chunk of theirs


@pytest.fixture
def torch():
    module = peer("torch")
    module.set_num_threads(1)
    module.manual_seed(0)
    return module


def draw(seed, *shape, scale=1.0):
    """Numbers that float32 holds, in float64."""
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32).astype(np.float64)


def redraw(seed, tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten([draw((seed, k), *leaf.shape, scale=0.5) for k, leaf in enumerate(leaves)])


def close(ours, theirs, tolerance, what=""):
    theirs = theirs.detach().numpy()
    np.testing.assert_allclose(ours, theirs, tolerance, tolerance * abs(theirs).max(), err_msg=what)


def same(torch, theirs, ours, arrays, tolerance, dtype="float32"):
    """Two functions of the same arrays have the same results, and the same gradients of a weighted sum of them.

    Theirs runs in `dtype`, ours in float64. Both are batch first and return a tuple.
    """
    tensors = jax.tree.map(lambda x: torch.tensor(x, dtype=getattr(torch, dtype), requires_grad=True), arrays)
    results = theirs(*tensors)
    factors = [draw((9, k), *each.shape) for k, each in enumerate(results)]
    sum((each * torch.tensor(w, dtype=each.dtype)).sum() for each, w in zip(results, factors, strict=True)).backward()

    def loss(arrays):
        results = ours(*arrays)
        return sum(jnp.vdot(each, w) for each, w in zip(results, factors, strict=True)), results

    gradients, found = jax.jit(jax.grad(loss, has_aux=True))(jax.tree.map(jnp.asarray, arrays))
    for k, (each, expected) in enumerate(zip(found, results, strict=True)):
        close(each, expected, tolerance, f"result {k}")
    for (path, each), tensor in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(tensors), strict=True):
        close(each, tensor.grad, tolerance, f"gradient of {jax.tree_util.keystr(path)}")


def run(cell, params, carry, xs, **options):
    """(the last carry, ys), batch first."""
    carry, ys = jaxrnn.scan(cell, params, carry, jnp.moveaxis(xs, 1, 0), **options)
    return carry, jnp.moveaxis(ys, 0, 1)


# The cells, against the functions at the heart of others' layers.


@pytest.mark.parametrize("form", ["chunk", "recurrent"])
def test_gated_delta_net(torch, form):
    rule = getattr(peer("transformers.models.qwen3_5.modeling_qwen3_5"), f"torch_{form}_gated_delta_rule")
    cell = jaxrnn.GatedDeltaNet(52, heads=4, key_size=3, value_size=8, key_heads=2, project=False)
    params = jaxrnn.GatedDeltaNetParams(None, draw(0, 4), draw(1, 4))

    def theirs(params, s, xs):
        q, k, v, beta, step = xs.split([6, 6, 32, 4, 4], -1)
        q, k, v = (each.unflatten(-1, (heads, -1)) for each, heads in ((q, 2), (k, 2), (v, 4)))
        g = -params.log_decay.exp() * torch.nn.functional.softplus(step + params.b_step)
        options = {"initial_state": s, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
        ys, s = rule(q, k, v, g, beta.sigmoid(), **options)
        return ys.flatten(-2), s

    def ours(params, s, xs):
        carry, ys = run(cell, params, jaxrnn.GatedDeltaNetCarry(s), xs)
        return ys, carry.s

    same(torch, theirs, ours, (params, draw(2, B, 4, 3, 8), draw(3, B, T, 52)), 1e-4)


@pytest.mark.parametrize("form", ["chunk", "recurrent"])
def test_kda(torch, form):
    rule = getattr(peer("transformers.models.kimi_linear.modeling_kimi_linear"), f"{form}_kimi_delta_attention")
    cell = jaxrnn.KDA(54, heads=3, key_size=4, value_size=5, project=False)
    params = jaxrnn.KDAParams(None, None, draw(0, 12), draw(1, 3))

    def theirs(params, s, xs):
        q, k, v, beta, z = xs.split([12, 12, 15, 3, 12], -1)
        q, k, v, z = (each.unflatten(-1, (3, -1)) for each in (q, k, v, z + params.b_gate))
        g = -params.log_decay.exp()[:, None] * torch.nn.functional.softplus(z)
        options = {"initial_state": s, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
        ys, s = rule(q, k, v, g, beta.sigmoid(), **options)
        return ys.flatten(-2), s

    def ours(params, s, xs):
        carry, ys = run(cell, params, jaxrnn.KDACarry(s), xs)
        return ys, carry.s

    same(torch, theirs, ours, (params, draw(2, B, 3, 4, 5), draw(3, B, T, 54)), 1e-4)


def test_mamba2(torch):
    chunks = peer("transformers.models.mamba2.modeling_mamba2").mamba2_chunk_scan
    cell = jaxrnn.Mamba2(36, heads=4, key_size=3, value_size=5, key_heads=2, project=False)
    params = jaxrnn.Mamba2Params(None, draw(0, 4), draw(1, 4), draw(2, 4))

    def theirs(params, s, xs):
        c, b, v, step = xs.split([6, 6, 20, 4], -1)
        c, b, v = (each.unflatten(-1, (heads, -1)) for each, heads in ((c, 2), (b, 2), (v, 4)))
        options = {"D": params.d, "dt_bias": params.b_step, "dt_softplus": True, "return_final_states": True}
        s = s.transpose(-1, -2)
        ys, s = chunks(v, step, -params.log_decay.exp(), b, c, 16, initial_states=s, **options)
        return ys.flatten(-2), s.transpose(-1, -2)

    def ours(params, s, xs):
        carry, ys = run(cell, params, jaxrnn.Mamba2Carry(s), xs)
        return ys, carry.s

    same(torch, theirs, ours, (params, draw(3, B, 4, 3, 5), draw(4, B, T, 36)), 1e-4)


def test_mlstm(torch):
    """mlstm_kernels, all of whose states can be in float64."""
    unroll = peer("mlstm_kernels.torch.recurrent.native_sequence").mlstm_recurrent_sequence__native_fw
    cell = jaxrnn.MLSTM(D, heads=3, key_size=4, value_size=5)
    params = redraw(0, jax.eval_shape(cell.init, jax.random.key(0)))

    def theirs(params, carry, xs):
        q, k, v = (each.unflatten(-1, (3, -1)).transpose(1, 2) for each in (xs @ params.w_x).split([12, 12, 15], -1))
        gates = 15 * torch.tanh((xs @ params.w_gates + params.b_gates) / 15)
        i, f = gates.transpose(1, 2).split(3, 1)
        begin = carry.s[..., :-1], carry.s[..., -1], carry.m[..., None]
        options = {"return_last_states": True, "eps": 1e-6, "dtype_state": torch.float64}
        ys, (c, n, m) = unroll(q, k, v, i, f, *begin, **options)
        return ys.transpose(1, 2).flatten(-2), torch.cat([c, n[..., None]], -1), m[..., 0]

    def ours(params, carry, xs):
        carry, ys = run(cell, params, carry, xs)
        return ys, carry.s, carry.m

    carry = jaxrnn.MLSTMCarry(draw(1, B, 3, 4, 6), draw(2, B, 3))
    same(torch, theirs, ours, (params, carry, 3 * draw(3, B, T, D)), 1e-9, "float64")


def test_rwkv7(torch):
    unroll = peer("rwkv7_hf.ops_rwkv7").rwkv7_recurrent
    cell = jaxrnn.RWKV7(63, heads=3, key_size=4, value_size=5, project=False)
    params = redraw(0, jax.eval_shape(cell.init, jax.random.key(0)))

    def theirs(params, s, xs):
        def by_head(x):
            return x.unflatten(-1, (3, -1))

        r, k, v, decay, rate = xs.split([12, 12, 15, 12, 12], -1)
        decay = torch.exp(-np.exp(-0.5) * torch.sigmoid(decay + params.b_decay))
        rate = torch.sigmoid(rate + params.b_rate)
        removed = torch.nn.functional.normalize(by_head(k * params.removal), dim=-1)
        k = k * (1 + (rate - 1) * params.replacement)
        r, k, v, decay, rate = map(by_head, (r, k, v, decay, rate))
        ys, s = unroll(r, decay, k, v, -removed, removed * rate, s)
        ys = torch.nn.functional.group_norm(ys.flatten(0, 1).flatten(1), 3, params.scale, params.offset, 5e-5)
        bonus = (r * k * by_head(params.bonus)).sum(-1, keepdim=True) * v
        return ys.unflatten(0, (B, T)) + bonus.flatten(2), s

    def ours(params, s, xs):
        carry, ys = run(cell, params, jaxrnn.RWKV7Carry(s), xs)
        return ys, carry.s

    same(torch, theirs, ours, (params, draw(1, B, 3, 4, 5), draw(2, B, T, 63)), 1e-8, "float64")


# The cells that no installable package has: loops in torch over naive steps, restated here from the papers.


def loop(torch, s, q, k, v, decay=None, beta=None):
    """(B, T, heads, ·) and s (B, heads, K, V): ys, and the last s. k, v and beta may be lists, of several products."""
    ys = []
    several = [x if isinstance(x, list) else [x] for x in (k, v, beta)]
    for t in range(q.shape[1]):
        s = s if decay is None else decay[:, t, ..., None] * s
        for k, v, beta in zip(*several, strict=True):
            written = v[:, t]
            if beta is not None:
                written = beta[:, t, :, None] * (written - torch.einsum("bhk,bhkv->bhv", k[:, t], s))
            s = s + torch.einsum("bhk,bhv->bhkv", k[:, t], written)
        ys.append(torch.einsum("bhk,bhkv->bhv", q[:, t], s))
    return torch.stack(ys, 1), s


HEADS, K, V = 3, 4, 5


def columns(xs, *sizes):
    """Parts of these sizes for each head, (..., heads, size)."""
    return [each.unflatten(-1, (HEADS, -1)) for each in xs.split([HEADS * size for size in sizes], -1)]


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def linear_attention(torch, params, s, xs):
    q, k, v = columns(xs @ params.w_x, K, K, V)
    q, k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    ys, s = loop(torch, s, q / K**0.5, k, torch.cat([v, torch.ones_like(v[..., :1])], -1))
    return ys[..., :-1] / (ys[..., -1:] + 1e-6), s


def ret_net(torch, params, s, xs):
    """From the eleventh step on."""
    q, k, v = columns(xs @ params.w_x, K, K, V)
    angle = (10 + torch.arange(T))[:, None] * 10000.0 ** (-torch.arange(K // 2, dtype=torch.float64) * 2 / K)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]

    def turned(x):
        z = torch.complex(*x.chunk(2, -1)) * turn
        return torch.cat([z.real, z.imag], -1)

    decay = 1 - 2.0 ** (-5 - torch.arange(HEADS, dtype=torch.float64))
    return loop(torch, s, turned(q) / K**0.5, turned(k), v, decay.expand(B, T, -1)[..., None])


def gla(torch, params, s, xs):
    *features, low = (xs @ params.w_x).split([HEADS * K, HEADS * K, HEADS * V, 2], -1)
    q, k, v = (each.unflatten(-1, (HEADS, -1)) for each in features)
    decay = torch.sigmoid(low @ params.w_gate + params.b_gate).pow(1 / 16).unflatten(-1, (HEADS, -1))
    return loop(torch, s, q / K**0.5, k, v, decay)


def hgrn2(torch, params, s, xs):
    q, f, v = columns(xs @ params.w_x, K, K, V)
    f = 0.3 + 0.7 * torch.sigmoid(f)
    return loop(torch, s, torch.nn.functional.silu(q), 1 - f, v, f)


def delta_net(torch, params, s, xs):
    q, k, v, beta = columns(xs @ params.w_x, K, K, V, 1)
    return loop(torch, s, unit(q) / K**0.5, unit(k), v, beta=torch.sigmoid(beta[..., 0]))


def delta_product(torch, params, s, xs):
    """Two products, and negative eigenvalues."""
    q, k1, k2, v1, v2, b1, b2, step = columns(xs @ params.w_x, K, K, K, V, V, 1, 1, 1)
    decay = torch.exp(-params.log_decay.exp() * torch.nn.functional.softplus(step[..., 0] + params.b_step))
    betas = [2 * torch.sigmoid(each[..., 0]) for each in (b1, b2)]
    return loop(torch, s, unit(q) / K**0.5, [unit(k1), unit(k2)], [v1, v2], decay[..., None], betas)


SIZES = {"heads": HEADS, "key_size": K, "value_size": V}
LOOPS = {
    "LinearAttention": (jaxrnn.LinearAttention(D, **SIZES, normalized=True), linear_attention),
    "RetNet": (jaxrnn.RetNet(D, **SIZES), ret_net),
    "GLA": (jaxrnn.GLA(D, **SIZES, rank=2), gla),
    "HGRN2": (jaxrnn.HGRN2(D, **SIZES, lower_bound=0.3), hgrn2),
    "DeltaNet": (jaxrnn.DeltaNet(D, **SIZES), delta_net),
    "DeltaProduct": (jaxrnn.GatedDeltaNet(D, **SIZES, products=2, negative_eigenvalues=True), delta_product),
}


@pytest.mark.parametrize(("cell", "naive"), LOOPS.values(), ids=LOOPS)
def test_a_naive_loop(torch, cell, naive):
    params = redraw(0, jax.eval_shape(cell.init, jax.random.key(0)))
    carry = jax.tree.map(jnp.asarray, cell.initial_carry(params, (B,)))
    if isinstance(cell, jaxrnn.RetNet):
        carry = carry._replace(position=carry.position + 10)

    def theirs(params, s, xs):
        ys, s = naive(torch, params, s, xs)
        return ys.flatten(-2), s

    def ours(params, s, xs):
        last, ys = run(cell, params, carry._replace(s=s), xs)
        return ys, last.s

    # Positive, so that no sum of weights is near zero.
    same(torch, theirs, ours, (params, abs(draw(1, *carry.s.shape)), draw(2, B, T, D)), 1e-8, "float64")


# Whole layers, with their weights carried over by hand.


class Layer(NamedTuple):
    """module: theirs, for which `config` makes a cache. cell and convert(weights): ours, and its params. read(carry):
    the window of the convolution, and the state, in our carry.
    """

    module: Any
    config: Any
    cell: jaxrnn.Cell
    convert: Callable[[Any], Any]
    read: Callable[[Any], tuple[Any, Any]]


def linear(weight):
    return jaxrnn.LinearParams(weight.T, None)


def convolution(weights, order=slice(None)):
    bias = weights.get("conv1d.bias")
    return jaxrnn.CausalConvParams(weights["conv1d.weight"][order, 0].T, None if bias is None else bias[order])


def gated_delta():
    config = peer("transformers.models.qwen3_5.configuration_qwen3_5").Qwen3_5TextConfig(
        hidden_size=D,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=3,
        linear_value_head_dim=5,
        num_hidden_layers=4,
        rms_norm_eps=1e-3,
    )
    module = peer("transformers.models.qwen3_5.modeling_qwen3_5").Qwen3_5GatedDeltaNet(config, 0)

    def convert(weights):
        gates = jnp.concatenate([weights["in_proj_b.weight"], weights["in_proj_a.weight"]])
        features = (linear(weights["in_proj_qkv.weight"]), convolution(weights), ()), linear(gates)
        rule = jaxrnn.GatedDeltaNetParams(None, weights["dt_bias"], weights["A_log"])
        branch = features, rule, jaxrnn.RMSNormParams(weights["norm.weight"])
        return (branch, (linear(weights["in_proj_z.weight"]), ())), linear(weights["out_proj.weight"])

    cell = jaxrnn.gated_delta_block(D, heads=4, key_size=3, value_size=5, key_heads=2, epsilon=1e-3)
    return Layer(module, config, cell, convert, lambda carry: (carry[0][0][0][0][1].window, carry[0][0][1].s))


def kda():
    config = peer("transformers.models.kimi_linear.configuration_kimi_linear").KimiLinearConfig(
        hidden_size=D,
        linear_num_heads=3,
        linear_head_dim=4,
        linear_conv_kernel_dim=3,
        num_hidden_layers=4,
        rms_norm_eps=1e-3,
    )
    module = peer("transformers.models.kimi_linear.modeling_kimi_linear").KimiLinearDeltaAttention(config, 0)

    def convert(weights):
        def pair(first, second):
            return linear(weights[f"{first}.weight"]), linear(weights[f"{second}.weight"])

        into = linear(jnp.concatenate([weights[f"{name}_proj.weight"] for name in "qkv"]))
        decay = pair("forget_gate.f_a_proj", "forget_gate.f_b_proj")
        features = (into, convolution(weights), ()), linear(weights["b_proj.weight"]), decay
        rule = jaxrnn.KDAParams(None, None, weights["forget_gate.dt_bias"], weights["forget_gate.A_log"].ravel())
        branch = features, rule, jaxrnn.RMSNormParams(weights["o_norm.weight"])
        return (branch, (*pair("g_a_proj", "g_b_proj"), ())), linear(weights["o_proj.weight"])

    cell = jaxrnn.kda_block(D, heads=3, key_size=4, value_size=4, window=3, epsilon=1e-3)
    return Layer(module, config, cell, convert, lambda carry: (carry[0][0][0][0][1].window, carry[0][0][1].s))


def mamba2():
    config = peer("transformers.models.mamba2.configuration_mamba2").Mamba2Config(
        hidden_size=D, expand=4, num_heads=4, head_dim=D, n_groups=2, state_size=3, num_hidden_layers=2, chunk_size=16
    )
    module = peer("transformers.models.mamba2.modeling_mamba2").Mamba2Mixer(config, 0)
    values, keys = 4 * D, 6
    order = np.r_[values + keys : values + 2 * keys, values : values + keys, :values]  # of theirs, x, B, C

    def convert(weights):
        z, read, step = jnp.split(weights["in_proj.weight"], [values, 2 * (values + keys)])
        features = (linear(read[order]), convolution(weights, order), ()), linear(step)
        layer = jaxrnn.Mamba2Params(None, weights["dt_bias"], weights["A_log"], weights["D"])
        gated = (features, layer), (linear(z), ())
        return gated, jaxrnn.RMSNormParams(weights["norm.weight"]), linear(weights["out_proj.weight"])

    def read(carry):
        features, layer = carry[0][0]
        return features[0][1].window[..., np.argsort(order)], jnp.swapaxes(layer.s, -1, -2)

    return Layer(module, config, jaxrnn.mamba2_block(D, 4, 3, D, key_heads=2), convert, read)


LAYERS = {"gated delta": gated_delta, "kda": kda, "mamba2": mamba2}
every_layer = pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)


def weights_of(layer):
    shapes = {name: weight.detach().numpy() for name, weight in layer.module.named_parameters()}
    return redraw(0, shapes)


def set_weights(torch, layer, weights):
    layer.module.load_state_dict({name: torch.tensor(weight) for name, weight in weights.items()})
    return jax.tree.map(jnp.asarray, layer.convert(weights))


@every_layer
def test_a_layer(torch, build):
    layer = build()

    def theirs(weights, xs):
        return (torch.func.functional_call(layer.module, weights, xs),)

    same(
        torch,
        theirs,
        lambda weights, xs: (run(layer.cell, layer.convert(weights), None, xs)[1],),
        (weights_of(layer), draw(1, B, T, D)),
        1e-4,
    )


@pytest.mark.full
@every_layer
def test_a_layers_cache(torch, build):
    """A beginning, then a part of several steps, then steps one by one; and the state that it leaves."""
    layer = build()
    params = set_weights(torch, layer, weights_of(layer))
    xs, cache = draw(1, B, T, D), peer("transformers.cache_utils").DynamicCache(config=layer.config)
    carry = None
    for begin, end in ((0, 5), (5, 67), (67, 68), (68, 69), (69, T)):
        part = xs[:, begin:end]
        with torch.no_grad():
            expected = layer.module(torch.tensor(part, dtype=torch.float32), cache=cache)
        if end - begin > 1:
            carry, ys = run(layer.cell, params, carry, part)
        else:
            carry, y = jaxrnn.step(layer.cell, params, carry, jnp.asarray(part[:, 0]))
            ys = y[:, None]
        close(ys, expected, 1e-4)
        window, s = layer.read(carry)
        close(s, cache.get_recurrent_state(0, state_idx=0), 1e-4)
        theirs = cache.get_conv_state(0, state_idx=0)
        close(jnp.moveaxis(window, -1, -2), theirs[..., -window.shape[-2] :], 1e-4)


@every_layer
@pytest.mark.full
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_layers_padding(torch, build, side):
    """Theirs goes through padding with zeros, so that of padding at the end the last state is not to be compared."""
    layer = build()
    params = set_weights(torch, layer, weights_of(layer))
    xs, lengths = draw(1, B, T, D), np.array([T - 9, T])
    mask = np.arange(T) < lengths[:, None]
    mask = mask[:, ::-1] if side == "left" else mask
    cache = peer("transformers.cache_utils").DynamicCache(config=layer.config)
    with torch.no_grad():
        given = torch.tensor(xs, dtype=torch.float32), cache, torch.tensor(mask.copy())
        expected = layer.module(*given)
    options = {"mask": jnp.asarray(mask.T)} if side == "left" else {"lengths": jnp.asarray(lengths)}
    carry, ys = run(layer.cell, params, None, xs, **options)
    close(ys, expected * torch.tensor(mask[..., None].copy()), 1e-4)
    if side == "left":
        close(layer.read(carry)[1], cache.get_recurrent_state(0, state_idx=0), 1e-4)


def mlstm(mode):
    """xLSTM-7B's layer in transformers: (the module, our cell, convert(weights))."""
    xlstm = peer("transformers.models.xlstm.modeling_xlstm")
    config = peer("transformers.models.xlstm.configuration_xlstm").xLSTMConfig(
        hidden_size=12,
        num_heads=3,
        num_hidden_layers=1,
        chunk_size=16,
        mode=mode,
        chunkwise_kernel="chunkwise--native_autograd",
        sequence_kernel="native_sequence__native",
        step_kernel="native",
        autocast_kernel_dtype="float32",
        norm_eps=1e-3,
    )

    def convert(weights):
        read = jnp.concatenate([weights[f"{name}.weight"] for name in "qkv"]).T
        gates = [jnp.concatenate([weights[f"{g}gate_preact.{name}"] for g in "if"]) for name in ("weight", "bias")]
        branch = (
            jaxrnn.MLSTMParams(read, gates[0].T, gates[1]),
            jaxrnn.LayerNormParams(weights["multihead_norm.weight"], None),
        )
        return (branch, (linear(weights["ogate_preact.weight"]), ())), linear(weights["out_proj.weight"])

    cell = jaxrnn.mlstm_block(12, heads=3, key_size=2, value_size=4, epsilon=1e-3)
    return Layer(xlstm.xLSTMLayer(config), config, cell, convert, lambda carry: carry[0][0][0])


def test_the_mlstm_layer(torch):
    """As it trains, in chunks."""
    layer = mlstm("train")

    def theirs(weights, xs):
        return (torch.func.functional_call(layer.module, weights, xs)[0],)

    def ours(weights, xs):
        return (run(layer.cell, layer.convert(weights), None, xs)[1],)

    same(torch, theirs, ours, (weights_of(layer), draw(1, B, 64, 12)), 1e-4)


@pytest.mark.full
def test_the_mlstm_layers_state(torch):
    """As it infers."""
    layer = mlstm("inference")
    params = set_weights(torch, layer, weights_of(layer))
    xs = draw(1, B, 21, 12)
    state, carry = None, None
    for begin, end in ((0, 19), (19, 20), (20, 21)):
        part = xs[:, begin:end]
        with torch.no_grad():
            expected, state = layer.module(torch.tensor(part, dtype=torch.float32), state)
        if end - begin > 1:
            carry, ys = run(layer.cell, params, carry, part)
        else:
            carry, y = jaxrnn.step(layer.cell, params, carry, jnp.asarray(part[:, 0]))
            ys = y[:, None]
        close(ys, expected, 1e-4)
        s, m = layer.read(carry)
        for each, wanted in zip((s[..., :-1], s[..., -1], m[..., None]), state, strict=True):
            close(each, wanted, 1e-4)


def rwkv7():
    """The first block of rwkv7_hf, which begins with a normalisation: (the module, our cell, convert(weights))."""
    models = peer("rwkv7_hf.modeling_rwkv7")
    config = models.RWKV7Config(
        hidden_size=12,
        num_heads=3,
        head_dim=4,
        attention_hidden_size=12,
        intermediate_size=11,
        decay_low_rank_dim=5,
        a_low_rank_dim=5,
        gate_low_rank_dim=6,
        num_hidden_layers=2,
    )

    def convert(weights):
        def shift(name):
            return jaxrnn.TokenShiftParams(weights[name].ravel())

        def norm(name):
            return jaxrnn.LayerNormParams(weights[f"{name}.weight"], weights[f"{name}.bias"])

        def low_rank(name, *between):
            first, second = (linear(weights[f"attn.{name}_lora.lora.{k}.weight"]) for k in (0, 2))
            return shift(f"attn.x_{name}"), first, *between, second

        read = tuple((shift(f"attn.x_{name}"), linear(weights[f"attn.{name}_proj.weight"])) for name in "rkv")
        rule = jaxrnn.RWKV7Params(
            None,
            None,
            None,
            b_decay=weights["attn.w_lora.lora.2.bias"],
            b_rate=weights["attn.a_lora.lora.2.bias"],
            removal=weights["attn.k_k"],
            replacement=weights["attn.k_a"],
            bonus=weights["attn.r_k"].ravel(),
            scale=weights["attn.g_norm.weight"],
            offset=weights["attn.g_norm.bias"],
        )
        branch = (*read, low_rank("w", ()), low_rank("a")), rule
        time = norm("attn_norm"), (branch, low_rank("g", ())), linear(weights["attn.o_proj.weight"])
        key, value = (linear(weights[f"ffn.{name}.weight"]) for name in ("key", "value"))
        channel = norm("ffn_norm"), (shift("ffn.x_k"), key, ((), ()), value)
        return norm("pre_norm"), (time, channel)

    block = jaxrnn.rwkv7_block(12, heads=3, key_size=4, hidden_size=11, rank=5, gate_rank=6)
    cell = jaxrnn.Stack((jaxrnn.LayerNorm(12), block))

    def read(carry):
        time, channel = carry[1]
        return time[1][0][1].s, time[1][0][0][0][0].x, channel[1][0].x

    return Layer(models.RWKV7Block(config, 0), config, cell, convert, read)


@pytest.mark.full
def test_the_rwkv7_block(torch):
    """With padding; a second call begins with the states of the first."""
    layer = rwkv7()
    mask = np.arange(T) < np.array([T - 9, T])[:, None]

    def theirs(weights, xs):
        s, shift = torch.zeros(B, 3, 4, 4, dtype=xs.dtype), torch.zeros(B, 12, dtype=xs.dtype)
        ys, *states, _ = torch.func.functional_call(
            layer.module, weights, (xs, s, shift, shift, None, torch.tensor(mask))
        )
        rest, *states, _ = torch.func.functional_call(
            layer.module, weights, (xs[:, :3], *states, None, torch.ones(B, 3, dtype=torch.bool))
        )
        return ys, rest, *states

    def ours(weights, xs):
        params = layer.convert(weights)
        carry, ys = run(layer.cell, params, None, xs, lengths=mask.sum(1))
        rest = []
        for t in range(3):
            carry, y = jaxrnn.step(layer.cell, params, carry, xs[:, t])
            rest.append(y)
        return ys, jnp.stack(rest, 1), *layer.read(carry)

    same(torch, theirs, ours, (weights_of(layer), draw(1, B, T, 12)), 1e-4)
