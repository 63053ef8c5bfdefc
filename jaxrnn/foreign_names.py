"""The words of other frameworks, and what they are called here."""

from __future__ import annotations

import importlib
from collections.abc import Collection

from jaxrnn.typing import Foreign

_ELMAN = "Elman"
_APPLY = 'Apply("{}")'
_PADDING = "jaxrnn.training.pad, and the argument lengths of jaxrnn.scan and of jaxrnn.training.Batch"
_WITHOUT_BIAS = "where the params have a bias, params._replace(b=None) leaves it out"
_BOTH_WAYS = "Bidirectional(cell, cell)"
_OPTIMIZER = "an optimizer of Optax, such as optax.adam(1e-3)"

# Of `jaxrnn` and of `jaxrnn.training`.
NAMES = {
    "Activation": "Apply",
    "Adam": _OPTIMIZER,
    "Add": "Residual(cell), or Parallel",
    "BCELoss": "jaxrnn.training.binary_cross_entropy, of logits",
    "BCEWithLogitsLoss": "jaxrnn.training.binary_cross_entropy",
    "BatchNorm": "LayerNorm",
    "BatchNorm1d": "LayerNorm",
    "BatchNormalization": "LayerNorm",
    "BiGRU": "Bidirectional(GRU(...), GRU(...))",
    "BiLSTM": "Bidirectional(LSTM(...), LSTM(...))",
    "Concatenate": "Parallel",
    "Conv1D": "CausalConv",
    "Conv1d": "CausalConv",
    "ConvLSTM1D": "ConvLSTM",
    "ConvLSTM2D": "ConvLSTM",
    "ConvLSTM3D": "ConvLSTM",
    "ConvLSTMCell": "ConvLSTM",
    "CrossEntropyLoss": "jaxrnn.training.cross_entropy",
    "CuDNNGRU": "GRU, which takes the compiled kernels by itself",
    "CuDNNLSTM": "LSTM, which takes the compiled kernels by itself",
    "DataLoader": "jaxrnn.training.Arrays, or torch's own, which fit takes as it is",
    "DeepRNN": "Stack",
    "Dense": "Linear",
    "DropoutWrapper": "Dropout in a Stack, or RecurrentDropout(cell, rate)",
    "EarlyStopping": "validation=jaxrnn.training.Validation(data, patience=...) of fit",
    "Embedding": "Embed",
    "GRUCell": "GRU",
    "GlobalAveragePooling1D": 'Pool(cell, "mean")',
    "GlobalMaxPooling1D": 'Pool(cell, "max")',
    "Identity": 'Apply("identity")',
    "Input": "the input_size of the first layer",
    "KimiDeltaAttention": "kda_block, and KDA for the recurrence alone",
    "L1Loss": "jaxrnn.training.absolute_error",
    "LSTMCell": "LSTM",
    "Lambda": "Apply",
    "LayerNormalization": "LayerNorm",
    "MGUCell": "MGU",
    "MSELoss": "jaxrnn.training.squared_error",
    "DeltaProduct": "DeltaNet(..., products=2)",
    "GatedDeltaProduct": "GatedDeltaNet(..., products=2)",
    "Mamba": "mamba_block",
    "Mamba2Mixer": "mamba2_block, and Mamba2 for the recurrence alone",
    "MultiScaleRetention": "RetNet",
    "Masking": "the argument mask of jaxrnn.scan and of jaxrnn.training.Batch",
    "Model": "Stack, or a cell of your own: a subclass of jaxrnn.Cell",
    "ModelCheckpoint": "checkpoints= of jaxrnn.training.fit",
    "Module": "a cell of your own: a subclass of jaxrnn.Cell",
    "MultiRNNCell": "Stack",
    "NLLLoss": "jaxrnn.training.cross_entropy, of logits",
    "OptimizedLSTMCell": "LSTM",
    "RMSprop": _OPTIMIZER,
    "RNN": "Elman for torch's layer, and jaxrnn.scan(cell, ...) for Keras' and Flax's",
    "RNNCell": _ELMAN,
    "RNNCellBase": "Cell",
    "ReLU": _APPLY.format("relu"),
    "RepeatVector": "Repeat",
    "ResidualWrapper": "Residual",
    "SGD": _OPTIMIZER,
    "Sequential": "Stack",
    "Sigmoid": _APPLY.format("sigmoid"),
    "SimpleCell": _ELMAN,
    "SimpleRNN": _ELMAN,
    "SimpleRNNCell": _ELMAN,
    "Softmax": _APPLY.format("softmax"),
    "SpatialDropout1D": "Dropout(rate, per_sequence=True)",
    "StackedRNNCells": "Stack",
    "StandardScaler": "jaxrnn.training.Scaler",
    "Tanh": _APPLY.format("tanh"),
    "TimeDistributed": "the layer itself, since Linear, Apply and all other layers act on every step",
    "VanillaRNN": _ELMAN,
    "bce": "jaxrnn.training.binary_cross_entropy",
    "binary_crossentropy": "jaxrnn.training.binary_cross_entropy",
    "categorical_crossentropy": "jaxrnn.training.cross_entropy",
    "dynamic_rnn": "jaxrnn.scan",
    "dynamic_unroll": "jaxrnn.scan",
    "load_model": "jaxrnn.training.load, or jaxrnn.convert.from_keras",
    "mae": "jaxrnn.training.absolute_error",
    "mean_absolute_error": "jaxrnn.training.absolute_error",
    "mean_squared_error": "jaxrnn.training.squared_error",
    "mse": "jaxrnn.training.squared_error",
    "nn": "the package itself: jaxrnn.LSTM, jaxrnn.Linear, ...",
    "pack_padded_sequence": _PADDING,
    "pad_packed_sequence": "jaxrnn.training.unpad",
    "pad_sequence": _PADDING,
    "pad_sequences": _PADDING,
    "sparse_categorical_crossentropy": "jaxrnn.training.cross_entropy",
    "static_unroll": "jaxrnn.scan",
    "mLSTM": "MLSTM",
    "sLSTM": "SLSTM",
    "xLSTM": "mlstm_block and slstm_block",
}

_NO_PARAMS = "the params that cell.init(key) returns, since a cell holds none"
_NO_MODE = "noise is on where jaxrnn.scan gets a key, and off where it does not"
_SCAN = "jaxrnn.scan(cell, params, None, xs)"

METHODS = {
    "add": "Stack(layer, layer, ...)",
    "apply": _SCAN,
    "build": "cell.init(key), which returns the params",
    "call": _SCAN,
    "compile": "jaxrnn.training.train(cell, data, error, metrics=..., optimizer=...)",
    "count_params": "jaxrnn.summary(cell).count",
    "cpu": "jax.device_put(params, device)",
    "cuda": "jax.device_put(params, device)",
    "eval": _NO_MODE,
    "evaluate": "jaxrnn.training.evaluate(loss, params, data)",
    "fit": "jaxrnn.training.train(cell, data, error), or jaxrnn.training.fit for every piece of it",
    "forward": _SCAN,
    "get_initial_state": "cell.initial_carry(params, batch_shape)",
    "get_weights": _NO_PARAMS,
    "initialize_carry": (
        "cell.initial_carry(params, batch_shape); as a Flax module, jaxrnn.linen.RNN(cell) or jaxrnn.nnx.RNN(cell)"
    ),
    "layers": "cell.cells",
    "load_state_dict": "jaxrnn.convert.from_torch(state_dict), or jaxrnn.training.load(path)",
    "load_weights": "jaxrnn.training.load(path)",
    "named_parameters": _NO_PARAMS,
    "num_feature_axes": "cell.input_ndim; as a Flax module, jaxrnn.linen.RNN(cell) or jaxrnn.nnx.RNN(cell)",
    "parameters": _NO_PARAMS,
    "predict": "jaxrnn.training.predict(cell, params, xs)",
    "reset_states": "None as the carry of jaxrnn.scan, or its argument reset",
    "save": "jaxrnn.training.save(path, cell, params)",
    "save_weights": "jaxrnn.training.save(path, cell, params)",
    "set_weights": "params as an argument of jaxrnn.scan, since a cell holds none",
    "state_dict": "jaxrnn.convert.to_torch(cell, params), or jaxrnn.training.save(path, cell, params)",
    "summary": "jaxrnn.summary(cell)",
    "to": "jax.device_put(params, device)",
    "train": f"jaxrnn.training.train(cell, data, error); {_NO_MODE}",
    "train_on_batch": "jaxrnn.training.make_step(loss, optimizer)",
    "trainable_variables": _NO_PARAMS,
    "unroll": _SCAN,
    "variables": _NO_PARAMS,
    "weights": _NO_PARAMS,
    "zero_grad": "jax.grad, which returns new gradients at every call",
}

# Fields that may hold what another framework's argument holds; the first that a cell has is meant.
_FIELDS: dict[str, tuple[str, ...]] = {
    "dim": ("hidden_size", "output_size", "input_size"),
    "embedding_dim": ("output_size",),
    "eps": ("epsilon",),
    "features": ("hidden_size", "output_size"),
    "hidden_dim": ("hidden_size",),
    "in_features": ("input_size",),
    "input_dim": ("vocabulary", "input_size"),
    "layers": ("cells",),
    "merge_mode": ("merge",),
    "nonlinearity": ("activation",),
    "num_embeddings": ("vocabulary",),
    "num_proj": ("projection",),
    "num_units": ("hidden_size", "output_size"),
    "out_features": ("output_size", "hidden_size"),
    "output_dim": ("output_size", "hidden_size"),
    "p": ("rate",),
    "proj_size": ("projection",),
    "recurrent_activation": ("gate_activation",),
    "use_bias": ("bias",),
    "units": ("hidden_size", "output_size"),
}

# Of cells and of `scan`.
ARGUMENTS = {
    "activation": "Apply(name) above it in the Stack",
    "batch_first": "jaxrnn.scan(..., time_axis=1) reads batch-major arrays",
    "bias": _WITHOUT_BIAS,
    "bidirectional": _BOTH_WAYS,
    "device": "jax.device_put(params, device)",
    "dropout": "a Dropout layer in the Stack, or RecurrentDropout(cell, rate)",
    "dtype": "cell.init(key, dtype)",
    "forget_bias": "params.b, which cell.init sets to 1 for the forget gate",
    "go_backwards": "Backward(cell), or jaxrnn.scan(..., reverse=True)",
    "input_shape": "input_size, the first argument",
    "kernel_initializer": "params, which a function of yours may draw",
    "mask_zero": "the argument mask of jaxrnn.scan and of jaxrnn.training.Batch",
    "name": "a cell has no name; it is told by its place in the Stack",
    "normalized_shape": "the size of the last axis, the first argument",
    "num_layers": "Stack(cell, cell, ...)",
    "padding_idx": "the arguments lengths and mask of jaxrnn.scan and of jaxrnn.training.Batch",
    "recurrent_dropout": "RecurrentDropout(cell, rate)",
    "return_sequences": "jaxrnn.scan returns all outputs, and Pool(cell) puts out the last one alone",
    "return_state": "jaxrnn.scan always returns the final carry",
    "reverse": "jaxrnn.scan(..., reverse=True), or Backward(cell)",
    "stateful": "the carry that jaxrnn.scan returns is an argument of the next call",
    "time_major": "time comes first in jaxrnn.scan, or where time_axis says",
    "unit_forget_bias": "params.b, which cell.init sets to 1 for the forget gate",
    "use_bias": _WITHOUT_BIAS,
}


def module_hint(module: str, name: str, others: Collection[str]) -> str:
    """The message for a name that a module of ours has not; `others` are ours where it may be."""
    hint = f"; here: {NAMES[name]}" if name in NAMES else ""
    for other in others:
        if name in importlib.import_module(other).__all__:
            hint = f"; it is {other}.{name}"
    return f"module {module!r} has no attribute {name!r}{hint}"


def method_hint(owner: str, name: str) -> str:
    """The message for an attribute that a cell has not."""
    hint = f"; here: {METHODS[name]}" if name in METHODS else ""
    return f"{owner!r} object has no attribute {name!r}{hint}"


def argument_hint(name: str, fields: Collection[str]) -> str | None:
    """What stands for an argument of this name in a cell with these fields; None where nothing is known."""
    ours = next((field for field in _FIELDS.get(name, ()) if field in fields), None)
    return ours or ARGUMENTS.get(name)


def check_arguments(owner: str, given: Collection[str], known: Collection[str], hints: Foreign = argument_hint) -> None:
    """Raises for the first argument that is unknown, and that other frameworks have."""
    for name in given:
        if name not in known and (hint := hints(name, known)):
            raise TypeError(f"{owner}: no argument {name!r}; here: {hint}")
