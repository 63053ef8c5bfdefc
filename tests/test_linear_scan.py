"""The linear recurrence: against loops in NumPy, in every implementation, and under every transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import in_full, mostly_in_full

import jaxrnn
from jaxrnn.engines.cpu import library as native

X64 = True
NATIVE = ["native"] if native.absent() is None else []
NAMES = [None, *NATIVE, "xla", "associative", "chunked"]
T, B, N = 9, 4, 3

every_form = pytest.mark.parametrize("name", NAMES)


def draw(name, seed, *shape, complex_=False):
    """In float64, or for the kernel in float32."""
    rng = np.random.default_rng(seed)
    drawn = rng.normal(size=shape)
    return drawn + 1j * rng.normal(size=shape) if complex_ else drawn.astype(np.float32 if name in NATIVE else float)


def flags(seed, *shape):
    rng = np.random.default_rng(seed)
    return rng.random(shape) < 0.7, rng.random(shape) < 0.4


def links(valid, reset, reverse):
    """Of every step (T, B), which one came before it, -1 for the state given, -2 for none; and the last valid step."""
    steps, rows = valid.shape
    before, last = np.full(valid.shape, -2), np.full(rows, -1)
    for b in range(rows):
        for t in range(steps)[:: -1 if reverse else 1]:
            if not valid[t, b]:
                continue
            boundary = reset[last[b], b] if reverse and last[b] >= 0 else not reverse and reset[t, b]
            before[t, b] = -2 if boundary else last[b]
            last[b] = t
    return before, last


def loop(a, b, h, valid, reset, reverse):
    """(h_T, hs) for arrays (T, B, N)."""
    before, last = links(valid, reset, reverse)
    hs = np.zeros_like(b)
    for row in range(b.shape[1]):
        for t in range(b.shape[0])[:: -1 if reverse else 1]:
            if valid[t, row]:
                k = before[t, row]
                past = 0 if k == -2 else a[t, row] * (h[row] if k == -1 else hs[k, row])
                hs[t, row] = past + b[t, row]
    return np.stack([h[row] if k == -1 else hs[k, row] for row, k in enumerate(last)]), hs


def loop_back(a, b, h, valid, reset, reverse, d_last, d_hs):
    """The cotangents of a, b and h of real arrays, from those of h_T and hs."""
    before, last = links(valid, reset, reverse)
    hs = loop(a, b, h, valid, reset, reverse)[1]
    d_a, d_b, d_h = np.zeros_like(a), np.zeros_like(b), np.zeros_like(h)
    for row in range(b.shape[1]):
        g = np.where(valid[:, row, None], d_hs[:, row], 0)
        (d_h[row] if last[row] == -1 else g[last[row]])[...] += d_last[row]
        for t in range(b.shape[0])[:: 1 if reverse else -1]:
            if not valid[t, row]:
                continue
            d_b[t, row] = g[t]
            k = before[t, row]
            if k != -2:
                d_a[t, row] = g[t] * (h[row] if k == -1 else hs[k, row])
                (d_h[row] if k == -1 else g[k])[...] += a[t, row] * g[t]
    return d_a, d_b, d_h


def close(actual, expected):
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.shape == other.shape
        tolerance = 1e-4 if other.dtype == np.float32 else 1e-10
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), tolerance, tolerance)


@every_form
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("flagged", [False, True])
@pytest.mark.parametrize("shape", [(T, B, N), (1, 2, 3), *in_full([(300, 2, 1)])])
def test_values_and_gradients_are_those_of_the_loop(name, reverse, flagged, shape):
    a, b, h = draw(name, 0, *shape), draw(name, 1, *shape), draw(name, 2, *shape[1:])
    valid, reset = flags(3, *shape[:2]) if flagged else (np.ones(shape[:2], bool), np.zeros(shape[:2], bool))
    given = {"mask": valid, "reset": reset} if flagged else {}
    d_last, d_hs = draw(name, 4, *shape[1:]), draw(name, 5, *shape)

    @jax.jit
    def run(a, b, h):
        results, back = jax.vjp(
            lambda *arrays: jaxrnn.linear_scan(*arrays, reverse=reverse, implementation=name, **given), a, b, h
        )
        return results, back((d_last, d_hs))

    results, found = run(a, b, h)
    close(results, loop(a, b, h, valid, reset, reverse))
    close(found, loop_back(a, b, h, valid, reset, reverse, d_last, d_hs))


def plain(a, b, h, reverse=False):
    """As `lax.scan` differentiates it."""

    def body(h, inputs):
        a, b = inputs
        h = a * h + b
        return h, h

    return jax.lax.scan(body, h, (jnp.broadcast_to(a, b.shape), b), reverse=reverse)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NATIVE])
@pytest.mark.parametrize("kinds", [(True, True), (False, True), (True, False)])
def test_complex_numbers(name, kinds):
    a, b, h = (
        draw(name, 0, T, B, N, complex_=kinds[0]),
        draw(name, 1, T, B, N, complex_=kinds[1]),
        draw(name, 2, B, N, complex_=True),
    )
    weights = draw(name, 3, T, B, N, complex_=True)

    def loss(run, a, b, h):
        last, hs = run(a, b.astype(complex) if run is plain else b, h)
        return jnp.abs(jnp.sum(hs * weights)) + jnp.abs(jnp.sum(last))

    with jax.numpy_dtype_promotion("standard"):
        ours = jax.value_and_grad(
            functools.partial(loss, functools.partial(jaxrnn.linear_scan, implementation=name)), (0, 1, 2)
        )
        theirs = jax.value_and_grad(functools.partial(loss, plain), (0, 1, 2))
        close(jax.jit(ours)(a, b, h), jax.jit(theirs)(a, b, h))


@pytest.mark.parametrize("name", mostly_in_full(NAMES, None, "chunked"))
@pytest.mark.parametrize(
    "shape",
    [
        (B, 1),
        *in_full([(T, 1, 1), (), (N,), (1, 1, N), (1, B, 1), (1, 1, 1)]),
    ],
)
def test_a_is_broadcast(name, shape):
    a, b, h, factor = draw(name, 0, *shape), draw(name, 1, T, B, N), draw(name, 2, 1, N), draw(name, 3, T, B, N)
    valid, reset = flags(4, T, B)

    def results(a, h, given, wide):
        def loss(a, h):
            if wide:
                a, h = jnp.broadcast_to(a, b.shape), jnp.broadcast_to(h, b.shape[1:])
            last, hs = jaxrnn.linear_scan(a, b, h, implementation=name, **given)
            return jnp.sum(hs * factor) + jnp.sum(last), (last, hs)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(a, h)

    @jax.jit
    def run(a, h):
        ways = {}, {"mask": valid}, {"reset": reset, "reverse": True}
        return [[results(a, h, given, wide) for given in ways] for wide in (False, True)]

    close(*run(a, h))


def transformations(run, a, b, h, tangents):
    """All of it: forward and reverse mode, in every order of two, vmap over any argument, checkpoint."""

    def loss(run):
        def value(a, b, h):
            last, hs = run(a, b, h)
            return jnp.sum(jnp.sin(hs)) + jnp.sum(last**2)

        return value

    found = [jax.jvp(run, (a, b, h), tangents), jax.grad(jax.checkpoint(loss(run)), (0, 1, 2))(a, b, h)]
    for outer in (jax.jacfwd, jax.jacrev):
        found += [outer(inner(loss(run), (0, 1, 2)), (0, 1, 2))(a, b, h) for inner in (jax.jacfwd, jax.jacrev)]
    for axes in ((1, None, None), (None, 2, None), (None, None, 0), (0, 0, 1)):
        arrays = [
            x if axis is None else jnp.moveaxis(jnp.stack([x, 2 * x, -x, x + 1]), 0, axis)
            for x, axis in zip((a, b, h), axes, strict=True)
        ]
        for reverse in (False, True):
            one = functools.partial(run, reverse=reverse)
            found += [jax.vmap(each, axes)(*arrays) for each in (one, jax.grad(loss(one), (0, 1, 2)))]
    return found


@functools.cache
def transformed(name):
    """By an implementation, or "plain"; "plain float32" in the dtype of the kernel."""
    drawn = "native" if name == "plain float32" else name
    a, b, h = draw(drawn, 0, T, N), draw(drawn, 1, T, N), draw(drawn, 2, N)
    tangents = draw(drawn, 3, T, N), draw(drawn, 4, T, N), draw(drawn, 5, N)
    run = plain if "plain" in str(name) else functools.partial(jaxrnn.linear_scan, implementation=name)
    return jax.jit(functools.partial(transformations, run))(a, b, h, tangents)


@pytest.mark.parametrize("name", mostly_in_full(NAMES, None, "associative"))
def test_every_transformation(name):
    """As of a plain scan."""
    close(transformed(name), transformed("plain float32" if name in NATIVE else "plain"))


@every_form
def test_vmap_over_resets(name):
    a, b, h, flag = draw(name, 0, T, N), draw(name, 1, T, N), draw(name, 2, N), np.arange(T) == 4

    def run(flag):
        return jaxrnn.linear_scan(a, b, h, reset=flag, implementation=name)

    one_by_one = jax.tree.map(lambda *x: np.stack(x), *(run(each) for each in (flag, ~flag)))
    close(jax.vmap(run)(np.stack([flag, ~flag])), one_by_one)


@every_form
@pytest.mark.parametrize("reverse", [False, True])
def test_nothing_crosses_a_boundary(name, reverse):
    """NaN and infinity before it reach no number and no gradient beyond it."""
    a, b = draw(name, 0, T, N), draw(name, 1, T, N)
    h = np.full(N, np.inf, a.dtype)
    reset = np.zeros(T, bool)
    reset[4] = True
    beyond = slice(None, 4) if reverse else slice(4, None)  # what is processed after the boundary
    bad = slice(4, None) if reverse else slice(None, 4)
    spoilt = b.copy()
    spoilt[bad] = np.nan
    a_spoilt = a.copy()
    a_spoilt[3 if reverse else 4] = np.nan  # of the step that begins anew

    def run(a, b, h):
        last, hs = jaxrnn.linear_scan(a, b, h, reset=reset, reverse=reverse, implementation=name)
        return jnp.sum(hs[beyond] ** 2) + jnp.sum(last), (last, hs[beyond])

    (_, found), gradient = jax.value_and_grad(run, (0, 1, 2), has_aux=True)(a_spoilt, spoilt, h)
    (_, expected), clean = jax.value_and_grad(run, (0, 1, 2), has_aux=True)(a, b, np.zeros(N, a.dtype))
    close(found, expected)
    close((gradient[0][beyond], *gradient[1:]), (clean[0][beyond], *clean[1:]))
    assert not np.any(gradient[1][bad])
    assert not np.any(gradient[2])
    assert not np.any(gradient[0][3 if reverse else 4])


@every_form
def test_the_gradient_is_one_recurrence(name):
    """And not a derivative of the forward pass."""
    a, b, h = draw(name, 0, T, N), draw(name, 1, T, N), draw(name, 2, N)
    program = jax.make_jaxpr(
        jax.grad(lambda *arrays: jaxrnn.linear_scan(*arrays, implementation=name)[1].sum(), (0, 1, 2))
    )(a, b, h)
    assert str(program).count("jaxrnn_linear_scan[") == 2
    assert "scan[" not in str(program).replace("jaxrnn_linear_scan[", "")


@every_form
@pytest.mark.parametrize("time_axis", mostly_in_full([0, 1, 2], 1))
def test_time_axis_and_flags_of_leading_axes(name, time_axis):
    a, b, h = draw(name, 0, T, B, N), draw(name, 1, T, B, N), draw(name, 2, B, N)
    valid, reset = flags(3, T, B)
    expected = jaxrnn.linear_scan(a, b, h, mask=valid, reset=reset)
    moved = [np.moveaxis(x, 0, time_axis) for x in (a, b)]
    both = {"mask": valid, "reset": reset}
    wide = {k: np.moveaxis(np.broadcast_to(x[..., None], b.shape), 0, time_axis) for k, x in both.items()}
    last, hs = jaxrnn.linear_scan(*moved, h, time_axis=time_axis, implementation=name, **wide)
    close((last, jnp.moveaxis(hs, time_axis, 0)), expected)
    if time_axis == 1:
        narrow = {k: x.T for k, x in both.items()}
        close(jaxrnn.linear_scan(*moved, h, time_axis=1, implementation=name, **narrow), (last, hs))


@every_form
@pytest.mark.parametrize("reverse", [False, True])
def test_nothing_to_do(name, reverse):
    h = draw(name, 0, B, N)
    last, hs = jaxrnn.linear_scan(0.5, np.zeros((0, B, N), h.dtype), h, reverse=reverse, implementation=name)
    close((last, hs), (h, np.zeros((0, B, N), h.dtype)))
    last, hs = jaxrnn.linear_scan(0.5, np.zeros((T, 0, N), h.dtype), reverse=reverse, implementation=name)
    assert last.shape == (0, N)
    assert hs.shape == (T, 0, N)
    close(jaxrnn.linear_scan(2.0, np.ones((1, N), h.dtype), h[0], implementation=name), (2 * h[0] + 1, 2 * h[:1] + 1))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NATIVE])
@pytest.mark.parametrize("dtype", ["bfloat16", *in_full(["float16"])])
def test_sums_are_in_float32(name, dtype):
    """300 times 1 + 1/256 would stop at 256 in bfloat16."""
    last, hs = jaxrnn.linear_scan(jnp.ones((), dtype), jnp.full((300, 2), 1 + 2**-7, dtype), implementation=name)
    assert last.dtype == jnp.float32
    assert hs.dtype == dtype
    np.testing.assert_allclose(last, 300 * (1 + 2**-7), 1e-6)
    gradient = jax.grad(lambda b: jaxrnn.linear_scan(jnp.ones((), dtype), b, implementation=name)[0].sum())(hs)
    assert gradient.dtype == dtype
    np.testing.assert_array_equal(gradient.astype(np.float32), np.ones((300, 2)))


LONG = {
    "near 0": lambda u: 1e-3 * u,
    "near 1": lambda u: 1 - 1e-5 * u,
    "negative": lambda u: -1 + 1e-4 * u,
    "modulus 1": lambda u: np.exp(2j * np.pi * u),
    "one": np.ones_like,
}


@pytest.mark.parametrize(
    "decay", ["near 1", *(pytest.param(name, marks=pytest.mark.full) for name in LONG if name != "near 1")]
)
@pytest.mark.parametrize("name", ["associative", "chunked"])
def test_long_sequences_agree(name, decay):
    """Every implementation against the sequential one, over 65,536 steps."""
    length = 65_536
    a = LONG[decay](np.random.default_rng(0).random((length, 2)))
    b, h = draw(name, 1, length, 2).astype(a.dtype), draw(name, 2, 2).astype(a.dtype)

    def run(name):
        def loss(a, b, h):
            last, hs = jaxrnn.linear_scan(a, b, h, implementation=name)
            weights = jnp.cos(jnp.arange(length))[:, None].astype(hs.dtype)
            return jnp.real(jnp.sum(weights * hs)) + jnp.abs(last).sum(), hs

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(a, b, h)

    for one, other in zip(jax.tree.leaves(run(name)), jax.tree.leaves(run("xla")), strict=True):
        np.testing.assert_allclose(one, other, 1e-7, 1e-9 * float(np.abs(other).max()))


def test_errors_name_the_argument():
    b = np.ones((T, B, N))
    for error, match, arguments, keywords in [
        (ValueError, r"a: expected a shape that broadcasts to \(9, 4, 3\), got \(2,\)", (np.ones(2), b), {}),
        (ValueError, r"a: expected .* got \(1, 9, 4, 3\)", (np.ones((1, T, B, N)), b), {}),
        (ValueError, r"h0: expected a shape that broadcasts to \(4, 3\), got \(9, 3\)", (0.5, b, np.ones((T, N))), {}),
        (TypeError, "b: expected floating or complex numbers, got int", (1, np.ones((T, N), int)), {}),
        (TypeError, "mask: expected bool, got float64", (0.5, b), {"mask": np.ones((T, B))}),
        (
            ValueError,
            r"reset: expected leading axes of b, \(9, 4, 3\), .* got \(4,\)",
            (0.5, b),
            {"reset": np.ones(B, bool)},
        ),
        (ValueError, "reset: expected", (0.5, b), {"reset": np.ones(T, bool), "time_axis": 1}),
        (
            ValueError,
            r"time_axis: expected 0 to 2, an axis of b with shape \(9, 4, 3\), got 3",
            (0.5, b),
            {"time_axis": 3},
        ),
        (ValueError, "implementation: expected one of", (0.5, b), {"implementation": "fast"}),
        (ValueError, "linear_scan cannot run 'linear_scan' as 'native'", (0.5j, b), {"implementation": "native"}),
    ]:
        with pytest.raises(error, match=match):
            jaxrnn.linear_scan(*arguments, **keywords)


def test_each_platform_has_its_own():
    b = jnp.ones((T, N), jnp.float32)
    run = jax.jit(lambda b: jaxrnn.linear_scan(0.5, b)[1]).trace(b)
    on_cpu, elsewhere = (run.lower(lowering_platforms=(each,)).as_text() for each in ("cpu", "cuda"))
    assert ("custom_call @jaxrnn_linear_scan" if NATIVE else "stablehlo.while") in on_cpu
    assert "stablehlo.while" not in elsewhere
    assert "custom_call @jaxrnn" not in elsewhere
    named = jax.jit(lambda b: jaxrnn.linear_scan(0.5, b, implementation="xla")[1]).trace(b)
    assert "stablehlo.while" in named.lower(lowering_platforms=("cuda",)).as_text()
    cell = jaxrnn.MinGRU(2, N)
    params = cell.init(jax.random.key(0), jnp.float32)
    for platform, expected in (("cpu", "native" if NATIVE else "xla"), ("gpu", "associative")):
        (call,) = jaxrnn.explain(cell, params, None, b[:, :2], platform=platform).calls
        assert (call.engine, call.implementation) == ("linear_scan", expected)


@pytest.mark.skipif(not NATIVE, reason="no compiled kernels")
def test_what_the_kernel_refuses():
    b = np.ones((T, N), np.complex64)
    with pytest.raises(ValueError, match="the kernels compute in float32 or in float64, not in complex64"):
        jaxrnn.linear_scan(np.ones(N, b.dtype), b, implementation="native")


@pytest.mark.skipif(not NATIVE, reason="no compiled kernels")
@pytest.mark.parametrize(
    "shape",
    [
        (200, 3, 11, 16),
        (40, 1029),
        *(pytest.param(shape, marks=pytest.mark.full) for shape in [(T, 1), (T, 5, 7), (2, 70_001)]),
        pytest.param((9, 950_003), marks=pytest.mark.full),  # more than malloc keeps mapped
    ],
)
@pytest.mark.parametrize("reverse", [False, True])
def test_kernel_of_every_width(shape, reverse):
    """Columns that no vector and no cache line divides, threads, and flags of every number of axes."""
    a, b, h = draw("native", 0, *shape), draw("native", 1, *shape), draw("native", 2, *shape[1:])
    weights = draw("native", 3, *shape)
    rng = np.random.default_rng(4)
    for axes in range(1, len(shape) + 1):
        reset = rng.random(shape[:axes]) < 0.3

        def run(name, reset=reset):
            def loss(a, b, h):
                last, hs = jaxrnn.linear_scan(a, b, h, reset=reset, reverse=reverse, implementation=name)
                return jnp.sum(hs * weights) + jnp.sum(last), hs

            return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(a, b, h)

        for one, other in zip(jax.tree.leaves(run("native")), jax.tree.leaves(run("xla")), strict=True):
            np.testing.assert_allclose(one, other, 1e-3, 1e-4 * float(np.abs(other).max()))
