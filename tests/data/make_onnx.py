"""Makes the ONNX files beside it: Keras models as tf2onnx writes them.

pip install tensorflow-cpu tf_keras tf2onnx  # these were made with 2.21.0, 2.21.0 and 1.17.0
python make_onnx.py
"""

import os
from pathlib import Path

os.environ["TF_USE_LEGACY_KERAS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

import numpy as np
import onnx
import tensorflow as tf
import tf2onnx
import tf_keras

L = tf_keras.layers

MODELS = {
    "lstm": [L.LSTM(4, return_sequences=True)],
    "hard_lstm": [L.LSTM(4, return_sequences=True, recurrent_activation="hard_sigmoid", activation="relu")],
    "gru": [L.GRU(4, return_sequences=True)],
    "bidirectional": [L.Bidirectional(L.LSTM(4, return_sequences=True)), L.Dense(2)],
    "bidirectional_last": [L.Bidirectional(L.GRU(4)), L.Dense(2, "softmax")],
    "stacked": [L.LSTM(4, return_sequences=True), L.GRU(5, return_sequences=True), L.Dense(2, "tanh")],
    "embedding": [L.Embedding(7, 3), L.LSTM(4), L.Dense(2)],
    "loop": [L.GRU(4, return_sequences=True, reset_after=False)],
}


def main():
    rng = np.random.default_rng(0)
    for name, layers in MODELS.items():
        tokens = name == "embedding"
        shape, dtype = ((None, None), tf.int32) if tokens else ((None, None, 3), tf.float32)
        signature = tf.TensorSpec(shape, dtype, name="x")
        model = tf_keras.Sequential([L.Input(shape[1:], dtype=dtype), *layers])
        model.set_weights([0.7 * rng.normal(size=weight.shape) for weight in model.get_weights()])
        proto, _ = tf2onnx.convert.from_keras(model, input_signature=[signature], opset=15)
        onnx.save(proto, Path(__file__).with_name(f"{name}.onnx"))


if __name__ == "__main__":
    main()
