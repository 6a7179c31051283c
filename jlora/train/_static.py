"""Trees that also hold what is no array, as compiled functions take them.

Equinox keeps activation functions, numbers and strings as leaves. A compiled function
takes arrays alone; the rest is part of its program.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jlora._errors import StructureError
from jlora._paths import path_str

Tree = Any


def is_array(x: Any) -> bool:
    """Whether x is data for a compiled function: an array, or the shape of one."""
    # By type first: asking jax.Array takes long, and a model has hundreds of leaves.
    kind: Any = type(x)
    return _is_array_type(kind) or isinstance(x, jax.Array)


@functools.cache
def _is_array_type(kind: Any) -> bool:
    known = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
    return issubclass(kind, known)


class Rest(NamedTuple):
    """A tree without its arrays: hashable, a key for what was compiled.

    Attributes:
      structure: the tree's.
      leaves: its other leaves by number, each with its type, as `1 == True`.
    """

    structure: Any
    leaves: tuple[tuple[int, type, Hashable], ...]


def take_apart(tree: Tree) -> tuple[list[Any], Rest]:
    """A tree's arrays, and the rest of it.

    Raises:
      StructureError: a leaf that is neither an array nor hashable.
    """
    leaves, structure = jax.tree.flatten(tree)
    arrays = [x for x in leaves if is_array(x)]
    if len(arrays) == len(leaves):
        return arrays, Rest(structure, ())
    others = [(n, type(x), x) for n, x in enumerate(leaves) if not is_array(x)]
    for n, kind, x in others:
        try:
            hash(x)
        except TypeError as error:
            path = path_str(jax.tree_util.tree_leaves_with_path(tree)[n][0])
            raise StructureError(
                f"the leaf {path!r} is a {kind.__name__}: neither an array nor "
                "something that can be compiled into a step (it has no hash).\nKeep it "
                "outside the parameters, and close over it in the function."
            ) from error
    return arrays, Rest(structure, tuple(others))


def put_together(arrays: Sequence[Any], rest: Rest) -> Tree:
    """Undo `take_apart`, with other arrays maybe."""
    if not rest.leaves:
        return jax.tree.unflatten(rest.structure, arrays)
    others = {n: x for n, _, x in rest.leaves}
    feed = iter(arrays)
    count = len(arrays) + len(others)
    leaves = [others[n] if n in others else next(feed) for n in range(count)]
    return jax.tree.unflatten(rest.structure, leaves)
