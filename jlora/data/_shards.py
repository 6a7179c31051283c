"""Shards: files read a row at a time, from any place in them that was said before.

`read_table` reads a file whole. Here nothing is kept but a row: of lines, JSON lines,
CSV and TSV the place is a number of bytes, of Parquet a group of rows and a row in it.
What is packed (.gz, .bz2, .xz, .zst) cannot be sought: up to the place it is unpacked
again, though not parsed.
"""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from jlora._errors import DataError
from jlora.data._csv import comma_records
from jlora.data._table import json_row, unique_names
from jlora.data._text import check_packed, open_zstd, unpacked_name

Row = dict[str, Any]
Place = Any  # JSON

START = [0, 0]  # bytes and lines before it
LONGEST = 1 << 26  # bytes of a row; a quotation mark that is not closed ends there
PART = 1024  # rows of Parquet that are read at once
SKIP = 1 << 20  # bytes that are unpacked at once on the way to a place


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
        return _READERS.get(suffix, _Texts)(self.path, place)


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


# ------------------------------------------------------------------------------- lines


class _Lines:
    """Lines of UTF-8, with the bytes and lines before the next one."""

    def __init__(self, path: Path) -> None:
        self.path, (self.bytes, self.lines) = path, START
        self._file = _opened(path)

    def seek(self, place: Place) -> None:
        """Go on at a place."""
        try:
            if unpacked_name(self.path) == self.path.name:
                self._file.seek(place[0])
            else:
                left = place[0] - self.bytes
                while left > 0:
                    part = self._file.read(min(left, SKIP))
                    if not part:
                        break
                    left -= len(part)
        except _BROKEN as error:
            raise self._broken(error) from error
        self.bytes, self.lines = place

    def place(self) -> Place:
        """Return where the next line begins."""
        return [self.bytes, self.lines]

    def next(self) -> str | None:
        """Return the next line without its end; None after the last.

        Raises:
          DataError: the file breaks off, or the line is no text.
        """
        try:
            raw = self._file.readline(LONGEST)
        except _BROKEN as error:
            raise self._broken(error) from error
        if not raw:
            self._file.close()
            return None
        first = self.bytes == 0
        self.bytes, self.lines = self.bytes + len(raw), self.lines + 1
        try:
            text = raw.decode("utf-8-sig" if first else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.where}: not UTF-8 (byte {raw[error.start]:#04x} at column "
                f"{error.start + 1}).\nConvert the file, for instance with: iconv -f "
                "ENCODING -t UTF-8 FILE > NEW"
            ) from error
        if "\0" in text or len(raw) == LONGEST:
            what = "NUL characters" if "\0" in text else f"over {LONGEST:,} bytes"
            raise DataError(f"{self.where} is no text: it holds {what}.")
        return text.removesuffix("\n").removesuffix("\r")

    @property
    def where(self) -> str:
        """The line that was read last, for messages."""
        return f"{self.path}, line {self.lines}"

    def _broken(self, error: Exception) -> DataError:
        return DataError(
            f"{self.path} breaks off after line {self.lines}: {error}.\nThe file is "
            "cut short or damaged; fetch it again."
        )


_BROKEN = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)


def _opened(path: Path) -> Any:
    """Open a file's bytes, unpacked as its name says.

    Raises:
      DataError: there is none, or it is not packed so.
    """
    check_packed(path)
    try:
        return _OPENERS.get(path.suffix.lower(), _plain)(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error


def _plain(path: Path) -> Any:
    return path.open("rb")


def _zst(path: Path) -> Any:
    return io.BufferedReader(open_zstd(path.open("rb")))


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zst,
}


class _Texts:
    """A text a line; empty lines are left out."""

    def __init__(self, path: Path, place: Place) -> None:
        self.lines = _Lines(path)
        if place is not None:
            self.lines.seek(place)

    def place(self) -> Place:
        """Return where the next line begins."""
        return self.lines.place()

    def line(self) -> str:
        """Return the next line that is not empty."""
        while (line := self.lines.next()) is not None:
            if line.strip():
                return line
        raise StopIteration

    def __next__(self) -> Row:
        return {"text": self.line().strip()}


class _Objects(_Texts):
    """A JSON object a line."""

    def __next__(self) -> Row:
        return json_row(self.line(), self.lines.where)


class _Tabs(_Texts):
    """Fields between tabs; the first line names them."""

    def __init__(self, path: Path, place: Place) -> None:
        super().__init__(path, None)
        first = self._record()
        self.names = unique_names(first or [], str(path))
        if place is not None and place != START:
            self.lines.seek(place)

    def _record(self) -> list[str] | None:
        line = self.lines.next()
        return None if line is None else line.split("\t")

    def __next__(self) -> Row:
        fields = self._record()
        if fields is None:
            raise StopIteration
        if len(fields) != len(self.names):
            raise DataError(
                f"{self.lines.where}: {len(fields)} fields, but {len(self.names)} "
                f"columns ({', '.join(self.names)[:80]})."
            )
        return dict(zip(self.names, fields, strict=True))


class _Commas(_Tabs):
    """RFC 4180; a record has several lines where a field in quotation marks has."""

    def _record(self) -> list[str] | None:
        first = self.lines.lines + 1
        text = self.lines.next()
        if text is None:
            return None
        while text.count('"') % 2 and len(text) < LONGEST:
            more = self.lines.next()
            if more is None:
                break
            text = f"{text}\n{more}"
        path = str(self.lines.path)
        records = list(comma_records(text, path, first)) or [(first, [""])]
        return records[0][1]


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
        first = str(error).partition("\n")[0]
        return DataError(f"{self.path} cannot be read: {first}")


_READERS: dict[str, Callable[[Path, Place], Rows]] = {
    ".jsonl": _Objects,
    ".ndjson": _Objects,
    ".csv": _Commas,
    ".tsv": _Tabs,
    ".tab": _Tabs,
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
            cause = str(error.__cause__ or error).strip().partition("\n")[0]
            raise DataError(f"{self.name} cannot be read: {cause}") from error


def dataset_shards(dataset: Any, name: str) -> Sequence[DatasetShard]:
    """Return the shards of a `datasets.IterableDataset`."""
    count = dataset.num_shards
    return [
        DatasetShard(dataset, i, f"{name}, shard {i} of {count}") for i in range(count)
    ]
