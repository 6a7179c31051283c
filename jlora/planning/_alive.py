"""Which values of a device are in memory at once, and the most that they come to.

As XLA does it: operations by element are fused into what reads them and hold nothing of
their own, unless something that is no such operation needs their result; what is dear
to compute is kept where two read it. Changes of layout that move nothing are free, and
an operation by element may write over an operand that nothing reads again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from jlora.planning._spread import Did
from jlora.planning._values import Value

_FREE = frozenset({
    "reshape", "squeeze", "expand_dims", "optimization_barrier", "held", "copy",
    "copy_p", "stop_gradient", "sharding_constraint", "name", "device_put", "pvary",
    "pcast", "reshard", "mesh_cast", "random_wrap", "random_unwrap",
})  # fmt: skip
_DEAR = frozenset({
    "exp", "exp2", "expm1", "log", "log1p", "tanh", "logistic", "rsqrt", "sqrt", "cbrt",
    "erf", "erfc", "erf_inv", "sin", "cos", "tan", "pow", "div", "rem", "atan2",
    "gather",
})  # fmt: skip
#: What has a buffer of its own, and needs its operands in theirs.
_SOLID = frozenset({
    "dot_general", "factor_product", "conv_general_dilated", "ragged_dot",
    "ragged_dot_general", "scan", "while", "cond", "sort", "cumsum", "cummax",
    "cumprod", "cumlogsumexp", "top_k", "all-gather", "scatter", "scatter-add",
    "scatter-max", "scatter_add", "threefry2x32", "random_bits", "split",
    "rng_bit_generator",
})  # fmt: skip
#: What has a buffer of its own, made of what its operands are made of.
_SINKS = frozenset({"concatenate", "dynamic_update_slice", "argmax", "argmin"})


@dataclasses.dataclass(frozen=True)
class Alive:
    """The account of a program's memory.

    Attributes:
      peak: the most bytes at once, beside its operands.
      moved: bytes read from memory and written to it.
      at_peak: what is there then: the operation that made it, and its bytes.
    """

    peak: int
    moved: float
    at_peak: tuple[tuple[str, Value], ...]


def alive(
    did: Sequence[Did],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    *,
    in_place: Sequence[Value] = (),
) -> Alive:
    """Go through what a device does.

    Args:
      did: the operations in order.
      inputs: what is in memory before, and stays; slices of a stack are made when they
        are needed.
      outputs: what has to be there at the end.
      in_place: outputs that are written over inputs, or into a stack.
    """
    return _Buffers(did, inputs, outputs, in_place).account()


class _Buffers:
    """The buffers of a program, and when each is needed."""

    def __init__(
        self,
        did: Sequence[Did],
        inputs: Sequence[Value],
        outputs: Sequence[Value],
        in_place: Sequence[Value],
    ) -> None:
        self._did = did
        self._first: dict[Value, Value] = {}  # what a free change of layout is one of
        self._made_by = {v: n for n, d in enumerate(did) for v in d.writes}
        for d in did:
            if d.name in _FREE:
                for x, y in zip(d.reads, d.writes, strict=False):
                    self._first[y] = self._one(x)
        self._slices = {v for v in inputs if v.what == "slice"}
        self._inputs = {*inputs} - self._slices
        self._outputs = [self._one(v) for v in outputs]
        self._in_place = {self._one(v) for v in in_place}
        self._readers: dict[Value, list[int]] = {}
        for n, d in enumerate(did):
            if d.name not in _FREE:
                for v in d.reads:
                    self._readers.setdefault(self._one(v), []).append(n)
        self._holds: dict[Value, bool] = {}
        self._behind: dict[Value, frozenset[Value]] = {}

    def _one(self, v: Value) -> Value:
        return self._first.get(v, v)

    def _has_buffer(self, v: Value) -> bool:
        """Whether a value, no change of layout, lies in memory."""
        if v not in self._holds:
            self._holds[v] = self._decide(v)
        return self._holds[v]

    def _decide(self, v: Value) -> bool:
        if v in self._inputs:
            return True
        readers = self._readers.get(v, [])
        names = [self._did[n].name for n in readers]
        needed = any(name in _SOLID for name in names) or v in self._outputs
        if v in self._slices or v not in self._made_by:
            return needed and bool(v.shape)
        name = self._did[self._made_by[v]].name
        if name in _SOLID or name in _SINKS or name.startswith("reduce_"):
            return True
        return needed or (name in _DEAR and len(readers) > 1)

    def _roots(self, v: Value) -> frozenset[Value]:
        """What lies in memory of which a value is made."""
        v = self._one(v)
        if v not in self._behind:
            if self._has_buffer(v):
                found = frozenset({v})
            elif v in self._made_by:
                reads = self._did[self._made_by[v]].reads
                found = frozenset().union(*map(self._roots, reads))
            else:
                found = frozenset()
            self._behind[v] = found
        return self._behind[v]

    def account(self) -> Alive:
        """Find the peak."""
        did = self._did
        for d in did:  # in order, or the recursion would be as deep as the program
            for v in d.writes:
                self._roots(v)
        begin: dict[Value, int] = {}
        end: dict[Value, int] = {}
        moved = 0.0
        runs = [any(self._one(v) is v and self._has_buffer(v) for v in d.writes)
                for d in did]  # fmt: skip
        for n, d in enumerate(did):
            if not runs[n]:
                continue
            roots = frozenset().union(*map(self._roots, d.reads))
            for v in roots:
                end[v] = n
                begin.setdefault(v, n)  # a slice
            writes = [v for v in d.writes if self._one(v) is v]
            begin.update((v, n) for v in writes)
            moved += d.moved or _traffic(d, roots, writes)
        for v in self._outputs:
            if v in begin:
                in_place = v in self._in_place and self._is_fused(v)
                end[v] = end.get(v, begin[v]) if in_place else len(did)
        return self._peak(begin, end, runs, moved)

    def _peak(
        self,
        begin: Mapping[Value, int],
        end: Mapping[Value, int],
        runs: Sequence[bool],
        moved: float,
    ) -> Alive:
        starts: dict[int, list[Value]] = {}
        stops: dict[int, list[Value]] = {}
        fused = {v for v in self._in_place if self._is_fused(v)}
        for v, n in begin.items():
            if v not in self._inputs and v not in fused:
                starts.setdefault(n, []).append(v)
                stops.setdefault(end.get(v, n), []).append(v)
        now, most, when = 0, 0, -1
        for n, d in enumerate(self._did):
            if not runs[n]:
                continue
            new = sum(v.bytes for v in starts.get(n, ()))
            over = self._written_over(d, starts.get(n, ()), stops.get(n, ()))
            total = now + new - over + d.inner
            if total > most:
                most, when = total, n
            now += new - sum(v.bytes for v in stops.get(n, ()))
        there = [v for v, n in begin.items()
                 if v not in self._inputs and v not in fused
                 and n <= when <= end.get(v, n)]  # fmt: skip
        return Alive(most, moved, tuple((v.what, v) for v in there))

    def _is_fused(self, v: Value) -> bool:
        """Whether an output's last operation may write it to where it shall lie."""
        if v not in self._made_by:
            return False
        readers = self._readers.get(v, ())
        if any(self._did[n].name in _SOLID for n in readers):
            return False
        return self._did[self._made_by[v]].name not in _SOLID - {"scan", "while"}

    def _written_over(
        self, d: Did, new: Sequence[Value], dying: Sequence[Value]
    ) -> int:
        """Bytes of operands that results are written over."""
        if d.name not in (
            "scan",
            "while",
            "scatter-add",
            "scatter",
            "dynamic_update_slice",
        ):
            return 0
        sizes = sorted(v.bytes for v in dying if v not in new)
        over = 0
        for v in sorted(new, key=lambda v: v.bytes):
            if v.bytes in sizes:
                sizes.remove(v.bytes)
                over += v.bytes
        return over


def _traffic(d: Did, roots: frozenset[Value], writes: Sequence[Value]) -> float:
    """Bytes that one kernel reads and writes."""
    written = sum(v.bytes for v in writes)
    if d.name in ("gather", "dynamic_update_slice", "scatter-add", "scatter"):
        return 2.0 * (d.reads[1].bytes if d.name.startswith("dyn") else written)
    return float(written + sum(v.bytes for v in roots))
