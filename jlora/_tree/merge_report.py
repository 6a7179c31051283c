"""What merging did to each kernel, in numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora._kernel.axes import Array, accumulation_dtype
from jlora._kernel.nodes import LowRank, Rows
from jlora._kernel.quantized import dense
from jlora._kernel.rounding import steps_between
from jlora._text import table
from jlora._tree.merge_kernels import without_base


@dataclasses.dataclass(frozen=True)
class MergedLeaf:
    """What merging did to one kernel.

    Attributes:
      path: the kernel.
      delta_norm: Frobenius norm of the update `scale * a @ b`, in float32.
      lost: norm of the part of the update lost to rounding, over `delta_norm`: 0 is
        exact, 1 means that the merged kernel knows nothing of the update.
      relative_error: that part's norm over the norm of the exact kernel.
      max_error: largest absolute rounding error of one weight.
      unchanged: fraction of the weights that the update should have changed and whose
        bits are what they were.
      ulps: by how many of the dtype's numbers a weight moved, on average.
    """

    path: str
    delta_norm: float
    lost: float
    relative_error: float
    max_error: float
    unchanged: float
    ulps: float


class MergeReport(tuple[MergedLeaf, ...]):
    """One `MergedLeaf` a kernel; prints as a table."""

    def __str__(self) -> str:
        rows = [
            ("kernel", "|update|", "lost to rounding", "relative error", "max error",
             "unchanged", "ulps")
        ]  # fmt: skip
        rows += [
            (m.path, f"{m.delta_norm:.3g}", f"{m.lost:.2%}", f"{m.relative_error:.2g}",
             f"{m.max_error:.2g}", f"{m.unchanged:.2%}", f"{m.ulps:.3g}")
            for m in self
        ]  # fmt: skip
        return table(rows)


def merge_report(
    nodes: Mapping[str, LowRank | Rows], merged: Mapping[str, Array]
) -> MergeReport:
    """The report of merged kernels, by path.

    It is found in a pass of its own, so that asking for it changes no bit.
    """
    figures = {
        path: _figures(x.base, without_base(x), merged[path])
        for path, x in nodes.items()
    }
    stats = jax.device_get(figures)
    return MergeReport(_merged_leaf(path, s) for path, s in stats.items())


@jax.jit
def _figures(base: Array, w: LowRank | Rows, merged: Array) -> dict[str, Array]:
    base, merged = dense(base), dense(merged)
    w = dataclasses.replace(w, base=base)
    dtype = accumulation_dtype(w.dtype)
    wide, rounded = w.base.astype(dtype), merged.astype(dtype)
    if isinstance(w, Rows):
        delta = dataclasses.replace(w, base=wide).merged() - wide
    else:
        delta = w.delta()
    error = (rounded - wide) - delta
    moved = delta != 0
    before = w.base.astype(merged.dtype)  # where another dtype was asked for
    same = moved & (merged == before)
    return {
        "delta": _norm(delta),
        "error": _norm(error),
        "exact": _norm(wide + delta),
        "max": jnp.max(jnp.abs(error)),
        "same": jnp.sum(same) / jnp.maximum(jnp.sum(moved), 1),
        "ulps": jnp.mean(steps_between(before, merged)),
    }


def _norm(x: Array) -> Array:
    # Of any number of axes, and without the reshape that explicit sharding refuses.
    return jnp.sqrt(jnp.sum(jnp.square(x)))


def _merged_leaf(path: str, s: Mapping[str, Any]) -> MergedLeaf:
    def share(whole: Any) -> float:
        return float(s["error"] / whole) if whole else 0.0

    return MergedLeaf(
        path, float(s["delta"]), share(s["delta"]), share(s["exact"]),
        float(s["max"]), float(s["same"]), float(s["ulps"]),
    )  # fmt: skip
