"""Tokens that were added to a base before training: rows that the file carries.

When a vocabulary grew, PEFT saves the embedding and the head whole, though nothing
trained them, and puts them over the base's when it loads. Here the base has to have
room for them first, `jlora.models.resize_vocabulary`, whose new rows are anything.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np

from jlora._errors import JloraWarning
from jlora.peft._contents import Contents
from jlora.peft._names import Param, Table


def resize_advice(contents: Contents, table: Table) -> str:
    """What to do where the file's vocabulary is another size than the tree's; or ""."""
    sizes: set[tuple[int, int]] = set()
    for key, value in {**contents.plain, **contents.base}.items():
        param = table.params.get(key)
        if param is not None and _has_tokens(param, table):
            sizes.add((value.shape[0], param.torch_shape(False)[0]))
    for module, stored in contents.adapters.items():
        param = table.weight(module)
        if param is not None and _has_tokens(param, table) and len(stored.tensors) > 1:
            a, b = stored.tensors.get("a"), stored.tensors.get("b")
            rows = a.shape[-1] if stored.table and a is not None else None
            rows = b.shape[0] if not stored.table and b is not None else rows
            if rows is not None:
                sizes.add((rows, param.torch_shape(False)[0]))
    other = {there for there, here in sizes if there != here}
    if len(other) != 1:
        return ""
    size = other.pop()
    return (
        f"\nIf tokens were added to the base (the file has {size}), make room first: "
        f"model, params = jlora.models.resize_vocabulary(model, params, {size})."
    )


def added_rows(param: Param, same: np.ndarray, table: Table) -> int:
    """How many rows at the end of a table are the file's own; 0 if others differ too.

    Args:
      param: the table or head.
      same: where the file's values are the base's, as PyTorch lays them out.
      table: all parameters.
    """
    if not _has_tokens(param, table):
        return 0
    equal = np.all(same, axis=tuple(range(1, same.ndim)))
    first = int(np.argmin(equal))
    # Of another base all rows differ, but perhaps for a few at the beginning.
    return 0 if 2 * first < len(equal) else len(equal) - first


def warn_of_added(where: str, found: Mapping[str, int], trained: bool) -> None:
    """Say what becomes of the rows that the file adds to a base."""
    names = ", ".join(f"{path!r} ({n} rows)" for path, n in found.items())
    what = (
        "are loaded as fully trained leaves, so that they are saved with the adapter"
        if trained
        else "are put into the base below the adapter: save it along"
    )
    warnings.warn(
        f"{where} carries added tokens; the tables {names} {what}.",
        JloraWarning,
        stacklevel=5,
    )


def _has_tokens(param: Param, table: Table) -> bool:
    """Whether the rows of PyTorch's parameter are tokens."""
    if param.name != "weight":
        return False
    if param.is_table or param.tied:
        return len(param.shape) == 2
    if param.axes() != (1, 1):
        return False
    rows = {p.shape[0] for p in table.params.values() if p.is_table}
    return param.torch_shape(False)[0] in rows
