"""`summary(tree)`: what is trained, as a table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from jlora._kernel.adapter import Adapter
from jlora._kernel.nodes import Full, LowRank, Rows, is_array, is_node
from jlora._kernel.quantized import Quantized
from jlora._paths import Tree, generalise, leaf_paths
from jlora._text import table


@dataclasses.dataclass(frozen=True)
class Row:
    """One trained kernel or leaf.

    Attributes:
      path: the kernel's path; of an adapter on a slice, with the slice's name.
      shape: the kernel's shape.
      rank: the adapter's rank, or None where the leaf, or rows of it, are trained.
      scale: alpha/r; NaN in an abstract tree, the first of a stack's.
      role: the role by which the target was found, if any; `"rows"` of a table.
      trainable: how many numbers are trained.
      bytes: their size.
    """

    path: str
    shape: tuple[int, ...]
    rank: int | None
    scale: float
    role: str | None
    trainable: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """What is trained in a tree; prints as a table, repeated layers in one line.

    Attributes:
      rows: one `Row` a trained kernel or leaf.
      trainable, total: numbers of parameters; the base counts once, a quantised one
        with all of its weights.
      trainable_bytes, total_bytes: their sizes.
    """

    rows: tuple[Row, ...]
    trainable: int
    total: int
    trainable_bytes: int
    total_bytes: int

    @property
    def fraction(self) -> float:
        """The trainable share of all parameters."""
        return self.trainable / max(self.total, 1)

    def __str__(self) -> str:
        lines = [("kernel", "layers", "shape", "rank", "scale", "trainable", "bytes")]
        for rows in _alike(self.rows):
            first, n = rows[0], len(rows)
            path = first.path if n == 1 else generalise(first.path)
            role = f" ({first.role})" if first.role else ""
            scale = "" if first.rank is None else f"{first.scale:g}"
            lines.append(
                (path + role, str(n), str(first.shape), str(first.rank or "full"),
                 scale, f"{n * first.trainable:,}", f"{n * first.bytes:,}")
            )  # fmt: skip
        return (
            f"{table(lines)}\n"
            f"trainable {self.trainable:,} of {self.total:,} parameters "
            f"({self.fraction:.3%}), {self.trainable_bytes:,} of "
            f"{self.total_bytes:,} bytes"
        )


def summary(tree: Tree) -> Summary:
    """What is trained in a lorafied tree, real or abstract.

    >>> tree = lorafy({"q": {"kernel": jnp.ones((4, 6))}}, rank=2, targets=["query"])
    >>> print(summary(tree))
    kernel            layers   shape  rank  scale  trainable  bytes
    ----------------  ------  ------  ----  -----  ---------  -----
    q/kernel (query)       1  (4, 6)     2      1         20     80
    trainable 20 of 44 parameters (45.455%), 80 of 176 bytes
    """
    rows: list[Row] = []
    total = total_bytes = 0
    paths, leaves = leaf_paths(tree, is_node), jax.tree.leaves(tree, is_leaf=is_node)
    for path, leaf in zip(paths, leaves, strict=True):
        if isinstance(leaf, LowRank):
            rows += _adapter_rows(path, leaf)
            leaf = leaf.base
        elif isinstance(leaf, Rows):
            rows.append(
                Row(path, leaf.shape, None, math.nan, "rows",
                    *_size([leaf.rows]))
            )  # fmt: skip
            leaf = leaf.base
        elif isinstance(leaf, Full):
            leaf = leaf.value
            size = _size([leaf])
            rows.append(Row(path, tuple(leaf.shape), None, math.nan, None, *size))
            continue
        count, size_bytes = _size([leaf])
        if isinstance(leaf, Quantized):
            held = jax.tree.leaves(leaf)
            count, size_bytes = math.prod(leaf.shape), _size(held)[1]
        total, total_bytes = total + count, total_bytes + size_bytes
    trainable = sum(r.trainable for r in rows)
    trainable_bytes = sum(r.bytes for r in rows)
    return Summary(
        tuple(rows), trainable, total + trainable, trainable_bytes,
        total_bytes + trainable_bytes,
    )  # fmt: skip


def _adapter_rows(kernel: str, w: LowRank) -> Iterable[Row]:
    for name, t in w.adapters.items():
        path = f"{kernel}/{name}" if name else kernel
        trained = _size(t.trained().values())
        yield Row(path, w.shape, t.rank, _scale(t), t.role, *trained)


def _scale(t: Adapter) -> float:
    concrete = isinstance(t.scale, jax.Array | np.ndarray)
    if not concrete or isinstance(t.scale, jax.core.Tracer):
        return math.nan
    return float(np.ravel(t.scale)[0])


def _size(arrays: Iterable[Any]) -> tuple[int, int]:
    arrays = [x for x in arrays if is_array(x)]
    counts = [math.prod(x.shape) for x in arrays]
    return sum(counts), sum(
        n * getattr(x.dtype, "itemsize", 0) for n, x in zip(counts, arrays, strict=True)
    )


def _alike(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of repeated layers together: equal but for the block's number."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        key = (generalise(row.path), row.shape, row.rank, str(row.scale), row.role)
        groups.setdefault(key, []).append(row)
    return list(groups.values())
