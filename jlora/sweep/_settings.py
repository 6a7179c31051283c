"""The arguments of a sweep, checked, and what they say of a job."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jlora.sweep._jobs import Job
from jlora.sweep._plan import Optimizer
from jlora.sweep._results import Result
from jlora.sweep._rules import Rule
from jlora.sweep._step import SweepEval, SweepStep, sweep_step
from jlora.train._gradients import LossFn

STEP_OPTIONS = ("accumulate", "clip_norm", "compute_dtype", "cast_batch", "hooks",
                "mesh", "on_missing")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of `run` that are neither jobs nor data."""

    loss_fn: LossFn
    steps: int | None
    slots: int
    eval_every: int | None
    rules: tuple[Rule, ...]
    save_every: int | None
    on_result: Callable[[Result], None] | None
    memory_limit: int | None
    optimizer: Optimizer
    of_step: Mapping[str, Any]

    def steps_of(self, job: Job) -> int:
        """How many updates a job gets."""
        return job.steps or self.steps or 0

    def every(self, job: Job) -> int:
        """How many steps of a job lie between two values."""
        return self.eval_every or max(1, self.steps_of(job) // 10)

    def step(self, group: int | None) -> SweepStep:
        """The step, so many slots at a time."""
        return sweep_step(self.loss_fn, self.optimizer, group=group, **self.of_step)

    def evaluation(self, group: int | None) -> SweepEval:
        """The evaluation, likewise."""
        kept = ("compute_dtype", "cast_batch", "mesh", "on_missing")
        own = {n: x for n, x in self.of_step.items() if n in kept}
        return SweepEval(self.loss_fn, group=group, **own)
