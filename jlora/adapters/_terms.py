"""The weighted sum of adapters on one kernel, exact: ranks are joined.

    Σ w·s·A·B = [A₁ | A₂ | ...] · [w₁·s₁·B₁ ; w₂·s₂·B₂ ; ...]

The sum of DoRA's updates is a DoRA adapter again. Each is (g - 1)·W + s·A·(g·B) with a
gain g for each column (see `jlora._kernel.dora`), so the sum has the gain
G = 1 + Σ w·(g - 1) and the factors above of w·g·B: divided by G they are DoRA's B, and
its magnitude is G times the new length. Only where a G is nearly zero is there none.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._compat import without_explicit_axes
from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import RANK, Array, Dims, accumulation_dtype, align, expand
from jlora._kernel.dora import with_gain, with_magnitude
from jlora._kernel.forms import as_lora
from jlora._kernel.nodes import LowRank
from jlora._kernel.quantized import dense
from jlora.adapters._compress import compressed, decomposed, norm_of
from jlora.adapters._sparse import Sparse

_LEAST_GAIN = 1e-5

Figures = dict[str, Array]


def _window_of(base: Any, t: Adapter) -> Any:
    """The part of a kernel that an adapter's term is on."""
    if base is None or t.covers(base.shape):
        return base
    sizes = [t.size(d) or n for d, n in enumerate(base.shape)]
    ends = [start + n for start, n in zip(t.starts, sizes, strict=True)]
    return lax.slice(dense(base), t.starts, ends)


def _at_start(t: Adapter) -> Adapter:
    """The term as one of its window."""
    return dataclasses.replace(t, starts=(0,) * len(t.starts))


def plain_term(t: Adapter, shape: Sequence[int]) -> Adapter:
    """The term as one of LoRA, whatever its form is."""
    return t if t.parts is None else _plain_term(t, shape=tuple(shape))


_plain_term = jax.jit(without_explicit_axes(as_lora), static_argnames="shape")


@functools.partial(jax.jit, static_argnames="rank")
@without_explicit_axes
def exact_sum(
    base: Any, terms: Sequence[Adapter], weights: Sequence[Array],
    *, rank: int | None = None,
) -> tuple[Adapter, Figures]:  # fmt: skip
    """The weighted sum of terms with the same axes.

    Args:
      base: their kernel, an array or quantised, which DoRA needs; None where there is
        none.
      terms: of one window of it.
      weights: as many scalars.
      rank: what to compress the sum to; None leaves it exact.

    Returns:
      The term, with scale 1. Its figures: `norm` of the low-rank update, `lost` of it
      by the compression, and whether a gain `vanishes`.
    """
    starts, window = terms[0].starts, _window_of(base, terms[0])
    terms = [_at_start(t) for t in terms]
    terms = [t if window is None else with_gain(window, t) for t in terms]
    first, dtype = terms[0], jnp.result_type(*(x for t in terms for x in (t.a, t.b)))
    a = [align(t.a, t.a_dims, first.a_dims).astype(dtype) for t in terms]
    b = [
        _scaled(t, w, t.b, t.b_dims, first.b_dims).astype(dtype)
        for t, w in zip(terms, weights, strict=True)
    ]
    out = dataclasses.replace(
        first,
        a=jnp.concatenate(a, axis=first.a_dims.index(RANK)),
        b=jnp.concatenate(b, axis=first.b_dims.index(RANK)),
        scale=jnp.ones_like(first.scale), key=None, dropout=0.0, rslora=False,
        shifted=any(t.shifted for t in terms), **_per_output(terms, weights, dtype),
    )  # fmt: skip
    if rank is None:
        figures = {"norm": norm_of(out), "lost": jnp.zeros(())}
    else:
        out, figures = compressed(out, rank)
    if out.gain is None:
        return dataclasses.replace(out, starts=starts), figures
    small = jnp.abs(out.gain) < _LEAST_GAIN
    used = jnp.any(align(out.b, out.b_dims, (RANK, *out.o_dims)) != 0, axis=0)
    figures["vanishes"] = jnp.any(small & used)
    out = with_magnitude(window, out)
    return dataclasses.replace(out, starts=starts), figures


@functools.partial(jax.jit, static_argnames=("sparse", "rank"))
@without_explicit_axes
def sparse_sum(
    base: Any, terms: Sequence[Adapter], weights: Sequence[Array],
    keys: Array | None, *, sparse: Sparse, rank: int,
) -> tuple[Adapter, Figures]:  # fmt: skip
    """The sum of thinned updates, as the nearest term of that rank.

    Args:
      base: their kernel, an array or quantised.
      terms: of one window of it, each spanning all its axes.
      weights: as many scalars.
      keys: as many PRNG keys, where random entries are dropped.
      sparse: how to thin and sum them.
      rank: that of the result.

    Returns:
      The term, with scale 1, and its figures: `norm` of the sum, `lost` of it.
    """
    starts, window = terms[0].starts, _window_of(base, terms[0])
    terms = [_at_start(t) for t in terms]
    first, each = terms[0], jnp.stack(list(weights))
    updates = [LowRank(window, {"": t}).delta() for t in terms]
    batch = first.batch_axes
    rest = [d for d in range(window.ndim) if d not in batch]
    stack = jnp.stack([align(x, range(x.ndim), [*batch, *rest]) for x in updates])
    total = _summed(stack, each, keys, sparse, len(batch))
    total = align(total, [*batch, *rest], range(window.ndim))
    out, figures = decomposed(first, total, rank)
    biased = [(t, t.bias) for t in terms if t.bias is not None]
    if biased:
        (like, bias), *_ = biased
        dims, dtype = like.o_dims, bias.dtype
        given = {id(t): _scaled(t, 1, x, t.o_dims, dims) for t, x in biased}
        stack = jnp.stack([given.get(id(t), jnp.zeros(bias.shape)) for t in terms])
        own = None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
        total = _summed(stack, each, own, sparse, len(batch)).astype(dtype)
        out = dataclasses.replace(out, bias=total, o_dims=dims)
    return dataclasses.replace(out, starts=starts), figures


def _summed(
    stack: Array, weights: Array, keys: Array | None, sparse: Sparse, batch: int
) -> Array:
    """The sum of `[n, *batch, ...]`, for each index of a batch by itself."""
    n, shape = len(stack), stack.shape[1:]
    many = math.prod(shape[:batch])
    flat = stack.reshape(n, many, -1).swapaxes(0, 1)
    if keys is None:
        total = jax.vmap(lambda x: sparse.sum(x, weights, None))(flat)
    else:
        each = jax.vmap(jax.random.fold_in, (None, 0))
        own = jax.vmap(each, (0, None), 1)(keys, jnp.arange(many))
        total = jax.vmap(lambda x, k: sparse.sum(x, weights, k))(flat, own)
    return total.reshape(shape)


def _per_output(
    terms: Sequence[Adapter], weights: Sequence[Array], dtype: Any
) -> dict[str, Any]:
    """The sum's gain and bias, and the dims that they lie along."""
    pairs = list(zip(terms, weights, strict=True))
    dims: Dims = next((t.o_dims for t in terms if t.o_dims), ())
    gains = [
        w * align(t.gain - 1, t.o_dims, dims) for t, w in pairs if t.gain is not None
    ]
    biases = [
        _scaled(t, w, t.bias, t.o_dims, dims) for t, w in pairs if t.bias is not None
    ]
    return {
        "magnitude": None,
        "gain": 1 + functools.reduce(jnp.add, gains) if gains else None,
        "bias": functools.reduce(jnp.add, biases).astype(dtype) if biases else None,
        "o_dims": dims,
    }


def _scaled(t: Adapter, w: Any, x: Array, dims: Dims, order: Dims) -> Array:
    """`w·scale·x` with its axes in that order."""
    x = align(x, dims, order).astype(accumulation_dtype(x.dtype))
    return x * (w * expand(t.scale, t.s_dims, order))
