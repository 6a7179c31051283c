"""A bank: the adapters of several trees on one base, stacked; and one of them again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora._errors import OptionError, StructureError
from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import Array
from jlora._kernel.bank import has_bank, size_of, stack_terms
from jlora._kernel.bank import pick as pick_term
from jlora._kernel.forms import as_lora
from jlora._kernel.nodes import LowRank, is_node, is_trained
from jlora._paths import Tree, leaf_paths
from jlora.adapters._pad import padded
from jlora.adapters._same_base import check_same_base

# What two adapters of one kernel must have in common.
_ALIKE = ("a_dims", "b_dims", "s_dims", "starts")


def bank(trees: Sequence[Tree]) -> Tree:
    """Several adapters on one base as one tree, for batches in which each has its own.

    Every factor has an axis of K adapters more, the first: `a [K, *in, r]`. Other
    forms of the update are made LoRA's, and ranks are padded with zeros to the largest
    one. A kernel that a tree leaves alone has an adapter of zeros there. The result is
    a lorafied tree: it can be split, trained and saved by Orbax; `jlora.mixed` uses it.

    Args:
      trees: K lorafied trees on the same base; their order is the adapters' numbers.

    Raises:
      StructureError: other bases; leaves that are trained whole, tokens too; adapters
        that differ in more than rank and numbers: in their axes, windows or DoRA.
      OptionError: no trees.

    >>> base = {"query": jnp.ones((3, 2))}
    >>> trees = [jlora.lorafy(base, rank=r, targets=["query"]) for r in (1, 2)]
    >>> jlora.bank(trees)["query"].adapters[""].a.shape
    (2, 3, 2)
    """
    trees = list(trees)
    if not trees:
        raise OptionError("jlora.bank([]): a bank holds one adapter at least.")
    structure = jax.tree.structure(trees[0], is_leaf=is_node)
    paths = leaf_paths(trees[0], is_leaf=is_node)
    base = jax.tree.map(_base, trees[0], is_leaf=is_node)
    for number, tree in enumerate(trees):
        _refuse_others(number, tree)
        check_same_base(base, tree, str(number))
    leaves = (jax.tree.leaves(tree, is_leaf=is_node) for tree in trees)
    columns = zip(*leaves, strict=True)
    made = [_stacked(p, c) for p, c in zip(paths, columns, strict=True)]
    if not any(map(has_bank, made)):
        raise StructureError(
            "none of the trees holds an adapter.\nMake them by jlora.lorafy or "
            "jlora.peft.load."
        )
    return jax.tree.unflatten(structure, made)


def pick(tree: Tree, number: int | Array) -> Tree:
    """One adapter of a bank as a lorafied tree: to save, merge or go on training it.

    Its rank is the bank's; what was padded is zeros, and stays so in training.

    Args:
      tree: from `bank`.
      number: which, 0 to K-1; or a traced number, of which a negative one is none.

    Raises:
      StructureError: a tree that is no bank.
      OptionError: a number beyond the bank.
    """
    size = bank_size(tree)
    if not isinstance(number, jax.core.Tracer) and not 0 <= int(number) < size:
        raise OptionError(f"pick: {number} is none of 0 to {size - 1}, the bank's.")

    def one(x: Any) -> Any:
        if not isinstance(x, LowRank):
            return x

        def term(t: Adapter) -> Adapter:
            known = not isinstance(number, jax.core.Tracer)
            own = t.invocation[int(number)] if t.invocation and known else None
            return dataclasses.replace(pick_term(t, number), invocation=own)

        return x.map(x.base, term)

    return jax.tree.map(one, tree, is_leaf=is_node)


def bank_size(tree: Tree) -> int:
    """K, the number of adapters in a bank.

    Raises:
      StructureError: a tree that is no bank.
    """
    for x in jax.tree.leaves(tree, is_leaf=is_node):
        if has_bank(x):
            return next(size_of(t) for t in x.adapters.values() if t.is_bank)
    raise StructureError(
        "this tree holds no bank of adapters.\nMake one: jlora.bank([tree, ...])."
    )


# -- one leaf of each tree -------------------------------------------------------------


def _refuse_others(number: int, tree: Tree) -> None:
    """Refuse what a bank cannot hold."""
    for x in jax.tree.leaves(tree, is_leaf=is_node):
        if is_trained(x) and not isinstance(x, LowRank):
            raise StructureError(
                f"tree {number}: the {x.kind} {x.path!r} {x.shape} is no adapter, and "
                "each example would need one of its own.\nA bank holds low-rank "
                "adapters: leave out train, bias and trainable_tokens."
            )
        if has_bank(x):
            raise StructureError(f"tree {number}: {x.path!r} holds a bank already.")


def _base(x: Any) -> Any:
    return x.base if isinstance(x, LowRank) else x


def _stacked(path: str, column: Sequence[Any]) -> Any:
    """The kernel of all trees, with a bank for each of its adapters' names."""
    kernels = [x for x in column if isinstance(x, LowRank)]
    if not kernels:
        return column[0]
    names = dict.fromkeys(name for w in kernels for name in w.adapters)
    adapters = {}
    for name in names:
        terms = [
            as_lora(x.adapters[name], x.shape)
            if isinstance(x, LowRank) and name in x.adapters
            else None
            for x in column
        ]
        adapters[name] = stack_terms(_alike(f"{path}/{name}".rstrip("/"), terms))
    return dataclasses.replace(kernels[0], adapters=adapters)


def _alike(path: str, terms: Sequence[Adapter | None]) -> list[Adapter]:
    """The terms with one rank and the same arrays, zeros where there is none."""
    known = [t for t in terms if t is not None]
    first = known[0]
    _check_alike(path, known, lacking=len(known) < len(terms))
    rank = max(t.rank for t in known)
    wide = [padded(first if t is None else t, rank, path) for t in terms]
    other = next((t for t in wide if t.bias is not None), first)
    rslora = all(t.rslora for t in known)
    out = []
    for given, t in zip(terms, wide, strict=True):
        if other.bias is not None and t.bias is None:
            t = dataclasses.replace(
                t, bias=jnp.zeros_like(other.bias), o_dims=other.o_dims
            )
        if given is None:
            t = jax.tree.map(jnp.zeros_like, t)
        out.append(dataclasses.replace(t, rslora=rslora, dropout=first.dropout))
    return out


def _check_alike(path: str, known: Sequence[Adapter], lacking: bool) -> None:
    first = known[0]
    dora = {t.magnitude is not None for t in known}
    reasons = [f"{n} {getattr(t, n)}" for t in known for n in _ALIKE
               if getattr(t, n) != getattr(first, n)]  # fmt: skip
    sizes = [[t.size(d) for d in range(len(t.starts))] for t in known]
    reasons += [f"a window {s}, not {sizes[0]}" for s in sizes if s != sizes[0]]
    if len(dora) > 1 or (lacking and dora == {True}):
        reasons.append("DoRA in some and not in all")
    kinds = {str(t.a.dtype) for t in known}
    reasons += [f"dtypes {sorted(kinds)}"] if len(kinds) > 1 else []
    dropouts = {t.dropout for t in known}
    reasons += [f"dropout {sorted(dropouts)}"] if len(dropouts) > 1 else []
    if any(t.key is not None for t in known):
        reasons.append("keys: switch dropout on for the bank, jlora.with_dropout")
    if reasons:
        raise StructureError(
            f"the adapters of {path!r} differ in more than their ranks and numbers: "
            f"{reasons[0]}.\nA bank is of adapters that are alike; ranks, alphas, "
            "rslora and the choice of kernels may differ."
        )


def invocations(bank: Tree) -> Sequence[Any]:
    """The tokens from which each adapter of a bank acts, or None: everywhere."""
    size = bank_size(bank)
    nodes = [x for x in jax.tree.leaves(bank, is_leaf=is_node) if has_bank(x)]
    found = {t.invocation for x in nodes for t in x.adapters.values()}
    known = [x for x in found if x]
    if not known:
        return (None,) * size
    return [next((x[n] for x in known if x[n]), None) for n in range(size)]
