"""Loops and branches: how their carries are cut, and what their turns cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jlora import _compat
from jlora.planning._flat import Operation, used_inputs
from jlora.planning._spread import Spread
from jlora.planning._values import Value


def scan(walk: Spread, op: Operation, values: list[Value]) -> Sequence[Value]:
    s = _compat.scan_parts(op.eqn)
    first = s.num_consts + s.num_carry
    consts, carry, xs = (
        values[: s.num_consts],
        values[s.num_consts : first],
        values[first:],
    )
    slices = [_a_slice(walk, x) for x in xs]
    carry, result = _settled(walk, s.body, consts, carry, slices)
    _begin(walk, values[s.num_consts : first], carry)
    walk.costs.add(result.costs, s.length)
    specs = [v.spec for v in carry]
    specs += [((), *v.spec) for v in result.outputs[s.num_carry :]]
    used = used_inputs(s.body)
    # Of differentiated programs a loop is handed zeros that its body leaves alone.
    reads = [v for v, is_used in zip(values, used, strict=True) if is_used]
    made = walk.make(
        op, reads, specs, inner=result.peak, moved=result.costs.moved * s.length
    )
    for one, v in zip(made, result.outputs, strict=True):
        one.is_data = v.is_data
    return made


def _a_slice(walk: Spread, x: Value) -> Value:
    """One of a stack along its first dimension, which is whole: else it is gathered."""
    x = walk.gathered(x, ((), *x.spec[1:]))
    part = Value(x.shape[1:], x.itemsize, x.spec[1:], x.bytes // max(1, x.shape[0]))
    part.is_data, part.what = x.is_data, "slice"
    return part


def _settled(
    walk: Spread, body: Any, consts: list[Value], carry: list[Value], xs: list[Value]
) -> tuple[list[Value], Any]:
    """A loop's carry, cut as the loop leaves it, and one turn of the loop."""
    result = walk.inner(body, [*consts, *carry, *xs], walk.sizes, len(carry))
    for _ in range(3):
        again = [
            _joined(walk, v, out) for v, out in zip(carry, result.outputs, strict=False)
        ]
        if [v.spec for v in again] == [v.spec for v in carry] and (
            [v.is_data for v in again] == [v.is_data for v in carry]
        ):
            break
        carry = again
        result = walk.inner(body, [*consts, *carry, *xs], walk.sizes, len(carry))
    return carry, result


def _begin(walk: Spread, given: list[Value], carry: list[Value]) -> None:
    """Sums that begin at zero are made as the loop has them."""
    for v, own in zip(given, carry, strict=True):
        walk.make_as(v, own.spec)


def _joined(walk: Spread, v: Value, out: Value) -> Value:
    """A carry that goes in one way and comes out another: cut as it comes out."""
    spec = out.spec if out.is_data or not any(v.spec) else v.spec
    same = walk.value(v.shape, np.dtype("uint8"), spec)
    return Value(
        v.shape, v.itemsize, spec, int(same.bytes * v.itemsize),
        v.is_data or out.is_data, v.what,
    )  # fmt: skip


def while_loop(walk: Spread, op: Operation, values: list[Value]) -> Sequence[Value]:
    """A loop whose turns nobody knows: one is counted, as the head's loss makes."""
    w = _compat.while_parts(op.eqn)
    middle = w.num_cond_consts + w.num_body_consts
    consts, carry = values[w.num_cond_consts : middle], values[middle:]
    carry, result = _settled(walk, w.body, consts, carry, [])
    _begin(walk, values[middle:], carry)
    walk.costs.add(result.costs)
    specs = [v.spec for v in carry]
    return walk.make(op, values, specs, inner=result.peak, moved=result.costs.moved)


def cond(walk: Spread, op: Operation, values: list[Value]) -> Sequence[Value]:
    """The costliest branch."""
    results = [walk.inner(body, values[1:], walk.sizes, len(op.results))
               for body in _compat.cond_branches(op.eqn)]  # fmt: skip
    most = max(results, key=lambda r: sum(r.costs.flops.values()))
    walk.costs.add(most.costs)
    specs = [v.spec for v in most.outputs]
    return walk.make(op, values, specs, inner=max(r.peak for r in results))
