"""Parts of a kernel, and kernels as parts: slices, padding, updates."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jlora._compat import Eqn
from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import RANK, Array, Dims
from jlora._kernel.nodes import LowRank
from jlora._transform._rules._table import Run, rule
from jlora._transform._rules._terms import (
    bases,
    cover,
    each_term,
    factor,
    has_gain,
    span_both,
    union,
    with_factor,
)
from jlora._transform._rules.quantised import rebind


@rule("slice")
def slice_(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """A static slice."""
    (w,) = args
    p = eqn.params
    strides = p["strides"] or (1,) * w.ndim
    (base,) = rebind(eqn, [w.base])
    bounds = list(zip(p["start_indices"], p["limit_indices"], strides, strict=True))
    return each_term(w, base, lambda t: slice_adapter(t, w.shape, bounds))


@rule("split")
def split(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """Consecutive slices along one dimension."""
    (w,) = args
    axis, out, start = eqn.params["axis"], [], 0
    for base, size in zip(rebind(eqn, [w.base]), eqn.params["sizes"], strict=True):
        bounds = [(0, n, 1) for n in w.shape]
        bounds[axis] = (start, start + int(size), 1)
        out += each_term(
            w, base, functools.partial(slice_adapter, shape=w.shape, bounds=bounds)
        )
        start += int(size)
    return out


def slice_adapter(
    t: Adapter, shape: Sequence[int], bounds: Sequence[tuple[int, int, int]]
) -> Any:
    """The term's part inside the bounds; None where they do not meet."""
    starts = list(t.starts)
    cuts: dict[int, tuple[int, int, int]] = {}
    for dim, (start, limit, stride) in enumerate(bounds):
        size = t.size(dim)
        if size is None or (start, limit, stride) == (0, shape[dim], 1):
            continue
        if size != shape[dim] and stride != 1:
            return NotImplemented
        first = max(start, t.starts[dim])
        last = min(limit, t.starts[dim] + size)
        if first >= last:
            return None
        cuts[dim] = (first - t.starts[dim], last - t.starts[dim], stride)
        starts[dim] = first - start

    def cut(x: Array, dims: Dims) -> tuple[Array, Dims]:
        for axis, dim in enumerate(dims):
            if dim in cuts:
                x = lax.slice_in_dim(x, *cuts[dim], axis=axis)
        return x, dims

    return dataclasses.replace(t.map(cut), starts=tuple(starts))


@rule("dynamic_slice")
def dynamic_slice(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """A slice at traced positions: layer l of a stack, say."""
    w, *starts = args
    sizes = eqn.params["slice_sizes"]
    if not isinstance(w, LowRank) or len(starts) != w.ndim:
        return NotImplemented
    (base,) = rebind(eqn, [w.base, *starts])
    cut_dims = {d for d in range(w.ndim) if sizes[d] != w.shape[d]}

    def cut(x: Array, dims: Dims) -> tuple[Array, Dims]:
        for axis, dim in enumerate(dims):
            if dim in cut_dims:
                x = lax.dynamic_slice_in_dim(x, starts[dim], sizes[dim], axis)
        return x, dims

    if not all(t.full(d, w.shape[d]) for t in w.adapters.values() for d in cut_dims):
        w = cover(w)
    return NotImplemented if w is None else [w.map(base, lambda t: t.map(cut))]


@rule("pad")
def pad(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """The terms are nought outside of the kernel, whatever the base is padded with."""
    w, value = args
    if not isinstance(w, LowRank) or isinstance(value, LowRank):
        return NotImplemented
    config = [tuple(map(int, c)) for c in eqn.params["padding_config"]]
    padded = [d for d, c in enumerate(config) if any(c)]
    gains = [{*t.o_dims} for t in w.adapters.values() if t.gain is not None]
    inside = all({*padded} <= dims for dims in gains)
    if not inside and not run.facts().is_zero(eqn.invars[1]):
        return NotImplemented  # the base's gain would count for what is not the base's
    (base,) = rebind(eqn, [w.base, value])
    if all(low >= 0 and high >= 0 and not inner for low, high, inner in config):

        def shift(t: Adapter) -> Adapter:
            for d in padded:
                t = span_both(t, d, w.shape[d])
            starts = [start + c[0] for start, c in zip(t.starts, config, strict=True)]
            return dataclasses.replace(t, starts=tuple(starts))

        return [w.map(base, shift)]
    whole = cover(w)
    if whole is None:
        return NotImplemented
    return each_term(whole, base, functools.partial(_pad_term, shape=w.shape, c=config))


def _pad_term(t: Adapter, shape: Sequence[int], c: list[Any]) -> Any:
    """The factors themselves padded, or cut where the padding is negative."""
    padded = [d for d in range(len(shape)) if any(c[d])]
    if t.key is not None and {*padded} & {*t.s_dims}:
        return NotImplemented
    for d in padded:
        t = span_both(t, d, shape[d])

    def one(x: Array | None, dims: Dims, fill: int) -> Any:
        if x is None:
            return None
        config = [(0, 0, 0) if d == RANK else c[d] for d in dims]
        return lax.pad(x, jnp.asarray(fill, x.dtype), config)

    return dataclasses.replace(
        t,
        a=one(t.a, t.a_dims, 0),
        b=one(t.b, t.b_dims, 0),
        scale=one(t.scale, t.s_dims, 1),
        gain=one(t.gain, t.o_dims, 1),
    )


@rule("dynamic_update_slice")
def dynamic_update_slice(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """A part replaced: the old terms are nought there, the new ones elsewhere."""
    operand, update, *starts = args
    if has_gain(operand) or has_gain(update):
        return NotImplemented
    (base,) = rebind(eqn, [*bases([operand, update]), *starts])
    kernels = []
    if isinstance(operand, LowRank):
        kernels.append(_cut_out(operand, update.shape, starts))
    if isinstance(update, LowRank):
        kernels.append(_set_into(update, base.shape, starts))
    known = [w for w in kernels if w is not None]
    return [union(base, known)] if len(known) == len(kernels) else NotImplemented


def _cut_out(w: LowRank, sizes: Sequence[int], starts: list[Any]) -> LowRank | None:
    """W with nought in a part that is all of it but along one factor's dimensions."""
    whole = cover(w)
    if whole is None:
        return None
    cut = {d for d in range(w.ndim) if sizes[d] != w.shape[d]}
    adapters = {}
    for name, t in whole.adapters.items():
        for d in cut:
            t = span_both(t, d, w.shape[d])
        side = next((s for s in "ab" if cut <= {*getattr(t, f"{s}_dims")}), None)
        if side is None:
            return None
        if cut:
            x, dims = factor(t, side)
            nought = [
                n if d not in cut else sizes[d]
                for d, n in zip(dims, x.shape, strict=True)
            ]
            where = [starts[d] if d in cut else 0 for d in dims]
            x = lax.dynamic_update_slice(x, jnp.zeros(nought, x.dtype), where)
            t = with_factor(t, side, x)
        adapters[name] = t
    return dataclasses.replace(w, adapters=adapters)


def _set_into(w: LowRank, shape: Sequence[int], starts: list[Any]) -> LowRank | None:
    """W's terms as those of a larger kernel, at traced positions."""
    moved = [d for d in range(w.ndim) if w.shape[d] != shape[d]]
    whole = cover(w)
    keyed = any(
        t.key is not None and {*moved} & {*t.s_dims} for t in w.adapters.values()
    )
    if whole is None or keyed:
        return None

    def one(t: Adapter) -> Adapter:
        t = functools.reduce(lambda t, d: span_both(t, d, w.shape[d]), moved, t)
        return t.map(place)

    def place(x: Array, dims: Dims) -> tuple[Array, Dims]:
        if not {*moved} & {*dims}:
            return x, dims
        sizes = [
            shape[d] if d in moved else n for d, n in zip(dims, x.shape, strict=True)
        ]
        where = [starts[d] if d in moved else 0 for d in dims]
        return lax.dynamic_update_slice(jnp.zeros(sizes, x.dtype), x, where), dims

    return whole.map(whole.base, one)
