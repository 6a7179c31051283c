"""Entry-by-entry products of two kernels, kept apart until something sums them up.

`W²` has no low-rank form, but its sums do: norms, variances, distances, penalties.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jlora import _compat
from jlora._kernel.axes import Array
from jlora._kernel.nodes import LowRank
from jlora._transform._rules._terms import scaled_now


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Hadamard:
    """The product of two kernels of one shape, entry by entry."""

    left: LowRank
    right: LowRank

    @property
    def path(self) -> str:
        """Where the kernels came from, for messages."""
        return " + ".join(dict.fromkeys((self.left.path, self.right.path)))

    @property
    def shape(self) -> tuple[int, ...]:
        """The product's shape."""
        return self.left.shape

    @property
    def dtype(self) -> Any:
        """The product's dtype."""
        return self.left.dtype

    @property
    def base(self) -> Array:
        """The product of the bases."""
        return self.left.base * self.right.base

    def merged(self) -> Array:
        """The dense product."""
        left, right = scaled_now(self.left), scaled_now(self.right)
        return left.merged() * right.merged()

    def tree_flatten(self) -> tuple[Any, Any]:
        """Both kernels."""
        return (self.left, self.right), None

    @classmethod
    def tree_unflatten(cls, _: Any, children: Any) -> Hadamard:
        """Inverse of `tree_flatten`."""
        return cls(*children)


# The primitives whose rules take one; any other is a primitive without a rule.
TAKES_HADAMARD = frozenset(
    [
        "reduce_sum", "mul", "div", "add", "sub", "neg", "convert_element_type",
        *_compat.JIT, *_compat.REMAT,
    ]
)  # fmt: skip


def is_adapted(x: Any) -> bool:
    """Whether a value of a replay is not an array."""
    return isinstance(x, LowRank | Hadamard)
