"""The contract: every cell and composition has every property."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from members import (
    BATCH,
    MEMBERS,
    OPTIONS,
    TIME,
    draw_carry,
    draw_params,
    draw_x,
    every_member,
    every_member_and_option,
    floats,
    is_floating,
    redraw,
    some_members,
    streams,
    weighted_sum,
)
from reference import reference

import jaxrnn

X64 = True

# Rows: whole, short, empty, holes with resets inside and in the holes, a reset at the first and at the last step.
LENGTHS = np.array([TIME, 2, 0, TIME, 4])
BY_LENGTH = np.arange(TIME)[:, None] < LENGTHS
HOLES = np.array(
    [[1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0], [1, 0, 1, 1, 0, 1], [1, 1, 0, 1, 0, 0]], bool
).T
RESETS = np.array(
    [[0, 0, 1, 1, 0, 0], [1, 0, 1, 1, 0, 1], [0, 1, 0, 1, 0, 0], [0, 1, 0, 1, 1, 0], [1, 0, 1, 0, 1, 0]], bool
).T
ALL, NONE = np.ones((TIME, BATCH), bool), np.zeros((TIME, BATCH), bool)


def close(actual, expected, tolerance=1e-9):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == e.shape, jax.tree_util.keystr(path)
        np.testing.assert_allclose(
            np.asarray(a, np.float64),
            np.asarray(e, np.float64),
            tolerance,
            tolerance,
            err_msg=jax.tree_util.keystr(path),
        )


@functools.cache
def jitted_scan(cell, reverse=False, time_axis=0, remat_every=None, keyed=False):
    def run(params, carry, xs, valid, reset, key):
        return jaxrnn.scan(
            cell,
            params,
            carry,
            xs,
            mask=valid,
            reset=reset,
            reverse=reverse,
            time_axis=time_axis,
            remat_every=remat_every,
            key=key if keyed else None,
        )

    return jax.jit(run)


def arguments(cell):
    params = draw_params(cell)
    return params, draw_carry(cell, params, BATCH), draw_x(cell, 3, TIME, BATCH)


@every_member_and_option()
@pytest.mark.parametrize("reverse", [False, True])
def test_scan_is_the_loop_of_steps(cell, reverse):
    """Lengths, masks with holes, resets, both directions: the numbers of one sequence and one step at a time."""
    if cell in OPTIONS.values() and reverse:
        pytest.skip("the direction does not depend on a cell's options")
    params, carry, xs = arguments(cell)
    run = jitted_scan(cell, reverse)
    for valid, reset in [(ALL, NONE), (BY_LENGTH, NONE), (HOLES, RESETS), (ALL, RESETS)]:
        close(run(params, carry, xs, valid, reset, None), reference(cell, params, carry, xs, valid, reset, reverse))


@every_member()
def test_lengths_are_a_mask(cell):
    """`lengths`, traced and not, is the mask of the first steps; without it all steps are valid."""
    params, carry, xs = arguments(cell)
    expected = jitted_scan(cell)(params, carry, xs, BY_LENGTH, NONE, None)
    run = jax.jit(lambda lengths: jaxrnn.scan(cell, params, carry, xs, lengths=lengths))
    close(run(LENGTHS), expected)
    close(jax.jit(lambda: jaxrnn.scan(cell, params, carry, xs, lengths=LENGTHS))(), expected)
    close(run(np.array([99, 2, -3, TIME, 4])), expected)
    whole = jitted_scan(cell)(params, carry, xs, ALL, NONE, None)
    close(jax.jit(lambda: jaxrnn.scan(cell, params, carry, xs))(), whole)


@every_member()
def test_split_is_whole(cell):
    """Cut in chunks anywhere, the carry handed on: the same numbers. In reverse the later chunk runs first."""
    if not streams(cell):
        pytest.skip("a backward cell cannot be cut")
    params, carry, xs = arguments(cell)
    first, second = (jax.tree.map(lambda x: x[a:b], xs) for a, b in ((0, 2), (2, TIME)))
    run = jitted_scan(cell)
    whole = run(params, carry, xs, HOLES, RESETS, None)
    middle, ys_1 = run(params, carry, first, HOLES[:2], RESETS[:2], None)
    end, ys_2 = run(params, middle, second, HOLES[2:], RESETS[2:], None)
    ys = ys_2 if cell.ends_time else jax.tree.map(lambda *y: np.concatenate(y), ys_1, ys_2)
    close((end, ys), whole)


@every_member()
def test_split_is_whole_in_reverse(cell):
    """In reverse, where the chunk's first valid step carries a reset, the chunk before it starts fresh."""
    if not streams(cell) or cell.ends_time:
        pytest.skip("a backward cell cannot be cut, and a pool gives its last part only")
    params, carry, xs = arguments(cell)
    reset = NONE.copy()
    reset[2] = True
    run = jitted_scan(cell, reverse=True)
    end, ys = run(params, carry, xs, ALL, reset, None)
    _, ys_2 = run(params, carry, jax.tree.map(lambda x: x[2:], xs), ALL[2:], reset[2:], None)
    fresh = jax.tree.map(lambda new, old: new.astype(old.dtype), cell.initial_carry(params, (BATCH,)), carry)
    end_1, ys_1 = run(params, fresh, jax.tree.map(lambda x: x[:2], xs), ALL[:2], reset[:2], None)
    close((end, ys), (end_1, jax.tree.map(lambda *y: np.concatenate(y), ys_1, ys_2)))


@every_member()
def test_batch_axes_and_time_axis(cell):
    """Two batch axes, none, and time at any place among them."""
    params, carry, xs = arguments(cell)
    expected_carry, expected = jitted_scan(cell)(params, carry, xs, HOLES, RESETS, None)
    xs_2 = jax.tree.map(lambda x: jnp.stack([x[:, ::-1], x], 2), xs)  # (T, B, 2, ...)
    flags = [np.stack([each[:, ::-1], each], 2) for each in (HOLES, RESETS)]
    carry_2 = jax.tree.map(lambda leaf: jnp.stack([leaf[::-1], leaf], 1), carry)
    out_carry, ys = jitted_scan(cell, time_axis=2)(
        params,
        carry_2,
        jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), xs_2),
        *(np.moveaxis(each, 0, 2) for each in flags),
        None,
    )
    ys = ys if cell.ends_time else jax.tree.map(lambda y: jnp.moveaxis(y, 2, 0), ys)
    at = 1 if cell.ends_time else 2
    close(jax.tree.map(lambda leaf: leaf[:, 1], out_carry), expected_carry)
    close(jax.tree.map(lambda leaf: leaf[::-1, 0], out_carry), expected_carry)
    close(jax.tree.map(lambda y: jnp.take(y, 1, at), ys), expected)
    row = lambda tree, axis: jax.tree.map(lambda leaf: jnp.take(leaf, 3, axis), tree)
    alone = jitted_scan(cell)(params, row(carry, 0), row(xs, 1), HOLES[:, 3], RESETS[:, 3], None)
    close(alone, (row(expected_carry, 0), row(expected, 0 if cell.ends_time else 1)))


@every_member()
def test_vmap_is_batch(cell):
    """vmap over rows, and over params: the same as the batch, and as one by one."""
    params, carry, xs = arguments(cell)
    scan = jitted_scan(cell)
    expected_carry, expected = scan(params, carry, xs, HOLES, RESETS, None)
    out = 0 if cell.ends_time else 1
    rows = jax.jit(jax.vmap(scan, in_axes=(None, 0, 1, 1, 1, None), out_axes=(0, out)))
    close(rows(params, carry, xs, HOLES, RESETS, None), (expected_carry, expected))
    many = [draw_params(cell, seed) for seed in (1, 11)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *many)
    members = jax.jit(jax.vmap(scan, in_axes=(0, None, None, None, None, None)))
    if jax.tree.leaves(stacked):
        got = members(stacked, carry, xs, HOLES, RESETS, None)
        for k, each in enumerate(many):
            close(jax.tree.map(lambda leaf, k=k: leaf[k], got), scan(each, carry, xs, HOLES, RESETS, None))


def loss_of(cell, xs, reverse=False, key=None, remat_every=None):
    """A scalar function of (params, carry, the floating part of xs)."""
    run = functools.partial(
        jaxrnn.scan, cell, mask=HOLES, reset=RESETS, reverse=reverse, key=key, remat_every=remat_every
    )

    def loss(differentiable):
        params, carry, floating = differentiable
        return weighted_sum(run(params, carry, with_floating(xs, floating)))

    return loss


def differentiable(cell):
    params, carry, xs = arguments(cell)
    return (params, carry, floats(xs)), xs


def direction_like(point, seed):
    """A random direction in the floating leaves, and the zero of a tangent elsewhere."""
    drawn = redraw(point, seed, 1.0)
    return jax.tree.map(lambda p, d: d if is_floating(p) else np.zeros(p.shape, jax.dtypes.float0), point, drawn)


def move(point, direction, by):
    return jax.tree.map(lambda p, d: p + by * d if is_floating(p) else p, point, direction)


@every_member_and_option()
def test_gradients_are_finite_differences(cell):
    """The gradient of params, carry and xs together, through masks and resets; forward mode and second order too."""
    point, xs = differentiable(cell)
    value = jax.jit(loss_of(cell, xs, reverse=not streams(cell)))
    direction, other = direction_like(point, 5), direction_like(point, 6)
    small = 1e-5
    slope = (value(move(point, direction, small)) - value(move(point, direction, -small))) / (2 * small)

    @jax.jit
    def derivatives(point):
        def along(point):
            return jax.jvp(value, (point,), (direction,))[1]

        gradient = jax.grad(value, allow_int=True)
        inner = dot(gradient(point), direction)
        return along(point), inner, jax.jvp(along, (point,), (other,))[1]

    forward, reverse, second = derivatives(point)
    np.testing.assert_allclose(forward, slope, 1e-5, 1e-7)
    np.testing.assert_allclose(reverse, forward, 1e-9, 1e-11)
    ahead, behind = (derivatives(move(point, other, by))[0] for by in (small, -small))
    np.testing.assert_allclose(second, (ahead - behind) / (2 * small), 1e-5, 1e-6)


def dot(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True) if is_floating(x))


@some_members("lstm", "gru_reset_before", "own", "everything")
def test_second_order_by_reverse_mode(cell):
    """The gradient of a gradient, and remat: the Hessian's product with a vector by three ways."""
    point, xs = differentiable(cell)
    direction = direction_like(point, 5)

    def hessian_product(value):
        def slope(point):
            return jax.jvp(value, (point,), (direction,))[1]

        def gradient_slope(point):
            return dot(jax.grad(value, allow_int=True)(point), direction)

        return [jax.grad(each, allow_int=True)(point) for each in (slope, gradient_slope)]

    plain, twice = jax.jit(lambda: hessian_product(loss_of(cell, xs)))()
    close(floats(twice), floats(plain), 1e-8)


@every_member()
def test_remat_changes_nothing(cell):
    """`remat_every`, with a key too: the same values and gradients. Other numbers of steps: see test_time."""
    point, xs = differentiable(cell)
    key = jax.random.key(7)

    def run(every):
        return jax.value_and_grad(loss_of(cell, xs, key=key, remat_every=every), allow_int=True)(point)

    plain, *others = jax.jit(lambda: [run(every) for every in (None, 4)])()
    for each in others:
        close(floats(each), floats(plain))


@every_member()
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_dtypes(cell, dtype):
    """y has the dtype of x (of the params for tokens), a given carry keeps its own, and the numbers are near."""
    params = draw_params(cell, dtype=dtype)
    exact = draw_params(cell, dtype=jnp.float64)
    xs = draw_x(cell, 3, TIME, BATCH, dtype=dtype)
    carry, ys = jitted_scan(cell)(params, None, xs, HOLES, RESETS, None)
    assert {leaf.dtype for leaf in jax.tree.leaves(ys)} == {jnp.dtype(dtype)}
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    assert all(leaf.dtype == wide for leaf in jax.tree.leaves(carry) if is_floating(leaf))
    given = jax.tree.map(lambda leaf: leaf.astype(dtype) if is_floating(leaf) else leaf, carry)
    kept, _ = jitted_scan(cell)(params, given, xs, HOLES, RESETS, None)
    assert [leaf.dtype for leaf in jax.tree.leaves(kept)] == [leaf.dtype for leaf in jax.tree.leaves(given)]
    xs_exact = jax.tree.map(lambda x: x.astype(jnp.float64) if is_floating(x) else x, xs)
    params_exact = jax.tree.map(lambda p, like: p.astype(like.dtype), params, exact)
    expected = jitted_scan(cell)(params_exact, None, xs_exact, HOLES, RESETS, None)[1]
    for got, want in zip(jax.tree.leaves(ys), jax.tree.leaves(expected), strict=True):
        bound = 60 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.asarray(got, np.float64), want, bound, bound)


@every_member()
def test_half_precision_step_is_scan(cell):
    """In bfloat16 as in float64, a step gives the bits of the scan: they are one computation."""
    if not streams(cell) or cell.ends_time:
        pytest.skip("runs whole sequences only")
    params, xs = draw_params(cell, dtype=jnp.bfloat16), draw_x(cell, 3, 3, BATCH, dtype=jnp.bfloat16)
    carry, ys = jax.jit(lambda: jaxrnn.scan(cell, params, None, xs))()
    state = None
    step = jax.jit(lambda carry, x: jaxrnn.step(cell, params, carry, x))
    for t in range(3):
        state, y = step(state, jax.tree.map(lambda x, t=t: x[t], xs))
        close(y, jax.tree.map(lambda y, t=t: y[t], ys), 1e-2)
        assert jax.tree.map(lambda leaf: leaf.dtype, y) == jax.tree.map(lambda leaf: leaf.dtype, ys)
    assert jax.tree.map(lambda leaf: leaf.dtype, state) == jax.tree.map(lambda leaf: leaf.dtype, carry)


def with_floating(xs, floating):
    """xs with its floating leaves replaced by those given."""
    leaves, structure = jax.tree.flatten(xs)
    given = iter(floating)
    return jax.tree.unflatten(structure, [next(given) if is_floating(x) else x for x in leaves])


def poisoned(x, where, value=np.nan):
    return np.where(where.reshape(where.shape + (1,) * (x.ndim - 2)), value, x)


@every_member()
def test_padding_reaches_nothing(cell):
    """NaN and infinity at invalid steps change no number and no gradient, the params' included."""
    point, xs = differentiable(cell)
    params, carry, floating = point
    run = jax.jit(jax.value_and_grad(loss_of(cell, xs), allow_int=True))
    expected = run(point)
    for value in (np.nan, np.inf):
        close(floats(run((params, carry, [poisoned(x, ~HOLES, value) for x in floating]))), floats(expected))


@every_member()
@pytest.mark.parametrize("reverse", [False, True])
def test_nothing_crosses_a_reset(cell, reverse):
    """One of two sequences in a row is NaN: the other's outputs and the gradients of its x stay finite."""
    (params, carry, floating), xs = differentiable(cell)
    if not floating or cell.ends_time:
        pytest.skip("tokens hold no NaN, and a pool sees the last sequence only")
    at = TIME // 2
    reset, second = NONE.copy(), NONE.copy()
    reset[at], second[at:] = True, True

    @jax.jit
    def run(floating):
        def loss(floating):
            _, ys = jaxrnn.scan(cell, params, carry, with_floating(xs, floating), reset=reset, reverse=reverse)
            return weighted_sum(ys), ys

        gradient, ys = jax.grad(loss, has_aux=True)(floating)
        return gradient, ys

    clean_gradient, clean = run(floating)
    for bad in (second, ~second):
        keep = slice(None, at) if bad is second else slice(at, None)
        gradient, ys = run([poisoned(x, bad) for x in floating])
        close(jax.tree.map(lambda leaf: leaf[keep], ys), jax.tree.map(lambda leaf: leaf[keep], clean))
        close([g[keep] for g in gradient], [g[keep] for g in clean_gradient])


@every_member()
@pytest.mark.parametrize(("length", "batch"), [(0, BATCH), (TIME, 0), (1, 1)])
def test_odd_sizes(cell, length, batch):
    """T = 0, B = 0 and T = 1, with lengths, resets, noise, remat and gradients."""
    params = draw_params(cell)
    carry, xs = draw_carry(cell, params, batch), draw_x(cell, 3, length, batch)
    flags = np.ones((length, batch), bool)

    @jax.jit
    def run(params):
        def loss(params):
            end, ys = jaxrnn.scan(
                cell, params, carry, xs, mask=flags, reset=flags, key=jax.random.key(0), remat_every=4
            )
            return weighted_sum((end, ys)), (end, ys)

        return jax.grad(loss, has_aux=True)(params)

    gradient, (end, ys) = run(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    leading = (batch,) if cell.ends_time else (length, batch)
    assert all(leaf.shape[: len(leading)] == leading for leaf in jax.tree.leaves(ys))
    assert jax.tree.map(np.shape, end) == jax.tree.map(np.shape, carry)
    if length == 0:
        close(end, carry)


@every_member()
def test_noise_is_a_value(cell):
    """With a key: scan is the loop of steps with the same noise, in both directions; the same key, the same numbers."""
    params, carry, xs = arguments(cell)
    key = jax.random.key(8)
    noise = cell.noise(key, TIME, (BATCH,))
    run = jitted_scan(cell, keyed=True)
    got = run(params, carry, xs, HOLES, RESETS, key)
    close(got, reference(cell, params, carry, xs, HOLES, RESETS, False, noise))
    close(run(params, carry, xs, HOLES, RESETS, key), got, 0)
    without = jitted_scan(cell)(params, carry, xs, HOLES, RESETS, None)
    noisy = any(leaf is not None for leaf in jax.tree.leaves(noise))
    same = all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(without), strict=True))
    assert noisy != same
    back = jitted_scan(cell, reverse=True, keyed=True)(params, carry, xs, HOLES, RESETS, key)
    close(back, reference(cell, params, carry, xs, HOLES, RESETS, True, noise))


@every_member_and_option()
def test_cell_is_a_value(cell):
    """repr, hash, equality, pickle, and a pytree without leaves."""
    callable_field = "<" in repr(cell)
    if not callable_field:
        names = vars(jaxrnn) | {type(each).__name__: type(each) for each in MEMBERS.values()}
        again = eval(repr(cell), names)
        assert again == cell
        assert hash(again) == hash(cell)
        assert pickle.loads(pickle.dumps(cell)) == cell
        assert again is not cell
    assert jax.tree.leaves(cell) == []
    assert jax.tree.unflatten(jax.tree.structure(cell), []) == cell
    assert [each for each in MEMBERS.values() if each == cell] == [cell]


@every_member()
def test_an_equal_cell_does_not_retrace(cell):
    """A cell is an ordinary argument of `jit`; a rebuilt equal one finds the compiled program."""
    traces = []

    @jax.jit
    def run(cell, params, xs):
        traces.append(cell)
        return jaxrnn.scan(cell, params, None, xs)

    _, _, xs = arguments(cell)
    for seed in (1, 2):
        rebuilt = (
            jax.tree.unflatten(jax.tree.structure(cell), []) if "<" in repr(cell) else pickle.loads(pickle.dumps(cell))
        )
        run(rebuilt, draw_params(cell, seed), xs)
    assert len(traces) == 1


@every_member_and_option()
def test_summary(cell):
    """The table counts the parameters that `init` makes, and names an output size where it is known."""
    params = draw_params(cell, dtype=jnp.float32)
    table = jaxrnn.summary(cell)
    assert table.count == sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(row.count for row in table.rows)
    assert table.bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert str(table.count) in str(table).replace(",", "")
    y = jax.eval_shape(lambda: jaxrnn.scan(cell, params, None, draw_x(cell, 0, 2, dtype=jnp.float32))[1])
    size = table.rows[0].output_size
    if size is not None:
        assert y.shape[0 if cell.ends_time else 1 :] == (size if isinstance(size, tuple) else (size,))


@some_members("lstm", "gru", "own", "everything")
def test_inside_a_scan_and_a_checkpoint(cell):
    """`lax.scan` around it and `jax.checkpoint` around it: the same numbers and gradients."""
    point, xs = differentiable(cell)
    value = loss_of(cell, xs)

    def through_scan(point):
        total, _ = jax.lax.scan(lambda total, _: (total + jax.checkpoint(value)(point), None), 0.0, length=2)
        return total / 2

    plain, nested = jax.jit(lambda: [jax.value_and_grad(f, allow_int=True)(point) for f in (value, through_scan)])()
    close(floats(nested), floats(plain))


@every_member()
def test_explain_names_what_runs(cell):
    """Every engine call of a cell is explained; another implementation by name raises and says why."""
    params, _, xs = arguments(cell)
    calls = jaxrnn.explain(cell, params, None, xs).calls
    assert all(call.implementation == "xla" and call.refused for call in calls)
    jaxrnn.scan(cell, params, None, xs, implementation={"linear_scan": "chunked"})
    if calls:
        with pytest.raises(ValueError, match=r"implementation: .*pallas.*supported here"):
            jaxrnn.scan(cell, params, None, xs, implementation="pallas")
    else:
        jaxrnn.scan(cell, params, None, xs, implementation="pallas")
