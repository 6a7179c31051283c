"""Fold adapters into their kernels, say what rounding cost, and undo it exactly."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NoReturn, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jlora._errors import NonFiniteError, OptionError, StructureError
from jlora._kernel.bank import refuse_activated, refuse_banks
from jlora._kernel.nodes import LowRank, Rows, is_node
from jlora._kernel.quantized import Quantized, dense
from jlora._paths import leaf_paths, leaves_by_path
from jlora._transform.resolve import bias_terms, plain_leaf
from jlora._tree import options
from jlora._tree.initializers import leaf_key
from jlora._tree.merge_kernels import merge_kernels, merge_node, without_base
from jlora._tree.merge_report import merge_report

Tree = Any
Rounding = Literal["nearest", "stochastic"]


@dataclasses.dataclass(frozen=True)
class Undo:
    """What turns a merged tree back; it shares the arrays of both trees.

    Attributes:
      lorafied: what was merged.
      leaves, structure: what came of it, to tell whether that was changed since.
    """

    lorafied: Tree
    leaves: tuple[Any, ...]
    structure: Any


def merge(
    tree: Tree, *, report: bool = False, undo: bool = False, donate: bool = False,
    rounding: Rounding = "nearest", key: jax.Array | None = None,
    requantize: bool = False, dtype: jax.typing.DTypeLike | None = None,
) -> Any:  # fmt: skip
    """Fold every adapter into its kernel.

    Each kernel becomes `base + scale * a @ b` (with DoRA scaled to its magnitude),
    summed in float32 and rounded once to the base's dtype. Biases of adapters are added
    to those of their layers. Fully trained leaves and rows become plain leaves, and
    quantised kernels become dense, in the dtype that they had before quantisation.

    Args:
      tree: a lorafied tree.
      report: also return a `MergeReport`, with the part of each update lost to
        rounding (in bfloat16 that can be most of a small one).
      undo: also return what `unmerge` needs. It keeps the arrays of both trees alive.
      donate: write each merged kernel over its base, so that no room for a second model
        is needed (nor, on a CPU, new pages, which take longer than merging does). The
        bases are deleted in `tree`, and in the parameters it was made from, even if
        merging fails. A base is kept if the tree holds it twice, if it is quantised, or
        if `dtype` is another than its own.
      rounding: how a float32 sum is rounded to the kernel's dtype: to the `"nearest"`
        number, or `"stochastic"`: to one of its two neighbours, at random, so that the
        merged weight is exact on average. A small update that nearest rounding
        drops weight by weight is then kept in the sum over many weights. (Dtypes as
        wide as the sum are not rounded. Biases and trained rows round to nearest.)
      key: for the random numbers of `"stochastic"`; each leaf's path is folded into it.
      requantize: quantise again what was quantised, in the same form. The report says
        what that and rounding lose together; in 4 bits it is often more than the
        update, so prefer a dense kernel where quality counts.
      dtype: of every floating-point leaf of the dense tree; None keeps each leaf's own.
        Sums are rounded to it once, not to the base's dtype first.

    Returns:
      The dense tree; with `report` or `undo` a tuple of it, the report, the undo.

    Raises:
      NonFiniteError: NaN or infinity in a base, an adapter, or their sum.
      StructureError: two leaves with one path; a bank of adapters; a report inside
        `jax.jit`; `donate` there, or with what needs the bases; arrays that were
        donated before.
      OptionError: an unknown `rounding`; a `key` where none is used, or none where one
        is needed; a `dtype` that holds no fractions, or one together with `requantize`.
    """
    dtype = _checked_dtype(dtype, requantize)
    refuse_banks(tree, "jlora.merge")
    refuse_activated(tree, "jlora.merge")
    leaves = leaves_by_path(tree, is_leaf=is_node)
    structure = jax.tree.structure(tree, is_leaf=is_node)
    nodes = {path: _as_node(x) for path, x in leaves.items() if _is_merged(x)}
    if requantize:  # what has no adapter stays as it is, to the bit
        nodes = {p: x for p, x in nodes.items() if not isinstance(leaves[p], Quantized)}
    tracing = _is_tracing(nodes)
    _refuse_options(tracing, report=report, undo=undo, donate=donate)
    keys = _rounding_keys(nodes, rounding, key)
    if not tracing:
        _refuse_deleted(leaves)
    biases = bias_terms(leaves)
    given = _bases_of_their_own(leaves, nodes, dtype) if donate else ()
    if tracing:
        done = {
            path: merge_node(
                x.base, without_base(x), keys.get(path), requantize, dtype
            )[0]
            for path, x in nodes.items()
        }
    else:
        done, bad = merge_kernels(nodes, given, keys, requantize, dtype)
        if bad is not None:
            _refuse(bad, nodes[bad], donated=bool(given))
    plain = [
        done[path] if path in done else plain_leaf(x, biases.get(path), dtype)
        for path, x in leaves.items()
    ]
    out = [jax.tree.unflatten(structure, plain)]
    if report:
        out.append(merge_report(nodes, done))
    if undo:
        merged, treedef = jax.tree.flatten(out[0])
        out.append(Undo(tree, tuple(merged), treedef))
    return out[0] if len(out) == 1 else tuple(out)


def unmerge(merged: Tree, undo: Undo) -> Tree:
    """The lorafied tree that `merge(tree, undo=True)` came from, bit for bit.

    Subtracting the update would not give the base back: in bfloat16 over 40 % of the
    weights come out different. The base is kept instead.

    Args:
      merged: the merged tree. It must still be what `merge` returned.
      undo: from `merge(tree, undo=True)`.

    Raises:
      StructureError: `merged` is of another tree, or was changed since.
    """
    leaves, structure = jax.tree.flatten(merged)
    if structure != undo.structure:
        raise StructureError(
            "the merged tree and the undo are not of one tree.\nPass what one "
            "jlora.merge(tree, undo=True) returned."
        )
    each = zip(leaf_paths(merged), undo.leaves, leaves, strict=True)
    changed = [path for path, x, y in each if not _same_bits(x, y)]
    if changed:
        raise StructureError(
            f"{len(changed)} merged leaves were changed since the merge, "
            f"{changed[:3]} first: unmerging would lose the change.\nTrain before "
            "merging, or make a new adapter on the merged tree with jlora.lorafy."
        )
    return undo.lorafied


def _is_merged(x: Any) -> bool:
    return isinstance(x, LowRank | Rows | Quantized)


def _as_node(x: Any) -> LowRank | Rows:
    return LowRank(x, {}, x.path) if isinstance(x, Quantized) else x


def _checked_dtype(dtype: Any, requantize: bool) -> Any:
    if dtype is None:
        return None
    known = options.floating(dtype)
    if known is None:
        raise OptionError(
            f"dtype={dtype!r}: expected one of floating-point numbers, such as "
            "'bfloat16'."
        )
    if requantize:
        raise OptionError(
            "requantize=True keeps quantised kernels in their form, and dtype= makes "
            "them dense.\nLeave one of the two out."
        )
    return known


def _refuse_options(tracing: bool, *, report: bool, undo: bool, donate: bool) -> None:
    if tracing and report:
        raise StructureError(
            "a merge report needs numbers, and inside jax.jit there are none yet.\n"
            "Call jlora.merge(tree, report=True) outside of jit."
        )
    if donate and (report or undo):
        raise StructureError(
            "a report and an undo need the bases that jlora.merge(donate=True) writes "
            "over.\nLeave out one or the other."
        )
    if donate and tracing:
        raise StructureError(
            "inside jax.jit jlora.merge(donate=True) has no memory to give.\nDonate "
            "the tree to the jitted function: jax.jit(f, donate_argnums=0)."
        )


def _rounding_keys(
    nodes: Mapping[str, Any], rounding: Rounding, key: jax.Array | None
) -> dict[str, jax.Array]:
    """Each kernel's own key, by path; of nearest rounding none."""
    options.one_of("rounding", rounding, get_args(Rounding))
    if (rounding == "stochastic") != (key is not None):
        raise OptionError(
            f"rounding={rounding!r} with key={key}: stochastic rounding needs a key, "
            "and nothing else does.\nPass rounding='stochastic', key=jax.random.key(0)."
        )
    if key is None:
        return {}
    key = options.single_key(key)
    return {path: leaf_key(key, path) for path in nodes}


def _refuse_deleted(leaves: Mapping[str, Any]) -> None:
    for path, leaf in leaves.items():
        gone = next(filter(_is_deleted, jax.tree.leaves(leaf)), None)
        if gone is not None:
            raise StructureError(
                f"an array {gone.shape} {gone.dtype} of {path!r} is gone: it was "
                "donated, to a jitted function or to jlora.merge(donate=True).\nMerge "
                "what that returned, or load the parameters again."
            )


def _is_deleted(x: Any) -> bool:
    return isinstance(x, jax.Array) and x.is_deleted()


def _bases_of_their_own(
    leaves: Mapping[str, Any], nodes: Mapping[str, Any], dtype: Any
) -> frozenset[str]:
    """The nodes whose bases are nobody else's in the tree, and of the dtype."""
    places = {path: _memory_of(x.base) for path, x in nodes.items()}
    others = jax.tree.leaves([x for path, x in leaves.items() if path not in nodes])
    uses = collections.Counter([*places.values(), *map(_memory_of, others)])
    arrays = (p for p, x in nodes.items() if not isinstance(x.base, Quantized))
    return frozenset(
        path
        for path in arrays
        if uses[places[path]] == 1 and dtype in (None, nodes[path].dtype)
    )


def _memory_of(x: Any) -> int:
    """What two arrays on one piece of memory have in common; others do not."""
    if not isinstance(x, jax.Array) or jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return id(x)
    shards = x.addressable_shards
    return shards[0].data.unsafe_buffer_pointer() if shards else id(x)


def _refuse(path: str, w: LowRank | Rows, *, donated: bool) -> NoReturn:
    done = "Nothing was merged."
    if donated:
        done = "The bases were donated and are gone: load them again."
    if isinstance(w.base, jax.Array) and w.base.is_deleted():
        where = "its base, its adapter or their sum"
    elif jnp.all(jnp.isfinite(dense(w.base))):
        where = "its adapter or their sum"
    else:
        where = "its base"
    raise NonFiniteError(
        f"the kernel {path!r} {w.shape} {w.dtype} cannot be merged: NaN or infinity in "
        f"{where}.\n{done} Check the checkpoint, or the training run that made the "
        "adapter (a learning rate too high?)."
    )


def _is_tracing(tree: Tree) -> bool:
    """Whether what is computed of the tree here has no numbers yet.

    Inside `jax.jit` that holds for arrays from outside of it too, as for a new one.
    """
    arrays = [*jax.tree.leaves(tree), jnp.zeros(())]
    return any(isinstance(x, jax.core.Tracer) for x in arrays)


def _same_bits(x: Any, y: Any) -> bool:
    if x is y:
        return True
    if any(isinstance(v, jax.core.Tracer) or _is_deleted(v) for v in (x, y)):
        return False
    if not hasattr(x, "dtype") or jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return bool(np.all(x == y))
    x, y = np.asarray(x), np.asarray(y)
    return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
