"""A tree's arrays as Orbax holds them, and back as they were.

Orbax holds no PRNG keys, no arrays of size 0 and nothing that is not an array. Keys are
saved as their data; for the others their place is empty, and they come back from the
description, or from the tree that is restored into.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._errors import CheckpointError
from jlora.checkpoint._digests import has_numbers, is_key, leaf_prints

Tree = Any


def named(tree: Tree) -> dict[str, Any]:
    """A tree's arrays by their paths in full.

    Raises:
      CheckpointError: two have one path.
    """
    leaves = [
        (path, x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if has_numbers(x)
    ]
    names = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in leaves]
    if len(set(names)) < len(names):
        twice = sorted({n for n in names if names.count(n) > 1})
        raise CheckpointError(
            f"several leaves have the path {twice[0]!r}, so a file cannot tell them "
            "apart.\nRename all but one."
        )
    return dict(zip(names, (x for _, x in leaves), strict=True))


def check_has_values(tree: Tree) -> None:
    """Refuse a tree of shapes, and one inside of a transformation.

    Raises:
      CheckpointError: a leaf without values, by its path.
    """
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(x, jax.ShapeDtypeStruct | jax.core.Tracer):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise CheckpointError(
                f"the leaf {name!r} {x.shape} has no values to save.\nSave a tree of "
                "arrays, outside of jax.jit and jax.eval_shape."
            )


def as_arrays(tree: Tree) -> Tree:
    """Numbers and NumPy arrays as JAX takes them, so that they come back the same."""
    ready = jax.Array | jax.ShapeDtypeStruct
    return jax.tree.map(
        lambda x: jnp.asarray(x) if has_numbers(x) and not isinstance(x, ready) else x,
        tree,
    )


def encoded(tree: Tree) -> Tree:
    """What Orbax is to save."""
    return jax.tree.map(
        lambda x: jax.random.key_data(x) if is_key(x) else x, _holdable(tree)
    )


def wanted(template: Tree) -> Tree:
    """What Orbax is to restore, shapes with shardings."""
    return jax.tree.map(_abstract, _holdable(template))


def refilled(template: Tree, restored: Tree, entries: Mapping[str, Any]) -> Tree:
    """The restored leaves in the template's structure, as its leaves were."""
    feed = iter(jax.tree.leaves(restored))
    names = iter(named(template))

    def one(x: Any) -> Any:
        if not has_numbers(x):
            return x
        name = next(names)
        if _is_empty(x):
            return jnp.zeros(x.shape, x.dtype)
        return _like(next(feed), x, entries[name].get("impl"))

    return jax.tree.map(one, template)


def entries_of(arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What is noted of arrays; of PRNG keys also how they generate."""
    prints = leaf_prints(list(arrays.values()))
    found = {name: x.to_json() for name, x in zip(arrays, prints, strict=True)}
    for name, x in arrays.items():
        if is_key(x):
            found[name]["impl"] = str(jax.random.key_impl(x))
    return found


def _is_empty(x: Any) -> bool:
    return 0 in getattr(x, "shape", ())


def _holdable(tree: Tree) -> Tree:
    """The tree with nothing in the place of what Orbax does not hold."""
    return jax.tree.map(
        lambda x: x if has_numbers(x) and not _is_empty(x) else None, tree
    )


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    """What to ask Orbax for: always with a sharding, keys as their data."""
    sharding = getattr(x, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if is_key(x):
        data = jax.eval_shape(jax.random.key_data, x)
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _like(data: jax.Array, x: Any, impl: str | None) -> Any:
    if not getattr(x, "committed", getattr(x, "sharding", None) is not None):
        # Orbax commits to a device; a state that was free stays free to go anywhere.
        data = jnp.asarray(np.asarray(data))
    return data if impl is None else jax.random.wrap_key_data(data, impl=impl)


def own_copies(arrays: dict[str, Any]) -> dict[str, Any]:
    """Copies of arrays that the next step may reuse the memory of.

    Orbax copies what lies on an accelerator before it returns; of what lies in the
    host's memory it keeps a view.
    """

    def one(x: Any) -> Any:
        if isinstance(x, jax.Array) and _platform(x) == "cpu":
            return jnp.copy(x)
        return x

    return {name: one(x) for name, x in arrays.items()}


def _platform(x: jax.Array) -> str:
    return str(next(iter(x.devices())).platform)
