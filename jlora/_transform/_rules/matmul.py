"""`dot_general` with an adapted kernel on either side.

    x·(W + s·A·B) = x·W + s·(x·A)·B

The order of the small products follows the contraction: `a` meets x first where x is
contracted with the kernel's inputs, `b` where the kernel is used transposed (a tied
head). Nothing of the kernel's size is formed, forward or backward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _compat
from jlora._compat import Eqn
from jlora._errors import ShapeError
from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import RANK, Array, Dims, Label, contract, expand, pad_to
from jlora._kernel.bank import acting, at_tokens, by_token, for_product
from jlora._kernel.nodes import LowRank
from jlora._transform._rules._table import Run, rule
from jlora._transform._rules.products import kernel_product
from jlora._transform._rules.shared import shared_inputs


@rule("dot_general")
def dot_general(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """x·W with W low-rank, or W·x."""
    w_left = isinstance(args[0], LowRank)
    w, x = args if w_left else reversed(args)
    if isinstance(x, LowRank):
        return kernel_product(eqn, w, x)
    contracted, batch = eqn.params["dimension_numbers"]
    (wc, xc), (wb, xb) = (
        (contracted, batch) if w_left else map(reversed, (contracted, batch))
    )
    labels: list[Label] = [("x", i) for i in range(x.ndim)]
    for axis, dim in zip((*xc, *xb), (*wc, *wb), strict=True):
        labels[axis] = dim
    w_free = [d for d in range(w.ndim) if d not in (*wc, *wb)]
    x_free = [n for n in labels if not isinstance(n, int)]
    order = [*wb, *(w_free + x_free if w_left else x_free + w_free)]
    params = {k: eqn.params[k] for k in ("precision", "preferred_element_type")}
    w = for_product(w, math.prod(x.shape[labels.index(n)] for n in x_free))
    token: Label = None
    if by_token(w):
        axis, start = run.token_axis(1 if w_left else 0, w)
        token, w = labels[axis], at_tokens(w, start, x.shape[axis])
    for adapter in w.adapters.values():
        check_axes(w, adapter, wc, wb)
        x = adapter.watched(x, labels, tuple(wc))
    gain = w.gain()
    out = _base_product(run, eqn, w, x, w_left, gain, labels, order)
    if out is NotImplemented:
        return NotImplemented
    lows = {} if w_left or batch[0] else shared_inputs(run, eqn, w, x, labels, wc)
    for name, adapter in w.adapters.items():
        if not adapter.rank:
            continue
        low = _low(
            run, w, adapter, x, labels, wc, w_left, params, lows.get(name), token
        )
        term = _term(w, adapter, low, wc, order, out.shape, w_left, params)
        out = out + _compat.sharded_like(term.astype(out.dtype), out)
    return [out]


def _base_product(
    run: Run, eqn: Eqn, w: LowRank, x: Array, w_left: bool,
    gain: tuple[Array, Dims] | None, labels: list[Label], order: list[Label],
) -> Any:  # fmt: skip
    """x·(g·W): each output's gain goes to the result; to x where W is transposed."""
    scaled_x = gain is not None and set(gain[1]) <= set(labels)
    if gain is not None and scaled_x:
        x = gained(x, gain, labels)
    elif gain is not None and not set(gain[1]) <= set(order):
        return NotImplemented
    (out,) = run.rebind(eqn, [w.base, x] if w_left else [x, w.base])
    return out if gain is None or scaled_x else gained(out, gain, order)


def gained(
    x: Array, gain: tuple[Array, Sequence[Label]], order: Sequence[Label]
) -> Array:
    """X times the gain, in float32, its axes labelled by `order`; x's dtype again."""
    factor = _compat.factor_like(expand(*gain, order), x)
    return (x.astype(factor.dtype) * factor).astype(x.dtype)


def _low(
    run: Run, w: LowRank, t: Adapter, x: Array, labels: list[Label],
    contracted: Sequence[int], w_left: bool, params: dict[str, Any],
    made: Array | None, token: Label,
) -> tuple[Array, tuple[Label, ...]]:  # fmt: skip
    """`s·x·A` and its labels, from x·A where that is `made` already."""
    dtype = small_product_dtype(x.dtype)
    x = drop_inputs(run, w, t, x)
    x, labels = _window(w, t, x, labels)
    x, labels = _sum_absent(t, x, labels, contracted)
    first, second = _factors(t, contracted)
    # Where the kernel is stacked and summed over the stack, that sum waits for the
    # second product: both factors need the stack's index.
    gone = {d for d in contracted if d not in second[1]}
    keep = {n for n in (*labels, *first[1]) if n not in gone}
    if made is None:
        low, low_labels = _product(x, labels, *first, w, keep, w_left, params)
    else:
        low, low_labels = made, (*(n for n in labels if n not in contracted), RANK)
    return acting(t, low.astype(dtype), low_labels, token), low_labels


def _factors(
    t: Adapter, contracted: Sequence[int]
) -> tuple[tuple[Array, Dims], tuple[Array, Dims]]:
    """The factor that x meets first, and the other; `b` first where W is transposed.

    The first has the scale in it: factors are smaller than x·A.
    """
    factors = [(t.a, t.a_dims), (t.b, t.b_dims)]
    (first, dims), second = (
        factors[::-1] if set(contracted) & set(t.out_axes) else factors
    )
    return (first * expand(t.scale, t.s_dims, dims), dims), second


def _term(
    w: LowRank, t: Adapter, low: tuple[Array, tuple[Label, ...]],
    contracted: Sequence[int], order: list[Label], shape: Sequence[int], w_left: bool,
    params: dict[str, Any],
) -> Array:  # fmt: skip
    """`(s·x·A)·B` with its axes in `order`, padded to the whole output `shape`."""
    low, low_labels = low
    second = _factors(t, contracted)[1]
    low, low_labels = _product(low, low_labels, *second, w, set(order), w_left, params)
    starts = [_start(t, n) if n in low_labels else None for n in order]
    return pad_to(expand(low, low_labels, order), starts, shape)


def _product(
    x: Array, labels: Sequence[Label], factor: Array, dims: Sequence[int], w: LowRank,
    keep: set[Label], w_left: bool, params: dict[str, Any],
) -> tuple[Array, tuple[Label, ...]]:  # fmt: skip
    """One small product, the factor cast to the kernel's dtype and on its side."""
    dtype = small_product_dtype(w.dtype)
    factor = factor.astype(dtype)
    x = x.astype(dtype) if x.dtype == w.dtype else x
    if w_left:
        return contract(factor, dims, x, labels, keep, **params)
    return contract(x, labels, factor, dims, keep, **params)


def small_product_dtype(dtype: Any) -> Any:
    """What factors are multiplied in: the kernel's dtype, but bfloat16 for 8 bits.

    A factor that is rounded to 8 bits, unscaled, loses what is trained. Gradients
    differ from the merged function's, which rounds the sum instead. Of twelve random
    kernels [31, 23] they were 4.7 % off float32's in float8_e4m3fn, the merged
    function's 5.8 %; in bfloat16, where factors are rounded too, 0.46 % and 0.34 %.
    """
    eight_bits = jnp.dtype(dtype).itemsize == 1
    return jnp.dtype(jnp.bfloat16) if eight_bits else dtype


def _start(t: Adapter, label: Label) -> int:
    return t.starts[label] if isinstance(label, int) else 0


def _window(
    w: LowRank, t: Adapter, x: Array, labels: list[Label]
) -> tuple[Array, list[Label]]:
    """The part of x that meets the term's window of the kernel."""
    for axis, dim in enumerate(labels):
        if isinstance(dim, int) and not t.full(dim, w.shape[dim]):
            start, size = t.starts[dim], t.size(dim) or 0
            x = lax.slice_in_dim(x, start, start + size, axis=axis)
    return x, labels


def _sum_absent(
    t: Adapter, x: Array, labels: list[Label], contracted: Sequence[int]
) -> tuple[Array, list[Label]]:
    """Sum x over contracted dimensions along which the term is constant."""
    axes = [i for i, n in enumerate(labels) if n in contracted and t.size(n) is None]
    if not axes:
        return x, labels
    return jnp.sum(x, axis=axes), [n for i, n in enumerate(labels) if i not in axes]


def check_axes(
    w: LowRank, t: Adapter, contracted: Sequence[int], batch: Sequence[int] = ()
) -> None:
    """Refuse a contraction over other axes than the adapter was factored for."""
    real = {
        d for d in contracted if t.size(d) not in (None, 1) and d not in t.batch_axes
    }
    sides = [{d for d in side if t.size(d) != 1} for side in (t.in_axes, t.out_axes)]
    stray = [d for d in batch if d in t.in_axes or d in t.out_axes]
    if real in sides and not stray:
        return
    outs = tuple(d for d in range(w.ndim) if d not in (*contracted, *batch))
    ins, batch = tuple(sorted(contracted)), tuple(batch)
    in_stack = [tuple(d + 1 for d in dims) for dims in (ins, outs, batch)]
    raise ShapeError(
        f"the kernel {w.path!r} {w.shape} is contracted over axes "
        f"{tuple(sorted(contracted))}"
        f"{f' with batch axes {tuple(batch)}' if batch else ''}, but its adapter was "
        f"factored for inputs {t.in_axes} and outputs {t.out_axes}"
        f"{f', one for each index of {t.batch_axes}' if t.batch_axes else ''}.\n"
        "Let jlora read the axes of all kernels off your function:\n"
        "  survey = jlora.survey(fn, params, *inputs)\n"
        "  params = jlora.lorafy(params, ..., survey=survey)\n"
        "or say those of this one. If it has that shape in the tree:\n"
        f"  {_target(ins, outs, batch)}\n"
        "If a scan or vmap takes it from a stack of kernels, [L, ...]:\n"
        f"  {_target(in_stack[0], in_stack[1], (0, *in_stack[2]))}"
    )


def _target(ins: Sequence[int], outs: Sequence[int], batch: Sequence[int]) -> str:
    """The target of a kernel with those axes, as one writes it."""
    given = {"in_axes": ins, "out_axes": outs, "batch_axes": batch}
    axes = (f"{name}={tuple(dims)}" for name, dims in given.items() if dims)
    return f"jlora.Target({', '.join(axes)})"


def drop_inputs(run: Run, w: LowRank, t: Adapter, x: Array) -> Array:
    """Inverted dropout on the adapter's input; nothing without a key.

    Source: Hu et al. 2021, arXiv:2106.09685, and PEFT's `lora_dropout`.
    """
    if t.key is None or not t.dropout:
        return x
    key = t.key.reshape(-1)[0] if t.s_dims else t.key
    key = jax.random.fold_in(key, run.use_number(w.path))
    for axis in sorted(_compat.varying_axes(x), key=str):  # each shard drops its own
        key = jax.random.fold_in(key, lax.axis_index(axis))
    rate: Any = 1.0 - t.dropout
    if t.keep is not None:
        rate = t.keep.reshape(-1)[0] if t.s_dims else t.keep
    keep = jax.random.bernoulli(key, rate, x.shape)
    if t.keep is not None:
        rate = rate.astype(x.dtype)
    return jnp.where(keep, x / rate, 0).astype(x.dtype)
