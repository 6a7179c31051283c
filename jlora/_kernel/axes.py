"""Arrays with labelled axes: contract, align, expand and pad them by label.

A factor's axes are labelled by the kernel dimensions that they lie along, with `RANK`
for the rank axis and `BANK` for one of several adapters. Transposing, slicing or
reshaping a kernel then means renaming dimensions or touching one small factor, and a
contraction needs no fixed layout.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _compat
from jlora._kernel.product import factor_product

Array = Any  # jax.Array, or a ShapeDtypeStruct in an abstract tree
Dims = tuple[int, ...]
Label = Any  # an int names a kernel dimension, ("x", i) an axis that only x has

RANK = -1
BANK = -3


def accumulation_dtype(dtype: Any) -> Any:
    """What kernels of a dtype are summed in: float32, or float64 where they are."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def rounded(x: Array, dtype: Any) -> Array:
    """X with the numbers of a dtype, in its own.

    XLA may leave out a cast to bfloat16 and back; this stays.
    """
    info = jnp.finfo(dtype)
    largest = (2 - 2.0**-info.nmant) * 2.0 ** (2 ** (info.nexp - 1) - 1)
    if float(info.max) != largest:  # not as IEEE has it, as float8_e4m3fn
        return x.astype(dtype).astype(x.dtype)
    near = lax.reduce_precision(x, info.nexp, info.nmant)
    if info.nexp == jnp.finfo(x.dtype).nexp:
        return near
    # It takes the dtype's subnormal numbers for zero, 6e-5 and less in float16.
    step = float(info.smallest_subnormal)
    even = x + lax.stop_gradient(jnp.round(x / step) * step - x)
    return jnp.where(jnp.abs(x) < float(info.tiny), even, near)


def contract(
    x: Array, x_labels: Sequence[Hashable], y: Array, y_labels: Sequence[Hashable],
    keep: Collection[Hashable], **dot_params: Any,
) -> tuple[Array, tuple[Hashable, ...]]:  # fmt: skip
    """Contract two arrays over every label they share, save those to keep.

    Returns:
      The product and its labels: shared ones that are kept, then x's, then y's.
    """
    shared = [n for n in x_labels if n in y_labels]
    batch = [n for n in shared if n in keep]
    inner = [n for n in shared if n not in keep]

    def axes(labels: Sequence[Hashable], names: Sequence[Hashable]) -> list[int]:
        return [list(labels).index(n) for n in names]

    numbers = (
        (axes(x_labels, inner), axes(y_labels, inner)),
        (axes(x_labels, batch), axes(y_labels, batch)),
    )
    free = [n for n in (*x_labels, *y_labels) if n not in shared]
    labels = (*batch, *free)
    if not (_compat.is_explicit(x) or _compat.is_explicit(y)):
        return factor_product(x, y, numbers, **dot_params), labels
    specs = [_compat.explicit_specs(x, x_labels), _compat.explicit_specs(y, y_labels)]
    both = {**specs[1], **{n: s for n, s in specs[0].items() if s}}
    kept, clash = _once_each([both.get(n) for n in labels])
    if clash or any(spec.get(n) for spec in specs for n in inner):
        # Explicit sharding wants to be told what a sharded contraction gives: what
        # remains keeps its sharding, the contracted axes are summed over the mesh.
        on = x if _compat.is_explicit(x) else y
        dot_params["out_sharding"] = _compat.on_mesh_of(on, kept)
    return lax.dot_general(x, y, numbers, **dot_params), labels


def _once_each(parts: Sequence[Any]) -> tuple[list[Any], bool]:
    """A partition spec in which no mesh axis stands twice; whether one did."""
    used: set[Any] = set()
    kept: list[Any] = []
    for part in parts:
        names = part if isinstance(part, tuple) else (part,) if part else ()
        kept.append(None if used & {*names} else part)
        used.update(names)
    return kept, kept != list(parts)


def outer_sum(
    x: Array, x_labels: Dims, y: Array, y_labels: Dims
) -> tuple[Array, tuple[Hashable, ...]]:
    """Contract two arrays over `RANK` as a sum of broadcast products, one a rank.

    XLA fuses such a sum with what it is added to; a product it writes to memory first.

    Returns:
      The sum and its labels, in order.
    """
    return _outer_sum(x, x_labels, y, y_labels), _dims_of(x_labels, y_labels)


def _dims_of(*labels: Dims) -> Dims:
    return tuple(sorted(set().union(*labels) - {RANK}))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 3))
def _outer_sum(x: Array, x_labels: Dims, y: Array, y_labels: Dims) -> Array:
    order = (RANK, *_dims_of(x_labels, y_labels))
    x, y = expand(x, x_labels, order), expand(y, y_labels, order)
    terms = (
        lax.index_in_dim(x, r, keepdims=False) * lax.index_in_dim(y, r, keepdims=False)
        for r in range(x.shape[0])
    )
    return functools.reduce(operator.add, terms)


@_outer_sum.defjvp
def _outer_sum_jvp(
    x_labels: Dims, y_labels: Dims, primals: Any, tangents: Any
) -> tuple[Array, Array]:
    """Products, whose transposes are products: a sum's take a pass for each rank."""
    dims = _dims_of(x_labels, y_labels)

    def product(x: Array, y: Array) -> Array:
        out, labels = contract(x, x_labels, y, y_labels, dims, precision="highest")
        return align(out, labels, dims)

    (x, y), (dx, dy) = primals, tangents
    out = _outer_sum(x, x_labels, y, y_labels)
    return out, product(dx, y) + product(x, dy)


def align(x: Array, labels: Sequence[Hashable], order: Sequence[Hashable]) -> Array:
    """Transpose x so that its axes come in that order."""
    perm = [list(labels).index(n) for n in order]
    return x if perm == list(range(len(perm))) else lax.transpose(x, perm)


def expand(x: Array, labels: Sequence[Hashable], order: Sequence[Hashable]) -> Array:
    """X with its axes in that order, and one of size 1 for each label it lacks."""
    x = align(x, labels, [n for n in order if n in labels])
    lacking = [i for i, n in enumerate(order) if n not in labels]
    return lax.expand_dims(x, lacking) if lacking else x


def pad_to(x: Array, starts: Sequence[int | None], shape: Sequence[int]) -> Array:
    """Zero-pad a window to the whole; an axis whose start is None stays as it is."""
    pads = [
        (0, 0, 0) if start is None else (start, size - start - n, 0)
        for n, start, size in zip(x.shape, starts, shape, strict=True)
    ]
    return lax.pad(x, jnp.zeros((), x.dtype), pads) if any(map(any, pads)) else x
