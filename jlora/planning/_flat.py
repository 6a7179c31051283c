"""A jaxpr as one list of operations: calls of inner programs are put in their place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jlora import _compat

#: A variable of the flat program, or a literal.
Atom = Any

_CALLS = frozenset(
    [*_compat.JIT, *_compat.REMAT, *_compat.CUSTOM_RULE, "closed_call", "core_call",
     "call", "custom_vmap_call", "composite", "custom_lin"]
)  # fmt: skip


class Variable:
    """A variable, compared by identity."""

    __slots__ = ("aval",)

    def __init__(self, aval: Any) -> None:
        self.aval = aval


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """An equation between variables of the flat program.

    Attributes:
      eqn: as it stood in its jaxpr; for its parameters.
      operands: variables and literals.
      results: variables.
    """

    eqn: Any
    operands: tuple[Atom, ...]
    results: tuple[Variable, ...]

    @property
    def name(self) -> str:
        """The primitive's."""
        return str(self.eqn.primitive.name)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A flat program.

    Attributes:
      inputs: its variables.
      operations: those whose results are needed, in order.
      outputs: variables and literals.
    """

    inputs: tuple[Variable, ...]
    operations: tuple[Operation, ...]
    outputs: tuple[Atom, ...]


def flat(jaxpr: Any) -> Program:
    """Return a jaxpr without calls; loops and branches stay operations."""
    bare, _ = _compat.open_jaxpr(jaxpr)
    inputs = [Variable(v.aval) for v in bare.invars]
    found: list[Operation] = []
    outputs = _append(jaxpr, inputs, found)
    return Program(tuple(inputs), tuple(_needed(found, outputs)), tuple(outputs))


def used_inputs(jaxpr: Any) -> list[bool]:
    """Return which of a jaxpr's inputs its results depend on."""
    program = flat(jaxpr)
    atoms = [v for o in program.operations for v in o.operands] + [*program.outputs]
    used = {v for v in atoms if isinstance(v, Variable)}
    return [v in used for v in program.inputs]


def _append(jaxpr: Any, args: Sequence[Atom], found: list[Operation]) -> list[Atom]:
    """Append a jaxpr's operations on `args`; return its results."""
    bare, _ = _compat.open_jaxpr(jaxpr)
    env: dict[Any, Atom] = dict(zip(bare.invars, args, strict=True))
    env.update((v, Variable(v.aval)) for v in bare.constvars)
    for eqn in bare.eqns:
        operands = [_read(env, v) for v in eqn.invars]
        if eqn.primitive.name in _CALLS:
            env.update(
                zip(eqn.outvars, _append(_body(eqn), operands, found), strict=True)
            )
            continue
        results = tuple(Variable(v.aval) for v in eqn.outvars)
        env.update(zip(eqn.outvars, results, strict=True))
        if eqn.primitive.name == "optimization_barrier":  # or it would keep them all
            pairs = zip(operands, results, strict=True)
            found += [Operation(eqn, (one,), (other,)) for one, other in pairs]
            continue
        found.append(Operation(eqn, tuple(operands), results))
    return [_read(env, v) for v in bare.outvars]


def _read(env: Mapping[Any, Atom], v: Any) -> Atom:
    return v if isinstance(v, _compat.Literal) else env[v]


def _body(eqn: Any) -> Any:
    name = eqn.primitive.name
    if name in _compat.JIT:
        return _compat.jit_parts(eqn).body
    if name in _compat.REMAT:
        return _compat.remat_parts(eqn).body
    if name == "custom_vmap_call":
        return _compat.custom_vmap_parts(eqn).body
    return _compat.call_body(eqn)


def _needed(
    operations: Sequence[Operation], outputs: Sequence[Atom]
) -> list[Operation]:
    wanted = {v for v in outputs if isinstance(v, Variable)}
    kept = []
    for operation in reversed(operations):
        if operation.eqn.effects or wanted & {*operation.results}:
            kept.append(operation)
            wanted.update(v for v in operation.operands if isinstance(v, Variable))
    return kept[::-1]
