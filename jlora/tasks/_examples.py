"""Examples of a classification or regression: texts, perhaps in pairs, and labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jlora import data
from jlora._errors import DataError

UNLABELLED = ("", "-")  # that a label is not known; of classes -1 says so too


@dataclasses.dataclass(frozen=True)
class Examples:
    """Texts and their labels.

    Attributes:
      texts: the first or only text of each example.
      pairs: the second ones, where two are read together.
      labels: `[n]`: int32 numbers of classes, or float32 numbers.
    """

    texts: list[str]
    pairs: list[str] | None
    labels: np.ndarray

    def __len__(self) -> int:
        """Return how many examples there are."""
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> Examples:
        """Return some of the examples."""
        pairs = None if self.pairs is None else [self.pairs[i] for i in rows]
        return Examples([self.texts[i] for i in rows], pairs, self.labels[list(rows)])

    def text(self, row: int) -> str:
        """Return an example's text for a reader; two are divided by a bar."""
        second = "" if self.pairs is None else f" | {self.pairs[row]}"
        return self.texts[row] + second


def read_examples(
    table: data.Table, text: Sequence[str], label: str, classes: Sequence[str]
) -> Examples:
    """Return a table's examples; those without a label are left out.

    Args:
      table: the table.
      text: the columns of the text, one or two.
      label: the column of the label.
      classes: the names of the classes, in the order of their numbers; none where
        labels are numbers to predict.

    Raises:
      DataError: other columns, a label that is none of the classes or no number, or no
        example at all.
    """
    texts, *second = (table.text(column) for column in text)
    known = numbers_of(classes)
    labels: list[float] = []
    kept: list[int] = []
    for row, cell in enumerate(label_cells(table, label)):
        if cell in UNLABELLED or (classes and cell == "-1" and cell not in known):
            continue
        if classes and cell not in known:
            raise DataError(
                f"{table.place(row)}, column {label}: {cell!r} is none of the classes "
                f"{', '.join(classes)}.\nName the classes in the order of their "
                "numbers, --classes, or correct the column, --label."
            )
        kept.append(row)
        labels.append(known[cell] if classes else _number(table, row, label, cell))
    if not kept:
        raise DataError(f"{table.name} holds no example with a label.")
    kind = np.int32 if classes else np.float32
    pairs = [second[0][row] for row in kept] if second else None
    return Examples([texts[row] for row in kept], pairs, np.array(labels, kind))


def label_cells(table: data.Table, column: str) -> list[str]:
    """Return a column of labels as text; numbers of any type are labels, too.

    Raises:
      DataError: no such column.
    """
    if column not in table.columns:
        table.text(column)  # says so
    cells = table.cells(column)
    return ["" if cell is None else str(cell).strip() for cell in cells]


def numbers_of(classes: Sequence[str]) -> dict[str, int]:
    """Return the number of each class, by its name, and by the number itself.

    >>> numbers_of(["no", "yes"])
    {'no': 0, 'yes': 1, '0': 0, '1': 1}
    """
    known = {name: number for number, name in enumerate(classes)}
    if any(name.isdigit() for name in classes):  # their names say which is which
        return known
    return known | {str(number): number for number in range(len(classes))}


def _number(table: data.Table, row: int, label: str, said: str) -> float:
    try:
        return float(said)
    except ValueError:
        raise DataError(
            f"{table.place(row)}, column {label}: {said!r} is no number.\nOf classes "
            "leave --regression out."
        ) from None


def join(parts: Sequence[Examples]) -> Examples:
    """Return the examples of several tables as one."""
    first = parts[0]
    pairs = None
    if first.pairs is not None:
        pairs = [text for part in parts for text in part.pairs or []]
    labels = np.concatenate([part.labels for part in parts])
    return Examples([text for part in parts for text in part.texts], pairs, labels)


def subset(examples: Examples, size: int | None, seed: int) -> Examples:
    """Return so many of the examples, drawn by `seed` and left in their order."""
    return examples.take(data.subset(range(len(examples)), size, seed))


def hold_out(examples: Examples, size: int, seed: int) -> tuple[Examples, Examples]:
    """Return the examples without `size` of them, and those.

    No text is in both, and at most a tenth is held out; see `jlora.data.hold_out`.
    """
    texts = [examples.text(row) for row in range(len(examples))]
    held = set(data.hold_out(texts, size, seed)[1])
    rows = range(len(examples))
    kept = [row for row in rows if texts[row] not in held]
    return examples.take(kept), examples.take([r for r in rows if texts[r] in held])
