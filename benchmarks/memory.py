"""Memory of a step: XLA's account of the program, and the peak of a worker."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from benchmarks import _results
from benchmarks._cases import Case
from benchmarks._choice import cases, described
from benchmarks._race import Entry, race
from benchmarks.step_time import chosen, peer, training

CPU = (("t5-small-8x64", 8, None), ("t5-base-8x64", 8, None))
GPU = (("t5-base-32x512", 8, None),)
OWN = (
    "by hand", "jlora", "jlora, optax.masked", "jlora, masked, clipped",
    "full fine-tuning",
)  # fmt: skip
COLUMNS = (
    "case", "compiled_for", "contender", "arguments_mib", "outputs_mib", "aliased_mib",
    "temporary_mib", "peak_mib", "to_full", "rss_mib", "device_mib", "xla_gflop",
    "error",
)  # fmt: skip


def main(options: Any) -> list[_results.Row]:
    """Run a few steps of each contender in a worker of its own; print and save."""
    rows, about = [], {}
    options.repeats = min(options.repeats, 3)
    for one in cases(options, CPU, GPU):
        found = []
        for entry in _entries(one, options):
            result = race([entry], options)
            worker = result.about.get(entry.group, {})
            about[worker.get("device", "")] = worker
            facts = result.facts.get(entry.name, {})
            found.append(
                {
                    **described(one),
                    "contender": entry.name,
                    "compiled_for": facts.get("compiled_for"),
                    **_mib(facts.get("xla_bytes", {})),
                    **_process(worker, options),
                    "xla_gflop": facts.get("xla_gflop"),
                    "error": result.errors.get(entry.name),
                }
            )
        rows += _against_full(found)
    print(_results.table(rows, COLUMNS))
    _results.save(options, about, rows)
    return rows


def _entries(one: Case, options: Any) -> list[Entry]:
    """Return the contenders; for a device that is not here those of JAX alone."""
    own, names = chosen(options, OWN, ("PEFT", "full"))
    if options.compile_for is None:
        peers = [peer(one, n) for n in names]
        return [*(training(one, n, group=n) for n in own), *peers]
    case = {"case": dataclasses.asdict(one), "target": options.compile_for}
    maker = "benchmarks._ahead:Compiled"
    return [Entry(n, maker, {**case, "contender": n}) for n in own]


def _process(worker: Mapping[str, Any], options: Any) -> dict[str, float | None]:
    """Return what the worker took, where it was the device."""
    if options.compile_for is not None:
        return {}
    return _mib({n: worker.get(f"{n}_bytes") for n in ("rss", "device")})


def _mib(sizes: dict[str, int | None]) -> dict[str, float | None]:
    return {f"{n}_mib": None if x is None else x / 2**20 for n, x in sizes.items()}


def _against_full(rows: list[_results.Row]) -> list[_results.Row]:
    """Add each contender's share of what full fine-tuning needs, by XLA's account."""
    peaks = {row["contender"]: row.get("peak_mib") for row in rows}
    full = peaks.get("full fine-tuning")
    if not full:
        return rows
    return [
        {**row, "to_full": row["peak_mib"] / full if row.get("peak_mib") else None}
        for row in rows
    ]
