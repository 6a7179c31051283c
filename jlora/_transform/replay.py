"""The replay loop: run a jaxpr with low-rank values in the place of kernels.

Equations without a low-rank operand run as they stand. The others go to their
primitive's rule. Only this loop decides what happens where no rule answers.
"""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Sequence
from typing import Any, Literal

from jlora import _compat
from jlora._compat import Eqn, Jaxpr
from jlora._errors import JloraWarning, UnsupportedOpError
from jlora._kernel.bank import by_token, has_bank, picked
from jlora._kernel.nodes import LowRank
from jlora._kernel.quantized import Quantized
from jlora._transform._rules import RULES, TAKES_BANK, quantised
from jlora._transform._rules._terms import (
    KEEPS_SHARED,
    is_scaled_later,
    scaled_now,
    spanning,
)
from jlora._transform._rules.hadamard import TAKES_HADAMARD, Hadamard, is_adapted
from jlora._transform.facts import Facts
from jlora._transform.program import Program
from jlora._transform.tokens import NONE, Marks

OnMissing = Literal["error", "materialize"]


@dataclasses.dataclass(frozen=True)
class Replay:
    """A replay's settings; equal settings share compiled inner functions.

    Attributes:
      on_missing: what to do where a primitive has no rule.
    """

    on_missing: OnMissing = "error"
    _programs: _Programs = dataclasses.field(
        default_factory=lambda: _Programs(), compare=False, repr=False
    )

    def use_number(self, path: str) -> int:
        """The number of this use of a leaf in the running program."""
        return self._programs.running[-1].uses.number(path)

    def enter(self, args: Sequence[Any], stacks: Sequence[Any] = ()) -> list[Any]:
        """Operands for an inner program, with keys for masks of their own."""
        return self._programs.running[-1].uses.enter(args, stacks)

    def products_of(self, eqn: Eqn) -> list[tuple[Eqn, Any]]:
        """The products with the same left operand, and their right ones if known."""
        program = self._programs.running[-1]
        products = program.products().get(eqn.invars[0], [])
        return [(e, program.env.get(e.invars[1])) for e in products]

    def facts(self) -> Facts:
        """What the text of the running program says of its values."""
        return self._programs.running[-1].facts

    def shared(self) -> dict[Any, Any]:
        """What rules keep for later equations of the program that is running."""
        return self._programs.running[-1].shared

    def rebind(self, eqn: Eqn, args: Sequence[Any]) -> list[Any]:
        """Run an equation of the running program as it stands on other operands."""
        if any(isinstance(x, Quantized) for x in args):
            return quantised.rebind(eqn, args)
        return self._programs.running[-1].rebind(eqn, args)

    def marks_of(self, body: Jaxpr) -> tuple[Marks, ...] | None:
        """Where tokens are in the operands of a program of the running equation."""
        program = self._programs.running[-1] if self._programs.running else None
        if program is None or program.tokens is None:
            return None
        return program.tokens.inside(program.current, body)

    def token_axis(self, number: int, w: LowRank) -> tuple[int, int]:
        """The axis of the tokens in an operand, and the number of the first of them.

        Raises:
          UnsupportedOpError: it is not known.
        """
        program = self._programs.running[-1]
        eqn = program.current
        found = program.tokens.of(eqn.invars[number]) if program.tokens else NONE
        if len(found) != 1:
            raise UnsupportedOpError(_no_tokens_message(eqn, w, len(found)))
        ((axis, first),) = found
        return axis, first

    def replay(
        self, jaxpr: Jaxpr, args: Sequence[Any], marks: Sequence[Marks] | None = None
    ) -> list[Any]:
        """Run a jaxpr; operands and results may be low-rank.

        Args:
          jaxpr: a program; without `marks` one inside of the running equation.
          args: its operands.
          marks: where tokens are in them.
        """
        marks = self.marks_of(jaxpr) if marks is None else marks
        bare, consts = _compat.open_jaxpr(jaxpr)
        env: dict[Any, Any] = {}
        env.update(zip(bare.constvars, consts, strict=True))
        env.update(zip(bare.invars, args, strict=True))
        self._programs.running.append(Program(bare, env, marks))
        try:
            return self._run(self._programs.running[-1])
        finally:
            self._programs.running.pop()

    def returned(self, values: Sequence[Any]) -> list[Any]:
        """What a transformed function returns: arrays, or kernels as they came in.

        Raises:
          UnsupportedOpError: kernels multiplied entry by entry, and never summed.
        """
        for x in values:
            if isinstance(x, Hadamard) and self.on_missing == "error":
                raise UnsupportedOpError(
                    f"the function returns the entries of {x.path!r} {x.shape} times "
                    "each other, which have no low-rank form.\nReturn a sum of them, "
                    "or accept a dense kernel: "
                    "jlora.lora(fn, on_missing='materialize')."
                )
        dense = [x.merged() if isinstance(x, Hadamard) else x for x in values]
        return [scaled_now(quantised.returned(x)) for x in dense]

    def _run(self, program: Program) -> list[Any]:
        number = 0
        while number < len(program.eqns):
            eqn = program.eqns[number]
            fused = program.fusible(number)
            with _compat.eqn_context(eqn):
                if fused:
                    program.run_fused(fused)
                else:
                    operands = [program.read(v) for v in eqn.invars]
                    program.keep([eqn], eqn.outvars, self._step(eqn, operands))
            number += len(fused) or 1
        return program.results()

    def _step(self, eqn: Eqn, operands: list[Any]) -> list[Any]:
        operands = quantised.for_rule(eqn, operands)
        if not any(is_adapted(x) for x in operands):
            return self.rebind(eqn, operands)
        if eqn.primitive.name not in TAKES_BANK:
            operands = [_picked(eqn, x) if has_bank(x) else x for x in operands]
        self._programs.running[-1].current = eqn
        rule = RULES.get(eqn.primitive.name)
        if eqn.primitive.name not in KEEPS_SHARED:
            operands = [spanning(x) for x in operands]
        if any(isinstance(x, Hadamard) for x in operands):
            rule = rule if eqn.primitive.name in TAKES_HADAMARD else None
        results = NotImplemented if rule is None else rule(self, eqn, operands)
        if results is NotImplemented and any(map(is_scaled_later, operands)):
            return self._step(eqn, [scaled_now(x) for x in operands])
        if results is NotImplemented and any(map(quantised.is_quantised, operands)):
            return self._step(eqn, [quantised.with_dense_base(x) for x in operands])
        if results is not NotImplemented:
            return list(results)
        return self._without_rule(eqn, operands)

    def _without_rule(self, eqn: Eqn, operands: list[Any]) -> list[Any]:
        nodes = [x for x in operands if is_adapted(x)]
        if self.on_missing == "error":
            raise UnsupportedOpError(_no_rule_message(eqn, nodes))
        for node in nodes:
            _say_once(node.path, eqn.primitive.name)
        dense = [x.merged() if is_adapted(x) else x for x in operands]
        return self.rebind(eqn, dense)


def _picked(eqn: Eqn, w: LowRank) -> LowRank:
    if by_token(w):
        raise UnsupportedOpError(_no_tokens_message(eqn, w, 0))
    return picked(w)


def _no_tokens_message(eqn: Eqn, w: LowRank, count: int) -> str:
    source = _compat.source_of(eqn)
    known = "several axes are" if count > 1 else "no axis is known to be"
    return (
        f"the adapters of {w.path!r} {w.shape} act on some tokens only, and where the "
        f"kernel meets `{eqn.primitive.name}`{f' at {source}' if source else ''} "
        f"{known} that of the tokens: it is followed from the arguments of "
        "jlora.mixed (token_axes) until it is reduced, shuffled or merged with others."
        "\nLeave that kernel out of targets, or the operation out of the function."
    )


class _Programs(threading.local):
    """The programs that a thread is replaying, the innermost last."""

    def __init__(self) -> None:
        self.running: list[Program] = []


def _no_rule_message(eqn: Eqn, nodes: list[LowRank | Hadamard]) -> str:
    where = ", ".join(f"{n.path!r} {n.shape} {n.dtype}" for n in nodes)
    source = _compat.source_of(eqn)
    return (
        f"the adapted kernel {where} meets the primitive `{eqn.primitive.name}`"
        f"{f' at {source}' if source else ''}, which has no low-rank form that jlora "
        "knows.\nEither leave that leaf out of `targets` (or list it in `exclude`), or "
        "accept a dense kernel of the leaf's size at this one use: "
        "jlora.lora(fn, on_missing='materialize')."
    )


_said: set[tuple[str, str]] = set()


def _say_once(path: str, primitive: str) -> None:
    if (path, primitive) not in _said:
        _said.add((path, primitive))
        warnings.warn(
            f"the kernel {path!r} is merged with its adapter for `{primitive}`, which "
            "has no low-rank rule: a dense kernel is formed at each step.",
            JloraWarning,
            stacklevel=2,
        )
