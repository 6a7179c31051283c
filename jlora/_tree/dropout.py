"""Dropout of adapters' inputs: on while the tree holds keys."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jlora._kernel.adapter import Adapter
from jlora._kernel.nodes import LowRank, is_node
from jlora._tree.initializers import leaf_key

Tree = Any


def with_dropout(tree: Tree, key: jax.Array | None) -> Tree:
    """Switch adapter dropout on for one step, or off with `key=None`.

    Every adapter whose `dropout` is not zero gets a key of its own, folded with its
    path, and one for each index of a stack. Inputs of `a` are then dropped and the
    rest scaled by 1/(1-p). A tree without keys does no dropout: evaluate that one.

    Args:
      tree: a lorafied tree.
      key: a PRNG key for this step.
    """

    def one(node: Any) -> Any:
        if not isinstance(node, LowRank):
            return node
        adapters = {
            name: dataclasses.replace(t, key=_adapter_key(node.path, name, t, key))
            for name, t in node.adapters.items()
        }
        return dataclasses.replace(node, adapters=adapters)

    return jax.tree.map(one, tree, is_leaf=is_node)


def _adapter_key(path: str, name: str, t: Adapter, key: Any) -> Any:
    if key is None or not t.dropout:
        return None
    own = leaf_key(key, f"{path}/{name}" if name else path)
    return jax.random.split(own, t.scale.shape) if t.s_dims else own
