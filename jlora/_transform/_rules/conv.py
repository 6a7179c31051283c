"""`conv_general_dilated` with an adapted kernel.

The down-projection is a convolution of the kernel's own window to r channels, the
up-projection a product over channels, as in PEFT. Where the adapter's outputs are the
channels that the convolution sums over (a transposed convolution of the kernel's
mirror image), the product comes first.
"""

from __future__ import annotations

from typing import Any

from jax import lax

from jlora._compat import Eqn
from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import RANK, Array, Dims, align
from jlora._kernel.nodes import LowRank
from jlora._transform._rules._table import Run, rule
from jlora._transform._rules._terms import cover
from jlora._transform._rules.matmul import check_axes, drop_inputs, gained
from jlora._transform._rules.quantised import rebind


@rule("conv_general_dilated")
def conv_general_dilated(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """conv(x, W) with W low-rank: conv(x, A) to r channels, then B."""
    x, w = args
    p = eqn.params
    if not isinstance(w, LowRank) or isinstance(x, LowRank):
        return NotImplemented
    w = cover(w)
    if w is None or p["batch_group_count"] != 1:
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
        if not adapter.rank:
            continue
        dropped = drop_inputs(run, w, adapter, x)
        if _product_first(w, adapter, p):
            term = _term_of_mirrored(w, adapter, dropped, p)
        else:
            check_axes(w, adapter, in_dims)
            term = _term(w, adapter, dropped, p, out_dim)
        out = out + term.astype(out.dtype)
    return [out]


def _product_first(w: LowRank, t: Adapter, p: dict[str, Any]) -> bool:
    """Whether one factor spans just the channels that are summed over."""
    _, channel, *_ = p["dimension_numbers"].rhs_spec
    sides = [{d for d in side if w.shape[d] > 1} for side in (t.in_axes, t.out_axes)]
    if {channel} not in sides or t.batch_axes or p["feature_group_count"] != 1:
        return False
    other = sides[1 - sides.index({channel})]
    return len(other) > 1 or other != {p["dimension_numbers"].rhs_spec[0]}


def _term_of_mirrored(w: LowRank, t: Adapter, x: Array, p: dict[str, Any]) -> Array:
    """`s·conv(x·B, A)`: from the adapter's outputs to r channels, then its window."""
    numbers = p["dimension_numbers"]
    _, channel, *_ = numbers.rhs_spec
    factors = [(t.a, t.a_dims), (t.b, t.b_dims)]
    (down, down_dims), (up, up_dims) = (
        factors if channel in t.in_axes else factors[::-1]
    )
    down, down_dims = _without(down, down_dims, {channel, RANK})
    missing = [d for d in range(w.ndim) if d != channel and d not in up_dims]
    up = lax.broadcast(up, [w.shape[d] for d in missing])
    dims = [RANK if d == channel else d for d in range(w.ndim)]
    up = align(up.astype(w.dtype), (*missing, *up_dims), dims)
    params = {k: p[k] for k in ("precision", "preferred_element_type")}
    down = align(down.astype(w.dtype), down_dims, [channel, RANK])
    feature = numbers.lhs_spec[1]
    low = lax.dot_general(x, down, (((feature,), (0,)), ((), ())), **params)
    low = lax.transpose(low, _last_to(feature, low.ndim))
    low = (low * t.scale.astype(low.dtype)).astype(x.dtype)
    return _convolve(low, up, p, 1)


def _last_to(axis: int, ndim: int) -> list[int]:
    order = list(range(ndim - 1))
    order.insert(axis, ndim - 1)
    return order


def _without(x: Array, dims: Dims, keep: set[int]) -> tuple[Array, Dims]:
    """A factor without its dimensions of size one but for those to keep."""
    axes = [i for i, d in enumerate(dims) if d not in keep]
    return lax.squeeze(x, axes), tuple(d for d in dims if d in keep)


def _convolve(x: Array, kernel: Array, p: dict[str, Any], groups: int) -> Array:
    return lax.conv_general_dilated(
        x, kernel, p["window_strides"], p["padding"], p["lhs_dilation"],
        p["rhs_dilation"], p["dimension_numbers"], groups, precision=p["precision"],
        preferred_element_type=p["preferred_element_type"],
    )  # fmt: skip


def _term(w: LowRank, t: Adapter, x: Array, p: dict[str, Any], out_dim: int) -> Array:
    """`s·conv(x, A)·B`; grouped kernels apply one A to each group's inputs."""
    groups = p["feature_group_count"]
    numbers = p["dimension_numbers"]
    flipped = out_dim in t.a_dims  # factored as (out -> in): only by request
    (a, a_dims), (b, b_dims) = (t.a, t.a_dims), (t.b, t.b_dims)
    if flipped:
        (a, a_dims), (b, b_dims) = (b, b_dims), (a, a_dims)
    b, b_dims = _without(b, b_dims, {out_dim, RANK})
    if out_dim not in b_dims:
        b, b_dims = lax.broadcast(b, (w.shape[out_dim],)), (out_dim, *b_dims)
    missing = [d for d in range(w.ndim) if d != out_dim and d not in a_dims]
    a = lax.broadcast(a, [w.shape[d] for d in missing])
    a_dims = (*missing, *a_dims)
    dims = [RANK if d == out_dim else d for d in range(w.ndim)]
    down = align(a.astype(w.dtype), a_dims, dims)  # W's layout, r for its outputs
    down = lax.concatenate([down] * groups, dims.index(RANK)) if groups > 1 else down
    low = _convolve(x, down, p, groups)
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
