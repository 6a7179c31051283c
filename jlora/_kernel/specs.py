"""Entries of partition specs: the mesh axes that they name, and whether they fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jax.sharding import PartitionSpec


def names_of(part: Any) -> tuple[str, ...]:
    """The mesh axes that an entry of a partition spec names."""
    if part is None or part is PartitionSpec.UNCONSTRAINED:
        return ()
    return part if isinstance(part, tuple) else (part,)


def fitting(spec: PartitionSpec, shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """A spec without the entries that do not divide their axis of the shape.

    An adapter on a part of a fused kernel may be cut less finely than the kernel.

    >>> mesh = jax.sharding.AbstractMesh((2,), ("x",))
    >>> tuple(fitting(PartitionSpec("x", None), (3, 4), mesh))
    (None, None)
    """

    def ways(part: Any) -> int:
        return math.prod(mesh.shape.get(name, 1) for name in names_of(part))

    pairs = zip(tuple(spec), shape, strict=False)
    return PartitionSpec(*(None if n % ways(part) else part for part, n in pairs))
