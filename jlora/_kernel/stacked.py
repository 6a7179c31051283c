"""An adapter of a stack of kernels, taken apart for a scan over its first dimension."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import Array, Dims


def take_apart(t: Adapter) -> list[Array]:
    """Every array that spans the first dimension of the kernel, that axis first."""
    arrays: list[Array] = []

    def collect(x: Array, dims: Dims) -> tuple[Array, Dims]:
        if 0 in dims:
            arrays.append(jnp.moveaxis(x, dims.index(0), 0))
        return x, dims

    t.map(collect)
    return arrays


def rebuild(t: Adapter, slices: Sequence[Array]) -> Adapter:
    """The adapter of one kernel of the stack.

    Args:
      t: the stack's; arrays that do not span the stack are shared by all.
      slices: one of each array of `take_apart`.
    """
    feed = iter(slices)

    def pick(x: Array, dims: Dims) -> tuple[Array, Dims]:
        x = next(feed) if 0 in dims else x
        return x, tuple(d - 1 if d > 0 else d for d in dims if d != 0)

    return dataclasses.replace(t.map(pick), starts=t.starts[1:])
