"""The table of rules, and what a rule may ask of the replay that calls it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from jlora import _compat
from jlora._compat import Eqn, Jaxpr
from jlora._transform.facts import Facts


class Run(Protocol):
    """The replay, as rules see it."""

    @property
    def on_missing(self) -> str:
        """`"error"` or `"materialize"`."""

    def __hash__(self) -> int: ...  # replays with equal settings share compilations

    def replay(self, jaxpr: Jaxpr, args: Sequence[Any], marks: Any = None) -> list[Any]:
        """Run an inner jaxpr on operands of which some may be low-rank."""

    def marks_of(self, body: Jaxpr) -> tuple[Any, ...] | None:
        """Where tokens are in the operands of a program of the running equation."""

    def token_axis(self, number: int, w: Any) -> tuple[int, int]:
        """The axis of the tokens in an operand, and the number of the first of them."""

    def rebind(self, eqn: Eqn, args: Sequence[Any]) -> list[Any]:
        """Run an equation of the running program as it stands on other operands."""

    def use_number(self, path: str) -> int:
        """The number of this use of a leaf in its program; a mask for each."""

    def enter(self, args: Sequence[Any], stacks: Sequence[Any] = ()) -> list[Any]:
        """Operands for an inner program, with keys for masks of their own."""

    def products_of(self, eqn: Eqn) -> list[tuple[Eqn, Any]]:
        """The products with the same left operand, and their right ones if known."""

    def facts(self) -> Facts:
        """What the text of the running program says of its values."""

    def shared(self) -> dict[Any, Any]:
        """What rules keep for later equations of the program that is running."""


Rule = Callable[[Run, Eqn, list[Any]], Any]

RULES: dict[str, Rule] = {}

# The primitives whose rules know banks; before others the adapter that acts is picked.
TAKES_BANK = frozenset(
    [
        "dot_general", "gather", "transpose", "convert_element_type", "squeeze",
        "slice", "split", "dynamic_slice", "copy", "copy_p", "name", "stop_gradient",
        "optimization_barrier", "scan", "while", "cond", "closed_call", "core_call",
        "call", *_compat.JIT, *_compat.REMAT, *_compat.PVARY,
    ]
)  # fmt: skip


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a rule under the names of its primitive; an entry is never replaced."""

    def enter(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise KeyError(f"two rules for the primitive {name!r}")
            RULES[name] = function
        return function

    return enter
