"""AdaLoRA: a budget of ranks, given to the kernels where they matter most.

An adapter is `a · diag(e) · b` with `e [*batch, r]` for singular values. Each triplet
of a column, a value and a row has a score; the lowest ones of all kernels together have
their values set to zero, until the budget is met.

    budget   all ranks | cubic descent, every so many steps | target, masks fixed
             0 ... warmup                        total - final ... total
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jlora._errors import OptionError, StructureError
from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import RANK, Array, Dims, align, contract, expand
from jlora._kernel.forms import as_lora
from jlora._kernel.nodes import LowRank, is_node, with_origin
from jlora._paths import Tree, map_with_path
from jlora.optim._options import positive, share, whole
from jlora.optim._terms import Term, map_terms, needed, terms_of

_RANK_TOO = -2
_PARTS = ("a", "e", "b")
Triplets = Mapping[str, Mapping[str, Array]]  # by term, by part


class AdaLoraState(NamedTuple):
    """What AdaLoRA remembers.

    Attributes:
      step: the number of updates.
      inner: the optimiser's state.
      importance, uncertainty: moving averages of every entry of the triplets, float32.
      kept: which ranks there are, `[*batch, r]`.
    """

    step: Array
    inner: Any
    importance: Triplets
    uncertainty: Triplets
    kept: Mapping[str, Array]


def adalora(
    tx: optax.GradientTransformation, *, target_rank: float, total_steps: int,
    warmup: int = 0, final: int = 0, every: int = 1, beta1: float = 0.85,
    beta2: float = 0.85, orthogonality_weight: float = 0.5,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """An optimiser that also decides which ranks remain. `prune` then removes the rest.

    The adapters are those of `jlora.lorafy(..., variant="adalora")`; what else is
    trained `tx` trains as ever. Shapes stay as they are, so nothing is compiled twice.

    Args:
      tx: the optimiser of the parameters.
      target_rank: how many ranks an adapter has on average in the end. Layers of a
        stack count as adapters of their own.
      total_steps: how many updates there will be.
      warmup: so many first steps keep all ranks.
      final: so many last steps keep the ranks that remain. It should not be zero, or
        the budget's end is not reached.
      every: how many steps lie between two allocations.
      beta1: how much of an entry's importance, `|p · gradient|`, is from before.
      beta2: how much of its uncertainty, `|importance - its mean|`, is.
      orthogonality_weight: of `orthogonality(trainable)`, whose gradient is added to
        the loss's; the loss that a step reports is without it.

    Raises:
      OptionError: numbers that cannot be, or steps that leave no room for the descent.
      StructureError: from `init`: no adapter is of the variant, or they have fewer
        ranks than the target.

    Source: Zhang et al. 2023, arXiv:2303.10512; PEFT's `RankAllocator`, of which it
    keeps the same ranks.
    """
    positive(target_rank=target_rank)
    whole(1, total_steps=total_steps, every=every)
    whole(0, warmup=warmup, final=final)
    share(beta1=beta1, beta2=beta2)
    end = total_steps - final
    if warmup >= end:
        raise OptionError(
            f"warmup={warmup} and final={final} leave none of total_steps="
            f"{total_steps} to allocate ranks in.\nLower one of the two."
        )
    tx = optax.with_extra_args_support(tx)

    def init(params: Tree) -> AdaLoraState:
        found = _triplets(params)
        _budgets(found, target_rank, warmup, end, every)
        zeros = lambda: jax.tree.map(  # noqa: E731
            lambda x: jnp.zeros_like(x, jnp.float32), _arrays(found)
        )
        kept = {n: jnp.ones(_held(t)["e"].shape, bool) for n, t in found.items()}
        start = jnp.zeros((), jnp.int32)
        return AdaLoraState(start, tx.init(params), zeros(), zeros(), kept)

    def update(
        grads: Tree, state: AdaLoraState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, AdaLoraState]:
        params = needed(params, "adalora")
        if orthogonality_weight:
            pull = jax.grad(orthogonality)(params)
            grads = jax.tree.map(lambda g, p: g + orthogonality_weight * p, grads, pull)
        updates, inner = tx.update(grads, state.inner, params, **extra)
        terms = _triplets(params)
        after = _arrays(_triplets(optax.apply_updates(params, updates)))
        live = state.step < end
        importance, uncertainty = _averages(
            state, after, _arrays(_triplets(grads)), live, beta1, beta2
        )
        scores = _scores(terms, importance, uncertainty)
        budgets, total = _budgets(terms, target_rank, warmup, end, every)
        budget = jnp.asarray(budgets)[jnp.minimum(state.step, end) // every]
        budget = jnp.where(live, budget, budgets[-1])
        now = (live & (state.step > warmup) & (state.step % every == 0)) | (
            state.step == end
        )
        most = _most_important(scores, total - budget)
        kept = {n: jnp.where(now, most[n], state.kept[n]) for n in scores}
        masked = now | (state.step > end)

        def mask(term: Term, u: Adapter) -> Adapter:
            name = _name(term)
            if name not in kept:
                return u
            gone = masked & ~kept[name]
            value = _held(terms[name])["e"]
            e = jnp.where(gone, -value, _held(u)["e"])  # to zero, exactly
            return _with(u, e=e)

        step = optax.safe_increment(state.step)
        new = AdaLoraState(step, inner, importance, uncertainty, kept)
        return map_terms(mask, updates), new

    return optax.GradientTransformationExtraArgs(init, update)


def orthogonality(tree: Tree) -> Array:
    """How far the factors are from orthonormal: the mean of `‖aᵀ·a - I‖` and of b's.

    Args:
      tree: a lorafied tree, or its trainable half.

    Raises:
      StructureError: no adapter is of the variant AdaLoRA.

    Source: Zhang et al. 2023, equation 4; the norms are not squared, as PEFT has it.
    """
    total, count = jnp.zeros((), jnp.float32), 0
    for t in _triplets(tree).values():
        for name in ("a", "b"):
            x, dims = _held(t)[name], _dims(t, name)
            too = tuple(_RANK_TOO if d == RANK else d for d in dims)
            gram, _ = contract(x, dims, x, too, t.batch_axes, precision="highest")
            eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)
            off = gram - jnp.broadcast_to(eye, gram.shape)
            square = jnp.sum(jnp.square(off), axis=(-2, -1))
            # A norm has no slope at zero.
            safe = jnp.where(square > 0, square, 1)
            total += jnp.sum(jnp.where(square > 0, jnp.sqrt(safe), 0))
            count += math.prod(square.shape)
    return total / count


def prune(tree: Tree) -> Tree:
    """LoRA of the ranks that remain; values and scales stay, what is zero goes.

    Each adapter has a rank of its own then, for which PEFT's files have a
    `rank_pattern`. Of a stack every layer keeps as many as the one with most. A kernel
    that has no rank left is a plain leaf.

    Args:
      tree: a lorafied tree with numbers in it.

    Raises:
      StructureError: no adapter is of the variant AdaLoRA, or inside `jax.jit`.
    """
    _triplets(tree)
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree)):
        raise StructureError(
            "prune changes shapes by what is zero, and inside jax.jit there are no "
            "numbers yet.\nCall it outside of jit."
        )

    def one(_: str, node: Any) -> Any:
        if not isinstance(node, LowRank):
            return node
        left = node.map(node.base, lambda t: _pruned(t, node.shape))
        return left if left.adapters else node.base

    return with_origin(map_with_path(one, tree, is_leaf=is_node))


def _pruned(t: Adapter, shape: tuple[int, ...]) -> Adapter | None:
    if t.form != "adalora":
        return t
    there = np.asarray(_held(t)["e"]) != 0
    count = int(there.sum(-1).max(initial=0))
    if not count:
        return None
    # Those that remain first, in their order.
    first = np.argsort(~there, axis=-1, kind="stable")[..., :count]

    def cut(x: Array, dims: Dims) -> tuple[Array, Dims]:
        if RANK not in dims:
            return x, dims
        index = expand(jnp.asarray(first), _dims(t, "e"), dims)
        return jnp.take_along_axis(x, index, axis=dims.index(RANK)), dims

    return as_lora(t.map(cut), shape)


# -- triplets --------------------------------------------------------------------------


def _triplets(tree: Tree) -> dict[str, Adapter]:
    """The adapters of the variant, by one name each."""
    found = {
        _name(term): t for term, t in terms_of(tree).items() if t.form == "adalora"
    }
    if not found:
        raise StructureError(
            "no adapter of this tree is of the variant AdaLoRA.\nMake them by "
            "jlora.lorafy(params, rank, ..., variant='adalora')."
        )
    return found


def _name(term: Term) -> str:
    return "/".join(filter(None, term))


def _arrays(found: Mapping[str, Adapter]) -> dict[str, dict[str, Array]]:
    return {n: {p: _held(t)[p] for p in _PARTS} for n, t in found.items()}


def _dims(t: Adapter, name: str) -> Dims:
    return dict(t.p_dims)[name]


def _with(t: Adapter, **parts: Array) -> Adapter:
    return dataclasses.replace(t, parts={**_held(t), **parts})


def _held(t: Adapter) -> Mapping[str, Array]:
    return t.parts or {}


# -- scores ----------------------------------------------------------------------------


def _averages(
    state: AdaLoraState, values: Triplets, grads: Triplets, live: Array,
    beta1: float, beta2: float,
) -> tuple[Triplets, Triplets]:  # fmt: skip
    """The moving averages of every entry; those of before where none are made."""

    def of_mean(mean: Array, p: Array, g: Array) -> Array:
        now = jnp.abs(p * g).astype(jnp.float32)
        return jnp.where(live, beta1 * mean + (1 - beta1) * now, mean)

    def of_spread(spread: Array, mean: Array, p: Array, g: Array) -> Array:
        off = jnp.abs(jnp.abs(p * g).astype(jnp.float32) - mean)
        return jnp.where(live, beta2 * spread + (1 - beta2) * off, spread)

    importance = jax.tree.map(of_mean, state.importance, values, grads)
    return importance, jax.tree.map(
        of_spread, state.uncertainty, importance, values, grads
    )


def _scores(
    terms: Mapping[str, Adapter], importance: Triplets, uncertainty: Triplets
) -> dict[str, Array]:
    """Each triplet's, `[*batch, r]`: its value's, and the means of its vectors'."""
    out: dict[str, Array] = {}
    for name, t in terms.items():
        order, total = _dims(t, "e"), jnp.zeros((), jnp.float32)
        for part in _PARTS:
            dims = _dims(t, part)
            entry = importance[name][part] * uncertainty[name][part]
            others = tuple(i for i, d in enumerate(dims) if d not in order)
            kept = [d for d in dims if d in order]
            total = total + align(jnp.mean(entry, axis=others), kept, order)
        out[name] = total
    return out


def _most_important(scores: Mapping[str, Array], dropped: Array) -> dict[str, Array]:
    """Which triplets lie above the `dropped`-th lowest of all."""
    flat = jnp.sort(jnp.concatenate([s.ravel() for s in scores.values()]))
    threshold = jnp.where(dropped > 0, flat[jnp.maximum(dropped, 1) - 1], -jnp.inf)
    return {name: s > threshold for name, s in scores.items()}


def _budgets(
    terms: Mapping[str, Adapter], target_rank: float, warmup: int, end: int, every: int
) -> tuple[np.ndarray, int]:
    """The budget at every allocation, and of all ranks, in float64 as PEFT's."""
    sizes = [_held(t)["e"].shape for t in terms.values()]
    total = sum(math.prod(shape) for shape in sizes)
    target = round(target_rank * sum(math.prod(shape[:-1]) for shape in sizes))
    if not 0 < target <= total:
        raise StructureError(
            f"target_rank={target_rank} means {target} ranks of {total}.\nGive the "
            "adapters a larger rank, about 1.5 times the target, by jlora.lorafy."
        )
    steps = np.arange(0, end + every, every)
    left = np.clip(1 - (steps - warmup) / (end - warmup), 0, 1)
    return ((total - target) * left**3 + target).astype(np.int32), total
