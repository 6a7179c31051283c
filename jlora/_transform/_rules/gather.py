"""`gather` from an adapted table: embedding lookups, `jnp.take`, `W[ids]`.

    (W + s·A·B)[ids] = W[ids] + s·A[ids]·B

Looking up along a stack (`experts[ids]`) gives kernels, not activations: each with its
own factors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from jlora._compat import Eqn
from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import Array, Dims, contract, expand
from jlora._kernel.bank import (
    acting,
    at_tokens,
    by_token,
    has_bank,
    pick_axis,
    picked,
    scale_of,
)
from jlora._kernel.nodes import LowRank
from jlora._transform._rules._table import Run, rule
from jlora._transform._rules._terms import cover, has_gain
from jlora._transform._rules.matmul import gained
from jlora._transform._rules.quantised import rebind

Label = Any  # an int names a kernel dimension, ("i", k) the k-th axis of the indices


@rule("gather")
def gather(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """Rows of a low-rank table, dense: the product with `b` follows the lookup."""
    w, given = args
    if not isinstance(w, LowRank):
        return NotImplemented
    w = cover(picked(w) if has_bank(w) and has_gain(w) else w)
    if w is None:
        return NotImplemented
    p, columns = without_whole_axes(eqn.params, w.shape)
    indices = given[..., columns] if len(columns) < given.shape[-1] else given
    numbers = p["dimension_numbers"]
    touched = looked_up_axes(p, w.shape)
    w = w.map(w.base, lambda t: _span_looked_up(t, touched, w.shape))
    adapters = list(w.adapters.values())
    order = _output_order(w, numbers, indices.ndim - 1)
    if all(touched <= set(t.batch_axes) and t.key is None for t in adapters):
        (base,) = rebind(eqn, [w.base, given])
        return [w.map(base, lambda t: _kernels(t, indices, p, order))]
    if not all(
        touched <= set(t.in_axes) or touched <= set(t.out_axes) for t in adapters
    ):
        return NotImplemented
    token: Label = None
    if by_token(w):
        axis, start = run.token_axis(1, w)
        token, w = ("i", axis), at_tokens(w, start, indices.shape[axis])
        adapters = list(w.adapters.values())
    (out,) = rebind(eqn, [w.base, given])
    gain = w.gain()
    if gain is not None:
        stack = _batch_labels(numbers)
        if touched <= set(gain[1]):
            found = _look_up(*gain, indices, p)
        elif touched & set(gain[1]):
            return NotImplemented
        else:
            found = gain[0], [stack.get(d, d) for d in gain[1]]
        out = gained(out, found, order)
    for t in adapters:
        if not t.rank:
            continue
        out = out + _rows(w, t, indices, p, touched, order, token).astype(out.dtype)
    return [out]


def without_whole_axes(
    p: dict[str, Any], shape: Sequence[int]
) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    """A gather's parameters without positions on axes of which it takes all.

    Returns:
      The parameters, and which columns of the indices they still use.
    """
    numbers, sizes = p["dimension_numbers"], p["slice_sizes"]
    clipped = p["mode"] in (_MODE.CLIP, _MODE.PROMISE_IN_BOUNDS)
    columns = [
        n
        for n, d in enumerate(numbers.start_index_map)
        if not clipped or sizes[d] != shape[d] or d in numbers.collapsed_slice_dims
    ]
    used = tuple(numbers.start_index_map[n] for n in columns)
    numbers = numbers._replace(start_index_map=used)
    return {**p, "dimension_numbers": numbers}, np.asarray(columns, int)


def looked_up_axes(p: dict[str, Any], shape: Sequence[int]) -> set[int]:
    """The axes along which a gather does not take all, stacks left out."""
    numbers = p["dimension_numbers"]
    touched = {d for d, size in enumerate(shape) if p["slice_sizes"][d] != size}
    touched |= {*numbers.start_index_map, *numbers.collapsed_slice_dims}
    return touched - {*numbers.operand_batching_dims}


_MODE = lax.GatherScatterMode


def _span_looked_up(t: Adapter, touched: set[int], shape: Sequence[int]) -> Adapter:
    """The term with `a` spanning what is looked up, where it is constant along that."""
    if any(t.size(d) is not None for d in touched):
        return t
    a = lax.broadcast(t.a, [shape[d] for d in touched])
    return dataclasses.replace(t, a=a, a_dims=(*touched, *t.a_dims))


def _rows(
    w: LowRank, t: Adapter, indices: Array, p: Any, touched: set[int],
    order: list[Label], token: Label = None,
) -> Array:  # fmt: skip
    """`s·A[ids]·B`, or `s·A·B[ids]` where the lookup is along outputs."""
    first, second = (t.a, t.a_dims), (t.b, t.b_dims)
    if touched <= set(t.out_axes):
        first, second = second, first
    (x, dims), (factor, factor_dims) = first, second
    # A stack that is looked up along with its indices is one of their axes.
    stack = _batch_labels(p["dimension_numbers"])
    labels: Sequence[Label]
    if token is not None:
        rows, labels = _look_up(x, dims, indices, p)
        rows = acting(t, rows, labels, token)
        rows = rows * expand(t.scale, [stack.get(d, d) for d in t.s_dims], labels)
    elif t.is_bank:
        # Of every adapter the few rows, and of these the one's: no table is picked.
        rows, labels = pick_axis(*_look_up(x, dims, indices, p), t.which)
        factor, factor_dims = pick_axis(factor, factor_dims, t.which)
        scale, s_dims = scale_of(t)
        rows = rows * expand(scale, [stack.get(d, d) for d in s_dims], labels)
    else:
        x = x * expand(t.scale, t.s_dims, dims)
        rows, labels = _look_up(x, dims, indices, p)
    factor_labels = [stack.get(d, d) for d in factor_dims]
    # In full precision: a lookup rounds nothing, and a trained row is to be itself.
    low, labels = contract(
        rows.astype(w.dtype), labels, factor.astype(w.dtype), factor_labels, set(order),
        precision="highest",
    )  # fmt: skip
    return expand(low, labels, order)


def _batch_labels(numbers: Any) -> dict[int, Label]:
    """Which axis of the indices each of the kernel's batching dimensions goes with."""
    pairs = zip(
        numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True
    )
    return {d: ("i", axis) for d, axis in pairs}


def _kernels(t: Adapter, indices: Array, p: Any, order: list[Label]) -> Adapter:
    """The term of each kernel that is looked up, on the result's dimensions."""

    def one(x: Array, dims: Dims) -> tuple[Array, Dims]:
        x, labels = _look_up(x, dims, indices, p)
        # Ranks and banks are no dimensions.
        kept = (n if isinstance(n, int) and n < 0 else order.index(n) for n in labels)
        return x, tuple(kept)

    # It covers the whole table, so it covers what is looked up: no window.
    return dataclasses.replace(t.map(one), starts=(0,) * len(order))


def _look_up(
    x: Array, dims: Dims, indices: Array, p: Any
) -> tuple[Array, Sequence[Label]]:
    """The kernel's lookup done to one factor: `[*indices, *what is left of it]`."""
    numbers = p["dimension_numbers"]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    window = [d for d in dims if d not in gone]
    batch = [(d, axis) for d, (_, axis) in _batch_labels(numbers).items() if d in dims]
    ids = [("i", k) for k in range(indices.ndim - 1)]

    def axes(ds: Any) -> tuple[int, ...]:
        return tuple(dims.index(d) for d in ds)

    found = lax.gather(
        x,
        indices,
        lax.GatherDimensionNumbers(
            offset_dims=tuple(range(len(ids), len(ids) + len(window))),
            collapsed_slice_dims=tuple(sorted(axes(numbers.collapsed_slice_dims))),
            start_index_map=axes(numbers.start_index_map),
            operand_batching_dims=axes(d for d, _ in batch),
            start_indices_batching_dims=tuple(axis for _, axis in batch),
        ),
        [p["slice_sizes"][d] if d >= 0 else x.shape[dims.index(d)] for d in dims],
        unique_indices=p["unique_indices"],
        indices_are_sorted=p["indices_are_sorted"],
        mode=p["mode"],
        # Where the lookup is out of bounds the base already holds the fill value.
        fill_value=0,
    )
    return found, [*ids, *window]


def _output_order(w: LowRank, numbers: Any, index_axes: int) -> list[Label]:
    """The labels of the gather's output, axis by axis."""
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    window = [d for d in range(w.ndim) if d not in gone]
    feed, rest = iter(window), iter(range(index_axes))
    return [
        next(feed) if axis in numbers.offset_dims else ("i", next(rest))
        for axis in range(len(window) + index_axes)
    ]
