"""The data side of training: every batch source, padding, windows and scaling."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrnn.training.batches import Arrays, Batch
from jaxrnn.training.ragged import Buckets, bucket, pad, unpad
from jaxrnn.training.series import Scaler, windows
from jaxrnn.training.streams import Streams

KEY = jax.random.key(3)
SEEDS = st.integers(0, 99)
property_test = settings(deadline=None, max_examples=60, derandomize=True)


def same(a, b):
    """The same trees, bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(x) is type(y) is np.ndarray
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def check_resuming(make, cut):
    """A source restored after `cut` batches goes on as one that was not interrupted, across epochs."""
    whole = make()
    epochs = [list(whole) for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == [len(whole)] * 3
    assert (whole.epoch, whole.position) == (3, 0)

    first, before = make(), []
    while len(before) < cut:
        for batch in first:
            before.append(batch)
            if len(before) == cut:
                break
    second = make()
    second.restore(json.loads(json.dumps(first.state())))
    after = [batch for _ in range(3 - second.epoch) for batch in second]
    expected = [batch for epoch in epochs for batch in epoch]
    assert len(before) + len(after) == len(expected)
    for got, want in zip([*before, *after], expected, strict=True):
        same(got, want)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(expected))


@property_test
@given(st.integers(1, 12), st.integers(1, 14), st.booleans(), st.booleans(), SEEDS, st.data())
def test_arrays_give_every_row_once_and_resume(size, batch_size, shuffle, drop_last, seed, data):
    rows = np.arange(size)
    key = jax.random.key(seed) if shuffle else None

    def make():
        tree = Batch({"a": 3 * rows[:, None], "b": jnp.asarray(rows, jnp.int32)}, rows)
        return Arrays(tree, batch_size, key=key, shuffle=shuffle, drop_last=drop_last)

    if drop_last and batch_size > size:
        with pytest.raises(ValueError, match="drop_last: no batch"):
            make()
        return
    source = make()
    for _ in range(2):
        batches = list(source)
        assert len(batches) == len(source)
        seen = np.concatenate([batch.targets for batch in batches])
        for batch in batches:
            np.testing.assert_array_equal(batch.xs["a"][:, 0], 3 * batch.targets)
            np.testing.assert_array_equal(batch.xs["b"], batch.targets)
            assert batch.lengths is None
        assert [len(batch.targets) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
        if drop_last:
            assert len(set(seen)) == len(seen) == size // batch_size * batch_size
        else:
            assert sorted(seen) == rows.tolist()
        if not shuffle:
            np.testing.assert_array_equal(seen, rows[: len(seen)])
    check_resuming(make, data.draw(st.integers(0, 3 * len(source))))


def test_the_order_follows_the_key_and_the_epoch():
    def epochs(key):
        source = Arrays(np.arange(40), 40, key=key)
        return [next(iter([*source])).tolist() for _ in range(3)]

    first = epochs(jax.random.key(0))
    assert first == epochs(jax.random.key(0)) == epochs(jax.random.PRNGKey(0))
    assert len({tuple(order) for order in first + epochs(jax.random.key(1))}) == 6
    # Known numbers: the order must not change from one release to the next, since saved states point into it.
    assert Arrays(np.arange(8), 8, key=jax.random.key(0)).plan(0)[0].tolist() == ORDER


ORDER = [3, 2, 1, 6, 0, 7, 4, 5]


def test_a_broken_loop_goes_on_and_the_last_batch_leaves_an_empty_rest():
    source = Arrays(np.arange(5), 2, shuffle=False)
    for batch in source:
        assert batch.tolist() == [0, 1]
        break
    rest = []
    for batch in source:
        rest.append(batch.tolist())
        if len(rest) == 2:
            break
    assert rest == [[2, 3], [4]]
    # A state taken after the last batch belongs to the epoch that it ends, so that what comes after an epoch is run.
    assert (source.epoch, source.position) == (0, 3)
    assert list(source) == []
    assert [batch.tolist() for batch in source] == [[0, 1], [2, 3], [4]]


def test_batches_are_copies():
    data = np.arange(4)
    for batch in Arrays(data, 2, shuffle=False):
        batch[:] = -1
    assert data.tolist() == [0, 1, 2, 3]


LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=14)


def ragged(lengths, features=2):
    """Sequences (T_i, features) whose every number occurs once, and is not 0."""
    numbers = itertools.count(1)
    return [np.array([next(numbers) for _ in range(n * features)], np.float32).reshape(n, features) for n in lengths]


@property_test
@given(LENGTHS, st.integers(0, 3), st.sampled_from([0, -1, np.nan]))
def test_unpad_inverts_pad(lengths, more, value):
    sequences = ragged(lengths)
    length = max(lengths) + more
    padded, given_lengths = pad(sequences, length=length, value=value)
    assert padded.shape == (len(lengths), length, 2)
    assert padded.dtype == np.float32
    assert given_lengths.dtype == np.int32
    assert given_lengths.tolist() == lengths
    for row, n in zip(padded, lengths, strict=True):
        np.testing.assert_array_equal(row[n:], np.full((length - n, 2), value, np.float32))
    for back in (unpad(padded, lengths), unpad(jnp.asarray(padded), jnp.asarray(given_lengths))):
        same(back, sequences)


def test_unpad_by_a_mask_keeps_any_pattern():
    mask = np.array([[False, True, True], [True, False, True], [False] * 3])
    rows = unpad(np.arange(9).reshape(3, 3), mask=mask)
    assert [row.tolist() for row in rows] == [[1, 2], [3, 5], []]


def test_padding_of_trees_lists_and_other_dtypes():
    trees = [{"token": [1, 2], "x": np.ones((2, 3), jnp.bfloat16)}, {"token": [], "x": jnp.zeros((0, 3), jnp.bfloat16)}]
    padded, lengths = pad(trees, length=3)
    assert padded["token"].tolist() == [[1, 2, 0], [0, 0, 0]]
    assert padded["x"].shape == (2, 3, 3)
    assert padded["x"].dtype == jnp.bfloat16
    assert [tree["token"].tolist() for tree in unpad(padded, lengths)] == [[1, 2], []]
    # An empty list has no dtype of its own.
    assert pad([[], [1, 2]])[0].dtype == np.asarray([1, 2]).dtype
    assert pad([np.array([True])], length=2)[0].tolist() == [[True, False]]
    assert pad([[], []])[0].shape == (2, 0)


def padding_of(lengths, boundaries):
    return sum(min(b for b in boundaries if b >= n) - n for n in lengths)


@property_test
@given(LENGTHS, st.integers(1, 5))
def test_boundaries_pad_least(lengths, number):
    source = Buckets(ragged(lengths), None, 3, shuffle=False, buckets=number)
    distinct = sorted({max(n, 1) for n in lengths})
    least = min(
        padding_of(lengths, choice)
        for k in range(1, number + 1)
        for choice in itertools.combinations(distinct, k)
        if choice[-1] == distinct[-1]
    )
    assert len(source.boundaries) <= number
    assert padding_of(lengths, source.boundaries) == least


@property_test
@given(LENGTHS, st.integers(1, 5), st.integers(1, 5), st.booleans(), st.booleans(), SEEDS, st.data())
def test_buckets_give_every_sequence_once_in_few_shapes_and_resume(
    lengths, batch_size, number, shuffle, per_step, seed, data
):
    sequences = ragged(lengths)
    targets = [row[:, 0].astype(np.int32) for row in sequences] if per_step else np.arange(len(lengths))
    key = jax.random.key(seed) if shuffle else None

    def make():
        return Buckets(sequences, targets, batch_size, key=key, shuffle=shuffle, buckets=number)

    source = make()
    for _ in range(2):
        padding, batches = source.padding, list(source)
        assert len(batches) == len(source) == -(-len(lengths) // batch_size)
        found, steps = [], 0
        for batch in batches:
            assert batch.xs.shape[1] in source.boundaries
            steps += batch.xs.shape[0] * batch.xs.shape[1]
            rows = unpad((batch.xs, batch.targets) if per_step else batch.xs, batch.lengths)
            for k, row in enumerate(rows):
                row, target = row if per_step else (row, batch.targets[k])
                if per_step:
                    assert target.tolist() == row[:, 0].tolist()
                else:
                    np.testing.assert_array_equal(row, sequences[target])
                    found.append(int(target))
                if per_step:
                    found.append(row.tobytes())
            for n, row in zip(batch.lengths, batch.xs, strict=True):
                assert not row[n:].any()
        expected = [row.tobytes() for row in sequences] if per_step else range(len(lengths))
        assert sorted(found) == sorted(expected)
        assert sum(len(batch.lengths) != batch_size for batch in batches) <= 1
        full = {batch.xs.shape for batch in batches if len(batch.lengths) == batch_size}
        assert len(full) <= len(source.boundaries) <= number
        assert padding == pytest.approx(1 - sum(lengths) / steps)
    check_resuming(make, data.draw(st.integers(0, 3 * len(source))))


def test_buckets_shuffle_rows_and_batches_and_pad_less_than_one_length():
    lengths = np.random.default_rng(0).integers(1, 60, 400).tolist()
    sequences = ragged(lengths, 1)
    source = Buckets(sequences, None, 8, key=KEY)
    orders = [[batch.xs.shape[1] for batch in source], [batch.xs.shape[1] for batch in source]]
    # In the order of the lengths there would be three changes.
    assert min(sum(a != b for a, b in itertools.pairwise(order)) for order in orders) > 20
    rows = [frozenset(rows.tolist()) for epoch in (0, 1) for rows, _ in source.plan(epoch)]
    assert len(set(rows)) > 90
    one = Buckets(sequences, None, 8, key=KEY, buckets=1)
    assert source.padding < 0.2 < 0.4 < one.padding
    assert Buckets(sequences, None, 8, key=KEY, buckets=(20, 64)).boundaries == (20, 64)


@property_test
@given(LENGTHS, st.integers(1, 5), st.integers(1, 4))
def test_bucket_says_where_each_sequence_was(lengths, batch_size, number):
    sequences = ragged(lengths)
    parts = bucket(sequences, batch_size, buckets=number)
    back = [None] * len(sequences)
    for indices, xs, part_lengths in parts:
        for index, row in zip(indices, unpad(xs, part_lengths), strict=True):
            back[index] = row
    same(back, sequences)
    widths = [part.xs.shape[1] for part in parts]
    assert widths == sorted(widths)


def test_trees_of_sequences_and_of_targets():
    sequences = [{"a": np.ones((n, 2)), "b": np.full(n, n)} for n in (3, 1, 2)]
    steps = [(np.full(n, n), np.zeros((n, 2))) for n in (3, 1, 2)]
    (batch,) = Buckets(sequences, steps, 3, shuffle=False)
    assert batch.xs["b"].tolist() == [[1, 0, 0], [2, 2, 0], [3, 3, 3]]
    assert batch.targets[0].tolist() == batch.xs["b"].tolist()
    assert batch.targets[1].shape == (3, 3, 2)
    (batch,) = Buckets(sequences, {"c": np.arange(3)}, 3, shuffle=False)
    assert batch.targets["c"].tolist() == [1, 2, 0]


@property_test
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from(["documents", "starts"]),
    st.booleans(),
    st.data(),
)
def test_streams_give_every_pair_once_and_reset_at_every_document(lengths, streams, window, how, given_targets, data):
    documents = ragged(lengths)
    outputs = [-document[:, :1] for document in documents]
    flat = np.concatenate(documents)
    if given_targets:
        pairs = [(x, y) for d, o in zip(documents, outputs, strict=True) for x, y in zip(d, o, strict=True)]
        firsts = {d[0].tobytes() for d in documents if len(d)}
    else:
        pairs = [(x, y) for d in documents for x, y in itertools.pairwise(d)]
        firsts = {d[0].tobytes() for d in documents if len(d) > 1}

    def make():
        if how == "documents":
            return Streams(documents, outputs if given_targets else None, streams=streams, window=window)
        starts = np.isin(flat[:, 0], [d[0, 0] for d in documents if len(d)])
        starts[:1] = False  # implied
        return Streams(
            flat, np.concatenate(outputs) if given_targets else None, streams=streams, window=window, starts=starts
        )

    if len(pairs) < streams:
        with pytest.raises(ValueError, match="streams: expected at most the number of pairs"):
            make()
        return
    source = make()
    for _ in range(2):
        batches = list(source)
        assert len(batches) == len(source)
        found = []
        for r in range(streams):
            # A row, window after window, is one stretch of pairs.
            xs = np.concatenate([batch.xs[r] for batch in batches])
            targets = np.concatenate([batch.targets[r] for batch in batches])
            mask = np.concatenate([batch.mask[r] for batch in batches])
            reset = np.concatenate([batch.reset[r] for batch in batches])
            assert (np.diff(mask.astype(int)) <= 0).all()
            assert not xs[~mask].any()
            assert not targets[~mask].any()
            assert [bool(r) for r in reset] == [
                bool(t == 0 or (valid and x.tobytes() in firsts))
                for t, (x, valid) in enumerate(zip(xs, mask, strict=True))
            ]
            found += list(zip(xs[mask], targets[mask], strict=True))
            assert abs(mask.sum() - len(pairs) / streams) < 1
        assert all(batch.xs.shape == (streams, window, 2) and batch.lengths is None for batch in batches)
        assert len(found) == len(pairs)
        for (x, y), (want_x, want_y) in zip(found, pairs, strict=True):
            np.testing.assert_array_equal(x, want_x)
            np.testing.assert_array_equal(y, want_y)
        assert batches[-1].mask.any()
    check_resuming(make, data.draw(st.integers(0, 3 * len(source))))


def test_one_stream_of_a_tree():
    tokens = np.arange(8, dtype=np.int8)
    batches = list(Streams((tokens, {"x": jnp.arange(8.0)}), streams=1, window=4))
    assert [batch.xs[0].tolist() for batch in batches] == [[[0, 1, 2, 3]], [[4, 5, 6, 0]]]
    assert batches[1].targets[1]["x"].tolist() == [[5.0, 6.0, 7.0, 0.0]]
    assert batches[1].targets[0].dtype == np.int8
    assert [batch.reset.tolist() for batch in batches] == [[[True, False, False, False]], [[False] * 4]]
    assert tokens.tolist() == list(range(8))


@property_test
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.sampled_from([(), (2,), (2, 3)]))
def test_windows_are_a_plain_loop(steps, length, horizon, stride, features):
    series = np.arange(steps * int(np.prod(features)), dtype=np.float32).reshape(steps, *features)
    if steps < length + horizon:
        with pytest.raises(ValueError, match=rf"at least length \+ horizon = {length + horizon} steps"):
            windows(series, length, horizon, stride=stride)
        return
    starts = range(0, steps - length - horizon + 1, stride)
    xs, targets = windows(series, length, horizon, stride=stride)
    same(np.array(xs), np.stack([series[n : n + length] for n in starts]))
    same(np.array(targets), np.stack([series[n + length : n + length + horizon] for n in starts]))
    assert np.shares_memory(xs, series)
    assert not xs.flags.writeable
    (batch,) = Arrays((xs, targets), len(starts), shuffle=False)
    same(batch, (np.array(xs), np.array(targets)))


@property_test
@given(SEEDS, st.sampled_from([(), (3,), (3, 4)]), st.booleans(), st.sampled_from(["float32", "float64", "bfloat16"]))
def test_scaler_standardizes_and_inverts(seed, leading, gaps, dtype):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(*leading, 30, 2)) * [1e-3, 50] + [7, -300]).astype(dtype)
    if gaps:
        x = np.where(rng.random(x.shape) < 0.2, np.nan, x.astype(np.float64)).astype(dtype)
    scaler = Scaler.fit(x)
    exact = x.astype(np.float64)
    axes = tuple(range(x.ndim - 1))
    wide = dtype if dtype == "float64" else "float32"
    assert scaler.mean.dtype == scaler.scale.dtype == wide
    np.testing.assert_allclose(scaler.mean, np.nanmean(exact, axes), rtol=1e-6)
    deviation = np.nanstd(exact, axes)
    np.testing.assert_allclose(scaler.scale, np.where(deviation > 0, deviation, 1), rtol=1e-6)
    z = scaler.transform(x)
    assert z.dtype == x.dtype
    if dtype == "float64":
        np.testing.assert_allclose(np.nanstd(z, axes), 1, rtol=1e-6)
        np.testing.assert_allclose(np.nanmean(z, axes), 0, atol=1e-6)
    np.testing.assert_allclose(scaler.inverse(z).astype(float), exact, rtol=0.02 if dtype == "bfloat16" else 1e-5)
    np.testing.assert_allclose(scaler.inverse_scale(np.ones(2)), scaler.scale)


def test_scaler_of_constant_tiny_and_flat_series():
    scaler = Scaler.fit(np.stack([np.full(7, 0.1), np.arange(7.0)], 1))
    assert scaler.scale.tolist() == [1.0, 2.0]
    assert Scaler.fit(np.array([0.0, 1e-300, 0.0])).scale == 1.0
    flat = Scaler.fit(np.array([1, 3]))
    assert (flat.mean, flat.scale) == (2.0, 1.0)
    assert flat.mean.dtype == np.float64
    assert flat.transform(np.array([1, 3])).tolist() == [-1.0, 1.0]
    # Constants of the training part alone are constant.
    assert Scaler.fit(np.array([[2.0, np.nan], [2.0, 5.0]])).transform(np.array([[3.0, 5.0]])).tolist() == [[1.0, 0.0]]
    value = json.loads(json.dumps([a.tolist() for a in scaler]))
    same(Scaler(*map(np.asarray, value)), scaler)


def test_scaler_in_jit_keeps_the_dtype():
    scaler = Scaler.fit(np.array([[1.0, 2.0], [3.0, 8.0]]))
    inverse = jax.jit(lambda scaler, z: scaler.inverse(z))(scaler, jnp.ones((1, 2), jnp.bfloat16))
    assert inverse.dtype == jnp.bfloat16
    assert inverse.astype(float).tolist() == [[3.0, 8.0]]


SEQUENCES = [np.ones((n, 2), np.float32) for n in (3, 1)]


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: Arrays((np.zeros(3), {"a": np.zeros(4)}), 2, key=KEY), ValueError, r"data\[1\]\['a'\]: expected"),
        (lambda: Arrays(Batch(np.zeros(3), 1.0), 2, key=KEY), ValueError, r"data.targets: expected a leading axis"),
        (lambda: Arrays((), 2, key=KEY), ValueError, "data: expected at least one array"),
        (lambda: Arrays(np.zeros((0, 3)), 2, key=KEY), ValueError, "data: expected at least one row"),
        (lambda: Arrays(["a"], 2, key=KEY), TypeError, "data: expected an array of numbers, got list: \\['a'\\]"),
        (
            lambda: Arrays((SEQUENCES, np.ones(2)), 2, key=KEY),
            TypeError,
            r"(?s)data\[0\]: .*; sequences of different lengths are",
        ),
        (lambda: Arrays(jax.random.split(KEY), 2, key=KEY), TypeError, "data: expected an array of numbers"),
        (lambda: Arrays(np.zeros(3), 0, key=KEY), ValueError, "batch_size: expected at least 1, got 0"),
        (lambda: Arrays(np.zeros(3), 2.0, key=KEY), TypeError, "batch_size: expected an integer, got 2.0"),
        (lambda: Arrays(np.zeros(3), 2), ValueError, "key: shuffle=True needs a jax.random key"),
        (lambda: Arrays(np.zeros(3), 2, key=3), TypeError, "key: expected a jax.random key, got int"),
        (lambda: Arrays(np.zeros(3), 2, key=jax.random.split(KEY)), ValueError, "key: expected a single"),
        (lambda: Arrays(np.zeros(3), 4, key=KEY, drop_last=True), ValueError, "drop_last: no batch of 4 in 3 rows"),
        (lambda: pad([]), ValueError, "sequences: expected a list of at least one sequence"),
        (lambda: pad(np.zeros((2, 3))), ValueError, "sequences: expected a list of at least one sequence, got ndarray"),
        (lambda: pad([1, 2]), ValueError, r"sequences\[0\]: expected one entry per step"),
        (lambda: pad([*SEQUENCES, np.ones((2, 3))]), ValueError, r"sequences\[2\]: expected float32 \(T, 2\) like"),
        (lambda: pad([[1.5], [2]]), ValueError, r"sequences\[1\]: expected float64 \(T, \) like .* got int64"),
        (lambda: pad([(SEQUENCES[0],), SEQUENCES[0]]), ValueError, r"sequences\[1\]: expected a sequence like"),
        (lambda: pad([{"a": [1], "b": [1, 2]}]), ValueError, r"sequences\[0\]\['b'\]: expected one entry per step"),
        (lambda: pad(["ab"]), TypeError, r"sequences\[0\]: expected an array of numbers"),
        (lambda: pad(SEQUENCES, length=2), ValueError, r"length: expected at least 3, the length of sequences\[0\]"),
        (lambda: pad([[1]], value=0.5), ValueError, "value: expected one of int64, got 0.5"),
        (lambda: pad([[1]], value=np.nan), ValueError, "value: expected one of int64, got nan"),
        (lambda: unpad(np.zeros((2, 3)), [1, 4]), ValueError, "lengths: expected 0 to 3, got 1 to 4"),
        (lambda: unpad(np.zeros((2, 3)), [-1, 2]), ValueError, "lengths: expected 0 to 3, got -1 to 2"),
        (lambda: unpad(np.zeros((2, 3))), ValueError, "lengths: expected integers, or a mask"),
        (
            lambda: unpad(np.zeros((2, 3)), mask=np.ones((2, 2), bool)),
            ValueError,
            r"mask: expected bool of shape \(2, 3",
        ),
        (lambda: unpad(np.zeros((2, 3)), mask=np.ones((2, 3))), ValueError, "mask: expected bool .* got float64"),
        (
            lambda: unpad((np.zeros((2, 3)), np.zeros((2, 4))), [1, 1]),
            ValueError,
            r"padded\[1\]: expected .* the same T",
        ),
        (lambda: unpad(np.zeros((2, 3)), [1.0, 2.0]), ValueError, "lengths: expected integers of shape"),
        (lambda: unpad(np.zeros((2, 3)), [1]), ValueError, r"lengths: expected integers of shape \(2,\)"),
        (lambda: unpad(np.zeros(2), [0, 0]), ValueError, "padded: expected"),
        (lambda: Buckets(SEQUENCES, [1, 2], 2, key=KEY), ValueError, "targets: a list holds an array per sequence"),
        (lambda: Buckets(SEQUENCES, [[1]], 2, key=KEY), ValueError, "targets: expected 2, one per sequence, got 1"),
        (lambda: Buckets(SEQUENCES, np.ones(3), 2, key=KEY), ValueError, "targets: expected 2, one per sequence"),
        (
            lambda: Buckets(SEQUENCES, [[1, 2, 3], [1, 2]], 2, key=KEY),
            ValueError,
            r"targets\[1\]: expected one per step",
        ),
        (lambda: Buckets(SEQUENCES, None, 2), ValueError, "key: shuffle=True needs"),
        (lambda: Buckets(SEQUENCES, None, 2, key=KEY, buckets=0), ValueError, "buckets: expected at least 1"),
        (lambda: Buckets(SEQUENCES, None, 2, key=KEY, buckets=(3, 3)), ValueError, "buckets: expected ascending"),
        (lambda: Buckets(SEQUENCES, None, 2, key=KEY, buckets=()), ValueError, "buckets: expected ascending"),
        (
            lambda: Buckets(SEQUENCES, None, 2, key=KEY, buckets=(1, 2)),
            ValueError,
            "buckets: expected a last length of",
        ),
        (
            lambda: Buckets(SEQUENCES, None, 2, key=KEY, buckets=(0, 3)),
            ValueError,
            r"buckets\[0\]: expected at least 1",
        ),
        (lambda: Streams(np.zeros(4), streams=4, window=2), ValueError, "streams: expected at most .* 3, got 4"),
        (lambda: Streams(np.zeros(4), np.zeros(3), streams=1, window=2), ValueError, "got 3 steps"),
        (lambda: Streams([[1, 2]], np.zeros(2), streams=1, window=2), ValueError, "targets: expected one per step"),
        (lambda: Streams([[1], [2]], [[1, 2]], streams=1, window=2), ValueError, "2 documents of 2 steps, got 1 doc"),
        (lambda: Streams([[1, 2]], streams=1, window=2, starts=[True]), ValueError, "starts: expected None"),
        (lambda: Streams(np.zeros(4), streams=1, window=2, starts=np.zeros(4)), ValueError, "starts: expected bool"),
        (lambda: Streams(np.zeros(4), streams=1, window=0), ValueError, "window: expected at least 1"),
        (lambda: windows(np.zeros(3), 2, 0), ValueError, "horizon: expected at least 1"),
        (lambda: windows(np.float32(1), 2, 1), ValueError, "series: expected at least"),
        (
            lambda: Scaler.fit(np.array([[1.0, np.nan]])),
            ValueError,
            "series: expected a finite number of every feature",
        ),
        (lambda: Scaler.fit(np.array([1.0, np.inf])), ValueError, "series: expected a finite number of every feature"),
        (lambda: Scaler.fit(np.zeros((0, 2))), ValueError, "series: expected a finite number of every feature"),
        (lambda: Scaler.fit(np.float32(3)), ValueError, "series: expected real numbers"),
    ],
)
def test_errors(build, error, words):
    with pytest.raises(error, match=words):
        build()


def test_a_state_of_another_source_is_refused():
    state = Arrays(np.zeros(5), 2, key=KEY).state()
    for source, words in [
        (Arrays(np.zeros(6), 2, key=KEY), "state: size is 5, and that of this source is 6"),
        (Arrays(np.zeros(5), 3, key=KEY), "state: batch_size is 2"),
        (Arrays(np.zeros(5), 2, key=jax.random.key(0)), "state: key is"),
        (Arrays(np.zeros(5), 2, shuffle=False), "state: key is"),
    ]:
        with pytest.raises(ValueError, match=words):
            source.restore(state)
    source = Arrays(np.zeros(5), 2, key=KEY)
    for wrong in [None, {}, state | {"more": 1}]:
        with pytest.raises(ValueError, match="state: expected a state of Arrays"):
            source.restore(wrong)
    for wrong in [{"position": 4}, {"position": -1}, {"epoch": -1}, {"epoch": "1"}]:
        with pytest.raises(ValueError, match="state: no position"):
            source.restore(state | wrong)
    assert source.state() == state
