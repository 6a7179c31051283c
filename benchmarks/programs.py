"""What a program compiled for a GPU does: its kernels, and the bytes that they access.

XLA's own count takes a loop for one of its rounds. Here a kernel counts as often as it
runs, its operands as what it reads of them, and its results as what it writes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

# What moves nothing, or is looked into instead.
_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all",
    "iota", "while", "call", "conditional", "partition-id", "replica-id",
}  # fmt: skip
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_LINE = re.compile(
    r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(?:,|$)(.*)$"
)
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:body|to_apply|calls)=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Operation(NamedTuple):
    """A line of the program: what it is called, its result's type, its operands."""

    name: str
    type: str
    kind: str
    operands: tuple[str, ...]
    rest: str


class Work(NamedTuple):
    """How many kernels run, and the bytes that they read and write."""

    kernels: int
    bytes: int


def work_of(text: str) -> Work:
    """The work of a program, from the text of what XLA compiled for a GPU.

    A loop of a length that nobody knows counts once.
    """
    parts: dict[str, list[Operation]] = {}
    entry, own = "", list[Operation]()
    for line in text.splitlines():
        if head := _HEAD.match(line):
            own = parts.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif found := _LINE.match(line):
            name, shape, kind, operands, rest = found.groups()
            names = re.findall(r"%([\w.\-]+)", operands)
            kept = operands if kind == "parameter" else rest
            own.append(Operation(name, shape, kind, tuple(names), kept))
    return _work(parts, entry)


def _work(parts: Mapping[str, list[Operation]], name: str) -> Work:
    kernels = moved = 0
    types = {x.name: x.type for x in parts[name]}
    for x in parts[name]:
        called = _CALLED.search(x.rest)
        if x.kind in ("while", "call") and called:
            trips = _TRIPS.search(x.rest)
            times = int(trips[1]) if trips else 1
            inner = _work(parts, called[1])
            kernels, moved = kernels + times * inner[0], moved + times * inner[1]
        elif x.kind not in _FREE:
            kernels += 1
            moved += _accessed(x, types, parts[called[1]] if called else [])
    return Work(kernels, moved)


def _accessed(x: Operation, types: Mapping[str, str], inside: list[Operation]) -> int:
    """The bytes of one kernel."""
    if x.kind == "fusion":
        return _read(inside) + _written(x, inside)
    sizes = _sizes(x.type)
    if x.kind == "custom-call" and len(sizes) > 1:
        sizes = sizes[:1]  # the second is room to work in
    if x.kind in ("dynamic-slice", "gather", "slice"):
        return 2 * sum(sizes)
    return sum(sizes) + sum(sum(_sizes(types.get(name, ""))) for name in x.operands)


def _read(inside: list[Operation]) -> int:
    """What a fusion reads: of what is sliced, the slices."""
    total = 0
    for x in inside:
        if x.kind != "parameter":
            continue
        uses = [(y, y.operands.index(x.name)) for y in inside if x.name in y.operands]
        parts = [
            0 if y.kind == "dynamic-update-slice" else sum(_sizes(y.type))
            for y, place in uses
            if place == 0
            and y.kind in ("dynamic-slice", "gather", "slice", "dynamic-update-slice")
        ]
        whole = sum(_sizes(x.type))
        total += min(whole, sum(parts)) if len(parts) == len(uses) else whole
    return total


def _written(x: Operation, inside: list[Operation]) -> int:
    """What a fusion writes: of what is updated in place, the update."""
    root = inside[-1]
    if root.kind != "dynamic-update-slice":
        return sum(_sizes(x.type))
    return sum(sum(_sizes(y.type)) for y in inside if y.name == root.operands[1])


def _sizes(types: str) -> list[int]:
    found = []
    for dtype, axes in _SHAPE.findall(types):
        digits = re.findall(r"\d+", dtype)
        bits = int(digits[0]) if digits else 8  # pred
        found.append(math.prod(int(n) for n in axes.split(",") if n) * bits // 8)
    return found
