"""Kernels side by side: concatenate, stack."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._compat import Eqn, rebind
from jlora._kernel.adapter import DIMS_OF, Adapter
from jlora._kernel.axes import Array, expand
from jlora._kernel.nodes import LowRank
from jlora._transform._rules._table import Run, rule
from jlora._transform._rules._terms import bases, rename, span_both


@rule("concatenate")
def concatenate(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """Side by side: each term keeps to its window, or like terms join into one."""
    dim = eqn.params["dimension"]
    adapters = [t for w in args if isinstance(w, LowRank) for t in w.adapters.values()]
    if any(
        t.gain is not None and dim not in t.o_dims and t.size(dim) is not None
        for t in adapters
    ):
        return NotImplemented  # a column would have a gain for each of its parts
    return [join(args, eqn.params["dimension"], rebind(eqn, bases(args))[0])]


@rule("stack")
def stack(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """A new dimension, and the operands side by side along it."""
    (base,) = rebind(eqn, bases(args))
    axis = eqn.params["axis"] % base.ndim
    return [join([_expand(w, axis) for w in args], axis, base)]


def _expand(w: Any, axis: int) -> Any:
    """An operand with a new axis. Only its shape is asked for, so no base is moved."""
    shape = (*w.shape[:axis], 1, *w.shape[axis:])
    base = jax.ShapeDtypeStruct(shape, w.dtype)
    if not isinstance(w, LowRank):
        return base
    return rename(w, base, {d: d + (d >= axis) for d in range(w.ndim)})


def join(args: Sequence[Any], dim: int, base: Array) -> LowRank:
    """Operands side by side along `dim`, of which `base` is the dense part."""
    path = " + ".join(dict.fromkeys(w.path for w in args if isinstance(w, LowRank)))
    alike = _alike(args, dim)
    if alike:
        return LowRank(base, {"": _join_alike(alike, dim)}, path)
    adapters: dict[str, Adapter] = {}
    start = 0
    for w in args:
        for t in w.adapters.values() if isinstance(w, LowRank) else ():
            t = span_both(t, dim, w.shape[dim])
            starts = list(t.starts)
            starts[dim] += start
            adapters[str(len(adapters))] = dataclasses.replace(t, starts=tuple(starts))
        start += w.shape[dim]
    return LowRank(base, adapters, path)


def _alike(args: Sequence[Any], dim: int) -> list[Adapter] | None:
    """The single adapters of all operands if they can be stacked into one."""
    adapters: list[Adapter] = []
    for w in args:
        if not isinstance(w, LowRank) or len(w.adapters) != 1:
            return None
        (t,) = w.adapters.values()
        if not t.covers(w.shape) or t.in_axes.count(dim) or t.out_axes.count(dim):
            return None
        if dim in t.batch_axes and dim not in t.s_dims:
            return None
        t = span_both(t, dim, w.shape[dim])
        if adapters and t.in_axes != t.out_axes and t.gain is None:
            t = _sides_like(t, adapters[0])
        adapters.append(t)
    same = {
        (
            t.rank, t.dropout, t.key is None, t.gain is None, t.keep is None,
            frozenset(t.batch_axes),
            frozenset(t.in_axes), frozenset(t.out_axes), frozenset(t.s_dims),
            frozenset(t.o_dims),
        )
        for t in adapters
    }  # fmt: skip
    return adapters if len(same) == 1 else None


def _sides_like(t: Adapter, other: Adapter) -> Adapter:
    """The term with its factors exchanged where that makes it like the other."""
    if frozenset(t.in_axes) != frozenset(other.out_axes):
        return t
    return dataclasses.replace(t, a=t.b, b=t.a, a_dims=t.b_dims, b_dims=t.a_dims)


def _join_alike(adapters: list[Adapter], dim: int) -> Adapter:
    """Concatenate the factors of like terms along a dimension that both span."""
    first = adapters[0]

    def joined(name: str, named: str) -> Array:
        dims = getattr(first, named)
        arrays = [expand(getattr(t, name), getattr(t, named), dims) for t in adapters]
        if name != "key":
            dtype = jnp.result_type(*arrays)
            arrays = [x.astype(dtype) for x in arrays]
        return lax.concatenate(arrays, dims.index(dim))

    present = {n: d for n, d in DIMS_OF.items() if getattr(first, n) is not None}
    return dataclasses.replace(first, **{n: joined(n, d) for n, d in present.items()})
