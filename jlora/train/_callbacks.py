"""What a run does beside its steps: log, validate, save, show how far it is."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jlora._errors import CheckpointError, JloraWarning, OptionError
from jlora._processes import is_first
from jlora.train._evaluation import EvalStep, evaluate
from jlora.train._loop import Callback, Loop, Numbers
from jlora.train._metrics import MetricsLog
from jlora.train._state import TrainState

if TYPE_CHECKING:
    from jlora.checkpoint import Checkpoints


class Log(Callback):
    """Writes the mean loss since the last line, and how fast it goes.

    Args:
      metrics: the file.
      every: steps a line.
      unit: what is counted, `tokens` say: the name of the rate.
    """

    def __init__(
        self, metrics: MetricsLog, every: int = 10, unit: str = "tokens"
    ) -> None:
        self.metrics, self.every, self.unit = metrics, every, unit
        self.loss = self.weight = 0.0
        self.counted, self.since = 0, 0.0
        self.waited = 0.0  # for batches, up to the last line
        self.last: Numbers = {}

    def on_start(self, loop: Loop) -> None:
        """Begin to measure the rate."""
        self.since, self.waited = loop.step_seconds, loop.data_wait

    def on_step(self, loop: Loop, step: int, metrics: Numbers) -> None:
        """Add a step to the mean; one that was skipped has no loss."""
        if metrics["nonfinite"]:
            return
        self.loss += metrics["loss"] * metrics["weight"]
        self.weight += metrics["weight"]
        self.counted += int(metrics["count"])
        self.last = metrics

    def on_interval(self, loop: Loop) -> None:
        """Write a line."""
        seconds = loop.step_seconds - self.since
        values: dict[str, Any] = {
            "loss": self.loss / self.weight if self.weight else None
        }
        if "learning_rate" in self.last:
            values["learning_rate"] = self.last["learning_rate"]
        if self.counted and seconds > 0:
            values[f"{self.unit}_per_second"] = round(self.counted / seconds)
        values["data_wait"] = round(loop.data_wait - self.waited, 3)
        self.metrics.write("train", step=loop.position, **values)
        self.waited = loop.data_wait
        self.loss = self.weight = 0.0
        self.counted, self.since = 0, loop.step_seconds

    def saved(self) -> dict[str, Any]:
        """The sums since the last line."""
        return {"loss": self.loss, "weight": self.weight}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on with them."""
        for name, value in saved.items():
            setattr(self, name, value)


class Validate(Callback):
    """Measures the loss on other examples, and keeps the best adapter.

    Args:
      step: from `make_eval_step`; one of its metrics is `loss`.
      batches: to go over each time.
      metrics: the file to log to.
      adapter: where the best adapter is saved.
      every: steps between validations.
      epoch: steps an epoch; None where nobody knows.
      save: saves a state's adapter there.
    """

    def __init__(
        self,
        step: EvalStep,
        batches: Iterable[Any],
        metrics: MetricsLog,
        adapter: Path,
        every: int,
        epoch: int | None,
        save: Callable[[Path, TrainState], None] | None = None,
    ) -> None:
        self.save = save or save_best
        self.step, self.batches, self.metrics = step, batches, metrics
        self.adapter, self.every, self.epoch = adapter, every, epoch
        self.first_loss = self.best_loss = math.inf
        self.loss: float = math.nan  # the last that was measured
        self.best_step: int | None = None
        self.compared = False  # whether a loss after the first step was finite

    def on_start(self, loop: Loop) -> None:
        """Measure what there is before training."""
        if loop.position == 0:
            self.on_interval(loop)
            self.first_loss = self.best_loss

    def on_interval(self, loop: Loop) -> None:
        """Measure; save the adapter if it is the best so far.

        A signal to stop comes first: the run validates when it goes on.
        """
        self.loss = math.nan
        loop.announce("validating" if loop.position else "validating, compiling first")
        batches = loop.until_stopped(self.batches)
        values = evaluate(self.step, loop.state, batches)
        self.loss = values["loss"]
        loss, at = self.loss, f"step {loop.position}"
        known = {k: v if math.isfinite(v) else None for k, v in values.items()}
        if self.epoch:
            epoch = loop.position / self.epoch
            known, at = {"epoch": round(epoch, 3), **known}, f"{at} (epoch {epoch:.2f})"
        self.metrics.write("valid", step=loop.position, **known)
        _say(f"{at}: validation loss {loss:.4f}")
        if not math.isfinite(loss):
            warnings.warn(
                f"step {loop.position}: the validation loss is {loss}, so this adapter "
                "is not compared with others.\nTraining goes on; are the validation "
                "examples in order, and is the precision enough?",
                JloraWarning,
                stacklevel=2,
            )
        self.compared |= loop.position > 0 and math.isfinite(loss)
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, loop.position
            self.save(self.adapter, loop.state)
        elif loop.position == loop.steps and not self.compared:
            self.best_step = loop.position
            self.save(self.adapter, loop.state)
            warnings.warn(
                "no validation loss after a step of training was finite: the adapter "
                f"that is kept is that of the last step, {loop.position}.",
                JloraWarning,
                stacklevel=2,
            )

    def saved(self) -> dict[str, Any]:
        """What was best so far; infinity is no JSON."""
        losses = {"first_loss": self.first_loss, "best_loss": self.best_loss}
        kept = {name: x for name, x in losses.items() if math.isfinite(x)}
        return {**kept, "best_step": self.best_step, "compared": self.compared}

    def restore(self, saved: dict[str, Any]) -> None:
        """Compare with that from now on."""
        for name, value in saved.items():
            setattr(self, name, value)


def save_best(path: Path, state: TrainState) -> None:
    """Save a state's adapter in the place of an earlier one."""
    from jlora import checkpoint

    checkpoint.save_adapter(path, state.params, overwrite=True)


class Save(Callback):
    """Saves what resuming needs, at intervals and when the run is asked to stop.

    The state is written while training goes on. What goes wrong then is raised after
    the next step, or at the end.

    Args:
      path: the folder of the states, one folder a step inside it.
      every: steps between.
      keep: how many of the last states to keep; more than one, since the last may be
        damaged.
      keep_best: how many of the best to keep besides, by the validation loss.
      valid: measures that.
      grace: after how many seconds of saving, when the run was asked to stop, to say
        what is left of it if its time is up.
    """

    def __init__(
        self,
        path: Path,
        every: int,
        *,
        keep: int = 2,
        keep_best: int = 0,
        valid: Validate | None = None,
        grace: float = 20.0,
    ) -> None:
        if keep_best and valid is None:
            raise OptionError(
                f"keep_best={keep_best} keeps states by their validation loss.\nPass "
                "valid= too, or keep= alone."
            )
        self.path, self.every, self.grace = path, every, grace
        self.keep, self.keep_best, self.valid = keep, keep_best, valid
        self.last: int | None = None  # the step that was saved
        self._checkpoints: Checkpoints | None = None

    @property
    def checkpoints(self) -> Checkpoints:
        """The folder, opened when it is first needed."""
        from jlora import checkpoint

        if self._checkpoints is None:
            self._checkpoints = checkpoint.Checkpoints(
                self.path,
                keep_last=self.keep,
                keep_best=self.keep_best,
                overwrite=True,
                background=True,
            )
        return self._checkpoints

    def restore_into(self, loop: Loop) -> bool:
        """Take the loop back to the last state; say whether there was one."""
        self.last = None
        if self.checkpoints.latest_step() is None:
            return False
        loop.restore(*self.checkpoints.restore(loop.state))
        return True

    def on_step(self, loop: Loop, step: int, metrics: Numbers) -> None:
        """Raise what went wrong with a state that is written in the background."""
        if self._checkpoints is not None:
            self._checkpoints.check()

    def on_interval(self, loop: Loop) -> None:
        """Save the state, with the place in the data and the callbacks' numbers."""
        if loop.position == self.last:
            return
        self.last = loop.position
        loop.announce("saving")
        metrics = {"loss": self.valid.loss} if self.valid is not None else None
        self.checkpoints.save(loop.state, data_position=loop.saved(), metrics=metrics)

    def on_stop(self, loop: Loop) -> None:
        """Save before the end, and say so if it takes long."""
        self.on_interval(loop)
        if not self.checkpoints.wait(self.grace):
            there = [p.name for p in self.path.glob("*") if p.name.isdigit()]
            last = f"step {max(map(int, there))}" if there else "its beginning"
            _say(
                f"still saving step {loop.position} after {self.grace:.0f} s; if the "
                f"process is ended before it is done, the run goes on from {last}"
            )
            self.checkpoints.wait()

    def on_end(self, loop: Loop) -> None:
        """Wait for what is being written, but where the process is to end at once."""
        under_way = sys.exception()
        if self._checkpoints is None or isinstance(under_way, KeyboardInterrupt):
            return
        try:
            self._checkpoints.close()
        except CheckpointError as error:
            if under_way is None:
                raise
            if f"{error}" != f"{under_way}":
                warnings.warn(f"{error}", JloraWarning, stacklevel=2)
        finally:
            self._checkpoints = None


class ProgressBar(Callback):
    """A bar that moves at every step, and says when a step is compiled.

    Args:
      unit: what is counted, `tokens` say.
    """

    def __init__(self, unit: str = "tokens") -> None:
        self.unit = unit
        self.loss: float | None = None
        self.counted, self.since = 0, math.inf  # since the last compilation

    def on_start(self, loop: Loop) -> None:
        """Show the bar."""
        from tqdm import tqdm

        self.bar = tqdm(
            total=loop.steps,
            initial=loop.position,
            desc="train",
            unit="step",
            disable=not is_first(),
        )

    def on_wait(self, loop: Loop, what: str) -> None:
        """Say what takes so long."""
        self.bar.set_postfix_str(what, refresh=True)
        if what == "compiling":
            self.since = math.inf

    def on_step(self, loop: Loop, step: int, metrics: Numbers) -> None:
        """Move; the loss shown is a running mean."""
        if not metrics["nonfinite"]:
            loss = metrics["loss"]
            self.loss = loss if self.loss is None else 0.9 * self.loss + 0.1 * loss
        text = "loss ?" if self.loss is None else f"loss {self.loss:.3f}"
        if math.isinf(self.since):  # this step was compiled
            self.counted, self.since = 0, loop.step_seconds
        self.counted += int(metrics["count"])
        seconds = loop.step_seconds - self.since
        if self.counted and seconds > 0:
            text += f", {self.counted / seconds:,.0f} {self.unit}/s"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(step - self.bar.n)

    def on_end(self, loop: Loop) -> None:
        """Leave the bar as it is."""
        if hasattr(self, "bar"):
            self.bar.close()


def _say(text: str) -> None:
    """Print a line above the bar, if one is shown."""
    from tqdm import tqdm

    if is_first():
        tqdm.write(text)
