"""The adapters of a tree, or of gradients of one, by path and name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jlora._errors import OptionError
from jlora._kernel.adapter import Adapter
from jlora._kernel.nodes import LowRank, is_node
from jlora._paths import Tree, leaves_by_path, map_with_path

Term = tuple[str, str]  # a kernel's path, an adapter's name


def terms_of(tree: Tree) -> dict[Term, Adapter]:
    """Every adapter."""
    return {
        (path, name): t
        for path, w in leaves_by_path(tree, is_leaf=is_node).items()
        if isinstance(w, LowRank)
        for name, t in w.adapters.items()
    }


def map_terms(f: Callable[[Term, Adapter], Adapter], tree: Tree) -> Tree:
    """The tree with `f(term, adapter)` in the place of each adapter."""

    def one(path: str, node: Any) -> Any:
        if not isinstance(node, LowRank):
            return node
        changed = {name: f((path, name), t) for name, t in node.adapters.items()}
        return dataclasses.replace(node, adapters=changed)

    return map_with_path(one, tree, is_leaf=is_node)


def needed(params: Tree | None, name: str) -> Tree:
    """The parameters that an optimiser was given.

    Raises:
      OptionError: it was given none.
    """
    if params is None:
        raise OptionError(
            f"{name} needs the factors themselves: call "
            "tx.update(grads, opt_state, trainable)."
        )
    return params
