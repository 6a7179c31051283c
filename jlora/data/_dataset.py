"""Datasets of the Hugging Face hub, and folders that hold a table for each split."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jlora._errors import DataError
from jlora._text import first_line
from jlora.data._languages import Direction, direction
from jlora.data._parallel import Pair, table_pairs
from jlora.data._table import Table, is_table, read_table

_ALIASES = {
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "eval"),
}


def read_dataset(
    name: str | Path,
    config: str | None = None,
    split: str = "train",
    *,
    limit: int | None = None,
    seed: int = 0,
) -> list[Table]:
    """Return a split of a dataset, as one table or as its parts.

    Args:
      name: a dataset's name on the hub, or a folder. Of a folder the tables whose
        names begin with the split's are read, as `read_table` reads them; there may
        be folders named after the configuration or `data` in between.
      config: the dataset's configuration, for instance `de-en`.
      split: which split.
      limit: the most rows to take of a dataset of the hub, drawn by `seed`.
      seed: chooses them.

    Raises:
      DataError: no such dataset or split, or one that cannot be read.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        files = _files(folder, config, split)
        if files:
            return [read_table(file) for file in files]
        _check_no_tables(folder, split)
    where = f"{name} {config or ''}".strip() + f" [{split}]"
    rows = load_from_hub(str(folder if folder.is_dir() else name), config, split, where)
    if limit is not None and limit < len(rows):
        chosen = random.Random(seed).sample(range(len(rows)), limit)
        rows = rows.select(sorted(chosen))
    columns = list(rows.column_names)
    return [Table(where, columns, len(rows), lambda column: list(rows[column]))]


def read_dataset_pairs(
    name: str | Path,
    way: Direction | str,
    config: str | None = None,
    split: str = "train",
    *,
    limit: int | None = None,
    seed: int = 0,
) -> list[Pair]:
    """Return a split's sentence pairs; those with an empty side are left out.

    The arguments are those of `read_dataset` and `read_pairs`. The hub's corpora hold
    a few empty lines, which nobody can mend; a warning counts them.
    """
    way = direction(way) if isinstance(way, str) else way
    tables = read_dataset(name, config, split, limit=limit, seed=seed)
    return [p for table in tables for p in table_pairs(table, way, empty="skip")]


def _files(folder: Path, config: str | None, split: str) -> Sequence[Path]:
    """Return the tables of a split in a folder, in order of their names."""
    for root in _roots(folder, config):
        tables = _tables(root)
        for stem in _ALIASES.get(split, (split,)):
            own = [p for p in tables if _begins_with(p.name, stem)]
            found = own or _tables(root / stem)
            if found:
                return found
    return []


def _roots(folder: Path, config: str | None) -> list[Path]:
    return [folder / part for part in (config, "data", ".") if part]


def _tables(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*") if p.is_file() and is_table(p))


def _check_no_tables(folder: Path, split: str) -> None:
    """Refuse a folder of tables without the split, rather than take others for it.

    The library `datasets` would, and guesses at quotes and missing values besides.
    """
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if is_table(p))
    if names:
        raise DataError(
            f"{folder} holds no table of the split {split!r}; its name begins with the "
            f"split's. There are {', '.join(names[:8])}."
        )


def _begins_with(name: str, stem: str) -> bool:
    return name.startswith(stem) and not name[len(stem) : len(stem) + 1].isalnum()


def load_from_hub(
    name: str, config: str | None, split: str, where: str, **options: Any
) -> Any:
    """Return a dataset of the library `datasets`.

    Raises:
      DataError: the library is not there, or the dataset cannot be read.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            'datasets of the hub need a library: pip install "jlora[train]"'
        ) from error
    try:
        return datasets.load_dataset(name, config, split=split, **options)
    except Exception as error:  # readers of many formats raise errors of their own
        cause = first_line(error.__cause__ or error)
        raise DataError(
            f"{where} cannot be read: {cause}\nCheck the name, the configuration and "
            "the split; a dataset of the hub needs a connection or a copy in the cache."
        ) from error
