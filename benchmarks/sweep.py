"""Step times over one size at a time: rank, depth, adapters, batch, length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.cases import Case, sizes
from benchmarks.race import Race, Rows, chosen, race
from benchmarks.step_time import CONTENDERS

NAMES = ("floor", "jlora", "full fine-tuning")
AXES = ("rank", "depth", "adapters", "batch", "length")
COLUMNS = (
    "axis", "value", "trainable", "contender", "median_ms", "to_floor", "full_to_this",
    "error",
)  # fmt: skip
# Ever more kernels with an adapter.
ADAPTERS = ("query", "query value", "query key value out", "all-linear")
GPT2_ADAPTERS = ("c_attn", "c_attn c_proj", "all-linear")


def run(options: Any) -> Iterator[Rows]:
    """Yield the rows of each point."""
    names = options.contenders or NAMES
    # The axes cross: what is the same on several is measured once.
    races: dict[Case, Race] = {}
    for axis in options.axes:
        for value, one in points(axis, options):
            if one not in races:
                entries = chosen(CONTENDERS, names, case=one.json)
                races[one] = race(entries, options)
            result = races[one]
            head = {"axis": axis, "value": value, "case": one.title}
            yield result.rows(head, names), result.about


def points(axis: str, options: Any) -> Iterator[tuple[Any, Case]]:
    """Yield the values of an axis with their cases; where quick, the first."""
    shape = (options.shape or ["t5-base-32x512" if options.gpu else "t5-small-8x64"])[0]
    targets = " ".join((options.targets or [[]])[0]) or None
    given = {"shape": shape, "rank": (options.rank or [8])[0], "targets": targets}
    given |= sizes(options, shape)
    base = Case(**given)
    depth = base.config[base.family["depth"][0]]
    values: dict[str, Any] = {
        "rank": (1, 8, 64),
        "depth": (max(1, depth // 2), depth, 2 * depth),
        "adapters": GPT2_ADAPTERS if base.model_type == "gpt2" else ADAPTERS,
        "batch": (max(1, base.batch // 4), base.batch, 2 * base.batch),
        "length": (base.source // 2, base.source, 2 * base.source),
    }
    for value in values[axis][: 1 if options.quick else None]:
        changes = {axis: value}
        if axis == "adapters":
            changes = {"targets": value}
        if axis == "length":
            changes = {"source": value, "target": base.target * value // base.source}
        if axis == "depth" and value == depth:
            changes = {}  # the same case as on the other axes
        yield value, Case(**{**given, **changes})
