"""Whether a tree stands on a set's base: by the arrays' identity, else their values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._errors import StructureError
from jlora._kernel.nodes import Full, LowRank, Rows, is_array, is_node, same_structure
from jlora._paths import Tree, leaf_paths
from jlora._text import listed


def check_same_base(base: Tree, tree: Tree, name: str) -> None:
    """Refuse a lorafied tree of another base.

    Trees that were made of the set's own arrays cost nothing; other arrays are read. A
    leaf that the adapter trains whole is not compared, for its base is not there.

    Raises:
      StructureError: other leaves, shapes, dtypes or values; arrays that were donated.
    """
    is_leaf = lambda x: x is None or is_node(x)  # noqa: E731
    leaves = jax.tree.leaves(tree, is_leaf=is_leaf)
    structure: Any = jax.tree.structure(tree, is_leaf=is_leaf)
    paths = leaf_paths(tree, is_leaf=is_leaf)
    try:
        bases = structure.flatten_up_to(base)
    except ValueError:
        _refuse(name, _other_leaves(base, paths))
    lines: list[str] = []
    for path, x, leaf in zip(paths, bases, leaves, strict=True):
        own = leaf.base if isinstance(leaf, LowRank | Rows) else leaf
        if own is x or isinstance(leaf, Full):
            continue
        if not same_structure(own, x):
            lines.append(f"{path!r} is {type(x).__name__}, and {type(own).__name__}")
            continue
        pairs = zip(jax.tree.leaves(x), jax.tree.leaves(own), strict=True)
        lines += [line for x, y in pairs if (line := _difference(path, x, y))]
    if lines:
        _refuse(name, lines, shifted=any(map(_is_shifted, leaves)))


def _is_shifted(x: Any) -> bool:
    return isinstance(x, LowRank) and any(t.shifted for t in x.adapters.values())


def _refuse(name: str, lines: list[str], *, shifted: bool = False) -> None:
    remedy = "Make or load it on the same parameters: those of a set are adapters.base."
    if shifted:
        remedy = (
            "It was made with a part of the kernels taken out of them (PiSSA). As one "
            "of the kernels as they were it is jlora.init.unshift(tree, initial, base)."
        )
    raise StructureError(
        f"the adapter {name!r} is of another base; {len(lines)} leaves differ (the "
        f"base's, and the adapter's):\n  {listed(lines)}\n{remedy}"
    )


def _other_leaves(base: Tree, paths: list[str]) -> list[str]:
    known = leaf_paths(base, is_leaf=lambda x: x is None)
    missing = [f"{p!r} is missing in the adapter's" for p in known if p not in paths]
    new = [f"{p!r} is in the adapter's alone" for p in paths if p not in known]
    return [*missing, *new] or ["their containers are of other types"]


def _difference(path: str, x: Any, y: Any) -> str | None:
    """How two arrays, or other leaves, differ."""
    if x is y:
        return None
    if not (is_array(x) and is_array(y)):
        traced = isinstance(x, jax.core.Tracer) or isinstance(y, jax.core.Tracer)
        return None if traced or x == y else f"{path!r} is {x!r}, and {y!r}"
    kinds = [f"{v.dtype}{list(v.shape)}" for v in (x, y)]
    if kinds[0] != kinds[1]:
        return f"{path!r} is {kinds[0]}, and {kinds[1]}"
    if any(not isinstance(v, jax.Array | np.ndarray) for v in (x, y)):
        return None  # of a shape nothing else is known
    if any(isinstance(v, jax.core.Tracer) for v in (x, y)):
        return None
    if any(isinstance(v, jax.Array) and v.is_deleted() for v in (x, y)):
        return f"{path!r} {kinds[0]} was donated, and is gone"
    return None if bool(_equal(x, y)) else f"{path!r} {kinds[0]} has other values"


@jax.jit
def _equal(x: Any, y: Any) -> Any:
    return jnp.all((x == y) | ((x != x) & (y != y)))
