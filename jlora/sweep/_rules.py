"""Rules that stop jobs early: functions of what was measured, and of nothing else.

A rule is called whenever values were measured, with the results of all jobs, and
returns why to stop which: `{name: reason}`. It keeps no state, so a sweep that is
resumed stops what it would have stopped.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from jlora._errors import OptionError
from jlora.sweep._results import RUNNING, Result

Rule = Callable[[Sequence[Result]], Mapping[str, str]]


@dataclasses.dataclass(frozen=True)
class Halving:
    """Successive halving: at each rung only the best go on.

    The rungs are at `first`, `first * factor`, `first * factor**2`, ... steps. A job is
    compared at a rung with all that were measured there up to then, so those that come
    later, from a queue, wait for nobody. Values are those that were measured at the
    rung, or first after it.

    Attributes:
      first: steps to the first rung.
      factor: one in so many goes on.

    Source: ASHA, Li et al. 2020, arXiv:1810.05934, in its form that stops.
    """

    first: int
    factor: int = 3

    def __post_init__(self) -> None:
        if self.first < 1 or self.factor < 2:
            raise OptionError(
                f"Halving(first={self.first}, factor={self.factor}): first is a number "
                "of steps, factor 2 or more."
            )

    def __call__(self, results: Sequence[Result]) -> dict[str, str]:
        """Which of the jobs that have just come to a rung are not among the best."""
        stopped = {}
        for result in results:
            rung = self._reached(result)
            if rung is None:
                continue
            values = [v for r in results if (v := _value_at(r, rung)) is not None]
            kept = max(1, len(values) // self.factor)
            own = _value_at(result, rung)
            place = sum(v < own for v in values if own is not None)
            if place >= kept:
                stopped[result.name] = (
                    f"halving: {place + 1} of {len(values)} at step {rung}"
                )
        return stopped

    def _reached(self, result: Result) -> int | None:
        """The rung that the last value is the first at or after."""
        if result.status != RUNNING or not result.history:
            return None
        steps = [step for step, _ in result.history]
        before = steps[-2] if len(steps) > 1 else 0
        rung = self.first
        found = None
        while rung <= steps[-1]:
            found = rung if rung > before else None
            rung *= self.factor
        return found


def _value_at(result: Result, rung: int) -> float | None:
    """The first value at a rung or after; infinite where it is not finite."""
    for step, value in result.history:
        if step >= rung:
            return value if math.isfinite(value) else math.inf
    return None


@dataclasses.dataclass(frozen=True)
class Plateau:
    """Stops a job whose value has not fallen for some time.

    Attributes:
      patience: how many values in a row may be no better than the best before.
      least: what counts as better.
    """

    patience: int = 3
    least: float = 0.0

    def __call__(self, results: Sequence[Result]) -> dict[str, str]:
        """Which jobs have stood still for too long."""
        stopped = {}
        for r in results:
            values = [v for _, v in r.history]
            if r.status != RUNNING or len(values) <= self.patience:
                continue
            best = min(values[: -self.patience])
            if not min(values[-self.patience :]) < best - self.least:
                stopped[r.name] = f"plateau: no value below {best:.4g} since"
        return stopped


@dataclasses.dataclass(frozen=True)
class Rising:
    """Stops a job whose value has risen far above its best, or is not finite.

    The best may be the training loss of the first step, before any update: a job that
    diverges from there has no good value to compare with.

    Attributes:
      times: how far.
    """

    times: float = 2.0

    def __call__(self, results: Sequence[Result]) -> dict[str, str]:
        """Which jobs diverge."""
        stopped = {}
        for r in results:
            if r.status != RUNNING or not r.history:
                continue
            values = [*map(float, r.losses[:1]), *(v for _, v in r.history)]
            best = min((v for v in values if math.isfinite(v)), default=math.inf)
            if not r.value <= self.times * best:
                stopped[r.name] = f"rising: {r.value:.4g}, and {best:.4g} at best"
        return stopped
