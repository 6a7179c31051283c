"""Training states on disk: one at a time, or a folder that keeps the last and best."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax

from jlora._errors import CheckpointError
from jlora.checkpoint import _storage
from jlora.checkpoint._entries import Check, check_adapters, check_base, scale_entries
from jlora.checkpoint._fingerprint import Fingerprint, fingerprint, leaf_print
from jlora.checkpoint._storage import PathLike, ocp

if TYPE_CHECKING:
    from jlora.train._state import TrainState

Tree = Any


def save_state(
    path: PathLike,
    state: TrainState,
    *,
    data_position: Mapping[str, Any] | None = None,
    include_base: bool = False,
    overwrite: bool = False,
) -> None:
    """Save a training state, so that the run can go on bit for bit.

    A later state of the same run (the same base, trained leaves and PRNG key) replaces
    an earlier one; anything else stays, unless `overwrite`.

    Args:
      path: the folder to write.
      state: a `jlora.train.TrainState`.
      data_position: where the data stands, as JSON: epoch, offset, an iterator's state.
      include_base: write the frozen base too.
      overwrite: replace the checkpoint of another run.

    Raises:
      CheckpointError: another run is at `path`, or it cannot be written.
    """
    place = _storage.absolute(path)
    arrays, config = _state_content(state, data_position, include_base)
    _storage.check_place(place, overwrite or _is_earlier(place, config))
    _storage.write(place, "state", arrays, config)


def restore_state(
    path: PathLike, state: TrainState, *, check: Check = "values"
) -> tuple[TrainState, dict[str, Any]]:
    """Restore a training state.

    Args:
      path: what `save_state` wrote.
      state: a state made as the saved one was, `TrainState.create(params, tx, key)`: it
        gives the structure, the shardings and the base. It may be abstract if the base
        was saved too.
      check: as in `load_adapter`.

    Returns:
      The state and the data position.

    Raises:
      CheckpointError: another base, other adapters, another optimiser, or a damaged
        checkpoint.
    """
    place = _storage.absolute(path)
    config = _storage.read_config(place, "state")
    with_base = config["with_base"]
    if not with_base:
        _check_has_base(place, state)
        check_base(place, config, fingerprint(state.params), check)
    check_adapters(place, config["adapters"], scale_entries(state.params))
    arrays = _storage.read_arrays(place, config, _state_arrays(state, with_base))
    moving = _moving(state, with_base)
    leaves = [arrays[name] for name in _storage.named(moving)]
    moving = jax.tree.unflatten(jax.tree.structure(moving), leaves)
    return dataclasses.replace(state, **moving), config["data_position"]


def _moving(state: TrainState, with_base: bool) -> dict[str, Any]:
    """What a checkpoint holds: all but the base."""
    names = [
        "step",
        "trainable",
        "opt_state",
        "key",
        *(["frozen"] if with_base else []),
    ]
    return {name: getattr(state, name) for name in sorted(names)}


def _state_arrays(state: TrainState, with_base: bool) -> dict[str, Any]:
    return _storage.named(_moving(state, with_base))


def _state_content(
    state: TrainState, data_position: Any, with_base: bool, base: Any = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    base = fingerprint(state.params) if base is None else base
    config = {
        "step": int(state.step),
        "run": _run(state, base),
        "with_base": with_base,
        "adapters": scale_entries(state.params),
        "base": base.to_json(),
        "data_position": dict(data_position or {}),
    }
    return _state_arrays(state, with_base), config


def _run(state: TrainState, base: Fingerprint) -> str:
    """What tells one run from another: base, trained leaves and PRNG key."""
    shapes = {n: leaf_print(x, read=False).kind for n, x in
              _storage.named(state.trainable).items()}  # fmt: skip
    text = f"{base.digest}|{shapes}|{leaf_print(state.key).digest}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _check_has_base(place: Path, state: TrainState) -> None:
    leaves = jax.tree.leaves(state.frozen)
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
        raise CheckpointError(
            f"{str(place)!r} was saved without the base, and the state it is restored "
            "into has only shapes for one.\nPass a state made of real parameters, or "
            "save with include_base=True."
        )


def _is_earlier(place: Path, config: Mapping[str, Any]) -> bool:
    """Whether an earlier state of the same run is there."""
    try:
        there = _storage.read_config(place, "state")
    except CheckpointError:
        return False
    return there["run"] == config["run"] and there["step"] <= config["step"]


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
        if keep_last < 1 or keep_best < 0 or best_mode not in ("min", "max"):
            raise ValueError(
                f"keep_last={keep_last}, keep_best={keep_best}, best_mode="
                f"{best_mode!r}; keep the last at least, and best is 'min' or 'max'."
            )
        self._place = _storage.absolute(directory)
        self._best = best_metric if keep_best else None
        self._worst = math.inf if best_mode == "min" else -math.inf
        self._options = self._manager_options(keep_last, keep_best, best_mode)
        self._with_base = include_base
        self._overwrite = overwrite
        self._base: tuple[list[Any], Fingerprint] | None = None
        self._recover()
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

    def _recover(self) -> None:
        """Undo a replacement that was interrupted before its first state was saved."""
        if self._place.is_dir() and _storage.aside(self._place).exists():
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
        arrays, config = _state_content(
            state, data_position, self._with_base, self._fingerprint(state)
        )
        numbers = self._numbers(metrics)
        step = config["step"]
        if self._is_there(step, config):
            return
        moved = self._make_room(step, config)
        args = _storage.items("state", arrays, config)
        try:
            saved = self._manager.save(step, args=args, metrics=numbers, force=True)
        except Exception as error:
            self._put_back(moved)
            raise CheckpointError(
                f"step {step} could not be saved in {str(self._place)!r}: "
                f"{_storage.brief(error)}.\nEarlier checkpoints are as they were."
            ) from error
        if not saved:
            self._put_back(moved)
            raise CheckpointError(
                f"Orbax declined to save step {step} in {str(self._place)!r}."
            )
        if moved:
            shutil.rmtree(_storage.aside(self._place))
        self._overwrite = False

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
        return None if metrics is None else {k: float(v) for k, v in metrics.items()}

    def _is_there(self, step: int, config: Mapping[str, Any]) -> bool:
        if step not in self.steps():
            return False
        there = _try_config(self._place / str(step))
        return there.get("run") == config["run"]

    def _make_room(self, step: int, config: Mapping[str, Any]) -> bool:
        """Refuse, or move aside, what this state does not continue."""
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
        self._manager.close()
        previous = _storage.aside(self._place)
        shutil.rmtree(previous, ignore_errors=True)
        self._place.rename(previous)
        self._manager = self._open()
        return True

    def _put_back(self, moved: bool) -> None:
        if moved:
            self._manager.close()
            shutil.rmtree(self._place, ignore_errors=True)
            _storage.recover(self._place)
            self._manager = self._open()


def _is(x: Any, y: Any) -> bool:
    return x is y


def _try_config(place: Path) -> dict[str, Any]:
    try:
        return _storage.read_config(place, "state")
    except CheckpointError:
        return {}
