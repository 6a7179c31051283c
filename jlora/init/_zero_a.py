"""A zero, B random: the gradient of the first step is that of A."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jlora._tree.initializers import Factors, Shape


@dataclasses.dataclass(frozen=True)
class ZeroA:
    """A zero, B normal with standard deviation 1/sqrt(r).

    The other way round than usual: A takes the first step. In wide networks the usual
    way bears larger learning rates.

    Source: `Init[B]` of Hayou et al. 2024, arXiv:2406.08447, section 3.

    >>> tree = jlora.lorafy({"w": jnp.ones((6, 4))}, 2, ["w"], init=ZeroA())
    >>> bool(jnp.any(tree["w"].adapters[""].a))
    False
    """

    def __call__(
        self, key: jax.Array, a: Shape, b: Shape, fan_in: int, dtype: DTypeLike
    ) -> Factors:
        """The factors."""
        normal = jax.random.normal(key, tuple(b), dtype)
        return jnp.zeros(tuple(a), dtype), normal / math.sqrt(a[-1])
