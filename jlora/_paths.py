"""Leaf paths: how leaves are named, matched and told apart.

A leaf's path is its keys joined by slashes, `encoder/block/0/attention/query/kernel`.
The boxes that Flax puts around an array (`nnx.Param`, `nn.Partitioned`) hold it as
their attribute `value`, which says nothing and is left out. Keys and fields that are
called `value` are names like any other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jlora._errors import StructureError

KeyPath = tuple[Any, ...]  # of jax.tree_util keys
Tree = Any  # a pytree, of parameters mostly
IsLeaf = Callable[[Any], bool]

BIAS_NAMES = ("bias", "b")

# Flax's boxes by the name of their base class; `import jlora` does not import Flax.
_BOXES = ("Variable", "VariableState", "AxisMetadata")
_BOX_KEYS = tuple(jax.tree_util.GetAttrKey(name) for name in ("value", "raw_value"))


def path_str(path: KeyPath) -> str:
    """A key path as one string, parts joined by `/`.

    A last attribute `value` is taken for that of a box. Where the tree is at hand,
    `leaf_paths` knows.

    >>> tree = {"layers_0": {"kernel": 1}}
    >>> [path_str(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)]
    ['layers_0/kernel']
    """
    if len(path) > 1 and path[-1] in _BOX_KEYS:
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_paths(tree: Tree, is_leaf: IsLeaf | None = None) -> list[str]:
    """The paths of a tree's leaves, in the order of `jax.tree.leaves`.

    >>> leaf_paths({"attn": {"query": 1, "value": 2}})
    ['attn/query', 'attn/value']
    """
    return [path for path, _ in _walk(tree, "", is_leaf or _never)]


def leaves_by_path(tree: Tree, is_leaf: IsLeaf | None = None) -> dict[str, Any]:
    """A tree's leaves by path, in the order of `jax.tree.leaves`.

    Raises:
      StructureError: two leaves with one path.
    """
    leaves: dict[str, Any] = {}
    for path, leaf in _walk(tree, "", is_leaf or _never):
        if path in leaves:
            _refuse_twice(path, tree, is_leaf)
        leaves[path] = leaf
    return leaves


def map_with_path(
    f: Callable[[str, Any], Any], tree: Tree, is_leaf: IsLeaf | None = None
) -> Tree:
    """The tree with `f(path, leaf)` in the place of each leaf."""
    structure = jax.tree.structure(tree, is_leaf=is_leaf)
    changed = [f(path, leaf) for path, leaf in _walk(tree, "", is_leaf or _never)]
    return jax.tree.unflatten(structure, changed)


def _walk(tree: Tree, prefix: str, is_leaf: IsLeaf) -> Iterator[tuple[str, Any]]:
    if is_leaf(tree):
        yield prefix, tree
        return

    def stop(x: Any) -> bool:
        return x is not tree and (is_leaf(x) or _is_box(x))

    boxed = _is_box(tree)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=stop):
        own = path[1:] if boxed and path[0] in _BOX_KEYS else path
        name = jax.tree_util.keystr(own, simple=True, separator="/")
        name = f"{prefix}/{name}" if prefix and own else prefix or name
        if leaf is not tree and _is_box(leaf):
            yield from _walk(leaf, name, is_leaf)
        else:
            yield name, leaf


def _never(_: Any) -> bool:
    return False


def _is_box(x: Any) -> bool:
    return any(
        c.__name__ in _BOXES and c.__module__.startswith("flax.")
        for c in type(x).__mro__
    )


def _refuse_twice(path: str, tree: Tree, is_leaf: IsLeaf | None) -> None:
    keys = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    paths = leaf_paths(tree, is_leaf)
    both = [
        jax.tree_util.keystr(key)
        for (key, _), p in zip(keys, paths, strict=True)
        if p == path
    ]
    raise StructureError(
        f"{len(both)} leaves of this tree have the path {path!r}: {', '.join(both)}.\n"
        "Leaves are known by their paths, so rename the keys of all but one."
    )


def module_of(path: str) -> str:
    """The path without its last part: the module that owns the leaf."""
    return path.rpartition("/")[0]


def name_of(path: str) -> str:
    """The last part of the path: the leaf's name in its module."""
    return path.rpartition("/")[2]


def generalise(path: str) -> str:
    """The path with the numbers of repeated blocks replaced by `*`.

    >>> generalise("encoder/layers_11/query/kernel")
    'encoder/layers_*/query/kernel'
    """
    return "/".join(re.sub(r"(^|_)\d+$", r"\1*", part) for part in path.split("/"))
