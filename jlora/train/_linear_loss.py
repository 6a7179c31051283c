"""Head and cross entropy in one: the logits exist a chunk of the vocabulary at a time.

With a vocabulary of V the logits of N tokens, `[N, V]`, and their gradient are the two
largest arrays of a step. Both are the same matrix twice: `dh = softmax(h·W)·Wᵀ - W_y`
is attention with the columns of W for keys and values, so one pass over W's chunks
gives loss and gradient, and each chunk of W is read once for both products.

A softmax needs a number near each row's maximum, so that no exponential overflows. The
label's own logit is known before the others, and is that number unless some logit lies
far above it. Then, and only then, the pass is made again with the maxima that it found.
So a chunk's logits are read once, for maximum, sum and exponentials together, and sums
over chunks are never scaled anew: the product adds to them where they lie.

Source: the pass over chunks with both products, as in Dao et al. 2022,
arXiv:2205.14135, who follow a running maximum (Milakov and Gimelshein 2018,
arXiv:1805.02867).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _compat
from jlora._errors import ShapeError
from jlora.train._chunks import (
    BYTES,
    Asked,
    Chunks,
    elsewhere,
    on_a_cpu,
    ways_of_tokens,
)
from jlora.train._losses import check_labels, weights_of

Array = Any


# How far a logit may lie above the label's: e to its power, summed over a vocabulary
# and multiplied by a kernel, is far from float32's end.
_ROOM = 48.0


class _Settings(NamedTuple):
    """Label smoothing, the z-loss's factor, the axis of classes in w, and its parts."""

    eps: float
    z: float
    axis: int
    asked: Asked


def linear_cross_entropy(
    hidden: Array,
    kernel: Array,
    labels: Array,
    mask: Array | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int | None = None,
    chunk_bytes: int = BYTES,
    vocab_axis: int | None = None,
) -> tuple[Array, Array]:
    """`cross_entropy(hidden @ kernel, labels, mask)` without the logits.

    The gradient of `hidden` is made in the forward pass. That of `kernel`, where it is
    asked for, costs the logits once more; where the kernel is adapted it is formed,
    `[d, V]`, before it goes to the factors. It has reverse mode only: `jax.jvp`,
    `jax.jacfwd` and Hessian products need `cross_entropy(hidden @ kernel, ...)`.

    Args:
      hidden: `[..., d]`, what goes into the head.
      kernel: `[d, V]`, the head without bias; or `[V, d]`, the table of a tied
        embedding as it lies: its transpose would be a copy at every step. It should
        not be sharded over V.
      labels: `[...]`, integers.
      mask: as for `cross_entropy`.
      label_smoothing: probability spread evenly over all classes.
      z_loss: factor of `logsumexp(logits)²`.
      chunk: classes at a time. None chooses for the device that the program is
        compiled for: on a CPU 2,048, whose kernel and logits lie in its cache; on
        others as few chunks as `chunk_bytes` allows, of classes, or of tokens where
        there are fewer classes than twice the tokens.
      chunk_bytes: what the float32 logits of a chunk may take, of each device's tokens,
        where `chunk` is None. In bfloat16 half as much goes for their exponentials. A
        smaller number takes less memory and, on a GPU, more time.
      vocab_axis: 1 for `[d, V]`, 0 for `[V, d]`. `None` tells by d, and asks where the
        kernel is square.

    Returns:
      The sum and the count, float32 scalars.

    Raises:
      ShapeError: the shapes do not fit each other, or fit either way.
      DtypeError: labels that are no integers.
      DataError: a label that is no class, where labels have values (see
        `cross_entropy`).

    >>> h, w, y = jnp.ones((3, 2)), jnp.ones((2, 5)), jnp.array([1, 2, -100])
    >>> total, count = linear_cross_entropy(h, w, y)
    >>> float(total / count) == float(jnp.log(5.0)), int(count)
    (True, 2)
    """
    axis = _vocab_axis(hidden, kernel, vocab_axis)
    asked = Asked(chunk, chunk_bytes)
    settings = _Settings(float(label_smoothing), float(z_loss), axis, asked)
    nll, weight = _losses_of(hidden, kernel, labels, mask, settings)
    return jnp.sum(nll * weight), jnp.sum(weight)


def linear_log_probs(
    hidden: Array,
    kernel: Array,
    labels: Array,
    *,
    chunk: int | None = None,
    chunk_bytes: int = BYTES,
    vocab_axis: int | None = None,
) -> Array:
    """The log-probability of each label, without the logits.

    Its sum over an answer's tokens is what the model gives the answer, which preference
    losses compare. As `linear_cross_entropy`, in all that it says of gradients.

    Args:
      hidden: `[..., d]`, what goes into the head.
      kernel: `[d, V]`, or `[V, d]` of a tied head.
      labels: `[...]`, integers.
      chunk: classes at a time; None as there.
      chunk_bytes: as there.
      vocab_axis: 1 for `[d, V]`, 0 for `[V, d]`; `None` tells by d.

    Returns:
      `[...]`, float32; exactly 0 where a label is below 0.

    Raises:
      ShapeError: the shapes do not fit each other, or fit either way.
      DtypeError: labels that are no integers.
      DataError: a label that is no class, where labels have values.

    >>> h, w = jnp.ones((3, 2)), jnp.ones((2, 5))
    >>> log_p = linear_log_probs(h, w, jnp.array([1, 2, -100]))
    >>> jnp.exp(log_p).round(3).tolist()[:2], float(log_p[2])
    ([0.20000000298023224, 0.20000000298023224], 0.0)
    """
    axis = _vocab_axis(hidden, kernel, vocab_axis)
    settings = _Settings(0.0, 0.0, axis, Asked(chunk, chunk_bytes))
    nll, _ = _losses_of(hidden, kernel, labels, None, settings)
    return 0 - nll.reshape(labels.shape)  # not -0 where a label does not count


def _losses_of(
    hidden: Array, kernel: Array, labels: Array, mask: Array | None, s: _Settings
) -> tuple[Array, Array]:
    """The loss of each label, and what it counts, both `[N]`."""
    s.asked.check()
    s = s._replace(asked=s.asked._replace(ways=ways_of_tokens(hidden)))
    classes = kernel.shape[s.axis]
    labels = check_labels("hidden", hidden, labels, mask, classes=classes)
    weight = weights_of(labels, mask, jnp.dtype(jnp.float32)).reshape(-1)
    counted = weight != 0
    safe = jnp.where(counted, labels.reshape(-1), 0)
    rows = hidden.reshape(-1, hidden.shape[-1])
    # Inside shard_map a rule's gradients vary as its operands do.
    rows, kernel, safe, counted = _compat.alike_varying(rows, kernel, safe, counted)
    return _nll(rows, kernel, safe, counted, s), weight


def _vocab_axis(hidden: Array, kernel: Array, given: int | None) -> int:
    """The kernel's axis of classes: the one that is not d, or the one given."""
    flat = len(kernel.shape) == 2 and len(hidden.shape) > 0
    axes = [n for n in (1, 0) if flat and given in (None, n)]
    fits = [n for n in axes if kernel.shape[1 - n] == hidden.shape[-1]]
    if len(fits) == 1:
        return fits[0]
    shapes = f"hidden {tuple(hidden.shape)} and kernel {tuple(kernel.shape)}"
    if fits:
        raise ShapeError(
            f"{shapes} fit either way.\nSay vocab_axis=1 for a kernel [d, V], "
            "vocab_axis=0 for an embedding's table [V, d]."
        )
    also = "" if given is None else f" with vocab_axis={given}"
    raise ShapeError(
        f"{shapes} do not fit{also}: the kernel is [d, V], or [V, d] with "
        "vocab_axis=0, and hidden [..., d]."
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _nll(h: Array, w: Array, labels: Array, counted: Array, s: _Settings) -> Array:
    """The loss of each label `[N]`, float32; 0 where it is not counted."""
    own = label_columns(w, labels, s.axis).astype(jnp.float32)
    lse, _ = _softmax_pass(h, w, own, counted, s, with_mean=False)
    return _loss(h, _target(w, own, s), counted, lse, s)


def _loss(h: Array, target: Array, counted: Array, lse: Array, s: _Settings) -> Array:
    loss = lse - _row_products(h, target) + s.z * lse**2
    return jnp.where(counted, loss, 0.0)


def _row_products(h: Array, columns: Array) -> Array:
    return jnp.sum(h.astype(jnp.float32) * columns, axis=-1)


def _target(w: Array, own: Array, s: _Settings) -> Array:
    """`(1 - eps)·W_y + eps·mean(W)` `[N, d]`: what the targets' logits come from."""
    if not s.eps:
        return own
    # As a product, which an adapted kernel has and a mean has not.
    even, numbers = jnp.ones(w.shape[s.axis], w.dtype), ((0,), (s.axis,))
    total = lax.dot_general(
        even, w, (numbers, ((), ())), preferred_element_type=jnp.float32
    )
    return (1 - s.eps) * own + (s.eps / w.shape[s.axis] * total)[None]


@functools.partial(jax.jit, static_argnums=2)
def label_columns(w: Array, labels: Array, axis: int) -> Array:
    """W's columns for the labels, `[N, d]`; NaN for a label that is no class.

    By name in a program, for this is no use of an embedding (see `_survey`).
    """
    spec = _compat.spec(labels)
    if axis == 0:
        where, spec = w.at[labels], (*spec, None)
    else:
        where, spec = w.at[:, labels], (None, *spec)
    columns = where.get(
        mode="fill", fill_value=jnp.nan, out_sharding=_compat.on_mesh_of(labels, spec)
    )
    return columns if axis == 0 else columns.T


def _softmax_pass(
    h: Array, w: Array, own: Array, counted: Array, s: _Settings, *, with_mean: bool
) -> tuple[Array, Array]:
    """`logsumexp(h·W)` `[N]`, and the softmax's mean of W's columns, `[N, d]`."""
    sizes = h.shape[0], w.shape[s.axis], s.asked
    f = functools.partial(_repeated, axis=s.axis, with_mean=with_mean)
    plans = on_a_cpu(*sizes), elsewhere(*sizes)
    return _for_device(f, plans, h, w, _row_products(h, own), counted)


def _for_device(
    f: Callable[..., Any], plans: tuple[Chunks, Chunks], *operands: Array
) -> Any:
    """`f` with the chunks for a CPU or for others, whichever is compiled for."""
    cpu, other = plans
    if cpu == other:
        return f(cpu, *operands)
    return lax.platform_dependent(
        *operands, cpu=functools.partial(f, cpu), default=functools.partial(f, other)
    )


def _repeated(
    chunks: Chunks,
    h: Array,
    w: Array,
    near: Array,
    counted: Array,
    *,
    axis: int,
    with_mean: bool,
) -> tuple[Array, Array]:
    """The pass with numbers `[N]` near the maxima; again if a logit is far above."""

    def attempt(carry: Any) -> Any:
        near = carry[0]
        f = functools.partial(_sums, w=w, size=chunks.classes, axis=axis)
        top, total, mean = _in_groups(
            functools.partial(f, with_mean=with_mean), chunks.groups, h, near
        )
        above = counted & (top - near > _ROOM)
        return jnp.where(above, top, near), total, mean, jnp.any(above)

    total, mean = _like(near, 0), _like(h if with_mean else h[:, :0], 0)
    start = (near, total, mean, jnp.any(counted))
    near, total, mean, _ = lax.while_loop(lambda carry: carry[-1], attempt, start)
    return near + jnp.log(total), mean / total[:, None]


def _like(x: Array, value: float) -> Array:
    return jnp.full_like(x, value, dtype=jnp.float32)


def _in_groups(f: Callable[..., Any], groups: int, *rows: Array) -> Any:
    """`f` of the rows, a group after the other; a sharded axis of rows stays so."""
    if groups == 1:
        return f(*rows)

    def cut(x: Array) -> Array:
        return x.reshape(-1, groups, *x.shape[1:]).swapaxes(0, 1)

    def whole(x: Array) -> Array:  # which may be of no columns
        return x.swapaxes(0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])

    out = lax.map(lambda some: f(*some), tuple(map(cut, rows)))
    return jax.tree.map(whole, out)


def _sums(
    h: Array, near: Array, *, w: Array, size: int, axis: int, with_mean: bool
) -> tuple[Array, Array, Array]:
    """The greatest logit, the sum of `p = exp(h·W - near)`, and `p·Wᵀ`."""

    def step(columns: Array, start: Any, carry: Any) -> Any:
        top, total, mean = carry
        # The barrier has XLA read the logits once, for all that is made of them.
        logits = lax.optimization_barrier(_logits(h, columns, axis))
        p = jnp.exp(logits - near[:, None])
        top = jnp.maximum(top, jnp.max(logits, axis=-1))
        total += jnp.sum(p, axis=-1)
        if with_mean:
            mean += lax.dot_general(
                p.astype(w.dtype), columns, (((1,), (axis,)), ((), ())),
                preferred_element_type=jnp.float32,
            )  # fmt: skip
        return top, total, mean

    low = float(jnp.finfo(jnp.float32).min)
    start = _like(near, low), _like(near, 0), _like(h if with_mean else h[:, :0], 0)
    return _over_chunks(w, size, axis, step, start)


def _logits(h: Array, columns: Array, axis: int) -> Array:
    numbers = ((1,), (1 - axis,)), ((), ())
    return lax.dot_general(h, columns, numbers, preferred_element_type=jnp.float32)


def _over_chunks(
    w: Array, size: int, axis: int, step: Callable[[Array, Any, Any], Any], carry: Any
) -> Any:
    """Feed the columns of w, one for each class, chunk by chunk."""
    classes = w.shape[axis]
    if size >= classes:
        return step(w, 0, carry)
    whole, rest = divmod(classes, size)

    def one(number: Any, carry: Any) -> Any:
        columns = lax.dynamic_slice_in_dim(w, number * size, size, axis=axis)
        return step(columns, number * size, carry)

    carry = lax.fori_loop(0, whole, one, carry)
    if not rest:
        return carry
    last = lax.slice_in_dim(w, whole * size, classes, axis=axis)
    return step(last, whole * size, carry)


def _forward(
    h: Any, w: Any, labels: Any, counted: Any, s: _Settings
) -> tuple[Array, Any]:
    wants_kernel = w.perturbed
    h, w, labels, counted = h.value, w.value, labels.value, counted.value
    own = label_columns(w, labels, s.axis).astype(jnp.float32)
    lse, mean = _softmax_pass(h, w, own, counted, s, with_mean=True)
    target = _target(w, own, s)
    loss = _loss(h, target, counted, lse, s)
    slope = (1 + 2 * s.z * lse)[:, None]
    # A token that is not counted may hold anything, NaN too.
    dh = jnp.where(counted[:, None], mean * slope - target, 0.0)
    kept = (h, w, labels, counted, lse) if wants_kernel else None
    return loss, (dh.astype(h.dtype), kept)


def _backward(s: _Settings, saved: Any, g: Any) -> tuple[Any, ...]:
    dh, kept = saved
    if isinstance(g, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    rows = (dh.astype(jnp.float32) * g[:, None]).astype(dh.dtype)
    return rows, None if kept is None else _kernel_grad(kept, g, s), None, None


def _kernel_grad(kept: Any, g: Array, s: _Settings) -> Array:
    """`hᵀ·(softmax - target)`, laid as w; the logits made again chunk by chunk."""
    h, w, labels, counted, lse = kept
    h = jnp.where(counted[:, None], h, 0)
    g, lse = jnp.where(counted, g, 0.0), jnp.where(counted, lse, 0.0)
    sizes = h.shape[0], w.shape[s.axis], s.asked
    plans = on_a_cpu(*sizes), elsewhere(*sizes, grouped=False)
    f = functools.partial(_kernel_grad_by, s=s)
    return _for_device(f, plans, h, w, labels, lse, g)


def _kernel_grad_by(
    chunks: Chunks,
    h: Array,
    w: Array,
    labels: Array,
    lse: Array,
    g: Array,
    *,
    s: _Settings,
) -> Array:
    slope = (g * (1 + 2 * s.z * lse))[:, None]

    def step(columns: Array, start: Any, grad: Array) -> Array:
        logits = _logits(h, columns, s.axis)
        classes = start + lax.broadcasted_iota(labels.dtype, logits.shape, 1)
        hit = jnp.where(classes == labels[:, None], 1 - s.eps, 0.0)
        hit += s.eps / w.shape[s.axis]
        d = jnp.exp(logits - lse[:, None]) * slope
        d = d - hit * g[:, None]
        d = d.astype(h.dtype)
        first, second = (h, d) if s.axis else (d, h)
        numbers = ((0,), (0,)), ((), ())
        own = lax.dot_general(
            first, second, numbers, preferred_element_type=jnp.float32,
            out_sharding=_compat.on_mesh_of(h, _compat.spec(w)),
        )  # fmt: skip
        own = own.astype(grad.dtype)
        return lax.dynamic_update_slice_in_dim(grad, own, start, s.axis)

    return _over_chunks(w, chunks.classes, s.axis, step, jnp.zeros_like(w))


_nll.defvjp(_forward, _backward, symbolic_zeros=True)
