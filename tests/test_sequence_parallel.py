"""Time divided over four devices: the engines give what one device gives, and no device holds the sequence."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from members import MEMBERS, draw_params, draw_x, floats

import jaxrnn

X64 = True
STEPS, ROWS, SIZE = 32, 3, 5


FEW = ["qrnn", "s6"]
DIVIDED = [name for name, cell in MEMBERS.items() if cell.time_divides]


def full(cases):
    return [pytest.param(case, marks=pytest.mark.full) for case in cases]


def over_time(function, arrays, shared=()):
    """`function(arrays, shared)` by four devices, each with its part of the arrays' first axis: (last, sequence)."""
    mesh = jax.make_mesh((4,), ("time",), axis_types=(AxisType.Auto,))
    specs = PartitionSpec("time"), PartitionSpec()
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs[::-1])(arrays, shared)


def flags(case, rng, steps=STEPS):
    """Masks with holes of whole parts, and boundaries on the edges of parts."""
    mask, reset = rng.random((steps, ROWS)) > 0.3, rng.random((steps, ROWS)) > 0.9
    mask[steps // 4 : steps // 2, 0] = False
    reset[:: steps // 4, 1] = True
    reset[steps // 4 + 1, 2], mask[steps // 4, 2] = True, False
    return {name: each for name, each in (("mask", mask), ("reset", reset)) if name in case}


def numbers(rng, *shape, complex=False):
    x = rng.normal(size=shape)
    return x + 1j * rng.normal(size=shape) if complex else x


def agree(run, arrays, shared):
    """Values and gradients, those of the shared arrays summed over devices."""

    def loss(function, arrays, shared):
        numbers = [part for each in function(arrays, shared) for part in (each.real, each.imag)]
        return sum(jnp.sum(jnp.sin(each) * jnp.linspace(1, 2, each.size).reshape(each.shape)) for each in numbers)

    moving = {name: each for name, each in arrays.items() if each.dtype != bool}
    fixed = {name: each for name, each in arrays.items() if each.dtype == bool}
    found, expected = (
        jax.jit(jax.value_and_grad(lambda moving, shared: loss(each, moving | fixed, shared), (0, 1)))(moving, shared)
        for each in (lambda *given: over_time(functools.partial(run, axis_name="time"), *given), run)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, 1e-9, 1e-9 * np.abs(b).max())


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", [("mask", "reset"), *full([(), ("mask",), ("reset",)])])
@pytest.mark.parametrize("complex", [True, *full([False])])
def test_linear_scan(case, reverse, complex):
    rng = np.random.default_rng(0)
    a, b = (numbers(rng, STEPS, ROWS, SIZE, complex=complex) for _ in range(2))
    arrays = {"a": a / (1 + abs(a)), "b": b, **flags(case, rng)}
    h0 = numbers(rng, ROWS, SIZE, complex=complex)

    def run(arrays, h0, axis_name=None):
        options = {name: arrays[name] for name in case}
        return jaxrnn.linear_scan(arrays["a"], arrays["b"], h0, reverse=reverse, axis_name=axis_name, **options)

    agree(run, arrays, h0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", [("mask", "reset"), *full([()])])
@pytest.mark.parametrize("rule", ["delta", *full(["none", "decay", "vector", "low rank"])])
def test_matrix_scan(case, reverse, rule):
    rng, keys, values = np.random.default_rng(0), 4, 5
    shape = STEPS, ROWS, 2
    arrays = {name: numbers(rng, *shape, size) / 2 for name, size in (("q", keys), ("k", keys), ("v", values))}
    arrays |= flags(case, rng)
    if rule in ("decay", "delta"):
        arrays["log_decay"] = -rng.random(shape)
    if rule in ("vector", "low rank"):
        arrays["log_decay"] = -rng.random((*shape, keys))
    if rule == "delta":
        arrays["beta"] = rng.random(shape)
    if rule == "low rank":
        arrays |= {name: numbers(rng, *shape, keys) / 2 for name in "uw"}

    def run(arrays, s0, axis_name=None):
        options = {name: each for name, each in arrays.items() if name not in ("q", "k", "v")}
        q, k, v = (arrays[name] for name in "qkv")
        return jaxrnn.matrix_scan(q, k, v, s0, reverse=reverse, axis_name=axis_name, **options)

    agree(run, arrays, numbers(rng, ROWS, 2, keys, values))


@pytest.mark.parametrize("implementation", [None, *full(["xla", "associative"])])
def test_a_long_sequence(implementation):
    """65,536 steps; only states are exchanged, and what is not finite does not cross a boundary."""
    rng, steps = np.random.default_rng(0), 65_536
    a, b = 1 - 1e-3 * rng.random((steps, 2)), rng.normal(size=(steps, 2))
    b[steps // 2 - 7] = np.nan
    reset = np.zeros(steps, bool)
    reset[steps // 2] = True

    def run(arrays, h0, axis_name=None):
        options = {"implementation": implementation, "axis_name": axis_name}
        return jaxrnn.linear_scan(*arrays[:2], h0, reset=arrays[2], **options)

    given = (jnp.asarray(a), jnp.asarray(b), jnp.asarray(reset)), jnp.ones(2)
    divided = (
        jax.jit(lambda *given: over_time(functools.partial(run, axis_name="time"), *given)).lower(*given).compile()
    )
    for found, expected in zip(divided(*given), run(*given), strict=True):
        np.testing.assert_allclose(found, expected, 1e-9)
    exchanged = [line for line in divided.as_text().splitlines() if re.search(r"all-\w+(-start)?\(", line)]
    assert exchanged
    assert not any(str(steps // 4) in re.split(r" all-", line)[0] for line in exchanged)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", [*FEW, *full(name for name in DIVIDED if name not in FEW)])
def test_cells(name, reverse):
    """The final carry, ys and gradients of one device, with lengths, masks with holes, and resets on edges of parts."""
    cell, rng = MEMBERS[name], np.random.default_rng(0)
    if reverse and not cell.causal:
        pytest.skip("it has its own directions")
    params, xs = (jax.tree.map(jnp.asarray, each) for each in (draw_params(cell), draw_x(cell, 3, STEPS, ROWS)))
    arrays = {"xs": xs, **flags(("mask", "reset"), rng)}

    def run(arrays, params, axis_name=None):
        options = {"reverse": reverse, "axis_name": axis_name}
        whole = jaxrnn.scan(cell, params, None, arrays["xs"], mask=arrays["mask"], reset=arrays["reset"], **options)
        lengths = jnp.array([STEPS, STEPS // 4 + 1, 0])
        carry, ys = jaxrnn.scan(cell, params, whole[0], arrays["xs"], lengths=lengths, **options)
        return (whole[0], carry), (whole[1], ys)

    def loss(function, params, arrays):
        found = function(arrays, params)
        return sum(jnp.sum(jnp.sin(each.real) + jnp.sin(2 * each.imag)) for each in floats(found)), found

    divided = functools.partial(over_time, functools.partial(run, axis_name="time"))
    found, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, each), has_aux=True, allow_int=True))(params, arrays)
        for each in (divided, run)
    )
    for a, b in zip(floats(found), floats(expected), strict=True):
        np.testing.assert_allclose(a, b, 1e-8, 1e-8 * (1 + np.abs(b).max(initial=0)))


def test_noise_differs_among_devices():
    model = jaxrnn.Stack(jaxrnn.MinGRU(3, 4), jaxrnn.Dropout(0.5))
    params = model.init(jax.random.key(0), jnp.float64)

    def run(xs, params):
        return jaxrnn.scan(model, params, None, xs, key=jax.random.key(1), axis_name="time")

    _, ys = jax.jit(lambda *given: over_time(run, *given))(jnp.ones((STEPS, ROWS, 3)), params)
    masks = (ys != 0).reshape(4, -1)
    assert len({mask.tobytes() for mask in np.asarray(masks)}) == 4


def test_refusals():
    cell = jaxrnn.GRU(3, 4)
    with pytest.raises(ValueError, match="axis_name: expected a cell that is linear in its state"):
        jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((8, 3)), axis_name="time")
    with pytest.raises(
        ValueError, match=r"axis_name: expected an axis of the `jax\.shard_map` around this call, got 'time'"
    ):
        jaxrnn.linear_scan(0.5, jnp.ones(4), axis_name="time")
