"""Step times over one size at a time: rank, depth, adapters, batch, length."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import _results
from benchmarks._cases import DEPTH_KEYS, Case, case
from benchmarks._choice import described, model_fields
from benchmarks._needed import adapted, products
from benchmarks._race import Race, race
from benchmarks.step_time import training

CONTENDERS = ("floor", "jlora", "full fine-tuning")
RANKS = (1, 8, 64)
COLUMNS = (
    "axis", "value", "kernels", "contender", "median_ms", "to_floor", "full_to_this",
    "error",
)  # fmt: skip
# Ever more kernels with an adapter, by family.
ROLES = (
    ["query"],
    ["query", "value"],
    ["query", "key", "value", "out"],
    ["all-linear"],
)
ADAPTERS: dict[str, Sequence[Sequence[str]]] = {
    "t5": ROLES,
    "gpt2": (["c_attn"], ["c_attn", "c_proj"], ["all-linear"]),
    "llama": ROLES,
}


def main(options: Any) -> list[_results.Row]:
    """Measure, print a table, save."""
    rows, about = [], {}
    shape = (options.shape or ["t5-base-32x512" if options.gpu else "t5-small-8x64"])[0]
    names = options.contenders or CONTENDERS
    # The axes cross: what is the same on several is measured once.
    races: dict[str, Race] = {}
    for axis in options.axes:
        for value, one in points(axis, shape, options):
            key = json.dumps(dataclasses.asdict(one), sort_keys=True)
            if key not in races:
                races[key] = race([training(one, name) for name in names], options)
            about |= races[key].about
            found = [_row(axis, value, one, name, races[key]) for name in names]
            print(_results.table(found, COLUMNS), flush=True)
            rows += found
    print(_results.table(rows, COLUMNS))
    _results.save(options, about, rows)
    return rows


def _row(axis: str, value: Any, one: Case, name: str, result: Race) -> _results.Row:
    return {
        **described(one),
        "axis": axis,
        "value": value,
        "contender": name,
        "median_ms": result.median(name),
        "to_floor": result.ratio(name, "floor"),
        "full_to_this": result.ratio("full fine-tuning", name),
        "kernels": _adapted(one),
        "trainable": result.facts.get(name, {}).get("trainable"),
        "error": result.errors.get(name),
    }


def _adapted(one: Case) -> int:
    """Return how many kernels carry an adapter."""
    return sum(adapted(p.role, one) for p in products(one))


def points(axis: str, shape: str, options: Any) -> Iterator[tuple[Any, Case]]:
    """Yield the values of an axis with their cases; where quick, the first."""
    given = {
        "quick": options.quick,
        "batch": options.batch,
        "source": options.length,
        "target": options.target_length,
        "dtype": options.dtype,
        "rank": (options.rank or [8])[0],
        "targets": (options.targets or [None])[0],
        "model_fields": model_fields(options, shape),
    }
    base = case(shape, **given)
    depth = base.config[DEPTH_KEYS[base.family][0]]
    scales: dict[str, Sequence[Any]] = {
        "rank": RANKS,
        "depth": [max(1, depth // 2), depth, 2 * depth],
        "adapters": ADAPTERS[base.family],
        "batch": [max(1, base.batch // 4), base.batch, 2 * base.batch],
        "length": [base.source // 2, base.source, 2 * base.source],
    }
    for value in scales[axis][: 1 if options.quick else None]:
        changes: dict[str, Any] = {axis: value}
        if axis == "adapters":
            changes = {"targets": value}
        if axis == "length":
            longer = base.target * value // base.source
            changes = {"source": value, "target": longer or None}
        one = case(shape, **{**given, **changes})
        yield " ".join(value) if axis == "adapters" else value, one
