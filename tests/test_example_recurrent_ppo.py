"""examples/recurrent_ppo.py: its environments, its rollouts, its advantages, short trainings, and the exit status."""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrnn import GRU, Linear

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("gymnax")
PATH = Path(__file__).parents[1] / "examples" / "recurrent_ppo.py"
SPEC = importlib.util.spec_from_file_location("recurrent_ppo", PATH)
ppo = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(ppo)

PROMOTION = "standard"  # gymnax adds floats and integers
STEPS, ROWS = 40, 6


def rolled_out(name, *, longest=None):
    """A setting, params, and a rollout of a small policy, in which episodes end."""
    config = ppo.Config(ppo.TASKS[name], GRU(ppo.SIZE, 8), False, environments=ROWS)
    environments = ppo.Environments(config.task, ROWS, False)
    if longest is not None:
        environments._params = environments._params.replace(max_steps_in_episode=longest)
    model = ppo.network(config.cell, environments)
    setting = ppo.Setting(config, environments, model, optax.sgd(0.0))

    @jax.jit
    def run(key):
        k_init, k_begin, k_steps = jax.random.split(key, 3)
        params = ppo.Params(model.init(k_init), jnp.full(environments.numbers, 0.3))
        actors = ppo.begin(setting, params, k_begin)
        act = functools.partial(ppo.act, setting, params)
        actors, _ = jax.lax.scan(act, actors, jax.random.split(k_begin, 7))
        after, transitions = jax.lax.scan(act, actors, jax.random.split(k_steps, STEPS))
        gains = jax.random.normal(key, (STEPS, ROWS))
        return params, ppo.Rollout(actors.carry, transitions, gains), after

    return setting, *run(jax.random.key(0))


@pytest.fixture(scope="module")
def cart_pole():
    return rolled_out("CartPole")


@pytest.fixture(scope="module")
def pendulum():
    return rolled_out("Pendulum", longest=9)


@pytest.mark.parametrize("name", ["CartPole", "Pendulum"])
def test_velocities_are_hidden(name):
    """Two states that differ in nothing else look the same, but to the one that sees everything."""
    task, key = ppo.TASKS[name], jax.random.key(0)
    for sees, inputs in (True, len(task.scale)), (False, len(task.positions)):
        environments = ppo.Environments(task, 3, sees)
        states, observations = environments.begin(key)
        assert observations.shape == (3, inputs) == (3, environments.inputs)
        velocities = {"x_dot", "theta_dot"} & set(vars(states))
        faster = states.replace(**{each: vars(states)[each] + 0.5 for each in velocities})
        views = [environments._view(jax.vmap(environments._one.get_obs)(each)) for each in (states, faster)]
        np.testing.assert_allclose(views[0], observations, rtol=1e-6)
        assert bool((views[0] != views[1]).any()) is sees


@pytest.mark.parametrize("which", ["cart_pole", "pendulum"])
def test_an_update_sees_what_the_policy_saw(which, request):
    """With the params that acted, every ratio is 1 and every value the same, over the ends of episodes."""
    setting, params, rollout, after = request.getfixturevalue(which)
    seen = rollout.transitions
    assert seen.ended.any()
    np.testing.assert_array_equal(seen.reset[1:], seen.ended[:-1])
    np.testing.assert_array_equal(after.reset, seen.ended[-1])
    scan = functools.partial(ppo.jaxrnn.scan, setting.network, params.network, rollout.carry)
    outputs = scan(seen.observation, reset=seen.reset)[1]
    np.testing.assert_allclose(outputs[..., -1], seen.value, atol=1e-5)
    found = ppo.log_probability(params, outputs[..., :-1], seen.action)
    np.testing.assert_allclose(found, seen.log_probability, atol=1e-4)
    assert np.abs(scan(seen.observation)[1][..., -1] - seen.value).max() > 1e-3  # without the resets
    # Ratios of 1 leave the mean of the normalised advantages, which is 0, and the error of values, their mean square.
    wanted = 0.5 * np.mean(rollout.advantages**2)
    np.testing.assert_allclose(ppo.objective(setting, params, rollout), wanted, rtol=1e-3)


def test_the_next_value_is_of_the_next_step_and_nothing_where_the_pole_fell(cart_pole):
    seen = cart_pole[2].transitions
    inside = ~seen.ended[:-1]
    np.testing.assert_allclose(seen.next_value[:-1][inside], seen.value[1:][inside], atol=1e-5)
    assert (seen.next_value[seen.ended] == 0).all()


def test_where_time_is_up_the_next_value_is_of_the_same_episode(pendulum):
    setting, params, _, actors = pendulum
    actors = actors._replace(state=actors.state.replace(time=jnp.full(ROWS, 8)))
    key = jax.random.key(1)
    after, seen = ppo.act(setting, params, actors, key)
    assert seen.ended.all()
    _, outcome = setting.environments.step(actors.state, seen.action, jax.random.split(key)[1])
    way, jump = (np.abs(each - actors.observation).max() for each in (outcome.final, outcome.observation))
    assert way < 0.5 < jump
    _, outputs = ppo.jaxrnn.step(setting.network, params.network, after.carry, outcome.final)
    np.testing.assert_allclose(seen.next_value, outputs[:, -1], rtol=1e-4)


def test_returns_are_sums_of_an_episodes_rewards(pendulum):
    """Rewards of training are scaled, returns are not."""
    setting, _, rollout, after = pendulum
    end = int(np.flatnonzero(rollout.transitions.ended[:, 0])[-1])
    rewards = rollout.transitions.reward[end - 8 : end + 1] / setting.config.reward_scale
    np.testing.assert_allclose(after.returned, rewards.sum(0), rtol=1e-4)


def test_advantages_are_sums_of_errors_of_the_same_episode():
    rng = np.random.default_rng(0)
    reward, value, next_value = rng.normal(size=(3, 12, 4)).astype(np.float32)
    ended = rng.random((12, 4)) < 0.25
    transitions = ppo.Transition(*[None] * 4, value, reward, next_value, ended)
    found = ppo.advantages(transitions, discount=0.9, gae_lambda=0.8)
    for row in range(4):
        for t in range(12):
            wanted, weight = 0.0, 1.0
            for k in range(t, 12):
                wanted += weight * (reward[k, row] + 0.9 * next_value[k, row] - value[k, row])
                weight *= 0.9 * 0.8
                if ended[k, row]:
                    break
            np.testing.assert_allclose(found[t, row], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("numbers", [0, 2])
def test_actions_have_the_probability_that_is_said(numbers):
    """Of many that are drawn, the mean of -log p is the entropy, and the likeliest are the likeliest."""
    params = ppo.Params(None, jnp.array([-0.5, 0.3])[:numbers])
    outputs = jnp.tile(jnp.array([0.3, -1.0]), (20_000, 1))
    actions = ppo.sample(params, outputs, jax.random.key(0))
    logs = ppo.log_probability(params, outputs, actions)
    p = jax.nn.softmax(outputs[0])
    normal = (params.log_deviation + 0.5 * np.log(2 * np.pi * np.e)).sum()
    np.testing.assert_allclose(-logs.mean(), normal if numbers else -(p * jnp.log(p)).sum(), atol=0.03)
    best = ppo.log_probability(params, outputs, ppo.likeliest(params, outputs))
    assert (best >= logs).all()


@pytest.mark.parametrize(("clip", "gain"), [(0.2, 1.2), (10.0, 2.0)])
def test_ratios_are_clipped(cart_pole, clip, gain):
    """All actions twice as probable as they were: one with an advantage of 1 gains no more than the clip allows."""
    setting, params, rollout, _ = cart_pole
    setting = setting._replace(config=setting.config._replace(clip=clip))
    signs = jnp.where(jnp.arange(STEPS * ROWS).reshape(STEPS, ROWS) % 2, 1.0, -1.0)  # mean 0, deviation 1
    seen = rollout.transitions
    halved = seen._replace(log_probability=seen.log_probability - np.log(2))
    found = ppo.objective(setting, params, rollout._replace(transitions=halved, advantages=signs))
    np.testing.assert_allclose(found, -(gain - 2) / 2 + 0.5, rtol=1e-3)


def test_every_environment_is_learnt_from_in_every_epoch(cart_pole, monkeypatch):
    """Minibatches are of whole rows, each once in an epoch, with its own carry."""
    setting, params, rollout, _ = cart_pole
    setting = setting._replace(config=setting.config._replace(epochs=2, minibatches=3))
    rollout = rollout._replace(advantages=jnp.tile(2.0 ** jnp.arange(ROWS), (STEPS, 1)))
    tagged = [jnp.full_like(leaf, 1.0) * 2.0 ** jnp.arange(ROWS)[:, None] for leaf in jax.tree.leaves(rollout.carry)]
    rollout = rollout._replace(carry=tagged)
    seen = []

    def objective(setting, params, part):
        jax.debug.callback(lambda a, b: seen.append((a, b)), part.advantages[0], part.carry[0][:, 0], ordered=True)
        return params.network[0].w.sum() * 0

    monkeypatch.setattr(ppo, "objective", objective)
    state = ppo.TrainState(params, setting.optimizer.init(params))
    jax.block_until_ready(ppo.improve(setting, state, rollout, jax.random.key(0)))
    jax.effects_barrier()
    rows = np.array([a for a, _ in seen])
    np.testing.assert_array_equal(rows, [b for _, b in seen])
    assert rows.shape == (6, 2)
    assert (rows.reshape(2, -1).sum(1) == 2**ROWS - 1).all()


def test_every_policy_has_a_network():
    environments = ppo.Environments(ppo.TASKS["Pendulum"], 2, False)
    for cell in ppo.POLICIES.values():
        model = ppo.network(cell, environments)
        assert isinstance(model.cells[-1], Linear)
        shapes = jax.eval_shape(
            lambda key, model=model: ppo.jaxrnn.step(model, model.init(key), None, jnp.ones((2, 2))), jax.random.key(0)
        )
        assert shapes[1].shape == (2, 2)


@pytest.mark.full
@pytest.mark.parametrize(("kind", "low", "high"), [("GRU", 300, 500), ("LRU", 300, 500), (ppo.BLIND, 20, 100)])
def test_memory_wins(kind, low, high):
    task = ppo.TASKS["CartPole"]._replace(steps=9600)
    train = ppo.make_train(ppo.Config(task, ppo.POLICIES[kind], False))
    trained = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), 2))
    assert trained.returns.shape == (2, 75)
    assert low <= trained.tested.min() <= trained.tested.max() <= high


@pytest.mark.parametrize(("cell", "status"), [(480.0, 0), (460.0, 0), (440.0, 1), (np.nan, 1)])
def test_every_cell_has_to_keep_the_margin(monkeypatch, tmp_path, capsys, cell, status):
    tested = dict.fromkeys(ppo.POLICIES, 480.0) | {ppo.SEEING: 500.0, ppo.BLIND: 0.0, "LRU": cell}
    runs = {
        kind: ppo.Run(np.tile(np.linspace(9, one, 30), (3, 1)), np.array([0, one, one]), 99, 1.0)
        for kind, one in tested.items()
    }
    monkeypatch.setattr(ppo, "run", lambda args: {"CartPole": runs})
    out = tmp_path / "ppo.png"
    assert ppo.main(["--out", str(out)]) == status
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "wanted at least 0.900" in capsys.readouterr().out
    assert ppo.main(["--quick", "--out", str(out)]) == 0
    assert "not judged" in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["--margin much", "--tasks chess", "--unknown"])
def test_bad_flags(capsys, flags):
    with pytest.raises(SystemExit) as stopped:
        ppo.main(flags.split())
    assert stopped.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err
