"""What can be done to a kernel element by element and leave it low-rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from jlora import _compat
from jlora._compat import Eqn, rebind
from jlora._kernel.axes import Array
from jlora._kernel.nodes import LowRank
from jlora._transform._rules._table import Run, rule


@rule("convert_element_type", "reduce_precision")
def convert(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """A cast of the base; factors stay as they are and follow its dtype when used."""
    (w,) = args
    (base,) = rebind(eqn, [w.base])
    if not jnp.issubdtype(base.dtype, jnp.floating):
        return NotImplemented
    return [w.map(base, lambda t: t)]


@rule("copy", "copy_p", "name", "stop_gradient", *_compat.PVARY)
def each_array(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """The same operation on the base and on each factor."""
    (w,) = args
    apply = lambda x: _bind_if_needed(eqn, x)  # noqa: E731
    return [w.map(apply(w.base), lambda t: t.map(lambda x, d: (apply(x), d)))]


def _bind_if_needed(eqn: Eqn, x: Array) -> Array:
    """PRNG keys have no gradient, and a varying array is not made varying again."""
    name = eqn.primitive.name
    if name in _compat.PVARY and set(eqn.params["axes"]) <= _compat.varying_axes(x):
        return x
    if name == "stop_gradient" and not jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    return rebind(eqn, [x])[0]


@rule("neg")
def neg(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """-(W + sAB) = -W + (-s)AB."""
    return _rescale(eqn, args, args[0], lambda scale: -scale)


@rule("mul")
def mul(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """c·(W + sAB) = cW + (cs)AB for a scalar c."""
    w, c = args if isinstance(args[0], LowRank) else reversed(args)
    if isinstance(c, LowRank) or jnp.ndim(c):
        return NotImplemented
    return _rescale(eqn, args, w, lambda s: s * jnp.asarray(c, s.dtype))


@rule("div")
def div(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """(W + sAB)/c for a scalar c."""
    w, c = args
    if not isinstance(w, LowRank) or isinstance(c, LowRank) or jnp.ndim(c):
        return NotImplemented
    return _rescale(eqn, args, w, lambda s: s / jnp.asarray(c, s.dtype))


def _rescale(
    eqn: Eqn, args: list[Any], w: LowRank, scale: Callable[[Array], Array]
) -> list[LowRank]:
    dense = [a.base if isinstance(a, LowRank) else a for a in args]
    (base,) = rebind(eqn, dense)
    return [w.map(base, lambda t: dataclasses.replace(t, scale=scale(t.scale)))]


@rule("optimization_barrier")
def barrier(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """Low-rank operands pass through as their arrays do."""
    return list(lax.optimization_barrier(tuple(args)))
