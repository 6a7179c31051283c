"""Jobs on their way into a slot and out of it: states, data, results."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax

from jlora._errors import DataError
from jlora._tree.partition import combine
from jlora.sweep._folder import SweepFolder
from jlora.sweep._jobs import Job
from jlora.sweep._plan import Plan
from jlora.sweep._progress import Progress
from jlora.sweep._results import FAILED, RUNNING, WAITING, Result
from jlora.sweep._settings import Settings
from jlora.sweep._streams import Checks, Filler, Source
from jlora.train._state import TrainState
from jlora.train._totals import totals_fn

Batch = Any


@dataclasses.dataclass
class Member:
    """A job in a slot."""

    result: Result
    state: TrainState | None  # until it is in the bank
    feed: Iterator[Batch]
    next: Batch
    valid: list[Batch]
    steps: int
    every: int
    made: int  # steps that were dispatched
    slot: int | None = None  # where it was before a resumption

    @property
    def job(self) -> Job:
        """What it trains."""
        return self.result.job

    @property
    def is_due(self) -> bool:
        """Whether a value is to be measured now."""
        return self.made % self.every == 0 or self.made == self.steps


class Queue:
    """The jobs that wait for a slot, and the results of all.

    Attributes:
      results: by the job's name.
      like: a batch of the shape that those in a bank together have; None before the
        first one's is known.
    """

    def __init__(
        self,
        settings: Settings,
        plan: Plan,
        sources: tuple[Source, Source | None],
        filler: Filler,
        folder: SweepFolder | None,
        progress: Progress,
    ) -> None:
        self.source, self.valid = sources
        self.filler, self.folder, self.progress = filler, folder, progress
        self.results = {job.name: Result(job) for job in plan.jobs}
        self.like: Batch = None
        self._settings, self._plan = settings, plan
        self._waiting = collections.deque(plan.jobs)
        self._later: list[Job] = []
        self._checks = Checks(functools.partial(_trace, settings, plan))

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def ended(self) -> int:
        """How many jobs have ended."""
        under_way = (WAITING, RUNNING)
        return sum(r.status not in under_way for r in self.results.values())

    def next_bank(self) -> None:
        """Let those that were put off stand in line again."""
        self._waiting.extend(self._later)
        self._later, self.like = [], None

    def members(self, most: int) -> list[Member]:
        """Up to so many jobs that can begin."""
        found: list[Member] = []
        while self._waiting and len(found) < most:
            member = self._begin(self._waiting.popleft())
            if member is not None:
                found.append(member)
        return found

    def _begin(self, job: Job) -> Member | None:
        """A job with its state and its first batch; None if it ended or cannot begin.

        One whose batches do not fit beside those of the others is put off.
        """
        result = self.results[job.name]
        state, slot = self._plan.start(job), None
        if self.folder is not None:
            row = self.folder.ended(job)
            if row is not None:
                self.folder.restored(result, row, state)
                self.progress.made(self._settings.steps_of(job))
                return None
            state, slot = self.folder.state(result, state)
        steps, made = self._settings.steps_of(job), int(state.step)
        try:
            feed = self.source(job, made)
            first = self.next_batch(job, feed, made)
            valid = [] if self.valid is None else self.valid.all_of(job)
        except Exception as error:  # whatever a reader of data raises
            self.fail(result, error)
            return None
        if self.like is None:
            self.like = first
        if not self.filler.fits(first, self.like):
            self._later.append(job)
            return None
        result.status = RUNNING
        self.progress.made(made)
        every = self._settings.every(job)
        return Member(result, state, feed, first, valid, steps, every, made, slot)

    def next_batch(self, job: Job, feed: Iterator[Batch], made: int) -> Batch:
        """The next batch of a job that has made so many steps.

        Raises:
          DataError: its data has ended, or is none.
        """
        try:
            batch = next(feed)
        except StopIteration:
            raise DataError(
                f"the data of the job {job.name!r} ended after {made} batches."
            ) from None
        return self._checks(batch)

    def fail(self, result: Result, error: Exception) -> None:
        """End a job by what was raised."""
        result.error = error
        self.end(result, FAILED, f"{type(error).__name__}: {error}")

    def end(self, result: Result, status: str, reason: str = "") -> None:
        """End a job: save it, and hand it out."""
        result.status, result.reason = status, reason
        self.progress.made(self._settings.steps_of(result.job) - result.steps)
        if self.folder is not None:
            self.folder.save_result(result)
        if self._settings.on_result is not None:
            self._settings.on_result(result)


def _trace(settings: Settings, plan: Plan, batch: Batch) -> Any:
    """The jaxpr of the loss of one job, the batch's leaves last."""
    loss = totals_fn(settings.loss_fn, settings.of_step.get("on_missing", "error"))
    state = plan.shapes(plan.jobs[0])
    params = combine(state.trainable, state.frozen)
    leaves, structure = jax.tree.flatten(params)
    held = [isinstance(x, jax.ShapeDtypeStruct) for x in leaves]

    def of(arrays: Any, key: Any, batch: Batch) -> Any:
        feed = iter(arrays)
        full = [next(feed) if h else x for x, h in zip(leaves, held, strict=True)]
        return loss(jax.tree.unflatten(structure, full), batch, key)

    arrays = [x for x, h in zip(leaves, held, strict=True) if h]
    return jax.make_jaxpr(of)(arrays, jax.random.key(0), batch)
