"""Which results of a program are operands as they came in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jlora import _compat
from jlora._compat import Eqn, Jaxpr

# For each result, the number of the operand that it is, or None.
Forwards = Sequence[int | None]


def forwarded(jaxpr: Jaxpr) -> Forwards:
    """What a program only hands on, through its inner programs too."""
    bare, _ = _compat.open_jaxpr(jaxpr)
    number: dict[Any, int] = {var: n for n, var in enumerate(bare.invars)}
    for eqn in bare.eqns:
        known = [
            None if isinstance(v, _compat.Literal) else number.get(v)
            for v in eqn.invars
        ]
        if any(n is not None for n in known):
            for var, n in zip(eqn.outvars, _through(eqn), strict=True):
                operand = None if n is None else known[n]
                if operand is not None:
                    number[var] = operand
    return [
        None if isinstance(v, _compat.Literal) else number.get(v) for v in bare.outvars
    ]


def _through(eqn: Eqn) -> Forwards:
    """What one equation hands on."""
    name = eqn.primitive.name
    if name in _compat.JIT:
        parts = _compat.jit_parts(eqn)
        return _unless(any(parts.out_shardings), eqn, forwarded(parts.body))
    if name in _compat.REMAT:
        return forwarded(_compat.remat_parts(eqn).body)
    if name == "cond":
        branches = [forwarded(body) for body in _compat.cond_branches(eqn)]
        agreed = [
            ns[0] if len({*ns}) == 1 else None for ns in zip(*branches, strict=True)
        ]
        return [None if n is None else n + 1 for n in agreed]
    if name == "scan":
        scan = _compat.scan_parts(eqn)
        first, count = scan.num_consts, scan.num_carry
        kept = _kept(forwarded(scan.body)[:count], first, first)
        return [*kept, *[None] * (len(eqn.outvars) - count)]
    if name == "while":
        loop = _compat.while_parts(eqn)
        first = loop.num_body_consts
        return _kept(forwarded(loop.body), first, first + loop.num_cond_consts)
    if name in ("optimization_barrier", "copy", "copy_p"):
        return range(len(eqn.outvars))
    return [None] * len(eqn.outvars)


def _unless(changed: bool, eqn: Eqn, found: Forwards) -> Forwards:
    return [None] * len(eqn.outvars) if changed else found


def _kept(out: Forwards, first: int, first_outside: int) -> Forwards:
    """What a loop carries without change, by its number among the loop's operands."""
    return [first_outside + k if n == first + k else None for k, n in enumerate(out)]
