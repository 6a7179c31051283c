"""Ids and labels that lie beyond what they count: found on the host, before a step."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jlora._errors import DataError


def values_of(x: Any) -> np.ndarray | None:
    """An array's values on the host, or None where it has none to read here."""
    if isinstance(x, jax.core.Tracer):
        return None
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return None
    return np.asarray(x)


def refuse_ids(
    name: str,
    ids: Any,
    size: int,
    *,
    what: str,
    mask: Any = None,
) -> None:
    """Refuse ids from `size` on; without values (inside `jax.jit`) do nothing.

    Args:
      name: what to call the ids.
      ids: an array of integers; ids below 0 count for nothing here.
      size: how many there are.
      what: what is counted: "classes", "rows".
      mask: of the ids' shape; where it is 0 an id may be anything.

    Raises:
      DataError: an id that does not exist, with its place.
    """
    found = values_of(ids)
    weight = None if mask is None else values_of(mask)
    if found is None or not found.size or (mask is not None and weight is None):
        return
    beyond = found >= size
    if weight is not None:
        beyond &= weight != 0
    if not beyond.any():
        return
    place = tuple(int(i) for i in np.argwhere(beyond)[0])
    more = int(beyond.sum()) - 1
    raise DataError(
        f"{name}: {found[place]} at {list(place)} is beyond the {size} {what}, "
        f"0..{size - 1}{f' (and {more} more)' if more else ''}.\nA tokenizer "
        "with more tokens than the model's table has rows, or labels of another set of "
        "classes, make such ids."
    )
