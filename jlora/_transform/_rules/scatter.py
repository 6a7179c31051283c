"""`scatter` into a kernel: rows set to something else, `W.at[0].set(0)`.

(W + s·A·B) with rows replaced = W with rows replaced + s·(A with those rows 0)·B
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jlora._compat import Eqn, rebind
from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import RANK, Array, Dims
from jlora._kernel.nodes import LowRank
from jlora._transform._rules._table import Run, rule
from jlora._transform._rules._terms import (
    bases,
    cover,
    factor,
    has_gain,
    span_both,
    union,
    with_factor,
)


@rule("scatter", "scatter-add")
def scatter(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """Entries set or added to; a kernel may be set into an array, or into a kernel."""
    operand, indices, updates = args
    numbers = eqn.params["dimension_numbers"]
    if numbers.operand_batching_dims or isinstance(indices, LowRank):
        return NotImplemented
    add = eqn.primitive.name == "scatter-add"
    zero = run.facts().is_zero(eqn.invars[2])
    (base,) = rebind(eqn, bases(args))
    window = _Window(numbers, base.shape, updates.shape)
    kernels = []
    if isinstance(operand, LowRank):
        kept = operand if add else _cleared(operand, indices, eqn, window, zero)
        if kept is None or (add and has_gain(operand)):
            return NotImplemented
        kernels.append(kept)
    if isinstance(updates, LowRank):
        if indices.ndim != 1 or has_gain(updates) or has_gain(operand):
            return NotImplemented
        moved = _moved_in(updates, indices, eqn, window)
        if moved is None:
            return NotImplemented
        kernels.append(moved)
    return [union(base, kernels)]


class _Window:
    """What one update covers of the operand.

    Attributes:
      sizes: its size along each of the operand's dimensions.
      inserted: dimensions of which it covers one index that it does not show.
      placed: dimensions along which the indices say where it lies.
      touched: those of which it does not always cover all.
    """

    def __init__(self, numbers: Any, shape: Sequence[int], update: Sequence[int]):
        self.inserted = tuple(numbers.inserted_window_dims)
        self.placed = tuple(numbers.scatter_dims_to_operand_dims)
        feed = (update[d] for d in numbers.update_window_dims)
        self.sizes = [
            1 if d in self.inserted else next(feed) for d in range(len(shape))
        ]
        self.touched = {d for d, n in enumerate(shape) if self.sizes[d] != n}
        self.touched |= {*self.inserted, *self.placed}
        axes = range(len(update))
        self.index_sizes = [
            update[d] for d in axes if d not in numbers.update_window_dims
        ]
        self.shown = [d for d in range(len(shape)) if d not in self.inserted]

    def scatter(
        self, x: Array, dims: Dims, indices: Array, updates: Array | float, eqn: Eqn
    ) -> Array:  # fmt: skip
        """The same scatter done to an array along some of the operand's dimensions."""
        placed = [n for n, d in enumerate(self.placed) if d in dims]
        indices = indices[..., jnp.asarray(placed, int)]
        inserted = [d for d in self.inserted if d in dims]
        window = [i for i, d in enumerate(dims) if d not in inserted]
        sizes = [self.sizes[d] if d != RANK else x.shape[i] for i, d in enumerate(dims)]
        shape = (*self.index_sizes, *(sizes[i] for i in window))
        first = len(self.index_sizes)
        numbers = lax.ScatterDimensionNumbers(
            update_window_dims=tuple(range(first, first + len(window))),
            inserted_window_dims=tuple(sorted(map(dims.index, inserted))),
            scatter_dims_to_operand_dims=tuple(
                dims.index(self.placed[n]) for n in placed
            ),
        )
        p = eqn.params
        return lax.scatter(
            x, indices, jnp.broadcast_to(jnp.asarray(updates, x.dtype), shape), numbers,
            indices_are_sorted=p["indices_are_sorted"],
            unique_indices=p["unique_indices"], mode=p["mode"],
        )  # fmt: skip


def _cleared(
    w: LowRank, indices: Array, eqn: Eqn, window: _Window, zero: bool
) -> LowRank | None:
    """W with terms (and gains) that leave alone what is set to something else."""
    whole = cover(w)
    if whole is None:
        return None

    def clear(t: Adapter) -> Adapter | None:
        for d in window.touched:
            t = span_both(t, d, w.shape[d])
        gain = t.gain
        if gain is not None and window.touched <= {*t.o_dims}:
            gain = window.scatter(gain, t.o_dims, indices, 1, eqn)
        elif gain is not None and not zero:
            return None
        for side in ("a", "b"):
            x, dims = factor(t, side)
            if window.touched <= {*dims}:
                x = window.scatter(x, dims, indices, 0, eqn)
                return with_factor(dataclasses.replace(t, gain=gain), side, x)
        return None

    changed = {name: clear(t) for name, t in whole.adapters.items()}
    kept = {name: t for name, t in changed.items() if t is not None}
    return dataclasses.replace(w, adapters=kept) if len(kept) == len(changed) else None


def _moved_in(w: LowRank, indices: Array, eqn: Eqn, window: _Window) -> LowRank | None:
    """The terms of a kernel that is the update, on the operand's dimensions.

    `indices` is one place, so the update has no axes but those of its window.
    """
    whole = cover(w)
    new_dim = dict(enumerate(window.shown))
    if whole is None or any(t.key is not None for t in whole.adapters.values()):
        return None
    shape = eqn.outvars[0].aval.shape

    def move(t: Adapter) -> Adapter:
        t = t.rename(new_dim, len(shape))
        spanned = functools.reduce(
            lambda t, d: span_both(t, d, window.sizes[d]), window.touched, t
        )
        return spanned.map(place)

    def place(x: Array, dims: Dims) -> tuple[Array, Dims]:
        if not window.touched & {*dims}:
            return x, dims
        sizes = [
            n if d == RANK else shape[d] for d, n in zip(dims, x.shape, strict=True)
        ]
        shown = [
            n for d, n in zip(dims, x.shape, strict=True) if d not in window.inserted
        ]
        zeros, update = jnp.zeros(sizes, x.dtype), x.reshape(shown)
        return window.scatter(zeros, dims, indices, update, eqn), dims

    return whole.map(whole.base, move)
