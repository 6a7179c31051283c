"""Dropout of adapters' inputs: on while the tree holds keys."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jlora._kernel.adapter import Adapter
from jlora._kernel.nodes import LowRank, is_node
from jlora._paths import map_with_path
from jlora._tree import options
from jlora._tree.initializers import leaf_key

Tree = Any


def with_dropout(tree: Tree, key: jax.Array | None) -> Tree:
    """Switch adapter dropout on for one step, or off with `key=None`.

    Every adapter whose `dropout` is not zero gets a key of its own, folded with its
    path in the tree, and one for each index of a stack. Inputs of `a` are then dropped
    and the rest scaled by 1/(1-p); every use of an adapter, every step of a loop and
    every shard inside `shard_map` draws a mask of its own. Layers draw the same masks
    stacked and numbered, save those with an axis for experts. A tree without keys does
    no dropout: evaluate that one.

    Args:
      tree: a lorafied tree.
      key: a PRNG key for this step.

    Raises:
      OptionError: a `key` that is no single PRNG key.
    """
    if key is not None:
        key = options.single_key(key)
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)

    def one(path: str, node: Any) -> Any:
        if not isinstance(node, LowRank):
            return node
        adapters = {
            name: dataclasses.replace(t, key=_adapter_key(path, name, t, key))
            for name, t in node.adapters.items()
        }
        return dataclasses.replace(node, adapters=adapters)

    return map_with_path(one, tree, is_leaf=is_node)


def _adapter_key(path: str, name: str, t: Adapter, key: Any) -> Any:
    """The adapter's key, or one for each index of its stack.

    A layer's number is folded in last, so that one of a stack gets what it would have
    under its number.
    """
    if key is None or not t.dropout:
        return None
    parts = [*path.split("/"), *([name] if name else [])]
    number = next((p for p in parts if p.isdigit()), None)
    if t.s_dims:
        own = leaf_key(key, "/".join(parts))
        for size in t.scale.shape:
            own = _fold_each(own, size)
        return own
    if number is None:
        return leaf_key(key, "/".join(parts))
    parts.remove(number)
    return jax.random.fold_in(leaf_key(key, "/".join(parts)), int(number))


def _fold_each(keys: Any, size: int) -> Any:
    """Keys `[..., size]`: each folded with every index."""
    each = lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(size))  # noqa: E731
    return jax.vmap(each)(keys.reshape(-1)).reshape(*keys.shape, size)
