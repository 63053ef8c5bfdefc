"""Steps that are one kernel on the CPU: the numbers of the program, under every transformation."""

import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads
from members import weighted_sum
from tiers import mostly_in_full

import jaxrnn
from jaxrnn import KDA, RWKV7, S4D, DeltaNet, GatedDeltaNet
from jaxrnn.engines.arrays import accumulator
from jaxrnn.engines.cpu import library

RNG = np.random.default_rng(0)
ABSENT = library.absent()
needed = pytest.mark.skipif(ABSENT is not None, reason=f"no compiled kernels: {ABSENT}")
# Of heads, keys and values: vectors that are not full, panels of columns, one of each.
SIZES = [(4, 7, 9), (2, 1, 33), (1, 40, 1), (2, 16, 75)]


def delta_nets():
    for negative, products, key_heads, project in itertools.product((False, True), (1, 3), (None, 1), (True, False)):
        for heads, keys, values in SIZES:
            of_keys = key_heads or heads
            features = (1 + products) * of_keys * keys + products * heads * (values + 1)
            options = negative, products, key_heads, project
            yield DeltaNet(5 if project else features, heads, keys, values, *options)
            yield GatedDeltaNet(5 if project else features + heads, heads, keys, values, *options)


def others():
    for (heads, keys, values), project in itertools.product(SIZES, (True, False)):
        for bound, negative in itertools.product((None, -5.0), (False, True)):
            features = 5 if project else heads * (3 * keys + values + 1)
            yield KDA(features, heads, keys, values, 3, bound, negative, project)
        yield RWKV7(5 if project else heads * (4 * keys + values), heads, keys, values, 3, project)
    for spectrum, method, timed in itertools.product(("linear", "hippo"), ("zoh", "bilinear"), (False, True)):
        for channels, states in ((6, 3), (3, 16), (2, 1), (4, 21)):
            yield S4D(channels, states, spectrum, method, timed=timed)


EVERY = [*delta_nets(), *others()]
SOME = [
    DeltaNet(5, 4, 7, 9, key_heads=2),
    GatedDeltaNet(5, 4, 7, 9, True, products=2),
    KDA(5, 4, 7, 9, rank=3, bound=-5.0),
    RWKV7(5, 4, 7, 9, rank=3),
    S4D(6, 5),
    S4D(6, 5, timed=True),
]


def name(cell):
    return f"{type(cell).__name__}{'-timed' if getattr(cell, 'timed', False) else ''}"


some = pytest.mark.parametrize("cell", SOME, ids=name)


def drawn(tree):
    def draw(leaf):
        parts = [0.5 * RNG.normal(size=leaf.shape) for _ in range(1 + jnp.iscomplexobj(leaf))]
        return jnp.asarray(parts[0] if len(parts) == 1 else parts[0] + 1j * parts[1], leaf.dtype)

    return jax.tree.map(draw, tree)


def arguments(cell, batch=(), dtype=jnp.float32):
    params = cell.init(jax.random.key(0), dtype)
    params = jax.tree.map(jnp.add, params, drawn(params))
    x = jnp.asarray(RNG.normal(size=(*batch, cell.input_size)), dtype)
    x = x.at[..., -1].set(abs(x[..., -1])) if getattr(cell, "timed", False) else x
    return params, drawn(cell.initial_carry(params, batch)), x


def step_of(cell):
    return lambda params, carry, x: jaxrnn.step(cell, params, carry, x)


def by_program(function):
    """`function` by XLA, which computes wherever derivatives are asked for."""

    def run(*arrays):
        return jax.jvp(function, arrays, jax.tree.map(jnp.zeros_like, arrays))[0]

    return jax.jit(run)


def close(ours, theirs, tolerance):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, tolerance, tolerance * max(1.0, abs(b).max(initial=0)))


def calls(function, *arrays):
    return jax.jit(function).lower(*arrays).as_text().count("custom_call @jaxrnn_")


@needed
@some
def test_one_call_computes_a_step(cell):
    given = arguments(cell)
    assert calls(step_of(cell), *given) == 1
    assert calls(by_program(step_of(cell)), *given) == 0
    rows = arguments(cell, (3,))
    assert calls(jax.vmap(step_of(cell), (None, 0, 0)), *rows) == 1
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), given[0])
    assert calls(step_of(cell), half, *given[1:]) == 1


@needed
@pytest.mark.parametrize("batch", [(), (3,), (2, 2), (0,)], ids=str)
@some
def test_values(cell, batch):
    given = arguments(cell, batch)
    close(jax.jit(step_of(cell))(*given), by_program(step_of(cell))(*given), 2e-5)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (given[0], given[2]))
    half = half[0], given[1], half[1]
    close(jax.jit(step_of(cell))(*half), by_program(step_of(cell))(*half), 2e-2)
    with jax.enable_x64(True):
        wide = arguments(cell, batch, jnp.float64)
        close(jax.jit(step_of(cell))(*wide), by_program(step_of(cell))(*wide), 1e-12)


@needed
@pytest.mark.full
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("cell", EVERY, ids=str)
def test_values_of_every_option(cell, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        for batch in ((), (2,)):
            given = arguments(cell, batch, dtype)
            found, expected = jax.jit(step_of(cell))(*given), by_program(step_of(cell))(*given)
            close(found, expected, 5e-5 if dtype == jnp.float32 else 1e-11)


@pytest.mark.parametrize("cell", mostly_in_full(SOME, SOME[1], SOME[4]), ids=name)
def test_gradients(cell):
    """Those of the kernel's step are those of numbers beside it, to the second order."""
    with jax.enable_x64(True):
        given = arguments(cell, (2,), jnp.float64)
        real = jax.tree.map(lambda leaf: (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else leaf, given)
        back = jax.tree.structure(given)

        def loss(arrays):
            leaves = jax.tree.leaves(arrays, is_leaf=lambda leaf: type(leaf) is tuple and len(leaf) == 2)
            leaves = [jax.lax.complex(*leaf) if type(leaf) is tuple else leaf for leaf in leaves]
            carry, y = step_of(cell)(*jax.tree.unflatten(back, leaves))
            parts = jax.tree.map(lambda leaf: (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else leaf, carry)
            return weighted_sum((parts, y))

        check_grads(loss, (real,), 2, ("fwd", "rev"), 1e-4, 1e-4)


@needed
@some
def test_members_and_rows(cell):
    """Over rows, over members with params of their own, over both, and over nothing but the state."""
    params, carry, x = arguments(cell, (3,))
    one = step_of(cell)
    close(jax.vmap(one, (None, 0, 0))(params, carry, x), one(params, carry, x), 1e-6)
    members = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    both = jax.jit(jax.vmap(one, (0, None, None)))(members, carry, x)
    second = one(jax.tree.map(lambda leaf: 2 * leaf, params), carry, x)
    close(jax.tree.map(lambda leaf: leaf[1], both), second, 2e-5)
    close(jax.vmap(one, (None, 0, None))(params, carry, x[0]), one(params, carry, x.at[:].set(x[0])), 1e-6)


@needed
@some
def test_rows_over_devices(cell):
    """Each device computes its own rows by the kernel, without a word to the others."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    params, carry, x = arguments(cell, (4,))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axis)) for axis in (("data",), ()))
    given = jax.device_put(params, whole), jax.device_put(carry, rows), jax.device_put(x, rows)
    compiled = jax.jit(step_of(cell)).lower(*given).compile()
    text = compiled.as_text()
    assert text.count('custom_call_target="jaxrnn_') == 1
    assert not any(f" {word}(" in text for word in ("all-gather", "all-reduce", "all-to-all"))
    close(compiled(*given), jax.jit(step_of(cell))(params, carry, x), 1e-6)


@some
def test_rows_of_an_explicit_mesh(cell):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    params, carry, x = arguments(cell, (4,))
    with jax.set_mesh(mesh):
        rows = PartitionSpec("data")
        found = jax.jit(step_of(cell))(params, jax.device_put(carry, rows), jax.device_put(x, rows))
        assert jax.typeof(found[1]).sharding.spec == PartitionSpec("data", None)
    close(found, jax.jit(step_of(cell))(params, carry, x), 2e-5)


@needed
def test_a_state_of_many_numbers_uses_all_threads():
    cell = GatedDeltaNet(8, 16, 128, 128)
    given = arguments(cell, (3,))
    close(jax.jit(step_of(cell))(*given), by_program(step_of(cell))(*given), 1e-4)


@needed
def test_large_angles():
    """Sines of angles of which a reduction by π/2 in float32 would leave nothing."""
    cell = S4D(3, 5)
    params, carry, x = arguments(cell)
    params = params._replace(frequency=1e4 * params.frequency, log_step=params.log_step * 0)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: leaf.astype(accumulator(leaf.dtype, jnp.float64)), (params, carry, x))
        expected = by_program(step_of(cell))(*wide)
    for a, b in zip(jax.tree.leaves(step_of(cell)(params, carry, x)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, 2e-3, 2e-3)


class Silent(GatedDeltaNet):
    """With inputs of its own, which no kernel may leave out."""

    input_size: int
    heads: int
    key_size: int
    value_size: int

    def inputs(self, params, x):
        found = super().inputs(params, x)
        return found._replace(v=0 * found.v)


def test_a_class_with_inputs_of_its_own_takes_them():
    cell = Silent(5, 2, 3, 4)
    params, carry, x = arguments(cell)
    assert calls(step_of(cell), params, carry, x) == 0
    empty = cell.initial_carry(params)
    assert not np.any(step_of(cell)(params, empty, x)[1])
    assert np.any(step_of(GatedDeltaNet(5, 2, 3, 4))(params, empty, x)[1])


PROGRAM = """
import jax, numpy as np, jaxrnn, test_cell_steps as tests
found = [jax.jit(tests.step_of(cell))(*tests.arguments(cell, (3,))) for cell in tests.SOME]
np.savez({file!r}, *jax.tree.leaves(found))
"""


@pytest.mark.full
@needed
def test_every_instruction_set(tmp_path):
    def results(instructions):
        file = str(tmp_path / f"{instructions}.npz")
        environment = os.environ | {"JAXRNN_INSTRUCTIONS": instructions, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", PROGRAM.format(file=file)], env=environment, check=True)
        return list(np.load(file).values())

    close(results("baseline"), results("avx2"), 2e-5)
