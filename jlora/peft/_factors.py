"""One node's adapters as matrices, and adapters made of matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._errors import ShapeError, StructureError
from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import RANK, Dims, align
from jlora._kernel.nodes import LowRank
from jlora._kernel.placement import sharding_of
from jlora._kernel.quantized import dense
from jlora._processes import on_host
from jlora._tree.lorafy import lorafy
from jlora._tree.targets import Target
from jlora.peft._layouts import Layout, Pair

# -- from PEFT -------------------------------------------------------------------------


def new_adapter(
    path: str, leaves: Mapping[str, Any], layout: Layout, pair: Pair,
    scale: np.float32, **settings: Any,
) -> Adapter:  # fmt: skip
    """An adapter with PEFT's values, sharded along with its kernel.

    Args:
      path: the kernel's path.
      leaves: the kernel, and the bias of its layer if it has one, by path.
      layout: which of the kernel's axes are inputs.
      pair: the matrices.
      scale: alpha/r, or alpha/sqrt(r).
      **settings: as `lorafy` takes them.

    Raises:
      StructureError: a bias for a layer without.
    """
    shapes = {p: abstract(x) for p, x in leaves.items()}
    target = Target(
        in_axes=tuple(sorted(layout.ins)), out_axes=layout.outs,
        batch_axes=layout.batch,
    )  # fmt: skip
    node = lorafy(
        shapes, 1, {path: target}, dora=pair.magnitude is not None,
        lora_bias=pair.bias is not None, **settings,
    )[path]  # fmt: skip
    t = node.adapters[""]
    a, b = np.swapaxes(pair.a, -1, -2), np.swapaxes(pair.b, -1, -2)
    values: dict[str, np.ndarray] = {
        "a": a.reshape(*t.a.shape[:-1], pair.rank),
        "b": b.reshape(
            *layout.sizes(layout.batch), pair.rank, *layout.sizes(t.out_axes)
        ),
        "scale": np.broadcast_to(scale, t.scale.shape),
    }
    if pair.magnitude is not None:
        values["magnitude"] = pair.magnitude.reshape(t.magnitude.shape)
    if pair.bias is not None:
        values["bias"] = pair.bias.reshape(t.bias.shape)
    placed = {n: put(x, getattr(t, n).sharding) for n, x in values.items()}
    return dataclasses.replace(t, **placed)


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = sharding_of(leaf)
    named = sharding if isinstance(sharding, jax.sharding.NamedSharding) else None
    return jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype, sharding=named)


def put(value: np.ndarray, sharding: Any) -> jax.Array:
    """The values as an array, on a mesh if that is where the sharding is."""
    value = np.asarray(value, order="C")
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.device_put(value, sharding)
    return jnp.asarray(value)


# -- to PEFT ---------------------------------------------------------------------------


def exported(node: LowRank, layout: Layout) -> tuple[Pair, float]:
    """A node's matrices and their common scale.

    Adapters on slices of a fused kernel become one: A is stacked, B is block-diagonal,
    and where their scales differ the ratio is multiplied into B and the bias. Outside
    of its slice a bias is zero, and a magnitude the length that the base's column has.

    Raises:
      StructureError: the tree is abstract; there is one adapter for each of a stack's
        layers; only some of a kernel's adapters have a magnitude or a bias, or it is
        along the rows of a table.
      ShapeError: an adapter whose axes are not those of a matrix.
    """
    terms = list(node.adapters.values())
    if not terms:
        raise StructureError(f"the node {node.path!r} has no adapter.")
    for t in terms:
        _check_exportable(node, t, layout)
    scales = [on_host(t.scale).astype(np.float32) for t in terms]
    common = max((float(s) for scale in scales for s in scale.ravel()), key=abs)
    a = [_whole(node, t, t.a, t.a_dims, (*t.batch_axes, RANK, *sorted(t.in_axes)))
         for t in terms]  # fmt: skip
    b = [
        _scaled(
            _whole(node, t, t.b, t.b_dims,
                   (*t.batch_axes, *sorted(t.out_axes), RANK)),
            scale, common)
        for t, scale in zip(terms, scales, strict=True)
    ]  # fmt: skip
    biases = [
        _scaled(_outputs(node, t, t.bias), scale, common)
        for t, scale in zip(terms, scales, strict=True)
        if t.bias is not None
    ]
    many = layout.sizes(layout.batch)
    a = [x.reshape(*many, t.rank, -1) for x, t in zip(a, terms, strict=True)]
    b = [x.reshape(*many, -1, t.rank) for x, t in zip(b, terms, strict=True)]
    pair = Pair(
        np.ascontiguousarray(np.concatenate(a, axis=-2)),
        np.ascontiguousarray(np.concatenate(b, axis=-1)),
        _magnitude(node, terms, layout),
        sum(biases[1:], biases[0]).reshape(*many, -1) if biases else None,
    )
    if layout.kind != "table" or terms[0].in_axes == (0,):
        return pair, common
    if pair.magnitude is not None or pair.bias is not None:
        raise StructureError(
            f"the adapter of the table {node.path!r} {node.shape} has outputs along "
            "its rows, and a magnitude or bias there; PEFT has one along its columns."
            "\nAdapt it with Target(in_axes=(0,))."
        )
    return pair.swapped(), common


def _scaled(x: np.ndarray, scale: np.ndarray, common: float) -> np.ndarray:
    """Times `scale / common`, in x's dtype; x begins with the scale's axes."""
    if np.all(scale == np.float32(common)):
        return x
    ones = (1,) * (x.ndim - scale.ndim)
    ratio = scale.reshape(scale.shape + ones) / np.float32(common)
    return (x * ratio).astype(x.dtype)


def _magnitude(
    node: LowRank, terms: list[Adapter], layout: Layout
) -> np.ndarray | None:
    if terms[0].magnitude is None:
        return None
    wholes = [_outputs(node, t, t.magnitude) for t in terms]
    out = wholes[0]
    if not all(t.covers(node.shape) for t in terms):
        base = np.square(on_host(dense(node.base)).astype(np.float32))
        others = tuple(d for d in range(node.ndim) if d not in terms[0].o_dims)
        out = np.sqrt(np.sum(base, axis=others)).astype(wholes[0].dtype)
        for t, whole in zip(terms, wholes, strict=True):
            inside = _outputs(node, t, np.ones_like(t.magnitude, dtype=bool))
            out = np.where(inside, whole, out)
    return out.reshape(*layout.sizes(layout.batch), -1)


def _check_exportable(node: LowRank, t: Adapter, layout: Layout) -> None:
    if isinstance(t.a, jax.ShapeDtypeStruct | jax.core.Tracer):
        raise StructureError(
            f"the adapter of {node.path!r} has no values.\nSave a tree of arrays, "
            "outside of jax.jit."
        )
    if t.batch_axes != layout.batch:
        raise StructureError(
            f"the kernel {node.path!r} {node.shape} is a stack with one adapter for "
            "each of its layers; PEFT has one module for each layer.\nUnstack it first."
            if t.batch_axes
            else f"the adapter of {node.path!r} {node.shape} has one A and B for all "
            "experts; PEFT has a pair for each.\nAdapt it with "
            "Target(in_axes=(1,), out_axes=(2,), batch_axes=(0,))."
        )
    first = next(iter(node.adapters.values()))
    for name in ("magnitude", "bias"):
        if (getattr(t, name) is None) != (getattr(first, name) is None):
            raise StructureError(
                f"of the adapters on {node.path!r} some have a {name} and some do not; "
                "PEFT has one adapter there."
            )
    if {*t.in_axes, *t.out_axes, *t.batch_axes} != set(range(node.ndim)):
        raise ShapeError(
            f"the adapter of {node.path!r} {node.shape} does not span all its axes, so "
            "it is no linear layer's."
        )
    axes = {*t.in_axes}, {*t.out_axes}
    told = {*layout.ins}, {*layout.outs}
    if axes != told and not (layout.kind == "table" and axes == told[::-1]):
        raise ShapeError(
            f"the adapter of {node.path!r} {node.shape} has inputs {t.in_axes} and "
            f"outputs {t.out_axes}; in PyTorch this {layout.kind} kernel has inputs "
            f"{layout.ins} and outputs {layout.outs}."
        )


def _outputs(node: LowRank, t: Adapter, x: Any) -> np.ndarray:
    """A magnitude or a bias over all outputs, in the kernel's order."""
    return _whole(node, t, x, t.o_dims, tuple(sorted(t.o_dims)))


def _whole(node: LowRank, t: Adapter, x: Any, dims: Dims, order: Dims) -> np.ndarray:
    """A factor in the given order of dimensions, zero outside of the term's window."""
    value = on_host(align(x, dims, order))
    pads = [
        (0, 0) if d == RANK else (t.starts[d], node.shape[d] - t.starts[d] - n)
        for d, n in zip(order, value.shape, strict=True)
    ]
    return np.pad(value, pads)
