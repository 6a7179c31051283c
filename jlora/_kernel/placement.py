"""Where factors lie on a mesh: the kernel's partition spec, axis by axis."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jlora import _compat
from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import RANK, Array, Dims
from jlora._kernel.nodes import LowRank
from jlora._kernel.quantized import Quantized
from jlora._kernel.specs import fitting, names_of


def factor_spec(spec: PartitionSpec, dims: Dims, rank: Any = None) -> PartitionSpec:
    """The partition spec of a factor of a kernel partitioned by `spec`.

    Args:
      spec: the kernel's.
      dims: the kernel's dimension along each axis of the factor.
      rank: over which mesh axes the rank is cut; where they cut another axis of the
        factor already, it is whole.

    >>> tuple(factor_spec(PartitionSpec("x", "y"), (-1, 1)))
    (None, 'y')
    """
    parts = tuple(spec)
    own = [parts[d] if 0 <= d < len(parts) else None for d in dims]
    taken = {name for part in own for name in names_of(part)}
    if rank is not None and RANK in dims and not taken & {*names_of(rank)}:
        own[dims.index(RANK)] = rank
    return PartitionSpec(*own)


def place_spec(
    w: LowRank,
    spec: PartitionSpec,
    make: Callable[[PartitionSpec], Any] = lambda s: s,
    rank: Any = None,
) -> LowRank:
    """A node like w that holds, for each array, its part of the kernel's spec.

    `rank` is as of `factor_spec`.
    """

    def one(_: Array, dims: Dims) -> tuple[Any, Dims]:
        return make(factor_spec(spec, dims, rank)), dims

    base = w.base
    is_quantized = isinstance(base, Quantized)
    base = base.place_spec(spec, make) if is_quantized else make(spec)

    def place(t: Adapter) -> Adapter:
        which = None if t.which is None else make(PartitionSpec())
        return dataclasses.replace(t.map(one), which=which)

    return w.map(base, place)


def placed(x: Any, dims: Dims, leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape of a factor that lies along `dims` of a kernel, sharded as it is.

    A kernel that is on no named mesh, or is traced, gives a shape without sharding.
    """
    sharding = sharding_of(leaf)
    if isinstance(sharding, NamedSharding):
        spec = fitting(factor_spec(sharding.spec, dims), x.shape, sharding.mesh)
        sharding = NamedSharding(sharding.mesh, spec)
    else:
        sharding = None
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def sharding_of(leaf: Any) -> Any:
    """A kernel's sharding, of an array or quantised; None where it is traced.

    A quantised kernel's is that of its codes. Of dimensions that lie within its rows
    together the first may be cut.
    """
    if not isinstance(leaf, Quantized):
        traced = isinstance(leaf, jax.core.Tracer)
        return None if traced else getattr(leaf, "sharding", None)
    sharding = sharding_of(leaf.codes)
    if not isinstance(sharding, NamedSharding):
        return sharding
    cut = zip(leaf.along("codes"), tuple(sharding.spec), strict=False)
    parts = {d: part for d, part in cut if d is not None}
    spec = PartitionSpec(*(parts.get(d) for d in range(leaf.ndim)))
    return NamedSharding(sharding.mesh, spec)


def placed_adapter(adapter: Adapter, leaf: Any) -> Adapter:
    """An abstract adapter, sharded along with its kernel."""
    return adapter.map(lambda x, dims: (placed(x, dims, leaf), dims))


def along(x: Array, dims: Dims, kernel: Any) -> Array:
    """An array that lies along `dims` of a kernel, sharded as that is.

    A kernel that is traced says so only of the explicit axes of its mesh.
    """
    if isinstance(kernel, jax.core.Tracer) and _compat.is_explicit(kernel):
        spec = factor_spec(PartitionSpec(*_compat.spec(kernel)), dims)
        return _compat.reshard(x, _compat.on_mesh_of(kernel, tuple(spec)))
    sharding = sharding_of(kernel)
    if not isinstance(sharding, NamedSharding):
        return x
    spec = fitting(factor_spec(sharding.spec, dims), x.shape, sharding.mesh)
    return jax.device_put(x, NamedSharding(sharding.mesh, spec))
