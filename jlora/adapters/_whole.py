"""Sums of leaves and rows that are trained as they are: of what they change."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _compat
from jlora._errors import ShapeError
from jlora._kernel.axes import RANK, Array, accumulation_dtype
from jlora._kernel.nodes import Full, Rows
from jlora._kernel.placement import along
from jlora._kernel.quantized import dense
from jlora.adapters._sparse import Sparse


def sum_of_wholes(
    path: str, base: Array, nodes: Sequence[Full], weights: Sequence[Any],
    sparse: Sparse | None, keys: jax.Array | None,
) -> Full:  # fmt: skip
    """`base + Σ w·(value - base)`, or the thinned sum of these differences.

    Raises:
      ShapeError: a value of another shape than the base.
    """
    for x in nodes:
        if x.shape != tuple(base.shape):
            raise ShapeError(
                f"the leaf {path!r} {tuple(base.shape)} is trained whole and then has "
                f"the shape {x.shape}, so that its change has no sum with others.\n"
                "Give the base that shape first."
            )
    values = [x.value for x in nodes]
    return Full(_moved_whole(base, values, weights, keys, sparse=sparse))


def sum_of_rows(
    path: str, base: Array, nodes: Sequence[Rows], weights: Sequence[Any],
    sparse: Sparse | None, keys: jax.Array | None,
) -> Rows:  # fmt: skip
    """The same of the rows that any of the adapters trains."""
    indices = tuple(dict.fromkeys(i for x in nodes for i in x.indices))
    at = [np.array([indices.index(i) for i in x.indices]) for x in nodes]
    rows = [x.rows for x in nodes]
    where = np.array(indices)
    moved = _moved_rows(base, where, rows, at, weights, keys, sparse=sparse)
    return Rows(None, along(moved, (RANK, 1), base), indices)


@functools.partial(jax.jit, static_argnames="sparse")
@_compat.without_explicit_axes
def _moved_rows(
    base: Array, where: Array, rows: Sequence[Array], at: Sequence[Array],
    weights: Sequence[Any], keys: jax.Array | None, *, sparse: Sparse | None,
) -> Array:  # fmt: skip
    """The sum of trained rows; an adapter that has not one leaves it as it is."""
    dtype = jnp.result_type(*rows)
    start = dense(base)[where].astype(dtype)
    values = [start.at[n].set(x.astype(dtype)) for n, x in zip(at, rows, strict=True)]
    return _moved(start, values, weights, keys, sparse=sparse)


def _moved(
    base: Array, values: Sequence[Array], weights: Sequence[Any],
    keys: jax.Array | None, *, sparse: Sparse | None,
) -> Array:  # fmt: skip
    """The sum of values that stand in the place of the base."""
    dtype = accumulation_dtype(base.dtype)
    start, ends = base.astype(dtype), [x.astype(dtype) for x in values]
    if sparse is None:
        # The base counts for what is missing to one: a lone weight of one is exact.
        total = (1 - sum(weights)) * start
        for w, x in zip(weights, ends, strict=True):
            total = total + w * x
    else:
        updates = jnp.stack([(x - start).reshape(-1) for x in ends])
        each = jnp.stack([jnp.asarray(w, dtype) for w in weights])
        total = start + sparse.sum(updates, each, keys).reshape(base.shape)
    return total.astype(values[0].dtype)


_moved_whole = jax.jit(
    _compat.without_explicit_axes(_moved, like=0), static_argnames="sparse"
)
