"""The linear cells against others' code: outputs, and the gradients of weights, inputs and initial states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conversion import peer

from jaxrnn import (
    LRU,
    CausalConvParams,
    LinearParams,
    LRUParams,
    MinGRU,
    MinGRUCarry,
    MinGRUParams,
    MinLSTM,
    MinLSTMParams,
    S6Params,
    mamba_block,
    scan,
)

X64 = True
PROMOTION = "standard"

T, B, D, H = 11, 3, 4, 5


@pytest.fixture
def torch():
    module = peer("torch")
    module.set_num_threads(1)
    module.manual_seed(0)
    return module


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def same(torch, module, run, arrays, call, convert, tolerance=1e-9):
    """ys and the gradients of their weighted sum, of all weights of `module` and of `arrays`.

    `call(*tensors)` is what the module puts out, batch first; `convert(weights)` gives our params, and
    `run(params, *arrays)` ours, time first.
    """
    weights = {name: weight.detach().numpy() for name, weight in module.named_parameters()}
    tensors = [torch.tensor(np.moveaxis(array, 0, -2), requires_grad=True) for array in arrays]
    theirs = call(*tensors)
    factors = draw(9, *theirs.shape)
    (theirs * torch.tensor(factors)).sum().backward()

    def loss(weights, *arrays):
        ys = jnp.moveaxis(run(convert(weights), *arrays), 0, 1)
        return jnp.sum(ys * factors), ys

    got = jax.jit(jax.value_and_grad(loss, tuple(range(1 + len(arrays))), has_aux=True))(weights, *arrays)
    (_, ys), (d_weights, *d_arrays) = got
    np.testing.assert_allclose(ys, theirs.detach(), tolerance, tolerance)
    for name, weight in module.named_parameters():
        if not weight.requires_grad:
            continue
        # torch has the gradient's conjugate of a complex weight.
        np.testing.assert_allclose(np.conj(d_weights[name]), weight.grad, tolerance, tolerance, err_msg=name)
    for array, tensor in zip(d_arrays, tensors, strict=True):
        np.testing.assert_allclose(array, np.moveaxis(tensor.grad.numpy(), -2, 0), tolerance, tolerance)


@pytest.mark.parametrize("log_space", [False, True])
@pytest.mark.parametrize("started", [False, True])
def test_min_gru(torch, log_space, started):
    """lucidrains' minGRU-pytorch, which runs in log space."""
    module = peer("minGRU_pytorch.minGRU").minGRU(D, H / D, proj_out=False).double()
    cell = MinGRU(D, H, log_space=log_space)

    def run(params, xs, *h):
        return scan(cell, params, MinGRUCarry(h[0][0]) if h else None, xs)[1]

    arrays = [2 * draw(0, T, B, D), *([np.abs(draw(1, 1, B, H)) + 0.1] if started else [])]
    same(
        torch,
        module,
        run,
        arrays,
        lambda xs, *h: module(xs, *h),
        lambda weights: MinGRUParams(jnp.roll(weights["to_hidden_and_gate.weight"], H, 0).T, None),
    )


@pytest.mark.parametrize("log_space", [False, True])
def test_min_lstm(torch, log_space):
    """lucidrains' minGRU-pytorch, from no state."""
    module = peer("minGRU_pytorch.minLSTM").minLSTM(D, H / D, proj_out=False).double()
    cell = MinLSTM(D, H, log_space=log_space)
    same(
        torch,
        module,
        lambda params, xs: scan(cell, params, None, xs)[1],
        [2 * draw(0, T, B, D)],
        module,
        lambda weights: MinLSTMParams(jnp.roll(weights["to_hidden_and_f_i_gate.weight"], -H, 0).T, None),
    )


@pytest.mark.parametrize(("length", "size"), [(1, D), (T, 17), (150, D)])
def test_mamba_block(torch, length, size):
    """mamba.py, which takes the exponents of Δ in float32."""
    mamba = peer("mambapy.mamba")
    module = mamba.MambaBlock(mamba.MambaConfig(size, 1, d_state=3, d_conv=3)).double()
    cell = mamba_block(size, states=3, window=3)

    def convert(weights):
        into_x, into_gate = (LinearParams(w.T, None) for w in jnp.split(weights["in_proj.weight"], 2))
        convolution = CausalConvParams(weights["conv1d.weight"][:, 0].T, weights["conv1d.bias"])
        s6 = S6Params(
            weights["x_proj.weight"].T,
            weights["dt_proj.weight"].T,
            weights["dt_proj.bias"],
            weights["A_log"],
            weights["D"],
        )
        branches = (into_x, convolution, (), s6), (into_gate, ())
        return branches, LinearParams(weights["out_proj.weight"].T, None)

    xs = draw(0, length, B, size)
    same(torch, module, lambda params, xs: scan(cell, params, None, xs)[1], [xs], module, convert, 1e-5)


def test_lru(torch):
    """LRU-pytorch, with a diagonal D, in float32."""
    module = peer("LRU_pytorch").LRU(D, D, H)
    module.D.data = torch.diag(torch.diagonal(module.D.data))
    module.D.requires_grad = False

    def convert(weights):
        gate = weights["B"].T
        out = weights["C"].T
        return LRUParams(
            weights["nu_log"],
            weights["theta_log"],
            weights["gamma_log"],
            jnp.concatenate([gate.real, gate.imag], 1),
            jnp.concatenate([out.real, -out.imag]),
            jnp.diagonal(weights["D"]),
        )

    with jax.enable_x64(False):
        xs = draw(0, T, B, D).astype(np.float32)
        cell = LRU(D, H)
        same(torch, module, lambda params, xs: scan(cell, params, None, xs)[1], [xs], module, convert, 1e-4)
