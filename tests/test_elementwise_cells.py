"""Linear cells by the kernel that computes their products and gates: as their own loop in float64, with every
derivative.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import mostly_in_full

import jaxrnn
from jaxrnn.engines.cpu import library
from jaxrnn.engines.product import dot

X64 = True

kernel_needed = pytest.mark.skipif(library.absent() is not None, reason="there is no kernel")

# Units that fill no block of the kernel, and several blocks.
CELLS = {
    "min_gru": jaxrnn.MinGRU(3, 37),
    "min_gru signed": jaxrnn.MinGRU(3, 5, positive=False),
    "min_lstm": jaxrnn.MinLSTM(3, 5),
    "min_lstm signed": jaxrnn.MinLSTM(3, 37, positive=False),
    "min_gru logs": jaxrnn.MinGRU(3, 37, log_space=True),
    "min_lstm logs": jaxrnn.MinLSTM(3, 5, log_space=True),
    "hgrn": jaxrnn.HGRN(3, 33, lower_bound=0.3),
    "sru": jaxrnn.SRU(17, 17),
    "sru tanh": jaxrnn.SRU(37, 37, "tanh"),
    "sru skip": jaxrnn.SRU(70, 5),
    "sru tanh skip": jaxrnn.SRU(3, 37, "tanh"),
    "qrnn": jaxrnn.QRNN(3, 37, window=3),
    "rg_lru": jaxrnn.RGLRU(66, blocks=3),
    "lru": jaxrnn.LRU(3, 37),
    "s5": jaxrnn.S5(5, 33, discretization="bilinear"),
}
some = pytest.mark.parametrize("name", mostly_in_full(list(CELLS), "sru tanh", "s5"))


def draw(name, length, batch, flags=True):
    """A layer with a learned start, its params, a carry and xs in float64, and flags."""
    rng, layer = np.random.default_rng(length), jaxrnn.LearnedCarry(CELLS[name])
    params = layer.init(jax.random.key(0), jnp.float64)

    def moved(x):
        if x.dtype == bool:
            return x
        turn = 1 + 0.3j if jnp.iscomplexobj(x) else 1
        return np.asarray(x) + 0.5 * turn * rng.normal(size=x.shape)

    params = jax.tree.map(moved, params)
    carry = jax.tree.map(moved, layer.initial_carry(params, batch))
    xs = rng.normal(size=(length, *batch, CELLS[name].input_size))
    drawn = {"mask": rng.random((length, *batch)) < 0.7, "reset": rng.random((length, *batch)) < 0.2}
    return layer, (params, carry, xs), drawn if flags else {}


def single(tree):
    def one(x):
        return x if x.dtype == bool else jnp.asarray(x, jnp.complex64 if jnp.iscomplexobj(x) else jnp.float32)

    return jax.tree.map(one, tree)


def numbers(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if leaf.dtype not in (bool, jax.dtypes.float0)]


def close(found, wanted, bound):
    for one, other in zip(numbers(found), numbers(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=bound * max(1, np.abs(other).max(initial=0)))


def loss(layer, params, carry, xs, **options):
    carry, ys = jaxrnn.scan(layer, params, carry, xs, **options)
    return jnp.sin(ys).sum() + sum(jnp.cos(leaf).real.sum() for leaf in numbers(carry))


def run(layer, arrays, implementation, **options):
    """The last carry, ys, and all gradients."""
    own = functools.partial(loss, layer, implementation=implementation, **options)
    gradient = jax.jit(jax.grad(own, (0, 1, 2), allow_int=True))(*arrays)
    return jaxrnn.scan(layer, *arrays, implementation=implementation, **options), gradient


@kernel_needed
@some
@pytest.mark.parametrize("reverse", [False, True])
def test_values_and_gradients_are_those_of_the_loop(name, reverse):
    for length, batch, flags in ((1, (), True), (7, (2, 3), False), (70, (3,), True)):
        layer, arrays, drawn = draw(name, length, batch, flags)
        wanted = run(layer, arrays, "xla", reverse=reverse, **drawn)
        close(run(layer, single(arrays), "native", reverse=reverse, **drawn), wanted, 1e-4)
        close(run(layer, arrays, "native", reverse=reverse, **drawn), wanted, 1e-11)


@kernel_needed
@pytest.mark.parametrize("name", mostly_in_full(list(CELLS), "min_gru"))
def test_higher_derivatives_and_members(name):
    layer, arrays, drawn = draw(name, 9, (2,))
    carry = single(arrays[1])

    def derivatives(params, xs, implementation, cast=lambda x: x):
        def own(params, xs):
            return loss(layer, params, cast(carry), xs, implementation=implementation, **drawn)

        moved = jax.tree.map(lambda x: jnp.cos(x) if x.dtype != bool else np.zeros(x.shape, jax.dtypes.float0), params)
        forward = jax.jvp(functools.partial(own, xs=xs), (params,), (moved,))
        back = jax.grad(lambda xs: (jax.grad(own, allow_int=True)(params, xs).cell.w_x ** 2).sum())(xs)
        return forward, back

    def wide(tree):
        double = {jnp.dtype(jnp.float32): jnp.float64, jnp.dtype(jnp.complex64): jnp.complex128}
        return jax.tree.map(lambda x: x if x.dtype == bool else x.astype(double[x.dtype]), tree)

    wanted = derivatives(arrays[0], arrays[2], "xla", wide)
    found = derivatives(*single((arrays[0], arrays[2])), "native")
    close(found, wanted, 2e-3)
    several = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), single((arrays[0].cell, arrays[2])))

    def member(params, xs):
        return jax.value_and_grad(lambda *arrays: loss(layer.cell, arrays[0], None, arrays[1]), (0, 1))(params, xs)

    every = jax.vmap(member)(*several)
    for k in range(2):
        close(jax.tree.map(lambda x, k=k: x[k], every), member(*jax.tree.map(lambda x, k=k: x[k], several)), 1e-5)


@kernel_needed
@some
def test_padding_is_inert_and_the_kernel_is_what_runs(name):
    layer, arrays, _ = draw(name, 6, (3,))
    params, carry, xs = single(arrays)
    mask = np.arange(6)[:, None] < np.array([[6, 2, 0]])
    spoiled = jnp.where(mask[..., None], xs, jnp.nan)
    both = [run(layer, (params, carry, each), "native", mask=mask) for each in (xs, spoiled)]
    jax.tree.map(np.testing.assert_array_equal, *map(numbers, both))
    program = jax.jit(lambda xs: jaxrnn.scan(layer, params, None, xs)[1]).trace(xs)
    assert "jaxrnn_elementwise_forward" in program.lower(lowering_platforms=("cpu",)).as_text()
    assert "jaxrnn_elementwise" not in program.lower(lowering_platforms=("cuda",)).as_text()
    (call,) = jaxrnn.explain(layer, params, None, xs, platform="cpu").calls
    assert (call.engine, call.implementation) == ("linear_scan", "native")


@pytest.mark.parametrize("shape", [(4,), (2, 4), (3, 2, 4), (0, 2, 4)])
def test_the_product_has_all_derivatives_of_a_matmul(shape):
    rng = np.random.default_rng(0)
    x, w, d_x, d_w = (rng.normal(size=size) for size in (shape, (4, 5), shape, (4, 5)))

    def derivatives(product):
        def own(x, w):
            return jnp.sin(product(x, w)).sum()

        tangent = jax.jvp(product, (x, w), (d_x, d_w))
        second = jax.jvp(jax.grad(own, (0, 1)), (x, w), (d_x, d_w))
        third = jax.grad(lambda x, w: sum((g**2).sum() for g in jax.grad(own, (0, 1))(x, w)), (0, 1))(x, w)
        members = [
            jax.vmap(jax.grad(own, (0, 1)), axes)(
                jnp.stack([x, 2 * x], axes[0]) if axes[0] is not None else x,
                jnp.stack([w, -w], axes[1]) if axes[1] is not None else w,
            )
            for axes in ((0, None), (len(shape), None), (None, 1), (0, 0))
        ]
        return tangent, second, third, members

    for one, other in zip(*map(jax.tree.leaves, map(derivatives, (dot, jnp.matmul))), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_cotangents_of_a_product_have_the_dtypes_of_its_arrays(dtype):
    x, w = jnp.ones((3, 2, 4), dtype), jnp.ones((4, 5), dtype)
    assert dot(x, w).dtype == jnp.float32
    assert [each.dtype for each in jax.grad(lambda x, w: dot(x, w).sum(), (0, 1))(x, w)] == [dtype, dtype]
