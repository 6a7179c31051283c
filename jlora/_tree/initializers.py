"""How factors start: the contract, PEFT's usual ways, and where names lead."""

from __future__ import annotations

import abc
import importlib
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jlora._errors import OptionError

# An initialiser makes `(a, b)` from a key, the two shapes, the fan-in and a dtype.
Shape = Sequence[int]
Factors = tuple[jax.Array, jax.Array]
Initializer = Callable[[jax.Array, Shape, Shape, int, DTypeLike], Factors]


class FromKernel(abc.ABC):
    """An initialiser that reads the kernel, and whose product is taken out of it.

    The base becomes `W - s·a·b`, so that the tree computes at first what it did.
    Instances are compared by their settings: equal ones share compiled programs.
    """

    @abc.abstractmethod
    def factors(
        self, key: jax.Array, w: jax.Array, rank: int, scale: jax.Array, *data: Any
    ) -> Factors:
        """The factors of one kernel as a matrix.

        Args:
          key: a PRNG key for this matrix.
          w: the kernel `[i, o]`, in float32 (float64 where the kernel is).
          rank: r, at most min(i, o).
          scale: s, a scalar.
          *data: statistics of the kernel's inputs or gradients, where it takes any.

        Returns:
          `a [i, r]` and `b [r, o]` in the dtype of `w`.
        """


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


def initializer(init: Any, *, is_embedding: bool) -> Initializer | FromKernel:
    """What `init=` means for a kernel.

    Names that are not of this module are looked up in `jlora.init`, which is a room
    above and is imported only then.

    Raises:
      OptionError: it is neither a name nor an initialiser.
    """
    if isinstance(init, type):
        raise OptionError(
            f"init={init.__name__} is a class.\nPass one of its objects, "
            f"{init.__name__}()."
        )
    if callable(init) or isinstance(init, FromKernel):
        return init
    if isinstance(init, str) and init in INITIALIZERS:
        return INITIALIZERS["embedding" if is_embedding else init]
    found: Initializer | FromKernel = importlib.import_module("jlora.init").named(init)
    return found
