"""An adapter of a shifted base as one of the base as it was.

    W' + s·A·B = W + s·(A·B - A0·B0) = W + s·[A | A0]·[B ; -B0]

where `W' = W - s·A0·B0` is what PiSSA and its like leave of W. The adapter has twice
the rank, and is like any other: it loads on the original base, beside others.

Source: PEFT's `path_initial_model_for_weight_conversion`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._errors import StructureError
from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import RANK, Array, expand
from jlora._kernel.nodes import LowRank, is_node, with_origin
from jlora._paths import leaves_by_path, map_with_path

Tree = Any


def unshift(tree: Tree, initial: Tree, params: Tree) -> Tree:
    """The lorafied tree on the original parameters that computes what `tree` does.

    Args:
      tree: a lorafied tree whose bases were shifted when it was made.
      initial: the tree as it was made, or its trainable half,
        `jax.device_get(jlora.split(tree)[0])`, which a training step cannot donate.
      params: the parameters before; `jlora.merge` of the whole initial tree gives them
        up to rounding.

    Returns:
      The tree on the kernels of `params`. Adapters of shifted kernels have twice the
      rank and the same scale, others are as they were.

    Raises:
      StructureError: the trees do not belong together.

    >>> params = {"w": jnp.arange(12.0).reshape(4, 3)}
    >>> tree = jlora.lorafy(params, 1, ["w"], init="pissa")
    >>> initial = jax.device_get(jlora.split(tree)[0])
    >>> unshift(tree, initial, params)["w"]
    LowRank('w', float32[4, 3], rank 2, scale 1)
    """
    originals = leaves_by_path(params)

    def on_original(path: str, x: Any) -> Any:
        if not isinstance(x, LowRank):
            return x
        base = originals.get(path)
        if base is None or base.shape != x.shape or base.dtype != x.dtype:
            raise StructureError(
                f"the kernel {path!r} {x.shape} {x.dtype} is not in params.\nPass the "
                "plain parameters that the tree was made of."
            )
        return dataclasses.replace(x, base=base)

    return with_origin(map_with_path(on_original, differences(tree, initial), is_node))


def differences(tree: Tree, initial: Tree) -> Tree:
    """`tree` with its adapters as they are on the original base; the bases stay.

    Raises:
      StructureError: the trees do not belong together.
    """
    starts = leaves_by_path(initial, is_leaf=is_node)

    def one(path: str, x: Any) -> Any:
        if not (isinstance(x, LowRank) and _is_shifted(x)):
            return x
        start = starts.get(path)
        if not isinstance(start, LowRank) or {*start.adapters} != {*x.adapters}:
            raise StructureError(
                f"the kernel {path!r} {x.shape} has no such adapter in the initial "
                "tree.\nPass the tree that jlora.lorafy made, or its trainable half."
            )
        _check_base(path, x, start)
        adapters = {
            name: _difference(path, t, start.adapters[name]) if t.shifted else t
            for name, t in x.adapters.items()
        }
        return dataclasses.replace(x, adapters=adapters)

    return map_with_path(one, tree, is_leaf=is_node)


def shifted_kernels(tree: Tree) -> list[str]:
    """The paths of kernels whose bases were shifted for their adapters."""
    leaves = leaves_by_path(tree, is_leaf=is_node)
    return [p for p, x in leaves.items() if isinstance(x, LowRank) and _is_shifted(x)]


def _is_shifted(x: LowRank) -> bool:
    return any(t.shifted for t in x.adapters.values())


def _difference(path: str, t: Adapter, start: Adapter) -> Adapter:
    """`[A | A0]` and `[B ; -B0]`, where the scales differ with their ratio in B0."""
    if start.a is None or start.a_dims != t.a_dims or start.a.shape != t.a.shape:
        raise StructureError(
            f"the adapter of {path!r} was another at first: its factor a is "
            f"{tuple(t.a.shape)}, and {getattr(start.a, 'shape', None)} in the initial "
            "tree."
        )
    if any(isinstance(x, jax.Array) and x.is_deleted() for x in (start.a, start.b)):
        raise StructureError(
            f"the initial factors of {path!r} are gone: a training step was given "
            "them to write over.\nKeep a copy on the host: "
            "jax.device_get(jlora.split(tree)[0])."
        )
    b0 = -jnp.asarray(start.b, t.b.dtype)
    if start.scale is not None:
        b0 = b0 * expand(start.scale / t.scale, t.s_dims, t.b_dims).astype(b0.dtype)
    a = jnp.concatenate([t.a, jnp.asarray(start.a, t.a.dtype)], t.a_dims.index(RANK))
    b = jnp.concatenate([t.b, b0], t.b_dims.index(RANK))
    return dataclasses.replace(t, a=a, b=b, shifted=False)


def _check_base(path: str, x: LowRank, start: LowRank) -> None:
    """Refuse an initial tree on other bases, as far as it has any."""
    if start.base is None or _same(x.base, start.base):
        return
    raise StructureError(
        f"the base of {path!r} {x.shape} is not that of the initial tree, so the "
        "adapter did not start there.\nPass the tree that this one was trained from."
    )


def _same(x: Array, y: Array) -> bool:
    if x is y or any(isinstance(v, jax.ShapeDtypeStruct) for v in (x, y)):
        return True
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if all(isinstance(v, jax.Array) for v in (x, y)):
        return bool(jnp.array_equal(x, y))
    return bool(np.array_equal(np.asarray(x), np.asarray(y)))
