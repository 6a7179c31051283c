"""Quantising a kernel, as bitsandbytes does it."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jax import lax

from jlora._kernel import codebooks
from jlora._kernel.axes import Array
from jlora._kernel.quantized import FP8, NESTED_BLOCK, PACKED, Layout, Quantized


def encode(kernel: Array, layout: Layout, *, double: bool, path: str = "") -> Quantized:
    """The quantised form of a kernel whose stacks lead.

    Args:
      kernel: `[*batch, ...]`, of floating point.
      layout: with a block that divides a row.
      double: whether the statistics of blocks are quantised too.
      path: where the kernel stands, for messages.
    """
    dims = (*layout.rows, *layout.cols)
    batch = kernel.ndim - len(dims)
    x = lax.transpose(kernel, [*range(batch), *(d % kernel.ndim for d in dims)])
    lead, along = x.shape[: batch + len(layout.rows)], x.shape[-len(layout.cols) :]
    x = lax.reshape(x, (*lead, math.prod(along))).astype(jnp.float32)
    if layout.form not in PACKED:
        absmax = jnp.max(jnp.abs(x), axis=-1)
        codes = _eight_bits(x, absmax, layout.form)
        return Quantized(codes, absmax, None, None, layout, path)
    codes, absmax = _four_bits(x, layout.form, layout.block or x.shape[-1])
    whole = Quantized(codes, absmax, None, None, layout, path)
    return _doubled(whole, batch) if double else whole


def _eight_bits(x: Array, absmax: Array, form: str) -> Array:
    largest = 127.0 if form == "int8" else 448.0
    scaled = x * _over(largest, absmax)[..., None]
    return jnp.round(scaled).astype(jnp.int8) if form == "int8" else scaled.astype(FP8)


def _four_bits(x: Array, form: str, block: int) -> tuple[Array, Array]:
    blocks = lax.reshape(x, (*x.shape[:-1], x.shape[-1] // block, block))
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    scaled = jnp.clip(blocks * _over(1.0, absmax)[..., None], -1, 1)
    numbers = codebooks.four_bits(form)
    order = numbers.argsort(kind="stable")
    # A code is the number of midpoints below: a sum that needs no room of its own.
    code = jnp.zeros(scaled.shape, jnp.uint8)
    for bound in codebooks.midpoints(numbers[order]):
        code = code + (scaled > bound).astype(jnp.uint8)
    if form == "fp4":
        code = jnp.asarray(order.astype("uint8"))[code.astype(jnp.int32)]
    two = lax.reshape(code, (*x.shape[:-1], x.shape[-1] // 2, 2))
    return (two[..., 0] << 4) | two[..., 1], absmax


def _doubled(q: Quantized, batch: int) -> Quantized:
    """With codes in the place of the statistics, each index of a stack on its own."""
    absmax = q.absmax
    flat = lax.reshape(absmax, (*absmax.shape[:batch], math.prod(absmax.shape[batch:])))
    offset = jnp.mean(flat, axis=-1)
    rest = -flat.shape[-1] % NESTED_BLOCK
    x = flat - offset[..., None]
    x = lax.pad(x, jnp.float32(0), [(0, 0, 0)] * batch + [(0, rest, 0)])
    x = lax.reshape(x, (*x.shape[:-1], x.shape[-1] // NESTED_BLOCK, NESTED_BLOCK))
    nested = jnp.max(jnp.abs(x), axis=-1)
    scaled = jnp.clip(x * _over(1.0, nested)[..., None], -1, 1)
    bounds = jnp.asarray(codebooks.midpoints(codebooks.dynamic_map()))
    codes = jnp.searchsorted(bounds, scaled).astype(jnp.uint8)
    codes = lax.reshape(codes, (*flat.shape[:-1], flat.shape[-1] + rest))
    codes = lax.slice_in_dim(codes, 0, flat.shape[-1], axis=batch)
    codes = lax.reshape(codes, absmax.shape)
    return dataclasses.replace(q, absmax=codes, nested_absmax=nested, offset=offset)


def _over(number: float, absmax: Array) -> Array:
    """`number · (1 / absmax)`, rounded as PyTorch does; nought where all is zero."""
    return jnp.where(absmax > 0, 1 / jnp.where(absmax > 0, absmax, 1), 0) * number
