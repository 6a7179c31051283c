"""What devices send each other in a compiled program, read from its text."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jlora._errors import OptionError
from jlora._text import table

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """The operations of one kind over the same axes of the mesh.

    Attributes:
      kind: `"all-reduce"`, `"all-gather"`, ..., by XLA's names.
      axes: over which axes of the mesh; empty where no axes make its groups.
      count: how many operations the program holds.
      times: how often they run in one run of it, those of loops as often as these.
      bytes: what they carry in one run: of each operation the whole array on one
        device, its operand or its result, whichever is larger.
      largest: the bytes of the largest operation, run once.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    times: int
    bytes: int
    largest: int


@dataclasses.dataclass(frozen=True)
class Collectives(Sequence[Collective]):
    """The collectives of a program; printed, a table.

    Attributes:
      rows: those that carry most first.
    """

    rows: tuple[Collective, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which: Any) -> Any:
        """A row by its number, or several by a slice."""
        return self.rows[which]

    def of(self, kind: str | None = None, axis: str | None = None) -> Collectives:
        """Those of a kind, those over an axis of the mesh, or both."""
        return Collectives(
            tuple(
                row
                for row in self.rows
                if kind in (None, row.kind) and (axis is None or axis in row.axes)
            )
        )

    @property
    def bytes(self) -> int:
        """What all of them carry."""
        return sum(row.bytes for row in self.rows)

    @property
    def largest(self) -> int:
        """The bytes of the largest operation."""
        return max((row.largest for row in self.rows), default=0)

    def __str__(self) -> str:
        head = ("collective", "over", "in the program", "times a run", "bytes",
                "largest")  # fmt: skip
        cells = [
            (row.kind, "+".join(row.axes) or "-", f"{row.count:,}", f"{row.times:,}",
             f"{row.bytes:,}", f"{row.largest:,}")
            for row in self.rows
        ]  # fmt: skip
        return table([head, *cells]) if cells else "no collectives"


def collectives(compiled: Any, mesh: Mesh | None = None) -> Collectives:
    """What devices send each other when a compiled program runs once.

    Args:
      compiled: from `jax.jit(f).lower(...).compile()`, or
        `make_train_step(...).lower(state, batch).compile()`.
      mesh: whose axes the operations are named by; None is that of the program's
        arguments.

    Raises:
      OptionError: what has no compiled text, such as a function or what `lower` gave.

    >>> f = jax.jit(lambda x: x + 1).lower(jnp.ones(3)).compile()
    >>> len(collectives(f))
    0
    """
    if not hasattr(compiled, "as_text") or not hasattr(compiled, "memory_analysis"):
        raise OptionError(
            f"{type(compiled).__name__} is no compiled program.\nPass "
            "jax.jit(f).lower(...).compile()."
        )
    mesh = _mesh_of(compiled) if mesh is None else mesh
    found: dict[tuple[str, tuple[str, ...]], list[tuple[int, int]]] = defaultdict(list)
    for kind, line, times in _operations(compiled.as_text()):
        axes = _axes(line, mesh)
        found[kind, axes].append((times, _bytes(kind, line)))
    rows = [
        Collective(
            kind,
            axes,
            len(own),
            sum(times for times, _ in own),
            sum(times * size for times, size in own),
            max(size for _, size in own),
        )
        for (kind, axes), own in found.items()
    ]
    return Collectives(tuple(sorted(rows, key=lambda row: -row.bytes)))


def _mesh_of(compiled: Any) -> Mesh | None:
    for sharding in jax.tree.leaves(compiled.input_shardings):
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return sharding.mesh
    return None


# -- the text --------------------------------------------------------------------------

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_OPERATION = re.compile(
    rf"^\s*(?:ROOT )?%?[\w.\-]+ = .*? ({'|'.join(KINDS)})(-start)?\("
)
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)="
    r"%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def _operations(text: str) -> Iterator[tuple[str, str, int]]:
    """Kind, line, and how often it runs, of every collective."""
    own: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name = head[2]
            own[name] = []
            entry = name if head[1] else entry
        elif name:
            own[name].append(line)
    times = _times(own, entry)
    for name, lines in own.items():
        for line in lines:
            if found := _OPERATION.match(line):
                yield found[1], line, times.get(name, 1)


def _times(own: Mapping[str, Sequence[str]], entry: str) -> Mapping[str, int]:
    """How often each computation runs; a loop of unknown length counts once."""
    times: dict[str, int] = defaultdict(int)
    todo = [(entry, 1)]
    while todo:
        name, factor = todo.pop()
        times[name] += factor
        for line in own.get(name, ()):
            trips = int(found[1]) if (found := _TRIPS.search(line)) else 1
            called = _CALLED.findall(line)
            if branches := _BRANCHES.search(line):
                called += [x.strip(" %") for x in branches[1].split(",")]
            todo += [(x, factor * trips) for x in called if x in own]
    return times


_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "c64": 64, "c128": 128}


def _bytes(kind: str, line: str) -> int:
    """Of the whole array on one device, the operand or the result."""
    left, _, right = line.partition(f" {kind}")
    result = _sizes(left.partition(" = ")[2])
    if right.startswith("-start") and kind != "all-reduce":
        # (operands, results, perhaps counters)
        result = [x for x in result if x > 4] or result
        result = result[len(result) // 2 :]
    size = sum(result)
    return size * _group_size(line) if kind == "reduce-scatter" else size


def _sizes(shapes: str) -> list[int]:
    found = []
    for dtype, dims in _SHAPE.findall(shapes):
        bits = _BITS.get(dtype) or int(re.findall(r"\d+", dtype)[0])
        count = math.prod(int(n) for n in dims.split(",") if n)
        found.append(count * bits // 8)
    return found


# -- groups ----------------------------------------------------------------------------

_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


def _groups(line: str) -> np.ndarray | None:
    """The devices' numbers, `[groups, members]`; None is all of them."""
    if listed := _LISTED.search(line):
        rows = re.findall(r"\{([\d, ]*)\}", listed[1])
        return np.array([[int(n) for n in row.split(",")] for row in rows])
    if iota := _IOTA.search(line):
        shape, dims = (tuple(map(int, iota[n].split(","))) for n in (1, 2))
        order = np.arange(math.prod(dims)).reshape(dims)
        if iota[3]:
            order = order.transpose([int(n) for n in iota[3].split(",")])
        return order.reshape(shape)
    return None


def _group_size(line: str) -> int:
    groups = _groups(line)
    return 1 if groups is None else groups.shape[-1]


def _axes(line: str, mesh: Mesh | None) -> tuple[str, ...]:
    """The axes of the mesh along which the members of a group differ."""
    if mesh is None:
        return ()
    names = tuple(map(str, mesh.axis_names))
    groups = _groups(line)
    if groups is None:
        return names
    if groups.size and groups.max() >= mesh.size:
        return ()
    places = np.stack(np.unravel_index(groups, mesh.devices.shape), -1)
    differs = (places != places[:, :1]).any(axis=(0, 1))
    return tuple(name for name, d in zip(names, differs, strict=True) if d)
