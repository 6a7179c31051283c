"""What can be done to a kernel element by element and leave it low-rank."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _compat
from jlora._compat import Eqn, rebind
from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import Array
from jlora._kernel.nodes import LowRank
from jlora._transform._rules import quantised
from jlora._transform._rules._table import RULES, Run, rule
from jlora._transform._rules._terms import (
    bases,
    broadcast_to,
    change_factor,
    each_term,
    scaled_later,
    varying_axes,
)
from jlora._transform._rules.hadamard import Hadamard
from jlora._transform.without import MARK


@rule("convert_element_type", "reduce_precision")
def convert(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """A cast of the base; factors stay as they are and follow its dtype when used."""
    (w,) = args
    if isinstance(w, Hadamard):
        return _of_left(run, eqn, args, both=True)
    (base,) = quantised.rebind(eqn, [w.base])
    if not jnp.issubdtype(base.dtype, jnp.inexact):
        return NotImplemented
    return [w.map(base, lambda t: t)]


@rule("copy", "copy_p", "name", "stop_gradient", *_compat.PVARY)
def each_array(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """The same operation on the base and on each factor; or on the base alone."""
    (w,) = args
    if eqn.params.get("name") == MARK:
        return [w.map(w.base, lambda t: None) if quantised.is_quantised(w) else w.base]
    apply = lambda x: _bind_if_needed(eqn, x)  # noqa: E731
    base = jax.tree.map(apply, w.base)  # of a quantised one each array
    return [w.map(base, lambda t: t.map(lambda x, d: (apply(x), d)))]


def _bind_if_needed(eqn: Eqn, x: Array) -> Array:
    """PRNG keys have no gradient, and a varying array is not made varying again."""
    name = eqn.primitive.name
    if name in _compat.PVARY and set(eqn.params["axes"]) <= _compat.varying_axes(x):
        return x
    if name == "stop_gradient" and not jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    return rebind(eqn, [x])[0]


@rule("optimization_barrier")
def barrier(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """Low-rank operands pass through as their arrays do."""
    return list(lax.optimization_barrier(tuple(args)))


@rule("neg")
def neg(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """-(W + sAB) = -W + (-s)AB."""
    (w,) = args
    if isinstance(w, Hadamard):
        return _of_left(run, eqn, args)
    return [negated(w)]


def negated(w: LowRank) -> LowRank:
    """-W."""
    return w.map(-w.base, lambda t: dataclasses.replace(t, scale=-t.scale))


@rule("mul")
def mul(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """c·(W + sAB) = cW + (cs)AB for a scalar c; v·(W + sAB) = vW + s(vA)B.

    A vector v along the inputs goes into A, along the outputs into B. The product of
    two kernels waits for a sum.
    """
    if all(isinstance(w, LowRank) for w in args):
        shape = eqn.outvars[0].aval.shape
        return [Hadamard(*(_stretched(w, shape) for w in args))]
    return _scaled(run, eqn, args, operator.mul)


def _stretched(w: LowRank, shape: Sequence[int]) -> LowRank:
    same = w.shape == tuple(shape)
    return w if same else broadcast_to(w, jnp.broadcast_to(w.base, shape))


@rule("div")
def div(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """(W + sAB)/c, with a scalar or a vector c."""
    if not isinstance(args[0], LowRank | Hadamard):
        return NotImplemented
    return _scaled(run, eqn, args, operator.truediv)


def _scaled(run: Run, eqn: Eqn, args: list[Any], f: Callable[[Any, Any], Any]) -> Any:
    if any(isinstance(x, Hadamard) for x in args):
        return _of_left(run, eqn, args)
    number = 0 if isinstance(args[0], LowRank) else 1
    w, c = args[number], args[1 - number]
    if isinstance(c, LowRank):
        return NotImplemented
    shape = eqn.outvars[0].aval.shape
    constant = run.facts().constant_axes(eqn.invars[1 - number])
    thin, axes = varying_axes(jnp.asarray(c), constant)

    def change(t: Adapter) -> Any:
        if not axes:
            return dataclasses.replace(t, scale=f(t.scale, thin.reshape(())))
        changed = change_factor(t, w.shape, thin, axes, f)
        return NotImplemented if changed is None else changed

    fixed = isinstance(eqn.invars[1 - number], _compat.Literal)
    if w.shape == tuple(shape) and not fixed:
        later = scaled_later(w, f(jnp.ones((), thin.dtype), thin), axes)
        if later is not None:
            return each_term(later, later.base, change)
    (base,) = rebind(eqn, bases(args))
    w = broadcast_to(w, base)
    return each_term(w, base, change)


@rule("square", "integer_pow")
def square(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """W², which waits for a sum."""
    (w,) = args
    return [Hadamard(w, w)] if eqn.params.get("y", 2) == 2 else NotImplemented


def _of_left(run: Run, eqn: Eqn, args: list[Any], both: bool = False) -> Any:
    """The operation done to one kernel of a product, or to both of them."""
    number = next(n for n, x in enumerate(args) if isinstance(x, Hadamard))
    if sum(isinstance(x, LowRank | Hadamard) for x in args) > 1:
        return NotImplemented
    sides: list[Any] = []
    for w in (args[number].left, args[number].right):
        operands = [w if n == number else x for n, x in enumerate(args)]
        done = (
            RULES[eqn.primitive.name](run, eqn, operands) if both or not sides else [w]
        )
        if done is NotImplemented:
            return NotImplemented
        sides += done
    return [Hadamard(*sides)] if sides[0].shape == sides[1].shape else NotImplemented
