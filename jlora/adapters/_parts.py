"""An adapter without its base, and put onto one again.

A tree of parts has the structure of its base: a part where a node stood, None where a
plain leaf stood. Parts are no nodes, so that no function takes a set of adapters for a
lorafied tree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora._errors import StructureError
from jlora._kernel.nodes import Full, LowRank, Rows, is_node, is_trained, with_origin
from jlora._paths import Tree, leaf_paths


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """A node without its base; its leaves have the names that they have in the node.

    Attributes:
      node: a `Full`, or another node, whose base is None.
    """

    node: Any

    def on(self, base: Any) -> Any:
        """The node on that base; a fully trained leaf takes its place."""
        return self.node if _is_whole(self.node) else _with_base(self.node, base)

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """The children of the node."""
        children, static = self.node.tree_flatten_with_keys()
        return children, (type(self.node), static)

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> Part:
        """Inverse of `tree_flatten_with_keys`."""
        kind, own = static
        return cls(kind.tree_unflatten(own, children))


def is_part(x: Any) -> bool:
    """Whether x is a part, or stands for a plain leaf; an `is_leaf` for `jax.tree`."""
    return x is None or isinstance(x, Part)


def parts_of(tree: Tree) -> Tree:
    """The parts of a lorafied tree."""

    def one(x: Any) -> Part | None:
        if isinstance(x, LowRank):
            # Keys of dropout are of one step.
            own = lambda t: dataclasses.replace(t, key=None, keep=None)  # noqa: E731
            return Part(x.map(None, own))
        if not is_trained(x):
            return None
        return Part(x if _is_whole(x) else _with_base(x, None))

    return jax.tree.map(one, tree, is_leaf=lambda x: x is None or is_node(x))


def _is_whole(node: Any) -> bool:
    return isinstance(node, Full)


def _with_base(node: Any, base: Any) -> Any:
    return dataclasses.replace(node, base=base)


def put_on(base: Tree, parts: Tree) -> Tree:
    """The lorafied tree of one adapter."""
    put = lambda p, x: x if p is None else p.on(x)  # noqa: E731
    return with_origin(jax.tree.map(put, parts, base, is_leaf=is_part))


def put_all_on(base: Tree, named: Sequence[tuple[str, Tree]]) -> Tree:
    """The lorafied tree of several adapters, whose updates add.

    A kernel has the terms of all, numbered and not named: so other adapters of the same
    shapes are a tree of the same structure.

    Raises:
      StructureError: two adapters with no sum on a leaf.
    """
    names = [name for name, _ in named]
    columns = [jax.tree.leaves(parts, is_leaf=is_part) for _, parts in named]
    structure: Any = jax.tree.structure(named[0][1], is_leaf=is_part)
    paths = leaf_paths(named[0][1], is_leaf=is_part)
    bases = structure.flatten_up_to(base)
    leaves = [
        _together(path, x, dict(zip(names, parts, strict=True)))
        for path, x, *parts in zip(paths, bases, *columns, strict=True)
    ]
    return with_origin(jax.tree.unflatten(structure, leaves))


def _together(path: str, base: Any, parts: dict[str, Part | None]) -> Any:
    held = {name: p.node for name, p in parts.items() if p is not None}
    nodes = list(held.values())
    if not nodes:
        return base
    if all(isinstance(x, LowRank) for x in nodes):
        adapters = {
            _term_name(number, role): t
            for number, part in enumerate(parts.values())
            if part is not None
            for role, t in part.node.adapters.items()
        }
        return LowRank(base, adapters)
    if len(nodes) == 1:
        return Part(nodes[0]).on(base)
    if all(isinstance(x, Rows) for x in nodes):
        return _rows_together(path, base, held)
    raise StructureError(
        f"the adapters {_and(held)} cannot be active together: {path!r} is a "
        f"{' or a '.join(dict.fromkeys(x.kind for x in nodes))} of them, and only "
        "updates of kernels add.\nActivate one, or make one adapter of their sum with "
        "jlora.weighted."
    )


def _rows_together(path: str, base: Any, held: dict[str, Rows]) -> Rows:
    indices = [i for x in held.values() for i in x.indices]
    twice = sorted({i for i in indices if indices.count(i) > 1})
    if twice:
        raise StructureError(
            f"the adapters {_and(held)} cannot be active together: they train the same "
            f"rows of {path!r}, {twice[:5]} first.\nActivate one of them, or make one "
            "adapter of their sum with jlora.weighted."
        )
    rows = jnp.concatenate([x.rows for x in held.values()])
    return Rows(base, rows, tuple(indices))


def _term_name(number: int, role: str) -> str:
    return "_".join(filter(None, (f"adapter_{number}", role)))


def _and(names: Any) -> str:
    return " and ".join(map(repr, names))
