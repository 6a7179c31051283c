"""Adapters of a lower rank as ones of a higher: the same function, another shape.

Columns of zeros are added to A and rows of zeros to B. The scale stays, and so do
DoRA's lengths. Neither zeros has a gradient while the other is zero, so that training
goes on as it did.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding

from jlora._errors import ShapeError
from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import RANK, Dims
from jlora._kernel.nodes import LowRank
from jlora._paths import Tree, map_with_path
from jlora.adapters._parts import Part, is_part

Ranks = Callable[[str, str], int]


def pad_parts(parts: Tree, rank_of: Ranks) -> Tree:
    """Every adapter of a tree of parts with the rank `rank_of(path, role)`.

    Raises:
      ShapeError: one has a higher rank already.
    """

    def one(path: str, part: Part | None) -> Part | None:
        if part is None or not isinstance(part.node, LowRank):
            return part
        terms = part.node.adapters.items()
        wide = {role: padded(t, rank_of(path, role), path) for role, t in terms}
        return Part(dataclasses.replace(part.node, adapters=wide))

    return map_with_path(one, parts, is_leaf=is_part)


def padded(t: Adapter, rank: int, path: str) -> Adapter:
    """The same term with that rank.

    Raises:
      ShapeError: it has a higher one already.
    """
    if rank < t.rank:
        raise ShapeError(
            f"the adapter of {path!r} has rank {t.rank} and cannot be padded to "
            f"{rank}.\nPass the largest rank there is, or compress it: "
            f"jlora.weighted(adapters, {{name: 1.0}}, 'svd', rank={rank})."
        )
    if rank == t.rank:
        return t
    return dataclasses.replace(
        t, a=_with_zeros(t.a, t.a_dims, rank), b=_with_zeros(t.b, t.b_dims, rank)
    )


def _with_zeros(x: Any, dims: Dims, rank: int) -> Any:
    axis = dims.index(RANK)
    more = [(0, rank - n if i == axis else 0, 0) for i, n in enumerate(x.shape)]
    pad = lambda x: lax.pad(x, x.dtype.type(0), more)  # noqa: E731
    traced = isinstance(x, jax.core.Tracer)
    sharding = None if traced else getattr(x, "sharding", None)
    if isinstance(x, jax.ShapeDtypeStruct):
        out = jax.eval_shape(pad, x)
        return jax.ShapeDtypeStruct(out.shape, out.dtype, sharding=sharding)
    if isinstance(sharding, NamedSharding):
        return jax.jit(pad, out_shardings=sharding)(x)
    return pad(x)
