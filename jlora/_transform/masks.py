"""Which dropout mask each use of an adapter draws: no two the same.

A use draws its mask from the adapter's key and its number among the uses in its
program. An inner program (a jitted block, a loop's body) is traced once for many calls,
so it counts from one, and is handed keys of its own: those of its caller, folded with
the call's number, and with the iteration's where it is a loop's body. A mask follows
from the keys and the program alone, not from what was traced before.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import Array
from jlora._kernel.nodes import LowRank

# Where the layers of a scanned stack enter a body with keys of their own, these stay as
# they are: a layer then draws what it would outside of a stack. Later uses in the
# caller's program count from here on.
_AFTER_A_STACK = 1 << 20


class Uses:
    """How often each kernel was used in one program, by its path."""

    def __init__(self) -> None:
        self._count: collections.Counter[str] = collections.Counter()

    def number(self, path: str) -> int:
        """The number of one more use of a kernel."""
        parts = path.split(" + ")  # of kernels side by side
        number = 1 + max(self._count[part] for part in parts)
        for part in parts:
            self._count[part] = number
        return number

    def enter(self, args: Sequence[Any], stacks: Sequence[Any] = ()) -> list[Any]:
        """Operands of an inner program: the keys of low-rank ones for that call.

        Args:
          args: the operands.
          stacks: those of them that a scan takes apart along their first dimension.
        """
        return [self._entered(x, any(x is s for s in stacks)) for x in args]

    def _entered(self, x: Any, is_stack: bool) -> Any:
        if not has_masks(x):
            return x
        number = self.number(x.path)
        if number == 1 and is_stack and all(0 in t.s_dims for t in _masked(x)):
            for part in x.path.split(" + "):
                self._count[part] = _AFTER_A_STACK
            return x
        return fold(x, number)


def fold(x: Any, number: Any) -> Any:
    """An operand whose keys, if any, are folded with a number; others as they are."""
    if not has_masks(x):
        return x
    return _with_keys(x, lambda t: _fold(t.key, number))


def restore(x: Any, before: Any) -> Any:
    """An operand with the keys that it had before."""
    if not (has_masks(x) and has_masks(before)):
        return x
    keys = {name: t.key for name, t in before.adapters.items()}
    if keys.keys() != x.adapters.keys():
        return x
    adapters = {n: dataclasses.replace(t, key=keys[n]) for n, t in x.adapters.items()}
    return dataclasses.replace(x, adapters=adapters)


def has_masks(x: Any) -> bool:
    """Whether an operand is low-rank, with dropout on."""
    return isinstance(x, LowRank) and any(True for _ in _masked(x))


def _masked(w: LowRank) -> Any:
    return (t for t in w.adapters.values() if t.key is not None and t.dropout)


def _with_keys(w: LowRank, key_of: Any) -> LowRank:
    def one(t: Adapter) -> Adapter:
        return t if t.key is None else dataclasses.replace(t, key=key_of(t))

    return w.map(w.base, one)


def _fold(keys: Array, number: Any) -> Array:
    if not keys.shape:
        return jax.random.fold_in(keys, number)
    one = lambda key: jax.random.fold_in(key, number)  # noqa: E731
    return jax.vmap(one)(keys.reshape(-1)).reshape(keys.shape)
