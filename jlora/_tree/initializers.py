"""How factors start."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# An initialiser makes `(a, b)` from a key, the two shapes, the fan-in and a dtype.
Shape = Sequence[int]
Factors = tuple[jax.Array, jax.Array]
Initializer = Callable[[jax.Array, Shape, Shape, int, DTypeLike], Factors]


def leaf_key(key: jax.Array, path: str) -> jax.Array:
    """A leaf's own key: it depends on the path alone, not on the other targets."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def default(
    key: jax.Array, a: Shape, b: Shape, fan_in: int, dtype: DTypeLike
) -> Factors:
    """A uniform in ±1/sqrt(fan_in), B zero.

    Source: PEFT's default, `kaiming_uniform_(a=sqrt(5))`; B as in Hu et al. 2021,
    arXiv:2106.09685, section 4.1, so that training starts at the base model.
    """
    bound = 1 / math.sqrt(fan_in)
    return (
        jax.random.uniform(key, tuple(a), dtype, -bound, bound),
        jnp.zeros(tuple(b), dtype),
    )


def gaussian(
    key: jax.Array, a: Shape, b: Shape, fan_in: int, dtype: DTypeLike
) -> Factors:
    """A normal with standard deviation 1/r, B zero.

    Source: PEFT's `init_lora_weights="gaussian"`.
    """
    normal = jax.random.normal(key, tuple(a), dtype)
    return normal / a[-1], jnp.zeros(tuple(b), dtype)


def embedding(
    key: jax.Array, a: Shape, b: Shape, fan_in: int, dtype: DTypeLike
) -> Factors:
    """A zero, B normal: every word starts unchanged, and each moves on its own.

    Source: PEFT's and loralib's embedding layers.
    """
    return jnp.zeros(tuple(a), dtype), jax.random.normal(key, tuple(b), dtype)


INITIALIZERS: dict[str, Initializer] = {
    "default": default,
    "gaussian": gaussian,
    "embedding": embedding,
}
