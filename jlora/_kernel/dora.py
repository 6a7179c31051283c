"""DoRA: a kernel's columns keep a trained length, whatever their direction becomes.

    W' = m · (W + s·A·B) / ‖W + s·A·B‖        the norm is that of each output's column

So W' is `g·W + s·A·(g·B)` with the gain g = m / ‖W + s·A·B‖: ordinary low-rank terms,
and a factor for each output of the frozen product. The norm has no gradient.

Source: Liu et al. 2024, arXiv:2402.09353, section 4.3 for the detached norm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import (
    BANK,
    RANK,
    Array,
    Dims,
    accumulation_dtype,
    align,
    contract,
    expand,
    pad_to,
)
from jlora._kernel.quantized import Quantized
from jlora._kernel.stacked import rebuild, take_apart

_RANK_TOO = -2  # the rank axis of the second A in Aᵀ·A


def column_norm(base: Array, t: Adapter) -> Array:
    """‖W + s·A·B‖ of every output's column, laid out as `o_dims`.

    In float32, or in float64 for a kernel of that.

    The sum is never formed. Of column o the square is
    ‖W‖² + 2s·Σ_r (Aᵀ·W)[r,o]·B[r,o] + s²·Σ_r (Aᵀ·A·B)[r,o]·B[r,o].

    Args:
      base: the kernel; of it the adapter's window counts. A stack of quantised ones
        is read one at a time.
      t: the adapter, with `o_dims`.
    """
    if isinstance(base, Quantized):
        stacked = base.is_sliceable and t.o_dims[0] == 0 and t.full(0, base.shape[0])
        if not stacked:
            return column_norm(base.dense(), t)
        t = dataclasses.replace(t, key=None, magnitude=None, bias=None)
        outs = tuple(d - 1 for d in t.o_dims if d)

        def one_of_stack(slices: tuple[Quantized, list[Array]]) -> Array:
            one = dataclasses.replace(rebuild(t, slices[1]), o_dims=outs)
            return column_norm(slices[0], one)

        return lax.map(one_of_stack, (base, take_apart(t)))
    dims = tuple(range(base.ndim))
    sizes = [t.size(d) or n for d, n in enumerate(base.shape)]
    ends = [start + n for start, n in zip(t.starts, sizes, strict=True)]
    window = lax.slice(base, t.starts, ends)
    batch = {*t.batch_axes, BANK}
    # As the forward product sees them: in the kernel's dtype, summed up in float32.
    a, b = t.a.astype(base.dtype), t.b.astype(base.dtype)
    dtype = accumulation_dtype(base.dtype)
    into = {"preferred_element_type": dtype, "precision": "highest"}
    # The kernel first: a CPU has no product of bfloat16 into float32 whose second
    # operand has several axes left and whose first is contracted over another than its
    # last.
    cross, cross_dims = contract(window, dims, a, t.a_dims, batch, **into)
    a_too = tuple(_RANK_TOO if d == RANK else d for d in t.a_dims)
    gram, gram_dims = contract(a, t.a_dims, a, a_too, {*batch, RANK, _RANK_TOO}, **into)
    b_too = tuple(_RANK_TOO if d == RANK else d for d in t.b_dims)
    b = b.astype(dtype)
    square, square_dims = contract(gram, gram_dims, b, b_too, batch, **into)

    # In the order of the first product: a CPU has none in bfloat16 whose result is
    # transposed, where several axes are contracted.
    order = cross_dims
    scale = expand(t.scale, t.s_dims, order)
    linear = 2 * scale * cross
    update = linear + scale**2 * align(square, square_dims, order)
    update = jnp.sum(update * align(b, t.b_dims, order), axis=order.index(RANK))
    update = align(update, [d for d in order if d != RANK], t.o_dims)
    others = [d for d in dims if d not in t.o_dims]
    own = jnp.sum(jnp.square(window.astype(dtype)), axis=others)
    own = expand(own, [d for d in dims if d in t.o_dims], t.o_dims)
    return jnp.sqrt(jnp.maximum(own + update, 0))


def with_gain(base: Array, t: Adapter) -> Adapter:
    """The adapter with its gain, in `b` too, in the place of its magnitude."""
    if t.magnitude is None:
        return t
    # Stopped before it is found, so that no derivative keeps what it is made of.
    norm = column_norm(*jax.tree.map(_stopped, (base, t)))
    # A column of zeros has magnitude zero, and stays.
    gain = t.magnitude.astype(norm.dtype) / jnp.maximum(norm, jnp.finfo(norm).tiny)
    b = t.b * expand(gain, t.o_dims, t.b_dims).astype(t.b.dtype)
    return dataclasses.replace(t, b=b, magnitude=None, gain=gain)


def _stopped(x: Any) -> Any:
    return lax.stop_gradient(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x


def with_magnitude(base: Array, t: Adapter) -> Adapter:
    """Undo `with_gain`: the adapter of the same kernel, without gain."""
    if t.gain is None:
        return t
    # A gain of zero leaves nothing of b, and nothing of the column.
    divisor = expand(jnp.where(t.gain == 0, 1, t.gain), t.o_dims, t.b_dims)
    t = dataclasses.replace(t, b=t.b / divisor.astype(t.b.dtype))
    magnitude = t.gain * lax.stop_gradient(column_norm(base, t))
    return dataclasses.replace(t, magnitude=magnitude.astype(t.a.dtype), gain=None)


def common_gain(
    shape: Sequence[int], adapters: Sequence[Adapter]
) -> tuple[Array, Dims] | None:
    """What several adapters multiply a kernel by: `1 + Σ (gain - 1)`, and its dims.

    Source: PEFT, whose DoRA layers add `(gain - 1)·x·W` each.
    """
    gained = [(t.gain, t) for t in adapters if t.gain is not None]
    if len(gained) == 1 and gained[0][1].covers(shape):
        gain, t = gained[0]
        return gain, t.o_dims
    if not gained:
        return None
    dims = tuple(sorted({d for _, t in gained for d in t.o_dims}))
    total = jnp.ones((), gained[0][0].dtype)
    for gain, t in gained:
        starts = [t.starts[d] if d in t.o_dims else None for d in dims]
        more = pad_to(
            expand(gain - 1, t.o_dims, dims), starts, [shape[d] for d in dims]
        )
        total = total + more
    return total, dims
