"""Layers that the families share: activations, masks, norm, embedding, lists.

Letters in shapes: B batch, S keys, d the residual stream, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jlora.models._parts.explicit import take_rows

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}

# Half of float32's range, so that two masks add up without reaching infinity.
MASKED = float(np.finfo(np.float32).min) / 2


def mask_bias(mask: Array) -> Array:
    """Return `[B, 1, 1 or T, S]` in float32, to be added to scores: 0 where on.

    Args:
      mask: `[B, S]`, or `[B, 1 or T, S]` where queries see different keys.
    """
    mask = mask[:, None] if mask.ndim == 2 else mask
    return jnp.where(mask.astype(bool), 0.0, MASKED).astype(jnp.float32)[:, None]


class RMSNorm(nn.Module):
    """Layer norm without mean and bias, computed in float32.

    Attributes:
      epsilon: added to the mean square.
      dtype: of the result.
      param_dtype: what `init` makes the weight in.
      offset: added to the weight; 1 where weights are stored about 0.
    """

    epsilon: float
    dtype: Any
    param_dtype: Any
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalise the last axis of `x` `[..., d]`."""
        init = nn.initializers.constant(1 - self.offset)
        weight = self.param("weight", init, (x.shape[-1],), self.param_dtype)
        x = x.astype(jnp.float32)
        x = x * lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + self.epsilon)
        weight = along_last(weight, x)
        return (x * (self.offset + weight if self.offset else weight)).astype(
            self.dtype
        )


class LayerNorm(nn.Module):
    """Layer norm, computed in float32; its parameters are named as in PyTorch.

    Attributes:
      epsilon: added to the variance.
      dtype: of the result.
      param_dtype: what `init` makes weight and bias in.
    """

    epsilon: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalise the last axis of `x` `[..., d]`."""
        init, shape = nn.initializers, x.shape[-1:]
        weight = self.param("weight", init.ones, shape, self.param_dtype)
        bias = self.param("bias", init.zeros, shape, self.param_dtype)
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, -1, keepdims=True)
        x = x * lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + self.epsilon)
        return (x * along_last(weight, x) + along_last(bias, x)).astype(self.dtype)


def along_last(vector: Array, x: Array) -> Array:
    """Return `vector` `[d]` in the dtype of `x` `[..., d]`, with as many axes."""
    return jnp.expand_dims(vector.astype(x.dtype), tuple(range(x.ndim - 1)))


class Embedding(nn.Module):
    """A table whose rows are looked up, and with which a tied head multiplies."""

    rows: int
    features: int
    std: float
    dtype: Any
    param_dtype: Any

    def setup(self) -> None:
        """Declare `embedding` `[V, d]`."""
        init, shape = nn.initializers.normal(self.std), (self.rows, self.features)
        self.embedding = self.param("embedding", init, shape, self.param_dtype)

    def __call__(self, ids: Array) -> Array:
        """Return `[..., d]`; an id beyond the table gives NaN."""
        # The rows are cast, not the table: a batch touches few of them.
        return take_rows(self.embedding, ids).astype(self.dtype)

    def attend(self, x: Array) -> Array:
        """Return `[..., V]`, the products of `x` `[..., d]` with every row."""
        table = self.embedding.astype(self.dtype)
        return lax.dot_general(x, table, (((x.ndim - 1,), (1,)), ((), ())))


class Numbered(nn.Module):
    """Submodules named "0", "1", ..., as PyTorch's `ModuleList` numbers them."""

    make: tuple[Callable[..., nn.Module], ...]

    def setup(self) -> None:
        """Make the submodules."""
        self.items = [make(name=str(i)) for i, make in enumerate(self.make)]
