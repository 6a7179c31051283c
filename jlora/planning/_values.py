"""Values of a program as a device holds them: a shape, and how a mesh cuts it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

#: Of each dimension, the mesh axes that it is cut over.
Spec = tuple[tuple[str, ...], ...]
#: The sizes of mesh axes.
Sizes = Mapping[str, int]


@dataclasses.dataclass(eq=False)
class Value:
    """A value that a program computes; compared by identity.

    Attributes:
      shape: the whole value's.
      itemsize: bytes of a number.
      spec: how it is cut.
      bytes: what a device holds of it.
      is_data: whether it depends on the batch. Where a mesh axis cuts the batch and a
        parameter, it is the parameter that is gathered.
      what: the operation that made it.
      is_same: whether it is made of one number, so that each device makes what part of
        it the program needs.
    """

    shape: tuple[int, ...]
    itemsize: float
    spec: Spec
    bytes: int
    is_data: bool = False
    what: str = ""
    is_same: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether every device holds all of it."""
        return not any(self.spec)


def value(
    shape: Sequence[int], dtype: Any, spec: Spec, sizes: Sizes, **more: Any
) -> Value:
    """Return a value of that shape and dtype, cut so.

    >>> value((6, 5), "float32", (("data",), ()), {"data": 2}).bytes
    60
    """
    shape = tuple(shape)
    spec = spec or ((),) * len(shape)
    itemsize = bytes_of(dtype)
    part = [
        -(-size // math.prod(sizes[a] for a in axes))
        for size, axes in zip(shape, spec, strict=True)
    ]
    return Value(shape, itemsize, spec, int(math.prod(part) * itemsize), **more)


def bytes_of(dtype: Any) -> float:
    """Return the bytes of one number; a PRNG key's are those of its counters."""
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return 8.0
    dtype = np.dtype(dtype)
    bits = {"int4": 4, "uint4": 4, "float4_e2m1fn": 4, "int2": 2, "uint2": 2}
    return bits.get(dtype.name, 8 * dtype.itemsize) / 8


def spec_of(spec: Any, ndim: int) -> Spec:
    """Return a `PartitionSpec` with the axes of each of `ndim` dimensions as a tuple.

    >>> spec_of(jax.sharding.PartitionSpec("a", None), 3)
    (('a',), (), ())
    """
    parts = [*tuple(spec), *[None] * ndim][:ndim]
    whole = (None, jax.sharding.PartitionSpec.UNCONSTRAINED)
    return tuple(
        () if part in whole else (part,) if isinstance(part, str) else tuple(part)
        for part in parts
    )
