"""Sums of updates of which a part is left out: TIES, DARE and magnitude pruning.

All are defined on the updates, entry by entry, and so they are computed here: on the
dense update of one kernel at a time. PEFT's variants without `_svd` prune and elect the
entries of A and of B instead, whose products are no sum of updates.

Sources: Yadav et al. 2023, arXiv:2306.01708 (TIES: trim, elect, disjoint mean); Yu et
al. 2023, arXiv:2311.03099 (DARE: drop and rescale). Of each kernel the part `density`
is kept, as in PEFT; a negative weight is the sum's with the opposite update.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jlora._kernel.axes import Array

Drop = Literal["smallest", "random"]
Sign = Literal["total", "frequency"]


@dataclasses.dataclass(frozen=True)
class Sparse:
    """How updates are thinned and summed.

    Attributes:
      drop: what is left out: `"smallest"` entries, or `"random"` ones, the rest
        scaled up.
      elect: whether entries against the majority's sign are left out too, and the rest
        averaged.
      density: the part of the entries that is kept.
      sign: whether the majority is that of the sums or of the counts.
    """

    drop: Drop
    elect: bool
    density: float
    sign: Sign = "total"

    def sum(self, updates: Array, weights: Array, keys: Array | None) -> Array:
        """The sum of `updates [n, size]`, `[size]`, each with its weight.

        Args:
          updates: one row for each adapter.
          weights: `[n]`.
          keys: `[n]` PRNG keys where random entries are dropped.
        """
        kept = self._thinned(updates, keys)
        if not self.elect:
            return jnp.sum(weights[:, None] * kept, axis=0)
        kept, weights = jnp.sign(weights)[:, None] * kept, jnp.abs(weights)
        votes = kept if self.sign == "total" else jnp.sign(kept)
        elected = jnp.where(jnp.sum(votes, axis=0) >= 0, 1, -1)
        agree = jnp.sign(kept) == elected
        total = jnp.sum(weights[:, None] * kept * agree, axis=0)
        return total / jnp.maximum(jnp.sum(agree, axis=0), 1)

    def _thinned(self, updates: Array, keys: Array | None) -> Array:
        if self.density >= 1:
            return updates
        if self.drop == "random":
            shape, draw = updates.shape[1:], jax.random.bernoulli
            kept = jax.vmap(lambda key: draw(key, self.density, shape))(keys)
            return jnp.where(kept, updates / self.density, 0)
        count = int(self.density * updates.shape[1])
        if not count:
            return jnp.zeros_like(updates)
        sizes = jnp.abs(updates)
        least = jnp.sort(sizes, axis=1)[:, -count]
        return jnp.where(sizes >= least[:, None], updates, 0)
