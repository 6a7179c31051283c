"""Key paths: how leaves are named, matched and covered.

A leaf's path is its keys joined by slashes, `encoder/block/0/attention/query/kernel`.
Wrappers that Flax puts around an array (`nnx.Param`, `nn.Partitioned`) end a path with
`value`, which says nothing and is dropped.
"""

from __future__ import annotations

import re

import jax

KeyPath = tuple  # of jax.tree_util keys

BIAS_NAMES = ("bias", "b")


def path_str(path: KeyPath) -> str:
    """A key path as one string, parts joined by `/`.

    >>> tree = {"layers_0": {"kernel": 1}}
    >>> [path_str(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)]
    ['layers_0/kernel']
    """
    text = jax.tree_util.keystr(path, simple=True, separator="/")
    head, _, last = text.rpartition("/")
    return head if head and last in ("value", "raw_value") else text


def module_of(path: str) -> str:
    """The path without its last part: the module that owns the leaf."""
    return path.rpartition("/")[0]


def generalise(path: str) -> str:
    """The path with the numbers of repeated blocks replaced by `*`.

    >>> generalise("encoder/layers_11/query/kernel")
    'encoder/layers_*/query/kernel'
    """
    return "/".join(re.sub(r"(^|_)\d+$", r"\1*", part) for part in path.split("/"))
