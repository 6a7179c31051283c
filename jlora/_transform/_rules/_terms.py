"""Low-rank terms in the form that a rule needs; a term's value stays what it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _compat
from jlora._kernel import forms
from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import RANK, Array, Dims, align, expand, pad_to
from jlora._kernel.nodes import LowRank
from jlora._kernel.quantized import dense


def rename(w: LowRank, base: Array, new_dim: dict[int, int]) -> LowRank:
    """The kernel's dimension d is now dimension `new_dim[d]` of `base`."""
    return w.map(base, lambda t: t.rename(new_dim, base.ndim))


def drop_dims(w: LowRank, base: Array, gone: set[int]) -> LowRank:
    """Squeeze dimensions of size one out of every factor that spans them."""
    kept = [d for d in range(w.ndim) if d not in gone]
    new_dim = {old: new for new, old in enumerate(kept)}

    def squeeze_factor(x: Array, dims: Dims) -> tuple[Array, Dims]:
        axes = [i for i, d in enumerate(dims) if d in gone]
        x = lax.squeeze(x, axes) if axes else x
        return x, tuple(d for d in dims if d not in gone)

    return w.map(base, lambda t: t.map(squeeze_factor).rename(new_dim, base.ndim))


def broadcast_to(w: LowRank, base: Array) -> LowRank:
    """The terms on a base that is larger where w has dimensions of size one."""
    gone = {d for d in range(w.ndim) if w.shape[d] != base.shape[d]}
    if not gone:
        return dataclasses.replace(w, base=base)
    kept = [d for d in range(w.ndim) if d not in gone]
    thin = jax.ShapeDtypeStruct([w.shape[d] for d in kept], w.dtype)
    return rename(drop_dims(w, thin, gone), base, dict(enumerate(kept)))


def span_both(t: Adapter, dim: int, size: int) -> Adapter:
    """A term that is constant along `dim`, with all of its arrays spanning it.

    So that it can be a window along `dim`, or differ from index to index.
    """
    if t.size(dim) is not None:
        return t
    return t.map(lambda x, dims: (lax.broadcast(x, (size,)), (dim, *dims)))


# The primitives whose rules take terms of which a stack has one factor for all.
KEEPS_SHARED = frozenset(
    [
        "scan", "while", "cond", "closed_call", "core_call", "call", "name", "copy",
        "copy_p", "convert_element_type", "reduce_precision", "stop_gradient",
        "optimization_barrier", *_compat.JIT, *_compat.REMAT, *_compat.PVARY,
    ]
)  # fmt: skip


def spanning(x: Any) -> Any:
    """A value with every factor along the stacks that its term has an index for.

    Layers of a stack may share a factor (VeRA's projection). A scan hands it to each
    as it is; other rules are told of a term that differs from index to index.
    """
    if not isinstance(x, LowRank):
        return x
    return x.map(x.base, lambda t: forms.spanning(t, x.shape))


def cover(w: LowRank) -> LowRank | None:
    """The same kernel with terms that span all of it, padded with zeros.

    None where a term has a key for each index of a window: no key stands for none.
    """
    adapters = {}
    for name, t in w.adapters.items():
        windows = {d for d in range(w.ndim) if not t.full(d, w.shape[d])}
        if t.key is not None and windows & {*t.s_dims}:
            return None
        adapters[name] = cover_term(t, w.shape) if windows else t
    return dataclasses.replace(w, adapters=adapters)


def cover_term(t: Adapter, shape: Sequence[int]) -> Adapter:
    """The term on all of a kernel of that shape; keys stay as they are."""

    def wide(x: Array | None, dims: Dims, fill: int = 0) -> Any:
        if x is None:
            return None
        starts = [None if d < 0 else t.starts[d] for d in dims]
        sizes = [0 if d < 0 else shape[d] for d in dims]
        return (
            pad_to(x - fill, starts, sizes) + fill if fill else pad_to(x, starts, sizes)
        )

    return dataclasses.replace(
        t,
        a=wide(t.a, t.a_dims),
        b=wide(t.b, t.b_dims),
        scale=wide(t.scale, t.s_dims),
        gain=wide(t.gain, t.o_dims, fill=1),
        starts=(0,) * len(shape),
    )


def to_one_side(t: Adapter, dim: int, side: str) -> Adapter:
    """The term with `dim`, that both factors span, in one of them alone.

    Σ_r a[d,i,r]·b[d,r,o] = Σ_(e,r) a[i,(e,r)]·(δ[e,d]·b[d,r,o]): a rank for each index.
    """
    t = fold_scale(t)
    other = {"a": "b", "b": "a"}[side]
    x, dims = factor(t, other)
    rest = [d for d in dims if d not in (dim, RANK)]
    x = align(x, dims, [*rest, dim, RANK])
    size, rank = x.shape[-2:]
    x = x.reshape(*x.shape[:-2], size * rank)
    y, y_dims = factor(t, side)
    y_rest = [d for d in y_dims if d not in (dim, RANK)]
    y = align(y, y_dims, [*y_rest, dim, RANK])
    same = jnp.eye(size, dtype=y.dtype)[:, :, None]  # [d, e, 1]
    y = (y[..., None, :] * same).reshape(*y.shape[:-1], size * rank)
    t = with_factor(t, other, x, (*rest, RANK))
    return with_factor(t, side, y, (*y_rest, dim, RANK))


def fold_scale(t: Adapter) -> Adapter:
    """The term with its scale in `a`."""
    a = t.a * expand(t.scale, t.s_dims, t.a_dims)
    return dataclasses.replace(t, a=a, scale=jnp.ones((), t.scale.dtype), s_dims=())


def change_factor(
    t: Adapter, shape: Sequence[int], v: Array, axes: Collection[int],
    f: Callable[[Array, Array], Array],
) -> Adapter | None:  # fmt: skip
    """The term with `f(factor, v)` in the place of one factor.

    For an f that is linear in the factor, and v that varies along some of the kernel's
    dimensions: exact where one factor spans all of these, else None.

    Args:
      t: the term.
      shape: the kernel's.
      v: as many axes as the kernel, each of its size or of size one.
      axes: along which v varies.
      f: of a factor and of v, their axes broadcast to each other.
    """
    for dim in axes:
        t = span_both(t, dim, shape[dim])
    for dim in axes:  # v where the term's window is
        size = t.size(dim) or shape[dim]
        v = lax.slice_in_dim(v, t.starts[dim], t.starts[dim] + size, axis=dim)
    order = sorted(axes)
    v = lax.squeeze(v, [d for d in range(len(shape)) if d not in axes])
    for name in ("a", "b"):
        x, dims = factor(t, name)
        if set(axes) <= set(dims):
            return with_factor(t, name, f(x, expand(v, order, dims)))
    return None


def factor(t: Adapter, side: str) -> tuple[Array, Dims]:
    """The factor `a` or `b`, and its dimensions."""
    return getattr(t, side), getattr(t, f"{side}_dims")


def with_factor(t: Adapter, side: str, x: Array, dims: Dims | None = None) -> Adapter:
    """The term with another factor `a` or `b`."""
    changed: dict[str, Any] = {side: x}
    if dims is not None:
        changed[f"{side}_dims"] = dims
    return dataclasses.replace(t, **changed)


def varying_axes(v: Any, constant: Iterable[int]) -> tuple[Array, frozenset[int]]:
    """V with one index of each axis that it is constant along, and its other axes."""
    constant = {d for d in range(jnp.ndim(v)) if v.shape[d] == 1} | set(constant)
    for d in constant:
        v = lax.slice_in_dim(v, 0, 1, axis=d)
    return v, frozenset(range(jnp.ndim(v))) - constant


def union(base: Array, kernels: Sequence[LowRank]) -> LowRank:
    """A kernel with the terms of several of the base's shape."""
    path = " + ".join(dict.fromkeys(w.path for w in kernels))
    holders = [w for w in kernels if w.adapters]
    if len(holders) == 1:
        return LowRank(base, holders[0].adapters, path)
    terms = [t for w in holders for t in w.adapters.values()]
    return LowRank(base, {str(n): t for n, t in enumerate(terms)}, path)


def each_term(w: LowRank, base: Array, change: Callable[[Adapter], Any]) -> Any:
    """Change every adapter; None drops one, NotImplemented is the answer for all."""
    changed = {name: change(t) for name, t in w.adapters.items()}
    if any(t is NotImplemented for t in changed.values()):
        return NotImplemented
    kept = {name: t for name, t in changed.items() if t is not None}
    return [dataclasses.replace(w, base=base, adapters=kept)]


def scaled_later(w: LowRank, v: Array, axes: frozenset[int]) -> LowRank | None:
    """W with a base that counts v times, v along one side of every term.

    The products of the base are multiplied, not the base: a kernel of that size would
    be formed, and its whole gradient for that of v.

    Returns:
      The kernel, whose terms are as they were; None where a side has to be multiplied.
    """
    terms = list(w.adapters.values())
    both = {d for t in terms for d in t.batch_axes}
    one_side = any(
        all(axes <= {*side(t), *both} for t in terms)
        for side in (lambda t: t.in_axes, lambda t: t.out_axes)
    )
    if not terms or not one_side or not all(t.covers(w.shape) for t in terms):
        return None
    gained = {name: t for name, t in w.adapters.items() if t.gain is not None}
    dims = tuple(sorted(axes))
    v = v.reshape([w.shape[d] for d in dims])
    v = v.astype(jnp.promote_types(v.dtype, jnp.float32))
    if not gained:
        name = next(n for n in map(str, range(len(terms) + 1)) if n not in w.adapters)
        empty = _without_rank(terms[0], v, dims)
        return dataclasses.replace(w, adapters={**w.adapters, name: empty})
    ((name, t), *others) = gained.items()
    if others or t.rank or {*t.o_dims} != {*dims}:
        return None
    new = dataclasses.replace(t, gain=t.gain * align(v, dims, t.o_dims))
    return dataclasses.replace(w, adapters={**w.adapters, name: new})


def _without_rank(t: Adapter, gain: Array, dims: Dims) -> Adapter:
    """A term that adds nothing, for its gain alone."""

    def empty(x: Array, x_dims: Dims) -> Array:
        return lax.slice_in_dim(x, 0, 0, axis=x_dims.index(RANK))

    return dataclasses.replace(
        t, a=empty(t.a, t.a_dims), b=empty(t.b, t.b_dims), key=None, gain=gain,
        keep=None, o_dims=dims, dropout=0.0,
    )  # fmt: skip


def scaled_now(x: Any) -> Any:
    """A value with the base multiplied by what `scaled_later` left for its products."""
    if not isinstance(x, LowRank):
        return x
    base, adapters = x.base, {}
    for name, t in x.adapters.items():
        if t.gain is None or t.rank:
            adapters[name] = t
        else:
            gain, dims = LowRank(x.base, {"": t}).gain() or (1, ())
            factor = expand(gain, dims, range(x.ndim))
            base = (dense(base).astype(factor.dtype) * factor).astype(base.dtype)
    return dataclasses.replace(x, base=base, adapters=adapters)


def is_scaled_later(x: Any) -> bool:
    """Whether `scaled_later` left something for a kernel's products."""
    terms = x.adapters.values() if isinstance(x, LowRank) else ()
    return any(not t.rank and t.gain is not None for t in terms)


def has_gain(w: Any) -> bool:
    """Whether a kernel's base is multiplied by a gain (DoRA)."""
    return isinstance(w, LowRank) and any(
        t.gain is not None for t in w.adapters.values()
    )


def bases(args: Sequence[Any]) -> list[Array]:
    """The operands with the base of each low-rank one in its place."""
    return [w.base if isinstance(w, LowRank) else w for w in args]
