"""Activations: values, dtypes and gradients of each, and the same by name in every framework, there and back."""

import math
import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conversion import assert_close, peer, redraw

import jaxrnn
from jaxrnn import GRU, LSTM, SRU, Apply, ConvLSTM, Elman, IndRNN, Linear, Stack, activation
from jaxrnn.cells.activations import ACTIVATIONS, ALONG_FEATURES
from jaxrnn.convert.activations import KNOWN, canonical, function_of, name_of, there
from jaxrnn.training import load, save

os.environ["KERAS_BACKEND"] = "jax"

X64 = True

# Keras' variables as arrays.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


# (name, numbers that are not the defaults, the equation)
EQUATIONS = [
    ("identity", (), lambda x: x),
    ("affine", (2.0, -0.5), lambda x, a=1, b=0: a * x + b),
    ("exponential", (), np.exp),
    ("relu", (), lambda x: np.maximum(x, 0)),
    ("relu6", (), lambda x: np.minimum(np.maximum(x, 0), 6)),
    ("leaky_relu", (0.25,), lambda x, a=0.01: np.where(x < 0, a * x, x)),
    ("thresholded_relu", (0.25,), lambda x, a=1: np.where(x > a, x, 0)),
    ("elu", (0.5,), lambda x, a=1: np.where(x < 0, a * (np.exp(x) - 1), x)),
    ("celu", (0.5,), lambda x, a=1: np.where(x < 0, a * (np.exp(x / a) - 1), x)),
    ("selu", (), lambda x: 1.0507009873554805 * np.where(x < 0, 1.6732632423543772 * (np.exp(x) - 1), x)),
    ("gelu", (), lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2),
    ("gelu_tanh", (), lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2),
    ("silu", (), lambda x: x * sigmoid(x)),
    ("hard_silu", (), lambda x: x * np.clip(x / 6 + 0.5, 0, 1)),
    ("mish", (), lambda x: x * np.tanh(np.log(1 + np.exp(x)))),
    ("softplus", (), lambda x: np.log(1 + np.exp(x))),
    ("squareplus", (1.0,), lambda x, a=4: (x + np.sqrt(x**2 + a)) / 2),
    ("softshrink", (0.25,), lambda x, a=0.5: np.where(x > a, x - a, np.where(x < -a, x + a, 0))),
    ("hardshrink", (0.25,), lambda x, a=0.5: np.where(np.abs(x) > a, x, 0)),
    ("tanhshrink", (), lambda x: x - np.tanh(x)),
    ("tanh", (), np.tanh),
    ("scaled_tanh", (2.0, 0.5), lambda x, a=1, b=1: a * np.tanh(b * x)),
    ("hard_tanh", (-0.5, 2.0), lambda x, a=-1, b=1: np.clip(x, a, b)),
    ("softsign", (), lambda x: x / (1 + np.abs(x))),
    ("sigmoid", (), sigmoid),
    ("log_sigmoid", (), lambda x: -np.log(1 + np.exp(-x))),
    ("hard_sigmoid", (0.25, 0.25), lambda x, a=0.2, b=0.5: np.clip(a * x + b, 0, 1)),
    ("keras_hard_sigmoid", (), lambda x: np.clip(x / 6 + 0.5, 0, 1)),
    ("softmax", (), softmax),
    ("log_softmax", (), lambda x: np.log(softmax(x))),
]
REFERENCE = {name: equation for name, _, equation in EQUATIONS}
SPECS = [spec for name, numbers, _ in EQUATIONS for spec in ([name, (name, *numbers)] if numbers else [name])]
ELEMENTWISE = [spec for spec in SPECS if spec not in ALONG_FEATURES]
XS = np.concatenate([np.linspace(-8, 8, 33), [0.3, -0.3, 1e-3]]).reshape(4, 9)

every = pytest.mark.parametrize("spec", SPECS, ids=str)


def reference(spec, xs):
    name, *numbers = (spec,) if isinstance(spec, str) else spec
    return REFERENCE[name](xs, *numbers)


def of(framework):
    """The activations that it has, and those that it lacks."""
    return [s for s in SPECS if there(s, framework)], [s for s in SPECS if not there(s, framework)]


def test_every_activation_is_here():
    assert (
        list(REFERENCE)
        == list(ACTIVATIONS)
        == [name for name in ACTIVATIONS if f"        {name} " in activation.__doc__]
    )
    assert KNOWN.keys() == ACTIVATIONS.keys()


@every
def test_values_dtypes_and_gradients(spec):
    dtypes, function = (jnp.float64, jnp.float32, jnp.float16, jnp.bfloat16), activation(spec)
    given = []
    for dtype in dtypes:
        most = 4.0 if spec == "exponential" else float(jnp.finfo(dtype).max) / 8
        at = np.minimum([0.0, -0.0, 20.0, 300.0, -300.0, most, -most], most)
        given.append((jnp.asarray(XS, dtype), jnp.asarray(at[:, None], dtype)))
    both = jax.vmap(jax.value_and_grad(lambda x: function(x)[0]))
    found = jax.jit(lambda given: [(function(xs), *both(at)) for xs, at in given])(given)
    for dtype, (xs, _), (ys, far, slopes) in zip(dtypes, given, found, strict=True):
        assert ys.dtype == slopes.dtype == dtype
        tolerance = 16 * float(jnp.finfo(dtype).eps)
        expected = reference(spec, np.asarray(xs, np.float64))
        np.testing.assert_allclose(np.asarray(ys, np.float64), expected, tolerance, tolerance, err_msg=str(dtype))
        assert jnp.isfinite(far).all(), (dtype, far)
        assert jnp.isfinite(slopes).all(), (dtype, slopes)


def test_softmax_is_over_all_features():
    for name in ALONG_FEATURES:
        for make in (
            lambda fn: Elman(2, 3, fn),
            lambda fn: IndRNN(2, 3, fn),
            lambda fn: SRU(2, 3, fn),
            lambda fn: GRU(2, 3, activation=fn),
            lambda fn: GRU(2, 3, gate_activation=fn),
            lambda fn: LSTM(2, 3, output_activation=(fn,)),
            lambda fn: ConvLSTM((4,), 2, 3, activation=fn),
        ):
            with pytest.raises(ValueError, match=f"activation: expected an elementwise one, got '{name}'; put Apply"):
                make(name)


# Other frameworks: a model of every activation that each has, there and back.


def heads(specs, width=9):
    """A model that ends in all of these."""
    return Stack((Linear(2, width), *map(Apply, specs)))


def drawn(cell):
    return redraw(0, jax.eval_shape(lambda: cell.init(jax.random.key(0), jnp.float32)))


def assert_plain(cell, params, path):
    """It can be saved, printed and pickled."""
    save(path, cell, params)
    assert load(path)[0] == eval(repr(cell), vars(jaxrnn)) == pickle.loads(pickle.dumps(cell)) == cell


def assert_same(converted, cell, path):
    again, params = converted[:2]
    assert again == jax.tree.map(canonical_cell, cell, is_leaf=lambda each: isinstance(each, jaxrnn.Cell))
    assert_plain(again, params, path)


def canonical_cell(cell):
    cells = tuple(Apply(canonical(each.fn)) if isinstance(each, Apply) else each for each in cell.cells)
    return Stack(cells)


def test_jax():
    has, _ = of("jax")
    for spec in has:
        function = function_of(spec)
        assert name_of("here", function) == spec
        assert_close(activation(spec)(XS), function(XS), str(spec))
    assert name_of("here", jax.nn.swish) == "silu"
    assert name_of("here", jax.nn.gelu) == "gelu_tanh"
    assert name_of("here", jax.lax.exp) == "exponential"
    for function in (lambda x: x, jax.nn.glu, jax.tree_util.Partial(jax.nn.elu, alpha=jnp.ones(3)), XS):
        with pytest.raises(ValueError, match=r"here: expected an activation of JAX, one of identity, .*; got "):
            name_of("here", function)


@pytest.mark.parametrize("framework", ["flax", "equinox"])
def test_jaxs_modules(framework, tmp_path):
    peer(framework)
    come, go = (getattr(jaxrnn.convert, f"{way}_{framework}") for way in ("from", "to"))
    has, lacks = of("jax")
    cell = heads(has)
    made = go(cell, drawn(cell))
    assert_same(come(*made) if framework == "flax" else come(made), cell, tmp_path)
    for spec in lacks:
        with pytest.raises(ValueError, match=r"^cell: Apply"):
            go(Apply(spec), ())
    if framework == "flax":
        for spec in (spec for spec in has if spec not in ALONG_FEATURES):
            cell = GRU(2, 3, gate_activation="silu", activation=spec)
            assert come(*go(cell, drawn(cell)))[0] == cell


def test_torch(tmp_path):
    torch = peer("torch")
    has, lacks = of("torch")
    modules = []
    for spec in has:
        name, options = there(spec, "torch")
        module = getattr(torch.nn, name)(**({} if isinstance(spec, str) and spec not in KEYS else options))
        assert_close(activation(spec)(XS), module(torch.tensor(XS)).numpy(), str(spec))
        modules.append(module)
    cell = heads(has)
    module = torch.nn.Sequential(torch.nn.Linear(2, 9), *modules)
    module.load_state_dict(jaxrnn.convert.to_torch(cell, drawn(cell), module=module))
    assert_same(jaxrnn.convert.from_torch(module), cell, tmp_path)
    for spec in lacks:
        with pytest.raises(ValueError, match=r"^cell: Apply.*torch has no module of this function"):
            jaxrnn.convert.to_torch(Apply(spec), ())


# Modules of torch that are this activation only where their options say so.
KEYS = ("gelu_tanh", "softmax", "log_softmax", "thresholded_relu")


def test_keras(tmp_path):
    keras = peer("keras")
    from jaxrnn.convert.keras import from_keras, to_keras

    has, lacks = of("keras")
    cell = heads([*has, ("leaky_relu", 0.2)])
    config, weights = to_keras(cell, drawn(cell))
    with jax.numpy_dtype_promotion("standard"):
        model = keras.Sequential.from_config(config)
        model.set_weights(weights)
        xs = np.asarray(XS, np.float32)
        for each, layer in zip(cell.cells[1:], model.layers[1:], strict=True):
            assert_close(activation(each.fn)(xs), np.asarray(layer(xs)), str(each))
        assert_same(from_keras(model), cell, tmp_path)
        assert from_keras(keras.layers.Softmax()).cell == Apply("softmax")
        with pytest.raises(ValueError, match="axis: expected -1"):
            from_keras(keras.layers.Softmax(1))
        within = keras.layers.SimpleRNN(3, activation=keras.layers.Softmax())
        with pytest.raises(ValueError, match=r"activation: expected one of .*Softmax"):
            from_keras(keras.saving.serialize_keras_object(within), [])
    for spec in (spec for spec in has if spec not in ALONG_FEATURES):
        cell = GRU(2, 3, gate_activation="silu", activation=spec)
        assert from_keras(*to_keras(cell, drawn(cell))).cell == cell
    for spec in lacks:
        with pytest.raises(ValueError, match=r"^cell.cells\[1\]: Apply.*Keras has no activation"):
            to_keras(Stack((Linear(2, 2), Apply(spec))), drawn(Stack((Linear(2, 2), Apply(spec)))))


def onnx_model(*above):
    """An RNN that puts out four times its input, and what is above it, with its params."""
    cell = Stack((Elman(9, 9, ("affine", 4.0, 0.0)), *above))
    eye = np.eye(9, dtype=np.float32)
    return cell, (jaxrnn.ElmanParams(eye, 0 * eye, None), *[()] * len(above))


def test_onnx(tmp_path):
    from jaxrnn.convert.onnx import from_onnx, to_onnx

    runtime = peer("onnxruntime")
    xs = np.asarray(XS / 4, np.float32).reshape(2, 2, 9)
    has = [spec for spec in of("onnx")[0] if KNOWN[spec[0] if isinstance(spec, tuple) else spec].onnx.name not in RNN]
    for spec in has:
        data = to_onnx(*onnx_model(Apply(spec)))
        ys = runtime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(["Y"], {"X": xs})[0]
        assert_close(activation(spec)(4 * xs), ys, str(spec))
    cell, params = onnx_model(*map(Apply, has))
    made = from_onnx(to_onnx(cell, params), output="Y")
    assert_same(made, Stack(tuple(each for each in cell.cells if each != Apply("identity"))), tmp_path)
    for spec in (spec for spec in SPECS if spec not in has):
        with pytest.raises(ValueError, match=r"^cell.cells\[1\]: Apply.*ONNX has no operator"):
            to_onnx(*onnx_model(Apply(spec)))
    cell, params = onnx_model(Apply("celu"))
    with pytest.raises(ValueError, match=r"ONNX's Celu is for tensor\(float\), and the params are float64"):
        to_onnx(cell, jax.tree.map(np.float64, params))


# Names of ONNX that are for recurrent nodes only.
RNN = ("Affine", "ScaledTanh")


@pytest.mark.parametrize("spec", ELEMENTWISE, ids=str)
def test_onnx_recurrent(spec):
    peer("onnx")
    from jaxrnn.convert.onnx import from_onnx, to_onnx

    cell = LSTM(2, 3, gate_activation="keras_hard_sigmoid", activation=spec)
    if KNOWN[spec[0] if isinstance(spec, tuple) else spec].rnn:
        assert from_onnx(to_onnx(cell, drawn(cell)), output="Y")[0] == cell
    else:
        with pytest.raises(ValueError, match=r"^cell: LSTM.*ONNX has no activation"):
            to_onnx(cell, drawn(cell))


def test_products_of_onnx():
    """As torch writes what its operator set has not."""
    onnx = peer("onnx")
    from jaxrnn.convert.onnx import from_onnx, to_onnx

    def converted(*ops, product=lambda x, gate: [x, gate]):
        model = onnx.ModelProto.FromString(to_onnx(*onnx_model()))
        (end,) = [node for node in model.graph.node if list(node.output) == ["Y"]]
        values = [end.input[0], *(f"value_{k}" for k in range(len(ops)))]
        nodes = [
            onnx.helper.make_node(op, [a], [b], **more)
            for (op, more), a, b in zip(ops, values, values[1:], strict=False)
        ]
        nodes.append(onnx.helper.make_node("Mul", product(values[0], values[-1]), ["product"]))
        end.input[0] = "product"
        rest = [node for node in model.graph.node if node is not end]
        at = rest.index(next(node for node in rest if values[0] in node.output)) + 1
        nodes = [*rest[:at], *nodes, *rest[at:], end]
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del model.graph.node[:]
        model.graph.node.extend(kept)
        return from_onnx(model, output="Y")[0].cells[1:]

    sigmoid, softplus, tanh = ("Sigmoid", {}), ("Softplus", {}), ("Tanh", {})
    assert converted(sigmoid) == (Apply("silu"),)
    assert converted(sigmoid, product=lambda x, gate: [gate, x]) == (Apply("silu"),)
    assert converted(softplus, tanh) == (Apply("mish"),)
    assert converted(("HardSigmoid", {"alpha": 1 / 6})) == (Apply("hard_silu"),)
    for ops in ((tanh,), (tanh, softplus), (tanh, sigmoid, sigmoid)):
        with pytest.raises(ValueError, match="multiplies two values that depend on the inputs"):
            converted(*ops)
