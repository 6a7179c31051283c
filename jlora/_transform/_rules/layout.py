"""Moving a kernel's entries about: transpose, reshape, broadcast, reverse, tile.

The base is treated as the program says. Of the factors only those that span a touched
dimension change; a renamed dimension costs nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from jlora._compat import Eqn
from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import RANK, Array, Dims, align
from jlora._transform._rules._table import Run, rule
from jlora._transform._rules._terms import (
    broadcast_to,
    cover,
    cover_term,
    drop_dims,
    each_term,
    fold_scale,
    rename,
    to_one_side,
)
from jlora._transform._rules.quantised import rebind


@rule("transpose")
def transpose(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """New names for the dimensions; the factors stay where they are."""
    (w,) = args
    new_dim = {old: new for new, old in enumerate(eqn.params["permutation"])}
    return [rename(w, rebind(eqn, [w.base])[0], new_dim)]


@rule("squeeze")
def squeeze(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """Drop dimensions of size one."""
    (w,) = args
    gone = {d % w.ndim for d in eqn.params["dimensions"]}
    return [drop_dims(w, rebind(eqn, [w.base])[0], gone)]


@rule("broadcast_in_dim")
def broadcast_in_dim(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """A new dimension is one the term is constant along: no factor spans it."""
    w, *dynamic = args
    if dynamic:
        return NotImplemented
    (base,) = rebind(eqn, [w.base])
    places = eqn.params["broadcast_dimensions"]
    sizes = [base.shape[to] for to in places]
    thin = broadcast_to(w, jax.ShapeDtypeStruct(sizes, w.dtype))
    return [rename(thin, base, dict(enumerate(places)))]


@rule("reshape")
def reshape(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """Merge or split dimensions that one factor spans alone (or both together)."""
    w, *dynamic = args
    if dynamic or eqn.params["dimensions"] is not None:
        return NotImplemented
    (base,) = rebind(eqn, [w.base])

    def change(t: Adapter) -> Any:
        moved = reshape_adapter(t, w.shape, base.shape)
        return NotImplemented if moved is None else moved

    return each_term(w, base, change)


def reshape_groups(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """Pair the smallest runs of old and new dimensions of equal size.

    >>> reshape_groups((2, 3, 4), (6, 2, 2))
    [([0, 1], [0]), ([2], [1, 2])]
    """
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [], []
        size_left = size_right = 1
        if i < len(old) and j < len(new):
            left, right = [i], [j]
            size_left, size_right = old[i], new[j]
            i, j = i + 1, j + 1
        while size_left != size_right or (not left and not right):
            if size_left < size_right or (size_left == size_right and i < len(old)):
                left.append(i)
                size_left *= old[i]
                i += 1
            else:
                right.append(j)
                size_right *= new[j]
                j += 1
        groups.append((left, right))
    return groups


def reshape_adapter(
    t: Adapter, old: Sequence[int], new: Sequence[int]
) -> Adapter | None:
    """The term on the reshaped kernel; None if a group mixes inputs and outputs."""
    groups = reshape_groups(old, new)
    starts = [0] * len(new)
    for left, right in groups:
        if len(left) == len(right) == 1:
            continue
        prepared = _for_group(t, [d for d in left if old[d] != 1], old)
        if prepared is None:
            return None
        t = prepared
    for left, right in groups:
        if len(left) == len(right) == 1:
            starts[right[0]] = t.starts[left[0]]

    def move(x: Array, dims: Dims) -> tuple[Array, Dims]:
        spanned = [d for d in range(len(old)) if d in dims]
        tail = [RANK] if RANK in dims else []
        x = align(x, dims, [*spanned, *tail])
        shape: list[int] = []
        new_dims: list[int] = []
        sizes = dict(zip([*spanned, *tail], x.shape, strict=True))
        for left, right in groups:
            if not any(d in dims for d in left):
                continue
            if len(left) == len(right) == 1:
                shape.append(sizes[left[0]])  # perhaps a window
                new_dims.append(right[0])
            elif any(d in dims and old[d] != 1 for d in left):
                shape += [new[d] for d in right]
                new_dims += right
        shape += [sizes[RANK]] if tail else []
        return lax.reshape(x, shape), (*new_dims, *tail)

    moved = t.map(move)
    return dataclasses.replace(moved, starts=tuple(starts))


def _for_group(t: Adapter, group: list[int], shape: Sequence[int]) -> Adapter | None:
    """The term with each array spanning all of those dimensions or none.

    None where inputs and outputs mix: their product has no two factors.
    """
    if not all(t.full(d, shape[d]) for d in group):
        if t.key is not None:
            return None
        t = cover_term(t, shape)
    sides = [{*group} & {*side} for side in (t.in_axes, t.out_axes, t.batch_axes)]
    if sides[0] and sides[1]:
        return None
    mixed = sides[2] and (sides[0] or sides[1])
    partial = {*group} & {*t.s_dims} and not {*group} <= {*t.s_dims}
    if (mixed or partial) and t.key is not None:
        return None
    for dim in sides[2] if mixed else ():
        t = to_one_side(t, dim, "a" if sides[0] else "b")
    t = fold_scale(t) if partial else t

    def fill(x: Array, dims: Dims) -> tuple[Array, Dims]:
        lacking = [d for d in group if d not in dims] if {*group} & {*dims} else []
        return lax.broadcast(x, [shape[d] for d in lacking]), (*lacking, *dims)

    return t.map(fill)


@rule("rev")
def rev(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """Reverse the factors' axes that lie along reversed dimensions."""
    (w,) = args
    reversed_dims = eqn.params["dimensions"]
    if not all(
        t.full(d, w.shape[d]) for t in w.adapters.values() for d in reversed_dims
    ):
        w = cover(w)
    if w is None:
        return NotImplemented

    def flip(x: Array, dims: Dims) -> tuple[Array, Dims]:
        axes = [i for i, d in enumerate(dims) if d in reversed_dims]
        return (lax.rev(x, axes) if axes else x), dims

    return [w.map(rebind(eqn, [w.base])[0], lambda t: t.map(flip))]


@rule("tile")
def tile(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """Repeat the factors along the dimensions that they span."""
    w = cover(args[0])
    if w is None:
        return NotImplemented
    reps = eqn.params["reps"]

    def repeat(x: Array, dims: Dims) -> tuple[Array, Dims]:
        for axis, d in enumerate(dims):
            if d != RANK and reps[d] != 1:
                x = lax.concatenate([x] * reps[d], axis)
        return x, dims

    return [w.map(rebind(eqn, [w.base])[0], lambda t: t.map(repeat))]
