"""Merged kernels: one program for all that are alike in everything but numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._kernel.axes import Array, contract, rounded
from jlora._kernel.encode import encode
from jlora._kernel.nodes import LowRank, Rows
from jlora._kernel.quantized import Quantized, dense
from jlora._kernel.rounding import rounded_at_random

Node = LowRank | Rows

# A weight of a fused update reads r factors from a near cache, which up to these
# ranks takes less time than writing and reading a dense update.
_FUSED_ON_CPU = 8
_FUSED = 16


def merge_kernels(
    nodes: Mapping[str, Node], onto: Collection[str], keys: Mapping[str, Array],
    requantize: bool = False, dtype: Any = None,
) -> tuple[dict[str, Any], str | None]:  # fmt: skip
    """Merge every node.

    Args:
      nodes: by path, with numbers in them.
      onto: the paths of those whose bases are written over.
      keys: of the random numbers of those that are rounded by them, by path.
      requantize: quantise again what was quantised.
      dtype: of what is merged; None is each base's own.

    Returns:
      The merged kernels by path, and the first path whose kernel is not finite.
    """
    done, finite = {}, {}
    for path, w in nodes.items():
        merge = _merge_onto if path in onto else merge_node
        base, rest = w.base, without_base(w)
        if isinstance(base, Quantized):
            base = dataclasses.replace(base, path="")
        merged, finite[path] = merge(base, rest, keys.get(path), requantize, dtype)
        if isinstance(merged, Quantized):
            merged = dataclasses.replace(merged, path=path)
        done[path] = merged
    # Read after the last program is called, so that none waits for it.
    flags = jax.device_get(finite)
    return done, next((path for path, ok in flags.items() if not ok), None)


def _merge_node(
    base: Any,
    w: Node,
    key: Array | None = None,
    requantize: bool = False,
    dtype: Any = None,
) -> tuple[Any, Array]:
    """The merged kernel or table of a base and its node, and whether it is finite.

    Of a small rank one pass reads the base and writes the merged kernel, over the base
    where that is donated: there is no dense update in memory. Only the check differs.
    """
    dtype = dtype or base.dtype
    merged, is_finite = lax.platform_dependent(
        dataclasses.replace(w, base=base),
        key,
        cpu=lambda w, key: _sum_and_check(
            w, dtype, _is_finite_on_cpu, _FUSED_ON_CPU, key
        ),
        default=lambda w, key: _sum_and_check(w, dtype, _is_finite, _FUSED, key),
    )
    if requantize and isinstance(base, Quantized):
        merged = encode(merged, base.layout, double=base.has("nested_absmax"))
    return merged, is_finite


merge_node = jax.jit(_merge_node, static_argnums=(3, 4))
_merge_onto = jax.jit(_merge_node, donate_argnums=0, static_argnums=(3, 4))


def _sum_and_check(
    w: Node,
    dtype: Any,
    is_finite: Callable[[Array], Array],
    fuse_up_to: int,
    key: Array | None = None,
) -> tuple[Array, Array]:
    if isinstance(w, Rows):
        merged = dataclasses.replace(w, base=dense(w.base).astype(dtype)).merged()
    elif key is None:
        merged = rounded(w.value(fuse_up_to=fuse_up_to), dtype).astype(dtype)
    else:
        merged = rounded_at_random(w.value(fuse_up_to=fuse_up_to), dtype, key)
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


def without_base(w: Node) -> Node:
    """The node without its base, and without what merging does not depend on.

    Kernels of one shape then share a program; with the path, which is static, each had
    its own, and a first merge compiled for a minute. Dropout's keys do not matter.
    """
    if isinstance(w, Rows):
        return dataclasses.replace(w, base=None, path="")
    idle = {n: dataclasses.replace(t, **_IDLE) for n, t in w.adapters.items()}
    return LowRank(None, idle)


_IDLE: dict[str, Any] = {
    "key": None, "keep": None, "bias": None, "dropout": 0.0, "rslora": False,
    "shifted": False, "role": None,
}  # fmt: skip
