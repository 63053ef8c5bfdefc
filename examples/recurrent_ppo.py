"""Reinforcement learning with memory: PPO with a recurrent policy, where velocities are hidden.

Environments: CartPole and Pendulum of gymnax, of which a policy sees positions and angles alone. One observation does
not tell which way the pole falls; whoever remembers those before it knows.

Policies: a linear layer, a recurrent cell and two more layers, with `GRU`, `MinGRU`, `LRU` or `GatedDeltaNet` as the
cell. `GatedDeltaNet` comes in the layer of its paper, `gated_delta_block`: without the convolution in it, over four
observations, it learns too slowly here. Beside them are two feed-forward policies, the same network with a layer in
place of the cell: a blind one, which sees positions alone, too, and one that also sees velocities.

Training: `make_train(config)` returns `train(key)`, a whole training as one pure function, so that all seeds are
`jax.jit(jax.vmap(train))(keys)`. Many environments run beside one another, and each begins anew when its episode ends.
The flag that comes with the first observation of an episode goes to `jaxrnn.step(..., reset=)` in the rollout and to
`jaxrnn.scan(..., reset=)` in the update, so that no memory passes from one episode to the next. An update goes through
whole rollouts, from the carry that each began with.

Comparison: the return of new episodes, by the most likely action. What memory wins is the share
(recurrent - blind) / (seeing - blind) of the medians over the seeds. Every cell has to win 1 - `--margin`. Medians,
since PPO can lose what it has learnt: with seed 0, one of four `GatedDeltaNet` policies balances the pole, and falls
at the end.

Exit status: 0 if every cell does in every environment, 1 if not; with `--quick` always 0.

Reference: Schulman et al. 2017, Proximal policy optimization algorithms, arXiv 1707.06347; generalised advantages:
Schulman et al. 2015, arXiv 1506.02438; a whole training in one function: Lu et al. 2022, arXiv 2210.05639.

What it needs beside the package: pip install -e ".[examples]"
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.scipy.stats import norm
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import jaxrnn
from jaxrnn import GRU, LRU, Apply, Cell, Linear, MinGRU, Stack, gated_delta_block
from jaxrnn.analysis import STYLE
from jaxrnn.cell import output_size
from jaxrnn.typing import PyTree

SIZE = 64
FEED_FORWARD = Stack(Linear(SIZE, SIZE), Apply("tanh"))
SEEING, BLIND = "feed-forward, sees velocities", "feed-forward"
CELLS = {
    "GRU": GRU(SIZE, SIZE),
    "MinGRU": MinGRU(SIZE, SIZE),
    "LRU": LRU(SIZE, SIZE),
    "GatedDeltaNet": gated_delta_block(SIZE, heads=2, key_size=16, value_size=32),
}
POLICIES: dict[str, Cell] = {SEEING: FEED_FORWARD, BLIND: FEED_FORWARD, **CELLS}


class Task(NamedTuple):
    """An environment, and what depends on it."""

    name: str  # in gymnax
    scale: tuple[float, ...]  # which observations are divided by
    positions: tuple[int, ...]  # where an observation holds no velocity
    discount: float
    steps: int  # of every environment in training


TASKS = {
    "CartPole": Task("CartPole-v1", (2.4, 2.0, 0.2, 2.0), (0, 2), 0.99, 20_480),
    "Pendulum": Task("Pendulum-v1", (1.0, 1.0, 8.0), (0, 1), 0.95, 30_720),
}


class Config(NamedTuple):
    """All that makes a training but its key."""

    task: Task
    cell: Cell
    sees_velocities: bool
    environments: int = 16
    rollout: int = 128  # steps of every environment between updates
    epochs: int = 4  # of an update
    minibatches: int = 4  # of an epoch, each of some environments
    learning_rate: float = 1e-3  # at first; it falls to 0
    gae_lambda: float = 0.95
    clip: float = 0.2  # of the ratio of probabilities
    reward_scale: float = 0.1  # in training alone
    episodes: int = 64  # of the test


class Params(NamedTuple):
    network: PyTree
    log_deviation: Array  # of the numbers of an action, (A,); of none where the action is a choice


class TrainState(NamedTuple):
    params: Params
    moments: PyTree


class Actors(NamedTuple):
    """What goes on from step to step, of every environment."""

    state: PyTree
    carry: PyTree
    observation: Array
    reset: Array  # whether the observation is the first of an episode
    sum: Array  # of the rewards of this episode
    returned: Array  # the sum of the last episode that ended; NaN before


class Outcome(NamedTuple):
    """What a step of every environment gives."""

    observation: Array  # where the episode has ended, the first one of the next
    reward: Array
    terminated: Array
    ended: Array  # terminated, or at the limit of time
    final: Array  # the observation after the step in the same episode, even where that has ended


class Transition(NamedTuple):
    """What an update learns from a step of every environment."""

    observation: Array
    reset: Array
    action: Array
    log_probability: Array
    value: Array
    reward: Array
    next_value: Array  # 0 where the episode has terminated
    ended: Array


class Rollout(NamedTuple):
    carry: PyTree  # before the first step
    transitions: Transition  # (steps, environments, ...)
    advantages: Array


class Trained(NamedTuple):
    """Of one seed."""

    params: Params
    returns: Array  # the mean over the environments after every update, (updates,); NaN before each has had an episode
    tested: Array  # the mean of the test


class Run(NamedTuple):
    """Of a policy: the returns (seeds, updates), those of the test (seeds,), the number of parameters, and seconds."""

    returns: np.ndarray
    tested: np.ndarray
    parameters: int
    seconds: float


Found = dict[str, dict[str, Run]]


class Environments:
    """Many of one environment beside one another, as a policy sees them; each begins anew when its episode ends."""

    def __init__(self, task: Task, count: int, sees_velocities: bool):
        self._one, self._params = gymnax.make(task.name)
        self._count = count
        self._seen = tuple(range(len(task.scale))) if sees_velocities else task.positions
        self._scale = np.array(task.scale, np.float32)[None]
        space = self._one.action_space(self._params)
        self.numbers = sum(space.shape)  # of an action; 0 where it is a choice
        self.inputs, self.outputs = len(self._seen), self.numbers or space.n  # of a policy
        self.longest = self._params.max_steps_in_episode

    def begin(self, key: Array) -> tuple[PyTree, Array]:
        """States and observations."""
        observations, states = jax.vmap(self._one.reset, (0, None))(jax.random.split(key, self._count), self._params)
        return states, self._view(observations)

    def step(self, states: PyTree, actions: Array, key: Array) -> tuple[PyTree, Outcome]:
        keys = jax.random.split(key, self._count)
        step = jax.vmap(self._one.step, (0, 0, 0, None))
        observations, states, reward, terminated, truncated, info = step(keys, states, actions, self._params)
        final = self._view(info["final_observation"])
        return states, Outcome(self._view(observations), reward, terminated, terminated | truncated, final)

    def _view(self, observations: Array) -> Array:
        return (observations / self._scale)[:, self._seen]


class Setting(NamedTuple):
    """What all functions of a training share."""

    config: Config
    environments: Environments
    network: Stack
    optimizer: optax.GradientTransformation


def network(cell: Cell, environments: Environments) -> Stack:
    """From observations to what tells the actions, and to the value, which is the last output."""
    head = Linear(output_size(cell), SIZE), Apply("tanh"), Linear(SIZE, environments.outputs + 1)
    return Stack(Linear(environments.inputs, SIZE), Apply("tanh"), cell, *head)


def log_probability(params: Params, outputs: Array, actions: Array) -> Array:
    """Of choices, whose logits are `outputs`; or of numbers, whose means they are."""
    if params.log_deviation.size:
        return norm.logpdf(actions, outputs, jnp.exp(params.log_deviation)).sum(-1)
    return jnp.take_along_axis(jax.nn.log_softmax(outputs), actions[..., None], axis=-1)[..., 0]


def sample(params: Params, outputs: Array, key: Array) -> Array:
    if params.log_deviation.size:
        return outputs + jnp.exp(params.log_deviation) * jax.random.normal(key, outputs.shape)
    return jax.random.categorical(key, outputs)


def likeliest(params: Params, outputs: Array) -> Array:
    return outputs if params.log_deviation.size else outputs.argmax(-1)


def advantages(transitions: Transition, *, discount: float, gae_lambda: float) -> Array:
    """Generalised advantages; none passes the end of an episode.

    δ_t = r_t + γ v'_t - v_t
    A_t = δ_t + γ λ (1 - ended_t) A_{t+1}
    """
    deltas = transitions.reward + discount * transitions.next_value - transitions.value
    decays = discount * gae_lambda * (1 - transitions.ended)

    def body(advantage: Array, xs: tuple[Array, Array]) -> tuple[Array, Array]:
        delta, decay = xs
        advantage = delta + decay * advantage
        return advantage, advantage

    return lax.scan(body, jnp.zeros_like(deltas[0]), (deltas, decays), reverse=True)[1]


def begin(setting: Setting, params: Params, key: Array) -> Actors:
    states, observations = setting.environments.begin(key)
    rows = observations.shape[:1]
    carry = setting.network.initial_carry(params.network, rows)
    return Actors(states, carry, observations, jnp.ones(rows, bool), jnp.zeros(rows), jnp.full(rows, jnp.nan))


def act(setting: Setting, params: Params, actors: Actors, key: Array) -> tuple[Actors, Transition]:
    """One step of every environment."""
    k_action, k_step = jax.random.split(key)
    step = functools.partial(jaxrnn.step, setting.network, params.network)
    carry, outputs = step(actors.carry, actors.observation, reset=actors.reset)
    outputs, value = outputs[:, :-1], outputs[:, -1]
    action = sample(params, outputs, k_action)
    states, outcome = setting.environments.step(actors.state, action, k_step)
    next_value = step(carry, outcome.final)[1][:, -1]  # also at the limit of time, where the episode could go on
    transition = Transition(
        observation=actors.observation,
        reset=actors.reset,
        action=action,
        log_probability=log_probability(params, outputs, action),
        value=value,
        reward=outcome.reward * setting.config.reward_scale,
        next_value=jnp.where(outcome.terminated, 0, next_value),
        ended=outcome.ended,
    )
    total = actors.sum + outcome.reward
    returned = jnp.where(outcome.ended, total, actors.returned)
    total = jnp.where(outcome.ended, 0, total)
    return Actors(states, carry, outcome.observation, outcome.ended, total, returned), transition


def objective(setting: Setting, params: Params, rollout: Rollout) -> Array:
    """What PPO minimises: the clipped surrogate of the policy, and the error of the values."""
    before, clip = rollout.transitions, setting.config.clip
    _, outputs = jaxrnn.scan(setting.network, params.network, rollout.carry, before.observation, reset=before.reset)
    outputs, values = outputs[..., :-1], outputs[..., -1]
    ratios = jnp.exp(log_probability(params, outputs, before.action) - before.log_probability)
    gains = (rollout.advantages - rollout.advantages.mean()) / (rollout.advantages.std() + 1e-8)
    surrogate = jnp.minimum(ratios * gains, jnp.clip(ratios, 1 - clip, 1 + clip) * gains)
    return -surrogate.mean() + 0.5 * jnp.mean((before.value + rollout.advantages - values) ** 2)


def improve(setting: Setting, state: TrainState, rollout: Rollout, key: Array) -> TrainState:
    """One update: in every epoch, a step of the optimizer for each minibatch of environments."""
    config = setting.config

    def step(state: TrainState, rows: Array) -> tuple[TrainState, None]:
        carry = jax.tree.map(lambda leaf: leaf[rows], rollout.carry)
        transitions, gains = jax.tree.map(lambda leaf: leaf[:, rows], rollout[1:])
        gradient = jax.grad(objective, argnums=1)(setting, state.params, Rollout(carry, transitions, gains))
        updates, moments = setting.optimizer.update(gradient, state.moments)
        return TrainState(jax.tree.map(jnp.add, state.params, updates), moments), None

    keys = jax.random.split(key, config.epochs)
    orders = jax.vmap(jax.random.permutation, (0, None))(keys, config.environments)
    return lax.scan(step, state, orders.reshape(config.epochs * config.minibatches, -1))[0]


def test(setting: Setting, params: Params, key: Array) -> Array:
    """The mean return of one episode of many new environments, by the likeliest actions."""
    config = setting.config
    environments = Environments(config.task, config.episodes, config.sees_velocities)
    k_begin, k_steps = jax.random.split(key)
    first = begin(setting._replace(environments=environments), params, k_begin)

    def step(state: tuple[PyTree, PyTree, Array, Array], key: Array) -> tuple[tuple, Array]:
        states, carry, observation, over = state
        carry, outputs = jaxrnn.step(setting.network, params.network, carry, observation)
        states, outcome = environments.step(states, likeliest(params, outputs[:, :-1]), key)
        rewards = jnp.where(over, 0, outcome.reward)
        return (states, carry, outcome.observation, over | outcome.ended), rewards

    state = first.state, first.carry, first.observation, ~first.reset
    rewards = lax.scan(step, state, jax.random.split(k_steps, environments.longest))[1]
    return rewards.sum(0).mean()


def make_train(config: Config) -> Callable[[Array], Trained]:
    """A whole training, as a pure function of a key."""
    environments = Environments(config.task, config.environments, config.sees_velocities)
    model = network(config.cell, environments)
    updates = config.task.steps // config.rollout
    rate = optax.linear_schedule(config.learning_rate, 0, updates * config.epochs * config.minibatches)
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(rate, eps=1e-5))
    setting = Setting(config, environments, model, optimizer)

    def update(state: tuple[TrainState, Actors], key: Array) -> tuple[tuple[TrainState, Actors], Array]:
        (learnt, actors), (k_act, k_improve) = state, jax.random.split(key)
        carry = actors.carry
        one = functools.partial(act, setting, learnt.params)
        actors, transitions = lax.scan(one, actors, jax.random.split(k_act, config.rollout))
        gains = advantages(transitions, discount=config.task.discount, gae_lambda=config.gae_lambda)
        learnt = improve(setting, learnt, Rollout(carry, transitions, gains), k_improve)
        return (learnt, actors), actors.returned.mean()

    def train(key: Array) -> Trained:
        k_init, k_begin, k_train, k_test = jax.random.split(key, 4)
        params = Params(model.init(k_init), jnp.zeros(environments.numbers))
        state = TrainState(params, optimizer.init(params)), begin(setting, params, k_begin)
        (learnt, _), returns = lax.scan(update, state, jax.random.split(k_train, updates))
        return Trained(learnt.params, returns, test(setting, learnt.params, k_test))

    return train


def run(args: argparse.Namespace) -> Found:
    """The run of every policy in every environment."""
    found: Found = {}
    keys = jax.random.split(jax.random.key(args.seed), args.seeds)
    for name in args.tasks:
        task = TASKS[name]
        task = task._replace(steps=1280 if args.quick else task.steps)
        for kind, cell in POLICIES.items():
            config, begun = Config(task, cell, kind == SEEING), time.perf_counter()
            _, returns, tested = jax.tree.map(np.asarray, jax.jit(jax.vmap(make_train(config)))(keys))
            parameters = jaxrnn.summary(network(cell, Environments(task, 1, kind == SEEING))).count
            each = found.setdefault(name, {})[kind] = Run(returns, tested, parameters, time.perf_counter() - begun)
            words = ", ".join(f"{number:.0f}" for number in tested)
            Console().print(f"{name}: {kind}: {words} in {each.seconds:.0f} s", highlight=False)
    return found


def won(kinds: dict[str, Run], kind: str) -> float:
    """The share of what velocities are worth that a policy wins."""
    median = {name: np.median(each.tested) for name, each in kinds.items()}
    return float((median[kind] - median[BLIND]) / (median[SEEING] - median[BLIND]))


def picture(found: Found) -> Figure:
    """The returns in training, an axes for each environment: medians over the seeds, and from the worst to the best."""
    figure = Figure(figsize=(3.5 * len(found), 2.8))
    places = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (name, kinds) in zip(places, found.items(), strict=True):
        for k, (kind, each) in enumerate(kinds.items()):
            smooth = np.array([np.convolve(line, np.ones(10) / 10, "valid") for line in each.returns])
            steps = (10 + np.arange(smooth.shape[1])) * Config._field_defaults["rollout"] / 1000
            color = {SEEING: "0.3", BLIND: "0.65"}.get(kind, f"C{k - 2}")
            axes.plot(steps, np.median(smooth, axis=0), color=color, label=kind, ls="--" if k < 2 else "-")
            axes.fill_between(steps, smooth.min(0), smooth.max(0), color=color, alpha=0.15, lw=0)
        axes.set(xlabel="thousand steps of every environment", ylabel="return of an episode", title=name)
    figure.legend(*places[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps, for a first look")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="which (default: all)")
    parser.add_argument("--seeds", type=int, default=4, help="number of policies of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all of them (default: %(default)s)")
    parser.add_argument("--margin", type=float, default=0.1, help="share that may be missing (default: %(default)s)")
    parser.add_argument("--out", default="recurrent_ppo.png", metavar="PATH", help="picture (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    args = parse(argv)
    found = run(args)
    table = Table("policy", "parameters", "returns of the seeds", "median", "share won", "seconds")
    for name, kinds in found.items():
        table.add_section()
        table.add_row(f"[bold]{name}[/]")
        for kind, each in kinds.items():
            words, share = ", ".join(f"{one:.0f}" for one in each.tested), won(kinds, kind)
            numbers = f"{np.median(each.tested):.0f}", f"{share:.3f}", f"{each.seconds:.0f}"
            table.add_row(kind, f"{each.parameters:,}", words, *numbers)
    Console().print(table)
    with rc_context(STYLE):
        picture(found).savefig(args.out)
    if args.quick:
        print(f"too small to win, and not judged; picture in {args.out}")
        return 0
    least = np.min([won(kinds, kind) for kinds in found.values() for kind in CELLS])
    print(f"the least share won by a cell {least:.3f}, wanted at least {1 - args.margin:.3f}; picture in {args.out}")
    return 0 if least >= 1 - args.margin else 1


if __name__ == "__main__":
    sys.exit(main())
