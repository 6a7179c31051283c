"""Tables: CSV, TSV, JSON and Parquet, read as what they say."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jlora._errors import DataError
from jlora._text import first_line
from jlora.data._csv import Record, comma_records, tab_records
from jlora.data._text import raw_lines, read_bytes, read_text, unpacked_name

Cell = Any  # text, None, a number, or whatever JSON and Parquet hold besides
Names = Sequence[str] | Literal["numbered"]


@dataclasses.dataclass(frozen=True)
class Table:
    """Named columns of equal length.

    Attributes:
      name: how messages call it, such as its path.
      columns: the names of the columns.
      rows: how many rows there are.
      cells: a function from a column's name to its cells.
      lines: the line of each row in the file; None where rows have only a number.
    """

    name: str
    columns: Sequence[str]
    rows: int
    cells: Callable[[str], Sequence[Cell]]
    lines: Sequence[int] | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.rows

    def place(self, row: int) -> str:
        """Return how a message calls the row, counted from 0, to a reader."""
        where = f"line {self.lines[row]}" if self.lines else f"row {row + 1}"
        return f"{self.name}, {where}"

    def text(self, column: str) -> list[str]:
        """Return a column's text; None is empty.

        Raises:
          DataError: no such column, or a cell that is no text.
        """
        found = []
        for row, cell in enumerate(self._column(column)):
            try:
                found.append(as_text(cell))
            except DataError as error:
                where = f"{self.place(row)}, column {column}"
                raise DataError(f"{where} {error}") from None
        return found

    def integers(self, column: str) -> np.ndarray:
        """Return a column of whole numbers as `[rows]` int32, such as classes.

        Raises:
          DataError: no such column, or a cell that is no whole number.
        """
        return self._numbers(column, _int32, "a whole number of 32 bits")

    def floats(self, column: str) -> np.ndarray:
        """Return a column of numbers as `[rows]` float32.

        Raises:
          DataError: no such column, or a cell that is no number.
        """
        return self._numbers(column, float, "a number").astype(np.float32)

    def _column(self, column: str) -> Sequence[Cell]:
        if column not in self.columns:
            names = ", ".join(self.columns) or "(none)"
            raise DataError(f"{self.name} has the columns {names}, not {column!r}.")
        return self.cells(column)

    def _numbers(
        self, column: str, kind: Callable[[Any], Any], wanted: str
    ) -> np.ndarray:
        found = []
        for row, cell in enumerate(self._column(column)):
            try:
                if isinstance(cell, bool) or kind(cell) != float(cell):
                    raise ValueError
                found.append(kind(cell))
            except (TypeError, ValueError, OverflowError) as error:
                raise DataError(
                    f"{self.place(row)}, column {column}: {cell!r} is not {wanted}."
                ) from error
        return np.array(found, np.int32 if kind is _int32 else np.float64)


def _int32(cell: Cell) -> int:
    number = int(cell)
    if not -(2**31) <= number < 2**31:
        raise OverflowError
    return number


def as_text(cell: Cell) -> str:
    """Return a cell's text: a string's, a whole number's; None is empty.

    Other numbers, dates and the like can be written in several ways, of which none is
    chosen here.

    Raises:
      DataError: a cell of another type, which the message names.
    """
    if cell is None:
        return ""
    if isinstance(cell, str):
        return cell.strip()
    if isinstance(cell, (int, np.integer)) and not isinstance(cell, bool):
        return str(cell)
    raise DataError(
        f"holds {_kind(cell)}, not text: {str(cell)[:60]!r}.\nWrite the "
        "column as text, the way it is to be read."
    )


def _kind(cell: Cell) -> str:
    name = type(cell).__name__
    kinds: tuple[tuple[Any, str], ...] = (
        (bool, f"a truth value ({name})"),
        ((float, decimal.Decimal, np.number), f"a number ({name})"),
        ((datetime.date, datetime.time), f"a date or time ({name})"),
        (datetime.timedelta, f"a duration ({name})"),
        (bytes, "bytes"),
        (dict, "an object"),
        ((list, tuple), "a list"),
    )
    return next((said for kind, said in kinds if isinstance(cell, kind)), name)


# ------------------------------------------------------------------------------ reading


def is_table(path: str | Path) -> bool:
    """Return whether the name says that a file is a table."""
    return _suffix(Path(path)) in _READERS


def read_table(path: str | Path, *, columns: Names | None = None) -> Table:
    r"""Read a table, as its name says: .csv, .tsv, .jsonl, .json or .parquet.

    - CSV as RFC 4180 has it: commas, `"` around fields, `""` within. TSV without any
      quoting. Cells are text; nothing stands for a missing value.
    - JSON lines with an object in each; JSON with a list of objects, or an object of
      columns.
    - Parquet with its own types.

    Args:
      path: the file; but for Parquet it may be packed, as .gz, .bz2, .xz or .zst.
      columns: names for the columns of a CSV or TSV without a header; `"numbered"`
        calls them 1, 2 and so on; None takes the names from the first line.

    Raises:
      DataError: the file is not exactly that; the message names the line.
    """
    path = Path(path).expanduser()
    suffix = _suffix(path)
    if suffix not in _READERS:
        raise DataError(
            f"{path}: not known as a table; the names of tables end in "
            f"{', '.join(_READERS)}."
        )
    if columns is None:
        return _READERS[suffix](path)
    if suffix not in _DELIMITED:
        raise DataError(f"{path}: only .csv and .tsv take names for their columns.")
    return _delimited(path, columns)


def _suffix(path: Path) -> str:
    return Path(unpacked_name(path)).suffix.lower()


def _table(
    path: Path, columns: dict[str, list[Cell]], lines: Sequence[int] | None
) -> Table:
    rows = len(next(iter(columns.values()), []))
    return Table(str(path), list(columns), rows, columns.__getitem__, lines)


def unique_names(names: Sequence[str], where: str) -> list[str]:
    """Return names of columns; refuse one that stands twice."""
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        raise DataError(f"{where} has the column {twice[0]!r} more than once.")
    return list(names)


def _delimited(path: Path, names: Names | None = None) -> Table:
    text = read_text(path)
    tabs = _suffix(path) != ".csv"
    records: Iterable[Record] = (
        tab_records(text) if tabs else comma_records(text, str(path))
    )
    rows = list(records)
    while rows and rows[-1][1] == [""]:  # empty lines at the end
        rows.pop()
    if names is None:
        if not rows:
            raise DataError(f"{path} is empty; its first line names the columns.")
        names = [name.strip() for name in rows.pop(0)[1]]
    if names == "numbered":
        names = [str(number + 1) for number in range(len(rows[0][1]) if rows else 0)]
    names = unique_names(names, str(path))
    for line, fields in rows:
        if len(fields) != len(names):
            raise DataError(
                f"{path}, line {line}: {_count(len(fields), 'field')}, but "
                f"{_count(len(names), 'column')} ({', '.join(names)[:80]})."
                + ("" if tabs else "\nA field with commas stands in quotation marks.")
            )
    cells = zip(*(fields for _, fields in rows), strict=True) if rows else ()
    columns = dict(zip(names, map(list, cells), strict=True)) if rows else {}
    return _table(
        path, columns or {name: [] for name in names}, [line for line, _ in rows]
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


class _NotJsonError(ValueError):
    """JSON with what JSON does not have."""


def parse_json(text: str) -> Any:
    """Parse JSON; refuse NaN and keys that stand twice, which Python lets pass."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(k for k, n in Counter(k for k, _ in pairs).items() if n > 1)
            raise _NotJsonError(f"the key {twice!r} stands twice in an object")
        return found

    def constant(name: str) -> Any:
        raise _NotJsonError(f"{name} is no JSON")

    return json.loads(text, object_pairs_hook=once, parse_constant=constant)


def json_row(line: str, where: str) -> dict[str, Cell]:
    """Return the object in a line.

    Raises:
      DataError: it is none; `where` names the line.
    """
    try:
        row = parse_json(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}.") from error
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: {_kind_of_json(row)}, not an object such as "
            '{"de": "...", "en": "..."}.'
        )
    return row


def _json_lines(path: Path) -> Table:
    rows, lines = [], []
    for number, line in enumerate(raw_lines(read_text(path)), 1):
        if not line.strip():
            continue
        rows.append(json_row(line.lstrip("\ufeff"), f"{path}, line {number}"))
        lines.append(number)
    return _table(path, _columns(rows), lines)


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Cell]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _kind_of_json(value: Any) -> str:
    return "text" if isinstance(value, str) else _kind(value)


def _json(path: Path) -> Table:
    text = read_text(path)
    try:
        content = parse_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # an object a line, as much of the hub has it
            return _json_lines(path)
        raise DataError(
            f"{path}, line {error.lineno}: not JSON: {error.msg}."
        ) from error
    except (_NotJsonError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}.") from error
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        objects = [x for x in lists if x and all(isinstance(y, dict) for y in x)]
        if len(objects) == 1 and "translation" not in content:  # {"data": [{...}]}
            content = objects[0]
        elif len(lists) == len(content) and len({len(x) for x in lists}) == 1:
            return _table(path, content, None)
        if content and not lists and "\n" not in text.strip():  # a single line
            return _json_lines(path)
    if not isinstance(content, list) or not all(isinstance(r, dict) for r in content):
        return _wrong_json(path)
    return _table(path, _columns(content), None)


def _wrong_json(path: Path) -> Table:
    raise DataError(
        f"{path} is no table: it holds neither a list of objects, nor lists of equal "
        "length by name, nor an object a line."
    )


def _parquet(path: Path) -> Table:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("Parquet needs pyarrow: pip install pyarrow") from error
    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(read_bytes(path)))
        names = unique_names(file.schema_arrow.names, str(path))
        rows = file.metadata.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        first = first_line(error)
        raise DataError(f"{path} cannot be read: {first}") from error

    def cells(name: str) -> list[Cell]:
        try:
            return file.read(columns=[name]).column(0).to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            first = first_line(error)
            raise DataError(f"{path}, column {name}: {first}") from error

    return Table(str(path), names, rows, cells)


_DELIMITED = (".csv", ".tsv", ".tab")
_READERS: dict[str, Callable[[Path], Table]] = {
    **dict.fromkeys(_DELIMITED, _delimited),
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
}
