"""Shards: files read a row at a time, from any place in them that was said before.

`read_table` reads a file whole. Here nothing is kept but a row: of lines, JSON lines,
CSV and TSV the place is a number of bytes, of Parquet a group of rows and a row in it.
What is packed (.gz, .bz2, .xz, .zst) cannot be sought: up to the place it is unpacked
again, though not parsed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from jlora._errors import DataError
from jlora._text import first_line
from jlora.data._line_rows import Commas, Objects, Tabs, Texts
from jlora.data._line_rows import Place as Place
from jlora.data._line_rows import Row as Row
from jlora.data._text import unpacked_name

PART = 1024  # rows of Parquet that are read at once


class Rows(Protocol):
    """The rows of a shard, from a place on."""

    def __next__(self) -> Row:
        """Return the next row; StopIteration after the last."""

    def place(self) -> Place:
        """Return where the next row begins, as JSON."""


class Shard(Protocol):
    """A part of a source that is read from its beginning to its end."""

    @property
    def name(self) -> str:
        """How messages call it."""

    @property
    def print(self) -> Any:
        """What tells it from another of that name, as JSON: its size."""

    @property
    def seeks(self) -> bool:
        """Whether a place in it is reached without reading what is before it."""

    def rows(self, place: Place = None) -> Rows:
        """Return the rows from a place on; None is the beginning."""


@dataclasses.dataclass(frozen=True)
class FileShard:
    """A file.

    Attributes:
      path: its name says what it holds.
    """

    path: Path

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    @property
    def print(self) -> Any:
        """The size in bytes; None of a file that is gone."""
        try:
            return self.path.stat().st_size
        except OSError:
            return None

    @property
    def seeks(self) -> bool:
        """Whether it is plain, not packed."""
        return unpacked_name(self.path) == self.path.name

    def rows(self, place: Place = None) -> Rows:
        """Return the rows from a place on.

        Raises:
          DataError: no such file, or not what its name says.
        """
        suffix = Path(unpacked_name(self.path)).suffix.lower()
        if suffix == ".json":
            raise DataError(
                f"{self.path}: .json is read as a whole, not a row at a time.\nWrite "
                "an object a line (.jsonl), or read it by jlora.data.read_table."
            )
        return _READERS.get(suffix, Texts)(self.path, place)


def file_shards(paths: Any) -> list[FileShard]:
    """Return the shards of files, folders and patterns, in the order of their names.

    Args:
      paths: one or several. Of a folder all files are taken but hidden ones; in a
        pattern `*` and `**` stand for any names.

    Raises:
      DataError: nothing is there.
    """
    found: list[Path] = []
    for given in [paths] if isinstance(paths, (str, Path)) else paths:
        path = Path(given).expanduser()
        if path.is_dir():
            own = [p for p in path.iterdir() if p.is_file()]
        elif any(c in str(given) for c in "*?[") and not path.exists():
            root = Path(path.anchor)
            own = [p for p in root.glob(str(path.relative_to(root))) if p.is_file()]
        else:
            own = [path] if path.is_file() else []
        own = [p for p in own if not p.name.startswith(".")]
        if not own:
            raise DataError(f"{path}: no such file, and no folder or pattern of some.")
        found += sorted(own)
    return [FileShard(path) for path in found]


# ----------------------------------------------------------------------------- parquet


class _Parquet:
    """Rows of Parquet, by groups."""

    def __init__(self, path: Path, place: Place) -> None:
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise DataError("Parquet needs pyarrow: pip install pyarrow") from error
        self.path = path
        self.group: int = 0 if place is None else place[0]
        self._errors = (pyarrow.ArrowException, OSError, ValueError)
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
        except self._errors as error:
            raise self._broken(error) from error
        self.row = 0
        self._rows = self._of_group()
        for _ in range(0 if place is None else place[1]):
            next(self)

    def place(self) -> Place:
        """Return the group of the next row, and the row in it."""
        return [self.group, self.row]

    def __next__(self) -> Row:
        while self.group < self._file.num_row_groups:
            try:
                row = next(self._rows, None)
            except self._errors as error:
                raise self._broken(error) from error
            if row is not None:
                self.row += 1
                return row
            self.group, self.row = self.group + 1, 0
            self._rows = self._of_group()
        raise StopIteration

    def _of_group(self) -> Iterator[Row]:
        if self.group < self._file.num_row_groups:
            parts = self._file.iter_batches(PART, row_groups=[self.group])
            for part in parts:
                yield from part.to_pylist()

    def _broken(self, error: Exception) -> DataError:
        first = first_line(error)
        return DataError(f"{self.path} cannot be read: {first}")


_READERS: dict[str, Callable[[Path, Place], Rows]] = {
    ".jsonl": Objects,
    ".ndjson": Objects,
    ".csv": Commas,
    ".tsv": Tabs,
    ".tab": Tabs,
    ".parquet": _Parquet,
}


# -------------------------------------------------------------------------- in memory


@dataclasses.dataclass(frozen=True)
class RowShard:
    """A row in memory: shards are shuffled as a whole, and so are such rows."""

    row: Row
    number: int
    print: Any = None
    seeks: bool = True

    @property
    def name(self) -> str:
        """Its number."""
        return f"example {self.number}"

    def rows(self, place: Place = None) -> Rows:
        """Return it, or nothing after it."""
        return _One(self.row, 0 if place is None else place)


class _One:
    def __init__(self, row: Row, place: int) -> None:
        self.row, self.done = row, place

    def place(self) -> Place:
        return self.done

    def __next__(self) -> Row:
        if self.done:
            raise StopIteration
        self.done = 1
        return self.row


# ----------------------------------------------------- datasets of the Hugging Face hub


@dataclasses.dataclass(frozen=True)
class DatasetShard:
    """A shard of a `datasets.IterableDataset`.

    The library knows in which shard it is and how many rows of it were read. Those it
    reads again, for its readers seek no further.
    """

    dataset: Any
    index: int
    name: str
    print: Any = None
    seeks: bool = False

    def rows(self, place: Place = None) -> Rows:
        """Return the rows from a place on."""
        own = self.dataset.shard(num_shards=self.dataset.num_shards, index=self.index)
        if place is not None:
            own.load_state_dict(place)
        return _Streamed(own, self.name)


class _Streamed:
    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.name = dataset, name
        self.rows = iter(dataset)

    def place(self) -> Place:
        return self.dataset.state_dict()

    def __next__(self) -> Row:
        try:
            return next(self.rows)
        except StopIteration:
            raise
        except Exception as error:  # readers of many formats raise errors of their own
            cause = first_line(error.__cause__ or error)
            raise DataError(f"{self.name} cannot be read: {cause}") from error


def dataset_shards(dataset: Any, name: str) -> Sequence[DatasetShard]:
    """Return the shards of a `datasets.IterableDataset`."""
    count = dataset.num_shards
    return [
        DatasetShard(dataset, i, f"{name}, shard {i} of {count}") for i in range(count)
    ]
