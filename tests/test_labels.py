"""Labels of parameters for Optax."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from members import MEMBERS

import jaxrnn
from jaxrnn import training

SLOW = {
    "GatedDeltaNet": {"log_decay", "b_step"},
    "KDA": {"log_decay", "b_gate"},
    "LRU": {"nu", "theta", "gamma"},
    "Mamba2": {"log_decay", "b_step", "d"},
    "RWKV7": {"b_decay", "b_rate"},
    "S4D": {"log_decay", "frequency", "log_step"},
    "S5": {"log_decay", "frequency", "log_step"},
    "S6": {"log_decay", "b_step", "d"},
    "RGLRU": {"decay"},
}


@pytest.mark.parametrize("name", MEMBERS)
def test_slow_are_the_eigenvalues_and_nothing_else(name):
    cell = MEMBERS[name]
    params = jax.eval_shape(cell.init, jax.random.key(0))
    found = jax.tree_util.tree_leaves_with_path(training.labels(cell, params))
    assert jax.tree.structure(training.labels(cell, params)) == jax.tree.structure(params)
    names = {path[-1].name for path, label in found if label == "slow"}
    assert names == set().union(*(names for kind, names in SLOW.items() if re.search(rf"\b{kind}\(", repr(cell))))


def test_slow_ones_move_less_and_do_not_decay():
    cell = jaxrnn.Stack([jaxrnn.Bidirectional(jaxrnn.LRU(3, 4), jaxrnn.GRU(3, 3)), jaxrnn.Residual(jaxrnn.RGLRU(6))])
    params = cell.init(jax.random.key(0))
    rates = {"slow": optax.sgd(0.0), "regular": optax.sgd(1.0)}
    optimizer = optax.multi_transform(rates, training.labels(cell, params))
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    assert not np.any(updates[0].forward.theta)
    assert not np.any(updates[1].decay)
    np.testing.assert_array_equal(updates[0].forward.d, -1)
    np.testing.assert_array_equal(updates[0].backward.w_h, -1)
