"""Sources: rows in shards, in an order that a seed says, gone over again and again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jlora._errors import DataError
from jlora.data._batches import Column
from jlora.data._dataset import load_from_hub
from jlora.data._shards import (
    Place,
    Row,
    Rows,
    RowShard,
    Shard,
    dataset_shards,
    file_shards,
)


@dataclasses.dataclass(frozen=True)
class Source:
    """Rows that are read a shard after the other.

    Make one by `stream_files`, `stream_dataset` or `in_memory`.

    Attributes:
      name: how messages call it.
      shards: its parts.
    """

    name: str
    shards: Sequence[Shard]


def stream_files(paths: str | Path | Sequence[str | Path]) -> Source:
    """Return the rows of files that need not fit in memory, a shard each.

    By their names they are JSON lines (`.jsonl`, `.ndjson`), tables (`.csv` by RFC
    4180, `.tsv` and `.tab` without quoting), `.parquet`, or else text, of which a line
    is the row `{"text": line}` and empty ones are left out. All but Parquet may be
    packed: `.gz`, `.bz2`, `.xz`, `.zst`.

    Args:
      paths: files, folders, or patterns such as `"corpus/*.jsonl.gz"`.

    Raises:
      DataError: nothing is there.
    """
    shards = file_shards(paths)
    name = str(paths) if isinstance(paths, (str, Path)) else shards[0].name
    return Source(name, shards)


def stream_dataset(
    name: Any, config: str | None = None, split: str = "train", **options: Any
) -> Source:
    """Return the rows of a dataset of the hub, read as they are needed.

    The library `datasets` says in which shard it is; to go on, it reads that shard
    again from its beginning.

    Args:
      name: its name on the hub, or a `datasets.IterableDataset`; of a mapped or
        filtered one, its functions run where rows are read.
      config: its configuration.
      split: which split.
      **options: others of `datasets.load_dataset`.

    Raises:
      DataError: no such dataset, or one that cannot be read.
    """
    if not isinstance(name, (str, Path)):
        return Source("the dataset", dataset_shards(name, "the dataset"))
    where = f"{name} {config or ''}".strip() + f" [{split}]"
    dataset = load_from_hub(str(name), config, split, where, streaming=True, **options)
    return Source(where, dataset_shards(dataset, where))


def in_memory(columns: Mapping[str, Column]) -> Source:
    """Return examples that are in memory, to be mixed with others by weight.

    Args:
      columns: by name, a list or an array of one value an example.
    """
    names, values = list(columns), zip(*columns.values(), strict=True)
    rows = [dict(zip(names, row, strict=True)) for row in values]
    return Source("in memory", [RowShard(row, i) for i, row in enumerate(rows)])


class Reader:
    """A source's rows without end: each epoch all of them, the shards in a new order.

    Args:
      source: the source.
      seed: of the order; None keeps that of the shards.
      state: where to go on, as `state` returned it; None begins.
      endless: whether to begin again after the last row.
    """

    def __init__(
        self,
        source: Source,
        seed: Sequence[int] | None,
        state: Mapping[str, Any] | None = None,
        *,
        endless: bool = True,
    ) -> None:
        self.source, self.seed, self.endless = source, seed, endless
        begin = {"epoch": 0, "shard": 0, "place": None, "rows": 0}
        start: Mapping[str, Any] = begin if state is None else state
        self.epoch, self.rows = start["epoch"], start["rows"]
        self._number, self._place = start["shard"], start["place"]
        self._order = self._shuffled()
        self._reading: Rows | None = None

    def state(self) -> dict[str, Any]:
        """Return where the next row is, as JSON.

        The rows are those of this epoch that were read, a number for people.
        """
        place: Place = self._place
        if self._reading is not None:
            place = self._reading.place()
        return {
            "epoch": self.epoch,
            "shard": self._number,
            "place": place,
            "rows": self.rows,
        }

    @property
    def shard(self) -> Shard | None:
        """The shard that is being read; None after the last."""
        at = self._number
        return self.source.shards[self._order[at]] if at < len(self._order) else None

    @property
    def rereads(self) -> Shard | None:
        """The shard whose beginning has to be read once more to go on from here."""
        shard = self.shard
        return None if not self._place or shard is None or shard.seeks else shard

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        while (shard := self.shard) is not None or self._begins_again():
            if shard is None:
                continue
            if self._reading is None:
                self._reading = shard.rows(self._place)
            try:
                row = next(self._reading)
            except StopIteration:
                self._number, self._place, self._reading = self._number + 1, None, None
                continue
            self.rows += 1
            return row
        raise StopIteration

    def _begins_again(self) -> bool:
        if not self.rows:
            raise DataError(f"{self.source.name} holds no rows, in no shard of it.")
        if self.endless:
            self.epoch, self.rows, self._number = self.epoch + 1, 0, 0
            self._order = self._shuffled()
        return self.endless

    def _shuffled(self) -> list[int]:
        count = len(self.source.shards)
        if self.seed is None:
            return list(range(count))
        rng = np.random.default_rng([*self.seed, self.epoch])
        return rng.permutation(count).tolist()


class Mixture:
    """The rows of several sources, drawn by weight.

    Args:
      sources: one or several.
      weights: of each, positive; in these shares rows are drawn.
      seed: draws them, and orders each source's shards.
      states: of the readers, to go on.
      endless: whether to go over them again and again; else each is read once, one
        after the other.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        seed: int | None,
        states: Sequence[Mapping[str, Any]] | None = None,
        *,
        endless: bool = True,
    ) -> None:
        self.endless, self.seed = endless, seed
        self.shares = np.array(weights, float) / sum(weights)
        nowhere: list[Any] = [None] * len(sources)
        given = states or nowhere
        self.readers = [
            Reader(
                source,
                None if seed is None else [seed, number],
                state,
                endless=endless,
            )
            for number, (source, state) in enumerate(zip(sources, given, strict=True))
        ]

    def states(self) -> list[dict[str, Any]]:
        """Return where each source is, as JSON."""
        return [reader.state() for reader in self.readers]

    def take(self, count: int, window: int) -> list[Row]:
        """Return the next rows, fewer at the end of what is not endless.

        Args:
          count: how many.
          window: the number of the window they are for, by which they are drawn: what
            came before need not be known.
        """
        if not self.endless:
            chain = (row for reader in self.readers for row in reader)
            return [row for _, row in zip(range(count), chain, strict=False)]
        if len(self.readers) == 1:
            return [next(self.readers[0]) for _ in range(count)]
        rng = np.random.default_rng([self.seed or 0, window, len(self.readers)])
        drawn = rng.choice(len(self.readers), count, p=self.shares)
        return [next(self.readers[i]) for i in drawn.tolist()]
