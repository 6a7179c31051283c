"""Reading German-English corpora: line-parallel files, tables, and the hub's datasets.

Whatever the source, `read` returns a list of `Pair`s in the direction asked for, or
raises a `jlora.DataError` that names the file and the line.
"""

from __future__ import annotations

import gzip
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from jlora import DataError

LANGUAGES = {"de": "German", "en": "English"}
TABLES = {
    ".parquet": ("parquet", {}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
}


class Pair(NamedTuple):
    """A sentence and its translation."""

    source: str
    target: str


class Direction(NamedTuple):
    """From which language to which, by their codes."""

    source: str
    target: str

    @property
    def prompt(self) -> str:
        """What T5 expects before the sentence."""
        return f"translate {LANGUAGES[self.source]} to {LANGUAGES[self.target]}: "


class Source(Protocol):
    """A place that pairs are read from."""

    def read(self, direction: Direction, *, skip_empty: bool) -> list[Pair]:
        """Return the pairs in that direction."""


def direction(name: str) -> Direction:
    """Parse `de-en` or `en-de`.

    Raises:
      DataError: any other direction.
    """
    source, _, target = name.partition("-")
    if {source, target} != set(LANGUAGES):
        raise DataError(f"unknown direction {name!r}: it is de-en or en-de.")
    return Direction(source, target)


# ------------------------------------------------------------- two line-parallel files


class LineFiles(NamedTuple):
    """Two files whose lines belong together, plain or gzipped.

    The suffixes `.de` and `.en` (before `.gz`) tell the languages; without them the
    first file is German.
    """

    first: Path
    second: Path

    def read(self, direction: Direction, *, skip_empty: bool) -> list[Pair]:
        """Return the pairs in that direction."""
        codes = [p.name.removesuffix(".gz").rpartition(".")[2] for p in self]
        codes = codes if codes == ["en", "de"] else list(LANGUAGES)
        paths = dict(zip(codes, self, strict=True))
        names = [paths[code] for code in direction]
        sources, targets = (read_lines(path) for path in names)
        if len(sources) != len(targets):
            raise DataError(
                f"{names[0]} has {len(sources)} lines, but {names[1]} has "
                f"{len(targets)}; the first without a partner is line "
                f"{min(len(sources), len(targets)) + 1}.\nLine n of one file must be "
                "the translation of line n of the other."
            )
        pairs = [Pair(s, t) for s, t in zip(sources, targets, strict=True)]
        where = [f"{name}, line {{}}" for name in names]
        return check_pairs(pairs, where, 1, skip_empty=skip_empty)


def read_lines(path: Path) -> list[str]:
    """Read a text file's lines, through gzip where it is called `.gz`.

    Raises:
      DataError: no such file, a broken archive, or a line that is not UTF-8.
    """
    return [
        _decoded(path, number, line).strip()
        for number, line in enumerate(_byte_lines(path), 1)
    ]


def _byte_lines(path: Path) -> Iterator[bytes]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            yield from file
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read: {reason}.") from error


def _decoded(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {number}: not UTF-8 (byte {line[error.start]:#04x} at "
            f"column {error.start + 1}).\nConvert the file, for instance with: "
            f"iconv -f latin1 -t utf-8 {path}"
        ) from error


# ---------------------------------------------------------------- tables and datasets


class Rows(NamedTuple):
    """Rows that the `datasets` library reads, from files or from a named dataset.

    A row is WMT's `{"translation": {"de": ..., "en": ...}}`, or has the columns `de`
    and `en`, or `source` and `target` (then already in the direction asked for).

    Attributes:
      path: a dataset's name on the hub, a folder, or a builder such as `parquet`.
      config: the dataset's configuration, for instance `de-en`.
      split: which split.
      files: the file, where `path` is a builder.
      options: what the builder takes besides.
      limit: the most rows to take, drawn by `seed`; None takes all.
      seed: chooses the rows.
    """

    path: str
    config: str | None = None
    split: str = "train"
    files: Path | None = None
    options: dict[str, Any] = {}  # noqa: RUF012 - a NamedTuple's default, never written
    limit: int | None = None
    seed: int = 0

    def read(self, direction: Direction, *, skip_empty: bool) -> list[Pair]:
        """Return the pairs in that direction."""
        rows = self._load()
        if self.limit is not None and self.limit < len(rows):
            chosen = random.Random(self.seed).sample(range(len(rows)), self.limit)
            rows = rows.select(sorted(chosen))
        columns = columns_of(rows.column_names, direction, str(self))
        pairs = [Pair(*row) for row in _cells(rows, columns, direction)]
        where = [f"{self}, row {{}}, {side}" for side in ("source", "target")]
        return check_pairs(pairs, where, 0, skip_empty=skip_empty)

    def __str__(self) -> str:
        """How messages call it."""
        if self.files is not None:
            return str(self.files)
        return f"{self.path} {self.config or ''}".strip() + f" [{self.split}]"

    def _load(self) -> Any:
        import datasets

        options = dict(self.options)
        if self.files is not None:
            options["data_files"] = str(self.files)
            if self.path != "parquet":
                read_lines(self.files)  # names the line that is not UTF-8
        try:
            return datasets.load_dataset(
                self.path, self.config, split=self.split, **options
            )
        except Exception as error:  # readers of many formats raise errors of their own
            cause = str(error.__cause__ or error).strip().partition("\n")[0]
            raise DataError(
                f"{self} cannot be read: {cause}\nCheck the name, the configuration "
                "and the split; a dataset of the hub needs a connection or a copy in "
                "the cache."
            ) from error


def columns_of(names: Sequence[str], direction: Direction, where: str) -> list[str]:
    """Return the columns that hold source and target: one, or two.

    Raises:
      DataError: the table has none of the known columns.
    """
    for columns in (["translation"], list(direction), ["source", "target"]):
        if set(columns) <= set(names):
            return columns
    raise DataError(
        f"{where} has the columns {', '.join(names) or '(none)'}.\nIt needs "
        "translation (with de and en in it), or de and en, or source and target."
    )


def _cells(
    rows: Any, columns: list[str], direction: Direction
) -> Iterator[tuple[str, str]]:
    """Each row's source and target; what is no text counts as empty."""
    if len(columns) == 2:
        cells: Any = zip(*(rows[name] for name in columns), strict=True)
    else:
        cells = (
            [(row or {}).get(code) for code in direction] for row in rows[columns[0]]
        )
    for source, target in cells:
        yield _text(source), _text(target)


def _text(cell: Any) -> str:
    return " ".join(cell.split()) if isinstance(cell, str) else ""


# ---------------------------------------------------------------------- what they share


def source_of(files: Sequence[str]) -> Source:
    """Return the source that one table, or two line-parallel files, make.

    Raises:
      DataError: more than two files, or one of an unknown kind.
    """
    paths = [Path(name).expanduser() for name in files]
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: no such file.")
    if len(paths) == 2:
        return LineFiles(*paths)
    suffix = paths[0].suffix
    if len(paths) != 1 or suffix not in TABLES:
        raise DataError(
            f"cannot tell how to read {' '.join(files)}.\nPass two files with a "
            f"sentence a line, or one of {', '.join(TABLES)}."
        )
    builder, options = TABLES[suffix]
    return Rows(builder, files=paths[0], options=options)


def check_pairs(
    pairs: list[Pair], where: Sequence[str], first: int, *, skip_empty: bool
) -> list[Pair]:
    """Return the pairs whose two sides both hold text.

    Args:
      pairs: as read.
      where: how to name a place in the sources and the targets, `{}` for its number.
      first: the number of the first pair.
      skip_empty: leave pairs with an empty side out, rather than complain.

    Raises:
      DataError: an empty side, or nothing at all.
    """
    for number, pair in enumerate(pairs, first):
        if not skip_empty and not all(pair):
            place = where[0 if not pair.source else 1].format(number)
            raise DataError(
                f"{place}: nothing there, but its partner says "
                f"{(pair.source or pair.target)[:60]!r}.\nMend the corpus, or leave "
                "such pairs out with --skip-empty."
                if any(pair)
                else f"{place}: empty on both sides.\nMend the corpus, or leave such "
                "pairs out with --skip-empty."
            )
    kept = [pair for pair in pairs if all(pair)]
    if not kept:
        raise DataError(f"{where[0].partition(',')[0]} holds no sentence pairs.")
    return kept


def subset(pairs: list[Pair], size: int | None, seed: int) -> list[Pair]:
    """Return `size` of the pairs, drawn by `seed` and left in their order."""
    if size is None or size >= len(pairs):
        return pairs
    chosen = random.Random(seed).sample(range(len(pairs)), size)
    return [pairs[i] for i in sorted(chosen)]


def hold_out(pairs: list[Pair], size: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Return the pairs without `size` of them, and those; no pair is in both."""
    distinct = list(dict.fromkeys(pairs))
    size = min(size, len(distinct) // 10)
    if size < 1:
        raise DataError(
            f"{len(distinct)} different pairs are too few to hold some out.\nPass "
            "--valid and --test, or a larger corpus."
        )
    held = set(random.Random(seed).sample(distinct, size))
    return [p for p in distinct if p not in held], [p for p in distinct if p in held]
