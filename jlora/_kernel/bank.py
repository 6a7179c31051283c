"""Banks: several adapters of one kernel as one, of which at most one acts.

    a      [K, *batch, *in, r]       scale      [K, *batch]
    b      [K, *batch, r, *out]      magnitude  [K, *batch, *out], of DoRA

Each array has an axis of K adapters more, labelled `BANK`. `which` says who acts: one
number, or one for each token, and a negative number is nobody. A product with a bank is
that with the adapter which is picked, or that with all of them side by side, a factor
of K·r columns, of which a mask leaves those that act.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._errors import StructureError
from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import BANK, Array, Dims, Label, expand
from jlora._kernel.nodes import LowRank

# Side by side costs K times the products, picking a copy of the factors for each
# example. Measured on a CPU, see `benchmarks/mixed_batches.py`.
_SIDE_BY_SIDE = 16


def stack_terms(terms: Sequence[Adapter]) -> Adapter:
    """Terms that are alike in all but their numbers, as a bank."""
    first = terms[0]

    def stacked(name: str) -> Any:
        arrays = [getattr(t, name) for t in terms]
        return None if arrays[0] is None else jnp.stack(arrays)

    arrays = ("a", "b", "scale", "magnitude", "bias")
    dims: dict[str, Any] = {
        n: (BANK, *getattr(first, n)) for n in ("a_dims", "b_dims", "s_dims")
    }
    if first.o_dims:
        dims["o_dims"] = (BANK, *first.o_dims)
    if any(t.invocation for t in terms):
        dims["invocation"] = tuple(t.invocation for t in terms)
    return dataclasses.replace(first, **{n: stacked(n) for n in arrays}, **dims)


def size_of(t: Adapter) -> int:
    """K, how many adapters a bank holds."""
    return t.a.shape[t.a_dims.index(BANK)]


def pick(t: Adapter, which: Array | int | None = None) -> Adapter:
    """The adapter that acts, or the one of a number; nought where that is negative."""
    if not t.is_bank:
        return t
    which = jnp.asarray(_which(t) if which is None else which)

    def take(x: Array, dims: Dims) -> tuple[Array, Dims]:
        return pick_axis(x, dims, which)

    one = dataclasses.replace(t.map(take), which=None)
    gain = None if one.gain is None else jnp.where(which >= 0, one.gain, 1)
    scale = jnp.where(which >= 0, one.scale, 0)
    return dataclasses.replace(one, scale=scale, gain=gain)


def scale_of(t: Adapter) -> tuple[Array, Dims]:
    """The scale of a bank's adapter that acts, and its dims."""
    scale, dims = pick_axis(t.scale, t.s_dims, _which(t))
    return jnp.where(_which(t) >= 0, scale, 0), dims


def _which(t: Adapter) -> Array:
    assert t.which is not None, "a bank met a product, and nobody was to act"
    return t.which


def pick_axis(
    x: Array, labels: Sequence[Label], which: Array | int
) -> tuple[Array, tuple[Label, ...]]:
    """One index of the axis `BANK`, where there is that axis."""
    if BANK not in labels:
        return x, tuple(labels)
    taken = lax.dynamic_index_in_dim(x, which, [*labels].index(BANK), keepdims=False)
    return taken, tuple(n for n in labels if n != BANK)


def picked(w: LowRank) -> LowRank:
    """The kernel with the adapters that act."""
    return w.map(w.base, pick)


def has_bank(x: Any) -> bool:
    """Whether x is a kernel with a bank on it."""
    return isinstance(x, LowRank) and any(t.is_bank for t in x.adapters.values())


def by_token(x: Any) -> bool:
    """Whether x is a kernel with a bank whose adapters act on some tokens each."""
    terms = x.adapters.values() if isinstance(x, LowRank) else ()
    return any(t.which is not None and t.which.ndim for t in terms)


def at_tokens(w: LowRank, first: int, count: int) -> LowRank:
    """The kernel with the numbers of some consecutive tokens."""

    def one(t: Adapter) -> Adapter:
        if t.which is None:
            return t
        return dataclasses.replace(t, which=t.which[first : first + count])

    return w.map(w.base, one)


def for_product(w: LowRank, rows: int) -> LowRank:
    """The kernel in the form that a product with so many rows an example takes.

    Banks stay where their adapters meet x side by side, for few rows. Numbers for each
    token leave no choice.
    """

    def one(t: Adapter) -> Adapter:
        each = t.which is not None and t.which.ndim
        masked = t.key is not None
        few = t.is_bank and t.gain is None and rows * size_of(t) <= _SIDE_BY_SIDE
        return t if each or (few and not masked) else pick(t)

    return w.map(w.base, one) if has_bank(w) else w


def acting(
    t: Adapter, low: Array, labels: Sequence[Label], token: Label = None
) -> Array:
    """What of `x·A`, with all of a bank's A, is of the adapter that acts.

    Args:
      t: the bank, or an adapter, of which all is.
      low: the product, with an axis `BANK`.
      labels: of its axes.
      token: the label of the axis along which `which` goes, if it is not one number.
    """
    if not t.is_bank:
        return low
    mask = jax.nn.one_hot(t.which, size_of(t), dtype=low.dtype)
    names = (token, BANK) if mask.ndim > 1 else (BANK,)
    return low * expand(mask, names, labels)


def refuse_banks(tree: Any, function: str) -> None:
    """Refuse a tree of banks where one adapter is asked for.

    Raises:
      StructureError: there is one.
    """
    for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, LowRank)):
        if has_bank(x):
            raise StructureError(
                f"{function}: {x.path!r} holds a bank of adapters, not one.\nTake one "
                "out of it: jlora.pick(bank, number)."
            )


def refuse_activated(tree: Any, function: str) -> None:
    """Refuse adapters that act on some tokens only where they would act on all.

    Raises:
      StructureError: there is one.
    """
    for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, LowRank)):
        terms = x.adapters.values() if isinstance(x, LowRank) else ()
        tokens = next((t.invocation for t in terms if t.invocation), None)
        if tokens and not has_bank(x):
            raise StructureError(
                f"{function}: the adapter of {x.path!r} acts from the invocation "
                f"tokens {list(tokens)} on, not everywhere (aLoRA).\nUse it by "
                "jlora.mixed(fn)(jlora.with_ids(bank, jlora.activated_ids(bank, ids, "
                "input_ids)), input_ids), with bank = jlora.bank([tree]); or let it "
                "act everywhere: jlora.activated(tree, None)."
            )
