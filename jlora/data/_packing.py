"""Packing: several short examples in one row of a fixed length, kept apart by numbers.

A batch of texts that differ in length pads the short ones; in packed rows hardly
anything is padding, and every batch has one shape. Examples are never cut.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jlora._errors import DataError
from jlora.data._batches import IGNORED, is_ragged

Columns = dict[str, list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Packed:
    """Examples in rows.

    Attributes:
      columns: those of the examples, a row after the other; and `segment_ids`, the
        number of each token's example in its row, from 1.
      members: which examples each row holds, in their order there.
      length: the most tokens of a row.
    """

    columns: Columns
    members: list[list[int]]
    length: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The one shape of `Batches`: every row as long as any may be."""
        return (self.length,) * len(self.columns)

    @property
    def fraction(self) -> float:
        """How much of the rows is tokens, not padding."""
        tokens = sum(map(len, self.columns["segment_ids"]))
        return tokens / (self.length * len(self.members))


def pack(columns: Mapping[str, Sequence[np.ndarray]], length: int) -> Packed:
    """Put examples into as few rows as best-fit decreasing finds.

    Attention must be kept within an example: `jlora.models`' decoders take the
    `segment_ids`, and count positions in each segment from 0. The label of an example's
    first token is `IGNORED`, for the token before it is another example's; so the loss
    is that of the examples apart.

    Args:
      columns: of the examples, all sequences of equal lengths: `input_ids`, `labels`.
      length: tokens a row.

    Raises:
      DataError: an example is longer, empty, or its columns differ in length.

    >>> rows = [np.arange(n) for n in (2, 4, 3)]
    >>> packed = pack({"input_ids": rows, "labels": rows}, length=6)
    >>> [x.tolist() for x in packed.columns["segment_ids"]]
    [[1, 1, 1, 1, 2, 2], [1, 1, 1]]
    >>> packed.columns["labels"][0].tolist(), packed.members, packed.fraction
    ([-100, 1, 2, 3, -100, 1], [[1, 0], [2]], 0.75)
    """
    lengths = _lengths(columns, length)
    members = _best_fit(lengths, length)
    out: Columns = {}
    for name, column in columns.items():
        own = [_without_first(x) for x in column] if name == "labels" else column
        out[name] = [np.concatenate([own[i] for i in row]) for row in members]
    out["segment_ids"] = [
        np.repeat(np.arange(1, len(row) + 1), lengths[row]).astype(np.int32)
        for row in members
    ]
    return Packed(out, members, length)


def _lengths(columns: Mapping[str, Sequence[np.ndarray]], length: int) -> np.ndarray:
    if not columns or not all(map(is_ragged, columns.values())):
        raise DataError(
            "pack takes columns of sequences, such as input_ids and labels."
        )
    first, *others = ([len(x) for x in column] for column in columns.values())
    for name, other in zip(list(columns)[1:], others, strict=True):
        if other != first:
            raise DataError(
                f"the columns {next(iter(columns))} and {name} differ in length, and "
                "what is packed has a value for each token in every column."
            )
    bad = next((i for i, n in enumerate(first) if not 0 < n <= length), None)
    if bad is not None:
        raise DataError(
            f"example {bad} has {first[bad]} tokens; in rows of {length} go examples "
            f"of 1 to {length}.\nTokenise with longest={length}, or take longer rows."
        )
    return np.array(first, int)


def _best_fit(lengths: np.ndarray, room: int) -> list[list[int]]:
    """Each example, the long ones first, into the fullest row that still holds it."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, row), in order
    for i in np.argsort(-lengths, kind="stable").tolist():
        need = int(lengths[i])
        place = bisect.bisect_left(free, (need, -1))
        if place == len(free):
            left, row = room, len(rows)
            rows.append([])
        else:
            left, row = free.pop(place)
        rows[row].append(i)
        if left > need:
            bisect.insort(free, (left - need, row))
    return rows


def _without_first(labels: np.ndarray) -> np.ndarray:
    labels = labels.copy()
    labels[0] = IGNORED
    return labels
