"""A folder of training states, of which the last and the best are kept."""

from __future__ import annotations

import math
import operator
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import orbax.checkpoint as ocp  # `_storage` says what to install

from jlora._errors import CheckpointError
from jlora._files import PathLike
from jlora._processes import agree, on_first
from jlora.checkpoint import _storage
from jlora.checkpoint._entries import Check
from jlora.checkpoint._fingerprint import Fingerprint, fingerprint
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
    ) -> None:
        _check_policy(keep_last, keep_best, best_mode)
        self._place = _storage.local_path(directory)
        self._best = best_metric if keep_best else None
        self._worst = math.inf if best_mode == "min" else -math.inf
        self._options = self._manager_options(keep_last, keep_best, best_mode)
        self._with_base = include_base
        self._overwrite = overwrite
        self._base: tuple[list[Any], Fingerprint] | None = None
        on_first(f"opening {str(self._place)!r}", self._prepare)
        self._manager = self._open()

    def _manager_options(self, keep_last: int, keep_best: int, mode: str) -> Any:
        managers = ocp.checkpoint_managers
        policies: list[Any] = [managers.LatestN(keep_last)]
        if keep_best:
            best = managers.BestN(
                get_metric_fn=self._rank,
                reverse=mode == "min",
                n=keep_best,
                keep_checkpoints_without_metrics=False,
            )
            policies.append(best)
        return ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(policies),
            best_fn=self._rank if keep_best else None,
            best_mode=mode,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
        )

    def _rank(self, metrics: Mapping[str, float]) -> float:
        value = metrics[self._best or ""]
        return self._worst if math.isnan(value) else value

    def _prepare(self) -> None:
        """Make the folder, and undo a replacement that was interrupted.

        Raises:
          CheckpointError: it cannot be made.
        """
        try:
            self._recover()
            self._place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"the folder {str(self._place)!r} cannot be made: "
                f"{_storage.brief(error)}.\nPass another one."
            ) from error

    def _recover(self) -> None:
        # The replacement may have stopped before its first state was saved.
        if self._place.is_dir() and _storage.previous_of(self._place).exists():
            saved = [p for p in self._place.iterdir() if p.name.isdigit()]
            if not saved:
                shutil.rmtree(self._place)
        _storage.recover(self._place)

    def _open(self) -> Any:
        return ocp.CheckpointManager(self._place, options=self._options)

    def steps(self) -> list[int]:
        """The steps of which there is a checkpoint."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The last of them."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The best of them, by `best_metric`; None without `keep_best`."""
        return self._manager.best_step() if self._best else None

    def save(
        self,
        state: TrainState,
        *,
        data_position: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Save a state under its step, then delete those not to be kept.

        Saving again what is there already does nothing.

        Args:
          state: the state.
          data_position: as in `save_state`.
          metrics: numbers, among them `best_metric` where the best are kept.

        Raises:
          CheckpointError: the folder holds another run or a later step, the metric is
            missing, or the checkpoint cannot be written.
        """
        arrays, config = state_content(
            state, data_position, self._with_base, self._fingerprint(state)
        )
        numbers = self._numbers(metrics)
        step = config["step"]
        what = f"saving step {step} in {str(self._place)!r}"
        # The first process looks at what is there; the others may see it later.
        known = on_first(what, lambda: self._is_there(step, config))
        if known:
            return
        replaces = on_first(what, lambda: self._replaces(step, config))
        if replaces:
            self._move(what, self._put_aside)
        args = _storage.save_args("state", arrays, config)
        try:
            agree(what, self._failure(step, args, numbers))
        except Exception as error:
            if replaces:
                self._move(what, self._put_back)
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"step {step} could not be saved in {str(self._place)!r}: "
                f"{_storage.brief(error)}.\nEarlier checkpoints are as they were."
            ) from error
        if replaces:
            previous = _storage.previous_of(self._place)
            on_first(what, lambda: shutil.rmtree(previous))
        self._overwrite = False

    def _failure(
        self, step: int, args: Any, numbers: dict[str, float] | None
    ) -> Exception | None:
        """Save a step by Orbax, and say what went wrong."""
        try:
            saved = self._manager.save(step, args=args, metrics=numbers, force=True)
        except Exception as error:
            return error
        if saved:
            return None
        return CheckpointError(
            f"Orbax declined to save step {step} in {str(self._place)!r}."
        )

    def restore(
        self, state: TrainState, *, step: int | None = None, check: Check = "values"
    ) -> tuple[TrainState, dict[str, Any]]:
        """Restore the last state, or that of a step; see `restore_state`.

        Raises:
          CheckpointError: there is none, or as `restore_state`. A damaged checkpoint
            is not passed over in silence for an earlier one.
        """
        steps = self.steps()
        step = self.latest_step() if step is None else step
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

    def close(self) -> None:
        """Finish; called by the `with` statement."""
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

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

    def _numbers(self, metrics: Mapping[str, Any] | None) -> dict[str, float] | None:
        if self._best is not None and self._best not in (metrics or {}):
            raise CheckpointError(
                f"the best checkpoints are kept by {self._best!r}, which is not among "
                f"the metrics {sorted(metrics or {})}.\nPass save(state, metrics={{"
                f"{self._best!r}: ...}}), or another best_metric."
            )
        return None if metrics is None else dict(map(_number, metrics.items()))

    def _is_there(self, step: int, config: Mapping[str, Any]) -> bool:
        if step not in self.steps():
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
        self._manager.close()
        try:
            on_first(what, work)
        finally:
            self._manager = self._open()

    def _put_aside(self) -> None:
        previous = _storage.previous_of(self._place)
        shutil.rmtree(previous, ignore_errors=True)
        self._place.rename(previous)

    def _put_back(self) -> None:
        shutil.rmtree(self._place, ignore_errors=True)
        _storage.recover(self._place)


def _check_policy(keep_last: Any, keep_best: Any, best_mode: Any) -> None:
    try:
        is_fine = operator.index(keep_last) >= 1 and operator.index(keep_best) >= 0
    except TypeError:
        is_fine = False
    if not is_fine or best_mode not in ("min", "max"):
        raise CheckpointError(
            f"keep_last={keep_last!r}, keep_best={keep_best!r}, best_mode="
            f"{best_mode!r}; expected whole numbers of at least 1 and 0, and 'min' or "
            "'max'."
        )


def _number(metric: tuple[str, Any]) -> tuple[str, float]:
    name, value = metric
    try:
        return name, float(value)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the metric {name!r} is {value!r}; metrics are single numbers."
        ) from error


def _is(x: Any, y: Any) -> bool:
    return x is y


def _try_config(place: Path) -> dict[str, Any]:
    try:
        return _storage.read_config(place, "state")
    except CheckpointError:
        return {}
