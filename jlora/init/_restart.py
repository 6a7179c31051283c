"""Other factors in the place of a fresh adapter's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import Array
from jlora._kernel.nodes import LowRank, is_node, with_origin
from jlora._kernel.placement import placed_adapter
from jlora._paths import map_with_path
from jlora._tree.from_kernel import start_from_kernel
from jlora._tree.initializers import FromKernel

Tree = Any


def map_nodes(f: Callable[[str, LowRank], Any], tree: Tree) -> Tree:
    """The tree with every low-rank node changed by `f(path, node)`."""

    def one(path: str, x: Any) -> Any:
        return f(path, x) if isinstance(x, LowRank) else x

    return with_origin(map_with_path(one, tree, is_node))


def with_factors(t: Adapter, a: Array, b: Array, scale: Array, leaf: Array) -> Adapter:
    """The adapter with other factors, of another rank perhaps, sharded as the kernel.

    Args:
      t: the adapter, of which dtype and the rest stay.
      a: `[n, i, r]`, an entry for each matrix of a stack.
      b: `[n, r, o]`.
      scale: as the adapter's.
      leaf: the kernel.
    """
    rank, many = a.shape[-1], len(t.batch_axes)
    shape_a = (*t.a.shape[:-1], rank)
    shape_b = (*t.b.shape[:many], rank, *t.b.shape[many + 1 :])
    a, b = (x.astype(t.a.dtype) for x in (a, b))
    made = dataclasses.replace(t, a=a.reshape(shape_a), b=b.reshape(shape_b))
    return placed(dataclasses.replace(made, scale=scale), leaf)


def from_kernels(
    init: FromKernel, tree: Tree, data: Callable[[str, LowRank, Adapter], Any]
) -> Tree:
    """The tree whose adapters were made of its kernels and of what is known of them.

    Args:
      init: makes the factors.
      tree: fresh from lorafy.
      data: what `init` takes beside a kernel: `[n, ...]`, an entry for each matrix.
    """

    def one(path: str, x: LowRank) -> LowRank:
        base, adapters = x.base, {}
        for name, t in x.adapters.items():
            more = data(path, x, t)
            key = jax.random.key(0)  # nothing is drawn
            made, base = start_from_kernel(init, key, base, t, path, more)
            # DoRA's magnitude stays: base and product have the sum that they had.
            adapters[name] = placed(made, x.base)
        return LowRank(base, adapters, path)

    return map_nodes(one, tree)


def placed(t: Adapter, leaf: Array) -> Adapter:
    """The adapter on the mesh that its kernel is on."""
    where = placed_adapter(t, leaf)
    if where.a.sharding is None:
        return t
    return jax.device_put(t, jax.tree.map(lambda x: x.sharding, where))
