"""`jax.shard_map`: what each device computes of its own parts of arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jlora import _compat
from jlora.planning._flat import Operation, flat
from jlora.planning._spread import Did, Spread
from jlora.planning._values import Spec, Value, spec_of


def shard_map(walk: Spread, op: Operation, values: list[Value]) -> Sequence[Value]:
    """The body in its place, of parts cut by hand; other axes cut them as before."""
    parts = _compat.shard_map_parts(op.eqn)
    manual = {*parts.axis_names}
    if not manual <= {*walk.sizes}:
        return _elsewhere(walk, op, values)
    given = [_part(walk, v, _spec(said, len(v.shape), manual), manual)
             for v, said in zip(values, parts.in_specs, strict=True)]  # fmt: skip
    made = walk.run(flat(parts.body), given)
    return [
        _renamed(walk, v, out.aval.shape, _joined(v, said, manual))
        for v, out, said in zip(made, op.results, parts.out_specs, strict=True)
    ]


def sum_over_axes(walk: Spread, op: Operation, values: list[Value]) -> Sequence[Value]:
    """`lax.psum` and its like in such a body: one collective each."""
    axes = [a for a in op.eqn.params["axes"] if a in walk.sizes]
    made = walk.make(op, values, [v.spec for v in values])
    return [walk.summed(v, axes) for v in made]


def _elsewhere(walk: Spread, op: Operation, values: list[Value]) -> Sequence[Value]:
    """A program for a mesh, read on one device, which does what all devices do."""
    parts = _compat.shard_map_parts(op.eqn)
    sizes = parts.mesh.shape
    bare, _ = _compat.open_jaxpr(parts.body)
    given = [
        walk.value(v.aval.shape, v.aval.dtype, ((),) * len(v.aval.shape))
        for v in bare.invars
    ]
    result = walk.inner(parts.body, given, walk.sizes, 0)
    ways = math.prod(sizes[a] for a in parts.axis_names)
    walk.costs.add(result.costs, ways)
    specs = [((),) * len(v.aval.shape) for v in op.results]
    return walk.make(op, values, specs, inner=result.peak * ways)


def _spec(said: Any, ndim: int, manual: set[str]) -> Spec:
    """Over which manual axes each dimension is cut."""
    return tuple(tuple(a for a in axes if a in manual) for axes in spec_of(said, ndim))


def _part(walk: Spread, v: Value, spec: Spec, manual: set[str]) -> Value:
    """A device's part of an operand, as the body has it."""
    free = tuple(tuple(a for a in axes if a not in manual) for axes in v.spec)
    whole = tuple((*a, *b) for a, b in zip(spec, free, strict=True))
    walk.make_as(v, whole)
    met = walk.gathered(v, whole)  # what is cut by hand in another way is made whole
    shape = [-(-n // walk.devices(a)) for n, a in zip(v.shape, spec, strict=True)]
    return _renamed(walk, met, shape, free)


def _joined(v: Value, said: Any, manual: set[str]) -> Spec:
    """How what all devices' parts make together is cut."""
    spec = _spec(said, len(v.shape), manual)
    return tuple((*a, *b) for a, b in zip(spec, v.spec, strict=True))


def _renamed(walk: Spread, v: Value, shape: Sequence[int], spec: Spec) -> Value:
    """A device's bytes, called a part or the whole."""
    share = walk.value(shape, np.uint8, spec).bytes
    same = Value(
        tuple(shape), v.itemsize, spec, int(share * v.itemsize), v.is_data, v.what,
        v.is_same,
    )  # fmt: skip
    walk.did.append(Did("reshard", (v,), (same,)))
    return same
