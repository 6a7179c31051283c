"""Tables and lists for what is printed and for messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as aligned text, the first column left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: tuple[str, ...]) -> Iterator[str]:
        for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
            yield cell.rjust(width) if i else cell.ljust(width)

    lines = ["  ".join(line(row)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def listed(items: Iterable[str], most: int = 8) -> str:
    """Lines for a message: the first few, and how many more; sets in order."""
    lines = sorted(items) if isinstance(items, Set) else list(items)
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return "\n  ".join(lines[:most] + more)


def first_line(said: object) -> str:
    r"""What a text says first, or an error, so that one message may quote another.

    >>> first_line(ValueError("no such file\nLook again."))
    'no such file'
    """
    return str(said).strip().partition("\n")[0]


def count(number: int, thing: str) -> str:
    """A number of things, in the plural where there are more or fewer than one.

    >>> count(1, "array"), count(1200, "array")
    ('1 array', '1,200 arrays')
    """
    return f"{number:,} {thing}" + ("" if number == 1 else "s")
