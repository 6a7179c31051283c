"""A sweep's folder: a line a result, an adapter a job, and states to go on from.

results.jsonl     a line for each job that has ended
time.json         how long it has taken so far
NAME/adapter      its adapter, of jlora.checkpoint
NAME/state        where a job stands that has not ended, its own `TrainState`
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jlora._errors import CheckpointError, OptionError
from jlora._files import PathLike, local_path, read_json, write_json
from jlora.sweep._jobs import Job
from jlora.sweep._results import FAILED, WAITING, Result
from jlora.train._metrics import MetricsLog
from jlora.train._state import TrainState

if TYPE_CHECKING:
    from jlora.checkpoint import Fingerprint

Tree = Any

_TIME = "time.json"
_NAME = re.compile(r"[\w=,.+-]+(/[\w=,.+-]+)*")


class SweepFolder:
    """Where a sweep is kept.

    Args:
      path: the folder.
      jobs: what is trained.
      resume: go on with what is there.

    Raises:
      CheckpointError: a sweep is there already, or none to go on with; another job of
        the same name.
      OptionError: a job's name that is no name of a folder.
    """

    def __init__(self, path: PathLike, jobs: list[Job], resume: bool) -> None:
        self.path = local_path(path)
        for job in jobs:
            parts = job.name.split("/")
            if not _NAME.fullmatch(job.name) or {".", ".."} & {*parts}:
                raise OptionError(
                    f"the job {job.name!r} cannot name a folder.\nUse letters, digits "
                    "and any of =,.+-_ in names of jobs that are saved."
                )
        self._log = MetricsLog(self.path / "results.jsonl")
        there = self._log.file.exists()
        if there and not resume:
            raise CheckpointError(
                f"{str(self.path)!r} holds a sweep already.\nPass resume=True to go on "
                "with it, or another folder."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        known = {job.name: _plain(job) for job in jobs}
        self._ended: dict[str, dict[str, Any]] = {}
        for row in self._log.rows():
            name = row["name"]
            if name in known and row["job"] != known[name]:
                raise CheckpointError(
                    f"the job {name!r} in {str(self.path)!r} is {row['job']}, and here "
                    f"{known[name]}.\nGive it another name."
                )
            if row["event"] != FAILED:  # its data may be there now
                self._ended[name] = row
        self._log.file.touch()
        self._base: Fingerprint | None = None

    @property
    def seconds(self) -> float:
        """How long it has taken, in all the processes that had it."""
        file = self.path / _TIME
        return float(read_json(file)["seconds"]) if file.exists() else 0.0

    def save_seconds(self, seconds: float) -> None:
        """Write that."""
        new = self.path / f"{_TIME}.new"  # so that it is whole whenever one is killed
        write_json(new, {"seconds": seconds})
        os.replace(new, self.path / _TIME)

    def ended(self, job: Job) -> dict[str, Any] | None:
        """What was written of a job that ended; failed ones are tried again."""
        return self._ended.get(job.name)

    def restored(self, result: Result, row: dict[str, Any], start: TrainState) -> None:
        """Fill in the result of a job that ended in an earlier process."""
        from jlora import checkpoint

        place = self.path / result.name / "end"
        base = self._fingerprint(start)
        result.state, position = checkpoint.restore_state(place, start, base=base)
        _refill(result, position)
        result.status, result.reason = row["event"], row["reason"]

    def save_result(self, result: Result) -> None:
        """Write a job's adapter, its last state and its line."""
        from jlora import checkpoint

        place = self.path / result.name
        if result.state is not None:
            place.mkdir(parents=True, exist_ok=True)
            checkpoint.save_adapter(
                place / "adapter", result.state.params, metadata=result.to_json(),
                overwrite=True, base=self._fingerprint(result.state),
            )  # fmt: skip
            self._save(place / "end", result, result.state, None)
        row = {k: v for k, v in result.to_json().items() if k in _TOLD}
        self._log.write(result.status, name=result.name, job=_plain(result.job), **row)
        shutil.rmtree(place / "state", ignore_errors=True)

    def save_state(self, result: Result, state: TrainState, slot: int) -> None:
        """Write where a job stands."""
        place = self.path / result.name
        place.mkdir(parents=True, exist_ok=True)
        self._save(place / "state", result, state, slot)

    def _save(self, place: Path, result: Result, state: TrainState, slot: Any) -> None:
        from jlora import checkpoint

        position = {
            "losses": [float(x) for x in result.losses],
            "history": result.history,
            "slot": slot,
        }
        checkpoint.save_state(
            place, state, data_position=position, overwrite=True,
            base=self._fingerprint(state),
        )  # fmt: skip

    def _fingerprint(self, state: TrainState) -> Fingerprint:
        """The base's, which is read once: all jobs share it."""
        from jlora import checkpoint

        if self._base is None:
            self._base = checkpoint.fingerprint(state.params)
        return self._base

    def state(self, result: Result, start: TrainState) -> tuple[TrainState, int | None]:
        """Where a job stands, and in which slot it was; its start if it never began."""
        from jlora import checkpoint

        place = self.path / result.name / "state"
        if not place.exists():
            return start, None
        base = self._fingerprint(start)
        state, position = checkpoint.restore_state(place, start, base=base)
        _refill(result, position)
        return state, position["slot"]


_TOLD = ("steps_made", "loss", "value", "reason")


def _refill(result: Result, position: dict[str, Any]) -> None:
    result.losses = np.array(position["losses"], np.float32)
    result.history = [(int(step), float(value)) for step, value in position["history"]]
    result.steps = len(result.losses)
    result.status = WAITING


def _plain(job: Job) -> dict[str, Any]:
    told = job.to_json()
    told.pop("name")
    return {k: dict(v) if k == "hyper" else v for k, v in told.items()}
