"""Many runs' states as one: every array with a leading axis of slots, one base."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jlora.train._step import named_sharding

Tree = Any


class Kept(NamedTuple):
    """What a bank's step reads and does not change.

    Attributes:
      shared: the base; None in the place of what slots have of their own.
      own: the rest of the frozen half, the adapters' scales, `[K, ...]`.
      hyper: the optimisers' numbers by name, `[K]` float32.
      sizes: for each trainable leaf the slots' own sizes `[K]` along the axes that are
        padded.
    """

    shared: Tree
    own: Tree
    hyper: Mapping[str, Array]
    sizes: Sequence[Mapping[int, Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bank:
    """K training states on one base; a `TrainState` whose leaves have a slot axis.

    Made by `Plan.bank`, changed by a step of `sweep_step`, read by `Plan.state`.

    Attributes:
      step: updates made, `[K]`.
      trainable: the adapters, at the common rank.
      opt_state: the optimisers' states.
      frozen: what the step does not change.
      key: the runs' PRNG keys, `[K]`.
    """

    step: Array
    trainable: Tree
    opt_state: Any
    frozen: Kept
    key: Array

    @property
    def slots(self) -> int:
        """How many states there are."""
        return self.step.shape[0]


def stack(slots: Sequence[Sequence[Any]]) -> list[Array]:
    """The arrays of several slots as arrays of all."""

    def one(*xs: Any) -> Array:
        if isinstance(xs[0], jax.Array):  # keys, which NumPy does not know
            return jnp.stack(xs)
        return jnp.asarray(np.stack(xs))

    return [one(*xs) for xs in zip(*slots, strict=True)]


def put(leaves: list[Array], slot: Any, new: list[Any]) -> list[Array]:
    """Write one slot's arrays over what was there; all stay on their devices."""
    return _put(tuple(map(named_sharding, leaves)))(leaves, slot, new)


@functools.cache
def _put(shardings: tuple[Any, ...]) -> Any:
    def write(leaves: list[Array], slot: Any, new: list[Any]) -> list[Array]:
        return [x.at[slot].set(y) for x, y in zip(leaves, new, strict=True)]

    return jax.jit(write, donate_argnums=0, out_shardings=list(shardings))


@jax.jit
def take(leaves: list[Array], slot: Any) -> list[Array]:
    """One slot's arrays."""
    return [x[slot] for x in leaves]
