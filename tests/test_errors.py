"""Bad input: the right error, naming the argument, what was expected and what came."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn
from jaxrnn import (
    GRU,
    HGRN,
    LSTM,
    MGU,
    S4D,
    S5,
    Apply,
    Bidirectional,
    Cell,
    ConvLSTM,
    Dropout,
    Elman,
    Embed,
    EmitCarry,
    GRUCarry,
    IndRNN,
    LayerNorm,
    LearnedCarry,
    Linear,
    LSTMCarry,
    Pool,
    RecurrentDropout,
    Residual,
    Stack,
    WeightDrop,
    Zoneout,
)

CELL = GRU(2, 3)
PARAMS = CELL.init(jax.random.key(0))
XS = np.ones((5, 4, 2), np.float32)


def scan(**keywords):
    arguments = {"cell": CELL, "params": PARAMS, "carry": None, "xs": XS} | keywords
    return jaxrnn.scan(
        arguments.pop("cell"), arguments.pop("params"), arguments.pop("carry"), arguments.pop("xs"), **arguments
    )


class Unhashable(Cell):
    value: object = None

    def __init__(self, value):
        object.__setattr__(self, "value", value)

    def __post_init__(self):
        pass

    def init(self, key, dtype=jnp.float32):
        return ()

    def initial_carry(self, params, batch_shape=()):
        return ()

    def step(self, params, carry, x, noise=None):
        return carry, x


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: LSTM(0, 3), ValueError, "LSTM.input_size: expected at least 1, got 0"),
        (lambda: LSTM(2, -3), ValueError, "LSTM.hidden_size: expected at least 1, got -3"),
        (lambda: GRU(2.0, 3), TypeError, "GRU.input_size: expected an integer, got 2.0"),
        (lambda: Elman(2, True), TypeError, "Elman.hidden_size: expected an integer, got True"),
        (lambda: jaxrnn.S5(2, 3, "euler"), ValueError, "S5.discretization: expected one of"),
        (lambda: jaxrnn.S5(1, 3, timed=True), ValueError, "S5.input_size: expected at least 2 with timed"),
        (lambda: jaxrnn.S4D(2, 3, "cubic"), ValueError, "S4D.spectrum: expected one of"),
        (lambda: jaxrnn.S4D(2, 3, step_min=0.0), ValueError, "S4D.step_min: expected a positive number, got 0.0"),
        (lambda: jaxrnn.S4D(2, 3, timed=1), TypeError, "S4D.timed: expected True or False, got 1"),
        (lambda: jaxrnn.S6(2, 3, rank=0), ValueError, "S6.rank: expected at least 1, got 0"),
        (lambda: jaxrnn.S6(2, step_min=0.2), ValueError, "S6.step_min: expected at most step_max, 0.1, got 0.2"),
        (lambda: jaxrnn.QRNN(2, 3, 0), ValueError, "QRNN.window: expected at least 1, got 0"),
        (lambda: jaxrnn.CausalConv(2, 0), ValueError, "CausalConv.window: expected at least 1, got 0"),
        (lambda: jaxrnn.SRU(2, 3, "sine"), ValueError, "activation: expected one of"),
        (lambda: jaxrnn.LayerNorm(6, groups=4), ValueError, "LayerNorm.groups: expected a divisor of size 6, got 4"),
        (lambda: jaxrnn.Parallel(()), TypeError, "Parallel.cells: expected a tuple of at least one cell"),
        (lambda: jaxrnn.Parallel((GRU(2, 3), GRU(4, 3))), ValueError, r"Parallel: cells\[1\] reads size 4, not 2"),
        (
            lambda: jaxrnn.Parallel((GRU(2, 3), GRU(2, 4)), "mul"),
            ValueError,
            r"Parallel: merge 'mul' needs equal sizes, got \(3, 4\)",
        ),
        (lambda: jaxrnn.Parallel((GRU(2, 3),), "max"), ValueError, "Parallel.merge: expected one of"),
        (
            lambda: jaxrnn.Parallel((GRU(2, 3), jaxrnn.Pool(GRU(2, 3)))),
            ValueError,
            "Parallel: either all cells or none may end the time axis",
        ),
        (lambda: jaxrnn.residual_block(jaxrnn.Dropout(0.1)), ValueError, "cell: expected one whose output is a vector"),
        (lambda: LSTM(2, 3, projection_size=0), ValueError, "projection_size: expected at least 1"),
        (lambda: LSTM(2, 3, cell_clip=0.0), ValueError, "cell_clip: expected a positive number, got 0.0"),
        (lambda: LSTM(2, 3, gate_clip="x"), TypeError, "gate_clip: expected a number"),
        (lambda: GRU(2, 3, gate_clip=-1), ValueError, "gate_clip: expected a positive number"),
        (lambda: Elman(2, 3, activation="tanhh"), ValueError, "activation: expected one of .* got 'tanhh'"),
        (lambda: LSTM(2, 3, activation=("relu", 1.0)), ValueError, "relu takes 0 numbers, got 1"),
        (lambda: GRU(2, 3, activation=3), TypeError, "activation: expected a name"),
        (lambda: LSTM(2, 3, output_activation=("elu", "a")), TypeError, "activation: expected a name"),
        (lambda: ConvLSTM((4,), 2, 3, padding="same"), ValueError, "padding: expected 'SAME' or 'VALID', got 'same'"),
        (lambda: ConvLSTM((2,), 2, 3, padding="VALID"), ValueError, "smaller than the kernel"),
        (lambda: ConvLSTM((4, 4, 4, 4), 2, 3), ValueError, "one to three sizes"),
        (lambda: ConvLSTM((4, 4), 2, 3, kernel_size=(3,)), ValueError, "kernel_size: expected 2 numbers"),
        (lambda: ConvLSTM((4, 4), 2, 3, strides=0), ValueError, "strides: expected at least 1"),
        (lambda: Embed(0, 3), ValueError, "vocabulary: expected at least 1"),
        (lambda: Linear(3, 0), ValueError, "output_size: expected at least 1"),
        (lambda: LayerNorm("a"), TypeError, "size: expected an integer"),
        (lambda: LayerNorm(2, epsilon=None), TypeError, "epsilon: expected a number"),
        (lambda: LayerNorm(2, epsilon=0.0), ValueError, "epsilon: expected a positive number"),
        (lambda: Apply("nothing"), ValueError, "activation: expected one of"),
        (lambda: Dropout(1.0), ValueError, r"rate: expected a number in \[0, 1\), got 1.0"),
        (lambda: Dropout(-0.1), ValueError, "rate: expected a number in"),
        (lambda: Dropout("a"), TypeError, "rate: expected a number"),
        (lambda: Zoneout(CELL, 1.5), ValueError, r"rate: expected a number in \[0, 1\]"),
        (lambda: Zoneout(LSTM(2, 3), (0.1, 0.2, 0.3)), ValueError, "rate: expected a number or 2"),
        (lambda: RecurrentDropout(Linear(2, 3), 0.1), TypeError, "names its recurrent product"),
        (lambda: RecurrentDropout(WeightDrop(CELL, 0.1), 0.1), TypeError, "other wrappers go around RecurrentDropout"),
        (lambda: WeightDrop(Stack((CELL,)), 0.1), TypeError, "names its recurrent weights"),
        (lambda: WeightDrop(LearnedCarry(CELL), 0.1), TypeError, "names its recurrent weights"),
        (lambda: Stack(()), TypeError, "at least one cell"),
        (lambda: Stack("cells"), TypeError, r"cells\[0\]: expected a jaxrnn.Cell, got 'cells'"),
        (lambda: Stack((CELL, "gru")), TypeError, r"cells\[1\]: expected a jaxrnn.Cell, got 'gru'"),
        (lambda: Stack((GRU(2, 3), LSTM(4, 5))), ValueError, r"cells\[1\] reads size 4 and gets 3.*LSTM.*above GRU"),
        (lambda: Stack((GRU(2, 3), Dropout(0.1), Apply("tanh"), LSTM(4, 5))), ValueError, "reads size 4 and gets 3"),
        (
            lambda: Stack((GRU(2, 3), Bidirectional(GRU(3, 2), GRU(3, 2)), Linear(5, 1))),
            ValueError,
            "size 5 and gets 4",
        ),
        (lambda: Stack((ConvLSTM((4,), 2, 3), LSTM(3, 5))), ValueError, r"reads size 3 and gets \(4, 3\)"),
        (lambda: Stack((GRU(2, 3), GRU(3, 4)), skip=True), ValueError, "reads size 3 and gets 5"),
        (
            lambda: Stack((Pool(CELL), GRU(3, 4))),
            ValueError,
            r"cells\[1\]: expected one without carry, since",
        ),
        (lambda: Stack((Pool(CELL), Pool(Linear(3, 2)))), ValueError, "ends the time axis"),
        (lambda: Stack((CELL, Pool(GRU(5, 3))), skip=True), ValueError, "put Pool around the Stack"),
        (lambda: Bidirectional(GRU(2, 3), GRU(4, 3)), ValueError, "forward reads size 2 and backward 4"),
        (lambda: Bidirectional(GRU(2, 3), GRU(2, 4), "sum"), ValueError, "merge 'sum' needs equal sizes"),
        (lambda: Bidirectional(GRU(2, 3), GRU(2, 3), "add"), ValueError, "merge: expected one of .* got 'add'"),
        (lambda: Bidirectional(Pool(GRU(2, 3)), GRU(2, 3)), ValueError, "both cells or neither may end the time axis"),
        (lambda: Bidirectional(GRU(2, 3), None), TypeError, "backward: expected a jaxrnn.Cell"),
        (lambda: Residual(GRU(2, 3)), ValueError, "x has size 2 and y 3"),
        (lambda: Residual(Pool(GRU(2, 2))), ValueError, "put Residual inside the Pool"),
        (lambda: Zoneout(Pool(GRU(2, 2)), 0.1), ValueError, "put Zoneout inside the Pool"),
        (lambda: EmitCarry(LSTM), TypeError, "cell: expected a jaxrnn.Cell"),
        (lambda: Pool(CELL, "first"), ValueError, r"how: expected one of \('last', .* got 'first'"),
        (lambda: Pool(CELL, ("mean", 3)), ValueError, r"got \('mean', 3\)"),
        (lambda: Pool(Bidirectional(CELL, CELL), ("max", "last")), ValueError, "has no one last step"),
        (lambda: Pool(Pool(CELL)), ValueError, "does not end the time axis already"),
        (lambda: Pool(EmitCarry(CELL)), TypeError, "cell: expected one that says its output size"),
        (lambda: Unhashable(np.ones(3)), TypeError, "Unhashable.value: expected a hashable value, got ndarray"),
        (lambda: Unhashable(jnp.ones(3)), TypeError, "belong in the params"),
        (lambda: Unhashable([1, (2, {})]), TypeError, "expected a hashable value, got dict"),
        (lambda: jaxrnn.irnn_init(jax.random.key(0), 0, 3) and Elman(0, 3), ValueError, "input_size"),
        (lambda: Cell(), TypeError, "abstract"),
    ],
)
def test_construction(build, error, words):
    with pytest.raises(error, match=words):
        build()


def test_a_cell_is_frozen_and_a_list_becomes_a_tuple():
    with pytest.raises(AttributeError):
        CELL.hidden_size = 4
    assert Stack([GRU(2, 3), Linear(3, 1)]) == Stack((GRU(2, 3), Linear(3, 1)))
    assert Unhashable([1, [2]]).value == (1, (2,))
    assert LSTM(np.int64(2), 3) == LSTM(2, 3)
    assert repr(LSTM(np.int64(2), 3)) == "LSTM(input_size=2, hidden_size=3)"
    with pytest.raises(TypeError, match="expected a hashable value"):
        jax.jit(lambda x: Unhashable(x))(1.0)


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"cell": GRU}, TypeError, r"cell: expected a jaxrnn.Cell.*write e.g. GRU\(3, 16\)"),
        ({"cell": "gru"}, TypeError, "cell: expected a jaxrnn.Cell, got 'gru'"),
        ({"xs": np.ones((5, 4, 3), np.float32)}, ValueError, r"xs: .* expects \(..., 2\), got shape \(5, 4, 3\)"),
        ({"xs": np.float32(1)}, ValueError, "xs: .* takes 1 axes per step"),
        ({"xs": np.ones(2, np.float32)}, ValueError, "xs: expected an axis of time before those of one step"),
        ({"xs": {"a": XS, "b": XS[:3]}}, ValueError, r"xs\['b'\]: expected leading axes \(5, 4\)"),
        ({"xs": ()}, ValueError, "xs: expected a tree like 1"),
        ({"time_axis": 2}, ValueError, "time_axis: expected less than 2"),
        ({"time_axis": -1}, ValueError, "time_axis: expected at least 0, got -1"),
        ({"time_axis": 1.0}, TypeError, "time_axis: expected an integer, got 1.0"),
        ({"lengths": np.array([5, 6, 0, 1])}, ValueError, "lengths: expected 0 to 5, got 0 to 6"),
        ({"lengths": np.array([5, -1, 0, 1])}, ValueError, "lengths: expected 0 to 5, got -1 to 5"),
        ({"lengths": jnp.array([5, 6, 0, 1])}, ValueError, "lengths: expected 0 to 5"),
        ({"lengths": [5, 6, 0, 1]}, ValueError, "lengths: expected 0 to 5"),
        ({"lengths": np.array([5, 1, 0])}, ValueError, r"lengths: expected the batch shape \(4,\), got \(3,\)"),
        ({"lengths": np.array(3)}, ValueError, r"lengths: expected the batch shape \(4,\), got \(\)"),
        ({"lengths": np.ones(4)}, TypeError, "lengths: expected integers, got float64"),
        ({"lengths": np.ones(4, bool)}, TypeError, "lengths: expected integers, got bool"),
        ({"mask": np.ones((5, 4))}, TypeError, "mask: expected bool, got float"),
        ({"mask": np.ones((4, 5), bool)}, ValueError, r"mask: expected shape \(5, 4\).* got \(4, 5\)"),
        ({"mask": np.ones((4, 5), bool), "time_axis": 1}, ValueError, r"mask: expected shape \(5, 4\)"),
        ({"mask": np.ones((5, 4), bool), "lengths": np.ones(4, int)}, ValueError, "lengths or mask, got both"),
        ({"reset": np.zeros((5, 4), np.float32)}, TypeError, "reset: expected bool, got float32"),
        ({"reset": np.zeros((5,), bool)}, ValueError, r"reset: expected shape \(5, 4\)"),
        ({"carry": jnp.zeros((4, 3))}, ValueError, "carry: expected the structure .*GRUCarry"),
        ({"carry": (jnp.zeros((4, 3)),)}, ValueError, "carry: expected the structure"),
        ({"carry": jaxrnn.PoolCarry(LSTMCarry(0, 0), 0, 0)}, ValueError, r"carry: .*GRUCarry.*, got .*PoolCarry"),
        ({"carry": GRUCarry(jnp.zeros(3))}, ValueError, r"carry.h: expected shape \(4, 3\), got \(3,\)"),
        ({"carry": GRUCarry(jnp.zeros((4, 3), int))}, TypeError, "carry.h: expected float32 .* got int32"),
        ({"params": PARAMS[:3]}, TypeError, "params: .* takes GRUParams, got tuple"),
        ({"params": LSTM(2, 3).init(jax.random.key(0))}, TypeError, "params: .* takes GRUParams, got LSTMParams"),
        (
            {"params": GRU(2, 4).init(jax.random.key(0))},
            ValueError,
            r"params.w_x: .* expects shape \(2, 9\), got \(2, 12\)",
        ),
        ({"cell": GRU(2, 3, reset_after=False)}, ValueError, "params.b_hn: .* expects None"),
        ({"key": 0}, TypeError, "key: expected a jax.random key, got int"),
        ({"key": jnp.ones(3)}, TypeError, "key: expected a jax.random key, got float32"),
        ({"key": jax.random.split(jax.random.key(0))}, ValueError, "key: expected a single key"),
        ({"remat_every": 0}, ValueError, "remat_every: expected at least 1, got 0"),
        ({"remat_every": 2.5}, TypeError, "remat_every: expected an integer"),
        ({"implementation": "fast"}, ValueError, "implementation: expected one of .* got 'fast'"),
        (
            {"implementation": {"gru_scan": "xla"}},
            ValueError,
            "implementation: expected engines among .* got 'gru_scan'",
        ),
        ({"implementation": {"gated_scan": "fast"}}, ValueError, "got 'fast'"),
        (
            {"cell": GRU(2, 3, activation="relu"), "implementation": "pallas"},
            ValueError,
            "gated_scan cannot run .* as 'pallas': no Pallas kernel computes this GRU",
        ),
        ({"implementation": "chunked"}, ValueError, "gated_scan cannot run .* as 'chunked': .*supported here: .*xla"),
        ({"implementation": {"gated_scan": "associative"}}, ValueError, "not linear"),
    ],
)
def test_scan(keywords, error, words):
    with pytest.raises(error, match=words):
        scan(**keywords)
    if "lengths" not in keywords or not isinstance(keywords["lengths"], list):
        with pytest.raises(error, match=words):  # at trace time, and what is no tracer is checked inside jit too
            jax.jit(lambda: scan(**keywords))()


def test_traced_lengths_are_clamped_and_not_checked():
    run = jax.jit(lambda lengths: scan(lengths=lengths)[1])
    np.testing.assert_array_equal(run(np.array([9, -4, 0, 2])), run(np.array([5, 0, 0, 2])))


def test_complex_input_needs_complex_params():
    with pytest.raises(TypeError, match=r"GRU.step: carry.h must keep its dtype float32; complex64 cannot be cast"):
        scan(xs=XS.astype(np.complex64))
    cell = Elman(2, 3)
    params = jax.tree.map(lambda p: p.astype(jnp.complex64), cell.init(jax.random.key(0)))
    end, ys = jaxrnn.scan(cell, params, None, XS.astype(np.complex64))
    assert ys.dtype == end.h.dtype == jnp.complex64


def test_step_names_what_does_not_fit():
    with pytest.raises(ValueError, match=r"x: .* expects \(..., 2\), got shape \(4, 3\)"):
        jaxrnn.step(CELL, PARAMS, None, np.ones((4, 3), np.float32))
    with pytest.raises(ValueError, match=r"x: expected \(..., 2\) for weights of shape \(2, 9\), got \(3,\)"):
        jaxrnn.gru_step(PARAMS, GRUCarry(jnp.zeros(3)), jnp.ones(3))
    with pytest.raises(ValueError, match=r"carry.h: expected shape \(4, 3\), got \(3,\)"):
        jaxrnn.step(CELL, PARAMS, GRUCarry(jnp.zeros(3)), XS[0])
    both = Bidirectional(CELL, CELL)
    with pytest.raises(TypeError, match="cannot run step by step: a backward cell begins at the end"):
        jaxrnn.step(both, both.init(jax.random.key(0)), None, XS[0])
    with pytest.raises(TypeError, match="cannot run step by step"):
        jaxrnn.scan(EmitCarry(both), both.init(jax.random.key(0)), None, XS)


@pytest.mark.parametrize(
    ("cell", "xs", "error", "words"),
    [
        (Embed(3, 2), np.array([0, 3]), ValueError, r"x: expected tokens in \[0, 3\), got 0 to 3"),
        (Embed(3, 2), np.array([0, -1]), ValueError, r"got -1 to 0"),
        (Embed(3, 2), np.array([0.0, 1.0], np.float32), TypeError, "x: Embed expects integers, got float32"),
        (LayerNorm(3), np.ones((4, 2), np.float32), ValueError, r"xs: .* expects \(..., 3\)"),
        (Linear(3, 2), np.ones((4, 2), np.float32), ValueError, r"xs: .* expects \(..., 3\)"),
        (ConvLSTM((4, 3), 2, 3), np.ones((5, 3, 4, 2), np.float32), ValueError, r"expects \(..., 4, 3, 2\)"),
        (ConvLSTM((4, 3), 2, 3), np.ones((4, 2), np.float32), ValueError, "takes 3 axes per step"),
    ],
)
def test_layers(cell, xs, error, words):
    with pytest.raises(error, match=words):
        jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, xs)


def test_padding_tokens_need_not_be_tokens():
    cell = Embed(3, 2)
    params = cell.init(jax.random.key(0))
    _, ys = jaxrnn.scan(cell, params, None, np.array([1, 2, -1, -1]), lengths=np.array(2))
    np.testing.assert_array_equal(ys, [*params.w[1:], [0, 0], [0, 0]])
    assert np.isnan(jax.jit(lambda xs: jaxrnn.scan(cell, params, None, xs)[1])(np.array([1, -1, 3]))[1:]).all()


def test_tokens_that_jit_closes_over_are_checked():
    cell = Embed(3, 2)
    params = cell.init(jax.random.key(0))
    run = lambda tokens: jax.jit(lambda params: jaxrnn.scan(cell, params, None, tokens)[1])(params)
    assert run(jnp.array([1, 2])).shape == (2, 2)
    with pytest.raises(ValueError, match=r"x: expected tokens in \[0, 3\), got 1 to 7"):
        run(jnp.array([1, 7]))


@pytest.mark.parametrize("cell", [MGU(2, 3), IndRNN(2, 3), ConvLSTM((4,), 2, 3), Linear(2, 3)], ids=repr)
def test_params_of_another_cell(cell):
    xs = np.ones((5, 4, 2), np.float32)
    with pytest.raises(TypeError, match=r"params: .* takes .*Params, got ElmanParams"):
        jaxrnn.scan(cell, Elman(2, 3).init(jax.random.key(0)), None, xs)


@pytest.mark.parametrize(
    "cell",
    [Stack((CELL, Linear(3, 1))), Bidirectional(CELL, CELL), LearnedCarry(CELL)],
    ids=["stack", "both", "learned"],
)
def test_params_of_another_composition(cell):
    with pytest.raises(TypeError, match=f"params: {type(cell).__name__} takes"):
        jaxrnn.scan(cell, PARAMS, None, XS)


def test_missing_parts_of_params():
    cell = LSTM(2, 3, peephole=True, layer_norm=True)
    params = cell.init(jax.random.key(0))
    with pytest.raises(TypeError, match="params"):
        jaxrnn.scan(cell, params._replace(norm=None), None, XS)
    _, with_bias = jaxrnn.scan(CELL, PARAMS._replace(b=jnp.zeros(9), b_hn=jnp.zeros(3)), None, XS)
    _, without = jaxrnn.scan(CELL, PARAMS._replace(b=None, b_hn=None), None, XS)
    np.testing.assert_allclose(without, with_bias, 1e-6)
    _, plain = jaxrnn.scan(cell, params, None, XS)
    _, absent = jaxrnn.scan(cell, params._replace(peephole=None), None, XS)
    np.testing.assert_allclose(plain, absent, 1e-6)  # peepholes start at zero


def test_only_biases_may_be_absent():
    for cell, name in ((Linear(2, 3), "w"), (CELL, "w_h"), (LayerNorm(2), "scale"), (jaxrnn.LRU(2, 3), "d")):
        params = cell.init(jax.random.key(0))._replace(**{name: None})
        with pytest.raises(ValueError, match=rf"params\.{name}: .* expects shape .*, got None"):
            jaxrnn.scan(cell, params, None, XS)
    without = PARAMS._replace(b=None, b_hn=None)
    assert np.isfinite(jaxrnn.scan(CELL, without, None, XS)[1]).all()


def test_a_complex_carry_of_a_real_cell():
    carry = jax.tree.map(lambda leaf: leaf.astype(jnp.complex64), CELL.initial_carry(PARAMS, (4,)))
    for run in (lambda: scan(carry=carry), lambda: jaxrnn.step(CELL, PARAMS, carry, XS[0])):
        with pytest.raises(TypeError, match=r"carry\.h: expected float32 or a dtype of its kind, got complex64"):
            run()
    cell = jaxrnn.LRU(2, 3)
    carry = jaxrnn.LRUCarry(jnp.zeros((4, 3)))
    with pytest.raises(TypeError, match=r"carry\.h: expected complex64 or a dtype of its kind, got float32"):
        jaxrnn.scan(cell, cell.init(jax.random.key(0)), carry, XS)


def test_explain_where_the_default_is_another_platform(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "METAL")
    explanation = jaxrnn.explain(CELL, PARAMS, None, XS)
    assert explanation.platform == "METAL"
    assert "native" in explanation.calls[0].refused
    with pytest.raises(ValueError, match=r"platform: expected 'cpu', 'gpu', 'tpu' or None, got 'METAL'"):
        jaxrnn.explain(CELL, PARAMS, None, XS, platform="METAL")


def test_zoneout_of_a_carry_that_is_defined_up_to_a_factor():
    inner = jaxrnn.SLSTM(2, 3)
    for cell, rate in ((inner, 0.1), (inner, (0.1, 0.1, 0.0, 0.0)), (Stack((GRU(2, 2), inner)), 0.2)):
        with pytest.raises(ValueError, match=r"Zoneout.rate: expected 0 for parts .* up to a common factor .*rate=\("):
            Zoneout(cell, rate)
    cell = Zoneout(inner, (0.3, 0.0, 0.0, 0.0))
    params = jax.tree.map(lambda leaf: leaf + 0.3, cell.init(jax.random.key(0)))
    h, c, n, m = carry = jaxrnn.SLSTMCarry(*np.random.default_rng(0).uniform(1, 2, (4, 4, 3)).astype(np.float32))
    same = jaxrnn.SLSTMCarry(h, c * np.exp(2.0, dtype=np.float32), n * np.exp(2.0, dtype=np.float32), m - 2)
    for key in (None, jax.random.key(1)):
        found, expected = (jaxrnn.scan(cell, params, each, XS, key=key)[1] for each in (same, carry))
        np.testing.assert_allclose(found, expected, 1e-5, 1e-6)


def test_a_step_that_changes_its_carry():
    class Grows(Cell):
        def init(self, key, dtype=jnp.float32):
            return ()

        def initial_carry(self, params, batch_shape=()):
            return LSTMCarry(jnp.zeros((*batch_shape, 2)), jnp.zeros((*batch_shape, 2)))

        def step(self, params, carry, x, noise=None):
            return (carry.h, carry.c), x

    with pytest.raises(TypeError, match=r"Grows.step: the carry it returns must have the structure that it took"):
        jaxrnn.scan(Grows(), (), None, XS)

    class Widens(Grows):
        def step(self, params, carry, x, noise=None):
            return LSTMCarry(carry.h, jnp.concatenate([carry.c, x], -1)), x

    with pytest.raises(ValueError, match=re.escape("Widens.step: carry.c must keep its shape (4, 2); got (4, 4)")):
        jaxrnn.scan(Widens(), (), None, XS)


def test_rollout_checks_the_feedback():
    x = jnp.ones((4, 2))
    with pytest.raises(TypeError, match=r"feedback: expected a next x like x, float32\[4, 2\], got float32\[4, 3\]"):
        jaxrnn.rollout(CELL, PARAMS, None, x, 3, feedback=lambda y, key: (y, y))
    with pytest.raises(ValueError, match="length: expected at least 0, got -1"):
        jaxrnn.rollout(CELL, PARAMS, None, x, -1, feedback=lambda y, key: (x, y))
    with pytest.raises(TypeError, match="length: expected an integer"):
        jaxrnn.rollout(CELL, PARAMS, None, x, 2.0, feedback=lambda y, key: (x, y))


@pytest.mark.parametrize(
    ("cell", "step", "options", "error", "words"),
    [
        (Elman(2, 3), jaxrnn.elman_step, {"activation": "softmax"}, ValueError, "activation: expected an elementwise"),
        (Elman(2, 3), jaxrnn.elman_step, {"gate_clip": -1.0}, ValueError, "gate_clip: expected a positive number, got"),
        (GRU(2, 3), jaxrnn.gru_step, {"reset_after": False}, ValueError, r"params.b_hn: gru_init\(2, 3\) has no such"),
        (
            LSTM(2, 3),
            jaxrnn.lstm_step,
            {"coupled": "x"},
            ValueError,
            "coupled: expected False, True or 'input', got",
        ),
        (
            LSTM(2, 3),
            jaxrnn.lstm_step,
            {"coupled": True},
            ValueError,
            r"params.w_x: .* shape \(2, 9\), got \(2, 12\)",
        ),
        (
            LSTM(2, 3),
            jaxrnn.lstm_step,
            {"cell_clip": 0.0},
            ValueError,
            "cell_clip: expected a positive number, got",
        ),
        (HGRN(2, 3), jaxrnn.hgrn_step, {"lower_bound": 1.0}, ValueError, "lower_bound: expected a number in"),
        (
            S5(2, 3),
            jaxrnn.s5_step,
            {"discretization": "euler"},
            ValueError,
            "discretization: expected .* got 'euler'",
        ),
        (S4D(2, 3), jaxrnn.s4d_step, {"discretization": ""}, ValueError, "discretization: expected one of .* got ''"),
    ],
)
def test_free_functions_name_an_option_that_is_none(cell, step, options, error, words):
    params = cell.init(jax.random.key(0))
    with pytest.raises(error, match=words):
        step(params, cell.initial_carry(params), jnp.ones(2), **options)


@pytest.mark.parametrize("step", [v for k, v in vars(jaxrnn).items() if k.endswith("_step")])
def test_free_functions_name_params_of_another_cell(step):
    with pytest.raises(TypeError, match=r"params: expected \w+Params, got EmbedParams"):
        step(jaxrnn.EmbedParams(jnp.ones((3, 2))), None, jnp.ones(2))


def test_explain_and_summary():
    with pytest.raises(ValueError, match=r"platform: expected 'cpu', 'gpu', 'tpu' or None, got 'abacus'"):
        jaxrnn.explain(CELL, PARAMS, None, XS, platform="abacus")
    with pytest.raises(TypeError, match=r"cell: expected a jaxrnn\.Cell"):
        jaxrnn.summary(GRU)
    explained = jaxrnn.explain(CELL, PARAMS, None, XS, platform="gpu")
    assert re.search(r"gated_scan: xla  for GRU\(input_size=2, hidden_size=3\)", str(explained))


def test_last():
    with pytest.raises(ValueError, match="lengths: expected 0 to 5, got 9 to 9"):
        jaxrnn.last(XS, np.full(4, 9))
    with pytest.raises(TypeError, match="mask: expected bool"):
        jaxrnn.last(XS, mask=np.ones((5, 4)))
    with pytest.raises(ValueError, match="lengths or mask, got both"):
        jaxrnn.last(XS, np.ones(4, int), mask=np.ones((5, 4), bool))


def test_chrono_init():
    with pytest.raises(TypeError, match="params: expected LSTMParams or GRUParams, got ElmanParams"):
        jaxrnn.chrono_init(jax.random.key(0), Elman(2, 3).init(jax.random.key(0)), 10)
    with pytest.raises(ValueError, match="max_steps: expected at least 3, got 2"):
        jaxrnn.chrono_init(jax.random.key(0), PARAMS, 2)
    with pytest.raises(ValueError, match="expected a bias"):
        jaxrnn.chrono_init(jax.random.key(0), PARAMS._replace(b=None), 10)
