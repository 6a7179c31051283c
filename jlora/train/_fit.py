"""A whole training run in one call: steps, validation, the best adapter, resumption."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import partial
from typing import Any, Protocol

import jax
import optax
from jax.sharding import Mesh

from jlora._errors import CheckpointError, NonFiniteError, OptionError
from jlora._processes import on_first
from jlora.sharding._batches import batch_shard
from jlora.train._ahead import Ahead, abstract, specimens
from jlora.train._callbacks import Log, ProgressBar, Save, Validate
from jlora.train._evaluation import make_eval_step
from jlora.train._gradients import LossFn
from jlora.train._kept import Kept
from jlora.train._loop import Batch, Callback, Interrupted, Loop
from jlora.train._run import RunFolder
from jlora.train._state import TrainState
from jlora.train._step import make_train_step
from jlora.train._trackers import trackers_of
from jlora.train._watch import Watch
from jlora.train._watchdog import Watchdog

Tree = Any


class Stream(Protocol):
    """Training batches, such as `jlora.data.Batches` or `jlora.data.Streaming`.

    Where the number of batches an epoch is known, `__len__` returns it. A step's number
    is place enough for some. Others return iterators with a method `position()`: where
    the next batch is, as JSON. It goes into the checkpoint, and a run that is resumed
    calls `stream(step, position)`. Each batch has arrays of its own: some are made
    before the one before them is used.
    """

    def stream(self, step: int) -> Iterator[Batch]:
        """Yield batches from a step on, without end."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a run came to.

    Attributes:
      params: the tree with the best adapter, by validation loss; the last without one.
      state: the last state.
      steps: how many updates were made.
      seconds: how long training took, validation and saving included.
      step_seconds: the steps alone.
      first_loss: the validation loss before training; NaN without validation.
      best_loss: the lowest.
      best_step: after which step that was.
      compilations: how many programs of the step were compiled in this process.
      epoch: steps an epoch; None where nobody knows.
      skipped: how many steps were skipped, their loss or gradient not being finite.
      spikes: how often the loss jumped, see `Watch`.
      data_waits: steps of this process for which a batch was not there in time, the
        first left out.
      data_wait: seconds that this process waited for batches.
    """

    params: Tree
    state: TrainState
    steps: int
    seconds: float
    step_seconds: float
    first_loss: float
    best_loss: float
    best_step: int
    compilations: int
    epoch: int | None
    skipped: int = 0
    spikes: int = 0
    data_waits: int = 0
    data_wait: float = 0.0

    def facts(self) -> dict[str, str]:
        """Return what is to be said of the run, in lines for a report."""
        beside = self.seconds - self.step_seconds
        epochs = f" ({self.steps / self.epoch:.2f} epochs)" if self.epoch else ""
        said = {
            "training": f"{self.steps} steps{epochs} in "
            f"{self.seconds:.0f} s, {beside:.0f} s of it for validation and saving",
            "compiled": f"the step, for {self.compilations} "
            f"shape{'' if self.compilations == 1 else 's'} of batches",
            "data": f"{_times(self.data_waits, 'step')} beside the first waited for a "
            f"batch, {self.data_wait:.1f} s in all",
        }
        if self.skipped:
            said["skipped"] = (
                f"{_times(self.skipped, 'step')} with a loss or gradient that is not "
                "finite"
            )
        if self.spikes:
            said["loss"] = f"jumped {_times(self.spikes, 'time')}, see metrics.jsonl"
        if self.best_step == 0:
            said["validation loss"] = (
                f"never below the {self.first_loss:.4f} before training, so the "
                "adapter that is kept changes nothing; try another learning rate, or "
                "more steps"
            )
        elif not math.isnan(self.best_loss):
            said["validation loss"] = (
                f"{self.first_loss:.4f} before, {self.best_loss:.4f} at best, "
                f"after step {self.best_step}"
            )
        return said


def fit(
    loss_fn: LossFn,
    params: Tree,
    tx: optax.GradientTransformation,
    train: Stream,
    run: RunFolder,
    *,
    steps: int,
    valid: Iterable[Batch] | None = None,
    eval_every: int | None = None,
    log_every: int | None = None,
    key: jax.Array | None = None,
    learning_rate: optax.Schedule | None = None,
    count: Callable[[Batch], int] | None = None,
    unit: str = "tokens",
    callbacks: Sequence[Callback] = (),
    keep: int = 2,
    keep_best: int = 0,
    patience: int | None = 5,
    prefetch: int = 2,
    compile_ahead: bool = False,
    hang_after: float = 1800.0,
    base: Tree | None = None,
    **options: Any,
) -> Fit:
    """Train, validate, keep the best adapter, log, save; continue a resumed `run`.

    Ctrl-C (or SIGTERM) finishes the step, saves and raises `Interrupted`. A resumed run
    continues bit for bit, even one that was killed: from the last saved state or, if
    that is damaged, from the one before, with a warning.

    A step whose loss or gradient is not finite changes nothing, and is counted and
    logged. Losses that jump are also counted and logged.

    With several processes (`jlora.sharding.initialize`) all make this call, with a mesh
    of all their devices. `train` and `valid` then yield this process's part of each
    batch, as given by `jlora.sharding.batch_shard(mesh)`. The first process writes and
    prints, and all return the same.

    Args:
      loss_fn: `(params, batch, key)` as `make_train_step` takes it; validation passes
        None for the key.
      params: a lorafied tree.
      tx: the optimiser.
      train: the training batches.
      run: the folder that everything is written into.
      steps: how many updates to make, including those before it was resumed.
      valid: validation batches, evaluated before the first step and at intervals.
      eval_every: steps between validations; None takes a tenth of the run, or an epoch
        if that is less. The state is saved as often.
      log_every: steps between lines of the log; None takes 10, or a twentieth of a
        short run.
      key: the run's PRNG key.
      learning_rate: the schedule, to be logged.
      count: a function that counts a batch's tokens, for the rate. With several
        processes, the first counts its part and assumes that the others are as large.
      unit: what `count` counts.
      callbacks: additional callbacks.
      keep: how many of the last states to keep.
      keep_best: how many of the best to keep as well, by validation loss.
      patience: after how many skipped steps in a row to stop. They leave the parameters
        as they were, so a run that has diverged does not recover by itself. None
        never stops. With `skip_nonfinite=False` the first such step ends the run.
      prefetch: batches that a thread makes and puts on the device ahead, so that no
        step waits for one; 0 makes each before its step. The log's `data_wait` says how
        many seconds the steps since the last line have waited for batches.
      compile_ahead: compile the programs for all batch shapes in parallel threads as
        soon as the run begins. This needs batches that know their shapes, as
        `jlora.data.Batches` do, one process, and no mesh. On two cores nothing is
        gained.
      hang_after: with several processes, the seconds without a step after which all
        end; see `Watchdog`.
      base: the plain parameters that `params` was made from, if its start shifted them
        (PiSSA, OLoRA and the like). The adapter that is kept then fits these, with
        twice the rank, and `Fit.params` has them as its base; see
        `jlora.init.unshift`. Without `base` the adapter fits only the shifted kernels.
      **options: those of `make_train_step`; `mesh` is for validation, too.

    Raises:
      Interrupted: the run was asked to stop, and saved.
      NonFiniteError: the loss or the gradient was not finite in `patience` steps.
      CheckpointError: a state could not be saved, now or in the background; those
        before are as they were. Or none can be read.
      OptionError: the run has made more steps than that already.
    """
    if learning_rate is not None:
        options.setdefault(
            "hooks", lambda info: {"learning_rate": learning_rate(info.step)}
        )
    if not options.setdefault("skip_nonfinite", True):
        patience = 1
    if patience is not None and patience < 1:
        raise OptionError(f"patience={patience}: expected at least 1, or None.")
    step = make_train_step(loss_fn, tx, **options)
    state = TrainState.create(params, tx, key, mesh=options.get("mesh"))
    adapter = Kept.of(state, base)
    epoch = len(train) if isinstance(train, Sized) else None
    every = eval_every or max(1, min(epoch or steps, math.ceil(steps / 10)))
    ahead = Ahead() if _is_ahead(compile_ahead, options) else None
    validate = None
    if valid is not None:
        no_key: Any = None
        measure = make_eval_step(
            lambda p, batch: _named(loss_fn(p, batch, no_key)),
            compute_dtype=options.get("compute_dtype"),
            mesh=options.get("mesh"),
        )
        validate = Validate(
            measure, valid, run.metrics, run.adapter, every, epoch, adapter.save
        )
    often = log_every or min(10, max(1, steps // 20))
    watch = Watch(run.metrics)
    save = Save(run.state, every, keep=keep, keep_best=keep_best, valid=validate)
    own: list[Callback] = [Watchdog(hang_after), ProgressBar(unit), watch]
    own += [Log(run.metrics, often, unit)]
    own += [validate] if validate is not None else []
    more = trackers_of(run, often) if run.writes else []
    loop = Loop(
        step,
        state,
        train.stream,
        steps=steps,
        callbacks=[*own, *callbacks, *more, save],
        count=_of_all(count, options.get("mesh")),
        patience=patience,
        prefetch=prefetch,
        place=step.place if prefetch else None,
        on_new_shape=None if ahead is None else partial(ahead.wait, "train"),
    )
    if run.resumed:
        _restore(loop, run, save)
    try:
        if ahead is not None:
            shapes = abstract(loop.state)
            if valid is not None:
                ahead.add("valid", specimens(valid), partial(measure.lower, shapes))
            some = specimens(train, steps)
            ahead.add("train", some, step.lower_ahead(loop.state))
        state = loop.run()
    except Interrupted as place:
        again = f"{place}. To continue:\n  {run.resume_command}"
        raise place.saying(again) from None
    except CheckpointError as error:
        if not any(run.state.glob("[0-9]*")):
            raise
        again = f"{error}\nThen go on with:\n  {run.resume_command}"
        raise CheckpointError(again) from error
    except NonFiniteError as error:
        kept = validate is not None and validate.best_step is not None
        where = f"\nThe best adapter so far is kept in {run.adapter}." if kept else ""
        raise NonFiniteError(f"{error}{where}") from error
    finally:
        if ahead is not None:
            ahead.close()
    if validate is None:
        adapter.save(run.adapter, state)
    best = None if validate is None else validate.best_step
    return Fit(
        params=adapter.load(run.adapter, params),
        state=state,
        steps=loop.position,
        seconds=loop.seconds,
        step_seconds=loop.step_seconds,
        first_loss=math.nan if validate is None else validate.first_loss,
        best_loss=math.nan if validate is None else validate.best_loss,
        best_step=loop.position if best is None else best,
        compilations=step.cache_size(),
        epoch=epoch,
        skipped=loop.skipped,
        spikes=watch.spikes,
        data_waits=loop.data_waits,
        data_wait=loop.data_wait,
    )


def _is_ahead(asked: bool, options: Mapping[str, Any]) -> bool:
    """Whether to compile ahead: where it is asked for, and the programs are known."""
    if options.get("mesh") is not None or options.get("parallel", "jit") != "jit":
        return False
    return asked and jax.process_count() == 1


def _of_all(
    count: Callable[[Batch], int] | None, mesh: Mesh | None
) -> Callable[[Batch], int] | None:
    """Count the batch of all processes, by the part that this one reads."""
    if count is None or mesh is None or jax.process_count() == 1:
        return count
    parts = batch_shard(mesh)[1]
    return lambda batch: parts * count(batch)


def _times(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _named(out: Any) -> Mapping[str, Any]:
    """Return a loss, or a loss with metrics, as named metrics."""
    if isinstance(out, tuple) and isinstance(out[1], Mapping):
        return {**out[1], "loss": out[0]}
    return {"loss": out}


def _restore(loop: Loop, run: RunFolder, save: Save) -> None:
    is_saved = save.restore_into(loop)
    if loop.position > loop.steps:
        raise OptionError(
            f"the run in {run.path} has made {loop.position} steps already, more "
            f"than {loop.steps}.\nAsk for more steps, or start a new run."
        )

    def write() -> None:
        run.save_settings()
        # What was killed while it saved for the first time begins again.
        run.metrics.cut(loop.position if is_saved else -1)

    on_first("taking up the log", write)
