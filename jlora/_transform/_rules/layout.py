"""Moving a kernel's entries about: transpose, reshape, slice, concatenate, ...

The base is treated as the program says. Of the factors only those that span a touched
dimension change; a renamed dimension costs nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding

from jlora import _compat
from jlora._compat import Eqn, rebind
from jlora._kernel.adapter import DIMS_OF, Adapter
from jlora._kernel.axes import RANK, Array, Dims, align, spread
from jlora._kernel.nodes import LowRank
from jlora._kernel.placement import factor_spec
from jlora._transform._rules._table import Run, rule


def rename(w: LowRank, base: Array, new_dim: dict[int, int]) -> LowRank:
    """The kernel's dimension d is now dimension `new_dim[d]` of `base`."""
    return w.map(base, lambda t: t.rename(new_dim, base.ndim))


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


def drop_dims(w: LowRank, base: Array, gone: set[int]) -> LowRank:
    """Squeeze those dimensions out of every factor that spans them."""
    kept = [d for d in range(w.ndim) if d not in gone]
    new_dim = {old: new for new, old in enumerate(kept)}

    def squeeze_factor(x: Array, dims: Dims) -> tuple[Array, Dims]:
        axes = [i for i, d in enumerate(dims) if d in gone]
        x = lax.squeeze(x, axes) if axes else x
        return x, tuple(d for d in dims if d not in gone)

    return w.map(base, lambda t: t.map(squeeze_factor).rename(new_dim, base.ndim))


@rule("broadcast_in_dim")
def broadcast_in_dim(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """A new dimension is one the term is constant along: no factor spans it."""
    w, *dynamic = args
    if dynamic:
        return NotImplemented
    (base,) = rebind(eqn, [w.base])
    places = eqn.params["broadcast_dimensions"]
    stretched = {d for d in range(w.ndim) if w.shape[d] != base.shape[places[d]]}
    thin = drop_dims(w, lax.squeeze(w.base, sorted(stretched)), stretched)
    kept = [places[d] for d in range(w.ndim) if d not in stretched]
    return [rename(thin, base, dict(enumerate(kept)))]


@rule("reshape")
def reshape(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """Merge or split dimensions that one factor spans alone (or both together)."""
    w, *dynamic = args
    if dynamic or eqn.params["dimensions"] is not None:
        return NotImplemented
    (base,) = rebind(eqn, [w.base])
    adapters = {}
    for name, t in w.adapters.items():
        adapters[name] = reshape_adapter(t, w.shape, base.shape)
        if adapters[name] is None:
            return NotImplemented
    return [dataclasses.replace(w, base=base, adapters=adapters)]


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
    owners = [
        frozenset(_owner(t, d) for d in left if old[d] != 1) for left, _ in groups
    ]
    starts = [0] * len(new)
    for (left, right), owner in zip(groups, owners, strict=True):
        if len(left) == len(right) == 1:
            starts[right[0]] = t.starts[left[0]]
        elif len(owner) > 1 or not all(t.full(d, old[d]) for d in left):
            return None

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


def _owner(t: Adapter, dim: int) -> str:
    if dim in t.both:
        return "both"
    return "a" if dim in t.a_only else "b" if dim in t.b_only else "neither"


@rule("rev")
def rev(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """Reverse the factors' axes that lie along reversed dimensions."""
    (w,) = args
    reversed_dims = eqn.params["dimensions"]
    if not all(
        t.full(d, w.shape[d]) for t in w.adapters.values() for d in reversed_dims
    ):
        return NotImplemented

    def flip(x: Array, dims: Dims) -> tuple[Array, Dims]:
        axes = [i for i, d in enumerate(dims) if d in reversed_dims]
        return (lax.rev(x, axes) if axes else x), dims

    return [w.map(rebind(eqn, [w.base])[0], lambda t: t.map(flip))]


# -- slices ----------------------------------------------------------------------------


@rule("slice")
def slice_(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """A static slice."""
    (w,) = args
    p = eqn.params
    strides = p["strides"] or (1,) * w.ndim
    (base,) = rebind(eqn, [w.base])
    bounds = list(zip(p["start_indices"], p["limit_indices"], strides, strict=True))
    return _each(w, base, lambda t: slice_adapter(t, w.shape, bounds))


@rule("split")
def split(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """Consecutive slices along one dimension."""
    (w,) = args
    axis, out, start = eqn.params["axis"], [], 0
    for base, size in zip(rebind(eqn, [w.base]), eqn.params["sizes"], strict=True):
        bounds = [(0, n, 1) for n in w.shape]
        bounds[axis] = (start, start + int(size), 1)
        out += _each(
            w, base, functools.partial(slice_adapter, shape=w.shape, bounds=bounds)
        )
        start += int(size)
    return out


def _each(w: LowRank, base: Array, change: Callable[[Adapter], Any]) -> Any:
    """Change every adapter; NotImplemented from one is the answer for all."""
    changed = {name: change(t) for name, t in w.adapters.items()}
    if any(t is NotImplemented for t in changed.values()):
        return NotImplemented
    kept = {name: t for name, t in changed.items() if t is not None}
    return [dataclasses.replace(w, base=base, adapters=kept)]


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

    def change(t: Adapter) -> Any:
        whole = all(t.full(d, w.shape[d]) for d in cut_dims)
        return t.map(cut) if whole else NotImplemented

    return _each(w, base, change)


# -- joining ---------------------------------------------------------------------------


@rule("concatenate")
def concatenate(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """Side by side: each term keeps to its window, or like terms join into one."""
    dim = eqn.params["dimension"]
    adapters = [t for w in args if isinstance(w, LowRank) for t in w.adapters.values()]
    gained = [t for t in adapters if t.gain is not None]
    if any(dim not in t.o_dims and t.size(dim) is not None for t in gained):
        return NotImplemented  # a column would have a gain for each of its parts
    return [join(args, eqn.params["dimension"], rebind(eqn, _bases(args))[0])]


@rule("stack")
def stack(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """A new dimension, and the operands side by side along it."""
    (base,) = rebind(eqn, _bases(args))
    axis = eqn.params["axis"] % base.ndim
    return [join([_expand(w, axis) for w in args], axis, base)]


def _bases(args: Sequence[Any]) -> list[Array]:
    return [w.base if isinstance(w, LowRank) else w for w in args]


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
            t = _span(t, dim, w.shape[dim])
            starts = list(t.starts)
            starts[dim] += start
            adapters[str(len(adapters))] = dataclasses.replace(t, starts=tuple(starts))
        start += w.shape[dim]
    return LowRank(base, adapters, path)


def _span(t: Adapter, dim: int, size: int) -> Adapter:
    """The same term with `dim` spanned by both factors, so that it can be a window."""
    if t.size(dim) is not None:
        return t
    return t.map(lambda x, dims: _add_axis(x, dims, dim, size))


def _add_axis(x: Array, dims: Dims, dim: int, size: int) -> tuple[Array, Dims]:
    return lax.broadcast(x, (size,)), (dim, *dims)


def _alike(args: Sequence[Any], dim: int) -> list[Adapter] | None:
    """The single adapters of all operands if they can be stacked into one."""
    adapters = []
    for w in args:
        if not isinstance(w, LowRank) or len(w.adapters) != 1:
            return None
        (t,) = w.adapters.values()
        if not t.covers(w.shape) or t.a_only.count(dim) or t.b_only.count(dim):
            return None
        adapters.append(_span(t, dim, w.shape[dim]))
    same = {
        (t.rank, t.dropout, t.key is None, t.gain is None, frozenset(t.both))
        for t in adapters
    }
    return adapters if len(same) == 1 else None


def _join_alike(adapters: list[Adapter], dim: int) -> Adapter:
    """Concatenate the factors of like terms along a dimension that both span."""
    first = adapters[0]

    def joined(name: str, named: str) -> Array:
        dims = getattr(first, named)
        arrays = [spread(getattr(t, name), getattr(t, named), dims) for t in adapters]
        return lax.concatenate(arrays, dims.index(dim))

    present = {n: d for n, d in DIMS_OF.items() if getattr(first, n) is not None}
    return dataclasses.replace(first, **{n: joined(n, d) for n, d in present.items()})


# -- shardings -------------------------------------------------------------------------


@rule("sharding_constraint", *_compat.RESHARD)
def sharding_constraint(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """The kernel's sharding for the base, its part of each axis for the factors."""
    (w,) = args
    (base,) = rebind(eqn, [w.base])
    sharding = next(
        v for k, v in eqn.params.items() if k in ("sharding", "dst_sharding")
    )
    if not isinstance(sharding, NamedSharding):
        return [w.map(base, lambda t: t)]
    place = (
        lax.with_sharding_constraint
        if eqn.primitive.name == "sharding_constraint"
        else _compat.reshard
    )

    def constrain(x: Array, dims: Dims) -> tuple[Array, Dims]:
        spec = factor_spec(sharding.spec, dims)
        return place(x, NamedSharding(sharding.mesh, spec)), dims

    return [w.map(base, lambda t: t.map(constrain))]


@rule("all_gather", "all_gather_invariant")
def all_gather(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """Gathering a sharded kernel gathers the factors that span that dimension."""
    (w,) = args
    p = eqn.params
    dim = p["all_gather_dimension"]
    if not p["tiled"] or not all(
        t.full(dim, w.shape[dim]) for t in w.adapters.values()
    ):
        return NotImplemented

    def one(x: Array, dims: Dims) -> tuple[Array, Dims]:
        if dim not in dims:
            return x, dims
        params = {**p, "all_gather_dimension": dims.index(dim)}
        return eqn.primitive.bind(x, **params), dims

    return [w.map(rebind(eqn, [w.base])[0], lambda t: t.map(one))]
