"""A grid of runs: its table, its pictures, and what it speaks for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from jlora import sweep
from jlora._errors import NonFiniteError, OptionError

Cells = list[tuple[str, ...]]

_TAIL = 10  # steps whose mean loss is the final one
_HEADS = {"rank": "rank", "batch": "batch", "alpha": "alpha", "rate": "peak rate",
          "targets": "targets"}  # fmt: skip


@dataclasses.dataclass
class GridRun:
    """One run of a grid.

    Attributes:
      result: what became of it.
      batch: examples a step.
      targets: the layers, in words.
      seconds: its share of the time of those that it was trained with.
      score: the measure of the test, more of which is better.
      alone: seconds of the same run by itself, where that was made.
      apart: how far the losses of that are from these, at most.
    """

    result: sweep.Result
    batch: int
    targets: str
    seconds: float
    score: float = math.nan
    alone: float | None = None
    apart: float = 0.0

    rank = property(lambda self: self.result.job.rank, doc="The adapter's.")
    alpha = property(lambda self: self.result.job.alpha, doc="The adapter's.")
    rate = property(lambda self: self.result.job.learning_rate, doc="The peak rate.")
    loss = property(lambda self: self.result.value, doc="The validation loss.")
    ended = property(lambda self: math.isfinite(self.loss), doc="Whether there is one.")

    @property
    def final(self) -> float:
        """The mean training loss of the last ten steps; NaN without one."""
        last = self.result.losses[-_TAIL:]
        return fmean(map(float, last)) if len(last) else math.nan


class Grid(Sequence[GridRun]):
    """The runs of a grid, and what they come to.

    Args:
      runs: the runs.
      measure: what their score is called.
      close: of a loss; what is nearer to the best than that counts as good.
    """

    def __init__(
        self, runs: Sequence[GridRun], measure: str = "BLEU", close: float = 0.02
    ) -> None:
        if not runs:
            raise OptionError("a grid of no runs.")
        self.runs, self.measure, self.close = list(runs), measure, close

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, which: Any) -> Any:
        """A run by number, or a list of them by a slice."""
        return self.runs[which]

    def values(self, name: str) -> list[Any]:
        """What was tried of rank, batch, alpha, rate or targets."""
        return sorted({getattr(run, name) for run in self.runs})

    def best(self, **at: Any) -> GridRun:
        """The run of the lowest validation loss.

        Args:
          **at: only among those with these values, `rank=4` say.

        Raises:
          NonFiniteError: none of them ended with a finite loss.
        """
        found = [
            run for run in self.runs
            if run.ended and all(getattr(run, n) == x for n, x in at.items())
        ]  # fmt: skip
        if not found:
            where = ", ".join(f"{n} {x}" for n, x in at.items())
            raise NonFiniteError(
                f"no run {f'with {where} ' * bool(at)}ended with a finite loss.\nTry "
                "lower rates."
            )
        return min(found, key=lambda run: run.loss)

    def table(self) -> Cells:
        """Head and rows; of what all runs have in common there is no column."""
        names = [n for n in _HEADS if len(self.values(n)) > 1 or n in ("rank", "batch")]
        alone = ["alone"] * any(run.alone is not None for run in self.runs)
        head = (*(_HEADS[n] for n in names), "steps", "time", *alone,
                "final loss", "validation loss", self.measure)  # fmt: skip
        return [head, *(self._row(run, names) for run in self.runs)]

    def _row(self, run: GridRun, names: Sequence[str]) -> tuple[str, ...]:
        own = [_text(getattr(run, name)) for name in names]
        times = [f"{run.seconds:.1f} s"]
        times += [] if run.alone is None else [f"{run.alone:.1f} s"]
        last = (run.result.status, "", "")
        if run.ended:
            last = (f"{run.final:.3f}", f"{run.loss:.3f}", f"{run.score:.1f}")
        return (*own, str(run.result.steps), *times, *last)

    # -- words -------------------------------------------------------------------------

    def advice(self) -> list[str]:
        """What these runs, and nothing else, speak for."""
        best = self.best()
        said = [
            f"Best: rank {best.rank}, alpha {best.alpha:g}, batches of {best.batch}, a "
            f"peak rate of {best.rate:g}, on {best.targets}. Validation loss "
            f"{best.loss:.3f}, {self.measure} {best.score:.1f}."
        ]
        said += self._about_rank(best) + self._about_batches(best)
        for name in ("rank", "alpha", "rate"):
            said += self._about_edge(best, name)
        return [
            *said,
            "This is one seed: small differences are noise. Repeat the best few with "
            "other seeds before you rely on them.",
        ]

    def _about_rank(self, best: GridRun) -> list[str]:
        enough = min(
            (
                run
                for run in self.runs
                if (run.batch, run.targets) == (best.batch, best.targets)
                and run.loss <= best.loss * (1 + self.close)
            ),
            key=lambda run: run.rank,
        )
        if enough.rank == best.rank:
            return []
        return [
            f"Rank {enough.rank} is enough: its loss, {enough.loss:.3f}, is within "
            f"{self.close:.0%} of the best, with {enough.rank}/{best.rank} of the "
            "parameters."
        ]

    def _about_batches(self, best: GridRun) -> list[str]:
        others = [b for b in self.values("batch") if b != best.batch]
        runs = [self.best(batch=b) for b in others if self._has(batch=b)]
        said = [
            f"Batches of {run.batch}: at best {run.loss:.3f} after {run.result.steps} "
            f"steps (batches of {best.batch}: {best.result.steps}), in "
            f"{run.seconds / best.seconds:.2f} of the time."
            for run in runs
        ]
        if any(run.result.steps < best.result.steps for run in runs):
            said.append(
                "On equally many examples larger batches make fewer steps. Before you "
                "rule them out, try them with a higher rate, or longer."
            )
        return said

    def _has(self, **at: Any) -> bool:
        return any(
            run.ended and all(getattr(run, n) == x for n, x in at.items())
            for run in self.runs
        )

    def _about_edge(self, best: GridRun, name: str) -> list[str]:
        tried, own = self.values(name), getattr(best, name)
        follows = name == "alpha" and all(
            run.alpha == 2 * run.rank for run in self.runs
        )
        if len(tried) < 2 or follows or own not in (tried[0], tried[-1]):
            return []
        edge = "largest" if own == tried[-1] else "smallest"
        return [f"The best {_HEADS[name]} is the {edge} that was tried: look further."]

    # -- pictures ----------------------------------------------------------------------

    def draw(self, folder: Path, before: float) -> list[Path]:
        """Draw loss against rank, time against batch size, and the score of both.

        Where rates, alphas or targets differ too, the best of them is shown.

        Args:
          folder: where the pictures are written.
          before: the validation loss before training.

        Returns:
          The files.
        """
        names = ("loss_by_rank.png", "time_by_batch.png", "heat_map.png")
        by_rank, by_batch, both = files = [folder / name for name in names]
        ranks, batches = self.values("rank"), self.values("batch")
        at = {
            (r, b): self.best(rank=r, batch=b)
            for r in ranks for b in batches if self._has(rank=r, batch=b)
        }  # fmt: skip
        sweep.plot_lines(
            {
                f"batches of {b}": [(r, at[r, b].loss) for r in ranks if (r, b) in at]
                for b in batches
            },
            by_rank, x="rank", y="validation loss (nats a token)",
            title="Loss against rank", levels={"before training": before},
        )  # fmt: skip
        sweep.plot_lines(
            self._times(batches), by_batch, x="batch size", y="seconds a run",
            title="Time against batch size", from_zero=True,
        )  # fmt: skip
        sweep.plot_heat_map(
            {(b, r): run.score for (r, b), run in at.items()},
            both, x="batch size", y="rank", value=self.measure, digits=1,
            title=f"{self.measure} by rank and batch size",
        )  # fmt: skip
        return files

    def _times(self, batches: Sequence[int]) -> dict[str, sweep.Line]:
        def mean(name: str, batch: int) -> float:
            return fmean(getattr(x, name) for x in self.runs if x.batch == batch)

        lines: dict[str, sweep.Line] = {}
        lines["trained together"] = [(b, mean("seconds", b)) for b in batches]
        if all(run.alone is not None for run in self.runs):
            lines["one by one"] = [(b, mean("alone", b)) for b in batches]
        return lines


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
