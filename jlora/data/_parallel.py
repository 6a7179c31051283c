"""Parallel text: sentences beside their translations, from lines or from tables."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jlora._errors import DataError, JloraWarning
from jlora.data._languages import Direction, direction, sides_of
from jlora.data._table import Table, as_text, is_table, read_table
from jlora.data._text import read_lines

# A line that is all within tags, or a tag.
_TAGGED = re.compile(r"</?[A-Za-z][^<>]*>(.*>)?")
Empty = Literal["error", "skip"]
_MARKUP = re.compile(
    r"<[?!]|<(html|tmx|xliff|doc|srcset|refset|tstset|dataset|corpus|seg|text)\b", re.I
)


class Pair(NamedTuple):
    """A sentence and its translation."""

    source: str
    target: str


def read_pairs(
    files: str | Path | Sequence[str | Path],
    way: Direction | str,
    *,
    empty: Empty = "error",
) -> list[Pair]:
    """Read parallel text: two files with a sentence a line, or any number of tables.

    Two files of lines are told apart by the languages in their names; line n of one is
    the translation of line n of the other. Tables (see `read_table`) are parts of one
    corpus, one after another. A table's row is WMT's
    `{"translation": {"de": ..., "en": ...}}`, or has the columns `de` and `en`, or
    `source` and `target` (then already in the direction asked for).

    Args:
      files: the files.
      way: the direction, such as `"de-en"`.
      empty: what to do with a pair of which a side is empty: an error, or leave it out
        and warn.

    Raises:
      DataError: files that do not exist, do not belong together or are no such text;
        the message names the line.
    """
    names = [files] if isinstance(files, (str, Path)) else files
    paths = [Path(name).expanduser() for name in names]
    way = direction(way) if isinstance(way, str) else way
    for path in paths:
        if not path.is_file():
            what = "a folder, not a file" if path.is_dir() else "no such file"
            raise DataError(f"{path}: {what}.")
    tables = [is_table(path) for path in paths]
    if paths and all(tables):
        return [
            pair
            for path in paths
            for pair in table_pairs(read_table(path), way, empty=empty)
        ]
    if len(paths) != 2 or any(tables):
        raise DataError(
            f"cannot tell how to read {', '.join(map(str, paths)) or 'no file'}.\nPass "
            "two files with a sentence a line, or tables alone: .csv, .tsv, .jsonl, "
            ".json, .parquet."
        )
    return _line_pairs(paths, way, empty)


# ----------------------------------------------------------------------- files of lines


def _line_pairs(paths: Sequence[Path], way: Direction, empty: Empty) -> list[Pair]:
    ordered = sides_of(paths, way)
    sources, targets = (_sentences(path, way) for path in ordered)
    if len(sources) != len(targets):
        raise DataError(
            f"{ordered[0]} has {len(sources)} lines, but {ordered[1]} has "
            f"{len(targets)}; the first without a partner is line "
            f"{min(len(sources), len(targets)) + 1}.\nLine n of one file must be the "
            "translation of line n of the other."
        )
    pairs = [Pair(*pair) for pair in zip(sources, targets, strict=True)]

    def place(row: int, side: int) -> str:
        return f"{ordered[side]}, line {row + 1}"

    return check_pairs(pairs, place, str(ordered[0]), empty=empty)


def _sentences(path: Path, way: Direction) -> list[str]:
    """Read the lines of a file that holds one sentence in each, and nothing else."""
    lines = read_lines(path)
    first = next((line for line in lines if line), "")
    filled = [line for line in lines[:100] if line]
    tabs = {line.count("\t") for line in filled}
    if _MARKUP.match(first) or (filled and all(map(_TAGGED.fullmatch, filled))):
        kind = f"mark-up: it begins with {first[:40]!r}. Take the sentences out of it"
    elif filled and all(map(_is_json, filled)):
        kind = "JSON lines. Call it .jsonl"
    elif first in ("{", "["):
        kind = "JSON. Call it .json"
    elif _is_header(first, way):
        kind = f"a table, with the columns {first!r}. Call it .csv or .tsv"
    elif len(tabs) == 1 and tabs != {0}:
        kind = "a table with tabs in every line. Call it .tsv, with a line of names"
    else:
        return lines
    raise DataError(f"{path} does not hold a sentence a line: it looks like {kind}.")


def _is_header(line: str, way: Direction) -> bool:
    """Return whether a line names the columns that a table of pairs has."""
    names = {name.strip(" \"'") for name in re.split(r"[,;|\t]", line.lower())}
    return set(way) <= names or {"source", "target"} <= names


def _is_json(line: str) -> bool:
    if line[0] not in "{[":
        return False
    try:
        return isinstance(json.loads(line), (dict, list))
    except ValueError:
        return False


# ------------------------------------------------------------------------------- tables


def table_pairs(table: Table, way: Direction, *, empty: Empty = "error") -> list[Pair]:
    """Return a table's pairs in a direction.

    Raises:
      DataError: the columns are others, or a cell holds no text.
    """
    columns = _columns(table, way)
    if len(columns) == 2:
        sources, targets = map(table.text, columns)
    else:
        cells = table.cells(columns[0])
        rows = [_translation(table, row, cell, way) for row, cell in enumerate(cells)]
        sources, targets = ([row[side] for row in rows] for side in (0, 1))
    pairs = [Pair(*pair) for pair in zip(sources, targets, strict=True)]
    keys = columns if len(columns) == 2 else [f"{columns[0]}.{code}" for code in way]

    def place(row: int, side: int) -> str:
        return f"{table.place(row)}, {keys[side]}"

    return check_pairs(pairs, place, table.name, empty=empty)


def _columns(table: Table, way: Direction) -> list[str]:
    """Return the columns that hold source and target: one, or two."""
    for columns in (["translation"], list(way), ["source", "target"]):
        if set(columns) <= set(table.columns):
            return columns
    names = ", ".join(table.columns) or "(none)"
    hint = ""
    if len(table.columns) == 1 and re.search(r"[;\t|]", names):
        hint = " (A .csv has commas between its fields, a .tsv tabs.)"
    elif table.lines and table.name.rpartition(".")[2] not in ("jsonl", "ndjson"):
        hint = " (They are what its first line says.)"
    raise DataError(
        f"{table.name} has the columns {names}.{hint}\nIt needs translation (with "
        f"{way.source} and {way.target} in it), or {way.source} and {way.target}, or "
        "source and target."
    )


def _translation(table: Table, row: int, cell: Any, way: Direction) -> list[str]:
    """Return both sides of WMT's `{"de": ..., "en": ...}`."""
    if cell is None:
        return ["", ""]
    place = f"{table.place(row)}, translation"
    if not isinstance(cell, dict):
        raise DataError(
            f"{place} holds {type(cell).__name__} {str(cell)[:60]!r}, not an object "
            f"with {way.source} and {way.target}."
        )
    for code in way:
        if code not in cell:
            raise DataError(f"{place} has {', '.join(cell) or 'nothing'}, not {code}.")
    try:
        return [as_text(cell[code]) for code in way]
    except DataError as error:
        raise DataError(f"{place} {error}") from None


# ---------------------------------------------------------------------- what they share


def check_pairs(
    pairs: list[Pair], place: Callable[[int, int], str], name: str, *, empty: Empty
) -> list[Pair]:
    """Return the pairs whose two sides both hold text.

    Args:
      pairs: as read.
      place: how to name a row's side, 0 the source.
      name: how to name the whole.
      empty: what to do with a pair of which a side is empty.

    Raises:
      DataError: an empty side, or nothing at all.
    """
    bad = [row for row, pair in enumerate(pairs) if not all(pair)]
    if bad:
        pair, row = pairs[bad[0]], bad[0]
        first = place(row, 0 if not pair.source else 1)
        said = (
            f"nothing there, but its partner says {(pair.source or pair.target)[:60]!r}"
            if any(pair)
            else "empty on both sides"
        )
        if empty == "error":
            raise DataError(
                f"{first}: {said}.\nMend the corpus, or leave such pairs out with "
                "--skip-empty."
            )
        warnings.warn(
            f"{name}: {len(bad)} of {len(pairs)} pairs are left out, for a side is "
            f"empty; the first is {first}.",
            JloraWarning,
            stacklevel=2,
        )
    kept = [pair for pair in pairs if all(pair)]
    if not kept:
        raise DataError(f"{name} holds no sentence pairs.")
    return kept
