"""A whole sweep: a queue of jobs through the slots of a bank."""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jlora._errors import DataError, OptionError
from jlora._files import PathLike
from jlora._tree.partition import combine
from jlora.sweep._folder import SweepFolder
from jlora.sweep._jobs import Job, check_jobs
from jlora.sweep._memory import account
from jlora.sweep._plan import Adapt, Optimizer, Plan, adamw
from jlora.sweep._results import (
    DIVERGED,
    DONE,
    FAILED,
    RUNNING,
    STOPPED,
    Result,
    Results,
)
from jlora.sweep._rules import Rule
from jlora.sweep._step import SweepEval, SweepStep, sweep_step
from jlora.sweep._streams import Checks, Filler, Source, stacked
from jlora.train._gradients import LossFn
from jlora.train._loop import Interrupted, stop_signals
from jlora.train._state import TrainState
from jlora.train._totals import totals_fn

Tree = Any
Batch = Any

_STEP_OPTIONS = ("accumulate", "clip_norm", "compute_dtype", "cast_batch", "hooks",
                 "on_missing")  # fmt: skip


def run(
    loss_fn: LossFn,
    params: Tree,
    jobs: Iterable[Job],
    batches: Any = None,
    *,
    steps: int | None = None,
    slots: int | None = None,
    optimizer: Optimizer = adamw,
    valid: Any = None,
    eval_every: int | None = None,
    stop: Rule | Sequence[Rule] = (),
    fill: Mapping[str, Any] | None = None,
    folder: PathLike | None = None,
    resume: bool = False,
    save_every: int | None = None,
    on_result: Callable[[Result], None] | None = None,
    memory_limit: int | None = None,
    adapt: Adapt | None = None,
    **options: Any,
) -> Results:
    """Train many adapters on one base, in one compiled step.

    Each job ends as it would in a run of its own with `jlora.train.make_train_step`,
    whatever else is trained beside it. A job that ends, is stopped or fails makes room
    for the next one, and nothing is compiled for it.

    Args:
      loss_fn: `(params, batch, key)`, written for plain parameters, as of
        `jlora.train.make_train_step`; validation passes None for the key.
      params: the base.
      jobs: what to train. Those after the first `slots` wait for a place.
      batches: a stream of batches for all; or a function of a job that makes its
        stream; None takes each job's `data`. A stream is a list of batches, which is
        gone through again and again; something with a method `stream(step)`, such as
        `jlora.data.Batches`; or, of one job, a function from a step's number to the
        batches from there on. Where that fails, the job fails alone.
      steps: updates of jobs that do not say.
      slots: adapters trained at a time; None takes all.
      optimizer: makes an optimiser of a job's numbers, see `Plan`.
      valid: batches to validate on, for all; or a function of a job that returns its.
      eval_every: steps of a job between values; None takes a tenth of its steps. A
        value is the loss over `valid`, or without it the mean training loss since the
        last value.
      stop: rules that stop jobs early, such as `Halving`.
      fill: brings batches of unlike shapes to one: what stands behind a job's own items
        in each leaf, by name, `{"input_ids": 0, "labels": -100}`. The loss must count
        nothing of it. Without, jobs with batches of another shape are trained after
        the others, in a bank of their own.
      folder: where adapters, results and states are saved.
      resume: go on with what is in the folder.
      save_every: steps between the savings of states; a sweep that is interrupted
        saves them in any case.
      on_result: called with each result when its job ends, to export it say.
      memory_limit: bytes that a step may take; more slots than that allows are computed
        group by group. Measuring costs two compilations.
      adapt: makes a job's tree, `(params, job) -> tree`, in the place of `Job.lorafy`.
      **options: of the step (`accumulate`, `clip_norm`, `compute_dtype`, `cast_batch`,
        `hooks`, `on_missing`), and what all jobs share of `jlora.lorafy` (`targets`,
        `train`, `dora`, ...).

    Returns:
      The results, in the order of the jobs.

    Raises:
      OptionError: jobs or options that cannot be.
      LoraError: what `jlora.lorafy` refuses, with the job's name.
      Interrupted: Ctrl-C or SIGTERM; with a folder, the states are saved.

    >>> params = {"query": {"kernel": jnp.ones((3, 2))}}
    >>> def loss_fn(params, batch, key):
    ...     return jnp.mean((batch["x"] @ params["query"]["kernel"] - batch["y"]) ** 2)
    >>> batch = {"x": jnp.ones((4, 3)), "y": jnp.ones((4, 2))}
    >>> jobs = jlora.sweep.grid(rank=[1, 2], learning_rate=[1e-2, 1e-1])
    >>> results = run(loss_fn, params, jobs, [batch], steps=5, targets=["query"])
    >>> results.best.name
    'rank=2,learning_rate=0.1'
    """
    found = check_jobs(jobs)
    for job in found:
        if job.steps is None and steps is None:
            raise OptionError(
                f"the job {job.name!r} says no steps, and the sweep none."
            )
    for name, number in {"steps": steps, "slots": slots, "eval_every": eval_every,
                         "save_every": save_every}.items():  # fmt: skip
        if number is not None and (not isinstance(number, int) or number < 1):
            raise OptionError(f"{name}={number!r}: expected a whole number, or None.")
    of_step = {n: options.pop(n) for n in _STEP_OPTIONS if n in options}
    settings = _Settings(
        loss_fn, steps, min(slots or len(found), len(found)), eval_every,
        (stop,) if callable(stop) else tuple(stop), save_every, on_result,
        memory_limit, optimizer, of_step,
    )  # fmt: skip
    plan = Plan(params, found, optimizer, adapt=adapt, **options)
    place = None if folder is None else SweepFolder(folder, found, resume)
    sources = Source(batches), None if valid is None else Source(valid)
    return _Run(settings, plan, sources, Filler(fill), place).run()


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The arguments of `run`, checked."""

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
        return job.steps or self.steps or 0

    def every(self, job: Job) -> int:
        return self.eval_every or max(1, self.steps_of(job) // 10)

    def step(self, group: int | None) -> SweepStep:
        return sweep_step(self.loss_fn, self.optimizer, group=group, **self.of_step)

    def evaluation(self, group: int | None) -> SweepEval:
        kept = ("compute_dtype", "cast_batch", "on_missing")
        own = {n: x for n, x in self.of_step.items() if n in kept}
        return SweepEval(self.loss_fn, group=group, **own)


@dataclasses.dataclass
class _Member:
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
        return self.result.job

    @property
    def is_due(self) -> bool:
        """Whether a value is to be measured now."""
        return self.made % self.every == 0 or self.made == self.steps


class _Run:
    """The loop over steps, with what it holds between them."""

    def __init__(
        self,
        settings: _Settings,
        plan: Plan,
        sources: tuple[Source, Source | None],
        filler: Filler,
        folder: SweepFolder | None,
    ) -> None:
        self.settings, self.plan, self.folder = settings, plan, folder
        (self.source, self.valid), self.filler = sources, filler
        self.results = {job.name: Result(job) for job in plan.jobs}
        self.queue = collections.deque(plan.jobs)
        self.checks = Checks(functools.partial(_trace, settings, plan))
        self.compilations = 0

    def run(self) -> Results:
        began = time.perf_counter()
        with stop_signals() as stopped:
            while self.queue:
                self._run_bank(stopped)
        rows = [self.results[job.name] for job in self.plan.jobs]
        return Results(rows, time.perf_counter() - began, self.compilations)

    def _run_bank(self, stopped: list[int]) -> None:
        """Train the jobs whose batches fit the first one's; the others stay queued."""
        self.later: list[Job] = []
        self.like: Batch = None
        members = self._members(self.settings.slots)
        if members:
            self._make_bank(members)
            self._steps(stopped)
            self.compilations += self.step.cache_size()
        self.queue.extend(self.later)

    def _make_bank(self, members: list[_Member]) -> None:
        members = _in_place(members)
        self.slots: list[_Member | None] = list(members)
        self.pending: list[tuple[list[tuple[int, _Member]], Any]] = []
        states = [m.state for m in members if m.state is not None]
        self.bank = self.plan.bank([m.job for m in members], states)
        # One batch for all, as long as all stand at the same step and none comes later.
        level = len({m.made for m in members}) == 1
        self.shared = self.source.is_shared and level and not self.queue
        for m in members:
            m.state = None
        group = self._group(members)
        self.step = self.settings.step(group)
        self.evaluation = self.settings.evaluation(group)

    def _group(self, members: list[_Member]) -> int | None:
        limit = self.settings.memory_limit
        if limit is None:
            return None
        batch = self._joined([m.next for m in members])
        step = self.settings.step(None)
        needs = account(step, self.bank, batch, shared=self.shared)
        return needs.group(len(members), limit)

    # -- jobs in and out ---------------------------------------------------------------

    def _members(self, most: int) -> list[_Member]:
        """Up to so many jobs from the queue that can begin."""
        found: list[_Member] = []
        while self.queue and len(found) < most:
            member = self._begin(self.queue.popleft())
            if member is not None:
                found.append(member)
        return found

    def _begin(self, job: Job) -> _Member | None:
        """A job with its state and its first batch; None if it ended or cannot begin.

        One whose batches do not fit beside those of the others is put off.
        """
        result = self.results[job.name]
        state, slot = self.plan.start(job), None
        if self.folder is not None:
            row = self.folder.ended(job)
            if row is not None:
                self.folder.restored(result, row, state)
                return None
            state, slot = self.folder.state(result, state)
        steps, made = self.settings.steps_of(job), int(state.step)
        try:
            feed = self.source(job, made)
            first = self._next(job, feed, made)
            valid = [] if self.valid is None else self.valid.all_of(job)
        except Exception as error:  # whatever a reader of data raises
            self._fail(result, error)
            return None
        if self.like is None:
            self.like = first
        if not self.filler.fits(first, self.like):
            self.later.append(job)
            return None
        result.status = RUNNING
        every = self.settings.every(job)
        return _Member(result, state, feed, first, valid, steps, every, made, slot)

    def _next(self, job: Job, feed: Iterator[Batch], made: int) -> Batch:
        try:
            batch = next(feed)
        except StopIteration:
            raise DataError(
                f"the data of the job {job.name!r} ended after {made} batches."
            ) from None
        return self.checks(batch)

    def _fail(self, result: Result, error: Exception) -> None:
        result.error = error
        self._end(result, FAILED, f"{type(error).__name__}: {error}")

    def _end(self, result: Result, status: str, reason: str = "") -> None:
        result.status, result.reason = status, reason
        if self.folder is not None:
            self.folder.save_result(result)
        if self.settings.on_result is not None:
            self.settings.on_result(result)

    def _leave(self, slot: int, status: str, reason: str = "") -> None:
        """Take a job out of its slot."""
        member = self.slots[slot]
        assert member is not None
        member.result.state = self.plan.state(self.bank, slot, member.job)
        self.slots[slot] = None
        self._end(member.result, status, reason)

    def _refill(self) -> None:
        """Put the next jobs of the queue into the slots that are free."""
        for slot, member in enumerate(self.slots):
            if member is None and self.queue:
                for new in self._members(1):
                    assert new.state is not None
                    self.bank = self.plan.put(self.bank, slot, new.job, new.state)
                    new.state = None
                    self.slots[slot] = new

    # -- steps -------------------------------------------------------------------------

    def _steps(self, stopped: list[int]) -> None:
        ticks = 0
        while True:
            self._refill()
            running = self._running()
            if not running:
                return
            self._dispatch(running)
            ticks += 1
            due = [(slot, m) for slot, m in running if m.is_due]
            self._read(0 if due or stopped else 1)
            if due:
                self._measure(due)
            self._advance()
            every = self.settings.save_every
            if stopped or (every and ticks % every == 0):
                self._save()
            if stopped and any(self.slots):
                raise Interrupted(
                    f"{len(self._running())} jobs were under way"
                    + (". Pass resume=True to go on." if self.folder else "")
                )

    def _running(self) -> list[tuple[int, _Member]]:
        return [(n, m) for n, m in enumerate(self.slots) if m is not None]

    def _dispatch(self, running: list[tuple[int, _Member]]) -> None:
        filler = running[0][1].next  # of slots that are free: their results are dropped
        batches = [filler if m is None else m.next for m in self.slots]
        batch = self._joined(batches)
        self.bank, metrics = self.step(self.bank, batch, shared=self.shared)
        for _, member in running:
            member.made += 1
        self.pending.append((running, metrics))

    def _joined(self, batches: list[Batch]) -> Batch:
        return batches[0] if self.shared else stacked(self.filler(batches))

    def _read(self, left: int) -> None:
        """Read the metrics of the steps dispatched, but for the last `left`."""
        while len(self.pending) > left:
            running, metrics = self.pending.pop(0)
            losses, bad = (np.asarray(metrics[n]) for n in ("loss", "nonfinite"))
            for slot, member in running:
                if self.slots[slot] is not member:
                    continue
                result = member.result
                result.losses = np.append(result.losses, losses[slot])
                result.steps = len(result.losses)
                if bad[slot]:
                    norm = float(np.asarray(metrics["grad_norm"])[slot])
                    reason = (
                        f"step {result.steps}: the loss is {losses[slot]}, the "
                        f"gradient's norm {norm}"
                    )
                    self._leave(slot, DIVERGED, reason)

    def _measure(self, due: list[tuple[int, _Member]]) -> None:
        """Take the values of the jobs that are due, end those that are to end."""
        due = [(slot, m) for slot, m in due if self.slots[slot] is m]
        values = self._values(due)
        for slot, member in due:
            member.result.history.append((member.made, values[slot]))
        for slot, member in due:
            if member.made == member.steps:
                self._leave(slot, DONE)
        reasons: dict[str, str] = {}
        for rule in self.settings.rules:
            reasons = {**rule(list(self.results.values())), **reasons}
        for slot, member in self._running():
            if member.job.name in reasons:
                self._leave(slot, STOPPED, reasons[member.job.name])

    def _values(self, due: list[tuple[int, _Member]]) -> dict[int, float]:
        if not due:
            return {}
        if self.valid is not None:
            return self._validated(due)
        values = {}
        for slot, member in due:
            done = member.result.history[-1][0] if member.result.history else 0
            values[slot] = float(np.mean(member.result.losses[done:]))
        return values

    def _validated(self, due: list[tuple[int, _Member]]) -> dict[int, float]:
        """The validation losses of the slots, each over its own batches."""
        assert self.valid is not None
        filler = due[0][1].valid
        batches = [filler if m is None else m.valid for m in self.slots]
        total = count = np.zeros(len(self.slots))
        for n in range(max(map(len, batches))):
            row = [own[n % len(own)] for own in batches]
            if self.valid.is_shared:
                totals = self.evaluation(self.bank, row[0], shared=True)
            else:
                totals = self.evaluation(self.bank, stacked(self.filler(row)))
            own = np.array([n < len(x) for x in batches])
            more, items = (np.asarray(x, np.float64) for x in totals["loss"])
            total = total + np.where(own, more, 0)
            count = count + np.where(own, items, 0)
        mean = total / np.where(count == 0, 1, count)
        return {slot: float(mean[slot]) for slot, _ in due}

    def _advance(self) -> None:
        """Read the next batch of each job; one whose data is bad fails alone."""
        shared: Any = None
        for slot, member in self._running():
            if self.shared and shared is not None:
                member.next = shared
                continue
            try:
                batch = self._next(member.job, member.feed, member.made)
                if not self.filler.fits(batch, self.like) and not self.shared:
                    raise DataError(
                        f"batch {member.made} of the job {member.job.name!r} is of "
                        "another shape than its first.\nPass fill={leaf: number}, "
                        "which brings batches to one shape."
                    )
            except Exception as error:  # as in _begin
                self._read(0)
                if self.slots[slot] is member:
                    member.result.error = error
                    reason = f"{type(error).__name__}: {error}"
                    self._leave(slot, FAILED, reason)
                continue
            member.next = shared = batch

    def _save(self) -> None:
        if self.folder is None:
            return
        self._read(0)
        for slot, member in self._running():
            state = self.plan.state(self.bank, slot, member.job)
            self.folder.save_state(member.result, state, slot)


def _in_place(members: list[_Member]) -> list[_Member]:
    """The members with those that are resumed in the slots where they were."""
    places: list[Any] = [None] * len(members)
    rest = []
    for m in members:
        slot = len(places) if m.slot is None else m.slot
        if slot < len(places) and places[slot] is None:
            places[slot] = m
        else:
            rest.append(m)
    return [rest.pop(0) if m is None else m for m in places]


def _trace(settings: _Settings, plan: Plan, batch: Batch) -> Any:
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
