"""What of an argument gets no gradient: what was there when adapters were put in.

Two kinds of users differentiate with respect to a whole argument. With
`optax.masked(tx, trainable_mask(params))` a gradient of a frozen leaf would be added to
it as it is, so every leaf that `lorafy` saw and did not choose must have none. A leaf
that was put beside the lorafied tree later, a soft prompt say, is its user's own; a
gradient of zero would train nothing and say nothing. So nodes remember which leaves
stood in their tree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora._kernel.adapter import PARTS, Adapter
from jlora._kernel.nodes import Full, LowRank, Rows, is_node, is_trained
from jlora._kernel.opaque import Origin
from jlora._kernel.quantized import Quantized
from jlora._paths import leaf_paths

Tree = Any


def freeze(argument: Tree) -> Tree:
    """Stop the gradient of the frozen leaves of an argument that holds adapters."""
    leaves, structure = jax.tree.flatten(argument, is_leaf=is_node)
    if not any(map(is_node, leaves)):
        return argument
    paths = leaf_paths(argument, is_leaf=is_node)
    is_frozen = _frozen_paths(zip(paths, leaves, strict=True))
    out = [_stopped(x, is_frozen(p)) for p, x in zip(paths, leaves, strict=True)]
    return jax.tree.unflatten(structure, out)


def beside(tree: Tree) -> list[str]:
    """The paths of plain float leaves that no node of the tree knows.

    Empty for a tree without nodes.
    """
    leaves = jax.tree.leaves(tree, is_leaf=is_node)
    pairs = list(zip(leaf_paths(tree, is_leaf=is_node), leaves, strict=True))
    if not any(map(is_node, leaves)):
        return []
    is_frozen = _frozen_paths(pairs)
    return [p for p, x in pairs if not is_node(x) and _is_float(x) and not is_frozen(p)]


def _frozen_paths(leaves: Iterable[tuple[str, Any]]) -> Callable[[str], bool]:
    """Whether a plain leaf at a path is of the lorafied tree of one of the nodes."""
    # A quantised kernel alone says nothing of what else is trained.
    nodes = ((p, x) for p, x in leaves if is_trained(x))
    trees = {_tree_of(path, x.path) for path, x in nodes}

    def is_frozen(path: str) -> bool:
        parts = tuple(path.split("/"))
        for here, there, known in trees:
            if parts[: len(here)] == here:
                name = "/".join((*there, *parts[len(here) :]))
                if known is None or name in known:
                    return True
        return False

    return is_frozen


def _tree_of(path: str, origin: str) -> tuple[Any, Any, Any]:
    """Where a node's tree begins here, and began when it was lorafied; its leaves.

    The node's path may be longer here (`{"model": tree}`) or shorter (`tree["params"]`)
    than it was there; both end alike.
    """
    here, there = path.split("/"), str(origin).split("/")
    while here and there and here[-1] == there[-1]:
        here.pop()
        there.pop()
    known = origin.leaves if isinstance(origin, Origin) else None
    return tuple(here), tuple(there), known


def _stopped(x: Any, is_frozen: bool) -> Any:
    if isinstance(x, Full):
        return x
    if isinstance(x, Quantized):
        return x.map(_stop)
    if isinstance(x, Rows):
        return dataclasses.replace(x, base=_stopped(x.base, True))
    if isinstance(x, LowRank):
        return x.map(_stopped(x.base, True), _stopped_adapter)
    return _stop(x) if is_frozen else x


def _stopped_adapter(t: Adapter) -> Adapter:
    parts = t.parts
    if parts is not None:
        parts = {n: _stop(x) if PARTS[n] == "frozen" else x for n, x in parts.items()}
    return dataclasses.replace(t, scale=_stop(t.scale), parts=parts)


def _stop(x: Any) -> Any:
    return lax.stop_gradient(x) if _is_float(x) else x


def _is_float(x: Any) -> bool:
    is_array = isinstance(x, jax.Array | np.ndarray)
    return is_array and jnp.issubdtype(x.dtype, jnp.inexact)
