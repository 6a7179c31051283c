"""Quantised bases: dense for one equation at a time, and again in its backward pass.

A product saves the codes for its backward pass and not the kernel that it made of
them. What moves a kernel's entries about, or casts them, waits for the product; a slice
of a stack is one of the codes. Every other operation gets the dense kernel.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding

from jlora import _compat
from jlora._compat import Eqn
from jlora._kernel.nodes import LowRank
from jlora._kernel.quantized import Quantized, dense

_WAITING = (
    "transpose", "reshape", "squeeze", "broadcast_in_dim", "rev",
    "convert_element_type", "slice",
)  # fmt: skip
_PRODUCTS = (
    "dot_general", "conv_general_dilated", "gather", "ragged_dot", "ragged_dot_general",
)  # fmt: skip
# Primitives whose rules do with a base what `rebind` does, or hand it on.
_KNOWN = frozenset(
    [
        *_compat.JIT, *_compat.REMAT, *_compat.PVARY, "closed_call", "core_call",
        "call", "cond", "while", "scan", "shard_map", *_PRODUCTS,
        "dynamic_slice", "copy", "copy_p", "name", "stop_gradient",
        "optimization_barrier", "sharding_constraint", "device_put", *_WAITING,
    ]
)  # fmt: skip


def is_quantised(x: Any) -> bool:
    """Whether an operand is low-rank with a quantised base."""
    return isinstance(x, LowRank) and isinstance(x.base, Quantized)


def for_rule(eqn: Eqn, operands: list[Any]) -> list[Any]:
    """The operands as the equation's rule can take them."""
    if not any(map(is_quantised, operands)):
        return operands
    name = eqn.primitive.name
    if name not in _KNOWN or (
        name == "dot_general" and all(isinstance(x, LowRank) for x in operands)
    ):
        return [with_dense_base(x) for x in operands]
    if name in _PRODUCTS:  # rules are for adapters
        return [x.base if _is_bare(x) else x for x in operands]
    if name == "scan":
        parts = _compat.scan_parts(eqn)
        first = parts.num_consts + parts.num_carry
        xs = [x if _is_sliceable(x) else with_dense_base(x) for x in operands[first:]]
        return [*operands[:first], *xs]
    return operands


def with_dense_base(x: Any) -> Any:
    """An operand without codes; without adapters too it is an array."""
    if not is_quantised(x):
        return x
    base = x.base.dense()
    return dataclasses.replace(x, base=base) if x.adapters else base


def returned(x: Any) -> Any:
    """A result as trees hold it: nothing waits, and no adapters are no node."""
    if not is_quantised(x):
        return x
    if x.base.layout.then:
        return with_dense_base(x)
    return x if x.adapters else x.base


def _is_bare(x: Any) -> bool:
    return is_quantised(x) and not x.adapters


def _is_sliceable(x: Any) -> bool:
    return not is_quantised(x) or x.base.is_sliceable


def rebind(eqn: Eqn, args: Sequence[Any]) -> list[Any]:
    """Run an equation on other operands, of which some may be quantised kernels."""
    if not any(isinstance(x, Quantized) for x in args):
        return _compat.rebind(eqn, args)
    q, *others = args
    if isinstance(q, Quantized) and (of_stack := _on_stack(eqn, q, others)) is not None:
        return [of_stack]
    operation = _hashable(_compat.operation(eqn))
    if operation is None:
        f = jax.checkpoint(lambda *xs: _compat.rebind(eqn, [*map(dense, xs)]))
        return f(*args)
    if eqn.primitive.name in _WAITING and not others:
        return [_waiting(eqn, q, operation)]
    return [_dense_for_once(operation)(*args)]


def _hashable(operation: Any) -> Any:
    try:
        hash(operation)
    except TypeError:
        return None
    return operation


def _waiting(eqn: Eqn, q: Quantized, operation: Any) -> Quantized:
    """The kernel with an operation that is done once it is dense."""
    aval = eqn.outvars[0].aval
    moved = () if eqn.primitive.name == "convert_element_type" else tuple(aval.shape)
    then = (*q.layout.then, (*operation, moved, aval.dtype))
    return dataclasses.replace(q, layout=dataclasses.replace(q.layout, then=then))


@functools.lru_cache(maxsize=1024)
def _dense_for_once(operation: Any) -> Any:
    """An operation on dense kernels that are not kept for its backward pass.

    JAX keeps what it traced of one function for equal shapes, so there is one.
    """
    primitive, params = operation

    def run(*xs: Any) -> Any:
        # XLA would make the dense kernels of a loop once, before it, and keep them all:
        # so the codes come as late as what they are multiplied with.
        xs = lax.optimization_barrier(xs)
        return primitive.bind(*map(dense, xs), **dict(params))

    return jax.checkpoint(run)


def _on_stack(eqn: Eqn, q: Quantized, starts: Sequence[Any]) -> Quantized | None:
    """What an equation makes of a stack, if it acts on the stack's dimensions alone."""
    if not q.is_sliceable:
        return None
    name, p, n = eqn.primitive.name, eqn.params, len(q.batch)
    if name == "squeeze" and all(d % q.ndim < n for d in p["dimensions"]):
        gone = [d % q.ndim for d in p["dimensions"]]
        return q.map(lambda x: lax.squeeze(x, gone))
    if name == "slice":
        bounds = list(
            zip(
                p["start_indices"], p["limit_indices"],
                p["strides"] or (1,) * q.ndim, strict=True,
            )
        )  # fmt: skip
        if bounds[n:] == [(0, size, 1) for size in q.shape[n:]]:

            def cut(x: Any) -> Any:
                for d, bound in enumerate(bounds[:n]):
                    x = lax.slice_in_dim(x, *bound, axis=d)
                return x

            return q.map(cut)
    if name == "dynamic_slice" and tuple(p["slice_sizes"][n:]) == q.shape[n:]:

        def cut_there(x: Any) -> Any:
            for d in range(n):
                x = lax.dynamic_slice_in_dim(x, starts[d], p["slice_sizes"][d], d)
            return x

        return q.map(cut_there)
    return None


def for_shards(x: Any, spec: Any) -> Any:
    """An operand of a `shard_map`, whose codes can be cut as its spec says.

    A block of double quantisation is of statistics that may lie on several devices.
    """
    if not is_quantised(x):
        return x
    cut = {d for d, names in enumerate(tuple(spec)) if names is not None}
    if x.base.layout.then or not cut <= {*x.base.along("codes")}:
        return with_dense_base(x)
    base = x.base.single()
    base = dataclasses.replace(base, layout=dataclasses.replace(base.layout, kept=None))
    return dataclasses.replace(x, base=base)


def placed_base(base: Any, sharding: Any, place: Any) -> Any:
    """A base, each of its arrays put where a kernel's sharding says."""
    if not isinstance(base, Quantized):
        return place(base, sharding)
    if not isinstance(sharding, NamedSharding):
        return base.map(lambda x: place(x, sharding))
    mesh, kind = sharding.mesh, sharding.memory_kind
    where = base.place_spec(
        sharding.spec, lambda spec: NamedSharding(mesh, spec, memory_kind=kind)
    )
    return jax.tree.map(place, base, where)
