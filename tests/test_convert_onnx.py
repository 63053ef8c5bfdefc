"""ONNX: every attribute of the recurrent operators, whole models of torch and of tf2onnx, and back again.

Values are compared with onnxruntime, which has no float64, no gradients and no layout 1; all of these with the
equations of the specification, written below.
"""

import functools
import io
import itertools
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conversion import assert_close, assert_weight_gradients, peer, redraw, run
from jax import lax
from onnx_models import GATES, around, compiled, drawn, integers, lstm_arrays, make, proto, runtime

from jaxrnn import (
    GRU,
    LSTM,
    MGU,
    Apply,
    Backward,
    Bidirectional,
    BidirectionalPair,
    ConvLSTM,
    Dropout,
    Elman,
    ElmanCarry,
    Embed,
    GRUCarry,
    LayerNorm,
    LearnedCarry,
    Linear,
    LSTMCarry,
    Pool,
    Residual,
    Stack,
    Zoneout,
    scan,
)
from jaxrnn.convert.onnx import from_onnx, to_onnx

X64 = True
# Some frameworks do not run under strict promotion.
PROMOTION = "standard"

DATA = Path(__file__).parent / "data"
FUNCTIONS = {"RNN": 1, "GRU": 2, "LSTM": 3}
CARRIES = {"RNN": ElmanCarry, "GRU": GRUCarry, "LSTM": LSTMCarry}
# The names of ONNX, and how many numbers each takes.
NAMES = {
    "Affine": 2,
    "Elu": 1,
    "HardSigmoid": 2,
    "LeakyRelu": 1,
    "Relu": 0,
    "ScaledTanh": 2,
    "Sigmoid": 0,
    "Softplus": 0,
    "Softsign": 0,
    "Tanh": 0,
    "ThresholdedRelu": 1,
}


@pytest.fixture
def onnx():
    return peer("onnx")


# The equations of the specification.


def function(name, numbers):
    """An activation of ONNX, with alpha and beta."""
    alpha, beta = (*numbers, None, None)[:2]
    return {
        "Affine": lambda x: alpha * x + beta,
        "Elu": lambda x: jnp.where(x >= 0, x, alpha * (jnp.exp(jnp.minimum(x, 0)) - 1)),
        "HardSigmoid": lambda x: jnp.minimum(jnp.maximum(alpha * x + beta, 0), 1),
        "LeakyRelu": lambda x: jnp.where(x >= 0, x, alpha * x),
        "Relu": lambda x: jnp.where(x > 0, x, 0),
        "ScaledTanh": lambda x: alpha * jnp.tanh(beta * x),
        "Sigmoid": lambda x: 1 / (1 + jnp.exp(-x)),
        "Softplus": lambda x: jnp.logaddexp(x, 0),
        "Softsign": lambda x: x / (1 + jnp.abs(x)),
        "Tanh": jnp.tanh,
        "ThresholdedRelu": lambda x: jnp.where(x >= alpha, x, 0),
    }[name]


def one_step(op, attributes, functions, w, r, wb, rb, p, x, h, c):
    """(H_t, C_t) of one direction."""
    bound = attributes.get("clip")

    def φ(k, pre):
        return functions[k](pre if bound is None else jnp.clip(pre, -bound, bound))

    W, R, Wb, Rb = (jnp.split(a, GATES[op]) for a in (w, r, wb, rb))
    if op == "RNN":
        return φ(0, x @ W[0].T + h @ R[0].T + Wb[0] + Rb[0]), c
    if op == "GRU":
        z, r = (φ(0, x @ W[k].T + h @ R[k].T + Wb[k] + Rb[k]) for k in range(2))
        if attributes.get("linear_before_reset"):
            n = φ(1, x @ W[2].T + r * (h @ R[2].T + Rb[2]) + Wb[2])
        else:
            n = φ(1, x @ W[2].T + (r * h) @ R[2].T + Rb[2] + Wb[2])
        return (1 - z) * n + z * h, c
    pi, po, pf = jnp.split(p, 3)
    i, o, f, g = (x @ W[k].T + h @ R[k].T + Wb[k] + Rb[k] for k in range(4))
    i = φ(0, i + pi * c)
    f = 1 - i if attributes.get("input_forget") else φ(0, f + pf * c)
    c = f * c + i * φ(1, g)
    return φ(0, o + po * c) * functions[2](c), c


def specification(op, attributes, functions, weights, states, xs, lengths):
    """Y (T, D, B, H), Y_h and Y_c (D, B, H) of xs (T, B, I), by the equations of the specification."""
    ys, finals = [], []
    for d, backwards in enumerate({"forward": [0], "reverse": [1], "bidirectional": [0, 1]}[attributes["direction"]]):
        w, r = weights["W"][d], weights["R"][d]
        wb, rb = jnp.split(weights["B"][d], 2) if "B" in weights else jnp.zeros((2, len(w)))
        p = weights["P"][d] if "P" in weights else jnp.zeros(3 * r.shape[1])

        def step(state, inputs):
            x, valid = inputs
            h, c = one_step(op, attributes, functions[d], w, r, wb, rb, p, x, *state)
            new = jnp.where(valid, h, state[0]), jnp.where(valid, c, state[1])
            return new, jnp.where(valid, h, 0)

        valid = (np.arange(len(xs))[:, None] < lengths)[..., None]
        final, out = lax.scan(step, (states["h"][d], states["c"][d]), (xs, valid), reverse=bool(backwards))
        ys.append(out)
        finals.append(final)
    return jnp.stack(ys, 1), *(jnp.stack(each) for each in zip(*finals, strict=True))


# One node, over all its attributes.


def configuration(seed):
    """(operator, attributes, functions of each direction, weights, states, xs, lengths) at random."""
    rng = np.random.default_rng(seed)
    op = ("LSTM", "GRU", "RNN", "LSTM")[seed % 4]
    direction = ("bidirectional", "reverse", "forward")[seed % 3]
    directions = 1 + (direction == "bidirectional")
    T, B, D, H, G = 5, 3, 2, 4, GATES[op]
    attributes = {"direction": direction, "hidden_size": H}
    coupled = op == "LSTM" and rng.random() < 0.4
    names, numbers = [], []
    for _ in range(directions * FUNCTIONS[op]):
        name = rng.choice(list(NAMES))
        drawn = rng.integers(1, 5, NAMES[name]) / 8.0
        names.append(str(name))
        numbers.append(drawn.tolist())
    if rng.random() < 0.8:
        attributes["activations"] = names
        attributes["activation_alpha"] = [float(each[0]) for each in numbers if each]
        attributes["activation_beta"] = [float(each[1]) for each in numbers if len(each) == 2]
        attributes = {name: value for name, value in attributes.items() if value not in ([], ())}
    else:
        names = ["Tanh"] if op == "RNN" else ["Sigmoid", "Tanh", "Tanh"][: FUNCTIONS[op]]
        names, numbers = names * directions, [[]] * len(names) * directions
    if rng.random() < 0.5:
        attributes["clip"] = 0.75
    if coupled:
        attributes["input_forget"] = 1
    if op == "GRU":
        attributes["linear_before_reset"] = int(rng.integers(2))
    shapes = {"W": (directions, G * H, D), "R": (directions, G * H, H)}
    if rng.random() < 0.8:
        shapes["B"] = (directions, 2 * G * H)
    if op == "LSTM" and rng.random() < 0.5:
        shapes["P"] = (directions, 3 * H)

    def normal(*shape, scale=1.0):
        # Numbers of float32, so that both precisions have the same.
        return (scale * rng.normal(size=shape)).astype(np.float32).astype(np.float64)

    weights = {name: normal(*shape, scale=0.4) for name, shape in shapes.items()}
    states = {name: normal(directions, B, H) for name in "hc"}
    every = [function(name, given) for name, given in zip(names, numbers, strict=True)]
    functions = [every[d * FUNCTIONS[op] :][: FUNCTIONS[op]] for d in range(directions)]
    return op, attributes, functions, weights, states, normal(T, B, D), np.array([4, 5, 1])


def node_inputs(op, weights):
    names = ["X", "W", "R", "B" if "B" in weights else "", "sequence_lens", "initial_h"]
    return names + (["initial_c", "P" if "P" in weights else ""] if op == "LSTM" else [])


def node(op, attributes, weights):
    outputs = ["Y", "Y_h", "Y_c"] if op == "LSTM" else ["Y", "Y_h"]
    inputs = node_inputs(op, weights)
    while not inputs[-1]:
        inputs.pop()
    return make(op, inputs, outputs, **attributes)


def as_carry(op, states):
    """The states of ONNX, (directions, B, H) each, as a carry."""
    both = [CARRIES[op](*(states[name][d] for name in CARRIES[op]._fields)) for d in range(len(states["h"]))]
    return BidirectionalPair(*both) if len(both) == 2 else both[0]


def side_by_side(ys):
    """(T, D, B, H) as (T, B, D · H)."""
    return ys.swapaxes(1, 2).reshape(*ys.shape[:1], ys.shape[2], -1)


def check_node(seed, gradients=True):
    """Values and gradients in float64 as the specification has them, values in float32 as onnxruntime."""
    op, attributes, functions, weights, states, xs, lengths = configuration(seed)
    batch_first = seed % 2
    given = node(op, {**attributes, "layout": batch_first} if batch_first else attributes, weights)

    def convert(weights):
        return from_onnx(given, initializers=weights)[1]

    cell, params = from_onnx(given, initializers=weights)
    carry = as_carry(op, states)

    def theirs(weights, states, xs):
        ys, h, c = specification(op, attributes, functions, weights, states, xs, lengths)
        return as_carry(op, {"h": h, "c": c}), side_by_side(ys)

    def loss(*arguments):
        result = theirs(*arguments)
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, factors, result))), result

    given_xs = xs.swapaxes(0, 1) if batch_first else xs
    options = {"lengths": lengths, "time_axis": batch_first}
    if gradients:
        factors = redraw(seed, jax.eval_shape(theirs, weights, states, xs), 1.0)
        found, expected = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(weights, states, xs)
        g_weights, g_states, their_g_xs = found
        ours_factors = (factors[0], factors[1].swapaxes(0, 1)) if batch_first else factors
        (final, ys), (g_params, g_carry, g_xs) = run(cell, params, carry, given_xs, ours_factors, **options)
        g_xs = g_xs.swapaxes(0, 1) if batch_first else g_xs
        assert_close((g_carry, g_xs), (as_carry(op, g_states), their_g_xs), f"seed {seed}: gradients")
        assert_weight_gradients(convert, weights, g_params, g_weights)
    else:
        expected = jax.jit(theirs)(weights, states, xs)
        final, ys = compiled(cell, params, carry, given_xs, **options)
    assert_close((final, ys.swapaxes(0, 1) if batch_first else ys), expected, f"seed {seed}")
    check_runtime(node(op, attributes, weights), op, weights, states, xs, lengths, params, expected)


def check_runtime(given, op, weights, states, xs, lengths, params, expected):
    """The same node in a model of float32, whose lengths and initial states are inputs, in onnxruntime."""
    weights, states, xs = jax.tree.map(np.float32, (weights, states, xs))
    names = {"X": xs, "sequence_lens": lengths.astype(np.int32), "initial_h": states["h"], "initial_c": states["c"]}
    feed = {name: array for name, array in names.items() if name in given.input}
    model = proto([given], {name: (a.dtype, a.shape) for name, a in feed.items()}, given.output, weights)
    found = runtime(model.SerializeToString(), feed)
    theirs = as_carry(op, {"h": found["Y_h"], "c": found.get("Y_c")}), side_by_side(found["Y"])
    assert_close(theirs, expected, "onnxruntime")
    assert_close(from_onnx(model)[1], params, "float32")


@pytest.mark.parametrize("seed", range(3))
def test_node(seed, onnx):
    check_node(seed, gradients=True)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(3, 48))
def test_node_full(seed, onnx):
    check_node(seed)


# One step, or all of them, as the output.


@pytest.mark.parametrize(
    ("direction", "step"), [("forward", -1), ("reverse", 0), ("reverse", -1), ("bidirectional", -1)]
)
def test_step(direction, step, onnx):
    """Y at the last or the first step, which is a final state for the directions that end there."""
    arrays = lstm_arrays(directions=1 + (direction == "bidirectional"), gates=3)
    nodes = [
        make("GRU", ["X", "W", "R"], ["Y"], direction=direction, hidden_size=3),
        make("Gather", ["Y", "k"], ["Z"], axis=0),
    ]
    model = proto(nodes, {"X": (np.float32, ("T", "B", 2))}, ["Z"], arrays | {"k": np.array(step)})
    xs = np.random.default_rng(1).normal(size=(5, 3, 2)).astype(np.float32)
    expected = runtime(model.SerializeToString(), {"X": xs})["Z"]
    _, ys = compiled(*from_onnx(model), None, xs)
    assert_close(ys, expected.swapaxes(0, 1).reshape(3, -1))


def test_mean_with_layout_1(onnx):
    """The time axis is the second one where the batch comes first, and only over it there is a mean."""
    arrays = lstm_arrays(gates=3)
    first = [make("GRU", ["X", "W", "R"], ["Y"], layout=1), make("Squeeze", ["Y", "two"], ["S"])]
    model, wrong = (
        proto(
            [*first, make("ReduceMean", ["S", "axes"], ["Z"], keepdims=0)],
            {"X": (np.float32, ("B", "T", 2))},
            ["Z"],
            arrays | {"two": integers(2), "axes": integers(axis)},
        )
        for axis in (1, 0)
    )
    cell, _ = from_onnx(model)
    assert cell == Pool(GRU(2, 3, reset_after=False), "mean")
    with pytest.raises(ValueError, match="expected the time axis"):
        from_onnx(wrong)


# Whole models as torch.onnx.export(..., dynamo=False) writes them.


def torch_model(torch, rng):
    """(a random module, its example inputs, batch_first)."""
    nn = torch.nn
    kind = rng.choice(["LSTM", "GRU", "RNN"])
    first, bidirectional, layers = bool(rng.integers(2)), bool(rng.integers(2)), int(rng.integers(1, 3))
    tokens, head = bool(rng.integers(2)), str(rng.choice(["sequence", "last", "final", "mean", "max", "residual"]))
    # The carry of a Pool holds more than states.
    states = head in ("sequence", "residual") and bool(rng.integers(2))
    extra = {"nonlinearity": "relu"} if kind == "RNN" and rng.integers(2) else {}
    D, H = 3, 4
    width = H * (1 + bidirectional)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.below = nn.Embedding(7, D) if tokens else nn.Sequential(nn.Linear(2, D), nn.Tanh())
            self.rnn = getattr(nn, kind)(
                D, H, layers, batch_first=first, bidirectional=bidirectional, bias=bool(rng.integers(2)), **extra
            )
            above = [nn.LayerNorm(width), nn.Linear(width, width), nn.LeakyReLU(0.25), nn.Softmax(-1), nn.Dropout(0.5)]
            self.above = nn.Sequential(
                *(
                    each
                    for each in above
                    if rng.integers(2) or (head in ("residual", "final") and isinstance(each, nn.Linear))
                )
            )

        def forward(self, x, *given):
            x = self.below(x)
            carry = (given if kind == "LSTM" else given[0]) if given else None
            ys, final = self.rnn(x, carry)
            h = final[0] if kind == "LSTM" else final
            if head == "final":
                y = torch.cat((h[-2], h[-1]), -1) if bidirectional else h[-1]
            else:
                y = ys[:, -1] if first else ys[-1]
            match head:
                case "sequence":
                    y = ys
                case "mean":
                    y = ys.mean(1 if first else 0)
                case "max":
                    y = ys.amax(1 if first else 0)
                case "residual":
                    y = ys + self.above(ys)
            return (y if head == "residual" else self.above(y)), final

    T, B = 5, 3
    shape = (B, T) if first else (T, B)
    x = torch.tensor(rng.integers(0, 7, shape)) if tokens else torch.tensor(rng.normal(size=(*shape, 2)))
    given = [
        torch.tensor(rng.normal(size=(layers * (1 + bidirectional), B, H))) for _ in range(2 if kind == "LSTM" else 1)
    ]
    return Model().double().eval(), (x, *(given if states else ())), first


def exported(torch, model, inputs, first, dynamic):
    """The bytes of the model, with or without sizes that are not known."""
    names = ["x", "h", "c"][: len(inputs)]
    axes = {"x": {int(not first): "batch", int(first): "time"}, "h": {1: "batch"}, "c": {1: "batch"}}
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, inputs, file, dynamo=False, input_names=names, dynamic_axes=axes if dynamic else None, verbose=False
        )
    return file.getvalue()


def unstack(cell, states):
    """The states of torch, (layers · directions, B, H) each, as the carry of a cell."""
    taken = itertools.count()

    def build(cell):
        match cell:
            case Stack():
                return tuple(map(build, cell.cells))
            case Bidirectional():
                return BidirectionalPair(build(cell.forward), build(cell.backward))
            case LSTM() | GRU() | Elman():
                row = next(taken)
                name = {LSTM: LSTMCarry, GRU: GRUCarry, Elman: ElmanCarry}[type(cell)]
                return name(*(each[row] for each in states))
            case Residual():
                return build(cell.cell)
        return ()

    return build(cell)


def check_torch(torch, seed):
    """Outputs, and the gradient of xs, in float64."""
    rng = np.random.default_rng(seed)
    model, (x, *states), first = torch_model(torch, rng)
    data = exported(torch, model, (x, *states), first, dynamic=bool(rng.integers(2)))
    cell, params = from_onnx(data)
    tokens = not x.dtype.is_floating_point
    x.requires_grad_(not tokens)
    ys, _ = model(x, *states)
    carry = None
    if states:
        carry = unstack(cell, [jnp.asarray(each.numpy()) for each in states])
    factor = redraw(seed, ys.detach().numpy(), 1.0)
    xs = x.detach().numpy()

    def loss(xs):
        ours = scan(cell, params, carry, xs, time_axis=int(first))
        return jnp.vdot(factor, ours[1]), ours[1]

    if tokens:
        ours = jax.jit(loss)(xs)[1]
    else:
        gradient, ours = jax.jit(jax.grad(loss, has_aux=True))(xs)
        (ys * torch.tensor(factor)).sum().backward()
        assert_close(gradient, x.grad.numpy(), f"seed {seed}: gradient")
    assert_close(ours, ys.detach().numpy(), f"seed {seed}: {cell}")


@pytest.fixture
def torch(onnx):
    module = peer("torch")
    module.set_num_threads(1)
    return module


@pytest.mark.parametrize("seed", range(4))
def test_torch(seed, torch):
    check_torch(torch, seed)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(4, 44))
def test_torch_full(seed, torch):
    check_torch(torch, seed)


# Files of tf2onnx.


@pytest.mark.parametrize("name", sorted({path.stem for path in DATA.glob("*.onnx")} - {"loop"}))
def test_tf2onnx(name, onnx):
    path = DATA / f"{name}.onnx"
    rng = np.random.default_rng(0)
    tokens = name == "embedding"
    xs = rng.integers(0, 7, (4, 6), np.int32) if tokens else rng.normal(size=(4, 6, 3)).astype(np.float32)
    cell, params = from_onnx(path)
    (expected,) = runtime(path.read_bytes(), {"x": xs}).values()
    assert np.ptp(expected) > 0
    assert_close(compiled(cell, params, None, xs, time_axis=1)[1], expected)


# Cells as models, and back.


def random_recurrent(rng, size, hidden):
    """A cell of ONNX's operators with random options."""
    clip = float(rng.choice([0.5, 1.0]))
    spec = lambda: [*("tanh", "relu", "softsign"), ("elu", 0.5), ("scaled_tanh", 0.5, 0.75)][rng.integers(5)]
    gate = lambda: ["sigmoid", "hard_sigmoid", "keras_hard_sigmoid", ("hard_sigmoid", 0.25, 0.5)][rng.integers(4)]
    match rng.integers(3):
        case 0:
            return Elman(size, hidden, spec(), gate_clip=clip)
        case 1:
            return GRU(size, hidden, bool(rng.integers(2)), gate_clip=clip, gate_activation=gate(), activation=spec())
    options = {"peephole": bool(rng.integers(2)), "coupled": [False, True, "input"][rng.integers(3)]}
    options |= {"gate_clip": clip} if rng.integers(2) else {}
    return LSTM(size, hidden, **options, gate_activation=gate(), activation=spec(), output_activation=spec())


def random_layer(rng, size):
    """A recurrent layer, and the size of its output."""
    cell = random_recurrent(rng, size, 4)
    learned = LearnedCarry if rng.integers(2) else lambda cell: cell
    match rng.integers(3):
        case 0:
            return learned(cell), 4
        case 1:
            return Backward(learned(cell)), 4
    return Bidirectional(learned(cell), cell), 8


def random_cell(rng):
    """(a model, whether it takes tokens, whether its outputs at the padding and with lengths are those of ONNX)."""
    tokens = bool(rng.integers(2))
    below, size = ([Embed(7, 3)], 3) if tokens else ([], 2)
    first, width = random_layer(rng, size)
    middle = [[], [LayerNorm(width, 1e-3), Dropout(0.5)], [Linear(width, width), Apply("tanh")], [Apply(("elu", 0.5))]]
    second, top = random_layer(rng, width)
    head = int(rng.integers(5))
    if head == 0:
        second = Pool(second)
    elif head == 1:
        second = Pool(second, str(rng.choice(["mean", "max"])))
    elif head == 2:
        second, top = Residual(Stack((second, Linear(top, width)))), width
    elif head == 3:
        second, top = Pool(Stack((second, Linear(top, 5)))), 5
    above = [Linear(top, 3), Apply("softmax")] if head < 2 else []
    return Stack((*below, first, *middle[rng.integers(4)], second, *above)), tokens, head in (0, 4)


def check_round_trip(seed):
    """The model in onnxruntime, and the same cell again."""
    rng = np.random.default_rng(seed)
    cell, tokens, with_lengths = random_cell(rng)
    params = drawn(cell, seed)
    xs = rng.integers(0, 7, (5, 3)) if tokens else rng.normal(size=(5, 3, 2)).astype(np.float32)
    lengths = np.array([4, 5, 1], np.int32) if with_lengths else None
    feed = {"X": xs} | ({"sequence_lens": lengths} if with_lengths else {})
    data = to_onnx(cell, params, lengths=with_lengths)
    found = runtime(data, feed)
    carry, ys = compiled(cell, params, None, xs, lengths=lengths)
    states = [
        leaf for path, leaf in jax.tree.leaves_with_path(carry) if jax.tree_util.keystr(path).endswith((".h", ".c"))
    ]
    if with_lengths and ys.ndim == 3:
        ys, found["Y"] = (np.where(np.arange(5)[:, None, None] < lengths[:, None], y, 0) for y in (ys, found["Y"]))
    assert_close(ys, found.pop("Y"), f"seed {seed}: {cell}")
    finals = {}
    for name, value in found.items():
        _, field, k = name.split("_")
        for d, row in enumerate(value):
            finals[int(k), d, "hc".index(field)] = row
    assert_close(states, [finals[key] for key in sorted(finals)], f"seed {seed}: final states")
    again, same = from_onnx(data, output="Y")
    ours, theirs = (compiled(*each, None, xs, lengths=lengths)[1] for each in ((cell, params), (again, same)))
    assert_close(theirs, ours, f"seed {seed}: {again}")


@pytest.mark.parametrize("seed", range(4))
def test_round_trip(seed, onnx):
    check_round_trip(seed)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(4, 44))
def test_round_trip_full(seed, onnx):
    check_round_trip(seed)


# Hostile files.


def flipped(rng, data):
    """Bytes with a few flipped, cut off, repeated, or put elsewhere."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at, length = int(rng.integers(len(data))), int(rng.integers(1, 40))
        match rng.integers(5):
            case 0:
                data[at] ^= 1 << rng.integers(8)
            case 1:
                data[at] = rng.integers(256)
            case 2:
                data = data[: max(at, 1)]
            case 3:
                data[at:at] = data[at : at + length]
            case 4:
                del data[at : min(at + length, len(data) - 1)]
    return bytes(data)


INTEGERS = (-1, 0, 1, 2, 3, 7, 2**31, 2**62, -(2**62))


def edited(rng, model):
    """A copy of a model with a few fields edited."""
    copy = type(model)()
    copy.CopyFrom(model)
    for _ in range(rng.integers(1, 3)):
        edit(rng, copy.graph)
    if rng.random() < 0.05:
        copy.opset_import[0].version = int(rng.choice([0, 6, 7, 11, 13, 99]))
    return copy


def edit(rng, graph):
    node = graph.node[rng.integers(len(graph.node))]
    other = graph.node[rng.integers(len(graph.node))]
    tensors = [*graph.initializer, *(a.t for n in graph.node for a in n.attribute if a.HasField("t"))]
    tensor = tensors[rng.integers(len(tensors))]
    names = [name for each in graph.node for name in (*each.input, *each.output)] + [
        each.name for each in graph.initializer
    ]
    integer = int(rng.choice(INTEGERS))
    attribute = node.attribute[rng.integers(len(node.attribute))] if node.attribute else None
    match rng.integers(16):
        case 0:
            node.op_type = other.op_type
        case 1:
            graph.node.remove(node)
        case 2 if node.input:
            node.input[rng.integers(len(node.input))] = names[rng.integers(len(names))]
        case 3 if node.output:
            node.output[0] = names[rng.integers(len(names))]
        case 4 if node.input:
            del node.input[rng.integers(len(node.input)) :]
        case 5 if tensor.dims:
            tensor.dims[rng.integers(len(tensor.dims))] = integer
        case 6:
            tensor.dims.append(integer)
        case 7:
            tensor.data_type = int(rng.integers(-1, 25))
        case 8 if tensor.raw_data:
            raw = bytearray(tensor.raw_data)
            raw[: len(raw) // 4 * 4] = rng.choice(
                np.array([np.nan, np.inf, 0, 1e30, -1], np.float32), len(raw) // 4
            ).tobytes()
            tensor.raw_data = bytes(raw)
        case 9 if attribute is not None:
            attribute.i = integer
        case 10 if attribute is not None and attribute.ints:
            attribute.ints[rng.integers(len(attribute.ints))] = integer
        case 11 if attribute is not None:
            attribute.type = int(rng.integers(0, 15))
        case 12 if attribute is not None:
            attribute.name = str(rng.choice(["axis", "axes", "perm", "clip", "to", "activations", "layout", "value"]))
        case 13:
            shape = graph.input[0].type.tensor_type.shape
            shape.dim[rng.integers(len(shape.dim))].dim_value = integer
        case 14:
            node.CopyFrom(other)
        case 15:
            raw = np.frombuffer(tensor.raw_data, np.uint8) if tensor.raw_data else None
            if raw is not None and tensor.data_type == 7 and len(raw) % 8 == 0:
                tensor.raw_data = rng.choice(np.array(INTEGERS), len(raw) // 8).astype(np.int64).tobytes()


@functools.cache
def real_models():
    """Models to damage: of tf2onnx, of ours, and by hand."""
    import onnx

    cells = [
        Stack(
            (Embed(7, 3), Bidirectional(LearnedCarry(LSTM(3, 2, True)), LSTM(3, 2, True)), Dropout(0.5), Linear(4, 2))
        ),
        Stack(
            (GRU(2, 3, False), LayerNorm(3), Residual(Backward(GRU(3, 3, activation=("elu", 0.5)))), Pool(Linear(3, 2)))
        ),
    ]
    ours = [onnx.load_from_string(to_onnx(cell, drawn(cell))) for cell in cells]
    states = onnx.load_from_string(to_onnx(LSTM(2, 3), drawn(LSTM(2, 3)), lengths=True, initial_states=True))
    return [*map(onnx.load, sorted(DATA.glob("*.onnx"))), *ours, states]


def check_damaged(model, what):
    """A clear refusal, or a finite model, soon."""
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            _, params = from_onnx(model)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)), what
            outcome = "finite"
        except (ValueError, TypeError):
            outcome = "refused"
    assert time.process_time() - began < 5, what
    return outcome


def outcomes(seeds):
    """What became of models damaged in bytes and in fields."""
    found = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        model = real_models()[seed % len(real_models())]
        damaged = flipped(rng, model.SerializeToString()) if seed % 3 == 0 else edited(rng, model)
        found.append(check_damaged(damaged, seed))
    return found


def test_damaged(onnx):
    found = outcomes(range(1000))
    assert min(found.count("finite"), found.count("refused")) > 50


@pytest.mark.full
def test_damaged_full(onnx):
    outcomes(range(1000, 12000))


# What is refused, and what is said.


SQUEEZE = ("Squeeze", ["Y", "one"], ["S"])
ONE = {"one": integers(1)}

# name: (the message, () -> a model)
REFUSED = {
    "attention": ("a_MatMul.*two values that depend on", lambda: around(make("MatMul", ["Y", "Y"], ["Z"]))),
    "conv": ("a_Conv.*no counterpart", lambda: around(make("Conv", ["Y", "W"], ["Z"]))),
    "no recurrent node": (
        "no RNN, LSTM or GRU.*only Relu.*dynamo=False",
        lambda: proto([make("Relu", ["X"], ["Z"])], {"X": (np.float32, (1, 2, 3))}, ["Z"]),
    ),
    "loop": ("while_loop.*subgraph.*dynamo=False", lambda: DATA / "loop.onnx"),
    "no features": (
        "sum of features|takes entries",
        lambda: around(make("Gather", ["Y", "one"], ["Z"], axis=3), initializers=ONE),
    ),
    "some directions": (
        "some of the directions",
        lambda: proto(
            [
                make("LSTM", ["X", "W", "R"], ["Y"], direction="bidirectional"),
                make("Gather", ["Y", "one"], ["Z"], axis=1),
            ],
            {"X": (np.float32, ("T", "B", 2))},
            ["Z"],
            lstm_arrays(directions=2) | {"one": np.array(1)},
        ),
    ),
    "first step": (
        "start of a layer",
        lambda: around(make("Gather", ["Y", "zero"], ["Z"], axis=0), initializers={"zero": np.array(0)}),
    ),
    "c": ("c of a layer", lambda: around(make("Relu", ["Y_c"], ["Z"]))),
    "step in the middle": (
        "takes steps 1 to 2",
        lambda: around(make("Gather", ["Y", "one"], ["Z"], axis=0), initializers=ONE),
    ),
    "clip of 0": ("clip: expected a positive", lambda: around(outputs=["Y"], clip=0.0)),
    "direction": ("direction: expected one of forward", lambda: around(outputs=["Y"], direction="sideways")),
    "layout": ("layout: expected 0 or 1", lambda: around(outputs=["Y"], layout=2)),
    "hidden_size": ("hidden_size is 4, and R has shape", lambda: around(outputs=["Y"], hidden_size=4)),
    "attribute": ("unknown attribute 'output_sequence'", lambda: around(outputs=["Y"], output_sequence=1)),
    "activation": ("got 'Swish'", lambda: around(outputs=["Y"], activations=["Swish", "Tanh", "Tanh"])),
    "activations": ("expected 3 names", lambda: around(outputs=["Y"], activations=["Tanh"])),
    "alphas": (
        "activation_alpha: expected one number for each of the 1",
        lambda: around(outputs=["Y"], activations=["Elu", "Tanh", "Tanh"], activation_alpha=[1.0, 2.0]),
    ),
    "no alpha": ("Affine needs 2 numbers", lambda: around(outputs=["Y"], activations=["Affine", "Tanh", "Tanh"])),
    "features": (
        "X has 3 features, and W is for 2",
        lambda: around(outputs=["Y"], inputs={"X": (np.float32, ("T", "B", 3))}),
    ),
    "W": (
        "W: expected shape \\(1, 12, any\\)",
        lambda: around(outputs=["Y"], initializers={"W": np.ones((1, 9, 2), np.float32)}),
    ),
    "NaN": (
        "W: expected finite numbers",
        lambda: around(outputs=["Y"], initializers={"W": np.full((1, 12, 2), np.nan, np.float32)}),
    ),
    "dtypes": (
        "R is float64, and W is float32",
        lambda: around(outputs=["Y"], initializers={"R": np.ones((1, 12, 3))}),
    ),
    "dtype of X": ("expected one dtype", lambda: around(outputs=["Y"], inputs={"X": (np.float64, ("T", "B", 2))})),
    "two outputs": (
        "expected one output besides final states, got 'Y', 'Z'; name one",
        lambda: around(make("Relu", ["Y"], ["Z"]), outputs=["Y", "Z"]),
    ),
    "two states": ("got 'Y_h', 'Y_c'", lambda: around(outputs=["Y_h", "Y_c"])),
    "opset": ("operator set from 7", lambda: around(outputs=["Y"], opset=6)),
    "twice": ("'Y' is made twice", lambda: around(make("Relu", ["Y"], ["Y"]), outputs=["Y"])),
    "order": (
        "'late' is no input, no initializer",
        lambda: around(make("Relu", ["late"], ["Z"]), make("Relu", ["Y"], ["late"])),
    ),
    "cycle": (
        "'b' is no input",
        lambda: around(make("Relu", ["b"], ["a"]), make("Relu", ["a"], ["b"]), make("Add", ["Y", "b"], ["Z"])),
    ),
    "missing output": ("'nowhere' is made by no node", lambda: around(outputs=["nowhere"])),
    "string tensor": (
        "initializer 'W': expected numbers",
        lambda: broken(lambda model: setattr(model.graph.initializer[0], "data_type", 8)),
    ),
    "external data": (
        "initializer 'W': its data are in another file",
        lambda: broken(lambda model: setattr(model.graph.initializer[0], "data_location", 1)),
    ),
    "claimed size": (
        "initializer 'W': shape .* has 4611686018427387904 numbers, and there are",
        lambda: broken(lambda model: model.graph.initializer[0].dims.__setitem__(slice(None), [2**31, 2**31])),
    ),
    "domain": (
        "operator set 'com.example'",
        lambda: broken(lambda model: setattr(model.graph.node[0], "domain", "com.example")),
    ),
    "names": (
        "initializer 'W': expected names that differ",
        lambda: broken(lambda model: model.graph.initializer.add(name="W")),
    ),
    "huge fill": (
        "out of proportion",
        lambda: around(
            make("ConstantOfShape", ["huge"], ["filled"]),
            make("Concat", ["filled", "filled"], ["more"], axis=0),
            make("Add", ["Y", "more"], ["Z"]),
            initializers={"huge": integers(2**40)},
        ),
    ),
    "huge bias": (
        "out of proportion",
        lambda: around(
            make("ConstantOfShape", ["huge"], ["filled"]),
            make("Add", ["Y", "filled"], ["Z"]),
            initializers={"huge": integers(2**40)},
        ),
    ),
    "huge expand": (
        "out of proportion",
        lambda: around(
            make("Expand", ["W", "huge"], ["w"]),
            make("MatMul", ["Y", "w"], ["Z"]),
            initializers={"huge": integers(2**40, 1, 1, 1)},
        ),
    ),
    "doubling": (
        "out of proportion",
        lambda: around(
            *(make("Concat", [f"c{k}", f"c{k}"], [f"c{k + 1}"], axis=0) for k in range(60)),
            make("Add", ["Y", "c60"], ["Z"]),
            initializers={"c0": np.ones(2, np.float32)},
        ),
    ),
    "initial state": (
        "initial_h differs over the batch",
        lambda: proto(
            [make("GRU", ["X", "W", "R", "", "", "h"], ["Y"])],
            {"X": (np.float32, ("T", 2, 2))},
            ["Y"],
            lstm_arrays(gates=3) | {"h": np.arange(6, dtype=np.float32).reshape(1, 2, 3)},
        ),
    ),
    "constant lengths": (
        "sequence_lens is a constant",
        lambda: proto(
            [make("GRU", ["X", "W", "R", "", "n"], ["Y"])],
            {"X": (np.float32, ("T", 2, 2))},
            ["Y"],
            lstm_arrays(gates=3) | {"n": np.array([1, 2], np.int32)},
        ),
    ),
    "last step with lengths": (
        "with sequence_lens, the output at the last step",
        lambda: proto(
            [make("GRU", ["X", "W", "R", "", "n"], ["Y"]), make("Gather", ["Y", "k"], ["Z"], axis=0)],
            {"X": (np.float32, ("T", "B", 2)), "n": (np.int32, ("B",))},
            ["Z"],
            lstm_arrays(gates=3) | {"k": np.array(-1)},
        ),
    ),
    "xs as a state": (
        "'X' is what the layers act on",
        lambda: proto(
            [make("LSTM", ["X", "W", "R", "", "", "X", "X"], ["Y"])],
            {"X": (np.float32, (1, "B", 3))},
            ["Y"],
            lstm_arrays(size=3),
        ),
    ),
    "two inputs": (
        "layers act on the inputs 'X' and 'V'",
        lambda: around(
            make("Relu", ["V"], ["v"]), make("Add", ["Y", "v"], ["Z"]), inputs={"V": (np.float32, ("T", "B", 3))}
        ),
    ),
    "reshape": (
        "cannot reshape",
        lambda: around(make("Reshape", ["Y", "shape"], ["Z"]), initializers={"shape": integers(0, -1)}),
    ),
    "training": (
        "training_mode",
        lambda: around(
            make("Dropout", ["Y", "r", "t"], ["Z"]), initializers={"r": np.array(0.5, np.float32), "t": np.array(True)}
        ),
    ),
}


def broken(change):
    model = around(outputs=["Y"])
    change(model)
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, onnx):
    message, model = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        from_onnx(model())


def test_no_model(onnx):
    for nothing in (b"", b"\0" * 100, bytes(range(256)), b"\x08\x07" * 1000):
        with pytest.raises(ValueError, match="onnx: "):
            from_onnx(nothing)
    with pytest.raises(
        TypeError, match=r"model: expected a path, bytes, an onnx\.ModelProto or onnx\.NodeProto, got int"
    ):
        from_onnx(3)
    given = make("GRU", ["X", "W", "R"], ["Y"])
    with pytest.raises(TypeError, match="initializers: expected a mapping"):
        from_onnx(given)
    with pytest.raises(ValueError, match="initializers: 'V' is no input"):
        from_onnx(given, initializers=lstm_arrays(gates=3) | {"V": np.ones(3)})
    with pytest.raises(ValueError, match="expected one of RNN, LSTM, GRU"):
        from_onnx(make("Relu", ["X"], ["Y"]), initializers={})
    with pytest.raises(TypeError, match=r"initializers: only for an onnx\.NodeProto"):
        from_onnx(around(outputs=["Y"]), initializers={})
    with pytest.raises(ValueError, match="output: expected one of"):
        from_onnx(around(outputs=["Y"]), output="Z")


def test_float64_needs_x64(onnx):
    arrays = {name: array.astype(np.float64) for name, array in lstm_arrays().items()}
    with jax.enable_x64(False), pytest.raises(ValueError, match=r"jax\.enable_x64"):
        from_onnx(make("LSTM", ["X", "W", "R"], ["Y"]), initializers=arrays)


def test_many_nodes(onnx):
    """Thousands of nodes take no time that grows faster than they do."""
    nodes = [make("Identity", [f"v{k}"], [f"v{k + 1}"]) for k in range(5000)]
    model = around(make("Identity", ["Y"], ["v0"]), *nodes, outputs=["v5000"])
    assert check_damaged(model, "many") == "finite"
    deep = around(
        make("Relu", ["Y"], ["v0"]), *(make("Relu", [f"v{k}"], [f"v{k + 1}"]) for k in range(2000)), outputs=["v2000"]
    )
    assert check_damaged(deep, "deep") == "finite"


# What to_onnx refuses: (the message, the cell)
LACKING = [
    (r"cell: LSTM\(.*projection_size=2.*no such option", LSTM(2, 3, projection_size=2)),
    (r"cell.cells\[1\]: LSTM\(.*layer_norm=True", Stack((Linear(2, 2), LSTM(2, 3, layer_norm=True)))),
    (r"cell.forward: LSTM\(.*cell_clip=1", Bidirectional(LSTM(2, 3, cell_clip=1.0), LSTM(2, 3))),
    (r"cell.cell: GRU\(.*layer_norm=True", Backward(GRU(2, 3, layer_norm=True))),
    ("i = 1 − f", LSTM(2, 3, coupled=True, gate_activation="tanh")),
    ("merge='sum': expected 'concat'", Bidirectional(GRU(2, 3), GRU(2, 3), "sum")),
    ("must be alike", Bidirectional(GRU(2, 3), GRU(2, 4))),
    ("must be alike", Bidirectional(GRU(2, 3), GRU(2, 3, False))),
    ("no operator for this cell", MGU(2, 3)),
    ("no operator for this cell", Zoneout(GRU(2, 3), 0.1)),
    ("no operator for this cell", ConvLSTM((4, 4), 2, 3, (3, 3))),
    ("no activation", Elman(2, 3, jnp.sin)),
    ("no activation 'identity'", Elman(2, 3, "identity")),
    ("no operator for <", Stack((GRU(2, 3), Apply(jnp.sin)))),
    ("no operator Affine", Stack((GRU(2, 3), Apply("affine")))),
    ("skip connections", Stack((GRU(2, 3), GRU(5, 3)), skip=True)),
]


@pytest.mark.parametrize(("message", "cell"), LACKING)
def test_lacking(message, cell, onnx):
    with pytest.raises(ValueError, match=message):
        to_onnx(cell, drawn(cell))


def test_pool_with_lengths_is_refused(onnx):
    cell = Pool(GRU(2, 3), "mean")
    with pytest.raises(ValueError, match="with lengths, ONNX has only the final states"):
        to_onnx(cell, drawn(cell), lengths=True)
