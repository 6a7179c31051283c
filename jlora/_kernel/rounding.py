"""Rounding at random to a narrower dtype, and how far apart two of its numbers are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _compat
from jlora._kernel.axes import Array, rounded


def rounded_at_random(x: Array, dtype: jax.typing.DTypeLike, key: Array) -> Array:
    """X in a narrower dtype: one of its two neighbours there, x on average.

    The nearer neighbour is taken the more often, in proportion to how near it is. What
    rounds to infinity only by chance does not.

    Source: Gupta et al. 2015, arXiv:1502.02551, section 3.1.
    """
    if x.dtype == dtype:
        return x
    nearest = rounded(x, dtype)  # in x's dtype, so that XLA cannot leave it out
    error = x - nearest
    near = nearest.astype(dtype)
    steps = jnp.sign(error).astype(_int_of(near.dtype))
    other = _float_of(_ordered(near) + steps, near.dtype)
    gap = other.astype(x.dtype) - nearest
    sharding = _compat.on_mesh_of(x, _compat.spec(x))
    draw = jax.random.uniform(key, x.shape, x.dtype, out_sharding=sharding)
    # Without an error the gap is zero, and 0/0 is less than nothing.
    take = (draw < jnp.abs(error / gap)) & jnp.isfinite(other)
    return jnp.where(take, other, near)


def steps_between(x: Array, y: Array) -> Array:
    """How many of their dtype's numbers lie from x to y, float32: its ulps, in short.

    Neighbours are one step apart, -0 and 0 none.
    """
    a, b = _ordered(x), _ordered(y)
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    wrapped = jnp.maximum(a, b) - jnp.minimum(a, b)  # of unlike signs beyond the ints
    return lax.bitcast_convert_type(wrapped, unsigned).astype(jnp.float32)


def _ordered(x: Array) -> Array:
    """The numbers of a dtype counted off in order, zero being 0."""
    kind = _int_of(x.dtype)
    bits = lax.bitcast_convert_type(x, kind)
    return jnp.where(bits < 0, jnp.iinfo(kind).min - bits, bits)


def _float_of(ordered: Array, dtype: jnp.dtype) -> Array:
    kind = ordered.dtype
    bits = jnp.where(ordered < 0, jnp.iinfo(kind).min - ordered, ordered)
    return lax.bitcast_convert_type(bits, dtype)


def _int_of(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.dtype(f"int{8 * dtype.itemsize}")
