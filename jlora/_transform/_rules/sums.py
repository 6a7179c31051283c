"""Sums and choices of kernels: each keeps its terms."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora import _compat
from jlora._compat import Eqn, rebind
from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import RANK, Array, expand
from jlora._kernel.nodes import LowRank
from jlora._transform._rules._table import Run, rule
from jlora._transform._rules._terms import (
    bases,
    broadcast_to,
    change_factor,
    has_gain,
    union,
    varying_axes,
)
from jlora._transform._rules.elementwise import negated
from jlora._transform._rules.hadamard import Hadamard


@rule("add", "sub", "add_any")
def add(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """(W + sAB) ± (V + tCD) = (W ± V) + sAB ± tCD; V may be a plain array."""
    minus = eqn.primitive.name == "sub"
    if any(isinstance(x, Hadamard) for x in args):
        # Of a complex number's square, say, of which a real one has no second part.
        zero = [run.facts().is_zero(atom) for atom in eqn.invars]
        same = args[1] if zero[0] and not minus else args[0] if zero[1] else None
        return [same] if isinstance(same, Hadamard) else NotImplemented
    vector = _add_vector(run, eqn, args, minus)
    if vector is not None:
        return [vector]
    if any(map(has_gain, args)):
        return NotImplemented  # one gain would count for the other's base
    (base,) = rebind(eqn, bases(args))
    kernels = [w for w in args if isinstance(w, LowRank)]
    if minus and isinstance(args[1], LowRank):
        kernels[-1] = _negated_terms(kernels[-1])
    return [union(base, [broadcast_to(w, base) for w in kernels])]


def _negated_terms(w: LowRank) -> LowRank:
    return w.map(w.base, lambda t: dataclasses.replace(t, scale=-t.scale))


def _add_vector(run: Run, eqn: Eqn, args: list[Any], minus: bool) -> LowRank | None:
    """W ± v with a v that one side of every term spans, as one term more.

    A mean that is subtracted depends on the factors. Summed into the base, it would
    have the base's whole gradient formed.
    """
    number = 0 if isinstance(args[0], LowRank) else 1
    w, v = args[number], args[1 - number]
    atom = eqn.invars[1 - number]
    if isinstance(v, LowRank) or isinstance(atom, _compat.Literal) or not w.adapters:
        return None
    if w.shape != eqn.outvars[0].aval.shape:
        return None
    v, axes = varying_axes(v, run.facts().constant_axes(atom))
    terms = w.adapters.values()
    # What has an adapter for each index of a dimension keeps it on both factors.
    both = {d for t in terms for d in t.batch_axes}
    sides = [
        side
        for side, own in (("a", "in_axes"), ("b", "out_axes"))
        if all(axes <= {*getattr(t, own), *both} for t in terms)
    ]
    if not sides:
        return None
    if minus and number == 0:
        v = -v
    if minus and number == 1:
        w = negated(w)
    term = _vector_term(v, axes, both, w.shape, sides[-1])
    return union(w.base, [w, LowRank(w.base, {"": term}, w.path)])


def _vector_term(
    v: Array, axes: frozenset[int], both: set[int], shape: Sequence[int], side: str
) -> Adapter:
    """A term of rank one: v, constant along the other dimensions."""
    order = tuple(sorted(axes))
    v = v.reshape(1, *(shape[d] for d in order))
    batch = tuple(d for d in order if d in both)
    ones = jnp.ones((1, *(shape[d] for d in batch)), v.dtype)
    factors = {"a": (ones, (RANK, *batch)), "b": (ones, (RANK, *batch))}
    factors[side] = v, (RANK, *order)
    return Adapter(
        factors["a"][0], factors["b"][0], jnp.ones((), jnp.float32), None, None, None,
        None, None, None, None, factors["a"][1], factors["b"][1], (), (),
        (0,) * len(shape),
    )  # fmt: skip


@rule("select_n")
def select_n(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """A kernel by a scalar, or parts by a mask along one side; other terms are nought.

    Like kernels that a scalar chooses from are chosen from factor by factor.
    """
    which, *cases = args
    if isinstance(which, LowRank):
        return NotImplemented
    (base,) = rebind(eqn, [which, *bases(cases)])
    if jnp.ndim(which) == 0 and alike(cases):
        return [_selected(eqn, which, cases, base)]
    which, axes = varying_axes(which, run.facts().constant_axes(eqn.invars[0]))
    if not jnp.ndim(which):
        which = which.reshape((1,) * base.ndim)
    kernels = []
    for number, case in enumerate(cases):
        if isinstance(case, LowRank):
            kernels.append(_masked(case, which == number, axes))
    known = [w for w in kernels if w is not None]
    return [union(base, known)] if len(known) == len(kernels) else NotImplemented


def _masked(w: LowRank, mask: Array, axes: frozenset[int]) -> LowRank | None:
    """W's terms where the mask is true, nought (and no gain) elsewhere."""
    adapters = {}
    for name, t in w.adapters.items():
        if axes:
            changed = change_factor(t, w.shape, mask, axes, _keep)
        else:
            changed = dataclasses.replace(t, a=_keep(t.a, mask.reshape(())))
        if changed is None:
            return None
        if t.gain is not None:
            if not axes <= {*t.o_dims} or not t.covers(w.shape):
                return None
            thin = mask.reshape([w.shape[d] for d in sorted(axes)])
            here = expand(thin, sorted(axes), t.o_dims)
            gain = jnp.where(here, t.gain, 1)
            changed = dataclasses.replace(changed, gain=gain)
        adapters[name] = changed
    return dataclasses.replace(w, adapters=adapters)


def _keep(x: Array, mask: Array) -> Array:
    return jnp.where(mask, x, 0)


def alike(cases: Sequence[Any]) -> bool:
    """Whether all are kernels whose arrays correspond, one to one."""
    if not all(isinstance(w, LowRank) for w in cases):
        return False
    first = cases[0].adapters
    return all(
        list(w.adapters) == list(first)
        and all(_same_form(t, first[name]) for name, t in w.adapters.items())
        for w in cases
    )


def _same_form(t: Adapter, other: Adapter) -> bool:
    def form(t: Adapter) -> Any:
        leaves, structure = jax.tree.flatten(t)
        return structure, [(x.shape, x.dtype) for x in leaves]

    return bool(form(t) == form(other))


def _selected(eqn: Eqn, which: Array, cases: list[LowRank], base: Array) -> LowRank:
    path = " + ".join(dict.fromkeys(w.path for w in cases))
    trees = [dict(w.adapters) for w in cases]
    chosen = jax.tree.map(lambda *xs: rebind(eqn, [which, *xs])[0], *trees)
    return LowRank(base, chosen, path)
