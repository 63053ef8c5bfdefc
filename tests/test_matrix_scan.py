"""jaxrnn.matrix_scan: every implementation against a loop in NumPy, in float64; derivatives, bounds, and errors."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import in_full

import jaxrnn
from jaxrnn.engines.cpu import library

X64 = True

NATIVE = [] if library.absent() else ["native"]
OPTIONS = ("log_decay", "beta", "u", "w", "mask", "reset")


def oracle(q, k, v, s0=None, *, log_decay=None, beta=None, u=None, w=None, mask=None, reset=None, reverse=False):
    """One step after the other, row by row of the batch, as the equations say it."""
    length, *batch, size = v.shape
    keys = k.shape[-1]
    whole = functools.partial(np.broadcast_to, shape=(length, *batch, keys))
    q, k = whole(q), whole(k)
    if u is not None:
        u, w = whole(u), whole(w)
    if log_decay is not None:
        log_decay = log_decay if log_decay.ndim == v.ndim else log_decay[..., None]
        log_decay = np.broadcast_to(log_decay, (length, *batch, keys))
    if beta is not None:
        beta = np.broadcast_to(beta, (length, *batch))
    last = np.zeros((*batch, keys, size)) if s0 is None else np.array(s0, np.float64)
    ys = np.zeros(v.shape)
    for row in np.ndindex(*batch):
        state, begin = last[row], False
        steps = range(length)
        for t in reversed(steps) if reverse else steps:
            at = (t, *row)
            valid = mask is None or mask[at[: mask.ndim]]
            starts = reset is not None and reset[at[: reset.ndim]]
            if not valid:
                continue
            if begin or (starts and not reverse):
                state = np.zeros((keys, size))
            begin = starts and reverse  # in reverse, the step before the boundary begins
            decayed = state if log_decay is None else np.exp(log_decay[at])[:, None] * state
            if beta is not None:
                new = decayed + np.outer(k[at], beta[at] * (v[at] - decayed.T @ k[at]))
            else:
                new = decayed + np.outer(k[at], v[at])
                if u is not None:
                    new = new + np.outer(u[at], state.T @ w[at])
            state = new
            ys[at] = state.T @ q[at]
        last[row] = state
    return last, ys


def draw(length, batch, keys, size, *, decay=None, update="add", shared=False, flags=False, seed=0):
    """The arrays of a call, in float64. Decays go from nearly 1 to exp(−50), β from 0 to 2."""
    rng = np.random.default_rng(seed)
    of_keys = (length, *batch[:-1], 1) if shared else (length, *batch)

    def unit(shape):
        x = rng.normal(size=(*shape, keys))
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    given = {"q": rng.normal(size=(*of_keys, keys)), "k": unit(of_keys), "v": rng.normal(size=(length, *batch, size))}
    given["s0"] = rng.normal(size=(*batch, keys, size))
    if decay:
        given["log_decay"] = -np.exp(rng.uniform(-6, 3.9, (length, *batch, *((keys,) if decay == "rows" else ()))))
    if update == "delta":
        given["beta"] = rng.uniform(0, 2, (length, *batch))
    if update == "low rank":
        given["u"] = unit(of_keys) * rng.uniform(0, 1, (*of_keys, 1))
        given["w"] = -unit(of_keys)
    if flags:
        given["mask"] = rng.random((length, *batch[: len(batch) - (flags == "rows")])) < 0.8
        given["reset"] = rng.random(given["mask"].shape) < 0.2
    return given


def cast(given, dtype):
    return {name: jnp.asarray(x, None if x.dtype == bool else dtype) for name, x in given.items()}


def run(given, **options):
    return jaxrnn.matrix_scan(**given, **options)


KINDS = list(itertools.product((None, "one", "rows"), ("add", "delta", "low rank")))
SIZES = [(0, (2,), 3, 4), (1, (), 5, 2), (7, (2, 3), 4, 6), (64, (3,), 17, 3), (65, (2, 1), 3, 19), (40, (0, 2), 3, 2)]


@pytest.mark.parametrize("implementation", [*NATIVE, *in_full(["chunked", "xla", None])])
@pytest.mark.parametrize(
    ("decay", "update"),
    [kind if kind in KINDS[4:5] else pytest.param(*kind, marks=pytest.mark.full) for kind in KINDS],
)
def test_the_loop_in_numpy(implementation, decay, update):
    for k, (sizes, reverse) in enumerate(itertools.product(SIZES, (False, True))):
        flags = (False, "rows", True)[k % 3] if len(sizes[1]) > 1 else k % 2 == 0
        given = draw(*sizes, decay=decay, update=update, flags=flags, shared=k % 4 == 1 and bool(sizes[1]), seed=k)
        last, ys = oracle(**given, reverse=reverse)
        for dtype in (jnp.float32, jnp.float64):
            found = run(cast(given, dtype), reverse=reverse, implementation=implementation)
            bound = (1e-10 if dtype == jnp.float64 else 2e-5) * max(1, np.abs(last).max(initial=0))
            np.testing.assert_allclose(found[0], last, rtol=0, atol=bound)
            np.testing.assert_allclose(found[1], ys, rtol=0, atol=bound)
            assert found[1].dtype == dtype


@pytest.mark.full
@pytest.mark.parametrize("implementation", ["xla", "chunked", *NATIVE])
@pytest.mark.parametrize(("decay", "update"), KINDS)
def test_a_thousand_steps(implementation, decay, update):
    given = draw(1000, (2,), 20, 33, decay=decay, update=update, flags=False)
    last, ys = oracle(**given)
    found = run(cast(given, jnp.float32), implementation=implementation)
    bound = 1e-4 * max(np.abs(ys).max(), np.abs(last).max())
    np.testing.assert_allclose(found[0], last, rtol=0, atol=bound)
    np.testing.assert_allclose(found[1], ys, rtol=0, atol=bound)


def loss(given, fixed, **options):
    last, ys = run(given | fixed, **options)
    return jnp.sin(ys).sum() + jnp.cos(last).sum()


def halves(given):
    """What derivatives are taken of, and the rest."""
    fixed = {name: given.pop(name) for name in ("mask", "reset") if name in given}
    return given, fixed


@pytest.mark.parametrize("implementation", [*NATIVE, *in_full(["chunked", None])])
@pytest.mark.parametrize(
    ("decay", "update"),
    [kind if kind in KINDS[8:] else pytest.param(*kind, marks=pytest.mark.full) for kind in KINDS],
)
@pytest.mark.parametrize("flags", [False, pytest.param("rows", marks=pytest.mark.full)])
def test_gradients_are_those_of_the_loop(implementation, decay, update, flags):
    """Of everything; the loop itself, in float64, is differentiated by JAX."""
    for k, (length, batch, keys, size) in enumerate([(1, (2,), 3, 5), (35, (2, 2), 18, 21), (70, (1, 2), 4, 3)]):
        given = draw(
            length,
            batch,
            keys,
            size,
            decay=decay,
            update=update,
            flags=flags if len(batch) > 1 else bool(flags),
            shared=k == 1,
            seed=k,
        )
        wide, fixed = halves(cast(given, jnp.float64))
        gradient = functools.partial(jax.grad(loss), reverse=k == 1)
        expected = gradient(wide, fixed, implementation="xla")
        for dtype in (jnp.float32, jnp.float64):
            if implementation == "chunked" and dtype == jnp.float32:
                continue
            found = gradient(cast(wide, dtype), fixed, implementation=implementation)
            for name, want in expected.items():
                bound = (1e-10 if dtype == jnp.float64 else 1e-4) * max(np.abs(want).max(), 1e-3)
                np.testing.assert_allclose(found[name], want, rtol=0, atol=bound, err_msg=name)


@pytest.mark.full
@pytest.mark.parametrize(("decay", "update"), [("one", "delta"), ("rows", "low rank")])
def test_every_derivative(decay, update):
    """Forward mode, reverse of reverse, forward of reverse: the kernels' as the loop's."""
    given = draw(9, (2, 2), 4, 3, decay=decay, update=update, flags="rows")
    moving, fixed = halves(cast(given, jnp.float32))
    rng = np.random.default_rng(1)
    moved = {name: jnp.asarray(rng.normal(size=x.shape), x.dtype) for name, x in moving.items()}

    def derivatives(implementation):
        f = functools.partial(loss, fixed=fixed, implementation=implementation)
        along = jax.jvp(f, (moving,), (moved,))[1]
        twice = jax.grad(
            lambda x: sum(jnp.vdot(g, m) for g, m in zip(*map(jax.tree.leaves, (jax.grad(f)(x), moved)), strict=True))
        )
        hessian = jax.jvp(jax.grad(f), (moving,), (moved,))[1]
        return along, twice(moving), hessian

    for found, wanted in zip(jax.tree.leaves(derivatives(None)), jax.tree.leaves(derivatives("xla")), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-4 * max(np.abs(wanted).max(), 1))


@pytest.mark.full
@pytest.mark.parametrize("implementation", ["chunked", *NATIVE])
def test_vmap_over_anything(implementation):
    given = cast(draw(6, (3, 2), 4, 5, decay="rows", update="delta", flags="rows"), jnp.float32)
    for chosen in (["v"], ["s0", "log_decay"], ["reset", "q"], list(given)):
        axes = {name: 1 if name in chosen and name != "s0" else 0 if name in chosen else None for name in given}
        several = {
            name: jnp.stack([x, x[::-1]], 0 if name == "s0" else 1) if name in chosen else x
            for name, x in given.items()
        }

        def value(each, implementation=implementation):
            moving, fixed = halves(dict(each))
            return run(each, implementation=implementation), jax.grad(loss)(
                moving, fixed, implementation=implementation
            )

        found = jax.vmap(value, in_axes=(axes,))(several)
        for member in range(2):
            one = {
                name: jnp.take(x, member, 0 if name == "s0" else 1) if name in chosen else x
                for name, x in several.items()
            }
            jax.tree.map(
                lambda all_, own, member=member: np.testing.assert_allclose(all_[member], own, rtol=1e-4, atol=1e-4),
                found,
                value(one),
            )


@pytest.mark.parametrize("implementation", [pytest.param("xla", marks=pytest.mark.full), "chunked", *NATIVE])
@pytest.mark.parametrize("decay", [pytest.param("one", marks=pytest.mark.full), "rows"])
def test_strong_decay_is_exact_and_finite(implementation, decay):
    """After a decay of exp(−50) or of 0 nothing is left of what was before, and what follows keeps its digits."""
    given = draw(64, (1,), 3, 2, decay=decay, update="delta")
    given["log_decay"] = np.full_like(given["log_decay"], -1e-3)
    given["log_decay"][::3] = -50
    given["log_decay"][7] = -np.inf
    wide, _ = halves(cast(given, jnp.float64))
    last, ys = oracle(**given)
    arrays = cast(wide, jnp.float32)
    found = run(arrays, implementation=implementation)
    np.testing.assert_allclose(found[1], ys, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[0], last, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(loss)(arrays, {}, implementation=implementation)
    assert all(np.isfinite(x).all() for name, x in gradient.items() if name != "log_decay" or implementation != "xla")


def test_bfloat16_sums_in_float32():
    given = draw(200, (2,), 16, 16, decay="one", update="delta")
    half = cast(given, jnp.bfloat16)
    last, ys = run(half)
    assert (last.dtype, ys.dtype) == (jnp.float32, jnp.bfloat16)
    exact = oracle(**{name: np.asarray(x, np.float64) for name, x in half.items()})
    np.testing.assert_allclose(last, exact[0], rtol=0, atol=1e-4 * np.abs(exact[0]).max())
    np.testing.assert_allclose(np.asarray(ys, np.float64), exact[1], rtol=0, atol=5e-3 * np.abs(exact[1]).max())


def test_padding_is_inert():
    given = cast(draw(8, (3,), 4, 5, decay="rows", update="low rank"), jnp.float32)
    mask = jnp.arange(8)[:, None] < jnp.array([[8, 3, 0]])
    spoiled = {
        n: x if n == "s0" else jnp.where(mask.reshape(8, 3, *[1] * (x.ndim - 2)), x, jnp.nan) for n, x in given.items()
    }
    for implementation in ("xla", "chunked", None):
        found, clean = (run(each, mask=mask, implementation=implementation) for each in (spoiled, given))
        jax.tree.map(np.testing.assert_array_equal, found, clean)
        np.testing.assert_array_equal(found[0][2], given["s0"][2])


def test_time_axis():
    given = cast(draw(6, (2, 3), 4, 5, decay="one", update="delta", flags="rows"), jnp.float32)
    moved = {name: x if name == "s0" else jnp.moveaxis(x, 0, 1) for name, x in given.items()}
    last, ys = run(moved, time_axis=1)
    wanted = run(given)
    np.testing.assert_array_equal(last, wanted[0])
    np.testing.assert_array_equal(jnp.moveaxis(ys, 1, 0), wanted[1])


def arrays(**changes):
    given = {"q": jnp.ones((5, 2, 3)), "k": jnp.ones((5, 2, 3)), "v": jnp.ones((5, 2, 4))}
    return given | changes


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"q": jnp.ones((5, 2, 4))}, ValueError, r"q: expected shape \(5, 2, 3\)"),
        ({"k": jnp.ones((5, 3, 3))}, ValueError, r"k: expected shape \(5, 2, 3\)"),
        ({"q": jnp.ones((5, 2, 3), int)}, TypeError, "q: expected floating numbers, got int"),
        ({"v": jnp.ones((5, 2, 4), complex)}, TypeError, "v: expected floating numbers, got complex"),
        ({"u": jnp.ones((5, 2, 3))}, ValueError, "w: expected beside u, got None"),
        ({"w": jnp.ones((5, 2, 3))}, ValueError, "u: expected beside w, got None"),
        (
            {"u": jnp.ones((5, 2, 3)), "w": jnp.ones((5, 2, 3)), "beta": jnp.ones((5, 2))},
            ValueError,
            "beta: expected beta or u and w, got both",
        ),
        ({"log_decay": jnp.ones((5, 2))}, ValueError, "log_decay: expected at most 0, got 1.0"),
        ({"log_decay": -jnp.ones((5, 3))}, ValueError, r"log_decay: expected shape \(5, 2\) or \(5, 2, 3\)"),
        ({"beta": jnp.ones((5, 2, 3))}, ValueError, r"beta: expected shape \(5, 2\)"),
        ({"s0": jnp.ones((2, 4, 3))}, ValueError, r"s0: expected shape \(2, 3, 4\), got \(2, 4, 3\)"),
        ({"mask": jnp.ones((5, 2))}, TypeError, "mask: expected bool"),
        ({"reset": jnp.ones((2, 5), bool)}, ValueError, r"reset: expected leading axes of v, \(5, 2, 4\)"),
        ({"time_axis": 2}, ValueError, "time_axis: expected an axis before the last of v"),
        ({"implementation": "fast"}, ValueError, "implementation: expected one of"),
        ({"implementation": "associative"}, ValueError, "matrix_scan cannot run 'matrix_scan' as 'associative'"),
    ],
)
def test_what_does_not_fit_raises(changes, error, words):
    with pytest.raises(error, match=words):
        run(arrays(**changes))


@pytest.mark.skipif(bool(library.absent()), reason="needs the compiled kernels")
def test_the_kernel_takes_one_dtype():
    mixed = {name: x.astype(jnp.float64 if name == "q" else jnp.float32) for name, x in arrays().items()}
    with pytest.raises(ValueError, match="the kernels compute in float32 or in float64, not in float32 and float64"):
        run(mixed, implementation="native")
