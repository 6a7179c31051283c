"""Files of lines read a row at a time: text, JSON lines, TSV and CSV, packed or not."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jlora._errors import DataError
from jlora.data._csv import comma_records
from jlora.data._table import json_row, unique_names
from jlora.data._text import check_packed, open_zstd, unpacked_name

Row = dict[str, Any]
Place = Any  # JSON

START = [0, 0]  # bytes and lines before it
LONGEST = 1 << 26  # bytes of a row; a quotation mark that is not closed ends there
SKIP = 1 << 20  # bytes that are unpacked at once on the way to a place


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


class Texts:
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


class Objects(Texts):
    """A JSON object a line."""

    def __next__(self) -> Row:
        return json_row(self.line(), self.lines.where)


class Tabs(Texts):
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


class Commas(Tabs):
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
