"""Merged kernels: what is computed of a node, and of how many in one program."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._kernel.axes import Array, contract, rounded
from jlora._kernel.nodes import LowRank, Rows

Node = LowRank | Rows

# A CPU runs the kernels of one program beside each other, and waits between programs. A
# GPU runs one while the next is called. Each kernel more takes 5 to 10 ms to compile.
_TOGETHER_ON_CPU = 8
# A weight of a fused update reads r factors from a near cache, which up to these
# ranks takes less time than writing and reading a dense update.
_FUSED_ON_CPU = 8
_FUSED = 16


def merge_kernels(
    nodes: Mapping[str, Node], onto: Collection[str]
) -> tuple[dict[str, Array], str | None]:
    """Merge every node.

    Args:
      nodes: by path, with numbers in them.
      onto: the paths of those whose bases are written over.

    Returns:
      The merged kernels by path, and the first path whose kernel is not finite.
    """
    done: dict[str, Array] = {}
    finite = []
    for structure, members in _groups(nodes, onto):
        paths, bases, rests = zip(*members, strict=True)
        program = _merge_onto if paths[0] in onto else _merge_beside
        kernels, all_finite = program(structure, bases, rests)
        done.update(zip(paths, kernels, strict=True))
        finite.append((paths, all_finite))
    # One number a program is read here; which kernel it was matters only once it fails.
    flags = jax.device_get([ok for _, ok in finite])
    suspects = {
        path
        for (paths, _), ok in zip(finite, flags, strict=True)
        if not ok
        for path in paths
    }
    bad = (path for path in nodes if path in suspects and not _is_finite(done[path]))
    return done, next(bad, None)


def _groups(
    nodes: Mapping[str, Node], onto: Collection[str]
) -> Iterator[tuple[Any, list[tuple[str, Array, list[Array]]]]]:
    """The nodes that go through one program: their structure; path, base, rest of each.

    They are alike in everything but their numbers.
    """
    alike = collections.defaultdict(list)
    for path, w in nodes.items():
        rest, structure = jax.tree.flatten(bare(w))
        key = (structure, path in onto, *map(_lies, (w.base, *rest)))
        alike[key].append((path, w.base, rest))
    for (structure, *_), members in alike.items():
        count = -(-len(members) // _together(nodes[members[0][0]]))
        # Parts of one size, or of two: each size is compiled.
        yield from ((structure, members[i::count]) for i in range(count))


def _lies(x: Any) -> tuple[Any, ...]:
    """Shape, dtype and place of an array."""
    if isinstance(x, jax.Array):
        return x.shape, x.dtype, x.sharding, x.committed
    return x.shape, x.dtype


def _together(w: Node) -> int:
    """How many nodes like this one go through one program.

    One whose merging fills memory, with a dense update or what the check says of each
    weight, goes alone: else that were there as often as there are nodes.
    """
    platform = jax.default_backend()
    if isinstance(w.base, jax.Array):
        platform = next(iter(w.base.devices())).platform
    lean = (
        isinstance(w, LowRank)
        and w.dtype.itemsize >= 4
        and all(t.rank <= _FUSED_ON_CPU for t in w.adapters.values())
    )
    return _TOGETHER_ON_CPU if platform == "cpu" and lean else 1


def _merged_together(
    structure: Any, bases: Sequence[Array], rests: Sequence[Sequence[Array]]
) -> tuple[list[Array], Array]:
    """The merged kernels of nodes of one structure, and whether all are finite."""
    pairs = zip(bases, rests, strict=True)
    done = [merge_node(base, jax.tree.unflatten(structure, x)) for base, x in pairs]
    kernels, finite = zip(*done, strict=True)
    return list(kernels), functools.reduce(jnp.logical_and, finite)


@jax.jit  # traced and lowered once for all nodes of a program
def merge_node(base: Array, w: Node) -> tuple[Array, Array]:
    """The merged kernel or table of a bare node, and whether all of it is finite.

    Of a small rank one pass reads the base and writes the merged kernel, over the base
    where that is donated: there is no dense update in memory. Only the check differs.
    """
    return lax.platform_dependent(
        dataclasses.replace(w, base=base),
        cpu=lambda w: _sum_and_check(w, _is_finite_on_cpu, _FUSED_ON_CPU),
        default=lambda w: _sum_and_check(w, _is_finite, _FUSED),
    )


_merge_beside = jax.jit(_merged_together, static_argnums=0)
_merge_onto = jax.jit(_merged_together, static_argnums=0, donate_argnums=1)


def _sum_and_check(
    w: Node, is_finite: Callable[[Array], Array], fuse_up_to: int
) -> tuple[Array, Array]:
    if isinstance(w, Rows):
        merged = w.merged()
    else:
        merged = rounded(w.value(fuse_up_to=fuse_up_to), w.dtype).astype(w.dtype)
    return merged, is_finite(merged)


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


def bare(w: Node) -> Node:
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
