"""The training loop: epochs of jitted calls of several steps, validation, and the history of the run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import PartitionSpec

from jaxrnn import check
from jaxrnn.training.calls import make_chunk, make_compare
from jaxrnn.training.checkpoint import run_in
from jaxrnn.training.evaluation import Validation, evaluator
from jaxrnn.training.feeding import Group, as_source, checked, groups, placed
from jaxrnn.training.history import BadStep, History, empty_history, in_order
from jaxrnn.training.identity import run_identity
from jaxrnn.training.placement import Placement, Rules, placement_on
from jaxrnn.training.processes import agree, agree_on, in_all, to_host
from jaxrnn.training.progress import on_screen
from jaxrnn.training.step import (
    Best,
    TrainState,
    check_loss,
    check_optimizer,
    check_state,
)
from jaxrnn.training.totals import Totals, added, as_json, from_json, means
from jaxrnn.typing import DTypeLike, Foreign, PyTree


class NonFiniteError(FloatingPointError):
    """A loss, gradient or validation was not finite.

    `state` is the last good state, and `history` holds everything up to then.
    """

    def __init__(self, bad: BadStep, state: TrainState, history: History):
        super().__init__(str(bad))
        self.bad, self.state, self.history = bad, state, history

    def __reduce__(self):
        return type(self), (self.bad, self.state, self.history)


def fit(
    loss: Callable,
    state: TrainState,
    data: PyTree,
    *,
    optimizer: optax.GradientTransformation,
    epochs: int,
    batch_size: int | None = None,
    key: Array | None = None,
    shuffle: bool = True,
    validation: Any = None,
    nonfinite: Literal["raise", "skip", "stop"] = "raise",
    accumulate: int = 1,
    compute_dtype: DTypeLike | None = None,
    steps_per_call: int = 16,
    checkpoints: Any = None,
    progress: Any = None,
    mesh: Any = None,
    sharding: Rules | None = None,
) -> tuple[TrainState, History]:
    """Trains for `epochs` passes over `data`, and returns (state, history).

    Args:
      loss: A function `(params, batch, key) -> (scalar, metrics)`, see `make_step`; if the state has a carry,
        `(params, carry, batch, key) -> (scalar, (carry, metrics))`.
      state: The state that `train_state` made. **Many models at once:** a state with a leading axis of members on every
        leaf, as `jax.vmap` of a function that makes a state returns it, trains all members in one compiled program, on
        the same batches in the same order. Members may differ in everything that is an array: the key, the params, the
        values in `optax.inject_hyperparams`. The fields of a cell (sizes, dropout rates) are part of the program, so
        each value needs its own `fit`.
      data: Arrays with the batch as the first axis and time as the second, (N, T, ...), or a tuple, `Batch` or dict of
        such arrays; or batches: a list, an iterable, or a source (see `Source`) such as `Buckets` or `Streams`.
      optimizer: The Optax optimizer that `state` was made with.
      epochs: The number of passes over the data.
      batch_size: The number of rows per batch, for arrays; the last batch of an epoch may be smaller.
      key: A key for the order of arrays, which is new in each epoch. (Noise is drawn from the key of the state.)
      shuffle: False to keep arrays in their order, which needs no key.
      validation: Data of the same kinds, evaluated after every epoch without noise; or
        `Validation(data, monitor, maximize, patience)`, which sets the metric that decides which params are the best,
        and when to stop. The best params are kept in `state.best`. For a loss with a carry, validation begins with the
        cell's initial carry, or with zeros if the loss is not from `make_truncated_loss`.
      nonfinite: What to do if a loss or gradient is not finite: "raise" `NonFiniteError`, "skip" the update and go on,
        or "stop" at the last good state. If a validation gives NaN, "raise" and "stop" do the same, and "skip" counts
        it as no better. Each case is reported in `history.bad`.
      accumulate: As in `make_step`.
      compute_dtype: As in `make_step`.
      steps_per_call: The number of steps that run in one jitted call.
      checkpoints: A directory or `Checkpoints`: `fit` saves there, and continues from the state that an interrupted run
        saved there, with the same bits as if it had not been interrupted. The loss, optimizer, data (for arrays above a
        GiB, only evenly spaced rows are compared), initial params, keys, `batch_size`, `accumulate`, `compute_dtype`
        and the metric of `validation` must be the same. `epochs` and everything else may differ. So may the values in
        `optax.inject_hyperparams`, which the checkpoint holds.
      progress: None or True for a line after every epoch, and a bar on a terminal; False for nothing; or a
        `rich.console.Console` to draw on. Of several processes, process 0 draws.
      mesh: A `jax.sharding.Mesh`, whose devices divide the rows of every batch among them. The result is that of one
        device, to rounding. Rows that they cannot divide evenly, as often in the last batch, each of them has whole.
        Data in JAX arrays stay on devices, and their values are not checked. Of many models, the devices divide the
        members instead. **Several processes:** the mesh has the devices of all of them, and each process gives its own
        part of the rows in NumPy arrays, as many as the others; `batch_size` is of all processes together. Everything
        else must be the same in all of them.
      sharding: How params lie on the mesh: regular expressions, searched for in their paths (`[0].w_x`), and
        `PartitionSpec`s. The first that is found decides; a param without one is whole on every device. What the
        optimizer and the best validation keep lies as the params do. Each step gathers the params, and every device
        updates its part. None leaves params that are on the mesh as they lie. Members are not divided further.

    Returns:
      The last state (the best params are `state.best.params`), and the `History`.

    Raises:
      ValueError: If an error function of `make_loss` is not defined for the targets, for instance because a class does
        not exist. For arrays and lists of batches it is raised before the first step, else as the batches come. Also if
        processes differ in what must be the same.
      ProcessError: If another process has failed or ended.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn, optax
      >>> from jaxrnn.training import fit, make_loss, squared_error, train_state
      >>> model, optimizer = jaxrnn.GRU(1, 1), optax.adam(1e-2)
      >>> state = train_state(model.init(jax.random.key(0)), optimizer, jax.random.key(1))
      >>> xs = jnp.ones((6, 3, 1))
      >>> state, history = fit(
      ...     make_loss(model, squared_error),
      ...     state,
      ...     (xs, xs),
      ...     optimizer=optimizer,
      ...     epochs=2,
      ...     batch_size=2,
      ...     key=jax.random.key(2),
      ...     progress=False,
      ... )
      >>> history.train["loss"].shape
      (6,)
    """
    if nonfinite not in ("raise", "skip", "stop"):
        raise ValueError(f"nonfinite: expected 'raise', 'skip' or 'stop', got {nonfinite!r}")
    epochs, steps_per_call = check.integer("epochs", epochs, least=0), check.integer("steps_per_call", steps_per_call)
    validation = _validation(validation)
    check_loss(loss)
    _check_state(state, optimizer)
    many = jnp.ndim(state.step) == 1
    where = placement_on(mesh, sharding, state, state.params, members=many)
    several = where is not None and where.processes > 1
    with contextlib.ExitStack() as stack:
        if where is not None:
            stack.enter_context(where.running())
            stack.enter_context(_handing_back(where))
            _agree(
                where, key, epochs=epochs, batch_size=batch_size, steps_per_call=steps_per_call, accumulate=accumulate
            )
            key = where.put(key, PartitionSpec()) if isinstance(key, jax.Array) else key
        with in_all(several=several):
            source = as_source("data", data, batch_size, key, shuffle, where)
            take = checked(loss, source, where=where)
        state = _copied(state, where)
        start, names = _steps(state), _names(state.params)
        chunk = make_chunk(
            loss, optimizer, accumulate, compute_dtype, members=many, halt=nonfinite != "skip", where=where
        )
        judge = None
        if validation is not None:
            with in_all(several=several):
                judge = _judge(loss, validation, batch_size, compute_dtype, nonfinite, members=many, where=where)
            if state.best is None:
                state = _with_best(state, validation.maximize, where)
        history = empty_history()
        run = None
        if checkpoints is not None:
            order = key if shuffle else None
            made_of = _identity(loss, optimizer, data, validation, state, batch_size, order, accumulate, compute_dtype)
            run = stack.enter_context(run_in(checkpoints, validation or Validation(None), made_of, several=several))
            state, history, start = run.begin(state, history, start)
            state = state if where is None else where.put_state(state)
        epoch, totals = _go_to(source, state.data)
        length = len(source) if callable(getattr(source, "__len__", None)) else None
        size = steps_per_call if length is None else max(1, min(steps_per_call, length))
        show = False if several and jax.process_index() else progress
        screen = stack.enter_context(on_screen(None if length is None else epochs * length, show))
        history = history._replace(ended=_ended(epoch, epochs, state))
        while not history.ended:
            for group in placed(groups(source, size, take), where):
                if run and run.due(state):  # not after the last group, which belongs together with the validation
                    run.save(state, history)
                before = np.array(state.stopped)  # a copy, since the call takes the memory
                state, history, bad, totals = _train(chunk, state, group, size, history, names, totals)
                state = state._replace(data={"epoch": epoch, "source": group.position, "totals": as_json(totals)})
                screen.steps(f"epoch {epoch + 1}/{epochs}", _steps(state) - start, _latest(history))
                if bad and nonfinite == "raise":
                    stopped = jax.device_put(before, state.stopped.sharding)
                    raise NonFiniteError(bad[0], state._replace(data=None, stopped=stopped), history)
                if np.all(state.stopped):
                    break
            epoch += 1
            history, totals, validated = _ended_epoch(history, totals), None, False
            if judge and not np.all(state.stopped):
                state, history = judge(state._replace(data=None), history)
                validated = True
            screen.epoch(f"epoch {epoch}/{epochs}", _shown(history, validated))
            state = state._replace(data={"epoch": epoch, "source": source.state()})
            history = history._replace(ended=_ended(epoch, epochs, state))
            if run and not history.ended and run.due(state):
                run.save(state, history)
        if run:
            run.save(state, history)
        state = state._replace(data=None)
        return state if where is None else where.handed_back(state), history


def _validation(given: Any) -> Validation | None:
    """The held-out data with the rule for the best params."""
    if given is None:
        return None
    validation = given if isinstance(given, Validation) else Validation(given)
    if validation.patience is not None:
        check.integer("validation.patience", validation.patience)
    return validation


def _judge(loss, validation: Validation, batch_size, compute_dtype, nonfinite, *, members, where) -> Callable:
    """Makes `judge(state, history) -> (state, history)`, which validates, updates the best params and handles NaN."""
    monitor = validation.monitor
    validate = evaluator(loss, validation.data, batch_size, members=members, compute_dtype=compute_dtype, where=where)
    compare = make_compare(validation.maximize, validation.patience, members=members, where=where)

    def judge(state, history):
        metrics = validate(state.params, state.carry)
        if monitor not in metrics:
            raise ValueError(f"validation.monitor: expected one of {sorted(metrics)}, got {monitor!r}")
        bad = _unknown(state, metrics[monitor], monitor)
        state = compare(state, metrics[monitor])
        rows = {name: value[None] for name, value in metrics.items()}
        history = history.extend(validation_step=np.array([_steps(state)]), validation=rows, bad=bad)
        if bad and nonfinite == "raise":
            raise NonFiniteError(bad[0], state, history)
        if nonfinite == "stop":
            state = state._replace(stopped=state.stopped | np.isnan(metrics[monitor]))
        return state, history

    return judge


def _identity(loss, optimizer, data, validation, state, batch_size, order, accumulate, compute_dtype) -> dict[str, str]:
    """What makes this run another one than the run whose checkpoints are there."""
    return run_identity(
        loss=loss,
        optimizer=optimizer.update,
        data=data,
        validation=validation and validation.data,
        params=to_host(state.params),
        carry=to_host(state.carry),
        noise=state.key,
        batch_size=batch_size,
        order=order,
        accumulate=accumulate,
        compute_dtype=None if compute_dtype is None else jnp.dtype(compute_dtype),
        monitor=validation and (validation.monitor, validation.maximize),
    )


@contextlib.contextmanager
def _handing_back(where: Placement) -> Iterator[None]:
    """The state in a `NonFiniteError` lies on the user's mesh."""
    try:
        yield
    except NonFiniteError as error:
        error.state = where.handed_back(error.state)
        raise


def _agree(where: Placement, key: Array | None, **settings: Any) -> None:
    """The settings that all processes must share are the same in all of them."""
    if where.processes > 1:
        agree("fit", "\n".join(f"{name}={value}" for name, value in settings.items()))
        agree_on("key", key)


def _check_state(state: Any, optimizer: optax.GradientTransformation) -> None:
    check_state(state)
    check_optimizer(optimizer)
    expected = jax.tree.structure(jax.eval_shape(optimizer.init, state.params))
    if jax.tree.structure(state.opt_state) != expected:
        raise ValueError(
            f"optimizer: expected the one that the state was made with; it keeps {expected!s:.200}, and "
            f"state.opt_state is {jax.tree.structure(state.opt_state)!s:.200}"
        )


def _train(chunk, state, group: Group, size: int, history: History, names: list[str], totals: Totals | None):
    """Trains on a group: returns the state, the history, the steps that were not finite, and the epoch's totals."""
    first, best = _steps(state) + 1, state.best
    state, (values, bad, live, sums) = chunk(
        state._replace(data=None, best=None), group.batches, np.arange(size) < group.filled
    )
    live = np.asarray(live)
    rows = int(live.reshape(size, -1).any(1).sum())
    found = tuple(
        BadStep(first + int(at[0]), int(at[1]) if len(at) > 1 else None, names[int(bad[tuple(at)])])
        for at in np.argwhere((np.asarray(bad) >= 0) & live)
    )
    history = history.extend(
        step=np.arange(first, first + rows),
        train={name: np.asarray(value)[:rows] for name, value in values.items()},
        bad=found,
    )
    return state._replace(best=best), history, found, added(totals, sums, live)


def _unknown(state: TrainState, values: np.ndarray, monitor: str) -> tuple[BadStep, ...]:
    """The validations that gave NaN, which is neither better nor worse than anything."""
    unknown = np.isnan(values) & ~np.asarray(state.stopped)
    return tuple(
        BadStep(_steps(state), int(at[0]) if len(at) else None, f"the validation {monitor}")
        for at in np.argwhere(unknown)
    )


def _copied(state: TrainState, where: Placement | None) -> TrainState:
    """A copy, whose memory the steps take, where it belongs."""
    if where is not None:
        return where.put_state(state)
    return jax.tree.map(jnp.copy, state._replace(data=None))._replace(data=state.data)


def _with_best(state: TrainState, maximize: bool, where: Placement | None) -> TrainState:
    """The state with a place for the best validation."""
    worst = jnp.full(state.step.shape, -jnp.inf if maximize else jnp.inf)
    best = Best(jax.tree.map(jnp.copy, state.params), worst, jnp.copy(state.step), jnp.zeros_like(state.step))
    new = state._replace(best=best)
    return new if where is None else new._replace(best=jax.tree.map(where.put, best, where.specs(new).best))


def _go_to(source: Foreign, position: Any) -> tuple[int, Totals | None]:
    """Moves the source to `position`, and returns the epoch and its totals so far."""
    if position is None:
        return 0, None
    source.restore(position["source"])
    return position["epoch"], from_json(position.get("totals"))


def _ended_epoch(history: History, totals: Totals | None) -> History:
    """The history with a row for the epoch, if there was a step in it."""
    if totals is None or not len(history.step):
        return history
    rows = {name: value[None] for name, value in means(totals).items()}
    return history.extend(epoch_step=history.step[-1:], epoch=rows)


def _ended(epoch: int, epochs: int, state: TrainState) -> str:
    return "stopped" if np.all(state.stopped) else "epochs" if epoch >= epochs else ""


def _steps(state: TrainState) -> int:
    return int(np.asarray(state.step).max())


def _names(params: PyTree) -> list[str]:
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return ["the loss", *(f"the gradient of params{path}" for path in paths)]


def _latest(history: History) -> dict[str, np.ndarray]:
    """The loss of the last step, which is shown while an epoch runs."""
    return {name: rows[-1] for name, rows in history.train.items() if len(rows) and name == "loss"}


def _shown(history: History, validated: bool) -> dict[str, np.ndarray]:
    """What is shown of an epoch: its metrics, and those of its validation."""
    shown = {name: history.epoch[name][-1] for name in in_order(history.epoch) if name != "gradient_norm"}
    if validated:
        shown |= {f"val {name}": history.validation[name][-1] for name in in_order(history.validation)}
    return shown
