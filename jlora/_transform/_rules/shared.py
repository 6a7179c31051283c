"""Products that share their input: x·[A_q | A_k | A_v] in one pass over x.

Down-projections are narrow, so each costs little more than reading x, forward for the
product and backward for `dA`. The kernels of a layer's query, key and value stand in
one jaxpr before the first of them is used, so the first product makes the low-rank
inputs of all.
"""

from __future__ import annotations

from collections.abc import Sequence

from jax import lax

from jlora._compat import Eqn
from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import RANK, Array, Label, align, contract, expand
from jlora._kernel.nodes import LowRank
from jlora._transform._rules._table import Run


def shared_inputs(
    run: Run, eqn: Eqn, w: LowRank, x: Array, labels: Sequence[Label],
    contracted: Sequence[int],
) -> dict[str, Array]:  # fmt: skip
    """`s·x·A` by the adapter's name, axes of x first, where other products use x too.

    Empty for adapters that stand alone, and for those that need an x of their own.
    """
    kept = run.shared()
    if id(eqn) not in kept:
        members = [
            (id(e), name, t)
            for e, other in run.products_of(eqn)
            if isinstance(other, LowRank) and _alike(eqn, w, e, other)
            for name, t in other.adapters.items()
            if _takes_x(t, other, contracted)
        ]
        kept[id(eqn)] = {}
        if len(members) > 1:
            # Slices of one kernel have one A, which is taken once.
            terms = {_factor(t): t for _, _, t in members}
            lows = _products(eqn, list(terms.values()), w, x, labels, contracted)
            found = dict(zip(terms, lows, strict=True))
            for number, name, t in members:
                kept.setdefault(number, {})[name] = found[_factor(t)]
    return kept[id(eqn)]


def _alike(eqn: Eqn, w: LowRank, other_eqn: Eqn, other: LowRank) -> bool:
    """Whether both contract the same axes of x, in the same precision and dtype.

    And are of one layer: an encoder's output has a use in every layer of the decoder,
    and a split into as many parts is as many programs more to compile.
    """
    names = ("dimension_numbers", "precision", "preferred_element_type")
    same = all(eqn.params[n] == other_eqn.params[n] for n in names)
    same = same and w.dtype.itemsize > 1  # factors stay out of 8 bits
    return same and w.dtype == other.dtype and _layer(w) == _layer(other)


def _layer(w: LowRank) -> list[str]:
    """The path of the module that holds a kernel's module."""
    return w.path.split("/")[:-2]


def _takes_x(t: Adapter, w: LowRank, contracted: Sequence[int]) -> bool:
    """Whether the term is x·A·B with x as it is, all of it summed over with A."""
    whole = all(t.full(d, w.shape[d]) for d in contracted)
    first = {*t.a_dims} == {*contracted, RANK} and not {*t.b_dims} & {*contracted}
    scaled = {*t.s_dims} <= {*t.a_dims}
    return whole and first and scaled and t.key is None and t.rank > 0


def _factor(t: Adapter) -> tuple[int, int]:
    """What tells one scaled A from another."""
    return id(t.a), id(t.scale)


def _products(
    eqn: Eqn, terms: list[Adapter], w: LowRank, x: Array, labels: Sequence[Label],
    contracted: Sequence[int],
) -> list[Array]:  # fmt: skip
    """One product with all scaled A side by side, cut into each adapter's own."""
    order = [*contracted, RANK]
    scaled = [(t.a * expand(t.scale, t.s_dims, t.a_dims), t.a_dims) for t in terms]
    side_by_side = [align(a.astype(w.dtype), dims, order) for a, dims in scaled]
    factor = lax.concatenate(side_by_side, len(contracted))
    params = {k: eqn.params[k] for k in ("precision", "preferred_element_type")}
    low, _ = contract(x, labels, factor, order, (), **params)
    # A split's gradient is one concatenation; those of slices are padded and summed.
    return list(lax.split(low, [t.rank for t in terms], axis=low.ndim - 1))
