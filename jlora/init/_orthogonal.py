"""Orthogonal factors: neither is zero, and their product is."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jlora._errors import ShapeError
from jlora._tree.initializers import Factors, Shape


@dataclasses.dataclass(frozen=True)
class Orthogonal:
    """A and B from the odd and the even rows of one random orthogonal matrix.

    `A = N·Q[0::2] / 10` and `B = Q[1::2]ᵀ·M / 10` with normal N, M: A·B is zero up to
    rounding, the base stays as it is, and both factors have a gradient from the first
    step on. The rank must be even.

    Source: PEFT's `init_lora_weights="orthogonal"`, after
    https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation.

    >>> tree = jlora.lorafy({"w": jnp.ones((6, 4))}, 2, ["w"], init=Orthogonal())
    >>> float(jnp.max(jnp.abs(jlora.merge(tree)["w"] - 1))) < 1e-6
    True
    """

    def __call__(
        self, key: jax.Array, a: Shape, b: Shape, fan_in: int, dtype: DTypeLike
    ) -> Factors:
        """The factors of every matrix of a stack.

        Raises:
          ShapeError: the rank is odd.
        """
        rank = a[-1]
        if rank % 2:
            raise ShapeError(
                f"rank={rank}: orthogonal factors need an even one, half of the "
                "directions for A and half for B."
            )
        many = _leading(a, fan_in)
        count, half = math.prod(many), rank // 2
        fan_out = math.prod(b) // (count * rank)
        keys = jax.random.split(key, 3)
        square = jax.random.normal(keys[0], (count, rank, rank))
        q, _ = jnp.linalg.qr(square)
        n = jax.random.normal(keys[1], (count, fan_in, half))
        m = jax.random.normal(keys[2], (count, half, fan_out))
        with jax.default_matmul_precision("highest"):
            down = n @ q[:, 0::2] / 10
            up = q[:, 1::2].swapaxes(1, 2) @ m / 10
        return down.reshape(tuple(a)).astype(dtype), up.reshape(tuple(b)).astype(dtype)


def _leading(a: Shape, fan_in: int) -> tuple[int, ...]:
    """The axes of `a [*batch, *in, r]` before those whose product is the fan-in."""
    at = len(a) - 1
    while math.prod(a[at:-1]) != fan_in:
        at -= 1
    return tuple(a[:at])
