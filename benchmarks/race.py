"""Fair timing: contenders take turns in every round, each framework in a process.

Each round has an order of its own, for who runs after whom is worth some percent: what
the one before left in the caches, and how warm it left the processor.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import random
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import worker

ROOT = pathlib.Path(__file__).parent.parent
ENVIRONMENTS: Mapping[str, Mapping[str, str]] = {
    "default": {},
    # XLA's CPU runtime takes one large arena a step from malloc, which glibc maps and
    # unmaps every time: 100,000 page faults a step. These keep it.
    "tuned": {
        "MALLOC_TRIM_THRESHOLD_": "16000000000",
        "MALLOC_MMAP_THRESHOLD_": "8000000000",
        "MALLOC_ARENA_MAX": "1",
    },
    # Every array in pages of its own, given back when it goes: who does a thing once
    # has none to reuse. By itself glibc keeps more or fewer of them from run to run.
    "fresh": {"MALLOC_MMAP_THRESHOLD_": "65536"},
}
# Tiny programs are compiled, not run: LLVM's optimiser would be half the time.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
DRY = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "TORCH_COMPILE_DISABLE": "1"}
# GPUs that XLA can compile for without one. JAX's own arrays stay on the CPU, and
# kernels are not chosen by timing them.
TARGETS = {p.stem: p for p in (ROOT / "benchmarks" / "targets").glob("*.txtpb")}
AHEAD = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_gpu_autotune_level=0"}
# What a contender's time is compared with, where that runs too.
RATIOS = {
    "to_floor": "floor",
    "to_by_hand": "by hand",
    "to_merged": "merged",
    "to_peft": "PEFT",
    "to_compile": "PEFT, torch.compile",
    "to_safe_merge": "PEFT, safe_merge",
    "to_one_by_one": "one by one",
    "to_flat_lists": "flat lists",
}
Row = dict[str, Any]
Rows = tuple[list[Row], dict[str, Any]]  # and about the workers they come from


class Contender(NamedTuple):
    """Who takes part.

    Attributes:
      name: in tables.
      build: `module:function`. In the worker it returns `(step, facts)`: a function
        that runs a step and waits for it, and a dict of what else is known, read when
        the race is over.
      arguments: of `build`, as JSON.
      group: contenders of one group share a process.
    """

    name: str
    build: str
    arguments: Mapping[str, Any]
    group: str = "jax"


def chosen(
    table: Mapping[str, tuple[str, str, Row]], names: Sequence[str], **arguments: Any
) -> list[Contender]:
    """Return contenders by name, of a table of groups, builds and their settings."""
    return [
        Contender(name, f"benchmarks.{build}", {**arguments, **settings}, group)
        for name in names
        for group, build, settings in [table[name]]
    ]


class WorkerError(Exception):
    """A worker could not do what it was asked; the message goes into the table."""


class Race:
    """What came out, by contender, and each group's device, versions and memory."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}  # milliseconds of every round
        self.cpu: dict[str, list[float]] = {}  # of all threads together
        self.facts: dict[str, Row] = {}
        self.errors: dict[str, str] = {}
        self.about: dict[str, Row] = {}

    def ratio(self, name: str, to: str) -> float | None:
        """Return the median over rounds of one's time over another's.

        A machine that slows down for a while slows all contenders, so ratios within a
        round hold where times alone would not.
        """
        if name not in self.times or to not in self.times:
            return None
        pairs = zip(self.times[name], self.times[to], strict=True)
        return statistics.median(x / y for x, y in pairs)

    def rate(self, name: str, amount: float) -> float | None:
        """Return how much of the amount of a step is done in a second."""
        if name not in self.times:
            return None
        return 1e3 * amount / statistics.median(self.times[name])

    def rows(self, head: Row, names: Sequence[str]) -> list[Row]:
        """Return a row for each contender, those that failed included."""
        return [{**head, "contender": name, **self._figures(name)} for name in names]

    def _figures(self, name: str) -> Row:
        if name in self.errors:
            return {"error": self.errors[name]}
        return {
            "median_ms": statistics.median(self.times[name]),
            "min_ms": min(self.times[name]),
            "cpu_ms": statistics.median(self.cpu[name]),
            **{column: self.ratio(name, to) for column, to in RATIOS.items()},
            "full_to_this": self.ratio("full fine-tuning", name),
            **self.facts[name],
            "all_ms": self.times[name],
        }


def race(
    contenders: Sequence[Contender], options: Any, end: float | None = None
) -> Race:
    """Build every contender, warm up, and time them round by round.

    One that fails, at any time, is in `errors` and runs no further. So are those that
    work at `end`, by `time.monotonic`.
    """
    out, running, draw = Race(), list(contenders), random.Random(0)
    workers: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:

        def ask(one: Contender, do: str, **request: Any) -> Any:
            """The answer, or None of one that failed and leaves the race."""
            if one.group not in workers:
                workers[one.group] = stack.enter_context(_worker(options, one.group))
            try:
                line = json.dumps({"do": do, "name": one.name, **request})
                left = None if end is None else max(0.0, end - time.monotonic())
                reply = json.loads(workers[one.group](line, left))
                if "error" not in reply:
                    return reply["answer"]
                out.errors[one.name] = reply["error"]
            except WorkerError as error:
                out.errors[one.name] = str(error)
            running.remove(one)
            out.times.pop(one.name, None)
            return None

        for one in contenders:
            took = ask(one, "build", build=one.build, arguments=one.arguments)
            if took is not None:
                print(f"  {one.name}: ready in {took:.1f} s", file=sys.stderr)
        for number in range(options.warmup + options.repeats):
            for one in draw.sample(running, len(running)):
                took = ask(one, "step")
                if took is not None and number >= options.warmup:
                    out.times.setdefault(one.name, []).append(took["ms"])
                    out.cpu.setdefault(one.name, []).append(took["cpu_ms"])
        for one in list(running):
            facts = ask(one, "facts")
            if facts is not None:
                out.facts[one.name], out.about[one.group] = facts
    return out


@contextlib.contextmanager
def _worker(options: Any, group: str) -> Any:
    """Give a function that passes a line to a worker and returns its answer."""
    if options.in_process:
        own = worker.Worker()
        yield lambda line, left: own.answer(line)
        return
    pythons = dict(entry.split("=", 1) for entry in options.python)
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [pythons.get(group, sys.executable), "-m", "benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment(options),
        )
        try:
            yield lambda line, left: _answer(process, log, line, left)
        finally:
            with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
                process.communicate(timeout=20)  # it ends with its input
            process.kill()


def environment(options: Any) -> dict[str, str]:
    """Return the environment of a worker."""
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    found = {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # of a GPU, which workers share
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        **ENVIRONMENTS[options.env],
        **({"XLA_FLAGS": QUICK} if options.quick else {}),
        **(DRY if options.dry else {}),
        **(AHEAD if getattr(options, "compile_for", None) else {}),
    }
    if count := getattr(options, "fake_devices", None):
        faked = f"--xla_force_host_platform_device_count={count}"
        found["XLA_FLAGS"] = f"{found.get('XLA_FLAGS', '')} {faked}".strip()
        found["JAX_PLATFORMS"] = "cpu"
    return found


def _answer(process: Any, log: Any, line: str, left: float | None) -> str:
    """The answer of a process; if it ended, an error with its last words.

    Raises:
      WorkerError: it ended, or did not answer in the seconds that are left.
    """
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(line + "\n")
        process.stdin.flush()
        if not select.select([process.stdout], [], [], left)[0]:
            process.kill()
            raise WorkerError("stopped: the time that was given is over")
        if answer := process.stdout.readline():
            return answer
    status = process.wait()
    log.seek(0)
    words = log.read().strip().splitlines() or ["it said nothing"]
    raise WorkerError(f"the worker ended with status {status}: {words[-1]}")


def curve(one: Callable[[Any], float], batches: Iterable[Any]) -> Row:
    """The losses of training on some batches, and what a step takes."""
    losses, times = [], []
    for batch in batches:
        begun = time.perf_counter()
        losses.append(one(batch))
        times.append((time.perf_counter() - begun) * 1e3)
    tail = losses[-max(1, len(losses) // 10) :]
    return {
        "median_ms": statistics.median(times), "first_loss": losses[0],
        "loss": sum(tail) / len(tail), "losses": losses,
    }  # fmt: skip


def over_seeds(
    one: Callable[[int], tuple[Row, Row]],
    options: Any,
    score: str,
    others: Sequence[str] = (),
) -> tuple[Row, Row]:
    """One row of the runs of all seeds: means, and the deviation of the score.

    Args:
      one: from a seed to a run's figures, and what it ran on.
      options: of the command: `seeds`, and `quick` for one.
      score: the figure that counts.
      others: figures that have means, too.
    """
    runs, about = list[Row](), Row()
    try:
        for seed in range(1 if options.quick else options.seeds):
            row, about = one(seed)
            runs.append(row)
    except ImportError as error:  # a peer that is not here
        return {"error": f"{type(error).__name__}: {error}"}, about
    scores = [row[score] for row in runs]
    means = {n: statistics.mean(row[n] for row in runs)
             for n in (score, *others) if n in runs[0]}  # fmt: skip
    if "median_ms" in runs[0]:
        means["median_ms"] = statistics.median(row["median_ms"] for row in runs)
    deviation = statistics.stdev(scores) if len(scores) > 1 else None
    together = {**runs[0], **means, "std": deviation, "seeds": len(runs)}
    return {**together, "scores": scores}, about
