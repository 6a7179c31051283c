"""Batches on a mesh: examples over the data axes, tokens over `sequence`."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora._errors import OptionError, ShapeError
from jlora._paths import map_with_path
from jlora.sharding._mesh import DATA_AXES, describe
from jlora.sharding._rules import Uneven, ways_of

Batch = Any


def batch_spec(ndim: int, mesh: Mesh, axis: int = 0) -> PartitionSpec:
    """How an array of a batch with so many axes is cut; its examples lie along `axis`.

    >>> mesh = jax.sharding.AbstractMesh((2, 4, 2), ("data", "fsdp", "tensor"))
    >>> tuple(batch_spec(2, mesh))
    (('data', 'fsdp'), None)
    """
    data = data_axes(mesh)
    tokens = "sequence" if "sequence" in mesh.axis_names else None
    parts = [None] * axis + [data or None, tokens] + [None] * ndim
    return PartitionSpec(*parts[:ndim])


def data_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes of a mesh that cut the examples of a batch."""
    return tuple(name for name in DATA_AXES if name in mesh.axis_names)


def data_ways(mesh: Mesh) -> int:
    """Into how many parts a mesh cuts the examples of a batch."""
    return ways_of(mesh, batch_spec(1, mesh)[0])


def batch_shard(mesh: Mesh) -> tuple[int, int]:
    """Which part of each batch this process reads, as `(index, count)`.

    `jlora.data.Batches` and `Streaming` take it as their `shard`, and `place_batch`
    makes one batch of the parts. Where the mesh cuts batches over all processes there
    are as many parts as these. Processes whose devices hold the same examples, those
    along a `tensor` axis say, read the same part. Of one process it is `(0, 1)`.

    Raises:
      OptionError: the examples of a process are no one part of a batch, for the mesh
        deals them out unevenly, or it has no device of this process.

    >>> batch_shard(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]))
    (0, 1)
    """
    ways = data_ways(mesh)
    where = NamedSharding(mesh, batch_spec(1, mesh))
    held: dict[int, set[int]] = {}
    device: Any
    for device, (rows,) in where.devices_indices_map((ways,)).items():
        held.setdefault(device.process_index, set()).add(rows.start or 0)
    parts = sorted(set(map(frozenset, held.values())), key=min)
    if jax.process_index() not in held:
        raise OptionError(
            f"the mesh {describe(mesh)} has no device of process "
            f"{jax.process_index()}.\nMake it of the devices of all processes."
        )
    each = ways // len(parts)
    even = [frozenset(range(i * each, (i + 1) * each)) for i in range(len(parts))]
    if parts != even:
        raise OptionError(
            f"the mesh {describe(mesh)} does not give each process one part of a "
            "batch.\nLet the axes `data` and `fsdp` come first, and their product be a "
            "multiple or a divisor of the number of processes."
        )
    return parts.index(frozenset(held[jax.process_index()])), len(parts)


def place_batch(
    batch: Batch,
    mesh: Mesh,
    *,
    uneven: Uneven = "error",
    axis: int = 0,
    whole: bool = False,
) -> Batch:
    """A batch on the mesh: its examples over `data` and `fsdp`.

    Args:
      batch: a tree of arrays `[B, ...]`. Of a mesh with an axis `sequence` the second
        axis of each, the tokens, is cut over that. With several processes each passes
        its own examples, see `batch_shard`, and the batch is all of them, in the order
        of the parts. Numbers are put on every device.
      mesh: the mesh.
      uneven: what to do where the mesh does not divide the examples or the tokens: an
        `"error"`, or `"replicate"`, not to cut that axis. Every device then computes
        all of it, and no example is lost or counted twice.
      axis: the one along which the examples lie; tokens lie along the next one.
      whole: with several processes, each passes the whole batch, all the same one.

    Raises:
      ShapeError: an axis that the mesh does not divide, or, with several processes and
        `"replicate"`, examples that are not alike in number.
    """
    return map_with_path(
        lambda path, x: _placed(path, x, mesh, uneven, axis, whole), batch
    )


def _placed(
    path: str, x: Any, mesh: Mesh, uneven: Uneven, first: int, whole: bool
) -> jax.Array:
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    parts = list(batch_spec(x.ndim, mesh, first))
    whole = whole or _is_global(x)
    shape = x.shape if whole else _global_shape(x, first, mesh)
    for axis, part in enumerate(parts):
        if shape[axis] % ways_of(mesh, part) == 0:
            continue
        if uneven == "error" or (jax.process_count() > 1 and not whole):
            raise _uneven(path, shape, axis, part, mesh, axis == first)
        parts[axis] = None
    where = NamedSharding(mesh, PartitionSpec(*parts))
    if jax.process_count() == 1 or _is_global(x):
        return jax.device_put(x, where)
    x = np.asarray(x)
    if whole:
        return jax.make_array_from_callback(shape, where, lambda index: x[index])
    return jax.make_array_from_process_local_data(where, x, shape)


def _is_global(x: Any) -> bool:
    return isinstance(x, jax.Array) and not x.is_fully_addressable


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that a tree's arrays lie on; None where they lie on none.

    >>> mesh_of({"w": jnp.ones(3)}) is None
    True
    """
    for x in jax.tree.leaves(tree):
        sharding = getattr(x, "sharding", None)
        traced = isinstance(x, jax.core.Tracer)
        if not traced and isinstance(sharding, NamedSharding):
            mesh = sharding.mesh
            if isinstance(mesh, Mesh):
                return mesh
    return None


def _global_shape(x: Any, axis: int, mesh: Mesh) -> tuple[int, ...]:
    """The shape of the batch of all processes; a number has none."""
    shape = list(x.shape)
    if len(shape) > axis and jax.process_count() > 1:
        shape[axis] *= batch_shard(mesh)[1]
    return tuple(shape)


def _uneven(
    path: str, shape: tuple[int, ...], axis: int, part: Any, mesh: Mesh, is_batch: bool
) -> ShapeError:
    what = "examples" if is_batch else "tokens"
    ways = ways_of(mesh, part)
    near = ways * -(-shape[axis] // ways)
    remedy = (
        f"Take a batch of {near}"
        if is_batch
        else f"Pad the tokens to {near}, a multiple of {ways}"
    )
    return ShapeError(
        f"batch {path + ' ' if path else ''}{list(shape)}: {shape[axis]} {what} do not "
        f"fall into {ways} equal parts, as the mesh {describe(mesh)} cuts them.\n"
        f"{remedy}, or pass uneven='replicate', so that every device computes all of "
        "them."
    )
