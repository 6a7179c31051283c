"""A program's costs and its peak of memory on one device of a mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jlora.planning._alive import Alive, alive
from jlora.planning._costs import Costs
from jlora.planning._flat import flat
from jlora.planning._rules import rule_of
from jlora.planning._spread import Spread
from jlora.planning._values import Sizes, Value


@dataclasses.dataclass(frozen=True)
class Account:
    """What a program costs a device.

    Attributes:
      outputs: its results.
      costs: operations and traffic.
      memory: what is in memory at once.
    """

    outputs: tuple[Value, ...]
    costs: Costs
    memory: Alive

    @property
    def peak(self) -> int:
        """Bytes beside the operands."""
        return self.memory.peak


def account(
    jaxpr: Any,
    inputs: Sequence[Value],
    sizes: Sizes,
    *,
    donated: int = 0,
) -> Account:
    """Read a jaxpr; nothing is computed.

    Args:
      jaxpr: the program.
      inputs: its operands, cut over the mesh.
      sizes: the mesh.
      donated: how many of the first operands are the first results' memory too.
    """
    program = flat(jaxpr)
    walk = Spread(sizes, rule_of, _turn)
    outputs = walk.run(program, inputs)
    over = outputs[:donated]
    found = alive(walk.did, inputs, outputs, in_place=over)
    walk.costs.moved += found.moved
    return Account(tuple(outputs), walk.costs, found)


def _turn(jaxpr: Any, inputs: Sequence[Value], sizes: Sizes, carried: int) -> Account:
    """One turn of a loop, which writes over its carry and into stacks."""
    program = flat(jaxpr)
    walk = Spread(sizes, rule_of, _turn)
    outputs = walk.run(program, inputs)
    found = alive(walk.did, inputs, outputs, in_place=outputs[carried:])
    walk.costs.moved += found.moved
    return Account(tuple(outputs), walk.costs, found)
