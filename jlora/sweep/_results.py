"""What became of each job."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np

from jlora._errors import OptionError
from jlora._files import PathLike, local_path
from jlora._text import count, first_line, table
from jlora.sweep._jobs import Job

Tree = Any
WAITING, RUNNING, DONE = "waiting", "running", "done"
STOPPED, DIVERGED, FAILED = "stopped", "diverged", "failed"


@dataclasses.dataclass
class Result:
    """One job's.

    Attributes:
      job: the job.
      status: `"done"`; `"stopped"` by a rule; `"diverged"`, its loss or gradient was
        not finite; `"failed"`, its data could not be read; `"waiting"` or `"running"`.
      steps: updates made.
      losses: the training loss of each step, float32.
      history: the measured values as pairs `(step, value)`: validation losses, or means
        of the training loss since the value before.
      reason: why it ended, if it is not done.
      error: what was raised, if it failed.
      state: its last `TrainState`, at its own rank; None if it never began.
    """

    job: Job
    status: str = WAITING
    steps: int = 0
    losses: np.ndarray = dataclasses.field(
        default_factory=lambda: np.zeros(0, np.float32)
    )
    history: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    reason: str = ""
    error: Exception | None = None
    state: Any = None

    @property
    def name(self) -> str:
        """The job's name."""
        return self.job.name

    @property
    def params(self) -> Tree:
        """The lorafied tree as it ended: for `jlora.peft.save`, `jlora.merge`, use.

        Raises:
          OptionError: the job never began.
        """
        if self.state is None:
            raise OptionError(
                f"the job {self.name!r} has no adapter: it is {self.status}"
                f"{', ' + self.reason if self.reason else ''}."
            )
        return self.state.params

    @property
    def value(self) -> float:
        """The last measured value; NaN without one."""
        return self.history[-1][1] if self.history else math.nan

    @property
    def loss(self) -> float:
        """The training loss of the last step; NaN without one."""
        return float(self.losses[-1]) if len(self.losses) else math.nan

    def to_json(self) -> dict[str, Any]:
        """All but arrays of parameters, as JSON can hold it."""
        return {
            **self.job.to_json(),
            "status": self.status,
            "steps_made": self.steps,
            "loss": _number(self.loss),
            "value": _number(self.value),
            "history": [[step, _number(x)] for step, x in self.history],
            "reason": self.reason,
        }


@dataclasses.dataclass(frozen=True, repr=False)
class Results(Sequence[Result]):
    """The results of a sweep, in the order of its jobs; printed, they are a table.

    Attributes:
      rows: one a job.
      seconds: how long the sweep took; of one that was resumed in all processes.
      compilations: how many programs of the step were compiled.
    """

    rows: Sequence[Result]
    seconds: float = 0.0
    compilations: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Result]:
        return iter(self.rows)

    @overload
    def __getitem__(self, which: int | str) -> Result: ...

    @overload
    def __getitem__(self, which: slice) -> Results: ...

    def __getitem__(self, which: int | slice | str) -> Any:
        """A result by number or by its job's name; a slice of them."""
        if isinstance(which, str):
            for row in self.rows:
                if row.name == which:
                    return row
            raise KeyError(which)
        if isinstance(which, slice):
            return dataclasses.replace(self, rows=self.rows[which])
        return self.rows[which]

    @property
    def best(self) -> Result:
        """The job with the lowest last value, among those that ended in order.

        Raises:
          OptionError: there is none.
        """
        ended = [
            r for r in self.rows
            if r.status in (DONE, STOPPED) and math.isfinite(r.value)
        ]  # fmt: skip
        if not ended:
            raise OptionError("no job ended with a finite value, so none is the best.")
        return min(ended, key=lambda r: r.value)

    def __str__(self) -> str:
        fields = _fields(self.rows)
        head = ("job", *fields, "status", "steps", "loss", "value")
        lines = [
            (
                r.name, *(_cell(getattr(r.job, f)) for f in fields),
                r.status, str(r.steps), _cell(r.loss), _cell(r.value),
            )
            for r in self.rows
        ]  # fmt: skip
        reasons = [
            f"{r.name} {r.status}: {first_line(r.reason)}"
            for r in self.rows if r.reason and r.status != DONE
        ]  # fmt: skip
        told = f"{count(len(self.rows), 'job')} in {self.seconds:.1f} s, the step "
        told += f"compiled {count(self.compilations, 'time')}"
        return "\n".join([table([head, *lines]), told, *reasons])

    __repr__ = __str__

    def save(self, path: PathLike) -> None:
        """Write the table, without parameters.

        Args:
          path: a file that ends in `.json`, `.jsonl` or `.csv`.

        Raises:
          OptionError: it ends in something else.
        """
        place = local_path(path)
        rows = [r.to_json() for r in self.rows]
        if place.suffix == ".jsonl":
            text = "".join(json.dumps(row) + "\n" for row in rows)
        elif place.suffix == ".json":
            about = {"seconds": self.seconds, "compilations": self.compilations}
            text = json.dumps({**about, "jobs": rows}, indent=2) + "\n"
        elif place.suffix == ".csv":
            text = _csv(rows)
        else:
            raise OptionError(
                f"{str(place)!r}: a table is saved as .json, .jsonl or .csv."
            )
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")


def _fields(rows: Sequence[Result]) -> list[str]:
    """The numbers in which the jobs differ."""
    names = ("rank", "alpha", "learning_rate", "weight_decay", "dropout", "seed")
    return [n for n in names if len({getattr(r.job, n) for r in rows}) > 1]


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    names.remove("history")
    out = io.StringIO()
    writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _number(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _cell(x: Any) -> str:
    if isinstance(x, float):
        return "" if math.isnan(x) else f"{x:.4g}"
    return "" if x is None else str(x)
