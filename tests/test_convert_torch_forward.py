"""torch modules with a `forward` of their own: converted where it runs their children in order, refused elsewhere."""

import warnings

import conversion
import jax
import numpy as np
import pytest
from conversion import assert_close

import jaxrnn
from jaxrnn import LSTM, Apply, Linear, Pool, Stack
from jaxrnn.convert.torch import from_torch, to_torch

T, B, D, H, E, V = 6, 2, 3, 4, 2, 999


@pytest.fixture
def torch():
    module = conversion.peer("torch")
    module.set_num_threads(1)
    return module


def model(torch, forward, parts):
    """A module of a class of its own with these parts, each made by a function of torch.nn, and this `forward`."""
    kind = type("Model", (torch.nn.Module,), {"forward": forward})
    module = kind()
    for name, make in parts.items():
        module.add_module(name, make(torch.nn))
    return module


RNN = {"rnn": lambda nn: nn.LSTM(D, H)}
ROWS = {"rnn": lambda nn: nn.LSTM(D, H, batch_first=True)}
HEAD = {"head": lambda nn: nn.Linear(H, E)}
EMBED = {"embed": lambda nn: nn.Embedding(V, D)}
TWO = {"first": lambda nn: nn.Linear(D, D), "second": lambda nn: nn.Linear(D, D)}


def one_sequence(self, tokens):
    """The form of torch's tutorial: a batch of one inside."""
    ys, _ = self.rnn(self.embed(tokens).view(len(tokens), 1, -1))
    return self.head(ys.view(len(tokens), -1))


def with_initial_states(self, xs):
    import torch

    h = torch.zeros(1, xs.shape[1], H)
    return self.head(self.rnn(xs, (h, h))[0])


def dropping(self, xs):
    from torch.nn import functional

    return self.head(functional.dropout(self.rnn(xs)[0], 0.5, self.training))


def by_steps(self, xs):
    import torch

    state, ys = None, []
    for x in xs:
        state = self.cell(x, state)
        ys.append(self.head(state[0]))
    return torch.stack(ys)


def changing_itself(self, xs):
    warnings.warn("it runs", stacklevel=2)
    ys, self.state = self.rnn(xs)
    xs.new_empty(1).normal_()
    self.rnn.weight_hh_l0.zero_()
    return self.head(ys)


IN_ORDER = {
    "time-major": (lambda self, xs: self.head(self.rnn(xs)[0]), RNN | HEAD),
    "batch-major": (lambda self, xs: self.head(self.rnn(xs)[0]), ROWS | HEAD),
    "turned inside": (lambda self, xs: self.head(self.rnn(xs.transpose(0, 1))[0].transpose(0, 1)), RNN | HEAD),
    "tokens": (lambda self, xs: self.head(self.rnn(self.embed(xs))[0]), EMBED | ROWS | HEAD),
    "one sequence": (one_sequence, EMBED | RNN | HEAD),
    "output and state": (lambda self, xs: self.rnn(xs), RNN),
    "state and output": (lambda self, xs: self.rnn(xs)[::-1], RNN),
    "dict": (lambda self, xs: {"loss": None, "logits": [self.head(self.rnn(xs)[0])]}, RNN | HEAD),
    "initial states": (with_initial_states, RNN | HEAD),
    "dropout": (dropping, RNN | HEAD),
    "steps": (by_steps, {"cell": lambda nn: nn.LSTMCell(D, H)} | HEAD),
    "no weights": (lambda self, xs: self.act(xs), {"act": lambda nn: nn.Tanh()}),
    "changes itself": (changing_itself, ROWS | HEAD),
}


@pytest.mark.parametrize("case", IN_ORDER)
def test_a_forward_that_runs_its_modules_in_order(torch, case):
    forward, parts = IN_ORDER[case]
    module = model(torch, forward, parts)
    before = {name: weight.detach().clone() for name, weight in module.state_dict().items()}
    state = torch.random.get_rng_state()
    cell, params = from_torch(module)
    # The same modules by themselves; the forward of an nn.Sequential is known, even where torch could not run it.
    expected = from_torch(torch.nn.Sequential(*module.children()))
    assert cell == expected[0]
    assert_close(params, expected[1])

    assert torch.equal(state, torch.random.get_rng_state())
    assert all(part.training for part in module.modules())
    assert all(torch.equal(weight, before[name]) for name, weight in module.state_dict().items())
    assert all(weight.requires_grad and weight.grad is None for weight in module.parameters())
    assert "state" not in vars(module)


ELSE = "its forward computes something else than its modules one after another"
NOT_RUN = "its forward cannot be compared with its modules on an input of random numbers: "

OTHERWISE = {
    "relu": (lambda self, xs: self.head(self.rnn(xs)[0]).relu(), RNN | HEAD, ELSE),
    "skipped": (lambda self, xs: self.head(self.rnn(xs)[0]), RNN | {"act": lambda nn: nn.Tanh()} | HEAD, ELSE),
    "last": (lambda self, xs: self.head(self.rnn(xs)[0][:, -1]), ROWS | HEAD, ELSE),
    "last of one sequence": (lambda self, xs: self.head(self.rnn(xs)[0][-1]), RNN | HEAD, ELSE),
    "order": (lambda self, xs: self.first(self.second(xs)), TWO, ELSE),
    "residual": (lambda self, xs: xs + self.second(self.first(xs)), TWO, ELSE),
    "reversed": (lambda self, xs: self.head(self.rnn(xs.flip(0))[0]), RNN | HEAD, ELSE),
    "used twice": (lambda self, xs: self.second(self.first(self.first(xs))), TWO, ELSE),
    "state": (lambda self, xs: self.rnn(xs)[1], RNN, ELSE),
    "nothing": (lambda self, xs: None, RNN, ELSE),
    "noise": (lambda self, xs: self.head(self.rnn(xs)[0] + xs.new_empty(H).normal_()), RNN | HEAD, ELSE),
    "padding": (lambda self, xs: self.rnn(self.embed(xs) * (xs != 0)[..., None])[0], EMBED | RNN, ELSE),
    "arguments": (lambda self, xs, lengths: self.rnn(xs)[0], RNN, NOT_RUN + "TypeError: .*'lengths'"),
    "error": (lambda self, xs: 1 // 0, RNN, NOT_RUN + "ZeroDivisionError: "),
    "defined late": (lambda self, xs: self.rnn(self.embed(xs))[0], RNN | EMBED, NOT_RUN + "TypeError: .*Embed expects"),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_a_forward_that_does_something_else(torch, case):
    forward, parts, message = OTHERWISE[case]
    module = model(torch, forward, parts)
    with pytest.raises(ValueError, match=f"^Model: {message}.* parts={{'.*'}} in the order .*jaxrnn.Pool"):
        from_torch(module)


def test_weights_that_happen_to_do_nothing(torch):
    """What is compared holds for all weights: zeros hide every activation, and an identity every layer."""
    zeros = model(torch, lambda self, xs: self.rnn(xs)[0].sigmoid() * 0 + self.rnn(xs)[0].relu(), RNN)
    identity = model(torch, lambda self, xs: self.second(xs), TWO)
    with torch.no_grad():
        for weight in zeros.parameters():
            weight.zero_()
        identity.first.weight.copy_(torch.eye(D))
        identity.first.bias.zero_()
    for module in (zeros, identity):
        with pytest.raises(ValueError, match=ELSE):
            from_torch(module)


def test_a_forward_inside_of_modules_of_torch(torch):
    nn = torch.nn
    rnn = model(torch, lambda self, xs: self.rnn(xs)[0], RNN)
    assert from_torch(nn.Sequential(rnn, nn.Linear(H, E)))[0] == Stack((Stack((LSTM(D, H),)), Linear(H, E)))
    rnn = model(torch, lambda self, xs: self.rnn(xs)[0].tanh(), RNN)
    for outer in (nn.Sequential, lambda *parts: nn.ModuleList(parts)):
        with pytest.raises(ValueError, match=rf"^'0' \(Model\): {ELSE}.* parts={{'0.rnn': 'LSTM', '1': 'Linear'}}"):
            from_torch(outer(rnn, nn.Linear(H, E)))
    # Subclasses of nn.Sequential: without a forward of their own, with one, and with another way to call it.
    plain = type("Plain", (nn.Sequential,), {})
    assert from_torch(plain(nn.LSTM(D, H), nn.Linear(H, E)))[0] == Stack((LSTM(D, H), Linear(H, E)))
    for method in ("forward", "__call__"):
        kind = type("Mine", (nn.Sequential,), {method: lambda self, xs: self[0](xs).relu()})
        with pytest.raises(ValueError, match=f"^Mine: {ELSE}"):
            from_torch(kind(nn.Linear(D, E)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_forwards_of_other_dtypes(torch, dtype):
    with jax.enable_x64(dtype == "float64"):
        module = model(torch, lambda self, xs: self.head(self.rnn(xs)[0]), RNN | HEAD).to(getattr(torch, dtype))
        _, params = from_torch(module)
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {dtype}
        module = model(torch, lambda self, xs: self.head(self.rnn(xs)[0]).relu(), RNN | HEAD)
        with pytest.raises(ValueError, match=ELSE):
            from_torch(module.to(getattr(torch, dtype)))


def test_inside_of_jit(torch):
    module = model(torch, lambda self, xs: self.head(self.rnn(xs)[0]), RNN | HEAD)
    _, params = from_torch(module)
    xs = np.ones((T, B, D), np.float32)
    ys = jax.jit(lambda xs: jaxrnn.scan(*from_torch(module), None, xs)[1])(xs)
    assert_close(ys, module(torch.tensor(xs)).detach().numpy())
    assert_close(jax.jit(lambda: from_torch(module)[1])(), params)


def test_the_way_that_the_message_names(torch):
    """`parts` in the order in which they run, and `Pool` and `Apply` for what forward does besides."""
    module = model(torch, lambda self, xs: self.head(self.rnn(xs)[0][:, -1]).relu(), ROWS | HEAD)
    with pytest.raises(ValueError, match=ELSE) as refused:
        from_torch(module)
    assert "parts={'rnn': 'LSTM', 'head': 'Linear'}" in str(refused.value)
    cell, (rnn, head) = from_torch(module.state_dict(), parts={"rnn": "LSTM", "head": "Linear"})
    cell, params = Stack((Pool(cell.cells[0]), cell.cells[1], Apply("relu"))), (rnn, head, ())
    xs = np.random.default_rng(0).normal(size=(B, T, D)).astype("float32")
    ys = jaxrnn.scan(cell, params, None, xs, time_axis=1)[1]
    assert_close(ys, module(torch.tensor(xs)).detach().numpy())
    assert list(to_torch(Stack(cell.cells[:2]), params[:2], module=module)) == list(module.state_dict())
