"""A state between steps: its buffers, and all of it that is no array.

Trees of nodes are for people. A step takes lists of arrays and gives lists of arrays;
what they are the form knows, which goes on from step to step as one object, so that
nothing of it is looked at, hashed or compared again.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax

from jlora.train._layout import Layout
from jlora.train._static import Rest

Tree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Form:
    """What a step is compiled for, beside shapes and the batch.

    Attributes:
      structure: of `(step, trainable, opt_state)`.
      rest: what is no array in the frozen half.
      layout: how the leaves of the first lie.
      shardings: of the buffers, None in the places of those on no mesh.
    """

    structure: Any
    rest: Rest
    layout: Layout
    shardings: tuple[Any, ...]

    @functools.cached_property
    def _all(self) -> tuple[Any, ...]:
        return self.structure, self.rest, self.layout, self.shardings

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self._all)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Form) and self._all == other._all)


class Lying(NamedTuple):
    """The arrays of a state as they lie.

    Attributes:
      form: what they are.
      buffers: what moves.
      frozen: the arrays of the frozen half.
    """

    form: Form
    buffers: list[Any]
    frozen: list[Any]

    def moving(self) -> tuple[Any, Tree, Any]:
        """`(step, trainable, opt_state)`, cut from the buffers."""
        leaves = self.form.layout.unpack(self.buffers)
        moving: tuple[Any, Tree, Any] = jax.tree.unflatten(self.form.structure, leaves)
        return moving
