"""Recurrences with a matrix as state in other packages, on the arrays of `jaxrnn.matrix_scan`, time first.

Each has the layout that it likes best, laid out before the clock runs. Some compute something near to what is wanted:
then their arrays are such that it comes to the same, and their gradients are those of ours by the chain rule, after the
clock has stopped.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from helpers.contest import Contestant

CHUNK = 64  # steps, of transformers' and mlstm_kernels' forms
LEVEL = 10.0  # −m of the mLSTM, so that exp(−m) is above all its normalisers


class Task(NamedTuple):
    """decay: None, "head" or "row". delta: whether there is a delta rule. given: the arrays of `matrix_scan`."""

    decay: str | None
    delta: bool
    given: Mapping[str, np.ndarray]
    backward: bool
    threads: int


class Leaf(NamedTuple):
    """An array of theirs, and its derivative by ours."""

    array: np.ndarray
    derivative: np.ndarray | float = 1.0


def weights(given: Mapping[str, np.ndarray]) -> np.ndarray:
    """The factor of every output in the loss."""
    return np.random.default_rng(1).normal(size=given["v"].shape).astype(np.float32)


def in_torch(run: Callable[..., Any], leaves: Mapping[str, Leaf], task: Task, axes: tuple[int, ...]) -> Contestant:
    """`run(**tensors)` gives the outputs; its tensors have our axes in the order `axes`."""
    import torch

    torch.set_num_threads(task.threads)

    def there(array):
        return torch.from_numpy(np.ascontiguousarray(array.transpose(axes[: array.ndim]), np.float32))

    def here(tensor):
        return tensor.detach().numpy().transpose(np.argsort(axes[: tensor.ndim]))

    tensors = {name: there(leaf.array).requires_grad_(task.backward) for name, leaf in leaves.items()}
    factors = there(weights(task.given))

    def forward():
        with torch.no_grad():
            return run(**tensors)

    def both():
        for tensor in tensors.values():
            tensor.grad = None
        loss = (run(**tensors) * factors).sum()
        loss.backward()
        return loss

    def read(result):
        if not task.backward:
            return here(result)
        return result.item(), {name: leaf.derivative * here(tensors[name].grad) for name, leaf in leaves.items()}

    return Contestant(both if task.backward else forward, read)


def transformers(task: Task) -> Contestant | None:
    """The chunked forms of Qwen3.5, of Kimi Linear and of Mamba-2; the first two divide q by √K."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    scale = task.given["q"].shape[-1] ** 0.5
    leaves = {name: Leaf(array) for name, array in task.given.items()}
    if task.delta and task.decay:
        leaves["q"] = Leaf(scale * task.given["q"], scale)
    if (task.decay, task.delta) == ("head", True):
        from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule as rule
    elif (task.decay, task.delta) == ("row", True):
        from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention as rule
    elif (task.decay, task.delta) == ("head", False):
        return in_torch(_mamba2, leaves, task, (1, 0, 2, 3))
    else:
        return None

    def run(q, k, v, log_decay, beta):
        return rule(q, k, v, log_decay, beta, chunk_size=CHUNK)[0]

    return in_torch(run, leaves, task, (1, 0, 2, 3))


def _mamba2(q, k, v, log_decay):
    """With Δ = 1, and an A for each step."""
    import torch
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    return mamba2_chunk_scan(v, torch.ones_like(log_decay), log_decay, k, q, CHUNK)


def mlstm_kernels(task: Task) -> Contestant | None:
    """The chunked form in torch, with log i = m = −10: it divides y by exp(10), which v is multiplied by."""
    if (task.decay, task.delta) != ("head", False):
        return None
    import torch
    from mlstm_kernels.torch.chunkwise.native import mlstm_chunkwise__native_autograd as mlstm

    given, scale = task.given, task.given["q"].shape[-1] ** 0.5
    steps, rows, heads, keys = given["q"].shape
    above = -np.expm1(given["log_decay"].astype(np.float64))  # 1 − a
    leaves = {
        "q": Leaf(scale * given["q"], scale),
        "k": Leaf(given["k"]),
        "v": Leaf(math.exp(LEVEL) * given["v"], math.exp(LEVEL)),
        "log_decay": Leaf(given["log_decay"] - np.log(above), 1 / above),  # f, where log σ(f) is the decay
    }
    i, m = torch.full((rows, heads, steps), -LEVEL), torch.full((rows, heads, 1), -LEVEL)
    begin = torch.zeros(rows, heads, keys, given["v"].shape[-1]), torch.zeros(rows, heads, keys), m

    def run(q, k, v, log_decay):
        return mlstm(q, k, v, i, log_decay, *begin, chunk_size=math.gcd(steps, CHUNK))

    return in_torch(run, leaves, task, (1, 2, 0, 3))


def onnxruntime(task: Task) -> Contestant | None:
    """Its operator LinearAttention, forward alone."""
    if task.backward:
        return None
    import onnx
    import onnxruntime
    from onnx import helper

    def laid(array):
        rows = array.swapaxes(0, 1)
        return np.ascontiguousarray(rows.reshape(*rows.shape[:2], -1))

    heads = task.given["q"].shape[2]
    names = {"q": "query", "k": "key", "v": "value", "": "", "log_decay": "decay", "beta": "beta"}
    feeds = {names[name]: laid(array) for name, array in task.given.items()}
    rule = {(True, True): "gated_delta", (True, False): "gated", (False, True): "delta", (False, False): "linear"}
    node = helper.make_node(
        "LinearAttention",
        [name if name in feeds else "" for name in names.values()],
        ["output", "present_state"],
        domain="com.microsoft",
        q_num_heads=heads,
        kv_num_heads=heads,
        scale=1.0,
        update_rule=rule[bool(task.decay), task.delta],
    )

    def described(name, shape=None):
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    inputs = [described(name, array.shape) for name, array in feeds.items()]
    graph = helper.make_graph([node], "one", inputs, [described("output"), described("present_state")])
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task.threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])

    def read(output):
        return output.reshape(*output.shape[:2], heads, -1).swapaxes(0, 1)

    return Contestant(lambda: session.run(["output"], feeds)[0], read)


CONTESTANTS = {"transformers": transformers, "mlstm_kernels": mlstm_kernels, "onnxruntime": onnxruntime}
