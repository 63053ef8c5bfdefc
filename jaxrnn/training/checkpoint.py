"""Checkpoints of a training run: Orbax writes them completely or not at all, and they are checked when read."""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrnn import check
from jaxrnn.training.evaluation import Validation
from jaxrnn.training.history import BadStep, History
from jaxrnn.training.identity import difference
from jaxrnn.training.leaves import CheckpointError, Leaf, abstract, check_leaves, named, pack, unpack
from jaxrnn.training.lock import NAME as LOCK
from jaxrnn.training.lock import Held, Lock
from jaxrnn.training.processes import by_first, merged
from jaxrnn.training.step import Best, TrainState
from jaxrnn.typing import Named

MARK = "jaxrnn-run.json"
FORMAT = 3


class Checkpoints(NamedTuple):
    """The settings of `fit` for saving: where and how often.

    directory: a directory for this run alone. It is new, empty, or holds earlier checkpoints of the run, from which
    `fit` continues.
    every: the number of steps between two checkpoints. They are saved at the ends of jitted calls, and one at the end
    of training.
    keep: the number of checkpoints to keep besides the last one: those with the best monitored value in the validation
    before them.
    """

    directory: str | os.PathLike
    every: int = 1000
    keep: int = 3


class Restored(NamedTuple):
    """A training run as it was at one step; `start` is the step at which it began."""

    state: TrainState
    history: History
    start: int


class Saver:
    """Writes and reads the checkpoints of one run, in a directory that no other run writes to meanwhile.

    `identity` describes the parts of the run, see `jaxrnn.training.identity`. If `several` processes save one run
    together, process 0 locks the directory, and each writes its parts of the arrays.
    """

    def __init__(
        self,
        where: Checkpoints,
        *,
        maximize: bool = False,
        identity: Mapping[str, str] | None = None,
        several: bool = False,
    ):
        for name in ("every", "keep"):
            check.integer(f"checkpoints.{name}", getattr(where, name))
        import orbax.checkpoint as ocp  # here, since it takes a second

        self.args = ocp.args
        self.directory = Path(where.directory).absolute()
        self.identity = {} if identity is None else dict(identity)
        if several:
            self.identity = merged(self.identity)
        self.several = several
        self.lock: Lock | None = None
        by_first(self._lock, several=several)
        policies = ocp.checkpoint_managers.preservation_policy
        keep = policies.BestN(
            get_metric_fn=lambda metrics: metrics["value"],
            reverse=not maximize,  # those that come last in the order are kept
            n=where.keep,
            keep_checkpoints_without_metrics=False,
        )
        options = ocp.CheckpointManagerOptions(
            step_prefix="step",
            cleanup_tmp_directories=True,
            enable_async_checkpointing=False,
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(1), keep]),
        )
        try:
            self.manager = ocp.CheckpointManager(self.directory, options=options)
        except BaseException:
            self._unlock()
            raise

    def close(self) -> None:
        try:
            self.manager.close()
        finally:
            self._unlock()

    def _lock(self) -> None:
        self.lock = _claim(self.directory)

    def _unlock(self) -> None:
        if self.lock is not None:
            self.lock.close()

    def _check_lock(self) -> None:
        if self.lock is not None and self.lock.lost():
            raise CheckpointError(
                f"{self.directory}: was deleted, moved or replaced while training saved its checkpoints there"
            )

    def save(self, state: TrainState, history: History, *, start: int, value: float | None) -> None:
        """Saves the run after its last step; the best checkpoints are chosen by `value`."""
        by_first(self._check_lock, several=self.several)
        step = int(np.max(state.step))
        if step in self.manager.all_steps():
            return
        arrays, leaves = pack((state._replace(data=None), _arrays_of(history)))
        about = {
            "format": FORMAT,
            "start": start,
            "identity": self.identity,
            "data": state.data,
            "bad": [list(bad) for bad in history.bad],
            "ended": history.ended,
            "train": list(history.train),
            "validation": list(history.validation),
            "epoch": list(history.epoch),
            "leaves": [list(leaf) for leaf in leaves],
        }
        about["checksum"] = _text_checksum(about)
        items = self.args.Composite(arrays=self.args.StandardSave(arrays), about=self.args.JsonSave(about))
        self.manager.save(step, args=items, metrics=None if value is None else {"value": value})

    def restore(self, like: TrainState, start: int) -> Restored | None:
        """Reads the last checkpoint of the same run, which began at `start`; None if there is none."""

        def check(about):
            if about["start"] != start:
                raise CheckpointError(
                    f"{self.directory}: holds a run that began at step {about['start']}, this one begins at {start}; "
                    "name another directory"
                )
            other = difference(about["identity"], self.identity)
            if other:
                raise CheckpointError(
                    f"{self.directory}: holds another run than this one: {other}. Name another directory; one that "
                    "goes on from there all the same begins with restore(directory, state).state"
                )

        return _read(self.manager, self.directory, like, None, check)


def _read(
    manager: Any, directory: Path, like: TrainState, step: int | None, check: Callable[[Named], None]
) -> Restored | None:
    """Reads the run at `step`, or the last one saved; None if there is none. `like` has its structure and shapes."""
    import orbax.checkpoint as ocp

    steps = sorted(manager.all_steps())
    if step is None and not steps:
        return None
    step = steps[-1] if step is None else step
    if step not in steps:
        raise CheckpointError(f"{directory}: no checkpoint of step {step}; there are {steps}")
    where = f"{directory}: the checkpoint of step {step}"
    others = f"the others there are of steps {[each for each in steps if each != step]}"

    @contextlib.contextmanager
    def reading():
        try:
            yield
        except Exception as error:  # whatever Orbax and TensorStore raise for files that are not as they were written
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise CheckpointError(f"{where} is damaged: {reason[0][:300]}; {others}") from error

    with reading():
        about = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
        form = about.get("format")
    if form != FORMAT:
        raise CheckpointError(f"{where} has format {form}, this version reads {FORMAT}")
    with reading():
        if about.pop("checksum") != _text_checksum(about):
            raise ValueError("what it says of itself is not what was written")
    check(about)
    with reading():
        leaves = [Leaf(*leaf) for leaf in about["leaves"]]
        train, validation, epoch = (dict.fromkeys(about[name], 0) for name in ("train", "validation", "epoch"))
    target = _with_best(like._replace(data=None), leaves), (0, train, 0, validation, 0, epoch)
    check_leaves(named(target), leaves, where)
    with reading():
        wanted = abstract(named(target), leaves)
        items = ocp.args.Composite(arrays=ocp.args.StandardRestore(wanted))
        arrays = manager.restore(step, args=items)["arrays"] if wanted else {}
    state, rows = unpack(target, leaves, arrays, where)
    bad = tuple(BadStep(*each) for each in about["bad"])
    record = History(*rows, bad=bad, ended=about["ended"])
    return Restored(state._replace(data=about["data"]), record, about["start"])


def _text_checksum(about: Named) -> int:
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())


class Run:
    """The checkpoints of one `fit`: the step from which it continues, and the steps at which it saves."""

    def __init__(self, saver: Saver, every: int, monitor: str):
        self.saver, self.every, self.monitor = saver, every, monitor
        self.start = self.saved = 0

    def begin(self, state: TrainState, history: History, start: int) -> tuple[TrainState, History, int]:
        """Returns the given state, history and start, or those that an interrupted run with the same start saved."""
        restored = self.saver.restore(state, start)
        if restored is not None:
            state, history = restored.state, restored.history
        self.start, self.saved = start, int(np.max(state.step))
        return state, history, start

    def due(self, state: TrainState) -> bool:
        return int(np.max(state.step)) - self.saved >= self.every

    def save(self, state: TrainState, history: History) -> None:
        rows = history.validation.get(self.monitor)
        value = None if rows is None or not np.isfinite(rows[-1]).any() else float(np.nanmean(rows[-1]))
        self.saver.save(state, history, start=self.start, value=value)
        self.saved = int(np.max(state.step))


@contextlib.contextmanager
def run_in(
    checkpoints: Checkpoints | str | os.PathLike,
    validation: Validation,
    identity: Mapping[str, str],
    *,
    several: bool = False,
) -> Iterator[Run]:
    """Opens the run whose checkpoints lie in a directory, and locks it against other runs meanwhile.

    `several` says whether all processes save one run there.
    """
    where = checkpoints if isinstance(checkpoints, Checkpoints) else Checkpoints(checkpoints)
    saver = Saver(where, maximize=validation.maximize, identity=identity, several=several)
    try:
        yield Run(saver, where.every, validation.monitor)
    finally:
        saver.close()


def restore(directory: str | os.PathLike, like: TrainState, *, step: int | None = None) -> Restored:
    """Reads the run that `fit` saved in `directory`, as it was at `step`, or at the last checkpoint.

    Args:
      directory: As in `Checkpoints`.
      like: A state of the same structure and shapes, for instance the one that training began with, or the result of
        `jax.eval_shape` of the function that makes it. Arrays that lie on several devices there, on however many, lie
        on them as in `like`.
      step: The step of the checkpoint; None for the last one.

    Raises:
      CheckpointError: If there is no checkpoint, or it is damaged, or it belongs to another model.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn, optax, tempfile
      >>> from jaxrnn.training import fit, make_loss, restore, squared_error, train_state
      >>> model, optimizer, xs = jaxrnn.GRU(1, 1), optax.adam(1e-2), jnp.ones((6, 3, 1))
      >>> state = train_state(model.init(jax.random.key(0)), optimizer, jax.random.key(1))
      >>> run = {"optimizer": optimizer, "epochs": 1, "batch_size": 2, "shuffle": False, "progress": False}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = fit(make_loss(model, squared_error), state, (xs, xs), checkpoints=f"{folder}/run", **run)
      ...     int(restore(f"{folder}/run", state).state.step)
      3
    """
    directory = Path(directory).absolute()
    if not (directory / MARK).is_file():
        raise CheckpointError(f"{directory}: no checkpoints of a training run")
    import orbax.checkpoint as ocp

    # All that `read_only=True` sets, which also writes to the log.
    options = ocp.CheckpointManagerOptions(
        step_prefix="step", create=False, cleanup_tmp_directories=False, save_root_metadata=False
    )
    with contextlib.closing(ocp.CheckpointManager(directory, options=options)) as manager:
        restored = _read(manager, directory, like, step, lambda about: None)
    if restored is None:
        raise CheckpointError(f"{directory}: no checkpoint was finished there")
    return restored


def _claim(directory: Path) -> Lock:
    """Locks a directory that is marked as one of training runs, or marks and locks one that is new or empty."""
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory}: expected a directory, found a file")
    directory.mkdir(parents=True, exist_ok=True)
    mark, draft = directory / MARK, directory / f".{MARK}"
    names = {each.name for each in directory.iterdir()}
    if mark.name not in names and names - {draft.name, LOCK}:
        raise CheckpointError(
            f"{directory}: holds other files than checkpoints of a training run; name a new directory"
        )
    try:
        lock = Lock(directory)
    except Held as holder:
        raise CheckpointError(
            f"{directory}: another run is saving its checkpoints there: {holder}; name another directory, or wait "
            "until it has ended"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be locked for one run: {error}") from error
    try:
        if not mark.is_file():
            draft.write_text(json.dumps({"format": FORMAT}))
            draft.replace(mark)
    except BaseException:
        lock.close()
        raise
    return lock


def _arrays_of(history: History):
    return history[:6]


def _with_best(like: TrainState, leaves: list[Leaf]) -> TrainState:
    """Adds a place for `best` to `like` if one was saved: a state before training has none yet."""
    if like.best is not None or not any(leaf.path.startswith("[0].best") for leaf in leaves):
        return like
    value = jax.ShapeDtypeStruct(like.step.shape, jax.dtypes.canonicalize_dtype(float))
    return like._replace(best=Best(like.params, value, like.step, like.step))
