"""What a program costs a device: operations, traffic between devices, memory."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

#: Bytes that a device sends in a collective over n devices, of each byte of its result:
#: the ring algorithms, which no other beats in bytes.
_SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: float(n - 1),
}


@dataclasses.dataclass
class Costs:
    """Sums over a program, of one device.

    Attributes:
      flops: multiplications and additions of products, by the operands' dtype.
      moved: bytes that its kernels read from memory and write to it.
      sent: bytes sent, by mesh axes and kind of collective.
      collectives: how many, likewise.
      held: bytes of the results of collectives, likewise.
      unknown: operations whose sharding nothing here knows.
    """

    flops: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )
    moved: float = 0.0
    sent: collections.Counter[tuple[tuple[str, ...], str]] = dataclasses.field(
        default_factory=collections.Counter
    )
    collectives: collections.Counter[tuple[tuple[str, ...], str]] = dataclasses.field(
        default_factory=collections.Counter
    )
    held: collections.Counter[tuple[tuple[str, ...], str]] = dataclasses.field(
        default_factory=collections.Counter
    )
    unknown: set[str] = dataclasses.field(default_factory=set)

    def add(self, other: Costs, times: float = 1) -> None:
        """Add what another program costs, so many times."""
        for name in ("flops", "sent", "collectives", "held"):
            mine, theirs = getattr(self, name), getattr(other, name)
            for key, number in theirs.items():
                mine[key] += number * times
        self.moved += other.moved * times
        self.unknown |= other.unknown

    def communicate(
        self, kind: str, axes: Sequence[str], devices: int, result: int
    ) -> None:
        """Count a collective over some mesh axes whose result has so many bytes."""
        if devices > 1:
            key = (tuple(sorted(axes)), kind)
            self.sent[key] += _SENT[kind](devices) * result
            self.collectives[key] += 1
            self.held[key] += result
