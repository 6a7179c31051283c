"""`survey(fn, params, *args)`: how a function uses each of its parameters.

The jaxpr is read, never run. Each leaf is followed through layout changes and inner
programs to the primitives that consume it; those tell which of its axes are inputs,
outputs or stacks, where names and numbers of dimensions could only be guessed at.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jlora._kernel.axes import Dims
from jlora._kernel.nodes import is_array, is_node
from jlora._kernel.quantized import Quantized
from jlora._paths import leaves_by_path
from jlora._text import table
from jlora._transform.uses import LeafAxes, Use, Walk, one_to_one

Tree = Any


@dataclasses.dataclass(frozen=True)
class LeafUses:
    """A leaf and all its uses, in the program's order."""

    path: str
    shape: tuple[int, ...]
    dtype: Any
    uses: tuple[Use, ...]

    def axes(self) -> tuple[Dims, Dims, Dims, bool]:
        """Inputs, outputs, stacks, and whether it is an embedding table.

        A table that is looked up and also multiplied (a tied head) has one adapter,
        factored as the lookup wants it.
        """
        kernels = [u for u in self.uses if u.is_kernel]
        use = next((u for u in kernels if u.kind == "gather"), kernels[0])
        return use.in_axes, use.out_axes, use.batch_axes, use.kind == "gather"

    def adapter_size(self, rank: int = 1) -> int:
        """How many numbers an adapter of that rank has."""
        ins, outs, batch, _ = self.axes()
        sizes = [math.prod(self.shape[d] for d in dims) for dims in (ins, outs, batch)]
        return rank * sizes[2] * (sizes[0] + sizes[1])


@dataclasses.dataclass(frozen=True)
class Survey:
    """What `survey` found, by leaf; prints as a table."""

    leaves: Mapping[str, LeafUses]

    def knows(self, path: str) -> bool:
        """Whether the leaf was among the surveyed parameters."""
        return path in self.leaves

    def is_kernel(self, path: str) -> bool:
        """Whether the leaf is contracted or looked up somewhere."""
        return any(u.is_kernel for u in self.leaves[path].uses)

    def axes(self, path: str) -> tuple[Dims, Dims, Dims, bool]:
        """A kernel's inputs, outputs and stacks; whether it is an embedding table."""
        return self.leaves[path].axes()

    def kernels(self) -> list[str]:
        """Every leaf that an adapter could serve."""
        return [path for path in self.leaves if self.is_kernel(path)]

    def convolutions(self) -> list[str]:
        """Every kernel that is convolved with an input."""
        return [
            path
            for path, leaf in self.leaves.items()
            if any(u.is_kernel and u.kind == "conv" for u in leaf.uses)
        ]

    def matmul_kernels(self) -> list[str]:
        """Every leaf that is multiplied with an input, and never looked up."""
        return [
            path
            for path, leaf in self.leaves.items()
            if any(u.is_kernel and u.kind == "matmul" for u in leaf.uses)
            and not any(u.kind == "gather" for u in leaf.uses)
        ]

    def __str__(self) -> str:
        rows = [("leaf", "shape", "uses", "FLOPs", "adapter, per rank")]
        for leaf in self.leaves.values():
            uses = ", ".join(dict.fromkeys(str(u) for u in leaf.uses)) or "none"
            flops = sum(u.flops for u in leaf.uses)
            size = f"{leaf.adapter_size():,}" if self.is_kernel(leaf.path) else ""
            rows.append(
                (leaf.path, str(leaf.shape), uses, f"{flops:,}" if flops else "", size)
            )
        return table(rows)


def survey(fn: Callable[..., Any], params: Tree, *args: Any, **kwargs: Any) -> Survey:
    """Read off a function's program how it uses each parameter.

    Args:
      fn: the function, `fn(params, *args, **kwargs)`.
      params: the plain tree that `lorafy` will get: arrays or `ShapeDtypeStruct`s.
      *args: further arguments, arrays or shapes; others are handed on as they are.
      **kwargs: likewise.

    Returns:
      A `Survey` for `lorafy(params, survey=...)`. Nothing is computed or allocated.

    >>> use = lambda p, x: x @ p["kernel"] + p["bias"]
    >>> shape = jax.ShapeDtypeStruct
    >>> params = {"kernel": shape((3, 2), "float32"), "bias": shape((2,), "float32")}
    >>> print(survey(use, params, shape((5, 3), "float32")))
    leaf     shape             uses  FLOPs  adapter, per rank
    ------  ------  ---------------  -----  -----------------
    bias      (2,)             bias
    kernel  (3, 2)  matmul [0]->[1]     60                  5
    """
    params, args, kwargs = _as_dense((params, args, kwargs))
    leaves, treedef = jax.tree.flatten((params, args, kwargs), is_leaf=is_node)
    traced = [i for i, x in enumerate(leaves) if is_array(x)]

    def flat(*arrays: Any) -> Any:
        full = list(leaves)
        for i, x in zip(traced, arrays, strict=True):
            full[i] = x
        p, a, k = jax.tree.unflatten(treedef, full)
        return jax.tree.leaves(fn(p, *a, **k))

    jaxpr = jax.make_jaxpr(flat)(*[leaves[i] for i in traced])
    named = leaves_by_path(params, is_leaf=is_node)
    arrays = {path: x for path, x in named.items() if is_array(x)}
    walk = Walk({path: [] for path in arrays})
    places = [(LeafAxes(p, one_to_one(x.shape)),) for p, x in arrays.items()]
    walk.follow(jaxpr, [*places, *[()] * (len(traced) - len(places))], 1)
    return Survey(
        {
            path: LeafUses(path, tuple(x.shape), x.dtype, tuple(walk.uses[path]))
            for path, x in arrays.items()
        }
    )


def _as_dense(tree: Tree) -> Tree:
    """The tree with the shapes of dense kernels in the place of quantised ones."""

    def one(x: Any) -> Any:
        is_quantized = isinstance(x, Quantized)
        return jax.ShapeDtypeStruct(x.shape, x.dtype) if is_quantized else x

    return jax.tree.map(one, tree, is_leaf=is_node)
