"""Losses that are sums with a count, so that batches of any size add up exactly."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._errors import ShapeError

Array = Any


def cross_entropy(
    logits: Array,
    labels: Array,
    mask: Array | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Array, Array]:
    """The summed cross entropy and the number of labels it sums over.

    Computed in float32 from logits of any dtype. No float32 array of the logits' shape
    outlives a fused loop: the backward pass recomputes the softmax from the logits.
    A loss function of `jlora.train` may return the pair as it is.

    Args:
      logits: `[..., classes]`.
      labels: `[...]`, integers.
      mask: `[...]`, what each label counts: 0 and 1, or weights; None is all 1. A
        label below 0 never counts.
      label_smoothing: probability spread evenly over all classes.
      z_loss: factor of `logsumexp(logits)²`, which keeps the logits from drifting.

    Returns:
      The sum and the count, float32 scalars. A masked label adds exactly 0, whatever
      its logits hold.

    Raises:
      ShapeError: logits, labels and mask do not fit each other.

    Source: z-loss, Chowdhery et al. 2022, arXiv:2204.02311, section 5.

    >>> total, count = cross_entropy(jnp.zeros((3, 4)), jnp.array([1, 2, -100]))
    >>> float(total / count) == float(jnp.log(4.0)), int(count)
    (True, 2)
    """
    check_labels("logits", logits, labels, mask)
    weight = weights_of(labels, mask)
    counted = weight != 0
    safe = jnp.where(counted, labels, 0)
    nll = _nll(logits, safe, counted, float(label_smoothing), float(z_loss))
    return jnp.sum(nll * weight), jnp.sum(weight)


def check_labels(name: str, array: Array, labels: Array, mask: Array | None) -> None:
    """Refuse labels and masks of other shapes than the array's without its last axis.

    Raises:
      ShapeError: so.
    """
    if array.shape[:-1] != labels.shape:
        raise ShapeError(
            f"{name} {tuple(array.shape)} and labels {tuple(labels.shape)} do not fit: "
            f"labels have the shape of {name} without its last axis."
        )
    if mask is not None and mask.shape != labels.shape:
        raise ShapeError(
            f"the mask {tuple(mask.shape)} has another shape than the labels "
            f"{tuple(labels.shape)}.\nPass one weight a label."
        )


def weights_of(labels: Array, mask: Array | None) -> Array:
    """What each label counts, float32: the mask, or 1; 0 where it is below 0."""
    known = labels >= 0
    weight = known if mask is None else known * mask
    return weight.astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _nll(logits: Array, labels: Array, counted: Array, eps: float, z: float) -> Array:
    """The loss of each label `[...]`, float32; 0 where it is not counted."""
    return _nll_forward(logits, labels, counted, eps, z)[0]


def _nll_forward(
    logits: Array, labels: Array, counted: Array, eps: float, z: float
) -> tuple[Array, Any]:
    lse = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    loss = lse - (1 - eps) * picked.astype(jnp.float32)
    if eps:
        loss -= eps * jnp.mean(logits, axis=-1, dtype=jnp.float32)
    if z:
        loss += z * lse**2
    return jnp.where(counted, loss, 0.0), (logits, labels, counted, lse)


def _nll_backward(eps: float, z: float, kept: Any, g: Array) -> tuple[Any, ...]:
    """`softmax * (1 + 2 z lse) - (1 - eps) onehot - eps / V`, in the logits' dtype."""
    logits, labels, counted, lse = kept
    softmax = jnp.exp(logits.astype(jnp.float32) - lse[..., None])
    classes = lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
    grad = softmax * (1 + 2 * z * lse)[..., None]
    grad -= jnp.where(classes == labels[..., None], 1 - eps, 0.0)
    grad -= eps / logits.shape[-1]
    grad = jnp.where(counted[..., None], grad * g[..., None], 0.0)
    return grad.astype(logits.dtype), None, None


_nll.defvjp(_nll_forward, _nll_backward)
