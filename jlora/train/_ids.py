"""Ids and labels that lie beyond what they count: found on the host, before a step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array

from jlora._errors import DataError

# The name, in a program, of the labels of a loss; their number of classes follows it.
LABELS = "jlora_labels_of"


def values_of(x: Any) -> np.ndarray | None:
    """An array's values on the host, or None where it has none to read here."""
    if isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct):
        return None
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return None
    return np.asarray(x)


def checked_labels(labels: Array, mask: Array | None, classes: int) -> Array:
    """The labels, which are checked here if they have values.

    If they have none, their name in the program says what they are: see `uses_of`.

    Raises:
      DataError: a counted label beyond the classes.
    """
    refuse_ids("labels", labels, classes, what="classes", mask=mask)
    named = _named_labels(classes)
    return named(labels) if mask is None else named(labels, mask)


@functools.lru_cache(maxsize=64)
def _named_labels(classes: int) -> Callable[..., Array]:
    def labels(labels: Array, mask: Array | None = None) -> Array:
        return labels

    labels.__name__ = labels.__qualname__ = f"{LABELS}_{classes}"
    return jax.jit(labels, keep_unused=True)


def refuse_ids(
    name: str,
    ids: Any,
    size: int,
    *,
    what: str,
    mask: Any = None,
) -> None:
    """Refuse ids that do not exist; without values (inside `jax.jit`) do nothing.

    Args:
      name: what to call the ids.
      ids: an array of integers.
      size: how many there are.
      what: what is counted: `"classes"`, where ids below 0 count for nothing, or
        `"rows"`, where they count from the end, as in Python.
      mask: of the ids' shape; where it is 0 an id may be anything.

    Raises:
      DataError: an id that does not exist, with its place.
    """
    found = values_of(ids)
    weight = None if mask is None else values_of(mask)
    if found is None or not found.size or (mask is not None and weight is None):
        return
    lowest = -size if what == "rows" else None
    if found.max() < size and (lowest is None or found.min() >= lowest):
        return
    beyond = found >= size
    if lowest is not None:
        beyond |= found < lowest
    if weight is not None:
        beyond &= weight != 0
    if not beyond.any():
        return
    place = tuple(int(i) for i in np.argwhere(beyond)[0])
    more = int(beyond.sum()) - 1
    raise DataError(
        f"{name}: {found[place]} at {list(place)} is beyond the {size} {what}, "
        f"0..{size - 1}{f' (and {more} more)' if more else ''}.\n{_REMEDY[what]}"
    )


_REMEDY = {
    "classes": (
        "The tokenizer or the data knows more of them than the model has outputs; a "
        "label that does not count is below 0, or masked."
    ),
    "rows": (
        "The tokenizer or the data knows more of them than the model's table has rows; "
        "an id below 0 is a label that does not count, not an input."
    ),
}
