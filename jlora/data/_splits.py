"""Choosing some of the examples, and holding others out."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from typing import TypeVar

from jlora._errors import DataError

T = TypeVar("T")
H = TypeVar("H", bound=Hashable)


def subset(items: Sequence[T], size: int | None, seed: int = 0) -> list[T]:
    """Return `size` of the items, drawn by `seed` and left in their order.

    None, or more than there are, returns all.
    """
    if size is None or size >= len(items):
        return list(items)
    chosen = random.Random(seed).sample(range(len(items)), size)
    return [items[i] for i in sorted(chosen)]


def hold_out(items: Sequence[H], size: int, seed: int = 0) -> tuple[list[H], list[H]]:
    """Return the items without `size` of them, and those; nothing is in both.

    Equal items count as one. At most a tenth is held out.

    Raises:
      DataError: fewer than ten different items.
    """
    distinct = list(dict.fromkeys(items))
    size = min(size, len(distinct) // 10)
    if size < 1:
        raise DataError(
            f"{len(distinct)} different examples are too few to hold some out.\nPass "
            "files to validate with and to test, or a larger corpus."
        )
    held = set(random.Random(seed).sample(distinct, size))
    return [x for x in distinct if x not in held], [x for x in distinct if x in held]
