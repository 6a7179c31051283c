"""A jaxpr on its way through a replay: values, lifetimes, and what runs as one."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

from jlora import _compat
from jlora._compat import Eqn
from jlora._transform._rules.hadamard import is_adapted
from jlora._transform.facts import Facts
from jlora._transform.masks import Uses
from jlora._transform.tokens import Marks, Tokens

OFTEN = 4  # layers that are not scanned repeat their operations


class Program:
    """A jaxpr that is being replayed.

    Attributes:
      eqns: its equations, those left out whose results nobody reads.
      env: the values of its variables, as far as they are known and still needed.
      shared: what rules keep for later equations.
      uses: how often each kernel was used.
      facts: what its text says of its values.
      tokens: where tokens are in its values, if that was said of its operands.
      current: the equation that is being replayed.
    """

    def __init__(
        self, jaxpr: Any, env: dict[Any, Any], marks: Sequence[Marks] | None = None
    ) -> None:
        self.env = env
        self.tokens = Tokens(jaxpr, marks) if marks and any(marks) else None
        self.current: Eqn = None
        self.shared: dict[Any, Any] = {}
        self.uses = Uses()
        self.eqns, self._last_read = needed(jaxpr)
        self._outvars = jaxpr.outvars
        self.facts = Facts(jaxpr)
        self._operations = _repeated(self.eqns)
        self._products: dict[Any, list[Eqn]] | None = None

    def read(self, atom: Any) -> Any:
        """The value of a variable or a literal."""
        return atom.val if isinstance(atom, _compat.Literal) else self.env[atom]

    def results(self) -> list[Any]:
        """What the program returns."""
        return [self.read(v) for v in self._outvars]

    def keep(self, eqns: Sequence[Eqn], variables: Sequence[Any], values: Any) -> None:
        """Note results, and forget what those equations were the last to read."""
        self.env.update(zip(variables, values, strict=True))
        for eqn in eqns:
            for var in self._last_read.get(id(eqn), ()):
                self.env.pop(var, None)  # free early: an eager run holds real arrays

    def rebind(self, eqn: Eqn, args: Sequence[Any]) -> list[Any]:
        """Run an equation as it stands on other operands."""
        operation = self._operations.get(id(eqn))
        if operation is None:
            return _compat.rebind(eqn, args)
        places = tuple(range(len(args)))
        return _compat.inlined(((operation, places),), (len(args),))(*args)

    def fusible(self, start: int) -> list[Eqn]:
        """Equations from `start` on that may run as one: of one module, all repeated.

        And none with a low-rank operand.
        """
        found: list[Eqn] = []
        for number in range(start, len(self.eqns)):
            eqn = self.eqns[number]
            alike = not found or _compat.same_context(found[0], eqn)
            if not alike or id(eqn) not in self._operations or self._is_adapted(eqn):
                break
            found.append(eqn)
        return found

    def run_fused(self, eqns: Sequence[Eqn]) -> None:
        """Run equations as one function, whose derivative is found once for all."""
        made = {eqn.outvars[0] for eqn in eqns}
        read = {v for eqn in eqns for v in self._last_read.get(id(eqn), ())}
        operands = {
            id(v): v
            for eqn in eqns
            for v in eqn.invars
            if isinstance(v, _compat.Literal) or v not in made
        }
        results = [v for v in (e.outvars[0] for e in eqns) if v not in read]
        number = {key: n for n, key in enumerate(operands)}
        for eqn in eqns:
            number[id(eqn.outvars[0])] = len(number)
        steps = tuple(
            (self._operations[id(eqn)], tuple(number[id(v)] for v in eqn.invars))
            for eqn in eqns
        )
        f = _compat.inlined(steps, tuple(number[id(v)] for v in results))
        self.keep(eqns, results, f(*map(self.read, operands.values())))

    def products(self) -> dict[Any, list[Eqn]]:
        """The products by their left operand's variable."""
        if self._products is None:
            self._products = {}
            for eqn in self.eqns:
                is_product = eqn.primitive.name == "dot_general"
                known = not any(isinstance(v, _compat.Literal) for v in eqn.invars)
                if is_product and known:
                    self._products.setdefault(eqn.invars[0], []).append(eqn)
        return self._products

    def _is_adapted(self, eqn: Eqn) -> bool:
        return any(
            not isinstance(v, _compat.Literal) and is_adapted(self.env.get(v))
            for v in eqn.invars
        )


def needed(jaxpr: Any) -> tuple[list[Eqn], dict[int, list[Any]]]:
    """The equations whose results are read, and what each is the last to read."""
    needed = {v for v in jaxpr.outvars if not isinstance(v, _compat.Literal)}
    last_read: dict[int, list[Any]] = {}
    live = []
    for eqn in reversed(jaxpr.eqns):
        if not eqn.effects and not any(v in needed for v in eqn.outvars):
            continue
        live.append(eqn)
        for var in eqn.invars:
            if not isinstance(var, _compat.Literal) and var not in needed:
                needed.add(var)
                last_read.setdefault(id(eqn), []).append(var)
    return live[::-1], last_read


def _repeated(eqns: Sequence[Eqn]) -> dict[int, Any]:
    """The operations of equations of which there are many alike."""
    operations = {id(eqn): _hashed(eqn) for eqn in eqns}
    count = collections.Counter(operations.values())
    return {
        key: operation
        for key, operation in operations.items()
        if operation is not None and count[operation] >= OFTEN
    }


def _hashed(eqn: Eqn) -> Any:
    """What is one operation, or None where that cannot be told."""
    operation = _compat.operation(eqn)
    try:
        hash(operation)
    except TypeError:
        return None
    return operation
