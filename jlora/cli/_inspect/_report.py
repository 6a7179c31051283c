"""A report: facts and a table, as text for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jlora._paths import generalise
from jlora._text import table

Row = Mapping[str, Any]

_KINDS = {
    "peft_adapter": "PEFT adapter",
    "adapter": "adapter checkpoint",
    "state": "training state",
    "merged": "merged parameters",
    "model": "Hugging Face model",
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What one folder holds.

    Attributes:
      kind: `"peft_adapter"`, `"adapter"`, `"state"`, `"merged"` or `"model"`.
      path: the folder.
      facts: what to know of it, by name.
      unit: what a row is of: `"module"`, `"kernel"` or `"tensor"`; the name of the
        first column.
      rows: one for each. A column `bytes` is added up over rows that are alike.
      data: what only the JSON holds.
      shown: the columns of the table, where not all of them.
    """

    kind: str
    path: str
    facts: Mapping[str, Any]
    unit: str
    rows: Sequence[Row]
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shown: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it: nothing is shortened or added up."""
        return {
            "kind": self.kind,
            "path": self.path,
            **self.facts,
            **self.data,
            f"{self.unit}s": [dict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        facts = {k.replace("_", " "): _text(v) for k, v in self.facts.items()}
        facts = {k: v for k, v in facts.items() if v}
        width = max(map(len, facts), default=0)
        lines = [f"{self.path}: {_KINDS[self.kind]}"]
        lines += [f"  {k.ljust(width)}  {v}" for k, v in facts.items()]
        if self.rows:
            lines += ["", table(self._cells())]
        return "\n".join(lines)

    def _cells(self) -> list[tuple[str, ...]]:
        """The table's cells, repeated layers in one line, empty columns left out."""
        groups: dict[Any, list[Row]] = {}
        for row in self.rows:
            name = generalise(row[self.unit].replace(".", "/"))
            alike = {k: v for k, v in row.items() if k not in (self.unit, "bytes")}
            groups.setdefault((name, str(alike)), []).append(row)
        lines = [_merged(rows, self.unit) for rows in groups.values()]
        columns = [c for c in lines[0] if any(line[c] for line in lines)]
        if self.shown:
            columns = [c for c in columns if c in (self.unit, "layers", *self.shown)]
        head = tuple(column.replace("_", " ") for column in columns)
        return [head, *(tuple(line[c] for c in columns) for line in lines)]


def _merged(rows: Sequence[Row], unit: str) -> dict[str, str]:
    """Rows that are alike as one line of cells."""
    first, n = rows[0], len(rows)
    name = first[unit]
    if n > 1:
        slash = "/" if "/" in name else "."
        name = generalise(name.replace(slash, "/")).replace("/", slash)
    rest = {k: _text(v) for k, v in first.items() if k not in (unit, "bytes")}
    size = f"{sum(row['bytes'] for row in rows):,}"
    return {unit: name, "layers": str(n), **rest, "bytes": size}


def _text(value: Any) -> str:
    """A value for people; what says nothing is empty."""
    if value is None or value is False or value in ([], {}):
        return ""
    if value is True:
        return "yes"
    if isinstance(value, Mapping):
        own = {k: v for k, v in value.items() if not isinstance(v, Mapping)}
        return ", ".join(f"{k} {_text(v)}" for k, v in own.items())
    if isinstance(value, list):
        # Numbers only: a shape.
        if all(isinstance(x, int) for x in value):
            return str(tuple(value))
        return ", ".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
