"""The adapter that a run keeps: of the kernels as they are, or as they were before."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jlora._kernel.nodes import Full, is_node
from jlora._kernel.quantized import Quantized
from jlora._tree.partition import split
from jlora.init._unshift import shifted_kernels, unshift
from jlora.train._callbacks import save_best
from jlora.train._state import TrainState

if TYPE_CHECKING:
    from jlora.checkpoint import Fingerprint

Tree = Any


@dataclasses.dataclass(frozen=True)
class Kept:
    """How a run's adapter is saved and loaded.

    Attributes:
      base: the parameters before a start that shifted them; None where it belongs to
        those that are trained beside.
      initial: the trained leaves as they were at first.
    """

    base: Tree = None
    initial: Tree = None

    @classmethod
    def of(cls, state: TrainState, base: Tree | None) -> Kept:
        """Keep what it takes.

        Args:
          state: the first one.
          base: the parameters that its tree was made of, if they are known.
        """
        if base is None or not shifted_kernels(state.params):
            return cls()
        # Copies, for a training step writes over what it is given.
        return cls(base, jax.tree.map(jnp.copy, split(state.params)[0]))

    @functools.cached_property
    def _fingerprint(self) -> Fingerprint:
        from jlora import checkpoint

        return checkpoint.fingerprint(self.base)

    def save(self, path: Path, state: TrainState) -> None:
        """Save a state's adapter in the place of an earlier one."""
        if self.base is None:
            save_best(path, state)
            return
        from jlora import checkpoint

        tree = unshift(state.params, self.initial, self.base)
        checkpoint.save_adapter(path, tree, overwrite=True, base=self._fingerprint)

    def load(self, path: Path, params: Tree) -> Tree:
        """Put what was saved onto its base, which is that of `params` without one."""
        from jlora import checkpoint

        return checkpoint.load_adapter(
            path, _base_of(params) if self.base is None else self.base
        )


def _base_of(tree: Tree) -> Tree:
    def base(x: Any) -> Any:
        if not is_node(x):
            return x
        if isinstance(x, Quantized):
            return x
        return x.value if isinstance(x, Full) else x.base

    return jax.tree.map(base, tree, is_leaf=is_node)
