"""Head and cross entropy in one: the logits exist a chunk of the vocabulary at a time.

With a vocabulary of V the logits of N tokens, `[N, V]`, and their gradient are the two
largest arrays of a step. Both are the same matrix twice: `dh = softmax(h·W)·Wᵀ - W_y`
is attention with the columns of W for keys and values, so one pass over W's chunks with
a running maximum gives loss and gradient, and each chunk of W is read once for both
products while it lies in the cache.

Source: the running softmax, Milakov and Gimelshein 2018, arXiv:1805.02867, and its use
for attention, Dao et al. 2022, arXiv:2205.14135.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jlora._errors import ShapeError
from jlora._losses import check_labels, weights_of

Array = Any


class _Settings(NamedTuple):
    """Label smoothing, the z-loss's factor, and columns a chunk."""

    eps: float
    z: float
    chunk: int


def linear_cross_entropy(
    hidden: Array,
    kernel: Array,
    labels: Array,
    mask: Array | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int = 2048,
) -> tuple[Array, Array]:
    """`cross_entropy(hidden @ kernel, labels, mask)` without the logits.

    The gradient of `hidden` is made in the forward pass. That of `kernel`, where it is
    asked for, costs the logits once more; where the kernel is adapted it is formed,
    `[d, V]`, before it goes to the factors. Reverse mode only.

    Args:
      hidden: `[..., d]`, what goes into the head.
      kernel: `[d, V]`, the head without bias; a tied embedding's is `table.T`. It
        should not be sharded over V.
      labels: `[...]`, integers.
      mask: as for `cross_entropy`.
      label_smoothing: probability spread evenly over all classes.
      z_loss: factor of `logsumexp(logits)²`.
      chunk: columns of the kernel at a time. A chunk of the kernel and of the logits
        should fit into the processor's cache; on a GPU larger ones do better.

    Returns:
      The sum and the count, float32 scalars.

    Raises:
      ShapeError: the shapes do not fit each other.

    >>> h, w, y = jnp.ones((3, 2)), jnp.ones((2, 5)), jnp.array([1, 2, -100])
    >>> total, count = linear_cross_entropy(h, w, y)
    >>> float(total / count) == float(jnp.log(5.0)), int(count)
    (True, 2)
    """
    if hidden.shape[-1:] != kernel.shape[:1] or len(kernel.shape) != 2 or chunk < 1:
        raise ShapeError(
            f"hidden {tuple(hidden.shape)} and kernel {tuple(kernel.shape)} do not "
            f"fit, or chunk={chunk} is none: the kernel is [d, V], hidden [..., d]."
        )
    check_labels("hidden", hidden, labels, mask)
    weight = weights_of(labels, mask).reshape(-1)
    counted = weight != 0
    safe = jnp.where(counted, labels.reshape(-1), 0)
    rows = hidden.reshape(-1, hidden.shape[-1])
    settings = _Settings(float(label_smoothing), float(z_loss), chunk)
    nll = _nll(rows, kernel, safe, counted, settings)
    return jnp.sum(nll * weight), jnp.sum(weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _nll(h: Array, w: Array, labels: Array, counted: Array, s: _Settings) -> Array:
    """The loss of each label `[N]`, float32; 0 where it is not counted."""
    lse, _ = _softmax_pass(h, w, s, with_mean=False)
    return _loss(h, w, labels, counted, lse, s)[0]


def _loss(
    h: Array, w: Array, labels: Array, counted: Array, lse: Array, s: _Settings
) -> tuple[Array, Array]:
    """The losses, and the part of the kernel that they count on, `[N, d]`."""
    # (1 - eps)·W_y + eps·mean(W): what the logits of the targets are products with.
    target = (1 - s.eps) * w[:, labels].T.astype(jnp.float32)
    if s.eps:
        target += s.eps * jnp.mean(w, axis=1, dtype=jnp.float32)
    loss = lse - jnp.sum(h.astype(jnp.float32) * target, axis=-1) + s.z * lse**2
    return jnp.where(counted, loss, 0.0), target


def _softmax_pass(
    h: Array, w: Array, s: _Settings, *, with_mean: bool
) -> tuple[Array, Array]:
    """`logsumexp(h·W)` `[N]`, and the softmax's mean of W's columns, `[N, d]`."""
    tokens, width = h.shape

    def step(columns: Array, start: Any, carry: Any) -> Any:
        top, total, mean = carry
        logits = _logits(h, columns)
        new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
        p = jnp.exp(logits - new_top[:, None])
        shrink = jnp.exp(top - new_top)
        total = total * shrink + jnp.sum(p, axis=-1)
        if with_mean:
            more = lax.dot_general(
                p.astype(w.dtype), columns, (((1,), (1,)), ((), ())),
                preferred_element_type=jnp.float32,
            )  # fmt: skip
            mean = mean * shrink[:, None] + more
        return new_top, total, mean

    start = (
        jnp.full((tokens,), jnp.finfo(jnp.float32).min),
        jnp.zeros((tokens,), jnp.float32),
        jnp.zeros((tokens, width if with_mean else 0), jnp.float32),
    )
    top, total, mean = _over_chunks(w, s.chunk, step, start)
    return top + jnp.log(total), mean / total[:, None]


def _logits(h: Array, columns: Array) -> Array:
    return lax.dot_general(
        h, columns, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )


def _over_chunks(
    w: Array, chunk: int, step: Callable[[Array, Any, Any], Any], carry: Any
) -> Any:
    """Feed the columns of w chunk by chunk, of even sizes, to `step`."""
    classes = w.shape[1]
    size = -(-classes // -(-classes // chunk))
    whole, rest = divmod(classes, size)

    def one(number: Any, carry: Any) -> Any:
        columns = lax.dynamic_slice_in_dim(w, number * size, size, axis=1)
        return step(columns, number * size, carry)

    carry = lax.fori_loop(0, whole, one, carry)
    return step(w[:, whole * size :], whole * size, carry) if rest else carry


def _forward(
    h: Any, w: Any, labels: Any, counted: Any, s: _Settings
) -> tuple[Array, Any]:
    wants_kernel = w.perturbed
    h, w, labels, counted = h.value, w.value, labels.value, counted.value
    lse, mean = _softmax_pass(h, w, s, with_mean=True)
    loss, target = _loss(h, w, labels, counted, lse, s)
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
    """`hᵀ·(softmax - target)`, the logits made again chunk by chunk."""
    h, w, labels, counted, lse = kept
    h = jnp.where(counted[:, None], h, 0)
    g, lse = jnp.where(counted, g, 0.0), jnp.where(counted, lse, 0.0)
    slope = (g * (1 + 2 * s.z * lse))[:, None]

    def step(columns: Array, start: Any, grad: Array) -> Array:
        logits = _logits(h, columns)
        classes = start + lax.broadcasted_iota(labels.dtype, logits.shape, 1)
        hit = jnp.where(classes == labels[:, None], 1 - s.eps, 0.0) + s.eps / w.shape[1]
        d = jnp.exp(logits - lse[:, None]) * slope
        d = d - hit * g[:, None]
        own = lax.dot_general(
            h, d.astype(h.dtype), (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        return lax.dynamic_update_slice_in_dim(grad, own.astype(grad.dtype), start, 1)

    return _over_chunks(w, s.chunk, step, jnp.zeros_like(w))


_nll.defvjp(_forward, _backward, symbolic_zeros=True)
