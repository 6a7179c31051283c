"""Which of a run's states are kept: the last ones, and the best by a metric."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp

from jlora._errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Keeping:
    """How many states are kept, as of `Checkpoints`.

    Raises:
      CheckpointError: numbers or a mode that cannot be.
    """

    keep_last: int
    keep_best: int
    best_metric: str
    best_mode: str

    def __post_init__(self) -> None:
        try:
            is_fine = (
                operator.index(self.keep_last) >= 1
                and operator.index(self.keep_best) >= 0
            )
        except TypeError:
            is_fine = False
        if not is_fine or self.best_mode not in ("min", "max"):
            raise CheckpointError(
                f"keep_last={self.keep_last!r}, keep_best={self.keep_best!r}, "
                f"best_mode={self.best_mode!r}; expected whole numbers of at least 1 "
                "and 0, and 'min' or 'max'."
            )

    def options(self, *, background: bool) -> Any:
        """Return Orbax's options."""
        managers = ocp.checkpoint_managers
        policies: list[Any] = [managers.LatestN(self.keep_last)]
        if self.keep_best:
            best = managers.BestN(
                get_metric_fn=self._rank,
                reverse=self.best_mode == "min",
                n=self.keep_best,
                keep_checkpoints_without_metrics=False,
            )
            policies.append(best)
        return ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(policies),
            best_fn=self._rank if self.keep_best else None,
            best_mode=self.best_mode,
            enable_async_checkpointing=background,
            cleanup_tmp_directories=True,
        )

    def _rank(self, metrics: Mapping[str, float]) -> float:
        value = metrics[self.best_metric]
        worst = math.inf if self.best_mode == "min" else -math.inf
        return worst if math.isnan(value) else value

    def numbers(self, metrics: Mapping[str, Any] | None) -> dict[str, float] | None:
        """Return metrics as numbers.

        Raises:
          CheckpointError: the one by which the best are kept is missing, or one is no
            number.
        """
        if self.keep_best and self.best_metric not in (metrics or {}):
            raise CheckpointError(
                f"the best checkpoints are kept by {self.best_metric!r}, which is not "
                f"among the metrics {sorted(metrics or {})}.\nPass save(state, "
                f"metrics={{{self.best_metric!r}: ...}}), or another best_metric."
            )
        return None if metrics is None else dict(map(_number, metrics.items()))


def _number(metric: tuple[str, Any]) -> tuple[str, float]:
    name, value = metric
    try:
        return name, float(value)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the metric {name!r} is {value!r}; metrics are single numbers."
        ) from error
