"""The tests can fail: each of these changes one line of the library to a classic mistake, and a test turns red."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "jaxrnn"

OF_KERNELS = "test_native.py", "test_options.py", "test_elementwise_cells.py", "test_cell_steps.py"

# name: (file, the line, the mistake, the test that sees it)
TRAPS = {
    "a carry that moves on in the padding": (
        "engines/loop.py",
        "new, y = select(valid, new, carry), zero_where_not(valid, y)",
        "y = zero_where_not(valid, y)",
        "test_time.py::test_length_zero_keeps_the_initial_carry",
    ),
    "outputs that are not zero in the padding": (
        "layers.py",
        "return carry, walk.without_padding(ys)\n\n\nclass LinearParams",
        "return carry, ys\n\n\nclass LinearParams",
        "test_time.py::test_outputs_are_zero_at_padding",
    ),
    "NaN in the padding reaches a gradient": (
        "sequence.py",
        "walked(cell, params, carry, zero_where_not(valid, xs), key, walk, names.carry)",
        "walked(cell, params, carry, xs, key, walk, names.carry)",
        "test_contract.py::test_padding_reaches_nothing[lstm]",
    ),
    "flags in the padding reset": (
        "engines/walk.py",
        "reset = reset & valid",
        "pass",
        "test_time.py::test_flags_in_the_padding_do_nothing[pool-False]",
    ),
    "forward flags in the reverse direction": (
        "engines/walk.py",
        "if not reverse or reset.shape[0] == 0:",
        "if True:",
        "test_time.py::test_packed_with_resets_is_one_by_one[bidirectional-False]",
    ),
    "resets one step early": (
        "engines/walk.py",
        "if reset is None:\n        return None\n",
        "if reset is None:\n        return None\n    reset = jnp.roll(reset, -1, 0)\n",
        "test_time.py::test_a_reset_acts_before_its_step",
    ),
    "resets one step early in replay": (
        "engines/walk.py",
        "if reset is None:\n        return None\n",
        "if reset is None:\n        return None\n    reset = jnp.roll(reset, -1, 0)\n",
        "test_time.py::test_stepping_an_environment_is_replaying_it",
    ),
    "a reset that multiplies by zero": (
        "engines/arrays.py",
        "return jnp.where(flag.reshape(flag.shape + (1,) * (on.ndim - flag.ndim)), on, off)",
        "f = flag.reshape(flag.shape + (1,) * (on.ndim - flag.ndim)).astype(on.dtype); return f * on + (1 - f) * off",
        "test_contract.py::test_nothing_crosses_a_reset[elman]",
    ),
    "one batch axis only": (
        "engines/arrays.py",
        "flag.reshape(flag.shape + (1,) * (on.ndim - flag.ndim))",
        "flag.reshape(flag.shape[:1] + (1,) * (on.ndim - 1))",
        "test_time.py::test_two_batch_axes_with_lengths_and_final_carry",
    ),
    "a carry that takes the dtype of the computation": (
        "engines/gated/recurrence.py",
        "new = cast_like(new, carry, owner=type(how.cell).__name__)",
        "new = cast(new, dtype)",
        "test_time.py::test_a_half_precision_carry_is_kept_and_none_starts_in_float32",
    ),
    "a delta rule that reads before the decay": (
        "engines/matrix/programs.py",
        "v = beta[..., None] * (v - _read(s, seen))",
        "v = beta[..., None] * (v - _read(s, k))",
        "test_matrix_cells.py::test_scan_is_the_oracle[xla-GatedDeltaNet]",
    ),
    "a low rank that reads after the decay": (
        "engines/matrix/programs.py",
        "chunk.pairs(w, k, shift=1, strict=True) @ v",
        "chunk.pairs(w, k, shift=0, strict=True) @ v",
        "test_matrix_cells.py::test_scan_is_the_oracle[None-RWKV7]",
    ),
    "a state that crosses a reset within a chunk": (
        "engines/matrix/programs.py",
        "self.earlier = self.earlier & (_between(starts, 0)[..., 0] == 0)",
        "pass",
        "test_matrix_cells.py::test_masks_resets_and_directions_are_a_loop_of_steps[False-KDA]",
    ),
    "products in the wrong order in reverse": (
        "cells/matrix.py",
        "array = jnp.flip(array, 1) if reverse else array",
        "pass",
        "test_matrix_cells.py::test_masks_resets_and_directions_are_a_loop_of_steps[True-DeltaNet products]",
    ),
    "a stabiliser that is forgotten at a reset": (
        "cells/mlstm.py",
        "given = select(start, jnp.zeros_like(log_f) + lifted(fresh, log_f), given)",
        "pass",
        "test_matrix_cells.py::test_masks_resets_and_directions_are_a_loop_of_steps[False-MLSTM]",
    ),
    "products summed in half precision": (
        "engines/product.py",
        "return product_p.bind(*varying_like((x, w)), count=1, dtype=accumulator(x.dtype), sharding=None)",
        "return product_p.bind(*varying_like((x, w)), count=1, dtype=x.dtype, sharding=None)",
        "test_time.py::test_half_precision_products_are_summed_in_float32",
    ),
    "a bias that one direction takes from the other": (
        "engines/gated/primitives.py",
        "one = next((array for array in arrays if array is not None), None)",
        "one = arrays[0]",
        "test_native.py::test_an_array_that_one_direction_lacks[gru]",
    ),
    "gradients of weights summed in half precision": (
        "engines/arrays.py",
        "return leaf.astype(accumulator(leaf.dtype)) if inexact(leaf) else leaf\n\n    def back",
        "return leaf\n\n    def back",
        "test_half_gradients.py::test_gradients_of_a_long_sequence[own-bf16]",
    ),
    "a gradient of recurrent weights that counts twice": (
        "engines/gated/derivative.py",
        "lambda d: recurrent_product(read.s, d)",
        "lambda d: 2 * recurrent_product(read.s, d)",
        "test_half_gradients.py::test_a_gated_cell_of_ones_own[reverse]",
    ),
    "a mask on the carry and not on what the product reads": (
        "engines/gated/recurrence.py",
        "carry, theta = cast(carry, wide), cast(weights.theta, wide)",
        "carry, theta = cast(carry._replace(**{cell.recurrent_state: s}), wide), cast(weights.theta, wide)",
        "test_noise.py::test_recurrent_dropout_masks_the_product_and_not_the_carry",
    ),
    "zoneout that does not reach the output": (
        "engines/gated/recurrence.py",
        "return new, getattr(new, how.cell.recurrent_state)",
        "return new, y",
        "test_options.py::test_values_and_gradients_are_those_of_the_loop[shape0-zoneout all]",
    ),
    "inference without the expectation of zoneout": (
        "engines/gated/recurrence.py",
        "rate * old + (1 - rate) * new",
        "new",
        "test_noise.py::test_zoneout_frequency_on_h_and_c_and_the_expectation",
    ),
    "a backward cell pooled at the last step": (
        "compose/pool.py",
        'case "last" | "end" as how, Bidirectional(',
        'case "never" as how, Bidirectional(',
        "test_time.py::test_pool_last_of_both_directions_is_each_ones_own_final_output",
    ),
    "the gates of an LSTM in another order": (
        "cells/lstm.py",
        "*i, f, g, o = gates_of",
        "*i, g, f, o = gates_of",
        "test_oracles.py::test_scan_is_the_oracle[LSTM plain]",
    ),
    "a forget gate that is closed at first": (
        "cells/lstm.py",
        'zeros.at[forget : forget + hidden_size].set(-1 if coupled == "input" else 1)',
        "zeros",
        "test_oracles.py::test_initial_vectors_are_zero_but_for_the_forget_bias_and_gains",
    ),
    "a peephole of the output gate on the old c": (
        "cells/lstm.py",
        "gate(o, -1, c)",
        "gate(o, -1, carry.c)",
        "test_oracles.py::test_scan_is_the_oracle[LSTM peephole]",
    ),
    "an update gate the other way round": (
        "cells/gru.py",
        "(1 - z) * n + z * carry.h",
        "z * n + (1 - z) * carry.h",
        "test_oracles.py::test_free_function_is_the_oracle[GRU plain]",
    ),
    "a reset gate that forgets the recurrent bias": (
        "cells/gru.py",
        "w = r * (v_n if theta.b_hn is None else v_n + lifted(theta.b_hn, v_n))",
        "w = r * v_n + (0 if theta.b_hn is None else lifted(theta.b_hn, v_n))",
        "test_oracles.py::test_free_function_is_the_oracle[GRU plain]",
    ),
    "a clip before the peephole": (
        "cells/lstm.py",
        "else pre + lifted(theta.peephole[row], c) * c)",
        "else clip(pre, 0.7) + lifted(theta.peephole[row], c) * c)",
        "test_oracles.py::test_scan_is_the_oracle"
        "[LSTM peephole coupled projection_size layer_norm cell_clip gate_clip]",
    ),
    "one orthogonal block for all gates": (
        "cells/initializers.py",
        "tall, thin = max(rows, columns), min(rows, columns)",
        "columns, gates = columns * gates, 1; tall, thin = max(rows, columns), min(rows, columns)",
        "test_oracles.py::test_initial_recurrent_weights_are_orthogonal_per_gate",
    ),
    "a window that holds what is not valid": (
        "cells/window.py",
        "lax.cummax(jnp.where(valid, time, 0), axis=0)",
        "time + jnp.zeros(valid.shape, int)",
        "test_oracles.py::test_a_window_holds_the_last_valid_inputs_of_its_sequence",
    ),
    "a window that reaches across a reset": (
        "cells/window.py",
        "same.append(at(sequence, index) == sequence[before:])",
        "same.append(sequence[before:] == sequence[before:])",
        "test_oracles.py::test_a_window_holds_the_last_valid_inputs_of_its_sequence",
    ),
    "a state in log space that outlives a reset": (
        "engines/linear/log_space.py",
        "jnp.where(begun, fresh.astype(h.dtype), h)",
        "h",
        "test_oracles.py::test_log_space_is_real_space",
    ),
    "a sequence that begins as if it went on": (
        "cells/linear.py",
        "return seen if start is None else jnp.where(start, fresh[None], seen)",
        "return seen",
        "test_oracles.py::test_rg_lru_begins_with_the_whole_input",
    ),
    "a window that lies the other way round": (
        "engines/elementwise/programs.py",
        "range(taps)[::-1] if reverse else range(taps)",
        "range(taps)",
        "test_elementwise_cells.py::test_values_and_gradients_are_those_of_the_loop[True-qrnn]",
    ),
    "members that share one weight": (
        "engines/primitives.py",
        "if shared and name in self.weights:",
        "if name in self.weights:",
        "test_elementwise_cells.py::test_higher_derivatives_and_members[min_gru]",
    ),
    "a gradient of a decay across a reset": (
        "engines/linear/primitive.py",
        "state = jnp.where(cut[0], jnp.zeros_like(state), state)",
        "pass",
        "test_linear_scan.py::test_nothing_crosses_a_boundary[False-associative]",
    ),
    "a kernel of a step that leaves out what a class changes": (
        "engines/step.py",
        'if any(depth(name) < depth("step_by_kernel") for name in unlike):',
        "if False:",
        "test_cell_steps.py::test_a_class_with_inputs_of_its_own_takes_them",
    ),
    "members that step with the weights of the first": (
        "engines/step.py",
        "if any(axis is not None and not rows for axis, rows in zip(axes, of_rows, strict=True)):",
        "leaves = [x if own or k is None else x.take(0, k) for x, k, own in zip(leaves, axes, of_rows)]\n        if 0:",
        "test_cell_steps.py::test_members_and_rows[GatedDeltaNet]",
    ),
    "β of twice its strength in the program of a step": (
        "cells/delta.py",
        "strength == 2",
        "True",
        "test_cell_steps.py::test_values[DeltaNet-(3,)]",
    ),
}


def every_trap():
    """All of them, each in a process of its own; all but one in the full tier only."""
    return [pytest.param(name, marks=pytest.mark.full if k else ()) for k, name in enumerate(TRAPS)]


def test_every_mistake_can_be_made():
    for file, line, mistake, _ in TRAPS.values():
        assert line in (PACKAGE / file).read_text(), f"{file} no longer holds the line {line!r}"
        assert mistake != line


@pytest.mark.parametrize("name", every_trap())
def test_a_mistake_is_seen(name, tmp_path):
    file, line, mistake, test = TRAPS[name]
    copy = tmp_path / "jaxrnn"
    # The kernels, which would run in place of a program with a mistake, are there for those who compare with them.
    kernels = [] if test.startswith(OF_KERNELS) else ["_kernels*"]
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "*.h", "*.cc", *kernels))
    source = (copy / file).read_text()
    (copy / file).write_text(source.replace(line, mistake))
    for each in (
        "conftest.py",
        "tiers.py",
        "members.py",
        "reference.py",
        "oracles.py",
        "sanitize.py",
        test.split("::")[0],
    ):
        shutil.copy(TESTS / each, tmp_path)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-W",
        "error",
        "-m",
        "full or not full",
        test,
    ]
    run = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 1, f"{test} did not see the mistake:\n{run.stdout[-2000:]}{run.stderr[-2000:]}"
    assert " failed" in run.stdout
