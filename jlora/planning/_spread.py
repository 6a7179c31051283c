"""How a mesh cuts every value of a program, and what devices send for it.

The rules are those by which XLA's partitioner acts on programs of this kind: a value is
cut as what it is made of; where a mesh axis cuts the batch and a parameter, the
parameter is gathered (FSDP); a sum along a cut dimension is one over devices. It is a
model of the partitioner, not the partitioner: see `Plan.compiled` for that one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jlora import _compat
from jlora.planning._costs import Costs
from jlora.planning._flat import Operation, Program
from jlora.planning._values import Sizes, Spec, Value, value

#: A name for a dimension within one operation.
Label = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Did:
    """An operation of a device, as the account of memory needs it.

    Attributes:
      name: the primitive's, or "gather" of a parameter from the devices.
      reads: what it reads.
      writes: what it makes.
      inner: bytes that it needs while it runs, of a loop.
      moved: bytes of memory traffic within, of a loop.
    """

    name: str
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]
    inner: int = 0
    moved: float = 0.0


class Spread:
    """A program's values on a mesh, operation by operation.

    Attributes:
      sizes: the mesh.
      costs: what was met so far.
      did: what a device does.
    """

    def __init__(
        self, sizes: Sizes, rule_of: Callable[[str], Any], inner: Callable[..., Any]
    ) -> None:
        self.sizes = sizes
        self.costs = Costs()
        self.did: list[Did] = []
        self.inner = inner
        self._rule_of = rule_of
        self._gathered: dict[tuple[int, Spec], Value] = {}
        self._kept: list[Value] = []  # or an id could be taken again

    def run(self, program: Program, inputs: Sequence[Value]) -> list[Value]:
        """Return the outputs' values."""
        env: dict[Any, Value] = dict(zip(program.inputs, inputs, strict=True))
        for operation in program.operations:
            values = [self._read(env, v) for v in operation.operands]
            for variable, made in zip(
                operation.results, self._results(operation, values), strict=True
            ):
                env[variable] = made
        return [self._read(env, v) for v in program.outputs]

    def _read(self, env: dict[Any, Value], atom: Any) -> Value:
        is_literal = isinstance(atom, _compat.Literal)
        if not is_literal and atom in env:
            return env[atom]
        aval = atom.aval
        whole = self.value(aval.shape, aval.dtype, ((),) * len(aval.shape))
        whole.what, whole.is_same = "constant", not aval.shape
        if not is_literal:
            env[atom] = whole
        return whole

    def _results(self, operation: Operation, values: list[Value]) -> Sequence[Value]:
        made: Sequence[Value] = self._rule_of(operation.name)(self, operation, values)
        return made

    # -- for rules ---------------------------------------------------------------------

    def value(self, shape: Sequence[int], dtype: Any, spec: Spec) -> Value:
        """Return a value on this mesh."""
        return value(shape, dtype, spec, self.sizes)

    def devices(self, axes: Sequence[str]) -> int:
        """Return over how many devices some axes go."""
        return math.prod(self.sizes[axis] for axis in axes)

    def make(
        self,
        operation: Operation,
        reads: Sequence[Value],
        specs: Sequence[Spec],
        **more: Any,
    ) -> list[Value]:
        """Return an operation's results, cut so, and note what was done."""
        is_data = any(x.is_data for x in reads)
        writes = []
        for variable, spec in zip(operation.results, specs, strict=True):
            made = self.value(variable.aval.shape, variable.aval.dtype, spec)
            made.is_data, made.what = is_data, operation.name
            made.is_same = all(x.is_same for x in reads)
            writes.append(made)
        self.did.append(Did(operation.name, tuple(reads), tuple(writes), **more))
        return writes

    def make_as(self, x: Value, spec: Spec) -> None:
        """Have each device make its part of a value that is of one number."""
        if x.is_same:
            part = self.value(x.shape, np.uint8, spec).bytes
            x.spec, x.bytes = spec, int(part * x.itemsize)

    def gathered(self, x: Value, spec: Spec) -> Value:
        """Return a value that is cut over fewer mesh axes; once for all who ask."""
        spec = tuple(
            tuple(a for a in axes if a in keep)
            for axes, keep in zip(x.spec, spec, strict=True)
        )
        if spec == x.spec:
            return x
        key = (id(x), spec)
        if key not in self._gathered:
            axes = {a for axes in x.spec for a in axes}
            axes -= {a for axes in spec for a in axes}
            whole = dataclasses.replace(x, spec=spec, what="gathered")
            whole.bytes = x.bytes * self.devices([*axes])
            n = self.devices([*axes])
            self.costs.communicate("all-gather", [*axes], n, whole.bytes)
            self.did.append(Did("all-gather", (x,), (whole,)))
            self._gathered[key] = whole
            self._kept.append(x)
        return self._gathered[key]

    def summed(self, x: Value, axes: Sequence[str]) -> Value:
        """Return a value that devices have parts of a sum of."""
        if axes:
            n = self.devices(axes)
            self.costs.communicate("all-reduce", axes, n, x.bytes)
        return x

    def count(self, operation: Operation, flops: float) -> None:
        """Note operations of a product, in its first operand's dtype."""
        dtype = np.dtype(operation.eqn.invars[0].aval.dtype).name
        self.costs.flops[dtype] += flops  # type: ignore[assignment]

    def exchanged(self, x: Value, axes: Sequence[str]) -> None:
        """Note that each device gets its part of a value from others."""
        if axes:
            self.costs.communicate("all-to-all", axes, self.devices(axes), x.bytes)

    def agree(
        self, values: Sequence[Value], labels: Sequence[Sequence[Label]]
    ) -> tuple[list[Value], dict[Label, tuple[str, ...]]]:
        """Find how each label's dimension is cut, where several values meet.

        What depends on the batch is asked first, then what is largest. The others are
        gathered where a mesh axis cuts another dimension of theirs; that they are not
        cut where the result is costs nothing.
        """
        order = sorted(
            range(len(values)), key=lambda n: (not values[n].is_data, -values[n].bytes)
        )
        cut: dict[Label, list[str]] = {}
        where: dict[str, Label] = {}
        met = list(values)
        for n in order:
            spec = []
            for label, axes in zip(labels[n], values[n].spec, strict=True):
                kept = [a for a in axes if where.setdefault(a, label) == label]
                cut.setdefault(label, [])
                cut[label] += [a for a in kept if a not in cut[label]]
                spec.append(tuple(kept))
            met[n] = self.gathered(values[n], tuple(spec))
        for v, own in zip(values, labels, strict=True):
            self.make_as(v, tuple(tuple(cut[label]) for label in own))
        return met, {label: tuple(axes) for label, axes in cut.items()}
