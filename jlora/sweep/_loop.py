"""The steps of one bank, while jobs come into its slots and leave them."""

from __future__ import annotations

from typing import Any

import numpy as np

from jlora._errors import DataError
from jlora.sweep._memory import account
from jlora.sweep._plan import Plan
from jlora.sweep._queue import Member, Queue
from jlora.sweep._results import DIVERGED, DONE, STOPPED
from jlora.sweep._settings import Settings
from jlora.sweep._streams import stacked
from jlora.train._loop import Interrupted

Batch = Any
Slot = tuple[int, Member]


class BankLoop:
    """A bank, who is in its slots, and what was dispatched and not yet read.

    Args:
      settings: the sweep's.
      plan: likewise.
      queue: those who come next.
      members: those who begin.
    """

    def __init__(
        self, settings: Settings, plan: Plan, queue: Queue, members: list[Member]
    ) -> None:
        self._settings, self._plan, self._queue = settings, plan, queue
        members = _in_place(members)
        self._slots: list[Member | None] = list(members)
        self._pending: list[tuple[list[Slot], Any]] = []
        states = [m.state for m in members if m.state is not None]
        self._bank = plan.bank([m.job for m in members], states)
        for m in members:
            m.state = None
        # One batch for all, as long as all stand at the same step and none comes later.
        level = len({m.made for m in members}) == 1
        self._shared = queue.source.is_shared and level and not queue
        group = self._group(members)
        self._step = settings.step(group)
        self._evaluation = settings.evaluation(group)

    def _group(self, members: list[Member]) -> int | None:
        limit = self._settings.memory_limit
        if limit is None:
            return None
        batch = self._joined([m.next for m in members])
        step = self._settings.step(None)
        needs = account(step, self._bank, batch, shared=self._shared)
        return needs.group(len(members), limit)

    @property
    def compilations(self) -> int:
        """How many programs of the step were compiled."""
        return self._step.cache_size()

    def run(self, stopped: list[int]) -> None:
        """Make steps until nobody is left.

        Args:
          stopped: signals to stop that have come.

        Raises:
          Interrupted: one came; the states are saved.
        """
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
            every = self._settings.save_every
            if stopped or (every and ticks % every == 0):
                self._save()
            if stopped and any(self._slots):
                saved = self._queue.folder is not None
                raise Interrupted(
                    f"{self._queue.ended} of {len(self._queue.results)} jobs, with "
                    f"{len(self._running())} under way"
                    + (". Pass resume=True to go on." if saved else ""),
                    stopped[0],
                    saved=saved,
                )

    # -- who is in which slot ----------------------------------------------------------

    def _running(self) -> list[Slot]:
        return [(n, m) for n, m in enumerate(self._slots) if m is not None]

    def _leave(self, slot: int, status: str, reason: str = "") -> None:
        """Take a job out of its slot."""
        self._queue.end(self._out_of(slot).result, status, reason)

    def _fail(self, slot: int, error: Exception) -> None:
        self._queue.fail(self._out_of(slot).result, error)

    def _out_of(self, slot: int) -> Member:
        member = self._slots[slot]
        assert member is not None
        member.result.state = self._plan.state(self._bank, slot, member.job)
        self._slots[slot] = None
        return member

    def _refill(self) -> None:
        """Put the next jobs of the queue into the slots that are free."""
        for slot, member in enumerate(self._slots):
            if member is None and self._queue:
                for new in self._queue.members(1):
                    assert new.state is not None
                    self._bank = self._plan.put(self._bank, slot, new.job, new.state)
                    new.state = None
                    self._slots[slot] = new

    def _save(self) -> None:
        folder = self._queue.folder
        if folder is None:
            return
        self._read(0)
        for slot, member in self._running():
            state = self._plan.state(self._bank, slot, member.job)
            folder.save_state(member.result, state, slot)

    # -- steps -------------------------------------------------------------------------

    def _dispatch(self, running: list[Slot]) -> None:
        filler = running[0][1].next  # of slots that are free: their results are dropped
        batches = [filler if m is None else m.next for m in self._slots]
        batch = self._joined(batches)
        self._bank, metrics = self._step(self._bank, batch, shared=self._shared)
        for _, member in running:
            member.made += 1
        self._pending.append((running, metrics))
        self._queue.progress.say(len(running), len(self._queue))

    def _joined(self, batches: list[Batch]) -> Batch:
        return batches[0] if self._shared else stacked(self._queue.filler(batches))

    def _read(self, left: int) -> None:
        """Read the metrics of the steps dispatched, but for the last `left`."""
        while len(self._pending) > left:
            running, metrics = self._pending.pop(0)
            losses, bad = (np.asarray(metrics[n]) for n in ("loss", "nonfinite"))
            for slot, member in running:
                if self._slots[slot] is not member:
                    continue
                result = member.result
                result.losses = np.append(result.losses, losses[slot])
                result.steps = len(result.losses)
                self._queue.progress.made(1)
                if bad[slot]:
                    norm = float(np.asarray(metrics["grad_norm"])[slot])
                    reason = (
                        f"step {result.steps}: the loss is {losses[slot]}, the "
                        f"gradient's norm {norm}"
                    )
                    self._leave(slot, DIVERGED, reason)

    def _advance(self) -> None:
        """Read the next batch of each job; one whose data is bad fails alone."""
        shared: Any = None
        for slot, member in self._running():
            if self._shared and shared is not None:
                member.next = shared
                continue
            try:
                member.next = shared = self._next(member)
            except Exception as error:  # whatever a reader of data raises
                self._read(0)
                if self._slots[slot] is member:
                    self._fail(slot, error)

    def _next(self, member: Member) -> Batch:
        queue = self._queue
        batch = queue.next_batch(member.job, member.feed, member.made)
        if not self._shared and not queue.filler.fits(batch, queue.like):
            raise DataError(
                f"batch {member.made} of the job {member.job.name!r} is of another "
                "shape than its first.\nPass fill={leaf: number}, which brings batches "
                "to one shape."
            )
        return batch

    # -- values ------------------------------------------------------------------------

    def _measure(self, due: list[Slot]) -> None:
        """Take the values of the jobs that are due, end those that are to end."""
        due = [(slot, m) for slot, m in due if self._slots[slot] is m]
        values = self._values(due)
        for slot, member in due:
            member.result.history.append((member.made, values[slot]))
        for slot, member in due:
            if member.made == member.steps:
                self._leave(slot, DONE)
        reasons: dict[str, str] = {}
        for rule in self._settings.rules:
            reasons = {**rule(list(self._queue.results.values())), **reasons}
        for slot, member in self._running():
            if member.job.name in reasons:
                self._leave(slot, STOPPED, reasons[member.job.name])

    def _values(self, due: list[Slot]) -> dict[int, float]:
        if not due:
            return {}
        if self._queue.valid is not None:
            return self._validated(due)
        values = {}
        for slot, member in due:
            done = member.result.history[-1][0] if member.result.history else 0
            values[slot] = float(np.mean(member.result.losses[done:]))
        return values

    def _validated(self, due: list[Slot]) -> dict[int, float]:
        """The validation losses of the slots, each over its own batches."""
        valid = self._queue.valid
        assert valid is not None
        filler = due[0][1].valid
        batches = [filler if m is None else m.valid for m in self._slots]
        total = count = np.zeros(len(self._slots))
        for n in range(max(map(len, batches))):
            row = [own[n % len(own)] for own in batches]
            if valid.is_shared:
                totals = self._evaluation(self._bank, row[0], shared=True)
            else:
                totals = self._evaluation(self._bank, stacked(self._queue.filler(row)))
            own = np.array([n < len(x) for x in batches])
            more, items = (np.asarray(x, np.float64) for x in totals["loss"])
            total = total + np.where(own, more, 0)
            count = count + np.where(own, items, 0)
        mean = total / np.where(count == 0, 1, count)
        return {slot: float(mean[slot]) for slot, _ in due}


def _in_place(members: list[Member]) -> list[Member]:
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
