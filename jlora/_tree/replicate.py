"""Layers repeated: a deeper model of the same weights, each copy adapted by itself."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jlora._errors import OptionError, StructureError
from jlora._kernel.nodes import is_array, is_node
from jlora._paths import Tree
from jlora._tree import stack


def replicate_layers(
    tree: Tree, ranges: Sequence[Sequence[int]], at: Sequence[str]
) -> Tree:
    """The parameters of a model whose layers are ranges of those of another.

    `[[0, 4], [2, 5]]` is layers 0 to 3 and then 2 to 4: seven, of five. Lorafied, each
    copy has an adapter of its own. Numbered copies share their arrays; stacked layers
    are copied, for a scan takes one array.

    Args:
      tree: plain parameters, of arrays or of shapes.
      ranges: pairs `[start, end]`, the end not included.
      at: the dicts that hold the layers, numbered or stacked, by the end of their
        paths, `["layers"]`.

    Raises:
      OptionError: ranges that are no such pairs, or beyond the layers.
      StructureError: no such dict; a tree that has adapters already.

    Source: PEFT's `layer_replication`.

    >>> layers = {str(i): {"kernel": jnp.full((2, 2), i)} for i in range(3)}
    >>> deep = replicate_layers({"layers": layers}, [[0, 2], [1, 3]], ["layers"])
    >>> [int(x["kernel"][0, 0]) for x in deep["layers"].values()]
    [0, 1, 1, 2]
    """
    order = _order(ranges)
    leaves = jax.tree.leaves(tree, is_leaf=is_node)
    if any(map(is_node, leaves)):
        raise StructureError(
            "jlora.replicate_layers takes plain parameters, and these have adapters.\n"
            "Replicate the base first, then lorafy it: each copy has its own then."
        )

    def change(node: Any, path: tuple[str, ...]) -> Any:
        numbers = [key for key in node if str(key).isdigit()]
        if len(numbers) < len(node):
            return _of_stack(node, order, path)
        kind = type(numbers[0])
        _check_depth(order, len(numbers), path)
        return stack._like(
            node, {kind(i): node[kind(n)] for i, n in enumerate(order)}, path
        )

    return stack._walk(tree, at, change, "layers", None)


def _order(ranges: Any) -> list[int]:
    """The layers' numbers, one after the other."""
    try:
        pairs = [tuple(map(operator.index, pair)) for pair in ranges]
        fits = bool(pairs) and all(0 <= start < end for start, end in pairs)
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise OptionError(
            f"ranges={ranges!r}: expected pairs of layers' numbers, [[0, 4], [2, 5]]."
        )
    return [n for start, end in pairs for n in range(start, end)]


def _of_stack(node: Mapping[Any, Any], order: list[int], path: tuple[str, ...]) -> Any:
    if mixed := [key for key in node if str(key).isdigit()]:
        raise StructureError(
            f"{'/'.join(path)} is a stack, and holds leaves of layer {mixed[0]!r} "
            "alone.\nUnstack it first: jlora.unstack_layers(tree, at=[...])."
        )

    def one(x: Any) -> Any:
        if not is_array(x):
            return x
        _check_depth(order, x.shape[0] if x.shape else 0, path)
        if isinstance(x, jax.ShapeDtypeStruct):
            shape = (len(order), *x.shape[1:])
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)
        return x[np.asarray(order)]

    return jax.tree.map(one, node)


def _check_depth(order: list[int], depth: int, path: tuple[str, ...]) -> None:
    if max(order) >= depth:
        raise OptionError(
            f"ranges go to layer {max(order)}, and {'/'.join(path)} has {depth}."
        )
