"""Activated adapters (aLoRA): they act from their invocation tokens on.

Before the last occurrence of those tokens the model is the base itself, and so are the
keys and values that it has cached.

Source: Greenewald et al. 2025, arXiv:2504.12397, and PEFT's `alora_invocation_tokens`.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._errors import OptionError, ShapeError, StructureError
from jlora._kernel.axes import Array
from jlora._kernel.bank import has_bank
from jlora._kernel.nodes import LowRank, is_node
from jlora._paths import Tree
from jlora.adapters._bank import invocations


def activated(tree: Tree, tokens: Sequence[int] | None) -> Tree:
    """The tree with adapters that act from the last occurrence of some tokens on.

    Args:
      tree: a lorafied tree.
      tokens: their ids, the invocation; None has the adapters act everywhere.

    Raises:
      OptionError: no tokens.
      StructureError: a tree without adapters, or a bank.
    """
    own = None if tokens is None else tuple(operator.index(t) for t in tokens)
    if own == ():
        raise OptionError("tokens=[]: an invocation is one token at least, or None.")
    nodes = [
        x for x in jax.tree.leaves(tree, is_leaf=is_node) if isinstance(x, LowRank)
    ]
    if not nodes or any(map(has_bank, nodes)):
        raise StructureError(
            "jlora.activated takes a tree with adapters, not a bank of them.\nCall it "
            "before jlora.bank."
        )

    def one(x: Any) -> Any:
        if not isinstance(x, LowRank):
            return x
        return x.map(x.base, lambda t: dataclasses.replace(t, invocation=own))

    return jax.tree.map(one, tree, is_leaf=is_node)


def activated_ids(bank: Tree, ids: Any, input_ids: Any) -> Array:
    """Who acts on each token: an activated adapter from its invocation on.

    Args:
      bank: from `jlora.bank`.
      ids: `[B]`, the number of each example's adapter; -1 is none.
      input_ids: `[B, T]`, in which the last occurrence of the adapter's invocation is
        looked for. Without one the adapter does not act.

    Returns:
      `[B, T]` int32 for `jlora.with_ids`: the number where the adapter acts, -1 where
      it does not. Adapters that are not activated act on all tokens.

    Raises:
      ShapeError: ids and input_ids that do not belong together.

    >>> tree = jlora.lorafy({"w": jnp.ones((3, 2))}, 1, ["w"])
    >>> bank = jlora.bank([jlora.activated(tree, [7, 8])])
    >>> jlora.activated_ids(bank, [0, -1], jnp.array([[7, 8, 1, 7, 8, 2], [7, 8] * 3]))
    Array([[-1, -1, -1,  0,  0,  0],
           [-1, -1, -1, -1, -1, -1]], dtype=int32)
    """
    which = jnp.asarray(ids, jnp.int32)
    x = jnp.asarray(input_ids)
    if which.ndim != 1 or x.ndim != 2 or x.shape[0] != which.size:
        raise ShapeError(
            f"ids {which.shape} and input_ids {x.shape} must be [B] and [B, T]."
        )
    starts = [jnp.zeros(which.shape, int)]  # of nobody
    for tokens in invocations(bank):
        starts.append(_last_start(x, tokens) if tokens else starts[0])
    own = jnp.stack(starts)[which + 1, jnp.arange(which.size)]
    return jnp.where(jnp.arange(x.shape[1]) >= own[:, None], which[:, None], -1)


def _last_start(x: Array, tokens: Sequence[int]) -> Array:
    """Where the last occurrence begins in each row, or its length: nowhere."""
    length, count = x.shape[1], len(tokens)
    if count > length:
        return jnp.full(x.shape[:1], length)
    places = np.arange(length - count + 1)[:, None] + np.arange(count)
    there = jnp.all(x[:, places] == jnp.asarray(tokens), axis=-1)
    last = length - count - jnp.argmax(there[:, ::-1], axis=1)
    return jnp.where(jnp.any(there, axis=1), last, length)
