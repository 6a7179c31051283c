"""Fold adapters into their kernels, say what rounding cost, and undo it exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
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


def merge(tree: Tree, *, report: bool = False, undo: bool = False) -> Any:
    """Fold every adapter into its kernel.

    Each kernel becomes `base + scale * a @ b`, with DoRA brought to its magnitude,
    accumulated in float32 and rounded once to the base's dtype. Biases of adapters go
    into those of their layers. Fully trained leaves and rows become plain leaves.

    Args:
      tree: a lorafied tree.
      report: also return a `MergeReport`, with the part of each update lost to
        rounding (in bfloat16 that can be most of a small one).
      undo: also return what `unmerge` needs. It keeps the base arrays alive.

    Returns:
      The dense tree; with `report` or `undo` a tuple of it, the report, the undo.

    Raises:
      NonFiniteError: NaN or infinity in a base, an adapter, or their sum.
    """
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_node)
    leaves = {path_str(path): x for path, x in pairs}
    nodes = {path: x for path, x in leaves.items() if isinstance(x, LowRank | Rows)}
    tracing = _is_tracing(nodes)
    if tracing and report:
        raise StructureError(
            "a merge report needs numbers, and inside jax.jit there are none yet.\n"
            "Call jlora.merge(tree, report=True) outside of jit."
        )
    biases = bias_terms(leaves)
    done = {path: _merge_node(_bare(x)) for path, x in nodes.items()}
    plain = [
        done[path][0] if path in done else plain_leaf(x, biases.get(path))
        for path, x in leaves.items()
    ]
    if not tracing:
        finite = jax.device_get({path: ok for path, (_, ok) in done.items()})
        for path in (path for path, ok in finite.items() if not ok):
            _refuse(path, nodes[path])
    out = [jax.tree.unflatten(structure, plain)]
    if report:
        # In a pass of its own, so that asking for a report changes no bit.
        figures = {p: _figures(_bare(nodes[p]), x) for p, (x, _) in done.items()}
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


@jax.jit
def _merge_node(w: LowRank | Rows) -> tuple[Array, Array]:
    """The merged kernel or table, and whether all of it is finite.

    A GPU reads the base and writes the merged kernel in one pass of one kernel. XLA's
    programs for CPUs take as long for that as for a product, a sum and a check.
    """
    return lax.platform_dependent(
        w,
        cpu=lambda w: _sum_and_check(w, _has_finite_products, fusible=False),
        default=lambda w: _sum_and_check(w, _is_finite, fusible=True),
    )


def _sum_and_check(
    w: LowRank | Rows, is_finite: Callable[[Array], Array], *, fusible: bool
) -> tuple[Array, Array]:
    base = wide(w.base)
    if isinstance(w, Rows):
        whole = dataclasses.replace(w, base=base).merged()  # the rows' own bits
    else:
        whole = base + w.delta(fusible=fusible)
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


def _has_finite_products(x: Array) -> Array:
    """Whether all of x is finite, in one pass: times zero, infinity and NaN are NaN.

    A product with a vector runs in vectors on all cores. XLA's reduction of `isfinite`
    on a CPU does neither, and takes as long as the merge. The barriers keep XLA from
    knowing that the vector is zero, and from computing x a second time.
    """
    dims = tuple(range(x.ndim))
    x, zero = lax.optimization_barrier((x, jnp.zeros(x.shape[-1:], x.dtype)))
    # In full precision: TF32 would round the largest numbers up to infinity.
    products, _ = contract(x, dims, zero, dims[-1:], keep=(), precision="highest")
    return jnp.all(products == 0)


@jax.jit
def _figures(w: LowRank | Rows, merged: Array) -> dict[str, Array]:
    """What a report says of a kernel that `_merge_node` merged."""
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
    """The node without what merging it does not depend on.

    Kernels of one shape then share a program; with the path, which is static, each had
    its own, and a first merge compiled for a minute. Dropout's keys do not matter.
    """
    w = dataclasses.replace(w, path="")
    if isinstance(w, Rows):
        return w
    return w.map(w.base, lambda t: dataclasses.replace(t, **_IDLE))


_IDLE: dict[str, Any] = {
    "key": None, "bias": None, "dropout": 0.0, "rslora": False, "role": None
}  # fmt: skip


def _report_leaf(path: str, s: dict[str, Any]) -> MergedLeaf:
    lost = float(s["error"] / s["delta"]) if s["delta"] else 0.0
    return MergedLeaf(path, float(s["delta"]), lost, float(s["max"]), float(s["same"]))


def _refuse(path: str, w: LowRank | Rows) -> NoReturn:
    finite_base = jnp.all(jnp.isfinite(w.base))
    where = "its adapter or their sum" if finite_base else "its base"
    raise NonFiniteError(
        f"the kernel {path!r} {w.shape} {w.dtype} cannot be merged: NaN or infinity in "
        f"{where}.\nNothing was merged. Check the checkpoint, or the training run that "
        "made the adapter (a learning rate too high?)."
    )


def _is_tracing(tree: Tree) -> bool:
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


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
