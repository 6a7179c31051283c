"""Trained rows of a table: new tokens, without training the whole embedding."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora import _compat
from jlora._errors import ShapeError, TargetError
from jlora._kernel.axes import RANK
from jlora._kernel.nodes import Rows
from jlora._kernel.placement import placed
from jlora._kernel.quantized import dense, is_abstract
from jlora._tree.targets import Leaves, check_float, matches


def token_rows(
    entries: Mapping[str, Sequence[int]], leaves: Leaves, taken: Collection[str]
) -> dict[str, tuple[int, ...]]:
    """The rows to train, by the table's path.

    Raises:
      TargetError: an entry that hits nothing, or what is adapted or trained already.
      ShapeError: a leaf that is no table, or rows that it does not have.
    """
    found: dict[str, tuple[int, ...]] = {}
    for entry, indices in entries.items():
        for path in sorted(matches([entry], leaves, "trainable_tokens")):
            if path in taken or path in found:
                raise TargetError(
                    f"trainable_tokens: {path!r} is a target, in train, or hit twice.\n"
                    "A table is adapted, trained, or has trained rows; choose one."
                )
            check_float(path, leaves[path])
            found[path] = _checked(path, leaves[path], indices)
    return found


def _checked(path: str, leaf: Any, indices: Sequence[int]) -> tuple[int, ...]:
    rows = tuple(operator.index(i) for i in indices)
    if len(leaf.shape) != 2:
        raise ShapeError(
            f"trainable_tokens: {path!r} {tuple(leaf.shape)} is no table [V, d]."
        )
    wrong = [i for i in rows if not 0 <= i < leaf.shape[0]]
    if wrong or len(set(rows)) != len(rows) or not rows:
        raise ShapeError(
            f"trainable_tokens: {path!r} {tuple(leaf.shape)} has rows 0 to "
            f"{leaf.shape[0] - 1}; "
            + (f"{wrong[:5]} are none of them." if wrong else "name some, each once.")
        )
    return rows


def make_rows(path: str, leaf: Any, indices: tuple[int, ...], dtype: Any) -> Rows:
    """The node of a table; its rows start as they are."""
    if is_abstract(leaf):
        return Rows(leaf, abstract_rows(leaf, len(indices), dtype), indices, path)
    rows = _compat.take_rows(dense(leaf), jnp.asarray(indices)).astype(dtype)
    return Rows(leaf, rows, indices, path)


def abstract_rows(leaf: Any, count: int, dtype: Any) -> jax.ShapeDtypeStruct:
    """The shape of that many rows, sharded as the table is along their width."""
    shape = jax.ShapeDtypeStruct((count, leaf.shape[1]), dtype)
    return placed(shape, (RANK, 1), leaf)
