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


# Whole layers, with their weights carried over by hand.


class Layer(NamedTuple):
    """module: theirs, for which `config` makes a cache. cell and convert(weights): ours, and its params. read(carry): the
    window of the convolution and the state in our carry.
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


LAYERS = {"gated delta": gated_delta}
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
