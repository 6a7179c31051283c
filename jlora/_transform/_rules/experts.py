"""`ragged_dot`: tokens sorted by expert meet each its expert's kernel.

x·(W[e] + s·A[e]·B[e]), e the token's expert, as two small ragged products.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from jlora._compat import Eqn
from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import RANK, Array, align, expand
from jlora._kernel.nodes import LowRank
from jlora._transform._rules._table import Run, rule
from jlora._transform._rules.matmul import check_axes, drop_inputs, gained
from jlora._transform._rules.quantised import rebind


@rule("ragged_dot_general")
def ragged_dot(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """`lax.ragged_dot` with an adapter for each expert."""
    x, w, sizes = args
    plain = is_plain(eqn.params) and eqn.params["group_offset"] is None
    if not plain or not isinstance(w, LowRank) or isinstance(x, LowRank):
        return NotImplemented
    adapters = list(w.adapters.values())
    if not all(t.covers(w.shape) and t.batch_axes == (0,) for t in adapters):
        return NotImplemented
    (out,) = rebind(eqn, [x, w.base, sizes])
    gain = w.gain()
    if gain is not None:
        factor = align(*gain, [0, 2]).astype(jnp.float32)  # [experts, o]
        expert = jnp.repeat(
            jnp.arange(w.shape[0]), sizes, total_repeat_length=x.shape[0]
        )
        out = gained(out, (factor[expert], (0, 2)), (0, 2))
    for t in adapters:
        if not t.rank:
            continue
        check_axes(w, t, (1,))
        term = _term(w, t, drop_inputs(run, w, t, x), sizes, eqn.params)
        out = out + term.astype(out.dtype)
    return [out]


def is_plain(p: dict[str, Any]) -> bool:
    """Whether it is `lax.ragged_dot`: x [tokens, i], W [experts, i, o]."""
    numbers = p["ragged_dot_dimension_numbers"]
    contracted = tuple(map(tuple, numbers.dot_dimension_numbers[0]))
    ragged = tuple(numbers.lhs_ragged_dimensions), tuple(numbers.rhs_group_dimensions)
    return contracted == ((1,), (1,)) and ragged == ((0,), (0,))


def _term(w: LowRank, t: Adapter, x: Array, sizes: Array, p: dict[str, Any]) -> Array:
    """Two ragged products; the scale differs by expert, so it goes into `a`."""
    factors = (t.a, t.a_dims), (t.b, t.b_dims)
    (a, a_dims), (b, b_dims) = factors if 1 in t.in_axes else reversed(factors)
    a = a * expand(t.scale, t.s_dims, a_dims)
    down = align(a.astype(w.dtype), a_dims, [0, 1, RANK])  # [experts, i, r]
    up = align(b.astype(w.dtype), b_dims, [0, RANK, 2])  # [experts, r, o]
    params = {k: p[k] for k in ("precision", "preferred_element_type")}
    low = lax.ragged_dot(x, down, sizes, **params).astype(x.dtype)  # [tokens, r]
    return lax.ragged_dot(low, up, sizes, **params)
