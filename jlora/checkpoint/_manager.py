"""A folder of training states, of which the last and the best are kept.

    path/STEP           a state, as `save_state` writes it; it appears by one renaming
    path/STEP.damaged   one that could not be read, until the next such one

Orbax's manager writes them, in a thread of its own where that is asked for, and deletes
those that are not to be kept once the new one is in place.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import orbax.checkpoint as ocp  # `_storage` says what to install

from jlora._errors import CheckpointError, JloraWarning
from jlora._files import PathLike
from jlora._processes import agree, on_first
from jlora._text import first_line
from jlora.checkpoint import _storage
from jlora.checkpoint._arrays import own_copies
from jlora.checkpoint._entries import Check
from jlora.checkpoint._failures import brief, clear, failure, quiet
from jlora.checkpoint._fingerprint import Fingerprint, fingerprint
from jlora.checkpoint._keeping import Keeping
from jlora.checkpoint._states import restore_state, state_content

if TYPE_CHECKING:
    from jlora.train._state import TrainState


class Checkpoints:
    """A folder of training states by step, of which the last and the best are kept.

    A training script that goes on where it stopped:

        with Checkpoints("run", keep_last=3, keep_best=1) as checkpoints:
            if checkpoints.latest_step() is not None:
                state, position = checkpoints.restore(state)
            ...
            checkpoints.save(state, data_position=position, metrics={"loss": 1.2})

    Args:
      directory: the folder, one subfolder a step.
      keep_last: how many of the last states to keep.
      keep_best: how many of the best to keep besides.
      best_metric: which of the metrics given to `save` says what is best.
      best_mode: whether less or more of it is better.
      include_base: as in `save_state`.
      overwrite: let the first state that is saved replace what is in the folder, if
        that is of another run or further on.
      background: let `save` return as soon as the values are copied, and write while
        training goes on. What goes wrong then is raised by the next `save`, `check`,
        `wait` or `close`.
    """

    def __init__(
        self,
        directory: PathLike,
        *,
        keep_last: int = 3,
        keep_best: int = 0,
        best_metric: str = "loss",
        best_mode: Literal["min", "max"] = "min",
        include_base: bool = False,
        overwrite: bool = False,
        background: bool = False,
    ) -> None:
        self._keeping = Keeping(keep_last, keep_best, best_metric, best_mode)
        self._place = _storage.local_path(directory)
        self._background = background
        self._with_base = include_base
        self._overwrite = overwrite
        self._saving: int | None = None  # the step that is being written
        self._quiet = contextlib.ExitStack()  # until it is
        self._damaged: list[int] = []  # steps that were passed over
        self._base: tuple[list[Any], Fingerprint] | None = None
        on_first(f"opening {str(self._place)!r}", self._prepare)
        self._manager = self._open()

    def _prepare(self) -> None:
        """Make the folder, and undo a replacement that was interrupted.

        Raises:
          CheckpointError: it cannot be made.
        """
        if (self._place / "config").is_dir():
            raise CheckpointError(
                f"{str(self._place)!r} is one checkpoint and no folder of them.\nRead "
                "it with restore_state, and pass another folder here."
            )
        try:
            self._recover()
            self._place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"the folder {str(self._place)!r} cannot be made: "
                f"{brief(error)}.\nPass another one."
            ) from error

    def _recover(self) -> None:
        # The replacement may have stopped before its first state was saved.
        if self._place.is_dir() and _storage.previous_of(self._place).exists():
            saved = [p for p in self._place.iterdir() if p.name.isdigit()]
            if not saved:
                shutil.rmtree(self._place)
        _storage.recover(self._place)

    def _open(self) -> Any:
        return ocp.CheckpointManager(
            self._place, options=self._keeping.options(background=self._background)
        )

    def steps(self) -> list[int]:
        """The steps of which there is a checkpoint."""
        self.wait()
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The last of them."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The best of them, by `best_metric`; None without `keep_best`."""
        self.wait()
        return self._manager.best_step() if self._keeping.keep_best else None

    def save(
        self,
        state: TrainState,
        *,
        data_position: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Save a state under its step, then delete those not to be kept.

        Saving again what is there already does nothing. One that is still being
        written is waited for first.

        Args:
          state: the state.
          data_position: as in `save_state`.
          metrics: numbers, among them `best_metric` where the best are kept.

        Raises:
          CheckpointError: the folder holds another run or a later step, the metric is
            missing, or the checkpoint (of those in the background, the one before)
            cannot be written.
        """
        self.wait()
        arrays, config = state_content(
            state, data_position, self._with_base, self._fingerprint(state)
        )
        numbers = self._keeping.numbers(metrics)
        step = config["step"]
        what = f"saving step {step} in {str(self._place)!r}"
        # The first process looks at what is there; the others may see it later.
        known = on_first(what, lambda: self._is_there(step, config))
        if known:
            return
        if self._damaged:
            self._move(what, self._set_aside)
            self._damaged = []
        replaces = on_first(what, lambda: self._replaces(step, config))
        if replaces:
            self._move(what, self._put_aside)
        args = _storage.save_args(
            "state", own_copies(arrays) if self._background else arrays, config
        )
        try:
            agree(what, self._failure(step, args, numbers))
            self._saving = step
            if replaces or not self._background:
                self.wait()
        except CheckpointError:
            self._move(what, self._put_back if replaces else self._clear)
            raise
        if replaces:
            previous = _storage.previous_of(self._place)
            on_first(what, lambda: shutil.rmtree(previous))
        self._overwrite = False

    def _failure(
        self, step: int, args: Any, numbers: dict[str, float] | None
    ) -> Exception | None:
        """Save a step by Orbax, and say what went wrong."""
        try:
            self._quiet.enter_context(quiet())
            saved = self._manager.save(step, args=args, metrics=numbers, force=True)
        except Exception as error:
            self._quiet.close()
            return self._unsaved(step, error)
        if saved:
            return None
        return CheckpointError(
            f"Orbax declined to save step {step} in {str(self._place)!r}."
        )

    def _unsaved(self, step: int, error: Exception) -> CheckpointError:
        said = CheckpointError(
            f"step {step} could not be saved in {str(self._place)!r}: "
            f"{brief(error)}.\nEarlier checkpoints are as they were. See to "
            "space and permissions."
        )
        said.__cause__ = error
        return said

    # -- in the background -------------------------------------------------------------

    @property
    def is_saving(self) -> bool:
        """Whether a state is being written."""
        return self._saving is not None and self._manager.is_saving_in_progress()

    def check(self) -> None:
        """Raise what has gone wrong in the background; wait for nothing.

        Of several processes none does: they have to hear of it together, at the next
        `save` or `wait`.

        Raises:
          CheckpointError: a state could not be written.
        """
        under_way = self._saving is not None and self.is_saving
        if self._saving is not None and not under_way and jax.process_count() == 1:
            self.wait()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until the state that is being written is in place.

        Args:
          seconds: how long at most; None waits for as long as it takes.

        Returns:
          Whether it is in place.

        Raises:
          CheckpointError: it could not be written. Earlier ones are as they were.
        """
        end = math.inf if seconds is None else time.monotonic() + seconds
        while seconds is not None and self.is_saving:
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        if self._saving is None:
            return True
        step, self._saving = self._saving, None
        what = f"saving step {step} in {str(self._place)!r}"
        with self._quiet:
            error = failure(self._manager.wait_until_finished)
            try:
                agree(what, None if error is None else self._unsaved(step, error))
            except CheckpointError:
                self._move(what, self._clear)
                raise
        return True

    def _clear(self) -> None:
        clear(self._place, "*.orbax-checkpoint-tmp*")

    # -- reading -----------------------------------------------------------------------

    def restore(
        self, state: TrainState, *, step: int | None = None, check: Check = "values"
    ) -> tuple[TrainState, dict[str, Any]]:
        """Restore the last state, or that of a step; see `restore_state`.

        If the last state is damaged, the one before it is restored, with a warning that
        says what is wrong with it and how many steps are lost. The next `save` puts it
        aside, under the name `STEP.damaged`.

        Raises:
          CheckpointError: there is none, all are damaged or the one that was asked for
            is, or as `restore_state`.
        """
        steps = self.steps()
        if step is not None or not steps:
            return self._restore_step(step, steps, state, check)
        faults: dict[int, str] = {}
        for number in reversed(steps):
            found, fault = self._try(number, state, check)
            if found is not None:
                self._damaged = list(faults)
                self._warn(faults, number)
                return found
            faults[number] = fault
        listed = "\n  ".join(faults.values())
        raise CheckpointError(
            f"no state in {str(self._place)!r} can be read.\n  {listed}\nStart the run "
            "again."
        )

    def _restore_step(
        self, step: int | None, steps: list[int], state: TrainState, check: Check
    ) -> tuple[TrainState, dict[str, Any]]:
        if step not in steps:
            raise CheckpointError(
                f"there is no checkpoint of step {step} in {str(self._place)!r}; there "
                f"are {steps or 'none at all'}."
            )
        try:
            return restore_state(self._place / str(step), state, check=check)
        except CheckpointError as error:
            others = [s for s in steps if s != step]
            if not others:
                raise
            raise CheckpointError(
                f"{error}\nOther steps here: {others}; restore(state, step=...)."
            ) from error

    def _try(self, step: int, state: TrainState, check: Check) -> tuple[Any, str]:
        """A state; or None and how it is damaged, on whichever process."""
        place, found, fault = self._place / str(step), None, None
        error: Exception | None = None
        try:
            if not (place / "config").is_dir():
                raise _storage.DamagedError(f"{str(place)!r} has no description.")
            found = restore_state(place, state, check=check)
        except _storage.DamagedError as raised:
            fault = first_line(raised)
        except CheckpointError as raised:
            error = raised
        told = agree(f"restoring step {step} of {str(self._place)!r}", error, fault)
        faults = [x for x in told if x is not None]
        return (None, faults[0]) if faults else (found, "")

    def _warn(self, faults: Mapping[int, str], step: int) -> None:
        if not faults:
            return
        said = "\n".join(faults.values())
        lost = max(faults) - step
        steps = "1 step has" if lost == 1 else f"{lost} steps have"
        warnings.warn(
            f"{said}\nThe state of step {step} is restored instead; {steps} to be made "
            "again.",
            JloraWarning,
            stacklevel=4,
        )

    def close(self) -> None:
        """Wait for what is being written, and finish; called by the `with` statement.

        Raises:
          CheckpointError: a state could not be written in the background.
        """
        try:
            self.wait()
        finally:  # what went wrong is known by now; the manager says it once more
            failure(self._manager.close)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    # -- what is there -----------------------------------------------------------------

    def _fingerprint(self, state: TrainState) -> Fingerprint:
        """The base's fingerprint, read once: the step hands on the same arrays."""
        leaves = jax.tree.leaves(state.frozen)
        if self._base is not None:
            known, base = self._base
            if len(known) == len(leaves) and all(map(_is, known, leaves)):
                return base
        base = fingerprint(state.params)
        self._base = (leaves, base)
        return base

    def _is_there(self, step: int, config: Mapping[str, Any]) -> bool:
        if step not in self.steps() or step in self._damaged:
            return False
        there = _try_config(self._place / str(step))
        return there.get("run") == config["run"]

    def _replaces(self, step: int, config: Mapping[str, Any]) -> bool:
        """Whether what is there is to give way to a state that does not continue it.

        Raises:
          CheckpointError: it would have to, and `overwrite` is off.
        """
        latest = self.latest_step()
        if latest is None:
            return False
        same = _try_config(self._place / str(latest)).get("run") == config["run"]
        if same and latest < step:
            return False
        if not self._overwrite:
            what = f"this run up to step {latest}" if same else "another run"
            raise CheckpointError(
                f"{str(self._place)!r} holds {what}, and step {step} does not continue "
                "it.\nRestore it first, pass another directory, or overwrite=True to "
                "replace what is there."
            )
        return True

    def _move(self, what: str, work: Callable[[], None]) -> None:
        """Move the folder by one process, while no manager looks at it."""
        failure(self._manager.close)
        try:
            on_first(what, work)
        except OSError as error:
            raise CheckpointError(f"{what} failed: {brief(error)}.") from error
        finally:
            self._manager = self._open()

    def _set_aside(self) -> None:
        """Move damaged states out of the way of those that are made again."""
        for old in self._place.glob("*.damaged"):
            shutil.rmtree(old)
        for step in self._damaged:
            (self._place / str(step)).rename(self._place / f"{step}.damaged")

    def _put_aside(self) -> None:
        previous = _storage.previous_of(self._place)
        shutil.rmtree(previous, ignore_errors=True)
        self._place.rename(previous)

    def _put_back(self) -> None:
        shutil.rmtree(self._place, ignore_errors=True)
        _storage.recover(self._place)


def _is(x: Any, y: Any) -> bool:
    return x is y


def _try_config(place: Path) -> dict[str, Any]:
    try:
        return _storage.read_config(place, "state")
    except CheckpointError:
        return {}
