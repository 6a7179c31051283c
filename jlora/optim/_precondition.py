"""Gradients of one factor in the geometry of the other, and LoRA with A frozen.

With the Gram matrices of the factors over the rank, `a [in, r]` and `b [r, out]`:

    riemannian     ∇a · (b·bᵀ + δI)⁻¹      (aᵀ·a + δI)⁻¹ · ∇b
    LoRA-FA        0                        (aᵀ·a + δI)⁻¹ · ∇b / scale²

All Gram matrices of one rank are inverted together, in a loop over the rank that XLA
compiles. With LAPACK's batched inverse a step stood still on two CPU threads (the cause
was not found), and a GPU's library does small matrices one by one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jlora._compat import is_explicit, on_mesh_of, reshard, sharded_like
from jlora._errors import StructureError
from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import RANK, Array, Dims, accumulation_dtype, align, contract
from jlora._paths import Tree
from jlora._tree.partition import labels
from jlora.optim._options import positive
from jlora.optim._terms import Term, map_terms, needed, terms_of

_RANK_TOO = -2  # the other rank axis of a Gram matrix


def riemannian(delta: float = 1e-6) -> optax.GradientTransformation:
    """Scaled gradients. It comes before the optimiser, in `optax.chain`.

    Of all steps that change `a @ b` by as much, those downhill in a metric that the
    two factors' sizes do not matter for; large ranks and rates are stabler for it.
    `optax.chain(riemannian(), optax.adamw(...))` is the paper's scaled AdamW, and with
    `optax.sgd` it is scaled gradient descent.

    Args:
      delta: added to the diagonals, so that B may start at zero.

    Returns:
      A transformation whose `update` needs `params`, the trainable half. It keeps no
      state. Leaves that are no factors pass unchanged.

    Raises:
      OptionError: `delta` is not above 0, or `update` got no `params`.
      StructureError: an adapter of another form than LoRA, DoRA or PiSSA, which has no
        such pair of factors, unless it is masked.

    Source: Zhang and Pilanci 2024, arXiv:2402.02347, algorithm 1.

    >>> tx = optax.chain(riemannian(), optax.adamw(1e-3))
    """
    positive(delta=delta)

    def update(grads: Tree, params: Tree | None) -> Tree:
        half = needed(params, "riemannian")
        _refuse_forms(half, "riemannian", "scale")
        terms = _pairs(half)
        of_a = _inverses({n: _gram(t, "a") for n, t in terms.items()}, delta)
        of_b = _inverses({n: _gram(t, "b") for n, t in terms.items()}, delta)

        def one(name: Term, g: Adapter) -> Adapter:
            if name not in terms:
                return g
            a, b = _times(of_b[name], g, "a"), _times(of_a[name], g, "b")
            return dataclasses.replace(g, a=a, b=b)

        return map_terms(one, grads)

    return optax.stateless(update)


def lora_fa(
    tx: optax.GradientTransformation, tree: Tree, *, delta: float = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """LoRA-FA: A stays as it is, and `tx` trains the rest.

    B's gradient is projected: with A fixed, `a @ b` moves as close to the full
    gradient as it can. A has no state in the optimiser. In a jitted step its gradient
    is dead code, which XLA drops, and with it the activations that were kept for it,
    `[tokens, in]` for each kernel; `[tokens, r]` remain. (What reads all gradients,
    `optax.clip_by_global_norm` say, keeps them alive: put it into `tx`.)

    Args:
      tx: the optimiser of all that is trained but A.
      tree: the lorafied tree with numbers in it, which tells each adapter's scale.
      delta: added to the diagonals.

    Raises:
      OptionError: `delta` is not above 0, or `update` got no `params`.
      StructureError: `tree` has no adapters or no numbers; an A of zeros, as
        embeddings' start: with A fixed nothing would be trained.

    Source: Zhang et al. 2023, arXiv:2308.03303, and for the projection PEFT's
    `LoraFAOptimizer`.

    >>> tree = jlora.lorafy({"query": jnp.ones((3, 5))}, 2, ["query"])
    >>> tx = lora_fa(optax.adamw(1e-3), tree)
    """
    positive(delta=delta)
    scales = _scales(tree)

    def project(grads: Tree, params: Tree | None) -> Tree:
        terms = _pairs(needed(params, "lora_fa"))
        if not terms.keys() <= scales.keys():
            path = next(path for path, _ in terms if path not in dict(scales))
            raise StructureError(
                f"lora_fa was made of a tree without the adapter {path!r}.\nMake it of "
                "the tree that is trained."
            )
        inverse = _inverses({n: _gram(t, "a") for n, t in terms.items()}, delta)

        def one(name: Term, g: Adapter) -> Adapter:
            if name not in terms:
                return g
            dims = tuple(d for d in g.b_dims if d in g.s_dims)
            scale = jnp.asarray(scales[name], inverse[name].dtype)
            square = jnp.square(align(scale, g.s_dims, dims))
            return dataclasses.replace(
                g, b=_times(inverse[name] / square[..., None, None], g, "b")
            )

        return map_terms(one, grads)

    def groups(half: Tree) -> Tree:
        return jax.tree.map(lambda n: "fixed" if n == "a" else "trained", labels(half))

    each = {"trained": tx, "fixed": optax.set_to_zero()}
    return optax.chain(optax.stateless(project), optax.partition(each, groups))


def _pairs(tree: Tree) -> dict[Term, Adapter]:
    """The adapters whose two factors are there."""
    return {
        name: t
        for name, t in terms_of(tree).items()
        if hasattr(t.a, "shape") and hasattr(t.b, "shape")
    }


def _refuse_forms(tree: Tree, name: str, what: str) -> None:
    """Refuse adapters that are trained as something else than two factors.

    What `optax.masked` hides holds no arrays, and is nobody's business here.
    """
    for (path, _), t in terms_of(tree).items():
        if t.form and any(hasattr(x, "shape") for x in t.trained().values()):
            factors = "factor A" if what == "fix" else "factors A and B"
            raise StructureError(
                f"{name}: the adapter of {path!r} is of the form {t.form!r} and has no "
                f"{factors} to {what}.\nUse LoRA, or another optimiser."
            )


def _scales(tree: Tree) -> dict[Term, np.ndarray]:
    """Each adapter's scale as a constant."""
    _refuse_forms(tree, "lora_fa", "fix")
    terms = _pairs(tree)
    if not terms:
        raise StructureError(
            "lora_fa: the tree holds no adapters.\nPass what jlora.lorafy returned."
        )
    for (path, _), t in terms.items():
        if not all(isinstance(x, jax.Array | np.ndarray) for x in (t.a, t.scale)):
            raise StructureError(
                f"lora_fa: the adapter of {path!r} has no scale with a number in it.\n"
                "Pass the whole lorafied tree, neither a half of it nor its shapes."
            )
        if not isinstance(t.a, jax.core.Tracer) and not jnp.any(t.a):
            raise StructureError(
                f"lora_fa: the factor A of {path!r} is zero, as an embedding's is at "
                "first, and stays so: its adapter would be trained in vain.\nLeave the "
                "kernel out of targets, or start A at random: Target(init=...)."
            )
    return {name: np.asarray(t.scale) for name, t in terms.items()}


# -- Gram matrices ---------------------------------------------------------------------


def _gram(t: Adapter, name: str) -> Array:
    """`aᵀ·a` or `b·bᵀ` over the rank, `[*batch, r, r]` in the batch's order in `a`."""
    x, dims = _factor(t, name)
    x = x.astype(accumulation_dtype(x.dtype))
    too = tuple(_RANK_TOO if d == RANK else d for d in dims)
    out, labels = contract(x, dims, x, too, t.batch_axes, precision="highest")
    return align(out, labels, (*t.batch_axes, RANK, _RANK_TOO))


def _factor(t: Adapter, name: str) -> tuple[Array, Dims]:
    return (t.a, t.a_dims) if name == "a" else (t.b, t.b_dims)


def _inverses(grams: Mapping[Term, Array], delta: float) -> dict[Term, Array]:
    """`(G + δI)⁻¹` of each, those of one rank in one call.

    Directions that have no size beside the largest count as zero, in the inverse too:
    their gradients are rounding errors, which `1/δ` would raise to the skies.
    """
    groups: dict[Any, list[Term]] = {}
    for name, g in grams.items():
        groups.setdefault((g.shape[-1], g.dtype), []).append(name)
    out: dict[Term, Array] = {}
    for (rank, dtype), names in groups.items():
        flat = [_everywhere(grams[name]).reshape(-1, rank, rank) for name in names]
        eye = delta * jnp.eye(rank, dtype=dtype)[None]
        all_at_once = jnp.concatenate(flat) + eye
        tiny = rank * float(jnp.finfo(dtype).eps)
        inverse = _inverse(all_at_once, tiny)
        at = 0
        for name in names:
            gram = grams[name]
            end = at + math.prod(gram.shape[:-2])
            mine = inverse[at:end].reshape(gram.shape)
            out[name] = sharded_like(mine, gram) if is_explicit(gram) else mine
            at = end
    return out


def _inverse(grams: Array, tiny: float) -> Array:
    """Inverses of positive matrices `[n, r, r]` by sweeping one axis after the other.

    An axis of which next to nothing is left once those before it are swept gets zeros.

    Source: Goodnight 1979, "A tutorial on the SWEEP operator".
    """
    rank = grams.shape[-1]
    most = jnp.max(jnp.diagonal(grams, axis1=1, axis2=2), axis=1)

    def sweep(k: Array, m: Array) -> Array:
        at = lambda axis: lax.dynamic_slice_in_dim(m, k, 1, axis)  # noqa: E731
        row, column = at(1), at(2)  # [n, 1, r], [n, r, 1]
        pivot = lax.dynamic_slice_in_dim(row, k, 1, 2)
        there = pivot > tiny * most[:, None, None]
        over = jnp.where(there, 1 / jnp.where(there, pivot, 1), 0)
        is_row = (jnp.arange(rank) == k)[None, :, None]
        is_column = (jnp.arange(rank) == k)[None, None, :]
        m = m - column * (row * over)
        m = jnp.where(is_row, row * over, m)
        m = jnp.where(is_column, -column * over, m)
        return jnp.where(is_row & is_column, over, m)

    return lax.fori_loop(0, rank, sweep, grams)


def _everywhere(x: Array) -> Array:
    """X on every device, where explicit sharding would not join it with others."""
    if not is_explicit(x):
        return x
    return reshard(x, on_mesh_of(x, [None] * x.ndim))


def _times(inverse: Array, g: Adapter, name: str) -> Array:
    """The gradient of one factor, its rank axis multiplied by a matrix."""
    x, dims = _factor(g, name)
    too = tuple(_RANK_TOO if d == RANK else d for d in dims)
    batch = g.batch_axes
    out, labels = contract(
        inverse, (*batch, RANK, _RANK_TOO), x.astype(inverse.dtype), too, batch,
        precision="highest",
    )  # fmt: skip
    return align(out, labels, dims).astype(x.dtype)
