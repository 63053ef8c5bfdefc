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
    TIME,
    TYPICAL,
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


def _wide(leaf):
    return np.asarray(leaf, np.complex128 if np.iscomplexobj(leaf) else np.float64)


def close(actual, expected, tolerance=1e-9):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == e.shape, jax.tree_util.keystr(path)
        np.testing.assert_allclose(
            _wide(a),
            _wide(e),
            tolerance,
            tolerance,
            err_msg=jax.tree_util.keystr(path),
        )


def arrays(tree):
    """In NumPy, where JAX would compile every operation for every shape."""
    return jax.tree.map(np.asarray, tree)


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


@every_member()
@pytest.mark.parametrize("reverse", [False, True])
def test_scan_is_the_loop_of_steps(cell, reverse):
    """Lengths, masks with holes, resets, both directions: the numbers of one sequence and one step at a time."""
    if reverse and cell not in [MEMBERS[name] for name in TYPICAL]:
        pytest.skip("the direction is that of the typical members")
    params, carry, xs = arguments(cell)
    run = jitted_scan(cell, reverse)
    for valid, reset in [(ALL, NONE), (BY_LENGTH, NONE), (HOLES, RESETS), (ALL, RESETS)]:
        close(run(params, carry, xs, valid, reset, None), reference(cell, params, carry, xs, valid, reset, reverse))


@some_members("lstm", "embed", "classifier", "two_inputs")
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


@some_members("lstm", "gru", "own", "zoneout_stack")
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
    """Two batch axes, and time behind them."""
    params, carry, xs = arguments(cell)
    expected_carry, expected = jitted_scan(cell)(params, carry, xs, HOLES, RESETS, None)

    def doubled(x):
        """(T, B, ...) as (B, 2, T, ...): the rows in reverse order beside themselves."""
        return np.moveaxis(np.stack([x[:, ::-1], x], 2), 0, 2)

    carry_2 = jax.tree.map(lambda leaf: np.stack([leaf[::-1], leaf], 1), carry)
    run = jitted_scan(cell, time_axis=2)
    out_carry, ys = arrays(run(params, carry_2, jax.tree.map(doubled, xs), doubled(HOLES), doubled(RESETS), None))
    ys = ys if cell.ends_time else jax.tree.map(lambda y: np.moveaxis(y, 2, 0), ys)
    at = 1 if cell.ends_time else 2
    close(jax.tree.map(lambda leaf: leaf[:, 1], out_carry), expected_carry)
    close(jax.tree.map(lambda leaf: leaf[::-1, 0], out_carry), expected_carry)
    close(jax.tree.map(lambda y: np.asarray(y).take(1, at), ys), expected)


@every_member()
def test_vmap_is_batch(cell):
    """vmap over rows inside vmap over params: the same as the batch, and as one by one."""
    params, carry, xs = arguments(cell)
    scan = jitted_scan(cell)
    many = [params, draw_params(cell, 11)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *many)
    rows = jax.vmap(scan, in_axes=(None, 0, 1, 1, 1, None), out_axes=(0, 0 if cell.ends_time else 1))
    members = jax.jit(jax.vmap(rows, in_axes=(0, None, None, None, None, None), axis_size=2))
    got = arrays(members(stacked, carry, xs, HOLES, RESETS, None))
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


@functools.cache
def jitted_gradient(cell):
    """(point, xs without its floating part) -> the loss and its gradient, with remat."""
    xs = arguments(cell)[2]
    return jax.jit(jax.value_and_grad(loss_of(cell, xs, reverse=not streams(cell), remat_every=4), allow_int=True))


@some_members("lstm_projection_peephole", "rg_lru", "everything")
def test_gradients_are_finite_differences(cell):
    """The gradient of params, carry and xs together, through masks, resets and remat; forward mode agrees."""
    point, xs = differentiable(cell)
    run = jitted_gradient(cell)
    direction, small = direction_like(point, 5), 1e-5
    ahead, behind, (_, gradient) = (arrays(run(move(point, direction, by))) for by in (small, -small, 0))
    slope, backward = (ahead[0] - behind[0]) / (2 * small), dot(gradient, direction)
    np.testing.assert_allclose(backward, slope, 1e-5, 1e-7)
    value = loss_of(cell, xs, reverse=not streams(cell))
    forward = jax.jit(lambda point: jax.jvp(value, (point,), (direction,))[1])(point)
    np.testing.assert_allclose(backward, forward, 1e-9, 1e-11)


def dot(a, b):
    """The derivative in direction b, of a gradient a: of complex numbers, the real part of their product."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum((x * y).sum().real for x, y in pairs if is_floating(x))


@some_members("lstm")
def test_second_order(cell):
    """The Hessian's product with a vector in all four orders of modes, against finite differences of the gradient."""
    point, xs = differentiable(cell)
    value = loss_of(cell, xs)
    direction, other = direction_like(point, 5), direction_like(point, 6)

    def slope(point):
        return jax.jvp(value, (point,), (direction,))[1]

    def inner(point):
        return dot(jax.grad(value, allow_int=True)(point), direction)

    @jax.jit
    def run(point):
        ahead = [jax.jvp(each, (point,), (other,))[1] for each in (slope, inner)]
        back = [dot(jax.grad(each, allow_int=True)(point), other) for each in (slope, inner)]
        return slope(point), ahead + back

    small = 1e-5
    ahead, behind, (_, products) = (arrays(run(move(point, other, by))) for by in (small, -small, 0))
    expected = (ahead[0] - behind[0]) / (2 * small)
    np.testing.assert_allclose(products[0], expected, 1e-5, 1e-6)
    np.testing.assert_allclose(products[1:], products[0], 1e-8, 1e-10)


@some_members("everything")
def test_remat_changes_nothing(cell):
    """With noise, `remat_every` changes no value and no gradient. Other numbers of steps: see test_time."""
    point, xs = differentiable(cell)
    key = jax.random.key(7)

    def run(every):
        return jax.value_and_grad(loss_of(cell, xs, key=key, remat_every=every), allow_int=True)(point)

    plain, *others = jax.jit(lambda: [run(every) for every in (None, 4)])()
    for each in others:
        close(floats(each), floats(plain))


@some_members("lstm", "gru", "mgu", "s5", "rg_lru", "conv_lstm_1d", "embed", "linear", "layer_norm", "everything")
@pytest.mark.parametrize(
    "dtype",
    [jnp.bfloat16, *(pytest.param(dtype, marks=pytest.mark.full) for dtype in (jnp.float16, jnp.float32, jnp.float64))],
)
def test_dtypes(cell, dtype):
    """y has the dtype of x (of the params for tokens), a given carry keeps its own, and the numbers are near."""
    params = draw_params(cell, dtype=dtype)
    xs = draw_x(cell, 3, TIME, BATCH, dtype=dtype)
    carry, ys = arrays(jitted_scan(cell)(params, None, xs, HOLES, RESETS, None))
    put_out = ys.y if isinstance(cell, jaxrnn.EmitCarry) else ys
    assert {leaf.dtype for leaf in jax.tree.leaves(put_out)} == {jnp.dtype(dtype)}
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    assert all(jnp.finfo(leaf.dtype).dtype == wide for leaf in jax.tree.leaves(carry) if is_floating(leaf))
    real = lambda leaf: is_floating(leaf) and not jnp.iscomplexobj(leaf)
    given = jax.tree.map(lambda leaf: leaf.astype(dtype) if real(leaf) else leaf, carry)
    kept, _ = jitted_scan(cell)(params, given, xs, HOLES, RESETS, None)
    assert [leaf.dtype for leaf in jax.tree.leaves(kept)] == [leaf.dtype for leaf in jax.tree.leaves(given)]
    widen = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf, float) if real(leaf) else leaf, tree)
    fresh = jax.tree.map(np.asarray, jax.jit(lambda params: cell.initial_carry(params, (BATCH,)))(widen(params)))
    expected = jitted_scan(cell)(widen(params), fresh, widen(xs), HOLES, RESETS, None)[1]
    for got, want in zip(jax.tree.leaves(ys), jax.tree.leaves(expected), strict=True):
        bound = 60 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.asarray(got, np.float64), want, bound, bound)


@some_members("lstm", "gru", "mgu", "indrnn", "conv_lstm_1d", "linear", "layer_norm")
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
    point, _ = differentiable(cell)
    params, carry, floating = point
    run = jitted_gradient(cell)
    expected = run(point)
    for value in (np.nan, np.inf):
        close(floats(run((params, carry, [poisoned(x, ~HOLES, value) for x in floating]))), floats(expected))


@every_member()
def test_nothing_crosses_a_reset(cell):
    """One of two sequences in a row is NaN: nothing of it in the other."""
    nothing_crosses(cell, reverse=False)


@some_members("lstm", "gru", "own", "bidirectional", "zoneout", "everything")
def test_nothing_crosses_a_reset_in_reverse(cell):
    """The same from the last step to the first."""
    nothing_crosses(cell, reverse=True)


def nothing_crosses(cell, reverse):
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

    clean_gradient, clean = arrays(run(floating))
    for bad in (second, ~second):
        keep = slice(None, at) if bad is second else slice(at, None)
        gradient, ys = arrays(run([poisoned(x, bad) for x in floating]))
        close(jax.tree.map(lambda leaf: leaf[keep], ys), jax.tree.map(lambda leaf: leaf[keep], clean))
        close([g[keep] for g in gradient], [g[keep] for g in clean_gradient])


@every_member()
@pytest.mark.parametrize(("length", "batch"), [(0, BATCH), (TIME, 0), (1, 1)])
def test_odd_sizes(cell, length, batch):
    """T = 0, B = 0 and T = 1, with masks, resets, noise and remat."""
    params = draw_params(cell)
    carry, xs = draw_carry(cell, params, batch), draw_x(cell, 3, length, batch)
    flags = np.ones((length, batch), bool)
    run = jitted_scan(cell, remat_every=4, keyed=True)
    end, ys = run(params, carry, xs, flags, flags, jax.random.key(0))
    leading = (batch,) if cell.ends_time else (length, batch)
    assert all(leaf.shape[: len(leading)] == leading for leaf in jax.tree.leaves(ys))
    assert jax.tree.map(np.shape, end) == jax.tree.map(np.shape, carry)
    if length == 0:
        close(end, carry)


@some_members("everything")
@pytest.mark.parametrize(("length", "batch"), [(0, BATCH), (TIME, 0), (1, 1)])
def test_gradients_at_odd_sizes(cell, length, batch):
    """T = 0, B = 0 and T = 1: finite gradients."""
    params = draw_params(cell)
    carry, xs = draw_carry(cell, params, batch), draw_x(cell, 3, length, batch)
    flags = np.ones((length, batch), bool)

    def loss(params, carry):
        return weighted_sum(jaxrnn.scan(cell, params, carry, xs, mask=flags, reset=flags, remat_every=4))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))(params, carry)
    assert all(np.isfinite(leaf).all() for leaf in floats(gradient))


@some_members("dropout_sequence", "zoneout_stack", "everything")
def test_noise_is_a_value(cell):
    """With a key: scan is the loop of steps with the same noise, in both directions; the same key, the same numbers."""
    params, carry, xs = arguments(cell)
    key = jax.random.key(8)
    noise = cell.noise(key, TIME, (BATCH,))
    without = jitted_scan(cell)(params, carry, xs, HOLES, RESETS, None)
    run = jitted_scan(cell, keyed=True)
    got = run(params, carry, xs, HOLES, RESETS, key)
    if not jax.tree.leaves(noise):
        close(got, without, 0)
        return
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(without), strict=True))
    close(got, reference(cell, params, carry, xs, HOLES, RESETS, False, noise))
    close(run(params, carry, xs, HOLES, RESETS, key), got, 0)
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


@every_member_and_option()
def test_an_equal_cell_does_not_retrace(cell):
    """A cell is an ordinary argument of `jit`; a rebuilt equal one finds the compiled program."""
    traces = []

    @jax.jit
    def run(cell, x):
        traces.append(cell)
        return x + 1

    rebuilt = cell if "<" in repr(cell) else pickle.loads(pickle.dumps(cell))
    for each in (cell, jax.tree.unflatten(jax.tree.structure(cell), []), rebuilt):
        run(each, 1.0)
    assert traces == [cell]


@every_member_and_option()
def test_parts_put_together_are_the_cell(cell):
    """By code that knows no composition."""
    params = draw_params(cell)

    def again(cell, params):
        parts = []
        for part in cell.parts(params):
            inside, inner = again(part.cell, part.params)
            parts.append(part._replace(cell=inside, params=inner))
        return cell.with_parts(params, parts)

    found, arrays = again(cell, params)
    assert found == cell
    assert jax.tree.map(id, arrays) == jax.tree.map(id, params)
    assert cell.parts(params) or not (hasattr(cell, "cell") or hasattr(cell, "cells"))


@every_member_and_option()
def test_params_can_be_trained(cell):
    """All of them are floating numbers, whatever the carry holds."""
    params = jax.eval_shape(cell.init, jax.random.key(0))
    assert all(is_floating(leaf) for leaf in jax.tree.leaves(params))


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
    """Every engine call of a cell is explained; an implementation that it has not raises and says why."""
    params, _, xs = arguments(cell)
    calls = jaxrnn.explain(cell, params, None, xs).calls
    for call in calls:
        without_kernel = "chunked" if call.engine == "matrix_scan" else "xla"
        assert call.implementation == (without_kernel if "native" in call.refused else "native")
    jax.eval_shape(lambda: jaxrnn.scan(cell, params, None, xs, implementation={"linear_scan": "chunked"}))
    for name in {"native", "associative"}.intersection(*(call.refused for call in calls)) if calls else ():
        with pytest.raises(ValueError, match=rf"implementation: .*{name}.*supported here"):
            jaxrnn.scan(cell, params, None, xs, implementation=name)
    if not any("native" in call.refused for call in calls):
        jax.eval_shape(lambda: jaxrnn.scan(cell, params, None, xs, implementation="native"))
