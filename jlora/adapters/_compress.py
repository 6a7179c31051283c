"""Low-rank terms of a lower rank, the nearest there is in the Frobenius norm.

    A = Qa·Ra,  Bᵀ = Qb·Rb,  Ra·Rbᵀ = U·S·Vᵀ     A·B = (Qa·U)·S·(Qb·V)ᵀ

Only the R x R core is decomposed by SVD, and A·B is never formed. What is left out are
the smallest of S.

Source: Eckart and Young 1936.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import RANK, Array, Dims, accumulation_dtype, align


@dataclasses.dataclass(frozen=True)
class Sides:
    """The axes of a term as those of matrices `[*batch, in, out]`, and their sizes."""

    batch: Dims
    ins: Dims
    outs: Dims
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, t: Adapter) -> Sides:
        """Those of a term."""
        sizes = tuple(t.size(d) or 1 for d in range(len(t.starts)))
        return cls(t.batch_axes, t.in_axes, t.out_axes, sizes)

    def shape(self, dims: Dims) -> tuple[int, ...]:
        """The sizes of some axes."""
        return tuple(self.sizes[d] for d in dims)

    def matrices(self, t: Adapter) -> tuple[Array, Array]:
        """The factors as `[*batch, in, r]` and `[*batch, out, r]`, float32 at least."""
        dtype, many = accumulation_dtype(t.a.dtype), self.shape(self.batch)
        a = align(t.a, t.a_dims, (*self.batch, *self.ins, RANK)).astype(dtype)
        b = align(t.b, t.b_dims, (*self.batch, *self.outs, RANK)).astype(dtype)
        return a.reshape(*many, -1, t.rank), b.reshape(*many, -1, t.rank)

    def with_factors(self, t: Adapter, left: Array, right: Array) -> Adapter:
        """The term with factors `[*batch, in, r]` and `[*batch, r, out]`."""
        rank, many = left.shape[-1], self.shape(self.batch)
        a_dims, b_dims = (*self.batch, *self.ins, RANK), (*self.batch, RANK, *self.outs)
        a = left.reshape(*many, *self.shape(self.ins), rank).astype(t.a.dtype)
        b = right.reshape(*many, rank, *self.shape(self.outs)).astype(t.b.dtype)
        return dataclasses.replace(
            t, a=align(a, a_dims, t.a_dims), b=align(b, b_dims, t.b_dims)
        )


def compressed(t: Adapter, rank: int) -> tuple[Adapter, dict[str, Array]]:
    """A term of at most that rank.

    Args:
      t: a term whose scale is 1.
      rank: the wanted one.

    Returns:
      The term, and the `norm` of its update and of what of it was `lost`.
    """
    sides = Sides.of(t)
    a, b = sides.matrices(t)
    (qa, ra), (qb, rb) = jnp.linalg.qr(a), jnp.linalg.qr(b)
    core = _product(ra, jnp.swapaxes(rb, -1, -2))
    u, s, vt = jnp.linalg.svd(core, full_matrices=False)
    left, right, figures = _truncated(u, s, vt, rank)
    left, right = _product(qa, left), _product(right, jnp.swapaxes(qb, -1, -2))
    return sides.with_factors(t, left, right), figures


def norm_of(t: Adapter) -> Array:
    """The Frobenius norm of a term's `a @ b`, from the factors' inner products."""
    a, b = Sides.of(t).matrices(t)
    grams = [_product(jnp.swapaxes(x, -1, -2), x) for x in (a, b)]
    return jnp.sqrt(jnp.maximum(jnp.sum(grams[0] * grams[1]), 0))


def decomposed(t: Adapter, delta: Array, rank: int) -> tuple[Adapter, dict[str, Array]]:
    """A term like t of at most that rank, of a dense update; by its SVD.

    Args:
      t: tells axes, dtype and the shape of the scale.
      delta: of the window's shape.
      rank: the wanted one.
    """
    sides = Sides.of(t)
    delta = align(delta, range(delta.ndim), (*sides.batch, *sides.ins, *sides.outs))
    size = math.prod(sides.shape(sides.ins))
    matrices = delta.reshape(*sides.shape(sides.batch), size, -1)
    u, s, vt = jnp.linalg.svd(matrices, full_matrices=False)
    left, right, figures = _truncated(u, s, vt, rank)
    t = dataclasses.replace(
        t, scale=jnp.ones_like(t.scale), key=None, magnitude=None, dropout=0.0,
        rslora=False,
    )  # fmt: skip
    return sides.with_factors(t, left, right), figures


def _truncated(
    u: Array, s: Array, vt: Array, rank: int
) -> tuple[Array, Array, dict[str, Array]]:
    """`U·√S` and `√S·Vᵀ` of the largest singular values, and what is lost."""
    root = jnp.sqrt(s[..., :rank])
    left, right = (
        u[..., :rank] * root[..., None, :],
        root[..., None] * vt[..., :rank, :],
    )
    figures = {"norm": _norm(s), "lost": _norm(s[..., rank:])}
    return left, right, figures


def _norm(s: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(s)))


def _product(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
