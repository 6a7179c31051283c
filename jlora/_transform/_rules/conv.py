"""`conv_general_dilated` with an adapted kernel.

The down-projection is a convolution of the kernel's own window to r channels, the
up-projection a product over channels, as in PEFT.
"""

from __future__ import annotations

from typing import Any

from jax import lax

from jlora._compat import Eqn, rebind
from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import RANK, Array, align
from jlora._kernel.nodes import LowRank
from jlora._transform._rules._table import Run, rule
from jlora._transform._rules.matmul import check_axes, drop_inputs, gained


@rule("conv_general_dilated")
def conv_general_dilated(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """conv(x, W) with W low-rank: conv(x, A) to r channels, then B."""
    x, w = args
    p = eqn.params
    if not isinstance(w, LowRank) or isinstance(x, LowRank):
        return NotImplemented
    if p["batch_group_count"] != 1 or not all(
        t.covers(w.shape) for t in w.adapters.values()
    ):
        return NotImplemented
    (out,) = rebind(eqn, [x, w.base])
    out_dim, *in_dims = p["dimension_numbers"].rhs_spec  # (out, in, *spatial)
    gain = w.gain()
    if gain is not None and gain[1] != (out_dim,):
        return NotImplemented
    if gain is not None:
        channel = p["dimension_numbers"].out_spec[1]
        order = [out_dim if d == channel else None for d in range(out.ndim)]
        out = gained(out, gain, order)
    for adapter in w.adapters.values():
        check_axes(w, adapter, in_dims)
        out = out + _term(
            w, adapter, drop_inputs(run, w, adapter, x), p, out_dim
        ).astype(out.dtype)
    return [out]


def _term(w: LowRank, t: Adapter, x: Array, p: dict[str, Any], out_dim: int) -> Array:
    """`s·conv(x, A)·B`; grouped kernels apply one A to each group's inputs."""
    groups = p["feature_group_count"]
    numbers = p["dimension_numbers"]
    flipped = out_dim in t.a_dims  # factored as (out -> in): only by request
    (a, a_dims), (b, b_dims) = (t.a, t.a_dims), (t.b, t.b_dims)
    if flipped:
        (a, a_dims), (b, b_dims) = (b, b_dims), (a, a_dims)
    dims = [RANK if d == out_dim else d for d in range(w.ndim)]
    down = align(a.astype(w.dtype), a_dims, dims)  # W's layout, r for its outputs
    down = lax.concatenate([down] * groups, dims.index(RANK)) if groups > 1 else down
    low = lax.conv_general_dilated(
        x, down, p["window_strides"], p["padding"], p["lhs_dilation"],
        p["rhs_dilation"], numbers, groups, precision=p["precision"],
        preferred_element_type=p["preferred_element_type"],
    )  # fmt: skip
    low = (low * t.scale.astype(low.dtype)).astype(x.dtype)
    up = align(b.astype(w.dtype), b_dims, [RANK, out_dim])  # [r, o]
    return _up(low, up, numbers.out_spec[1], groups, p)


def _up(low: Array, up: Array, channel: int, groups: int, p: dict[str, Any]) -> Array:
    """Channels [g·r] to [o], each group by its own columns of `up`."""
    rank, outs = up.shape
    params = {k: p[k] for k in ("precision", "preferred_element_type")}
    shape = low.shape
    split = (*shape[:channel], groups, rank, *shape[channel + 1 :])
    low = low.reshape(split)  # [..., g, r, ...]
    up = up.reshape(rank, groups, outs // groups)
    numbers = (((channel + 1,), (0,)), ((channel,), (1,)))
    out = lax.dot_general(low, up, numbers, **params)  # [g, ..., o/g]
    rest = list(range(1, out.ndim - 1))
    out = out.transpose(*rest[:channel], 0, out.ndim - 1, *rest[channel:])
    return out.reshape(*shape[:channel], outs, *shape[channel + 1 :])
