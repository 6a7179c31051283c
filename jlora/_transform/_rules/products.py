"""Products of two adapted kernels, and the sums over a kernel's entries.

    (W + s·A·B)·(V + t·C·D) = W·V + [(W + s·A·B)·t·C]·D + s·A·[B·V]

The result is a kernel whose factors are the small products in brackets, or an array
where one side of it is summed away.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jlora._compat import Eqn, rebind
from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import (
    RANK,
    Array,
    Label,
    accumulation_dtype,
    align,
    contract,
    expand,
)
from jlora._kernel.nodes import LowRank
from jlora._transform._rules._table import Run, rule
from jlora._transform._rules._terms import (
    cover,
    factor,
    fold_scale,
    has_gain,
    span_both,
    with_factor,
)
from jlora._transform._rules.hadamard import Hadamard

Operand = tuple[Array, Sequence[Label]]


def kernel_product(eqn: Eqn, w: LowRank, v: LowRank) -> Any:
    """`dot_general` of two kernels."""
    contracted, batch = eqn.params["dimension_numbers"]
    (base,) = rebind(eqn, [w.base, v.base])
    left, right = cover(w), cover(v)
    if left is None or right is None or _drops(w) or _drops(v):
        return NotImplemented
    right = left if v is w else right
    left_labels: list[Label] = [("w", d) for d in range(w.ndim)]
    right_labels: list[Label] = [("v", d) for d in range(v.ndim)]
    for one, other in (contracted, batch):
        for d, e in zip(one, other, strict=True):
            right_labels[e] = left_labels[d]
    summed = {left_labels[d]: w.shape[d] for d in contracted[0]}
    shared = [left_labels[d] for d in batch[0]]
    free = [
        [n for n in labels if n not in summed and n not in shared]
        for labels in (left_labels, right_labels)
    ]
    order = [*shared, *free[0], *free[1]]
    sizes = dict(zip(left_labels, w.shape, strict=True))
    sizes |= dict(zip(right_labels, v.shape, strict=True))
    if not all(any(sizes[n] > 1 for n in side) for side in free):
        return [sum_of_products(base, left, left_labels, right, right_labels, order)]
    if has_gain(left) or has_gain(right):
        return NotImplemented
    terms = [
        _product_term(
            t, right_labels, _pieces(left, left_labels), summed, order, w.dtype
        )
        for t in right.adapters.values()
    ] + [
        _product_term(
            t, left_labels, [[(v.base, right_labels)]], summed, order, v.dtype
        )
        for t in left.adapters.values()
    ]
    known = {str(n): t for n, t in enumerate(terms) if t is not None}
    path = " + ".join(dict.fromkeys((w.path, v.path)))
    return [LowRank(base, known, path)] if len(known) == len(terms) else NotImplemented


def _drops(w: LowRank) -> bool:
    """Whether an adapter's inputs are dropped, which a product has no place for."""
    return any(t.key is not None and t.dropout for t in w.adapters.values())


def _product_term(
    t: Adapter, labels: Sequence[Label], other: list[list[Operand]],
    summed: dict[Label, int], order: list[Label], dtype: Any,
) -> Adapter | None:  # fmt: skip
    """The term of a product that comes from one of a kernel's: one factor multiplied.

    Args:
      t: the kernel's term.
      labels: of the kernel's dimensions.
      other: the kernel that it is multiplied with, as a sum of products of arrays.
      summed: the labels that are summed over, and their sizes.
      order: those of the result.
      dtype: of the operands of the small products.
    """
    t = fold_scale(t)
    named = {
        side: [labels[d] if d != RANK else RANK for d in getattr(t, f"{side}_dims")]
        for side in ("a", "b")
    }
    meets = [s for s in ("a", "b") if {*summed} & {*named[s]}] or ["a"]
    if len(meets) != 1:
        return None
    (side,) = meets
    rest = "b" if side == "a" else "a"
    met = getattr(t, side), named[side]
    free = {n for operands in other for _, ns in operands for n in ns}
    kept = [n for n in order if n in free or n in named[side]]
    total = sum(
        chain([*operands, met], [*kept, RANK], summed, dtype) for operands in other
    )
    new_dims = {**{n: d for d, n in enumerate(order)}, RANK: RANK}
    x, _ = factor(t, rest)
    t = dataclasses.replace(
        t, key=None, keep=None, dropout=0.0, o_dims=(), starts=(0,) * len(order)
    )
    t = with_factor(t, side, total, tuple(new_dims[n] for n in (*kept, RANK)))
    return with_factor(t, rest, x, tuple(new_dims[n] for n in named[rest]))


def sum_of_products(
    base: Array, w: LowRank, w_labels: Sequence[Label], v: LowRank,
    v_labels: Sequence[Label], order: Sequence[Label],
) -> Array:  # fmt: skip
    """Σ W·V over the labels not in `order`, where no kernel remains.

    Args:
      base: the same of the bases, which a gain makes useless.
      w: a kernel.
      w_labels: of its dimensions.
      v: the other kernel.
      v_labels: of its dimensions; those it shares with w are the same.
      order: the labels of the result.
    """
    sizes = dict(zip(w_labels, w.shape, strict=True))
    sizes |= dict(zip(v_labels, v.shape, strict=True))
    dtype = accumulation_dtype(w.dtype)
    gained = has_gain(w) or has_gain(v)
    total = jnp.zeros((), dtype) if gained else base.astype(dtype)
    lefts, rights = _pieces(w, w_labels, 0), _pieces(v, v_labels, 1)
    square = w is v and list(w_labels) == list(v_labels)
    for i, j in itertools.product(range(len(lefts)), range(len(rights))):
        if (square and i > j) or (i == j == 0 and not gained):
            continue
        part = chain([*lefts[i], *rights[j]], order, sizes, dtype)
        total = total + (2 * part if square and i < j else part)
    return jnp.broadcast_to(total, base.shape).astype(base.dtype)


def _pieces(
    w: LowRank, labels: Sequence[Label], number: int = 0
) -> list[list[Operand]]:
    """A kernel as a sum of products of arrays: base and gain, factor and factor."""
    gain = w.gain()
    first: list[Operand] = [(w.base, labels)]
    if gain is not None:
        first.append((gain[0], [labels[d] for d in gain[1]]))
    out = [first]
    for n, t in enumerate(w.adapters.values()):
        if not t.rank:
            continue
        t = fold_scale(t)
        rank = ("rank", number, n)
        named = [
            [labels[d] if d != RANK else rank for d in dims]
            for dims in (t.a_dims, t.b_dims)
        ]
        out.append([(t.a, named[0]), (t.b, named[1])])
    return out


def chain(
    operands: Sequence[Operand], order: Sequence[Label], sizes: dict[Label, int],
    dtype: Any,
) -> Array:  # fmt: skip
    """The sum of products of several arrays over all labels that are not in `order`.

    Pair by pair, that of the smallest product first: factors meet large arrays along
    their large axes, never each other along the rank.

    Returns:
      The sum in float32, its axes in `order`, of size one where no operand has it.
    """
    left = [(x.astype(dtype), list(labels)) for x, labels in operands]
    into = jnp.promote_types(dtype, jnp.float32)
    present = {n for _, labels in operands for n in labels}
    times = math.prod(size for n, size in sizes.items() if n not in {*present, *order})

    def kept_of(i: int, j: int) -> set[Label]:
        rest = [labels for k, (_, labels) in enumerate(left) if k not in (i, j)]
        return {*order}.union(*rest)

    def product_size(pair: tuple[int, int]) -> int:
        kept = kept_of(*pair)
        found = {
            n: size
            for k in pair
            for n, size in zip(left[k][1], left[k][0].shape, strict=True)
        }
        return math.prod(size for n, size in found.items() if n in kept)

    while len(left) > 1:
        i, j = min(itertools.combinations(range(len(left)), 2), key=product_size)
        kept = kept_of(i, j)
        x, xs = _sum_lone(*left[i], kept | {*left[j][1]})
        y, ys = _sum_lone(*left[j], kept | {*xs})
        out, names = contract(
            x.astype(dtype), xs, y.astype(dtype), ys, kept, precision="highest",
            preferred_element_type=into,
        )  # fmt: skip
        left = [one for k, one in enumerate(left) if k not in (i, j)]
        left.append((out, list(names)))
    ((x, labels),) = left
    x, labels = _sum_lone(x, labels, {*order})
    return expand(x, labels, order).astype(into) * times


def _sum_lone(
    x: Array, labels: Sequence[Label], keep: Collection[Label]
) -> tuple[Array, list[Label]]:
    """Sum over what no other operand has and nobody asks for."""
    axes = [i for i, n in enumerate(labels) if n not in keep]
    if not axes:
        return x, list(labels)
    return jnp.sum(x, axis=axes), [n for n in labels if n in keep]


# -- sums over entries -----------------------------------------------------------------


@rule("reduce_sum")
def reduce_sum(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """Σ(W + s·A·B): sums of factors; low-rank while inputs and outputs remain."""
    (w,) = args
    axes = {d % len(w.shape) for d in eqn.params["axes"]}
    if isinstance(w, Hadamard):
        return _sum_hadamard(eqn, w, axes)
    whole = cover(w)
    if whole is None:
        return NotImplemented
    kept = [d for d in range(w.ndim) if d not in axes]
    gained = {d for t in w.adapters.values() if t.gain is not None for d in t.o_dims}
    (base,) = rebind(eqn, [w.base])
    if any(_two_sided(t, axes) for t in whole.adapters.values()):
        if gained & axes:
            return NotImplemented
        return _sum_to_kernel(whole, base, axes, kept)
    sizes = dict(enumerate(w.shape))
    dtype = accumulation_dtype(w.dtype)
    first, *terms = _pieces(whole, range(w.ndim))
    total = base.astype(dtype)
    if len(first) > 1:
        total = chain(first, kept, sizes, dtype)
    for operands in terms:
        total = total + chain(operands, kept, sizes, dtype)
    return [total.astype(base.dtype)]


def _two_sided(t: Adapter, axes: set[int]) -> bool:
    """Whether inputs and outputs remain when those axes are summed over."""
    return all(
        any(d not in axes and (t.size(d) or 1) > 1 for d in side)
        for side in (t.in_axes, t.out_axes)
    )


def _sum_to_kernel(w: LowRank, base: Array, axes: set[int], kept: list[int]) -> Any:
    """The kernel that remains: a term for each index of a stack is a rank for each."""
    new_dim = {old: new for new, old in enumerate(kept)}
    adapters = {}
    for name, t in w.adapters.items():
        if t.key is not None and axes & {*t.s_dims}:
            return NotImplemented
        times = math.prod(w.shape[d] for d in axes if t.size(d) is None)
        stacked = [d for d in t.batch_axes if d in axes]
        t = fold_scale(t) if stacked else t
        a, a_dims = _sum_factor(t.a, t.a_dims, axes, stacked)
        b, b_dims = _sum_factor(t.b, t.b_dims, axes, stacked)
        t = dataclasses.replace(
            t, a=a, b=b, a_dims=a_dims, b_dims=b_dims, scale=t.scale * times
        )
        adapters[name] = t.rename(new_dim, base.ndim)
    return [dataclasses.replace(w, base=base, adapters=adapters)]


def _sum_factor(
    x: Array, dims: Sequence[int], axes: set[int], stacked: list[int]
) -> tuple[Array, tuple[int, ...]]:
    rest = [d for d in dims if d != RANK and d not in stacked]
    x = align(x, dims, [*rest, *stacked, RANK])
    x = lax.reshape(x, (*x.shape[: len(rest)], math.prod(x.shape[len(rest) :])))
    gone = [i for i, d in enumerate(rest) if d in axes]
    x = jnp.sum(x, axis=gone) if gone else x
    return x, (*(d for d in rest if d not in axes), RANK)


def _sum_hadamard(eqn: Eqn, x: Hadamard, axes: set[int]) -> Any:
    """Σ W∘V: inner products of factors, where no kernel remains."""
    left = cover(x.left)
    right = left if x.right is x.left else cover(x.right)
    if left is None or right is None:
        return NotImplemented
    terms = [*left.adapters.values(), *right.adapters.values()]
    if any(_two_sided(t, axes) for t in terms):
        return NotImplemented
    labels = list(range(left.ndim))
    kept = [d for d in labels if d not in axes]
    (base,) = rebind(eqn, [x.base])
    return [sum_of_products(base, left, labels, right, labels, kept)]


@rule("cumsum")
def cumsum(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """Running sums along inputs are those of A, along outputs those of B."""
    axis = eqn.params["axis"]
    (w,) = args
    whole = cover(w)
    if whole is None:
        return NotImplemented
    adapters = {}
    for name, t in whole.adapters.items():
        if t.gain is not None and axis in t.o_dims:
            return NotImplemented
        t = span_both(t, axis, w.shape[axis])
        sides = [s for s in ("a", "b") if axis in getattr(t, f"{s}_dims")]
        if len(sides) != 1:
            return NotImplemented
        (side,) = sides
        x, dims = factor(t, side)
        done = eqn.primitive.bind(x, **{**eqn.params, "axis": dims.index(axis)})
        adapters[name] = with_factor(t, side, done)
    return [dataclasses.replace(w, base=rebind(eqn, [w.base])[0], adapters=adapters)]
