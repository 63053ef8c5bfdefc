"""PyTorch's models and ours: the same numbers and gradients, there and back; and what is refused."""

import copy
import json
import struct
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import conversion
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conversion import assert_close, assert_weight_gradients, factors_like, redraw

import jaxrnn
from jaxrnn import GRU, LSTM, Apply, Bidirectional, Dropout, Elman, Linear, Pool, Stack, check
from jaxrnn.convert.cells import placed
from jaxrnn.convert.torch import carry_from_torch, carry_to_torch, from_torch, to_torch

X64 = True
PROMOTION = "standard"

T, B, D, H, P, V, E = 7, 4, 3, 5, 2, 8, 6


@pytest.fixture
def torch():
    module = conversion.peer("torch")
    module.set_num_threads(1)
    return module


@pytest.fixture
def safetensors():
    return conversion.peer("safetensors.numpy")


class Configuration(NamedTuple):
    """One model: a recurrent module, what is below and above it, and how it is run."""

    kind: str
    options: dict
    whole: bool
    names: bool
    dtype: str
    ragged: bool
    initial: bool


def configuration(seed):
    rng = np.random.default_rng(seed)

    def flip():
        return bool(rng.integers(2))

    kind = ("LSTM", "GRU", "RNN")[seed % 3]
    options = {"bias": rng.random() < 0.7}
    if kind == "RNN":
        options["nonlinearity"] = ("tanh", "relu")[rng.integers(2)]
    if cell := seed % 7 == 6:
        kind += "Cell"
    else:
        layers = int(rng.integers(1, 3 if seed < 8 else 4))
        options |= {"num_layers": layers, "bidirectional": flip(), "batch_first": flip()}
        options |= {"dropout": 0.3} if layers > 1 and flip() else {}
        options |= {"proj_size": P} if kind == "LSTM" and flip() else {}
    dtype = "float32" if seed % 5 == 4 else "float64"
    return Configuration(kind, options, not cell and flip(), flip(), dtype, not cell and flip(), flip())


def build(torch, seed, config):
    """The torch model, with random weights, in evaluation mode."""
    nn = torch.nn
    module = getattr(nn, config.kind)(D, H, **config.options)
    if config.whole:
        size = (config.options.get("proj_size") or H) * (1 + config.options["bidirectional"])
        below = [nn.Embedding(V, D, padding_idx=V - 1)] if seed % 2 else [nn.Linear(E, D, bias=False), nn.ELU(0.7)]
        norm = nn.LayerNorm(size, eps=1e-3, bias=seed % 3 > 0)
        parts = [*below, module, nn.Dropout(0.2), norm, nn.LeakyReLU(0.3), nn.Linear(size, E)]
        module = nn.Sequential(*parts) if config.names else named_module(torch, parts)
    module = module.to(getattr(torch, config.dtype)).eval()
    return randomize(torch, seed, module)


def named_module(torch, parts):
    """A module of the user's own, with names for its parts, one of them nested."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Sequential(*parts[:-2])
            self.act, self.z_head = parts[-2:]

    return Model()


def randomize(torch, seed, module):
    """`module` with every weight redrawn."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.tensor(0.6 * rng.normal(size=tuple(weight.shape))))
    return module


def leaves(module):
    """The modules without children, in order."""
    children = list(module.children())
    return [leaf for child in children for leaf in leaves(child)] if children else [module]


def torch_run(torch, module, xs, lengths, states):
    """(states, ys) of the modules one after another."""
    new = ()
    for part in leaves(module):
        if isinstance(part, torch.nn.RNNCellBase):
            new = None if states is None else tuple(state[0] for state in states)
            ys = []
            for x in xs:
                given = new if new is None or len(new) > 1 else new[0]
                new = part(x, given)
                new = new if isinstance(new, tuple) else (new,)
                ys.append(new[0])
            xs, new = torch.stack(ys), tuple(state[None] for state in new)
        elif isinstance(part, torch.nn.RNNBase):
            packing, first = torch.nn.utils.rnn, part.batch_first
            if lengths is not None:
                xs = packing.pack_padded_sequence(xs, torch.tensor(lengths), first, enforce_sorted=False)
            xs, new = part(xs, states if states is None or len(states) > 1 else states[0])
            new = new if isinstance(new, tuple) else (new,)
            if lengths is not None:
                xs, _ = packing.pad_packed_sequence(xs, first, total_length=T)
        else:
            xs = part(xs)
    return new, xs


def tensors(torch, tree):
    return jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf), requires_grad=True), tree)


def numbers(tree):
    return jax.tree.map(lambda leaf: leaf.detach().numpy().copy(), tree)


def weights_of(module):
    return numbers(dict(module.named_parameters()))


def check_parity(torch, seed):
    config = configuration(seed)
    module = build(torch, seed, config)
    before = copy.deepcopy(module)
    rng = np.random.default_rng(seed)
    time_axis = int(config.options.get("batch_first", False))
    tokens = config.whole and seed % 2
    shape = (B, T) if time_axis else (T, B)
    # torch does not train the row padding_idx.
    xs = rng.integers(0, V - 1, shape) if tokens else rng.normal(size=(*shape, E if config.whole else D))
    xs = xs if tokens else xs.astype(config.dtype)
    lengths = np.array([3, T - 1, 1, 5]) if config.ragged else None
    keep = 1.0
    if lengths is not None:
        keep = (np.arange(T)[:, None] < lengths).astype(config.dtype)[..., None]
        keep = np.swapaxes(keep, 0, time_axis)

    cell, params = from_torch(module)
    weights = weights_of(module)
    assert all(np.array_equal(a, b) for a, b in zip(weights.values(), weights_of(before).values(), strict=True))
    assert not module.training
    assert all(weight.grad is None and weight.requires_grad for weight in module.parameters())

    carry = cell.initial_carry(params, (B,))
    if config.initial:
        carry = redraw(seed, jax.tree.map(np.asarray, carry))
    states = tuple(np.asarray(state) for state in as_tuple(numbers(carry_to_torch(cell, carry))))
    assert_close(carry_from_torch(cell, states if len(states) > 1 else states[0]), carry)

    options = {"lengths": lengths, "time_axis": time_axis}
    sizes = jax.eval_shape(lambda: jaxrnn.scan(cell, params, carry, xs, **options))
    factors = factors_like(seed, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), sizes))
    ours, gradients = conversion.run(cell, params, carry, xs, factors, keep=keep, **options)

    theirs_xs = torch.tensor(xs) if tokens else tensors(torch, xs)
    theirs_states = tensors(torch, states)
    new, ys = torch_run(torch, module, theirs_xs, lengths, theirs_states)
    factors = (as_tuple(carry_to_torch(cell, factors[0])), torch.tensor(np.asarray(factors[1] * keep)))
    (sum((f * n).sum() for f, n in zip(factors[0], new, strict=True)) + (factors[1] * ys).sum()).backward()

    assert_close(ours[1] * keep, ys.detach().numpy() * keep, "ys")
    assert_close(numbers(as_tuple(carry_to_torch(cell, ours[0]))), numbers(new), "states")
    if not tokens:
        assert_close(gradients[2], theirs_xs.grad.numpy(), "gradient of xs")
    theirs = tuple(state.grad.numpy() for state in theirs_states)
    assert_close(numbers(as_tuple(carry_to_torch(cell, gradients[1]))), theirs, "gradient of states")

    found = {name: weight.grad.numpy().copy() for name, weight in module.named_parameters()}

    def convert(weights):
        module.load_state_dict({name: torch.tensor(weight) for name, weight in weights.items()})
        return from_torch(module)[1]

    assert_weight_gradients(convert, weights, gradients[0], found)
    check_round_trips(torch, before, (xs, lengths, states))


def as_tuple(states):
    return states if isinstance(states, tuple) else (states,)


def check_round_trips(torch, module, inputs):
    """`to_torch(from_torch(m))` loads into another m, which then computes the same."""
    cell, params = from_torch(module)
    exports = [to_torch(cell, params, module=module)]
    # Of classes of one's own, and of cells, torch alone knows the names.
    if type(module).__name__ in ("RNN", "LSTM", "GRU", "Sequential"):
        exports.append(to_torch(cell, params))
    for state_dict in exports:
        other = randomize(torch, 99, copy.deepcopy(module))
        other.load_state_dict(state_dict, strict=True)
        xs, lengths, states = inputs
        results = []
        for each in (module, other):
            given = tuple(map(torch.tensor, states))
            results.append(numbers(torch_run(torch, each, torch.tensor(xs), lengths, given)))
        assert_close(*results)
        again = from_torch(other)
        assert again[0] == cell
        assert_close(again[1], params)


@pytest.mark.parametrize("seed", range(8))
def test_the_same_numbers_and_gradients(torch, seed):
    check_parity(torch, seed)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(8, 68))
def test_the_same_numbers_and_gradients_of_many(torch, seed):
    check_parity(torch, seed)


def test_the_configurations_cover_every_option():
    for seeds in (range(8), range(68)):
        drawn = [configuration(seed) for seed in seeds]
        assert {config.kind.removesuffix("Cell") for config in drawn} == {"LSTM", "GRU", "RNN"}
        assert {config.whole for config in drawn} == {config.ragged for config in drawn} == {True, False}
        assert {config.initial for config in drawn} == {True, False}
        for name in ("bidirectional", "batch_first", "bias"):
            assert {config.options.get(name) for config in drawn} >= {True, False}, name
        assert any("dropout" in config.options for config in drawn)
        assert any("proj_size" in config.options for config in drawn)


# What a result is


def lstm_arrays(prefix="", dtype="float32", below=D, seed=0):
    """The arrays of an LSTM in torch's order."""
    shapes = {
        "weight_ih_l0": (4 * H, below),
        "weight_hh_l0": (4 * H, H),
        "bias_ih_l0": (4 * H,),
        "bias_hh_l0": (4 * H,),
    }
    return {prefix + name: array for name, array in drawn(seed, shapes, dtype).items()}


def drawn(seed, shapes, dtype="float32"):
    """Random arrays in the order of `shapes`."""
    arrays = redraw(seed, {name: np.zeros(shape, dtype) for name, shape in shapes.items()})
    return {name: arrays[name] for name in shapes}


def model_arrays(dtype="float32"):
    """An Embedding, an LSTM, a LayerNorm and a Linear, in order."""
    shapes = {"norm.weight": (H,), "norm.bias": (H,), "head.weight": (E, H), "head.bias": (E,)}
    arrays = drawn(1, {"embed.weight": (V, D)}, dtype) | lstm_arrays("body.lstm.", dtype)
    return arrays | drawn(2, shapes, dtype)


PARTS = {"embed": "Embedding", "body.lstm": None, "norm": "LayerNorm", "head": "Linear"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes_stay_bit_for_bit(torch, dtype):
    kind = getattr(torch, dtype)
    module = randomize(torch, 0, torch.nn.Sequential(torch.nn.Linear(D, H), torch.nn.GRU(H, P), torch.nn.LayerNorm(P)))
    module = module.to(kind)
    for source in (module, module.state_dict()):
        options = {} if source is module else {"epsilon": 1e-5}
        _, params = from_torch(source, **options)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
        assert isinstance(params[0].w, jax.Array)
        expected = module[0].weight.detach().double().numpy().T
        np.testing.assert_array_equal(np.asarray(params[0].w).astype("float64"), expected)
        # b_hn is no sum.
        expected = module[1].bias_hh_l0[2 * P :].detach().double().numpy()
        np.testing.assert_array_equal(np.asarray(params[1].b_hn).astype("float64"), expected)
    exported = to_torch(from_torch(module)[0], params)
    assert {tensor.dtype for tensor in exported.values()} == {kind}
    assert torch.equal(exported["1.weight_hh_l0"], module[1].weight_hh_l0)


def test_layers_are_one_stack_with_dropout_between_them(torch):
    nn = torch.nn
    cell, _ = from_torch(nn.LSTM(D, H, num_layers=3, dropout=0.3, proj_size=P))
    one, above = LSTM(D, H, projection_size=P), LSTM(P, H, projection_size=P)
    assert cell == Stack((one, Dropout(0.3), above, Dropout(0.3), above))
    cell, _ = from_torch(nn.Sequential(nn.GRU(D, H, num_layers=2, bidirectional=True), nn.Dropout(0.2), nn.Identity()))
    body = Stack((Bidirectional(GRU(D, H), GRU(D, H)), Bidirectional(GRU(2 * H, H), GRU(2 * H, H))))
    assert cell == Stack((body, Dropout(0.2), Apply("identity")))
    assert from_torch(nn.ModuleList([nn.RNN(D, H, nonlinearity="relu")]))[0] == Stack((Elman(D, H, activation="relu"),))


def test_pool_keeps_the_params(torch):
    cell, params = from_torch(model_arrays("float64"), parts=PARTS, epsilon=1e-5)
    embed, lstm, norm, head = cell.cells
    last = Stack((embed, Pool(lstm), norm, head))
    xs = np.arange(T) % V
    both = jax.jit(lambda params: [jaxrnn.scan(each, params, None, xs)[1] for each in (last, cell)])(params)
    assert_close(both[0], both[1][-1])
    nn = torch.nn
    module = named_module(torch, [nn.Embedding(V, D), nn.LSTM(D, H), nn.LayerNorm(H), nn.Linear(H, E)]).double()
    assert list(to_torch(last, params, module=module)) == [name for name, _ in module.named_parameters()]
    with pytest.raises(ValueError, match=r"^cell.cells\[1\]: Pool\(.*torch has no module that computes this"):
        to_torch(last, params)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Identity", {}),
        ("ReLU", {"inplace": False}),
        ("Tanh", {}),
        ("Sigmoid", {}),
        ("Softsign", {}),
        ("Softplus", {}),
        ("LeakyReLU", {}),
        ("LeakyReLU", {"negative_slope": 0.4}),
        ("ELU", {}),
        ("ELU", {"alpha": 2.5}),
        ("Threshold", {"threshold": 0.7, "value": 0.0}),
        ("Hardsigmoid", {}),
    ],
)
def test_activations(torch, name, options):
    module = getattr(torch.nn, name)(**options)
    cell, params = from_torch(module)
    xs = np.concatenate([np.linspace(-5, 5, 41), [-40.0, 15.0]])[:, None]
    assert_close(jaxrnn.scan(cell, params, None, xs)[1], module(torch.tensor(xs)).numpy())
    assert to_torch(cell, params) == to_torch(cell, params, module=module) == {}


def test_norms_with_and_without_weights(torch):
    xs = np.random.default_rng(0).normal(size=(T, D))
    for options in ({"elementwise_affine": False}, {"bias": False}, {}):
        module = randomize(torch, 1, torch.nn.LayerNorm(D, eps=0.3, dtype=torch.float64, **options))
        cell, params = from_torch(torch.nn.Sequential(module, torch.nn.Linear(D, D).double()))
        ours = jaxrnn.scan(cell.cells[0], params[0], None, xs)[1]
        assert_close(ours, module(torch.tensor(xs)).detach().numpy())
        assert list(to_torch(cell.cells[0], params[0], module=module)) == [
            name for name, _ in module.named_parameters()
        ]
    bare = torch.nn.LayerNorm(D, elementwise_affine=False)
    assert from_torch(bare)[1].scale.dtype == jnp.float32


def test_what_is_trained_afterwards_stays_apart(torch):
    module = torch.nn.Sequential(torch.nn.Embedding(64, 64), torch.nn.LayerNorm(64))
    _, params = from_torch(module)
    before = np.asarray(params[0].w).copy()
    exported = to_torch(*from_torch(module))
    with torch.no_grad():
        for weight in [*module.parameters(), *exported.values()]:
            weight.fill_(7.0)
    np.testing.assert_array_equal(params[0].w, before)
    np.testing.assert_array_equal(params[1].scale, 1)
    arrays = {"weight": np.ones((64, 64), "float32"), "bias": np.ones(64, "float32")}
    _, params = from_torch(arrays)
    arrays["bias"][:] = 7
    np.testing.assert_array_equal(params.b, 1)


def test_state_dicts_by_their_names(torch):
    whole = Stack((jaxrnn.Embed(V, D), LSTM(D, H), jaxrnn.LayerNorm(H, 1e-3), Linear(H, E)))
    arrays = model_arrays()
    assert from_torch(arrays, parts=PARTS, epsilon=1e-3)[0] == whole
    kinds = dict(PARTS, **{"body.lstm": "LSTM"})
    backwards = dict(reversed(arrays.items()))
    assert from_torch(backwards, parts=kinds, epsilon=1e-3)[0] == whole
    assert from_torch(lstm_arrays())[0] == from_torch(lstm_arrays("a.b."))[0] == LSTM(D, H)
    # Numbers tell the order, ten after nine.
    numbered = {"m.10.weight": np.ones((P, E), "float32"), "m.10.bias": np.ones(P, "float32")}
    numbered |= {"m.9.weight": np.ones((E, H), "float32"), "m.9.bias": np.ones(E, "float32")} | lstm_arrays("m.2.")
    assert from_torch(numbered)[0] == Stack((LSTM(D, H), Linear(H, E), Linear(E, P)))
    for kind, options in (("LSTM", {"proj_size": P}), ("GRU", {"bias": False}), ("RNN", {"nonlinearity": "relu"})):
        module = getattr(torch.nn, kind)(D, H, 2, bidirectional=True, **options)
        activation = options.get("nonlinearity")
        cell, params = from_torch(module.state_dict(), activation=activation)
        assert (cell, jax.tree.structure(params)) == (from_torch(module)[0], jax.tree.structure(from_torch(module)[1]))
        assert_close(params, from_torch(module)[1])
        single = getattr(torch.nn, f"{kind}Cell")(D, H)
        expected = {"LSTM": LSTM(D, H), "GRU": GRU(D, H), "RNN": Elman(D, H, activation="relu")}[kind]
        assert from_torch(single.state_dict(), activation=activation)[0] == expected


def test_bare_weights_of_either_kind():
    arrays = {"weight": np.ones((V, D), "float32")}
    assert from_torch(arrays, parts={"": "Embedding"})[0] == jaxrnn.Embed(V, D)
    assert from_torch(arrays, parts={"": "Linear"})[0] == Linear(D, V)
    norm = from_torch({"weight": np.ones(D, "float32")}, parts={"": "LayerNorm"}, epsilon=0.1)
    assert norm[0] == jaxrnn.LayerNorm(D, 0.1)
    assert norm[1].b is None


def test_biases_of_gru_in_both_directions_of_conversion(torch):
    cell, h = GRU(D, H), 2 * H
    params = weights_for(cell)
    exported = numbers(to_torch(cell, params))
    np.testing.assert_array_equal(exported["bias_ih_l0"], params.b)
    np.testing.assert_array_equal(exported["bias_hh_l0"][h:], params.b_hn)
    np.testing.assert_array_equal(exported["bias_hh_l0"][:h], 0)
    exported = numbers(to_torch(cell, params._replace(b_hn=None)))
    np.testing.assert_array_equal(exported["bias_hh_l0"], 0)
    exported = numbers(to_torch(cell, params._replace(b=None)))
    np.testing.assert_array_equal(exported["bias_ih_l0"], 0)
    np.testing.assert_array_equal(exported["bias_hh_l0"][h:], params.b_hn)
    assert list(to_torch(cell, params._replace(b=None, b_hn=None))) == ["weight_ih_l0", "weight_hh_l0"]


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_two_biases_move_twice_as_far(torch, kind):
    """A step of torch's moves b_ih + b_hh by twice what an optimizer moves b; of a GRU, only that of r and z."""
    optimizers = {"SGD": optax.sgd(0.01, momentum=0.9), "Adam": optax.adam(0.01)}
    modules = {name: randomize(torch, 0, getattr(torch.nn, kind)(D, H).double()) for name in optimizers}
    theirs = {
        "SGD": torch.optim.SGD(modules["SGD"].parameters(), 0.01, momentum=0.9),
        "Adam": torch.optim.Adam(modules["Adam"].parameters(), 0.01),
    }
    xs = np.random.default_rng(0).normal(size=(T, B, D))
    cell, first = from_torch(modules["SGD"])
    twice = np.where(np.arange(first.b.size) < (2 * H if kind == "GRU" else first.b.size), 2.0, 1.0)

    @jax.jit
    def step(params, states):
        for name, optimizer in optimizers.items():
            gradient = jax.grad(lambda p: (jaxrnn.scan(cell, p, None, xs)[1] ** 2).sum())(params[name])
            updates, state = optimizer.update(gradient, states[name], params[name])
            params = params | {name: optax.apply_updates(params[name], updates._replace(b=twice * updates.b))}
            states = states | {name: state}
        return params, states

    params = dict.fromkeys(optimizers, first)
    states = {name: jax.jit(optimizer.init)(first) for name, optimizer in optimizers.items()}
    for _ in range(3):
        params, states = step(params, states)
        for name, module in modules.items():
            theirs[name].zero_grad()
            (module(torch.tensor(xs))[0] ** 2).sum().backward()
            theirs[name].step()
            assert_close(params[name], from_torch(module)[1], name)


def test_biases_everywhere_or_nowhere(torch):
    cell = Stack((LSTM(D, H), LSTM(H, H)))
    below, above = weights_for(cell)
    exported = to_torch(cell, (below._replace(b=None), above))
    torch.nn.LSTM(D, H, 2).load_state_dict(exported)
    assert not exported["bias_ih_l0"].any()
    # A module that has biases takes zeros for None.
    module = torch.nn.LSTM(D, H, 2)
    module.load_state_dict(to_torch(cell, (below._replace(b=None), above._replace(b=None)), module=module))
    assert not any(weight.any() for name, weight in module.named_parameters() if "bias" in name)


def test_names_without_a_module():
    pytest.importorskip("torch", reason="parity needs torch")

    def names(*cells):
        cell = Stack(cells) if len(cells) > 1 else cells[0]
        return [name for name in to_torch(cell, weights_for(cell)) if "weight_ih" in name]

    one, above = LSTM(D, H), LSTM(H, H)
    assert names(one) == ["weight_ih_l0"]
    assert names(Stack((one,))) == ["0.weight_ih_l0"]
    assert names(one, above) == names(one, Dropout(0.1), above) == ["weight_ih_l0", "weight_ih_l1"]
    assert names(Bidirectional(one, one)) == ["weight_ih_l0", "weight_ih_l0_reverse"]
    assert names(one, LSTM(H, P)) == ["0.weight_ih_l0", "1.weight_ih_l0"]
    assert names(one, GRU(H, H)) == ["0.weight_ih_l0", "1.weight_ih_l0"]
    assert names(one, Dropout(0.1), above, above) == ["0.weight_ih_l0", "2.weight_ih_l0", "3.weight_ih_l0"]
    assert names(one, Dropout(0.1), above, Dropout(0.2), above)[-1] == "4.weight_ih_l0"
    assert names(one, above, Linear(H, E)) == ["0.weight_ih_l0", "1.weight_ih_l0"]
    assert names(Stack((one, above)), Linear(H, E)) == ["0.weight_ih_l0", "0.weight_ih_l1"]
    assert names(Elman(D, H), Elman(H, H, activation="relu")) == ["0.weight_ih_l0", "1.weight_ih_l0"]


# Files, and no torch


def test_files(safetensors, tmp_path):
    path = tmp_path / "model.safetensors"
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        arrays = model_arrays(dtype)
        safetensors.save_file(arrays, path)
        ours = from_torch(path, parts=PARTS, epsilon=1e-3)
        theirs = from_torch(arrays, parts=PARTS, epsilon=1e-3)
        assert ours[0] == theirs[0]
        assert {leaf.dtype for leaf in jax.tree.leaves(ours[1])} == {jnp.dtype(dtype)}
        jax.tree.map(np.testing.assert_array_equal, ours[1], theirs[1])
    with pytest.raises(ValueError, match=r"model.safetensors: its names are in no order .* parts=.*'body.lstm'"):
        from_torch(path, epsilon=1e-3)
    safetensors.save_file(lstm_arrays(), path)
    assert from_torch(str(path))[0] == LSTM(D, H)
    # Without biases nothing shows that a file is sorted by name.
    shapes = {"b.weight_ih_l0": (H, D), "b.weight_hh_l0": (H, H), "a.weight_ih_l0": (H, H), "a.weight_hh_l0": (H, H)}
    assert from_torch(drawn(0, shapes), activation="tanh")[0] == Stack((Elman(D, H), Elman(H, H)))
    safetensors.save_file(drawn(0, shapes), path)
    with pytest.raises(ValueError, match="its names are in no order"):
        from_torch(path, activation="tanh")
    assert from_torch(path, activation="tanh", parts={"b": None, "a": "RNN"})[0].input_size == D


def test_a_file_of_torch_and_back(torch, safetensors, tmp_path):
    nn = torch.nn
    module = nn.Sequential(nn.Embedding(V, D), nn.GRU(D, H, 2, bidirectional=True), nn.Linear(2 * H, E))
    conversion.peer("safetensors.torch").save_file(module.state_dict(), tmp_path / "m.safetensors")
    parts = {"0": "Embedding", "1": "GRU", "2": "Linear"}
    cell, params = from_torch(tmp_path / "m.safetensors", parts=parts)
    assert cell == from_torch(module)[0]
    other = copy.deepcopy(randomize(torch, 5, module))
    conversion.peer("safetensors.torch").save_file(to_torch(cell, params), tmp_path / "n.safetensors")
    module.load_state_dict(conversion.peer("safetensors.torch").load_file(tmp_path / "n.safetensors"))
    assert not torch.equal(module[2].weight, other[2].weight)
    assert_close(from_torch(module)[1], params)


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import numpy as np, jax
from jaxrnn.convert.torch import from_torch, carry_from_torch
parts = {"embed": "Embedding", "body.lstm": None, "norm": "LayerNorm", "head": "Linear"}
cell, params = from_torch(dict(np.load(sys.argv[1])), parts=parts, epsilon=1e-3)
if len(sys.argv) > 2:
    other = from_torch(sys.argv[2], parts=parts, epsilon=1e-3)
    assert other[0] == cell
    jax.tree.map(np.testing.assert_array_equal, other[1], params)
    assert [name for name in sys.modules if name.split(".")[0] == "torch"] == ["torch"]
carry = carry_from_torch(cell, (np.zeros((1, 2, 5), "float32"),) * 2)
print(cell, carry[1].c.shape)
"""


def test_neither_state_dicts_nor_files_need_torch(tmp_path):
    np.savez(tmp_path / "m.npz", **model_arrays())
    arguments = [str(tmp_path / "m.npz")]
    try:
        import safetensors.numpy
    except ImportError:
        pass
    else:
        safetensors.numpy.save_file(model_arrays(), tmp_path / "m.safetensors")
        arguments.append(str(tmp_path / "m.safetensors"))
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_TORCH, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=Path(__file__).parent.parent,
    )
    assert run.returncode == 0, run.stderr
    assert "LSTM(input_size=3, hidden_size=5)" in run.stdout
    assert "(2, 5)" in run.stdout


# Errors


def attention(nn):
    encoder = OrderedDict(lstm=nn.LSTM(D, 4), attention=nn.MultiheadAttention(4, 2))
    return nn.Sequential(OrderedDict(encoder=nn.Sequential(encoder), head=nn.Linear(4, E)))


def changed(module, change):
    change(module)
    return module


def tied(nn):
    embed, head = nn.Embedding(V, D), nn.Linear(D, V)
    head.weight = embed.weight
    return nn.Sequential(embed, nn.LSTM(D, D), head)


def shared(nn):
    layer = nn.Linear(D, D)
    return nn.Sequential(layer, nn.Tanh(), layer)


MODULES = {
    "attention": (lambda t: attention(t.nn), r"'encoder.attention' \(MultiheadAttention\): jaxrnn has no counterpart"),
    "conv": (lambda t: t.nn.Sequential(t.nn.Conv1d(3, 3, 1)), r"'0' \(Conv1d\): jaxrnn has no counterpart"),
    "batch norm": (lambda t: t.nn.Sequential(t.nn.BatchNorm1d(3)), r"'0' \(BatchNorm1d\): .*no counterpart"),
    "glu": (lambda t: t.nn.GLU(), "GLU: jaxrnn has no counterpart"),
    "softplus": (lambda t: t.nn.Softplus(beta=2.0), "Softplus: expected beta=1, threshold=20, got beta=2.0, thresh"),
    "threshold": (lambda t: t.nn.Threshold(0.5, 1.0), "Threshold: expected value=0, thresh.*, got value=1.0, thresh"),
    "softmax": (lambda t: t.nn.Softmax(dim=1), "Softmax: expected dim=-1, got dim=1"),
    "max_norm": (lambda t: t.nn.Embedding(V, D, max_norm=2.0), "Embedding: expected max_norm=None, got 2.0"),
    "frequency": (lambda t: t.nn.Embedding(V, D, scale_grad_by_freq=True), "expected scale_grad_by_freq=False"),
    "two axes": (lambda t: t.nn.LayerNorm((2, 3)), r"LayerNorm: expected one normalised axis, got .*\(2, 3\)"),
    "dropout": (lambda t: t.nn.Sequential(t.nn.Dropout(1.0)), r"'0' \(Dropout\): Dropout.rate: expected a number in"),
    "dropout2d": (lambda t: t.nn.Dropout2d(0.5), "Dropout2d: jaxrnn has no counterpart"),
    "own": (
        lambda t: changed(
            t.nn.Sequential(t.nn.Tanh()), lambda m: m.register_parameter("scale", t.nn.Linear(1, 1).weight)
        ),
        "Sequential: scale belong to none of its children",
    ),
    "own of a layer": (
        lambda t: changed(t.nn.Linear(2, 3), lambda m: m.register_parameter("scale", t.nn.Linear(1, 1).weight)),
        "Linear: unexpected arrays: 'scale'",
    ),
    "buffer": (
        lambda t: changed(t.nn.Linear(2, 3), lambda m: m.register_buffer("mask", t.ones(2))),
        "Linear: jaxrnn has no counterpart of its buffers mask",
    ),
    "inside": (lambda t: changed(t.nn.Linear(2, 3), lambda m: m.add_module("x", t.nn.Tanh())), "has modules inside: x"),
    "shared": (lambda t: shared(t.nn), r"'2' \(Linear\): it is used twice"),
    "tied": (lambda t: tied(t.nn), "Sequential: 2.weight is tied to 0.weight"),
    "tied view": (
        lambda t: changed(
            t.nn.Sequential(t.nn.Linear(4, 4), t.nn.Linear(4, 4)),
            lambda m: setattr(m[1].weight, "data", m[0].weight.data.T),
        ),
        "1.weight is tied to 0.weight",
    ),
    "parametrized": (
        lambda t: t.nn.Sequential(t.nn.utils.parametrizations.weight_norm(t.nn.LSTM(2, 3), "weight_hh_l0")),
        r"'0' \(ParametrizedLSTM\): its weights are parametrized",
    ),
    "hook": (
        lambda t: changed(t.nn.LSTM(2, 3), lambda m: m.register_forward_hook(print)),
        "LSTM: it has forward_hooks, and what they do is not known",
    ),
    "pre-hook": (
        lambda t: changed(t.nn.LSTM(2, 3), lambda m: m.register_forward_pre_hook(print)),
        "LSTM: it has forward_pre_hooks",
    ),
    "pruned": (
        lambda t: __import__("torch.nn.utils.prune", fromlist="x").identity(t.nn.Linear(2, 3), "weight"),
        "Linear: ",
    ),
    "replaced": (
        lambda t: changed(t.nn.LSTM(2, 3), lambda m: setattr(m, "forward", print)),
        "forward has been replaced",
    ),
    "subclass": (lambda t: type("Mine", (t.nn.Linear,), {})(2, 3), "Mine: weight, bias belong to none of its children"),
    "empty": (lambda t: t.nn.Sequential(), "Sequential: jaxrnn has no counterpart"),
    "dict": (lambda t: t.nn.ModuleDict({"a": t.nn.Linear(2, 3)}), "ModuleDict: jaxrnn has no counterpart"),
    "order": (
        lambda t: t.nn.Sequential(t.nn.Linear(2, 3), t.nn.Linear(2, 3)),
        r"Sequential: its parts cannot run one after another: .*cells\[1\] reads size 2 and gets 3",
    ),
    "meta": (
        lambda t: t.nn.LSTM(2, 3, device="meta"),
        "LSTM: weight_ih_l0: a tensor on the meta device has no numbers",
    ),
    "mixed": (lambda t: t.nn.Sequential(t.nn.Linear(2, 3), t.nn.Linear(3, 2).double()), "expected one dtype"),
    "nan": (lambda t: changed(t.nn.Linear(2, 3), lambda m: m.bias.data.fill_(float("nan"))), "bias: expected finite"),
    "inf": (
        lambda t: changed(t.nn.LSTM(2, 3), lambda m: m.bias_hh_l0.data.fill_(float("inf"))),
        "bias_hh_l0: expected fin",
    ),
    "resized": (
        lambda t: changed(t.nn.GRU(2, 3), lambda m: setattr(m.bias_hh_l0, "data", t.ones(8))),
        r"GRU: bias_hh_l0: expected shape \(9\), got \(8,\)",
    ),
    "overflow": (
        lambda t: changed(t.nn.GRU(2, 3), lambda m: [b.data.fill_(3e38) for b in (m.bias_ih_l0, m.bias_hh_l0)]),
        "bias_ih_l0: its sum with the other bias overflows float32",
    ),
}


@pytest.mark.parametrize("case", MODULES)
def test_modules_without_a_counterpart(torch, case):
    make, message = MODULES[case]
    with pytest.raises(ValueError, match=message):
        from_torch(make(torch))


def test_modules_tell_what_state_dicts_do_not(torch):
    with pytest.raises(ValueError, match="activation: only for a state_dict"):
        from_torch(torch.nn.RNN(2, 3), activation="relu")
    # The copies that a state_dict holds are converted as they are.
    module = tied(torch.nn)
    cell, _ = from_torch(module.state_dict(), parts={"0": "Embedding", "1": None, "2": None})
    assert len(cell.cells) == 3
    with pytest.raises(ValueError, match=r"weight: a tensor on the meta device"):
        from_torch(torch.nn.Linear(2, 3, device="meta").state_dict())
    with pytest.raises(TypeError, match=r"weight: expected a dense tensor of numbers, got torch.float32, torch.sparse"):
        from_torch({"weight": torch.ones(2, 3).to_sparse()})


def test_float64_needs_x64(torch):
    with (
        jax.enable_x64(False),
        pytest.raises(ValueError, match=r"weight_ih_l0 is float64: convert under jax.enable_x64"),
    ):
        from_torch(torch.nn.LSTM(2, 3).double())


def without(arrays, *names):
    return {name: array for name, array in arrays.items() if name not in names}


RNN = {"weight_ih_l0": np.ones((H, D), "float32"), "weight_hh_l0": np.ones((H, H), "float32")}
NORM = {"weight": np.ones(D, "float32"), "bias": np.ones(D, "float32")}
WEIGHT = {"weight": np.ones((V, D), "float32")}

STATE_DICTS = {
    "nonlinearity": (RNN, {}, ValueError, "RNN's nonlinearity: activation= 'tanh' or 'relu', got None"),
    "unknown nonlinearity": (RNN, {"activation": "gelu"}, ValueError, "got 'gelu'"),
    "no RNN": (lstm_arrays(), {"activation": "tanh"}, ValueError, "activation='tanh': there is no RNN"),
    "eps": (NORM, {}, ValueError, "no array tells the eps of its LayerNorm: give epsilon="),
    "eps of nothing": (lstm_arrays(), {"epsilon": 1e-5}, ValueError, "there is no LayerNorm"),
    "bad eps": (NORM, {"epsilon": -1.0}, ValueError, "epsilon: expected a positive number"),
    "lone weight": (WEIGHT, {}, ValueError, "its arrays may be of Embedding or Linear: say which by parts="),
    "lone vector": ({"weight": NORM["weight"]}, {}, ValueError, "LayerNorm or RMSNorm or PReLU"),
    "norm without counterpart": (
        {"n.weight": NORM["weight"]},
        {"parts": {"n": "RMSNorm"}},
        ValueError,
        "'n': .*RMSNorm",
    ),
    "not that": (
        WEIGHT,
        {"parts": {"": "LayerNorm"}},
        ValueError,
        "its shapes are of Embedding or Linear, not of 'Layer",
    ),
    "not a GRU": (lstm_arrays("a."), {"parts": {"a": "GRU"}}, ValueError, "'a': its shapes are of LSTM, not of 'GRU'"),
    "parts": (lstm_arrays("a."), {"parts": {"b": None}}, ValueError, r"parts: expected a mapping of the names \['a'\]"),
    "parts as list": (lstm_arrays("a."), {"parts": ["a"]}, ValueError, "parts: expected a mapping"),
    "parts of numbers": (WEIGHT, {"parts": {"": 3}}, ValueError, "not of 3"),
    "sorted": (dict(sorted(model_arrays().items())), {"epsilon": 1.0}, ValueError, "names are in no order that tells"),
    "three gates more": (
        RNN | {"weight_hh_l0": np.ones((2 * H, H), "float32")},
        {},
        ValueError,
        "1 .RNN., 3 .GRU. or 4",
    ),
    "bias of one": (without(lstm_arrays(), "bias_hh_l0"), {}, ValueError, "'bias_hh_l0' is missing"),
    "hh": (without(lstm_arrays("x."), "x.weight_hh_l0"), {}, ValueError, "'x.weight_hh_l0' is missing"),
    "a layer": (
        without(lstm_arrays() | {"weight_ih_l2": WEIGHT["weight"]}),
        {},
        ValueError,
        "unexpected arrays: 'weight_ih_l2'",
    ),
    "name": (lstm_arrays() | {"momentum": NORM["weight"]}, {}, ValueError, "unexpected name 'momentum'"),
    "weight norm": (
        {"weight_g": WEIGHT["weight"], "weight_v": WEIGHT["weight"]},
        {},
        ValueError,
        "unexpected name 'weight_g'",
    ),
    "conv": (
        {"weight": np.ones((2, 3, 4), "float32"), "bias": np.ones(2, "float32")},
        {},
        ValueError,
        r"\(3, 1\) axes",
    ),
    "shape": (
        lstm_arrays() | {"bias_ih_l0": NORM["bias"]},
        {},
        ValueError,
        r"bias_ih_l0: expected shape \(20\), got \(3,\)",
    ),
    "axes": (
        lstm_arrays() | {"weight_hh_l0": NORM["bias"]},
        {},
        ValueError,
        r"weight_hh_l0: expected two axes, got .*\(3,\)",
    ),
    "mixed": (
        lstm_arrays() | {"bias_ih_l0": np.ones(4 * H)},
        {},
        ValueError,
        "bias_ih_l0 is float64, and weight_ih_l0 is",
    ),
    "nan": (
        lstm_arrays() | {"bias_ih_l0": np.full(4 * H, np.nan, "float32")},
        {},
        ValueError,
        "expected finite numbers",
    ),
    "integers": (WEIGHT | {"bias": np.ones(V, int)}, {}, TypeError, "bias: expected one of float16, .*, got int64"),
    "objects": (WEIGHT | {"bias": object()}, {}, TypeError, "bias: expected one of float16"),
    "None": (WEIGHT | {"bias": None}, {}, TypeError, "bias: expected one of float16"),
    "longdouble": (WEIGHT | {"bias": np.ones(V, np.longdouble)}, {}, TypeError, "expected one of float16"),
    "nested": ({"model": WEIGHT, "epoch": 3}, {}, TypeError, "model is a mapping itself"),
    "number": ({3: WEIGHT["weight"]}, {}, TypeError, "expected names, got 3"),
    "no rows": (
        {"weight": np.ones((0, 3), "float32"), "bias": np.ones(1, "float32")},
        {},
        ValueError,
        r"shape \(0, 3\)",
    ),
    "empty": ({}, {}, ValueError, "there are no arrays"),
    "list": ([WEIGHT["weight"]], {}, TypeError, "expected a torch module, a state_dict or a path, got list"),
    "pickle": (
        "model.pt",
        {},
        ValueError,
        "model.pt: expected a .safetensors file. Others are pickles, .* never loaded",
    ),
    "path": (Path("a/model.bin"), {}, ValueError, "never loaded"),
    "sizes": (
        lstm_arrays("a.") | lstm_arrays("b."),
        {},
        ValueError,
        r"state_dict: its parts cannot run one after another: .*cells\[1\] reads size 3 and gets 5",
    ),
}


@pytest.mark.parametrize("case", STATE_DICTS)
def test_state_dicts_that_do_not_tell(case):
    arrays, options, error, message = STATE_DICTS[case]
    with pytest.raises(error, match=message):
        from_torch(arrays, **options)


def weights_for(cell):
    return redraw(0, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), check.shapes_of_params(cell)))


CELLS = {
    "peephole": (LSTM(D, H, peephole=True), r"^cell: LSTM\(.*\): peephole=True: torch's LSTM has no such option"),
    "coupled": (LSTM(D, H, coupled=True), "coupled=True"),
    "layer_norm": (LSTM(D, H, layer_norm=True), "layer_norm=True"),
    "cell_clip": (LSTM(D, H, cell_clip=1.0), "cell_clip=1.0"),
    "gate_clip": (LSTM(D, H, gate_clip=1.0), "gate_clip=1.0"),
    "Elman": (Elman(D, H, gate_clip=1.0), "gate_clip=1.0: torch's RNN has no such option"),
    "gate": (LSTM(D, H, gate_activation="hard_sigmoid"), "gate_activation='hard_sigmoid'"),
    "activation": (LSTM(D, H, activation="relu"), "activation='relu'"),
    "output": (LSTM(D, H, output_activation="relu"), "output_activation='relu'"),
    "reset": (GRU(D, H, reset_after=False), "reset_after=False: torch's GRU resets after the product"),
    "gru activation": (GRU(D, H, activation="relu"), "activation='relu'"),
    "gru norm": (GRU(D, H, layer_norm=True), "layer_norm=True"),
    "elman": (Elman(D, H, activation="sigmoid"), "torch's RNN has tanh and relu only"),
    "merge": (Bidirectional(GRU(D, H), GRU(D, H), "sum"), "merge='sum': torch concatenates both directions"),
    "sizes": (Bidirectional(GRU(D, H), GRU(D, P)), "torch's two directions are of one kind and size"),
    "kinds": (Bidirectional(GRU(D, H), LSTM(D, H)), "torch's two directions are of one kind and size"),
    "below": (
        Stack((Linear(E, D), Bidirectional(GRU(D, H), jaxrnn.MGU(D, H)))),
        r"^cell.cells\[1\].backward: MGU\(.*torch has no module that computes this",
    ),
    "place": (Stack((Linear(E, D), LSTM(D, H, peephole=True))), r"^cell.cells\[1\]: LSTM\(.*peephole=True"),
    "direction": (
        Bidirectional(LSTM(D, H, peephole=True), LSTM(D, H, peephole=True)),
        r"^cell.forward: LSTM\(.*peephole=True",
    ),
    "backward": (jaxrnn.Backward(GRU(D, H)), r"^cell: Backward\(.*torch has no module"),
    "pool": (Pool(GRU(D, H)), r"^cell: Pool\(.*torch has no module"),
    "learned": (jaxrnn.LearnedCarry(GRU(D, H)), r"^cell: LearnedCarry\(.*torch has no module"),
    "residual": (jaxrnn.Residual(GRU(D, D)), r"^cell: Residual\(.*torch has no module"),
    "zoneout": (jaxrnn.Zoneout(GRU(D, H), 0.1), r"^cell: Zoneout\(.*torch has no module"),
    "skip": (Stack((GRU(D, H), GRU(D + H, H)), skip=True), "skip=True: torch has no skip connections"),
    "dropout": (Dropout(0.2, per_sequence=True), "per_sequence=True: torch's Dropout draws at each step"),
    "dropout between": (
        Stack((GRU(D, H), Dropout(0.2, per_sequence=True), GRU(H, H))),
        r"^cell.cells\[1\]: .*per_sequence=True",
    ),
    "function": (Apply(jnp.sin), "torch has no module of this function"),
    "named function": (Apply(("affine", 2.0, 1.0)), "torch has no module of this function"),
}


@pytest.mark.parametrize("case", CELLS)
def test_cells_without_a_counterpart(torch, case):
    cell, message = CELLS[case]
    with pytest.raises(ValueError, match=message):
        to_torch(cell, weights_for(cell))


def test_params_that_do_not_fit(torch):
    cell = Stack((LSTM(D, H, projection_size=P), Linear(P, E)))
    params = weights_for(cell)
    with pytest.raises(ValueError, match=r"params\[0\]\.w_p: .* expects shape \(5, 2\), got None"):
        to_torch(cell, (params[0]._replace(w_p=None), params[1]))
    with pytest.raises(TypeError, match=r"params: Stack"):
        to_torch(cell, params[0])
    with pytest.raises(ValueError, match=r"params\[0\].w_x: .* expects shape"):
        to_torch(cell, (params[0]._replace(w_x=params[0].w_h), params[1]))
    with pytest.raises(ValueError, match=r"params\[1\].b: expected finite"):
        to_torch(cell, (params[0], params[1]._replace(b=np.full(E, np.inf, "float32"))))
    with pytest.raises(TypeError, match=r"cell: expected a jaxrnn.Cell, got \{\}"):
        to_torch({}, params)


TRACED = {
    "from_torch": (from_torch, lstm_arrays(), "state_dict: bias_hh_l0"),
    "to_torch": (lambda params: to_torch(LSTM(D, H), params), weights_for(LSTM(D, H)), "params.w_x"),
    "carry_from_torch": (lambda h: carry_from_torch(GRU(D, H), h), np.zeros((1, H)), "states: h"),
    "carry_to_torch": (lambda h: carry_to_torch(GRU(D, H), jaxrnn.GRUCarry(h)), np.zeros(H), "carry: h"),
}


@pytest.mark.parametrize("case", TRACED)
@pytest.mark.parametrize("transform", [jax.jit, jax.vmap], ids=["jit", "vmap"])
def test_numbers_that_are_traced(case, transform):
    convert, tree, name = TRACED[case]
    tree = jax.tree.map(lambda leaf: np.stack([leaf] * 2), tree) if transform is jax.vmap else tree
    with pytest.raises(TypeError, match=f"{name}: expected numbers, got a tracer: convert outside of jax.jit"):
        transform(convert)(tree)


def test_modules_that_do_not_fit(torch):
    nn = torch.nn
    cell = Stack((LSTM(D, H), Linear(H, E)))
    params = weights_for(cell)

    def refused(message, *parts, cell=cell, params=params, error=ValueError):
        with pytest.raises(error, match=message):
            to_torch(cell, params, module=nn.Sequential(*parts))

    head = nn.Linear(H, E)
    refused(r"^cell.cells\[0\]: LSTM\(.*\): the module's 0 is LSTM\(input_size=3, hidden_size=6\)", nn.LSTM(D, 6), head)
    refused(r"^cell.cells\[0\]: LSTM\(.*\): the module's 0 is GRU", nn.GRU(D, H), head)
    refused(r"^cell.cells\[1\]: Linear\(.*\): the module has nothing more", nn.LSTM(D, H))
    refused(r"^cell: .*: nothing is left for the module's 2, Apply\(fn='tanh'\)", nn.LSTM(D, H), head, nn.Tanh())
    refused("module: it has no 1.bias, which is not 0 everywhere", nn.LSTM(D, H), nn.Linear(H, E, bias=False))
    refused("it has no 0.bias_ih_l0, which is not 0 everywhere", nn.LSTM(D, H, bias=False), head)
    with pytest.raises(TypeError, match=r"module: expected a torch.nn.Module, got dict"):
        to_torch(cell, params, module={})
    module = nn.Sequential(nn.LSTM(D, H), nn.Linear(H, E))
    module[1].bias.data = torch.ones(2)
    with pytest.raises(ValueError, match=r"module: 1.bias: expected shape \(2,\), got \(6,\)"):
        to_torch(cell, params, module=module)
    norm = jaxrnn.LayerNorm(D)
    with pytest.raises(ValueError, match="module: it has no weight, which is not 1 everywhere"):
        to_torch(norm, weights_for(norm), module=nn.LayerNorm(D, elementwise_affine=False))
    with pytest.raises(ValueError, match=r"the module's LayerNorm is LayerNorm\(size=3, epsilon=0.1\)"):
        to_torch(norm, weights_for(norm), module=nn.LayerNorm(D, eps=0.1))
    with pytest.raises(ValueError, match="weight is tied to"):
        to_torch(cell, params, module=tied(nn))
    # Dropout has no weights, and a module may have it elsewhere.
    loaded = nn.Sequential(nn.LSTM(D, H), nn.Dropout(0.4), nn.Linear(H, E))
    loaded.load_state_dict(to_torch(cell, params, module=loaded))
    # Nor do modules on the meta device need numbers.
    assert list(to_torch(cell, params, module=nn.Sequential(nn.LSTM(D, H), head).to("meta")))[-1] == "1.bias"


# Carries


def test_carries_in_torchs_order(torch):
    cell, _ = from_torch(torch.nn.LSTM(D, H, 2, bidirectional=True, proj_size=P))
    h = np.arange(4 * B * P, dtype="float64").reshape(4, B, P)
    c = np.arange(4 * B * H, dtype="float64").reshape(4, B, H)
    carry = carry_from_torch(cell, (torch.tensor(h), torch.tensor(c)))
    np.testing.assert_array_equal(carry[0].backward.h, h[1])
    np.testing.assert_array_equal(carry[1].forward.c, c[2])
    back = numbers(carry_to_torch(cell, carry))
    np.testing.assert_array_equal(back[0], h)
    np.testing.assert_array_equal(back[1], c)
    model = Stack((jaxrnn.Embed(V, D), GRU(D, H), Dropout(0.1)))
    carry = carry_from_torch(model, jnp.ones((1, H)))
    assert carry[0] == carry[2] == ()
    assert carry_to_torch(model, carry).shape == (1, H)


STATES = {
    "one of two": (LSTM(D, H), np.zeros((1, H)), ValueError, "states: expected h, c of .*got 1 states"),
    "two of one": (GRU(D, H), (np.zeros((1, H)),) * 2, ValueError, "states: expected h of .*got 2 states"),
    "rows": (GRU(D, H), np.zeros((2, B, H)), ValueError, r"states: h: expected shape \(1, 4, 5\), got \(2, 4, 5\)"),
    "sizes": (
        LSTM(D, H, projection_size=P),
        (np.zeros((1, P)), np.zeros((1, P))),
        ValueError,
        r"c: expected shape \(1, 5\)",
    ),
    "no axes": (GRU(D, H), np.float32(0), ValueError, "states: h: expected shape"),
    "pool": (
        Pool(GRU(D, H)),
        np.zeros((1, H)),
        TypeError,
        "cell: expected RNNs, GRUs or LSTMs, all of one kind and size",
    ),
    "none": (Linear(D, H), np.zeros((1, H)), TypeError, "cell: expected RNNs"),
    "several": (Stack((GRU(D, H), LSTM(H, H))), np.zeros((2, H)), TypeError, "cell: expected RNNs"),
}


@pytest.mark.parametrize("case", STATES)
def test_states_that_do_not_fit(case):
    cell, states, error, message = STATES[case]
    with pytest.raises(error, match=message):
        carry_from_torch(cell, states)


def test_carries_that_do_not_fit(torch):
    with pytest.raises(TypeError, match="carry: LSTM"):
        carry_to_torch(LSTM(D, H), jaxrnn.GRUCarry(jnp.zeros(H)))
    with pytest.raises(ValueError, match="carry"):
        carry_to_torch(LSTM(D, H), jaxrnn.LSTMCarry(jnp.zeros(H), jnp.zeros(P)))


# Damage


def assert_refused_or_finite(source, **options):
    """It raises ValueError or TypeError, or the model is whole: how often it was refused."""
    try:
        cell, params = from_torch(source, **options)
    except (ValueError, TypeError) as error:
        return len(str(error)) > 0
    placed(cell, params)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    return 0


def damaged(rng, arrays):
    """One thing changed: a name, a shape, a dtype, a number, an array less or more, the order."""
    arrays = dict(arrays)
    name = str(rng.choice(list(arrays)))
    other = str(rng.choice(list(arrays)))
    array = arrays[name]
    dtypes = ["float16", "float64", "int32", "bool", "complex64", "object", "U4"]
    match rng.integers(11):
        case 0:
            del arrays[name]
        case 1:
            position = rng.integers(len(name) + 1)
            arrays[name[:position] + chr(rng.integers(32, 127)) + name[position + 1 :]] = arrays.pop(name)
        case 2:
            arrays[name] = array[..., : rng.integers(array.shape[-1])]
        case 3:
            arrays[name] = array[None] if rng.integers(2) else array.ravel()
        case 4:
            arrays[name] = array.astype(str(rng.choice(dtypes)))
        case 5:
            arrays[name] = array.copy()
            arrays[name].flat[rng.integers(array.size)] = rng.choice([np.nan, np.inf, -np.inf, 3e38, 0])
        case 6:
            arrays[name] = arrays[other]
        case 7:
            arrays[name + str(rng.choice(["_reverse", ".x", "_l1", "0", "."]))] = array
        case 8:
            arrays[name] = [None, 3, "text", (), np.float32(1), {}, [list(array), "x"]][rng.integers(7)]
        case 9:
            arrays[name] = np.swapaxes(array, 0, -1) if array.ndim > 1 else np.zeros((*array.shape, 0), array.dtype)
        case _:
            order = rng.permutation(list(arrays))
            arrays = {str(name): arrays[name] for name in order}
    return arrays


def test_a_thousand_damaged_state_dicts():
    sources = [(model_arrays(), {"parts": PARTS, "epsilon": 1e-5}), (model_arrays(), {"epsilon": 1e-5})]
    sources += [(lstm_arrays("1.") | lstm_arrays("2.", below=H), {})]
    rng = np.random.default_rng(0)
    refused = 0
    for k in range(1000):
        arrays, options = sources[k % 3]
        refused += assert_refused_or_finite(damaged(rng, arrays), **options)
    assert 500 < refused < 1000


def damaged_file(rng, data):
    """The bytes of a safetensors file with one thing changed."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    header.pop("__metadata__", None)
    name = str(rng.choice(list(header)))
    huge = int(rng.choice([2**31, 2**40, 2**62, 2**63, 2**64, -1]))
    match rng.integers(10):
        case 0:
            return data[: rng.integers(len(data))]
        case 1:
            return struct.pack("<Q", int(rng.integers(0, 2**63))) + data[8:]
        case 2:
            return struct.pack("<Q", max(0, size + int(rng.integers(-20, 20)))) + data[8:]
        case 3:
            position = rng.integers(8, 8 + size)
            return data[:position] + bytes([rng.integers(256)]) + data[position + 1 :]
        case 4:
            position = rng.integers(len(data))
            return data[:position] + bytes([rng.integers(256)]) + data[position + 1 :]
        case 5:
            header[name]["shape"] = [huge, int(rng.choice([0, 1, huge]))]
        case 6:
            header[name]["data_offsets"][rng.integers(2)] = (
                abs(huge) if rng.integers(2) else int(rng.integers(len(data)))
            )
        case 7:
            header[name]["dtype"] = str(rng.choice(["F64", "F16", "BF16", "I32", "F8_E4M3", "BOOL", "U8", "X", ""]))
        case 8:
            header[name + str(rng.choice(["x", "_reverse", ".weight"]))] = header.pop(name)
        case _:
            header[name]["shape"].reverse() if rng.integers(2) else header[name].pop("shape")
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def test_a_thousand_damaged_files(safetensors, tmp_path):
    data = safetensors.save(model_arrays())
    path = tmp_path / "m.safetensors"
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(1000):
        path.write_bytes(damaged_file(rng, data))
        refused += assert_refused_or_finite(path, parts=PARTS, epsilon=1e-5)
    assert 500 < refused < 1000
    with pytest.raises(FileNotFoundError):
        from_torch(tmp_path / "none.safetensors")


def test_files_of_other_dtypes(safetensors, tmp_path):
    header = json.dumps({"weight": {"dtype": "F8_E4M3", "shape": [2, 2], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"1234")
    with pytest.raises(TypeError, match="weight: expected one of F16, BF16, F32, F64, got F8_E4M3"):
        from_torch(path)
    path.write_bytes(b"not a file of this kind")
    with pytest.raises(ValueError, match=r"m.safetensors: not a valid safetensors file"):
        from_torch(path)
