"""One adapter as jlora's factors and as PEFT's matrices, A `[r, in]`, B `[out, r]`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._adapter import Adapter
from jlora._errors import ShapeError, StructureError
from jlora._labels import RANK, Dims, align
from jlora._lorafy import lorafy
from jlora._lowrank import LowRank
from jlora._targets import Target


@dataclasses.dataclass(frozen=True)
class Pair:
    """PEFT's matrices of one adapter.

    Attributes:
      a: `[r, in]`; of an embedding `[r, V]`.
      b: `[out, r]`; of an embedding `[d, r]`.
    """

    a: np.ndarray
    b: np.ndarray

    @property
    def rank(self) -> int:
        """The inner dimension r."""
        return self.a.shape[0]

    def swapped(self) -> Pair:
        """The matrices of the transposed use: a tied head's, from its table's."""
        return Pair(np.ascontiguousarray(self.b.T), np.ascontiguousarray(self.a.T))

    def equals(self, other: Pair) -> bool:
        """Whether all values are the same."""
        return np.array_equal(self.a, other.a) and np.array_equal(self.b, other.b)


# -- from PEFT -------------------------------------------------------------------------


def template(path: str, leaf: Any, *, table: bool, **settings: Any) -> Adapter:
    """The shapes, axes and shardings of a rank-1 adapter on a leaf.

    Args:
      path: the leaf's path.
      leaf: an array or its shape.
      table: whether the leaf is an embedding `[V, d]`.
      **settings: as `lorafy` takes them.
    """
    sharding = getattr(leaf, "sharding", None)
    named = sharding if isinstance(sharding, jax.sharding.NamedSharding) else None
    shape = jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype, sharding=named)
    target = Target(in_axes=(0,) if table else None)
    node = lorafy({path: shape}, 1, {path: target}, **settings)[path]
    return node.adapters[""]


def sizes(adapter: Adapter) -> tuple[int, int]:
    """How many inputs and outputs an adapter has."""
    return math.prod(adapter.a.shape[:-1]), math.prod(adapter.b.shape[1:])


def filled(adapter: Adapter, pair: Pair, scale: np.float32) -> Adapter:
    """The template with PEFT's values."""
    a = np.ascontiguousarray(pair.a.T).reshape(*adapter.a.shape[:-1], pair.rank)
    b = np.ascontiguousarray(pair.b.T).reshape(pair.rank, *adapter.b.shape[1:])
    return dataclasses.replace(
        adapter,
        a=put(a, adapter.a.sharding),
        b=put(b, adapter.b.sharding),
        scale=put(np.asarray(scale), adapter.scale.sharding),
    )


def put(value: np.ndarray, sharding: Any) -> jax.Array:
    """The values as an array, on a mesh if that is where the sharding is."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.device_put(value, sharding)
    return jnp.asarray(value)


# -- to PEFT ---------------------------------------------------------------------------


def exported(node: LowRank, *, table: bool) -> tuple[Pair, float]:
    """A node's matrices and their common scale.

    Adapters on slices of a fused kernel become one: A is stacked, B is block-diagonal,
    and where their scales differ the ratio is multiplied into B.

    Raises:
      StructureError: the tree is abstract, or there is one adapter for each of a
        stack's layers.
      ShapeError: an adapter whose axes are not those of a matrix.
    """
    terms = list(node.adapters.values())
    if not terms:
        raise StructureError(f"the node {node.path!r} has no adapter.")
    for t in terms:
        _check_exportable(node, t)
    scales = [float(np.asarray(t.scale)) for t in terms]
    common = max(scales, key=abs)
    parts = [_matrices(node, t) for t in terms]
    blocks = [
        pair.b if scale == common else (pair.b * np.float32(scale / common))
        for pair, scale in zip(parts, scales, strict=True)
    ]
    blocks = [x.astype(pair.b.dtype) for x, pair in zip(blocks, parts, strict=True)]
    a = np.concatenate([pair.a for pair in parts], axis=0)
    b = np.concatenate(blocks, axis=1)
    pair = Pair(np.ascontiguousarray(a), np.ascontiguousarray(b))
    swapped = table and terms[0].a_only == (1,)
    return (pair.swapped() if swapped else pair), common


def _check_exportable(node: LowRank, t: Adapter) -> None:
    if isinstance(t.a, jax.ShapeDtypeStruct | jax.core.Tracer):
        raise StructureError(
            f"the adapter of {node.path!r} has no values.\nSave a tree of arrays, "
            "outside of jax.jit."
        )
    if t.both or t.scale.shape:
        raise StructureError(
            f"the kernel {node.path!r} {node.shape} is a stack with one adapter for "
            "each of its layers or experts; PEFT has one module for each layer.\n"
            "Unstack it first."
        )
    if {*t.a_only, *t.b_only} != set(range(node.ndim)):
        raise ShapeError(
            f"the adapter of {node.path!r} {node.shape} does not span all its axes, so "
            "it is no linear layer's."
        )


def _matrices(node: LowRank, t: Adapter) -> Pair:
    """One term's matrices, zero outside of its window."""
    ins, outs = tuple(sorted(t.a_only)), tuple(sorted(t.b_only))
    if outs and ins and node.ndim > 2 and max(ins) > min(outs):
        raise ShapeError(
            f"the kernel {node.path!r} {node.shape} has outputs {outs} before inputs "
            f"{ins}; PyTorch's name for it is not known."
        )
    a = _whole(node, t, t.a, t.a_dims, (RANK, *ins))
    b = _whole(node, t, t.b, t.b_dims, (*outs, RANK))
    return Pair(a.reshape(t.rank, -1), b.reshape(-1, t.rank))


def _whole(node: LowRank, t: Adapter, x: Any, dims: Dims, order: Dims) -> np.ndarray:
    value = np.asarray(align(x, dims, order))
    pads = [
        (0, 0) if d == RANK else (t.starts[d], node.shape[d] - t.starts[d] - n)
        for d, n in zip(order, value.shape, strict=True)
    ]
    return np.pad(value, pads)
