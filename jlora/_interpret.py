"""The replay loop: run a jaxpr with low-rank values in the place of kernels.

Equations without a low-rank operand run as they stand. The others go to their
primitive's rule. Only this loop decides what happens where no rule answers.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import warnings
from collections.abc import Sequence
from typing import Any, Literal

from jlora import _compat
from jlora._compat import Eqn, Jaxpr
from jlora._errors import JloraWarning, UnsupportedOpError
from jlora._lowrank import LowRank
from jlora._rules import RULES

OFTEN = 4  # layers that are not scanned repeat their operations

OnMissing = Literal["error", "materialize"]


@dataclasses.dataclass(frozen=True)
class Replay:
    """A replay's settings; equal settings share compiled inner functions.

    Attributes:
      on_missing: what to do where a primitive has no rule.
    """

    on_missing: OnMissing = "error"
    _uses: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter, compare=False, repr=False
    )
    _programs: _Programs = dataclasses.field(
        default_factory=lambda: _Programs(), compare=False, repr=False
    )

    def use_number(self, path: str) -> int:
        """How often this leaf has been used so far in this replay."""
        self._uses[path] += 1
        return self._uses[path]

    def products_of(self, eqn: Eqn) -> list[tuple[Eqn, Any]]:
        """The products with the same left operand, and their right ones if known."""
        program = self._programs.running[-1]
        products = program.products().get(eqn.invars[0], [])
        return [(e, program.env.get(e.invars[1])) for e in products]

    def shared(self) -> dict[Any, Any]:
        """What rules keep for later equations of the program that is running."""
        return self._programs.running[-1].shared

    def rebind(self, eqn: Eqn, args: Sequence[Any]) -> list[Any]:
        """Run an equation of the running program as it stands on other operands."""
        often = self._programs.running[-1].has_often(eqn)
        return _compat.rebind(eqn, args, often=often)

    def replay(self, jaxpr: Jaxpr, args: Sequence[Any]) -> list[Any]:
        """Run a jaxpr; operands and results may be low-rank."""
        bare, consts = _compat.open_jaxpr(jaxpr)
        env: dict[Any, Any] = {}
        env.update(zip(bare.constvars, consts, strict=True))
        env.update(zip(bare.invars, args, strict=True))
        self._programs.running.append(_Program(bare, env))
        try:
            return self._run(bare, env)
        finally:
            self._programs.running.pop()

    def _run(self, bare: Any, env: dict[Any, Any]) -> list[Any]:
        last_use, live = _lifetimes(bare)

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, _compat.Literal) else env[atom]

        for number, eqn in enumerate(bare.eqns):
            if not live[number]:
                continue
            operands = [read(v) for v in eqn.invars]
            with _compat.eqn_context(eqn):
                results = self._step(eqn, operands)
            env.update(zip(eqn.outvars, results, strict=True))
            for var in last_use.get(number, ()):
                env.pop(var, None)  # free early: an eager run holds real arrays
        return [read(v) for v in bare.outvars]

    def _step(self, eqn: Eqn, operands: list[Any]) -> list[Any]:
        if not any(isinstance(x, LowRank) for x in operands):
            return self.rebind(eqn, operands)
        rule = RULES.get(eqn.primitive.name)
        results = NotImplemented if rule is None else rule(self, eqn, operands)
        if results is not NotImplemented:
            return list(results)
        return self._without_rule(eqn, operands)

    def _without_rule(self, eqn: Eqn, operands: list[Any]) -> list[Any]:
        nodes = [x for x in operands if isinstance(x, LowRank)]
        if self.on_missing == "error":
            raise UnsupportedOpError(_no_rule_message(eqn, nodes))
        for node in nodes:
            _say_once(node.path, eqn.primitive.name)
        dense = [x.merged() if isinstance(x, LowRank) else x for x in operands]
        return self.rebind(eqn, dense)


@dataclasses.dataclass
class _Program:
    """A jaxpr that is being replayed.

    Attributes:
      bare: its equations.
      env: the values of its variables, as far as they are known and still needed.
      shared: what rules keep for later equations.
    """

    bare: Any
    env: dict[Any, Any]
    shared: dict[Any, Any] = dataclasses.field(default_factory=dict)
    _products: dict[Any, list[Eqn]] | None = None
    _operations: collections.Counter[Any] | None = None

    def has_often(self, eqn: Eqn) -> bool:
        """Whether keeping what such equations have in common pays."""
        if self._operations is None:
            self._operations = collections.Counter(map(_hashed, self.bare.eqns))
        operation = _hashed(eqn)
        return operation is not None and self._operations[operation] >= OFTEN

    def products(self) -> dict[Any, list[Eqn]]:
        """The products by their left operand's variable."""
        if self._products is None:
            self._products = {}
            for eqn in self.bare.eqns:
                is_product = eqn.primitive.name == "dot_general"
                known = not any(isinstance(v, _compat.Literal) for v in eqn.invars)
                if is_product and known:
                    self._products.setdefault(eqn.invars[0], []).append(eqn)
        return self._products


def _hashed(eqn: Eqn) -> Any:
    """What is one operation, or None where that cannot be told."""
    operation = _compat.operation(eqn)
    try:
        hash(operation)
    except TypeError:
        return None
    return operation


class _Programs(threading.local):
    """The programs that a thread is replaying, the innermost last."""

    def __init__(self) -> None:
        self.running: list[_Program] = []


def _lifetimes(bare: Any) -> tuple[dict[int, list[Any]], list[bool]]:
    """For each equation, the variables it is the last to read; and which are needed."""
    needed = {v for v in bare.outvars if not isinstance(v, _compat.Literal)}
    last_use: dict[int, list[Any]] = {}
    live = [False] * len(bare.eqns)
    for number in range(len(bare.eqns) - 1, -1, -1):
        eqn = bare.eqns[number]
        live[number] = bool(eqn.effects) or any(v in needed for v in eqn.outvars)
        if not live[number]:
            continue
        for var in eqn.invars:
            if not isinstance(var, _compat.Literal) and var not in needed:
                needed.add(var)
                last_use.setdefault(number, []).append(var)
    return last_use, live


def _no_rule_message(eqn: Eqn, nodes: list[LowRank]) -> str:
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
