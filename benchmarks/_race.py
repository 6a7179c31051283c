"""Fair timing: contenders take turns in every round, wherever they run.

Each round has an order of its own, for who runs after whom is worth some percent: what
the one before left in the caches, and how warm it left the processor.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from benchmarks import _workers
from benchmarks._workers import WorkerError


@dataclasses.dataclass(frozen=True)
class Entry:
    """A contender.

    Attributes:
      name: in tables.
      maker: `module:function` that makes its runner in the worker.
      arguments: of the maker, as JSON.
      group: contenders of one group share a worker.
    """

    name: str
    maker: str
    arguments: Mapping[str, Any]
    group: str = "jax"


@dataclasses.dataclass
class Race:
    """What came out.

    Attributes:
      times: milliseconds of every round, by contender.
      cpu: milliseconds of the processor in every round, all threads together.
      facts: what each runner found out, by contender.
      errors: of contenders that could not do the work.
      about: each group's device, versions and peak memory.
    """

    times: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    cpu: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    errors: dict[str, str] = dataclasses.field(default_factory=dict)
    about: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def median(self, name: str) -> float | None:
        """Return the median milliseconds; `None` of one that failed."""
        return statistics.median(self.times[name]) if name in self.times else None

    def ratio(self, name: str, to: str) -> float | None:
        """Return the median over rounds of one's time over another's.

        A machine that slows down for a while slows all contenders, so ratios within a
        round hold where times alone would not.
        """
        if name not in self.times or to not in self.times:
            return None
        pairs = zip(self.times[name], self.times[to], strict=True)
        return statistics.median(x / y for x, y in pairs)


def race(entries: Sequence[Entry], options: Any) -> Race:
    """Open every contender, warm up, and time them round by round.

    One that fails, at any time, is in `errors` and runs no further.
    """
    out = Race()
    with ExitStack() as stack:
        workers = {}
        for entry in entries:
            if entry.group not in workers:
                workers[entry.group] = _workers.start(options, entry.group)
                stack.callback(workers[entry.group].stop)
        running = [e for e in entries if _open(workers[e.group], e, out)]
        draw = random.Random(0)
        for number in range(options.warmup + options.repeats):
            for entry in draw.sample(running, len(running)):
                took = _step(workers[entry.group], entry, out)
                if took is None:
                    running.remove(entry)
                elif number >= options.warmup:
                    out.times.setdefault(entry.name, []).append(took["ms"])
                    out.cpu.setdefault(entry.name, []).append(took["cpu_ms"])
        for entry in running:
            worker = workers[entry.group]
            out.facts[entry.name] = worker.ask(do="facts", name=entry.name)
        for group in {e.group for e in entries if e.name not in out.errors}:
            out.about[group] = workers[group].ask(do="about")
    return out


def call(function: str, arguments: Mapping[str, Any], options: Any) -> Any:
    """Call a function in a JAX worker; return its answer and the worker's `about`."""
    worker = _workers.start(options, "jax")
    try:
        answer = worker.ask(do="call", function=function, arguments=arguments)
        return answer, {"jax": worker.ask(do="about")}
    finally:
        worker.stop()


def _open(worker: Any, e: Entry, out: Race) -> bool:
    try:
        out.facts[e.name] = worker.ask(
            do="open", name=e.name, maker=e.maker, arguments=e.arguments
        )
    except WorkerError as error:
        out.errors[e.name] = str(error)
        return False
    return True


def _step(worker: Any, e: Entry, out: Race) -> dict[str, float] | None:
    try:
        return worker.ask(do="step", name=e.name)
    except WorkerError as error:
        out.errors[e.name] = str(error)
        out.times.pop(e.name, None)
        out.cpu.pop(e.name, None)
        return None
