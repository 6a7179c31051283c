"""Losses that are sums with a count, so that batches of any size add up exactly."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from jlora._errors import DtypeError, ShapeError
from jlora.train._ids import checked_labels
from jlora.train._totals import accumulation_dtype


def cross_entropy(
    logits: Array,
    labels: Array,
    mask: Array | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Array, Array]:
    """The summed cross entropy and the number of labels it sums over.

    Computed in float32 from narrower logits, in float64 from those. No float32 array of
    the logits' shape outlives a fused loop: the backward pass recomputes the softmax
    from the logits. Forward and reverse mode, and one over the other, are supported.
    A loss function of `jlora.train` may return the pair as it is.

    A counted label that is no class is an error while labels have values. Inside
    `jax.jit` they have none, and the loss is NaN; a `TrainStep` checks what it is
    given before it runs.

    Args:
      logits: `[..., classes]`.
      labels: `[...]`, integers.
      mask: `[...]`, what each label counts: 0 and 1, or weights; None is all 1. A
        label below 0 never counts.
      label_smoothing: probability spread evenly over all classes.
      z_loss: factor of `logsumexp(logits)²`, which keeps the logits from drifting.

    Returns:
      The sum and the count, scalars of the dtype computed in. A masked label adds
      exactly 0, whatever its logits hold.

    Raises:
      ShapeError: logits, labels and mask do not fit each other.
      DtypeError: labels that are no integers.
      DataError: a label that is no class.

    Source: z-loss, Chowdhery et al. 2022, arXiv:2204.02311, section 5.

    >>> total, count = cross_entropy(jnp.zeros((3, 4)), jnp.array([1, 2, -100]))
    >>> float(total / count) == float(jnp.log(4.0)), int(count)
    (True, 2)
    """
    labels = check_labels("logits", logits, labels, mask, classes=logits.shape[-1])
    weight = weights_of(labels, mask, accumulation_dtype(logits.dtype))
    counted = weight != 0
    safe = jnp.where(counted, labels, 0)
    nll = _nll(logits, safe, counted, float(label_smoothing), float(z_loss))
    return jnp.sum(nll * weight), jnp.sum(weight)


def check_labels(
    name: str, array: Array, labels: Array, mask: Array | None, *, classes: int
) -> Array:
    """Return the labels, if they and the mask fit an array `[..., d]` and the classes.

    Raises:
      ShapeError: labels or a mask of another shape than the array's without its last
        axis.
      DtypeError: labels that are no integers.
      DataError: a counted label beyond the classes, where the labels have values.
    """
    if tuple(array.shape[:-1]) != tuple(labels.shape):
        raise ShapeError(
            f"{name} {tuple(array.shape)} and labels {tuple(labels.shape)} do not fit: "
            f"labels have the shape of {name} without its last axis."
        )
    if mask is not None and tuple(mask.shape) != tuple(labels.shape):
        raise ShapeError(
            f"the mask {tuple(mask.shape)} has another shape than the labels "
            f"{tuple(labels.shape)}.\nPass one weight a label."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise DtypeError(
            f"labels are {labels.dtype}{list(labels.shape)}: expected integers, each "
            "the number of a class.\nOne-hot labels become numbers by "
            "jnp.argmax(labels, axis=-1)."
        )
    return checked_labels(labels, mask, classes)


def weights_of(labels: Array, mask: Array | None, dtype: jnp.dtype) -> Array:
    """What each label counts: the mask, or 1; 0 where the label is below 0."""
    weight = jnp.ones((), dtype) if mask is None else jnp.asarray(mask).astype(dtype)
    return jnp.where(labels >= 0, weight, jnp.zeros((), dtype))


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _nll(logits: Array, labels: Array, counted: Array, eps: float, z: float) -> Array:
    """The loss of each label `[...]`; 0 where it is not counted."""
    return _losses(logits, labels, counted, eps, z)[0]


def _losses(
    logits: Array, labels: Array, counted: Array, eps: float, z: float
) -> tuple[Array, Array]:
    """The losses, and `logsumexp(logits)`, `[...]` both."""
    dtype = accumulation_dtype(logits.dtype)
    lse = jax.nn.logsumexp(logits.astype(dtype), axis=-1)
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    loss = lse - (1 - eps) * picked.astype(dtype)
    if eps:
        loss -= eps * jnp.mean(logits, axis=-1, dtype=dtype)
    if z:
        loss += z * lse**2
    return jnp.where(counted, loss, jnp.zeros((), dtype)), lse


@_nll.defjvp
def _nll_jvp(
    eps: float, z: float, primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[Array, Array]:
    logits, labels, counted = primals
    loss, lse = _losses(logits, labels, counted, eps, z)
    # Recomputed by the backward pass, which is the transpose of this: it reads the
    # logits as they are, and no slope of their shape waits for it in float32.
    tangent = jax.checkpoint(
        functools.partial(_tangent, eps=eps, z=z), prevent_cse=False
    )(logits, labels, counted, lse, tangents[0])
    return loss, tangent


def _tangent(
    logits: Array,
    labels: Array,
    counted: Array,
    lse: Array,
    dlogits: Array,
    *,
    eps: float,
    z: float,
) -> Array:
    """What the losses change by, `[...]`.

    `sum(dlogits · (softmax · (1 + 2 z lse) - (1 - eps) onehot - eps / V))`.
    """
    softmax = jnp.exp(logits.astype(lse.dtype) - lse[..., None])
    classes = lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
    slope = softmax * (1 + 2 * z * lse)[..., None]
    hit = classes == labels[..., None]
    slope -= jnp.where(hit, 1 - eps, 0.0).astype(lse.dtype)
    slope -= eps / logits.shape[-1]
    # What is not counted may hold anything, NaN too, in either factor.
    slope, dlogits = (
        jnp.where(counted[..., None], x.astype(lse.dtype), jnp.zeros((), lse.dtype))
        for x in (slope, dlogits)
    )
    return jnp.sum(slope * dlogits, axis=-1)
