"""ONNX: one recurrent node of a model, data in files beside it, heads of one feature, and torch's exporters."""

import contextlib
import io
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from conversion import assert_close, peer, redraw
from onnx_models import around, compiled, drawn, integers, lstm_arrays, make, proto, runtime

from jaxrnn import LSTM, Elman, LearnedCarry, LSTMCarry
from jaxrnn.convert.onnx import from_onnx, to_onnx

# Some frameworks do not run under strict promotion.
PROMOTION = "standard"


@pytest.fixture
def onnx():
    return peer("onnx")


def same(found, expected):
    assert found[0] == expected[0]
    assert_close(found[1], expected[1])


# One recurrent node.


def subgraph(*nodes, outputs, inputs=(), initializers=()):
    """A graph for If, Loop or Scan. inputs: names, or (name, element type, shape)."""
    from onnx import helper, numpy_helper

    return helper.make_graph(
        nodes,
        "inside",
        [helper.make_tensor_value_info(*each) for each in inputs],
        [helper.make_tensor_value_info(name, 1, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in dict(initializers).items()],
    )


def unnamed(model):
    """The bytes of the model without the names of nodes, which onnxruntime wants to differ."""
    for node in model.graph.node:
        node.name = ""
    return model.SerializeToString()


def constant(name, array):
    from onnx import numpy_helper

    return make("Constant", [], [name], value=numpy_helper.from_array(array))


def named(node, name):
    node.name = name
    return node


def deep():
    """A model with an LSTM between convolutions and recurrent nodes in an If, and in a Scan in a Loop."""
    arrays = lstm_arrays() | {"kernel": np.ones((2, 2, 1), np.float32), "turned": lstm_arrays(gates=3)["R"].mT.copy()}
    gru, rnn = lstm_arrays(gates=3), lstm_arrays(gates=1)
    inner = subgraph(
        make("RNN", ["step", "rnn_w", "rnn_r"], ["rnn_y"], clip=0.5),
        outputs=["rnn_y"],
        inputs=[("step", 1, None)],
        initializers={"rnn_w": rnn["W"]},
    )
    body = subgraph(
        constant("rnn_r", rnn["R"]),
        make("Identity", ["go"], ["go_on"]),
        make("Scan", ["slices"], ["scanned"], body=inner, num_scan_inputs=1),
        outputs=["go_on", "scanned"],
        inputs=[("k", 7, []), ("go", 9, [])],
    )
    branch = subgraph(
        constant("gru_w", gru["W"]),
        make("Identity", ["gru_w"], ["shared_w"]),
        make("Transpose", ["turned"], ["gru_r"], perm=[0, 2, 1]),
        named(make("GRU", ["features", "shared_w", "gru_r", "", "", "start"], ["", "gru_h"]), ""),
        outputs=["gru_h"],
    )
    other = subgraph(
        named(make("LSTM", ["features", "W", "R", "", "", "zeros", "zeros"], ["lstm_y"]), "lstm"), outputs=["lstm_y"]
    )
    nodes = [
        make("Conv", ["audio", "kernel"], ["filtered"]),
        make("Transpose", ["filtered"], ["features"], perm=[2, 0, 1]),
        make("Shape", ["features"], ["shape"]),
        make("Slice", ["shape", "one", "two"], ["batch"]),
        make("Concat", ["one", "batch", "three"], ["of_states"], axis=0),
        make("Expand", ["zero", "of_states"], ["zeros"]),
        make("Expand", ["half", "of_states"], ["start"]),
        named(make("LSTM", ["features", "W", "R", "", "", "zeros", "zeros"], ["top_y"]), "top"),
        named(make("If", ["flag"], ["chosen"], then_branch=branch, else_branch=other), "choice"),
        make("Loop", ["", "flag"], ["looped"], body=body),
        make("Sigmoid", ["top_y"], ["probabilities"]),
    ]
    constants = {"one": integers(1), "two": integers(2), "three": integers(3)}
    constants |= {"zero": np.zeros(1, np.float32), "half": np.full(1, 0.5, np.float32)}
    inputs = {"audio": (np.float32, ("B", 2, "T")), "flag": (bool, ()), "slices": (np.float32, (9, "T", "B", 2))}
    return proto(nodes, inputs, ["probabilities", "chosen", "looped"], arrays | constants)


def single(op, **attributes):
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    return from_onnx(make(op, ["X", "W", "R"], ["Y"], **attributes), initializers=lstm_arrays(gates=gates))


@pytest.mark.parametrize("name", ["top", "top_y", "lstm", "lstm_y", "choice/lstm", "choice/lstm_y"])
def test_node(name, onnx):
    """States that are zeros of the shape of X are none, and two states may have one source."""
    same(from_onnx(deep(), node=name), single("LSTM"))


def test_node_of_subgraph(onnx):
    """Weights come from the graphs around, and through Identity and Transpose; a constant state is learned."""
    cell, params = from_onnx(deep(), node="gru_h")
    expected = single("GRU")
    assert cell == LearnedCarry(expected[0])
    assert_close(params.cell, expected[1])
    assert_close(params.carry.h, np.full(3, 0.5, np.float32))
    same(from_onnx(deep(), node="a_Loop/a_Scan/a_RNN"), single("RNN", clip=0.5))


def test_node_with_inputs(onnx):
    """A state that is made from an input is an argument of scan, as lengths are."""
    nodes = [
        make("Conv", ["X", "kernel"], ["x"]),
        make("MatMul", ["v", "turn"], ["h"]),
        make("LSTM", ["x", "W", "R", "", "n", "h", "h"], ["Y"]),
    ]
    arrays = lstm_arrays() | {"kernel": np.ones((2, 2, 1), np.float32), "turn": np.ones((4, 3), np.float32)}
    inputs = {"X": (np.float32, ("T", 2, 2)), "v": (np.float32, (1, "B", 4)), "n": (np.int32, ("B",))}
    same(from_onnx(proto(nodes, inputs, ["Y"], arrays), node="a_LSTM"), single("LSTM"))


def test_node_that_is_not_there(onnx):
    with pytest.raises(ValueError, match=r"node: expected .*\('top', 'lstm', 'gru_h', 'a_RNN'\), got 'a_Conv'"):
        from_onnx(deep(), node="a_Conv")
    twice = around(make("LSTM", ["X", "W", "R"], ["other"]), outputs=["Y", "other"])
    with pytest.raises(ValueError, match=r"\('Y', 'other'\), got 'a_LSTM'"):
        from_onnx(twice, node="a_LSTM")
    same(from_onnx(twice, node="other"), single("LSTM"))
    with pytest.raises(ValueError, match="there is none"):
        from_onnx(proto([make("Relu", ["X"], ["Z"])], {"X": (np.float32, (1, 2, 3))}, ["Z"]), node="lstm")
    with pytest.raises(ValueError, match="output: expected None beside node='other'"):
        from_onnx(twice, node="other", output="Y")
    with pytest.raises(TypeError, match=r"node: only for a whole model, got an onnx\.NodeProto"):
        from_onnx(make("LSTM", ["X", "W", "R"], ["Y"]), initializers=lstm_arrays(), node="a_LSTM")


def test_weights_that_are_no_constants(onnx):
    model = proto(
        [make("Relu", ["V"], ["w"]), make("LSTM", ["X", "w", "R"], ["Y"])],
        {"X": (np.float32, ("T", "B", 2)), "V": (np.float32, (1, 12, 2))},
        ["Y"],
        {"R": lstm_arrays()["R"]},
    )
    with pytest.raises(ValueError, match="W depends on the inputs"):
        from_onnx(model, node="a_LSTM")


def test_what_can_be_taken(onnx):
    """Where the whole cannot be converted, what can, and what stands around it."""
    hint = "'top', 'lstm', 'gru_h', 'a_RNN'; before them stand Conv, after them Sigmoid$"
    with pytest.raises(ValueError, match=rf"(?s)onnx: node .*Recurrent nodes that node= can take: {hint}"):
        from_onnx(deep())
    broken = around(make("Conv", ["Y", "W"], ["Z"]), initializers={"R": np.full((1, 12, 3), np.nan, np.float32)})
    with pytest.raises(ValueError, match=r"R: expected finite numbers, got NaN or infinity$"):
        from_onnx(broken)


def test_state_of_two_nodes(onnx):
    """One input as both states of two layers: each state of the carry is that input."""
    arrays = lstm_arrays(size=3) | {"one": integers(1)}
    nodes = [
        make("LSTM", ["X", "W", "R", "", "", "h", "h"], ["below"], hidden_size=3),
        make("Squeeze", ["below", "one"], ["x"]),
        make("LSTM", ["x", "W", "R", "", "", "h", "h"], ["Y"], hidden_size=3),
    ]
    model = proto(nodes, {"X": (np.float32, ("T", "B", 3)), "h": (np.float32, (1, "B", 3))}, ["Y"], arrays)
    xs, h = redraw(0, (jnp.zeros((4, 2, 3)), jnp.zeros((1, 2, 3))), 1.0)
    carry = LSTMCarry(h[0], h[0])
    _, ys = compiled(*from_onnx(model), (carry, carry), xs)
    assert_close(ys, runtime(unnamed(model), {"X": xs, "h": h})["Y"][:, 0])


def test_batch_of_the_file(onnx):
    """A state that is made for the batch of the exported example, and broadcast to that of X."""
    nodes = [
        make("Conv", ["audio", "kernel"], ["x"]),
        make("Shape", ["x"], ["shape"]),
        make("Slice", ["shape", "one", "two"], ["batch"]),
        make("Concat", ["one", "batch", "three"], ["of_states"], axis=0),
        make("Expand", ["zeros", "of_states"], ["h"]),
        make("GRU", ["x", "W", "R", "", "", "h"], ["Y"]),
    ]
    arrays = lstm_arrays(gates=3) | {"kernel": np.ones((2, 2, 1), np.float32)}
    arrays |= {"one": integers(1), "two": integers(2), "three": integers(3), "zeros": np.zeros((1, 2, 3), np.float32)}
    model = proto(nodes, {"audio": (np.float32, ("T", 2, 2))}, ["Y"], arrays)
    same(from_onnx(model, node="a_GRU"), single("GRU"))


# Data in other files.


@pytest.fixture
def beside(onnx, tmp_path):
    """The path of a model whose tensors, those of attributes too, are in a file beside it."""
    model = around(constant("k", np.array(-1)), make("Gather", ["Y", "k"], ["Z"], axis=0))
    path = tmp_path / "model.onnx"
    onnx.save(
        model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0, convert_attribute=True
    )
    return path


def test_data_beside(onnx, beside):
    model = onnx.load(beside, load_external_data=False)
    tensors = [*model.graph.initializer, model.graph.node[1].attribute[0].t]
    assert [tensor.data_location for tensor in tensors] == [1, 1, 1]
    expected = from_onnx(onnx.load(beside))
    same(from_onnx(beside), expected)
    same(from_onnx(str(beside), node="a_LSTM"), single("LSTM"))
    for unread in (model, beside.read_bytes()):
        with pytest.raises(ValueError, match=r"'model\.onnx\.data', .* given by its path; or .* onnx\.load\(path\)"):
            from_onnx(unread)


def test_data_of_any_dtype(onnx, tmp_path):
    import ml_dtypes

    for dtype in (np.float16, ml_dtypes.bfloat16):
        arrays = {name: array.astype(dtype) for name, array in lstm_arrays().items()}
        model = proto([make("LSTM", ["X", "W", "R"], ["Y"])], {"X": (np.float32, ("T", "B", 2))}, ["Y"], arrays)
        model.graph.input[0].type.tensor_type.elem_type = model.graph.initializer[0].data_type
        expected = from_onnx(model)
        onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, size_threshold=0)
        same(from_onnx(tmp_path / "model.onnx"), expected)


def test_data_that_are_folded(onnx, tmp_path):
    """How much folding may make is in proportion to the data in all files."""
    rows = np.zeros((1, 320, 160), np.float32)
    arrays = lstm_arrays(160) | {"above": rows, "below": rows}
    nodes = [make("Concat", ["above", "below"], ["r"], axis=1), make("LSTM", ["X", "W", "r"], ["Y"])]
    model = proto(nodes, {"X": (np.float32, ("T", "B", 2))}, ["Y"], arrays)
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, size_threshold=0)
    for node in (None, "a_LSTM"):
        assert from_onnx(tmp_path / "model.onnx", node=node)[0] == LSTM(2, 160)


def entry(name, value):
    """Puts a value in W's external data."""

    def change(tensor, path):
        for each in list(tensor.external_data):
            if each.key == name:
                tensor.external_data.remove(each)
        tensor.external_data.add(key=name, value=value)

    return change


def moved(tensor, path):
    data = path.with_name("model.onnx.data")
    data.rename(path.parent.parent / "elsewhere")
    data.symlink_to(path.parent.parent / "elsewhere")


# name: (the message, the change of W's tensor or of the files)
UNREADABLE = {
    "absolute": ("within the folder", lambda tensor, path: entry("location", str(path))(tensor, path)),
    "parent": ("within the folder", entry("location", "../model.onnx.data")),
    "parent inside": ("within the folder", entry("location", "inside/../model.onnx.data")),
    "drive": ("within the folder", entry("location", "c:\\model.onnx.data")),
    "backslash": ("within the folder", entry("location", "..\\model.onnx.data")),
    "zero byte": ("within the folder", entry("location", "model\0")),
    "empty": ("within the folder", entry("location", "")),
    "folder": ("within the folder|no such file", entry("location", ".")),
    "symlink": ("within the folder", moved),
    "missing": ("no such file", entry("location", "other.data")),
    "negative offset": ("offset: expected a number of bytes, got '-4'", entry("offset", "-4")),
    "huge offset": ("offset: expected a number", entry("offset", "9" * 30)),
    "offset": (r"expected bytes 100000 to 100096 of 'model.onnx.data', which has", entry("offset", "100000")),
    "length": (r"takes 96 bytes, and there are 92", entry("length", "92")),
    "text": ("length: expected a number", entry("length", "many")),
    "dims": ("and there are 96", lambda tensor, path: tensor.dims.append(2**40)),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_data_that_are_not_read(name, onnx, beside):
    message, change = UNREADABLE[name]
    model = onnx.load(beside, load_external_data=False)
    (tensor,) = (each for each in model.graph.initializer if each.name == "W")
    change(tensor, beside)
    beside.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=message):
        from_onnx(beside)


# Heads of one feature.

# name: the nodes that drop the axis of features (T, B, 1) of `top`, and what acts above.
HEADS = {
    "squeeze": [("Squeeze", ["top", "last"], ["Z"], {})],
    "squeeze, activation": [("Squeeze", ["top", "last"], ["s"], {}), ("Sigmoid", ["s"], ["Z"], {})],
    "entry": [("Gather", ["top", "zero"], ["Z"], {"axis": 2})],
    "last entry": [("Gather", ["top", "minus"], ["Z"], {"axis": -1})],
    "reshape": [("Reshape", ["top", "shape"], ["Z"], {})],
    "mean": [("Squeeze", ["top", "last"], ["s"], {}), ("ReduceMean", ["s", "time"], ["Z"], {"keepdims": 0})],
    "last step": [("Squeeze", ["top", "last"], ["s"], {}), ("Gather", ["s", "minus"], ["Z"], {"axis": 0})],
}


def one_feature(nodes, hidden=3):
    """A model of an LSTM with a head of one feature."""
    arrays = lstm_arrays(hidden) | {"one": integers(1), "last": integers(-1), "shape": integers(0, -1)}
    arrays |= {"zero": np.array(0), "minus": np.array(-1), "time": integers(0), "w": np.full((3, 1), 0.5, np.float32)}
    first = [
        make("LSTM", ["X", "W", "R"], ["Y"], hidden_size=hidden),
        make("Squeeze", ["Y", "one"], ["y" if hidden > 1 else "top"]),
        *([make("MatMul", ["y", "w"], ["top"])] if hidden > 1 else []),
    ]
    above = [make(op, inputs, outputs, **attributes) for op, inputs, outputs, attributes in nodes]
    return proto([*first, *above], {"X": (np.float32, ("T", "B", 2))}, ["Z"], arrays)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("hidden", [3, 1])
def test_one_feature(name, hidden, onnx):
    """ys keep the axis of features that the model drops."""
    model = one_feature(HEADS[name], hidden)
    xs = redraw(0, np.zeros((4, 2, 2), np.float32), 1.0)
    _, ys = compiled(*from_onnx(model), None, xs)
    assert_close(ys, runtime(unnamed(model), {"X": xs})["Z"][..., None])


# What acts on features cannot act on what has none.
WRONG = {
    "softmax of the batch": [*HEADS["squeeze"], ("Softmax", ["Z"], ["P"], {})],
    "two features": [("Squeeze", ["y", "last"], ["P"], {})],
    "an entry of three": [("Gather", ["y", "zero"], ["P"], {"axis": 2})],
    "all as one": [("Reshape", ["top", "last"], ["P"], {})],
}


@pytest.mark.parametrize("name", WRONG)
def test_no_features(name, onnx):
    model = one_feature(WRONG[name])
    model.graph.output[0].name = "P"
    with pytest.raises(ValueError, match="onnx: node"):
        from_onnx(model)


# Options that ONNX has.

OPTIONS = [
    Elman(2, 3, gate_clip=0.5),
    Elman(2, 3, "relu", gate_clip=0.25),
    LSTM(2, 3, coupled="input"),
    LSTM(2, 3, coupled="input", gate_activation="tanh", peephole=True),
    LSTM(2, 3, coupled="input", gate_activation=("hard_sigmoid", 0.5, 0.25), gate_clip=0.5, peephole=True),
]


@pytest.mark.parametrize("cell", OPTIONS, ids=str)
def test_options(cell, onnx):
    params, xs = drawn(cell), redraw(1, np.zeros((5, 2, 2), np.float32), 1.0)
    data = to_onnx(cell, params)
    same(from_onnx(data, output="Y"), (cell, params))
    assert_close(compiled(cell, params, None, xs)[1], runtime(data, {"X": xs})["Y"])


def test_coupled_both_ways(onnx):
    """i = 1 − f with sigmoids goes out as f = 1 − i, the gates negated, and comes back as that."""
    cell = LSTM(2, 3, coupled=True, peephole=True)
    params, xs = drawn(cell), redraw(1, np.zeros((5, 2, 2), np.float32), 1.0)
    again, same_params = from_onnx(to_onnx(cell, params), output="Y")
    assert again == LSTM(2, 3, coupled="input", peephole=True)
    assert_close(compiled(again, same_params, None, xs)[1], compiled(cell, params, None, xs)[1])


# What torch's exporters write. Its default one puts weights in a file beside the model.


def torch_models(torch):
    """name: (a module of x (2, 5, 3), the cell)."""
    nn = torch.nn

    class Network(nn.Module):
        def __init__(self, rnn, forward, **more):
            super().__init__()
            self.rnn, self.run = rnn, forward
            for name, module in more.items():
                self.add_module(name, module)

        def forward(self, *given):
            return self.run(self, *given)

    def lstm(**options):
        return nn.LSTM(3, 4, batch_first=True, **options)

    def regression(self, x):
        h = torch.zeros(1, len(x), 4)
        return self.head(self.rnn(x, (h, h))[0][:, -1]).squeeze(-1)

    def packed(self, x, n):
        xs = nn.utils.rnn.pack_padded_sequence(x, n, batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.rnn(xs)[0], batch_first=True)[0]

    return {
        "regression": Network(lstm(), regression, head=nn.Linear(4, 1)),
        "stacked": Network(lstm(num_layers=2, bidirectional=True), lambda self, x: self.rnn(x)[0]),
        "convolution": Network(
            lstm(),
            lambda self, x: self.head(self.rnn(self.conv(x.transpose(1, 2)).relu().transpose(1, 2))[0]),
            conv=nn.Conv1d(3, 3, 3, padding=1),
            head=nn.Linear(4, 2),
        ),
        "packed": Network(lstm(), packed),
    }


def torch_export(torch, model, given, path, **options):
    """A file that an exporter of torch wrote, which tells much on the way."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(model.eval(), given, path, verbose=False, **options)
    return path


both_exporters = pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.full)])


@pytest.fixture
def torch(onnx):
    module = peer("torch")
    module.set_num_threads(1)
    module.manual_seed(0)
    return module


@pytest.mark.parametrize("name", ["regression", "stacked", "packed"])
@both_exporters
def test_torch_model(name, dynamo, torch, tmp_path):
    """Both exporters, with states that are one array of zeros, and with packed sequences."""
    if dynamo and name == "packed":
        pytest.skip("torch.export has no packed sequences")
    if dynamo:
        peer("onnxscript")
    model, x = torch_models(torch)[name], torch.randn(2, 5, 3)
    lengths = (torch.tensor([5, 3]),) if name == "packed" else ()
    path = torch_export(torch, model, (x, *lengths), tmp_path / "model.onnx", dynamo=dynamo)
    assert path.with_name("model.onnx.data").exists() == dynamo
    expected = model(x, *lengths).detach().numpy()
    given = np.array([5, 3]) if lengths else None
    _, ys = compiled(*from_onnx(path), None, x.numpy(), lengths=given, time_axis=1)
    assert_close(ys, expected[..., None] if name == "regression" else expected)


@both_exporters
def test_torch_node(dynamo, torch, tmp_path):
    """The LSTM between a convolution and a head."""
    if dynamo:
        peer("onnxscript")
    model, x = torch_models(torch)["convolution"], torch.randn(2, 5, 3)
    path = torch_export(torch, model, (x,), tmp_path / "model.onnx", dynamo=dynamo)
    with pytest.raises(ValueError, match="before them stand Conv, Relu, after them MatMul, Add") as error:
        from_onnx(path)
    name = str(error.value).split("can take: '")[1].split("'")[0]
    between = model.conv(x.transpose(1, 2)).relu().transpose(1, 2)
    _, ys = compiled(*from_onnx(path, node=name), None, between.detach().numpy(), time_axis=1)
    assert_close(ys, model.rnn(between)[0].detach().numpy())
