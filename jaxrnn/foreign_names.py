"""The words of other frameworks, and what they are called here."""

from __future__ import annotations

LAYERS = {
    "Activation": "Apply",
    "BiLSTM": "Bidirectional(LSTM(...), LSTM(...))",
    "ConvLSTM1D": "ConvLSTM",
    "ConvLSTM2D": "ConvLSTM",
    "ConvLSTM3D": "ConvLSTM",
    "ConvLSTMCell": "ConvLSTM",
    "DeepRNN": "Stack",
    "Dense": "Linear",
    "Embedding": "Embed",
    "GRUCell": "GRU",
    "GlobalAveragePooling1D": 'Pool(cell, "mean")',
    "GlobalMaxPooling1D": 'Pool(cell, "max")',
    "LSTMCell": "LSTM",
    "Lambda": "Apply",
    "LayerNormalization": "LayerNorm",
    "MGUCell": "MGU",
    "Masking": "the argument mask of jaxrnn.scan and of jaxrnn.training.Batch",
    "OptimizedLSTMCell": "LSTM",
    "RNN": "Elman for torch's layer, and jaxrnn.scan(cell, ...) for Keras' and Flax's",
    "RNNCell": "Elman",
    "RepeatVector": "Repeat",
    "ResidualWrapper": "Residual",
    "Sequential": "Stack",
    "SimpleCell": "Elman",
    "SimpleRNN": "Elman",
    "SimpleRNNCell": "Elman",
    "SpatialDropout1D": "Dropout(rate, per_sequence=True)",
    "StackedRNNCells": "Stack",
    "TimeDistributed": "the layer itself: Linear, Apply and all other layers act on every step",
    "VanillaRNN": "Elman",
    "dynamic_unroll": "scan",
    "static_unroll": "scan",
}

METHODS = {
    "apply": "jaxrnn.scan(cell, params, None, xs)",
    "compile": "jaxrnn.training.train(cell, data, error, metrics=..., optimizer=...)",
    "evaluate": "jaxrnn.training.evaluate(loss, params, data)",
    "fit": "jaxrnn.training.train(cell, data, error), or jaxrnn.training.fit for every piece of it",
    "get_weights": "the params that cell.init(key) returns: a cell holds none",
    "initialize_carry": "cell.initial_carry(params, batch_shape); as a Flax module, jaxrnn.linen.RNN(cell)",
    "load_state_dict": "jaxrnn.convert.from_torch(state_dict), or jaxrnn.training.load(path)",
    "load_weights": "jaxrnn.training.load(path)",
    "num_feature_axes": "cell.input_ndim; as a Flax module, jaxrnn.linen.RNN(cell)",
    "parameters": "the params that cell.init(key) returns: a cell holds none",
    "predict": "jaxrnn.training.predict(cell, params, xs)",
    "save": "jaxrnn.training.save(path, cell, params)",
    "save_weights": "jaxrnn.training.save(path, cell, params)",
    "set_weights": "params as an argument of jaxrnn.scan: a cell holds none",
    "state_dict": "jaxrnn.convert.to_torch(cell, params), or jaxrnn.training.save(path, cell, params)",
    "summary": "jaxrnn.summary(cell)",
    "unroll": "jaxrnn.scan(cell, params, None, xs)",
    "variables": "the params that cell.init(key) returns: a cell holds none",
}

ARGUMENTS = {
    "batch_first": "jaxrnn.scan(..., time_axis=1) reads batch-major arrays",
    "bias": "a bias that is None in the params is absent: params._replace(b=None)",
    "bidirectional": "Bidirectional(cell, cell)",
    "dropout": "a Dropout layer in the Stack, or RecurrentDropout(cell, rate)",
    "features": "input_size and hidden_size",
    "go_backwards": "Backward(cell), or jaxrnn.scan(..., reverse=True)",
    "in_features": "input_size",
    "input_shape": "input_size, the first argument",
    "num_layers": "Stack(cell, cell, ...)",
    "num_units": "hidden_size",
    "out_features": "output_size",
    "recurrent_dropout": "RecurrentDropout(cell, rate)",
    "return_sequences": "jaxrnn.scan returns all outputs, and Pool(cell) puts out the last one alone",
    "return_state": "jaxrnn.scan always returns the final carry",
    "reverse": "jaxrnn.scan(..., reverse=True), or Backward(cell)",
    "stateful": "the carry that jaxrnn.scan returns is an argument of the next call",
    "time_major": "time comes first in jaxrnn.scan, or where time_axis says",
    "units": "hidden_size, after input_size",
    "use_bias": "a bias that is None in the params is absent: params._replace(b=None)",
}


def layer_hint(name: str) -> str:
    """The message for a layer that is looked for in `jaxrnn` by another framework's name."""
    hint = f"; it is called {LAYERS[name]} here" if name in LAYERS else ""
    return f"module 'jaxrnn' has no attribute {name!r}{hint}"


def method_hint(owner: str, name: str) -> str:
    """The message for an attribute that a cell has not."""
    hint = f": a cell is a value without params; use {METHODS[name]}" if name in METHODS else ""
    return f"{owner!r} object has no attribute {name!r}{hint}"
