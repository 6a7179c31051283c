"""Operations whose result's sharding JAX wants to be told on a mesh of explicit axes.

`jax.make_mesh` makes such meshes by default. There an array's sharding is part of its
type, `jax.typeof(x).sharding`, and where two inputs leave more than one possibility,
the program has to choose. Elsewhere these functions are the plain ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def take_rows(table: Array, ids: Array) -> Array:
    """Return `table[ids]`, `[..., d]`, of `table` `[V, d]`; NaN beyond the table.

    On a mesh of explicit axes the result lies as `ids` do, and its last axis as the
    table's, so far as `ids` leave that free.
    """
    mesh = _mesh(ids, table)
    if mesh is None:
        return jnp.take(_whole_rows(table), ids, axis=0)
    spec = _distinct(*_spec(ids), *_spec(table)[1:])
    return table.at[ids].get(mode="fill", out_sharding=NamedSharding(mesh, spec))


def without_explicit_axes(f: Callable[..., Array], rows: Array, *args: Any) -> Array:
    """Return `f(rows, *args)`, computed where XLA chooses the shardings.

    Args:
      f: what would need a choice at every step.
      rows: `[B, ...]`; the result's first axis lies as its first one does.
      *args: the other arguments.
    """
    mesh = _mesh(rows, *jax.tree.leaves(args))
    if mesh is None:
        return f(rows, *args)
    spec = PartitionSpec(_spec(rows)[0] if _mesh(rows) is not None else None)
    free = jax.sharding.auto_axes(f, out_sharding=NamedSharding(mesh, spec))
    return free(rows, *args)


def by_example(x: Any) -> Any:
    """Return hidden states `[B, T, d]`, or a tree of them, cut by examples and tokens.

    Where weights are cut over the axes that cut the batch, XLA may also cut the hidden
    states along d and sum every layer's outputs, rather than gather its weights. On a
    mesh that is set (`jax.set_mesh`, or a step's `mesh`) and whose axes are XLA's to
    use this says that examples stay over `data` and `fsdp`, and tokens over `sequence`.
    Elsewhere it says nothing.
    """
    data, tokens = _free("data", "fsdp"), _free("sequence")
    if not data and not tokens:
        return x

    def even(names: dict[str, int], size: int) -> tuple[str, ...] | None:
        return tuple(names) if names and size % math.prod(names.values()) == 0 else None

    def cut(x: Any) -> Any:
        if getattr(x, "ndim", 0) != 3:
            return x
        spec = PartitionSpec(even(data, x.shape[0]), even(tokens, x.shape[1]), None)
        return jax.lax.with_sharding_constraint(x, spec)

    return jax.tree.map(cut, x)


def on_own_examples(f: Callable[..., Array], weights: Any, *rows: Array) -> Array:
    """Return `f(weights, *rows)`, on a mesh computed by each device for its own rows.

    What sorts the rows of a batch would otherwise sort them over all devices, and
    exchange hidden states for it.

    Args:
      f: what treats each row of `rows` apart.
      weights: what it needs of all devices.
      *rows: `[N, ...]`, cut along N over the axes that cut a batch.
    """
    data = _free("data", "fsdp", "sequence")
    if not data or rows[0].shape[0] % math.prod(data.values()):
        return f(weights, *rows)
    cut = PartitionSpec(tuple(data))
    return jax.shard_map(
        f,
        in_specs=(PartitionSpec(), *[cut] * len(rows)),
        out_specs=cut,
        axis_names={*data},
        check_vma=False,
    )(weights, *rows)


def _whole_rows(table: Array) -> Array:
    """Return a table `[V, d]` of which every device has rows in full.

    Otherwise the rows that are looked up are cut as the table's are, along d over
    `fsdp`, and XLA makes them whole and cuts them anew by examples.
    """
    if not _free("fsdp"):
        return table
    spec = PartitionSpec(PartitionSpec.UNCONSTRAINED, None)
    return jax.lax.with_sharding_constraint(table, spec)


def _free(*names: str) -> dict[str, int]:
    """Return the sizes of those axes of the mesh that is set that XLA may use."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return {n: mesh.shape[n] for n in names if kinds.get(n) == AxisType.Auto}


def _mesh(*arrays: Any) -> Any:
    """Return the mesh that some of `arrays` are typed by, or `None`."""
    for x in arrays:
        mesh = getattr(jax.typeof(x).sharding, "mesh", None)
        if mesh is not None and AxisType.Explicit in getattr(mesh, "axis_types", ()):
            return mesh
    return None


def _spec(x: Any) -> tuple[Any, ...]:
    """Return over which axes of the mesh each axis of `x` is split."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (jnp.ndim(x) - len(spec))


def _distinct(*axes: Any) -> PartitionSpec:
    """Return a specification in which no axis of the mesh occurs twice."""
    used: set[str] = set()
    kept = []
    for axis in axes:
        names = axis if isinstance(axis, tuple) else (axis,)
        kept.append(None if used & {*names} else axis)
        used |= {name for name in names if name is not None}
    return PartitionSpec(*kept)
