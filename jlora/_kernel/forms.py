"""Other forms of the update: what is trained, and the factors that are made of it.

    form   parts                                         a            b
    vera   lambda_d [r], lambda_b [*out] are trained,    proj_a       d · proj_b · b
           proj_a [*in, r], proj_b [r, *out] are not
    loha   a1, a2 [*in, r], b1, b2 [r, *out]             a1 ⊙ a2      b1 ⊙ b2
    ada-   a [*in, r], e [r], b [r, *out]                a · e        b
    lora
    lokr   w1 [i1, o1] or a1 [i1, r], b1 [r, o1];        a1 ⊗ a2      b1 ⊗ b2
           a2 [i2, r], b2 [r, o2]

⊙ pairs the ranks at each input or output, of which there are r² then, and ⊗ pairs the
inputs or outputs too. So (a1·b1)∘(a2·b2) and (a1·b1)⊗(a2·b2) are low-rank products, and
no update is formed. Of `w1` one factor is the identity.

Every adapter has the parts of one form. They are made factors where a replay, a merge
or a norm begins; behind that all adapters are alike.

Source: Kopiczko et al. 2023, arXiv:2310.11454 (VeRA); Hyeon-Woo et al. 2021,
arXiv:2108.06098 (FedPara, LoHa); Yeh et al. 2023, arXiv:2309.14859 (LoKr); Zhang et
al. 2023, arXiv:2303.10512 (AdaLoRA).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import RANK, Array, Dims, align, expand

Parts = Mapping[str, Array]
Factors = tuple[tuple[Array, Dims], tuple[Array, Dims]]

# Axes of LoKr's parts that divide the kernel's inputs and outputs.
OUTER_IN, INNER_IN, OUTER_OUT, INNER_OUT = -11, -12, -13, -14


def formed(t: Adapter, shape: Sequence[int]) -> Adapter:
    """The adapter with factors in the place of its parts.

    Args:
      t: the adapter; one that has factors stays as it is.
      shape: the kernel's.
    """
    if t.parts is None or t.form is None:
        return t
    (a, a_dims), (b, b_dims) = _FORMS[t.form](t, t.parts, shape)
    return dataclasses.replace(
        t, a=a, b=b, a_dims=a_dims, b_dims=b_dims, parts=None, form=None, p_dims=()
    )


def as_lora(t: Adapter, shape: Sequence[int]) -> Adapter:
    """The adapter as one of LoRA, whatever its form is."""
    return t if t.parts is None else spanning(formed(t, shape), shape)


def spanning(t: Adapter, shape: Sequence[int]) -> Adapter:
    """The term with both factors along the stacks that it has an index for.

    Layers of a stack may share a factor, as VeRA's do a projection.
    """
    changed: dict[str, Any] = {}
    for name, dims in (("a", t.a_dims), ("b", t.b_dims)):
        missing = [d for d in t.s_dims if d not in dims]
        if missing:
            sizes = [t.size(d) or shape[d] for d in missing]
            changed[name] = lax.broadcast(getattr(t, name), sizes)
            changed[f"{name}_dims"] = (*missing, *dims)
    return dataclasses.replace(t, **changed) if changed else t


def _vera(t: Adapter, parts: Parts, shape: Sequence[int]) -> Factors:
    """The vectors go to `b`, so that no gradient of `a` is made.

    The projections have no index of a stack: every layer has the same.
    """
    dims = dict(t.p_dims)
    order = (*(d for d in t.b_dims if d in t.s_dims), *dims["proj_b"])
    b = expand(parts["proj_b"], dims["proj_b"], order)
    for name in ("lambda_d", "lambda_b"):
        b = b * expand(parts[name], dims[name], order)
    return (parts["proj_a"], dims["proj_a"]), (b, order)


def _loha(t: Adapter, parts: Parts, shape: Sequence[int]) -> Factors:
    """Of all pairs of ranks the products: Khatri and Rao's of both sides."""
    dims = dict(t.p_dims)

    def side(first: str, second: str, order: Dims) -> tuple[Array, Dims]:
        x, y = (align(parts[n], dims[n], order) for n in (first, second))
        return _pair_ranks(x, y, order), order

    return side("a1", "a2", t.a_dims), side("b1", "b2", t.b_dims)


def _pair_ranks(x: Array, y: Array, dims: Dims) -> Array:
    axis = dims.index(RANK)
    pairs = jnp.expand_dims(x, axis + 1) * jnp.expand_dims(y, axis)
    size = x.shape[axis] * y.shape[axis]
    return pairs.reshape(*x.shape[:axis], size, *x.shape[axis + 1 :])


def _lokr(t: Adapter, parts: Parts, shape: Sequence[int]) -> Factors:
    """Kronecker's product of both sides; the identity where `w1` is whole."""
    dims = dict(t.p_dims)
    if "w1" in parts:
        outer = align(parts["w1"], dims["w1"], (*t.s_dims, OUTER_IN, OUTER_OUT))
        eye = jnp.eye(min(outer.shape[-2:]), dtype=outer.dtype)
        a1, b1 = (eye, outer) if len(eye) == outer.shape[-2] else (outer, eye)
    else:
        a1 = align(parts["a1"], dims["a1"], (*t.s_dims, OUTER_IN, RANK))
        b1 = align(parts["b1"], dims["b1"], (*t.s_dims, RANK, OUTER_OUT))
    b1 = jnp.swapaxes(b1, -1, -2)
    a = _side(t, a1, (parts["a2"], dims["a2"]), INNER_IN, t.in_axes, shape)
    b = _side(t, b1, (parts["b2"], dims["b2"]), INNER_OUT, t.out_axes, shape)
    b = align(b, (*t.s_dims, *t.out_axes, RANK), t.b_dims)
    return (align(a, (*t.s_dims, *t.in_axes, RANK), t.a_dims), t.a_dims), (b, t.b_dims)


def _side(
    t: Adapter, outer: Array, inner: tuple[Array, Dims], label: int, axes: Dims,
    shape: Sequence[int],
) -> Array:  # fmt: skip
    """`outer [*batch, n1, p] ⊗ inner [*batch, *rest, n2, q]`, `[*batch, *axes, p·q]`.

    The axes that `inner` lies along have no part in the product; the others, of the
    sizes of which n1·n2 is the product, are factored as one.
    """
    array, dims = inner
    rest = tuple(d for d in axes if d in dims)
    factored = tuple(d for d in axes if d not in dims)
    n2, q = (array.shape[dims.index(d)] for d in (label, RANK))
    n1, p = outer.shape[-2:]
    array = align(array, dims, (*t.s_dims, *rest, label, RANK))
    ends = (n1, 1, p, 1)
    outer = outer.reshape(*outer.shape[:-2], *(1 for _ in rest), *ends)
    array = array.reshape(*array.shape[:-2], 1, n2, 1, q)
    sizes = [shape[d] for d in factored] if len(factored) > 1 else [n1 * n2]
    product = outer * array
    many = product.shape[: product.ndim - 4]
    product = product.reshape(*many, *sizes, p * q)
    return align(product, (*t.s_dims, *rest, *factored, RANK), (*t.s_dims, *axes, RANK))


def _adalora(t: Adapter, parts: Parts, shape: Sequence[int]) -> Factors:
    """The singular values go to `a`."""
    dims = dict(t.p_dims)
    a = parts["a"] * expand(parts["e"], dims["e"], dims["a"])
    return (a, dims["a"]), (parts["b"], dims["b"])


_FORMS: dict[str, Callable[[Adapter, Parts, Sequence[int]], Factors]] = {
    "vera": _vera,
    "loha": _loha,
    "lokr": _lokr,
    "adalora": _adalora,
}


def rank_of(form: str, parts: Mapping[str, Any], dims: Mapping[str, Dims]) -> int:
    """The rank of the factors that are made of parts of such shapes."""

    def size(name: str, dim: int) -> int:
        return parts[name].shape[dims[name].index(dim)]

    if form == "vera":
        return size("lambda_d", RANK)
    if form == "adalora":
        return size("e", RANK)
    if form == "loha":
        return size("a1", RANK) * size("a2", RANK)
    outer = (
        min(size("w1", OUTER_IN), size("w1", OUTER_OUT))
        if "w1" in parts
        else size("a1", RANK)
    )
    return outer * size("a2", RANK)


def halves(size: int, factor: int = -1) -> tuple[int, int]:
    """A size as a product of two numbers, the smaller one first.

    Args:
      size: what to divide.
      factor: the first number where it divides the size, else the largest that the
        first may be; -1 for the two numbers that are nearest to each other.

    Source: `factorization` of LyCORIS, which PEFT's files depend on.

    >>> halves(768), halves(768, 4), halves(127)
    ((24, 32), (4, 192), (1, 127))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    first = max(n for n in range(1, most + 1) if size % n == 0)
    return first, size // first
