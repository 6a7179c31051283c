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

SOURCE, TARGET = "segment_ids", "decoder_segment_ids"
OPEN = 512  # rows of pairs that are looked through for room


@dataclasses.dataclass(frozen=True)
class Packed:
    """Examples in rows.

    Attributes:
      columns: those of the examples, a row after the other; and `segment_ids`, the
        number of each token's example in its row, from 1. Of pairs these are the
        source's, and `decoder_segment_ids` the target's.
      members: which examples each row holds, in their order there.
      length: the most tokens of a row; of pairs two, source and target.
    """

    columns: Columns
    members: list[list[int]]
    length: int | tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """The one shape of `Batches`: every row as long as any may be."""
        rooms = _rooms(self.length)
        sides = _sides(self.columns, len(rooms))
        room_of = {n: rooms[k] for k, side in sides.items() for n in side}
        return tuple(room_of[name] for name in self.columns)

    @property
    def fraction(self) -> float:
        """How much of the rows is tokens, not padding."""
        numbers = [self.columns[k] for k in (SOURCE, TARGET) if k in self.columns]
        tokens = sum(len(row) for column in numbers for row in column)
        return tokens / (sum(_rooms(self.length)) * len(self.members))


def pack(
    columns: Mapping[str, Sequence[np.ndarray]],
    length: int | tuple[int, int],
    *,
    causal: bool = True,
) -> Packed:
    """Put examples into as few rows as best fit finds, the long ones first.

    Attention must be kept within an example: the models of `jlora.models` take the
    `segment_ids`, and count positions in each segment from 0.

    Args:
      columns: of the examples, all sequences: `input_ids`, `labels`. Of a text they
        are equally long. Of a pair `labels` are the target, and all others go with the
        source.
      length: tokens a row; of pairs those of the source and of the target.
      causal: whether a text's labels are predicted from the tokens before them. Then
        the label of its first token becomes `IGNORED`, for the token before it is
        another example's, and the loss is that of the examples apart. `False` is for
        labels that are predicted in their own places, as masked tokens are. Pairs
        need neither: a target begins with a start token.

    Raises:
      DataError: an example is longer, empty, or its columns differ in length.

    >>> rows = [np.arange(n) for n in (2, 4, 3)]
    >>> packed = pack({"input_ids": rows, "labels": rows}, length=6)
    >>> [x.tolist() for x in packed.columns["segment_ids"]]
    [[1, 1, 1, 1, 2, 2], [1, 1, 1]]
    >>> packed.columns["labels"][0].tolist(), packed.members, packed.fraction
    ([-100, 1, 2, 3, -100, 1], [[1, 0], [2]], 0.75)
    """
    rooms = _rooms(length)
    sides = _sides(columns, len(rooms))
    lengths = {
        number: _lengths({name: columns[name] for name in names}, room)
        for (number, names), room in zip(sides.items(), rooms, strict=True)
    }
    if len(rooms) == 1:
        members = _best_fit(lengths[0], rooms[0])
    else:
        members = _best_fit_of_pairs(np.stack([*lengths.values()], 1), np.array(rooms))
    first_is_anothers = causal and len(rooms) == 1
    out: Columns = {}
    for name, column in columns.items():
        drops = first_is_anothers and name == "labels"
        own = [_without_first(x) for x in column] if drops else column
        out[name] = [np.concatenate([own[i] for i in row]) for row in members]
    for number, name in zip(lengths, (SOURCE, TARGET), strict=False):
        out[name] = [
            np.repeat(np.arange(1, len(row) + 1), lengths[number][row]).astype(np.int32)
            for row in members
        ]
    return Packed(out, members, length)


def _rooms(length: int | tuple[int, int]) -> tuple[int, ...]:
    return length if isinstance(length, tuple) else (length,)


def _sides(columns: Mapping[str, object], count: int) -> dict[int, list[str]]:
    """Return which columns go with the source, 0, and which with the target, 1."""
    if count == 1:
        return {0: list(columns)}
    target = [name for name in columns if name in ("labels", TARGET)]
    return {0: [name for name in columns if name not in target], 1: target}


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
                "what is packed has a value for each token in every column.\nOf pairs "
                "say both lengths: pack(columns, (source, target))."
            )
    bad = next((i for i, n in enumerate(first) if not 0 < n <= length), None)
    if bad is not None:
        raise DataError(
            f"example {bad} has {first[bad]} tokens in {next(iter(columns))}; in rows "
            f"of {length} go examples of 1 to {length}.\nTokenise with "
            f"longest={length}, or take longer rows."
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


def _best_fit_of_pairs(lengths: np.ndarray, room: np.ndarray) -> list[list[int]]:
    """Each pair into the fullest open row that holds both its sides.

    Args:
      lengths: `[N, 2]`.
      room: `[2]`, of a row.
    """
    rows: list[list[int]] = []
    open_rows = np.zeros(OPEN, int)  # which row each place holds
    free = np.full((OPEN, 2), -1)  # the room left in it; -1 holds no row
    shares = lengths / room
    for i in np.argsort(-shares.max(1), kind="stable").tolist():
        left = free - lengths[i]
        fits = (left >= 0).all(1)
        # Of no room at all the fullest row is given up.
        score = np.where(fits, (left / room).sum(1), np.inf)
        place = int(score.argmin()) if fits.any() else int(free.sum(1).argmin())
        if not fits.any():
            open_rows[place], free[place] = len(rows), room
            rows.append([])
        rows[open_rows[place]].append(i)
        free[place] -= lengths[i]
    return rows


def _without_first(labels: np.ndarray) -> np.ndarray:
    labels = labels.copy()
    labels[0] = IGNORED
    return labels
