"""Attention through `jax.nn.dot_product_attention`, which forms no scores on a GPU.

The families' own form is two einsums around a softmax in float32. It serves every
model, and keeps `[B, H, T, S]` scores. A fused kernel keeps none, and asks for less:
what it cannot do is an error here, never another result.

Letters in shapes: B batch, T queries, S keys, H query heads, G heads of keys and
values, D width of a head.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jlora._errors import StructureError

EINSUM, CUDNN = "einsum", "cudnn"
FORMS = (EINSUM, "xla", CUDNN)


def check_form(form: str) -> None:
    """Refuse an `attn_implementation` that is none of `FORMS`."""
    if form not in FORMS:
        raise StructureError(
            f"attn_implementation={form!r} is not known.\nChoose one of "
            f"{', '.join(FORMS)}."
        )


# Part of the program, not an input of it.
_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Masking:
    """Which keys the queries see, told to a fused kernel.

    Causality and window are told by name: as a mask they would be `[T, S]`.

    Attributes:
      implementation: `"xla"` or `"cudnn"`.
      bias: `[1, H, T, S]` added to the scores; `None` adds nothing.
      mask: `[B or 1, T or 1, S]`, on where a query may look at a key; `None` is on.
      causal: whether keys after the query are hidden; T is S then.
      window: how many keys up to the query's own are seen; `None` is all.
    """

    implementation: Any = dataclasses.field(metadata=_STATIC)
    bias: Array | None = None
    mask: Array | None = None
    causal: bool = dataclasses.field(default=False, metadata=_STATIC)
    window: int | None = dataclasses.field(default=None, metadata=_STATIC)


def fused(
    q: Array,
    k: Array,
    v: Array,
    masking: Masking,
    *,
    scale: Array | float,
    cap: float | None = None,
) -> Array:
    """Return softmax(scale · q·k + bias)·v, `[B, T, H, D]`, by a fused kernel.

    A query that sees no key, which only padding does, gets some mean of the values.
    cuDNN's gradients differ in their last bits from run to run, but under
    `XLA_FLAGS=--xla_gpu_deterministic_ops=true`.

    Args:
      q: `[B, T, H, D]`; query heads share keys H/G at a time.
      k: `[B, S, G, D]`.
      v: `[B, S, G, D]`.
      masking: which keys the queries see.
      scale: of the scores.
      cap: what the scores would have to stay within, softly.

    Raises:
      StructureError: scores are capped; or cuDNN refuses dtype, head width or machine.

    Source: `jax.nn.dot_product_attention`; Dao et al. 2022, arXiv:2205.14135.
    """
    if cap is not None:
        raise StructureError(
            f"attn_implementation={masking.implementation!r}: this model caps its "
            f"scores at {cap}, and no fused kernel does.\nSet "
            f"attn_implementation={EINSUM!r}."
        )
    if not isinstance(scale, (int, float)):
        # A kernel's scale is part of the program; a scanned layer's is an input.
        q, scale = (scale * q).astype(q.dtype), 1.0
    length = q.shape[1]
    masking = _without_window(masking, k.shape[1])
    if masking.implementation == CUDNN:
        q, k, v, masking = for_cudnn(q, k, v, masking)
    window = None if masking.window is None else (masking.window - 1, 0)
    try:
        y = jax.nn.dot_product_attention(
            q,
            k,
            v,
            bias=masking.bias,
            mask=None if masking.mask is None else masking.mask.astype(bool)[:, None],
            scale=float(scale),
            is_causal=masking.causal,
            local_window_size=window,
            implementation=masking.implementation,
        )
    except (NotImplementedError, RuntimeError, ValueError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise  # of the machine, not of the request
        raise StructureError(
            f"attn_implementation={masking.implementation!r} on queries {q.shape} and "
            f"keys {k.shape} in {q.dtype}: {error}\ncuDNN takes bfloat16 and "
            "float16 and runs on NVIDIA GPUs, with jax[cuda] installed. Set the "
            f"model's dtype, or attn_implementation={EINSUM!r}."
        ) from error
    return y[:, :length]


def _without_window(masking: Masking, keys: int) -> Masking:
    """Return `masking` without a window that hides nothing, or that a mask can take in.

    cuDNN has no window beside a bias, and to it a mask is one.
    """
    if masking.window is None or masking.window >= keys:
        return dataclasses.replace(masking, window=None)
    if masking.mask is None and masking.bias is None:
        return masking
    places = jnp.arange(keys)
    near = places[:, None] - places[None] < masking.window  # [T, S]
    mask = near[None]
    if masking.mask is not None:
        mask = mask & masking.mask.astype(bool)
    return dataclasses.replace(masking, mask=mask, window=None)


def for_cudnn(
    q: Array, k: Array, v: Array, masking: Masking
) -> tuple[Array, Array, Array, Masking]:
    """Return the arguments as cuDNN wants them where there is a bias or a mask.

    Both reach it as a bias: whole in its last axes, in the queries' dtype, and for the
    gradient of even lengths. Odd ones get a key that nobody sees, and a query.
    """
    if masking.bias is None and masking.mask is None:
        return q, k, v, masking
    T, S = q.shape[1], k.shape[1]
    more, bias, mask = (T % 2, S % 2), masking.bias, masking.mask
    if mask is None and any(more):
        mask = jnp.ones((1, 1, S), bool)
    if mask is not None:
        mask = jnp.broadcast_to(mask.astype(bool), (mask.shape[0], T, S))
        mask = jnp.pad(mask, ((0, 0), (0, more[0]), (0, more[1])))
    if bias is not None:
        bias = jnp.pad(bias, ((0, 0), (0, 0), (0, more[0]), (0, more[1])))
        bias = bias.astype(q.dtype)
    q = _longer(q, more[0])
    k, v = _longer(k, more[1]), _longer(v, more[1])
    return q, k, v, dataclasses.replace(masking, bias=bias, mask=mask)


def _longer(x: Array, by: int) -> Array:
    """[B, T, H, D] -> [B, T + by, H, D]."""
    return jnp.pad(x, ((0, 0), (0, by), (0, 0), (0, 0))) if by else x
