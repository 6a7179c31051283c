"""`gather` from an adapted table: embedding lookups, `jnp.take`, `W[ids]`.

(W + s·A·B)[ids] = W[ids] + s·A[ids]·B
"""

from __future__ import annotations

from typing import Any

from jax import lax

from jlora._compat import Eqn, rebind
from jlora._lowrank import Adapter, Array, LowRank, contract, spread
from jlora._rules._table import Run, rule


@rule("gather")
def gather(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """Rows of a low-rank table, dense: the product with `b` follows the lookup."""
    w, indices = args
    numbers = eqn.params["dimension_numbers"]
    if not isinstance(w, LowRank) or numbers.operand_batching_dims:
        return NotImplemented
    sizes = eqn.params["slice_sizes"]
    touched = {d for d in range(w.ndim) if sizes[d] != w.shape[d]}
    touched |= {*numbers.start_index_map, *numbers.collapsed_slice_dims}
    adapters = list(w.adapters.values())
    if not all(t.covers(w.shape) and _looks_up(t, touched) for t in adapters):
        return NotImplemented
    (out,) = rebind(eqn, [w.base, indices])
    for adapter in adapters:
        term = _term(w, adapter, indices, eqn.params, touched)
        out = out + term.astype(out.dtype)
    return [out]


def _looks_up(t: Adapter, touched: set[int]) -> bool:
    """Whether the lookup concerns one factor only."""
    return touched <= set(t.a_only) or touched <= set(t.b_only)


def _term(
    w: LowRank, t: Adapter, indices: Array, p: dict[str, Any], touched: set[int]
) -> Array:
    first, second = (t.a, t.a_dims), (t.b, t.b_dims)
    if touched <= set(t.b_only):
        first, second = second, first
    table, dims = first
    numbers = p["dimension_numbers"]
    window = [d for d in dims if d not in numbers.collapsed_slice_dims]
    ids = [("i", k) for k in range(indices.ndim - 1)]

    def axes(ds: Any) -> tuple[int, ...]:
        return tuple(dims.index(d) for d in ds)

    rows = lax.gather(
        table,
        indices,
        lax.GatherDimensionNumbers(
            offset_dims=tuple(range(len(ids), len(ids) + len(window))),
            collapsed_slice_dims=tuple(sorted(axes(numbers.collapsed_slice_dims))),
            start_index_map=axes(numbers.start_index_map),
        ),
        [p["slice_sizes"][d] if d >= 0 else t.rank for d in dims],
        unique_indices=p["unique_indices"],
        indices_are_sorted=p["indices_are_sorted"],
        mode=p["mode"],
        # Where the lookup is out of bounds the base already holds the fill value.
        fill_value=0,
    )
    labels = (*ids, *window)
    rows = rows * spread(t.scale, t.s_dims, labels)
    order = _output_order(w, numbers, ids)
    low, low_labels = contract(
        rows.astype(w.dtype), labels, second[0].astype(w.dtype), second[1], set(order)
    )
    return spread(low, low_labels, order)


def _output_order(w: LowRank, numbers: Any, ids: list[Any]) -> list[Any]:
    """The labels of the gather's output, axis by axis."""
    window = [d for d in range(w.ndim) if d not in numbers.collapsed_slice_dims]
    feed, rest = iter(window), iter(ids)
    return [
        next(feed) if axis in numbers.offset_dims else next(rest)
        for axis in range(len(window) + len(ids))
    ]
