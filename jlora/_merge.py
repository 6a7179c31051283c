"""Fold adapters into their kernels, say what rounding cost, and undo it exactly."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora._errors import NonFiniteError, StructureError
from jlora._labels import Array, contract
from jlora._lowrank import LowRank, Rows, is_node, same_structure, wide
from jlora._paths import path_str
from jlora._resolve import bias_terms, plain_leaf

Tree = Any


@dataclasses.dataclass(frozen=True)
class MergedLeaf:
    """What merging did to one kernel.

    Attributes:
      path: the kernel.
      delta_norm: Frobenius norm of the update `scale * a @ b`, in float32.
      lost: norm of the part of the update lost to rounding, over `delta_norm`: 0 is
        exact, 1 means that the merged kernel knows nothing of the update.
      max_error: largest absolute rounding error of one weight.
      unchanged: fraction of the weights that the update should have changed and whose
        bits are what they were.
    """

    path: str
    delta_norm: float
    lost: float
    max_error: float
    unchanged: float


class MergeReport(tuple[MergedLeaf, ...]):
    """One `MergedLeaf` a kernel; prints as a table."""

    def __str__(self) -> str:
        rows = [("kernel", "|update|", "lost to rounding", "max error", "unchanged")]
        rows += [
            (m.path, f"{m.delta_norm:.3g}", f"{m.lost:.2%}", f"{m.max_error:.2g}",
             f"{m.unchanged:.2%}")
            for m in self
        ]  # fmt: skip
        return table(rows)


@dataclasses.dataclass(frozen=True)
class Undo:
    """What turns a merged tree back: the lorafied tree, whose arrays it shares."""

    lorafied: Tree


def merge(
    tree: Tree, *, report: bool = False, undo: bool = False, donate: bool = False
) -> Any:
    """Fold every adapter into its kernel.

    Each kernel becomes `base + scale * a @ b`, with DoRA brought to its magnitude,
    accumulated in float32 and rounded once to the base's dtype. Biases of adapters go
    into those of their layers. Fully trained leaves and rows become plain leaves.

    Args:
      tree: a lorafied tree.
      report: also return a `MergeReport`, with the part of each update lost to
        rounding (in bfloat16 that can be most of a small one).
      undo: also return what `unmerge` needs. It keeps the base arrays alive.
      donate: write each merged kernel over its base, so that no second model needs
        room (nor, on a CPU, new pages, which take longer than merging does). The bases
        are deleted in `tree`, and in the parameters it was made of, even where merging
        fails. A base that stands in the tree twice is kept.

    Returns:
      The dense tree; with `report` or `undo` a tuple of it, the report, the undo.

    Raises:
      NonFiniteError: NaN or infinity in a base, an adapter, or their sum.
      StructureError: a report inside `jax.jit`; `donate` there, or with what needs the
        bases; arrays that were donated before.
    """
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_node)
    leaves = {path_str(path): x for path, x in pairs}
    nodes = {path: x for path, x in leaves.items() if isinstance(x, LowRank | Rows)}
    tracing = _is_tracing(nodes)
    _refuse_options(tracing, report=report, undo=undo, donate=donate)
    if not tracing:
        _refuse_deleted(leaves)
    biases = bias_terms(leaves)
    given = _bases_of_their_own(leaves, nodes) if donate else ()
    done = {
        path: (_merge_onto if path in given else _merge_node)(x.base, _bare(x))
        for path, x in nodes.items()
    }
    plain = [
        done[path][0] if path in done else plain_leaf(x, biases.get(path))
        for path, x in leaves.items()
    ]
    if not tracing:
        finite = jax.device_get({path: ok for path, (_, ok) in done.items()})
        for path in (path for path, ok in finite.items() if not ok):
            _refuse(path, nodes[path], donated=bool(given))
    out = [jax.tree.unflatten(structure, plain)]
    if report:
        # In a pass of its own, so that asking for a report changes no bit.
        figures = {
            p: _figures(nodes[p].base, _bare(nodes[p]), x) for p, (x, _) in done.items()
        }
        stats = jax.device_get(figures)
        out.append(MergeReport(_report_leaf(p, s) for p, s in stats.items()))
    if undo:
        out.append(Undo(tree))
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
    again = merge(undo.lorafied)
    if not same_structure(again, merged):
        raise StructureError(
            "the merged tree and the undo are not of one tree.\nPass what one "
            "jlora.merge(tree, undo=True) returned."
        )
    changed = [
        path_str(path)
        for (path, x), y in zip(
            jax.tree_util.tree_leaves_with_path(again), jax.tree.leaves(merged),
            strict=True,
        )
        if not _same_bits(x, y)
    ]  # fmt: skip
    if changed:
        raise StructureError(
            f"{len(changed)} merged leaves were changed since the merge, "
            f"{changed[:3]} first: unmerging would lose the change.\nTrain before "
            "merging, or make a new adapter on the merged tree with jlora.lorafy."
        )
    return undo.lorafied


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


def _refuse_deleted(leaves: Mapping[str, Any]) -> None:
    for path, leaf in leaves.items():
        arrays = (x for x in jax.tree.leaves(leaf) if isinstance(x, jax.Array))
        gone = next((x for x in arrays if x.is_deleted()), None)
        if gone is not None:
            raise StructureError(
                f"an array {gone.shape} {gone.dtype} of {path!r} is gone: it was "
                "donated, to a jitted function or to jlora.merge(donate=True).\nMerge "
                "what that returned, or load the parameters again."
            )


def _bases_of_their_own(
    leaves: Mapping[str, Any], nodes: Mapping[str, Any]
) -> frozenset[str]:
    """The nodes whose bases are nobody else's in the tree."""
    places = {path: _place(x.base) for path, x in nodes.items()}
    others = jax.tree.leaves([x for path, x in leaves.items() if path not in nodes])
    uses = collections.Counter([*places.values(), *map(_place, others)])
    return frozenset(path for path, place in places.items() if uses[place] == 1)


def _place(x: Any) -> int:
    """What two arrays on one piece of memory have in common; others do not."""
    if not isinstance(x, jax.Array) or jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return id(x)
    shards = x.addressable_shards
    return shards[0].data.unsafe_buffer_pointer() if shards else id(x)


def _merged(base: Array, bare: LowRank | Rows) -> tuple[Array, Array]:
    """The merged kernel or table, and whether all of it is finite.

    Of a small rank one pass reads the base and writes the merged kernel, over the base
    where that is donated: there is no dense update in memory. Only the check differs.
    """
    return lax.platform_dependent(
        dataclasses.replace(bare, base=base),
        cpu=lambda w: _sum_and_check(w, _is_finite_on_cpu, _FUSED_ON_CPU),
        default=lambda w: _sum_and_check(w, _is_finite, _FUSED),
    )


# A weight of a fused update reads 2 r factors from the nearest cache, which up to these
# ranks takes less time than writing and reading a dense update.
_FUSED_ON_CPU = 8
_FUSED = 16

_merge_node = jax.jit(_merged)
_merge_onto = jax.jit(_merged, donate_argnums=0)


def _sum_and_check(
    w: LowRank | Rows, is_finite: Callable[[Array], Array], fuse_up_to: int
) -> tuple[Array, Array]:
    base = wide(w.base)
    if isinstance(w, Rows):
        whole = dataclasses.replace(w, base=base).merged()  # the rows' own bits
    else:
        whole = base + w.delta(fuse_up_to=fuse_up_to)
    merged = _rounded(whole, w.dtype)
    return merged, is_finite(merged)


def _rounded(x: Array, dtype: Any) -> Array:
    """X in the dtype. XLA may keep a cast to bfloat16 and back; a rounding stays."""
    info = jnp.finfo(dtype)
    largest = (2 - 2.0**-info.nmant) * 2.0 ** (2 ** (info.nexp - 1) - 1)
    if float(info.max) == largest:  # as IEEE has it, and not float8_e4m3fn
        x = lax.reduce_precision(x, info.nexp, info.nmant)
    return x.astype(dtype)


def _is_finite(x: Array) -> Array:
    return jnp.all(jnp.isfinite(x))


def _is_finite_on_cpu(x: Array) -> Array:
    """Whether all of x is finite, by what runs in vectors and on all cores.

    XLA's reduction to one value does neither on a CPU, and takes as long as the merge.
    A product with a vector does: times zero, infinity and NaN are NaN. The barriers
    keep XLA from knowing that the vector is zero, and from computing x a second time.
    What is narrower than float32 a product would widen first, to an array of its own;
    there each column is reduced, then all of them.
    """
    if x.dtype.itemsize < 4:
        return jnp.all(lax.optimization_barrier(jnp.all(jnp.isfinite(x), axis=0)))
    dims = tuple(range(x.ndim))
    x, zero = lax.optimization_barrier((x, jnp.zeros(x.shape[-1:], x.dtype)))
    # In full precision: TF32 would round the largest numbers up to infinity.
    products, _ = contract(x, dims, zero, dims[-1:], keep=(), precision="highest")
    return jnp.all(products == 0)


@jax.jit
def _figures(base: Array, bare: LowRank | Rows, merged: Array) -> dict[str, Array]:
    """What a report says of a kernel that `_merge_node` merged."""
    w = dataclasses.replace(bare, base=base)
    base, rounded = wide(w.base), wide(merged)
    if isinstance(w, Rows):
        delta = dataclasses.replace(w, base=base).merged() - base
    else:
        delta = w.delta()
    error = (rounded - base) - delta
    moved = delta != 0
    same = moved & (merged == w.base)
    return {
        "delta": _norm(delta),
        "error": _norm(error),
        "max": jnp.max(jnp.abs(error)),
        "same": jnp.sum(same) / jnp.maximum(jnp.sum(moved), 1),
    }


def _norm(x: Array) -> Array:
    # Of any number of axes, and without the reshape that explicit sharding refuses.
    return jnp.sqrt(jnp.sum(jnp.square(x)))


def _bare(w: LowRank | Rows) -> LowRank | Rows:
    """The node without its base, and without what merging does not depend on.

    Kernels of one shape then share a program; with the path, which is static, each had
    its own, and a first merge compiled for a minute. Dropout's keys do not matter.
    """
    if isinstance(w, Rows):
        return dataclasses.replace(w, base=None, path="")
    idle = {n: dataclasses.replace(t, **_IDLE) for n, t in w.adapters.items()}
    return LowRank(None, idle)


_IDLE: dict[str, Any] = {
    "key": None, "bias": None, "dropout": 0.0, "rslora": False, "role": None
}  # fmt: skip


def _report_leaf(path: str, s: dict[str, Any]) -> MergedLeaf:
    lost = float(s["error"] / s["delta"]) if s["delta"] else 0.0
    return MergedLeaf(path, float(s["delta"]), lost, float(s["max"]), float(s["same"]))


def _refuse(path: str, w: LowRank | Rows, *, donated: bool) -> NoReturn:
    done = "Nothing was merged."
    if donated:
        done = "The bases were donated and are gone: load them again."
    if isinstance(w.base, jax.Array) and w.base.is_deleted():
        where = "its base, its adapter or their sum"
    elif jnp.all(jnp.isfinite(w.base)):
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
    if not hasattr(x, "dtype") or jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return bool(np.all(x == y))
    x, y = np.asarray(x), np.asarray(y)
    return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as aligned text, the first column left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: tuple[str, ...]) -> Iterator[str]:
        for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
            yield cell.rjust(width) if i else cell.ljust(width)

    lines = ["  ".join(line(row)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
