"""Memory of a step: XLA's account of the program, and the peak of a worker.

Of a program for a GPU also the kernels of a step, and the bytes that they access.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.cases import Case, cases
from benchmarks.race import Row, Rows, chosen, race
from benchmarks.step_time import CONTENDERS, TORCH

CPU = (Case("t5-small-8x64"), Case("t5-base-8x64"))
GPU = (Case("t5-base-32x512"),)
NAMES = ("by hand", "jlora", "full fine-tuning")
COLUMNS = (
    "case", "compiled_for", "contender", "arguments_mib", "outputs_mib", "aliased_mib",
    "temporary_mib", "peak_mib", "to_full", "rss_mib", "device_mib", "xla_gflop",
    "accessed_mib", "kernels", "kernels_to_floor", "error",
)  # fmt: skip


def run(options: Any) -> Iterator[Rows]:
    """Run a few steps of each contender in a worker of its own; yield a case's rows."""
    options.repeats = min(options.repeats, 3)
    for one in cases(options, *(GPU if options.gpu else CPU)):
        about: dict[str, Any] = {}
        names = options.contenders or NAMES
        rows = [_row(one, name, options, about) for name in names]
        _compare(rows, "peak_mib", "full fine-tuning", "to_full")
        _compare(rows, "kernels", "floor", "kernels_to_floor")
        yield rows, about


def _compare(rows: list[Row], figure: str, other: str, column: str) -> None:
    """Fill in the ratios of a figure to another contender's."""
    of = {row["contender"]: row.get(figure) for row in rows}
    for row in rows:
        known = of.get(other) and row.get(figure)
        row[column] = row[figure] / of[other] if known else None


def _row(one: Case, name: str, options: Any, about: dict[str, Any]) -> Row:
    target = options.compile_for
    more = {} if name in TORCH else {"account": True, "target": target}
    (entry,) = chosen(CONTENDERS, [name], case=one.json, **more)
    group = "jax" if target else name
    result = race([entry._replace(group=group)], options)
    about |= result.about
    (row,) = result.rows({"case": one.title, "compiled_for": target}, [name])
    if target is None:  # else the worker was not the device
        for place in ("rss", "device"):
            peak = result.about.get(name, {}).get(f"{place}_bytes")
            row[f"{place}_mib"] = peak and peak / 2**20
    return row
