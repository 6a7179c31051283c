"""Delimited text, to the letter: RFC 4180 for commas, no quoting at all for tabs.

Libraries guess a dialect; a quotation mark out of place then swallows rows in silence.
Here whatever is not exactly the one dialect is an error that names the line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from jlora._errors import DataError
from jlora.data._text import raw_lines

Record = tuple[int, list[str]]  # the line it begins at, its fields

# Possessive, so that a mark that is never closed costs no backtracking.
_FIELD = re.compile(r'"((?:[^"]++|"")*+)"|([^,"\r\n]*+)')
_END = re.compile(r",|\r?\n|\Z")


def tab_records(text: str) -> Iterator[Record]:
    """Yield the records of tab-separated text; a quotation mark is a character."""
    for number, line in enumerate(raw_lines(text), 1):
        yield number, line.split("\t")


def comma_records(text: str, name: str, line: int = 1) -> Iterator[Record]:
    """Yield the records of comma-separated text, by RFC 4180.

    Args:
      text: the text.
      name: how messages call it.
      line: the number of its first line.

    Raises:
      DataError: a quotation mark out of place, or one that is never closed.
    """
    position, first = 0, line
    fields: list[str] = []
    while position < len(text):
        field = _FIELD.match(text, position)
        end = _END.match(text, field.end()) if field else None
        if field is None or end is None:
            raise DataError(_misquoted(text, position, name, line))
        quoted, plain = field.groups()
        if quoted is not None:
            breaks = quoted.count("\n")
            if breaks and '\\""' in quoted:
                raise DataError(_misquoted(text, position, name, line))
            line += breaks
        fields.append(plain if quoted is None else quoted.replace('""', '"'))
        position = end.end()
        if end.group() == "," and position < len(text):
            continue
        if end.group() == ",":
            fields.append("")
        yield first, fields
        line += 1
        first, fields = line, []


def _misquoted(text: str, position: int, name: str, line: int) -> str:
    start = text[position : position + 60].split("\n")[0]
    return (
        f"{name}, line {line}: a quotation mark or line end out of place, near "
        f"{start!r}.\nA field "
        'with quotation marks, commas or line ends stands in quotation marks, and "" '
        'within it means one (RFC 4180); \\" is not understood. Write the table so, or '
        "as .tsv (no quoting) or .jsonl."
    )
