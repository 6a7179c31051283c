"""Layers of equal shape as one stack, and back: the two forms of a repeated block.

    layers/0/q/kernel [i, o], layers/1/q/kernel [i, o]      numbered
    layers/q/kernel [L, i, o]                               stacked, for `lax.scan`

Adapters go along: each array gains an axis for the layers, and remembers that it lies
along the kernel's new first dimension.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jlora._errors import ShapeError, StructureError
from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import RANK, Dims
from jlora._kernel.nodes import LowRank, is_node

Tree = Any
Path = tuple[str, ...]


def stack_layers(tree: Tree, at: Sequence[str] | None = None) -> Tree:
    """Stack numbered layers into leaves with a leading axis.

    What only some of the layers hold stays where it is, under their numbers (T5's
    position bias, in the first block alone).

    Args:
      tree: parameters, plain or lorafied, of arrays or of shapes; dicts inside other
        containers (an optimiser's state) are found.
      at: the dicts to stack, by the end of their paths (`"model/layers"`, `"layers"`);
        `None` is every outermost dict with the keys `"0"` to `"L-1"`.

    Returns:
      The tree with `[L, ...]` for every leaf of those layers, and one adapter a layer
      where there were adapters.

    Raises:
      StructureError: nothing to stack, or layers that are not alike: another rank,
        dropout or role, or adapters on some of them alone.
      ShapeError: leaves of different shapes or dtypes.

    >>> layers = {str(i): {"kernel": jnp.ones((3, 5))} for i in range(2)}
    >>> stack_layers({"layers": layers})["layers"]["kernel"].shape
    (2, 3, 5)
    """

    def change(node: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
        numbers = [key for key in node if str(key).isdigit()]
        whole = sorted(map(int, numbers)) == list(range(len(node)))
        if not (node and whole):
            return None
        return _stacked([node[key] for key in sorted(numbers, key=int)], path)

    return _walk(tree, at, change, "the keys '0' to 'L-1'")


def unstack_layers(tree: Tree, at: Sequence[str]) -> Tree:
    """Undo `stack_layers`: every layer under its number.

    Args:
      tree: parameters as there.
      at: the dicts whose leaves are stacked, by the end of their paths. Those of
        jlora.models are `"layers"` (Llama), `"h"` (GPT-2), `"block"` (T5) and
        `"encoder/layer"` (BERT).

    Raises:
      StructureError: no such dict, or adapters that span only some of the layers.
      ShapeError: leaves that disagree on the number of layers.

    >>> unstack_layers({"layers": {"kernel": jnp.ones((2, 3, 5))}}, ["layers"]).keys()
    dict_keys(['layers'])
    """

    def change(node: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
        return None if _is_numbered(node) else _unstacked(node, path)

    return _walk(tree, at, change, "stacked leaves")


def _is_numbered(node: Mapping[str, Any]) -> bool:
    return all(str(key).isdigit() for key in node)


def _walk(
    tree: Tree,
    at: Sequence[str] | None,
    change: Callable[[Mapping[str, Any], Path], dict[str, Any] | None],
    what: str,
) -> Tree:
    """Change the outermost dicts that `at` means and `change` answers for."""
    if isinstance(at, str):
        raise StructureError(f"at={at!r}: pass a list, [{at!r}].")
    # Every path ends with nothing.
    wanted = {"": ""} if at is None else {e: "/" + e.replace(".", "/") for e in at}
    found: set[str] = set()

    def visit(node: Any, path: Path) -> Any:
        if not isinstance(node, Mapping):
            return node
        joined = "/" + "/".join(path)
        hits = [entry for entry, end in wanted.items() if joined.endswith(end)]
        changed = change(node, path) if hits else None
        if changed is not None:
            found.update(hits)
            return changed
        return {key: visit(value, (*path, str(key))) for key, value in node.items()}

    is_dict = lambda x: is_node(x) or isinstance(x, Mapping)  # noqa: E731
    result = jax.tree.map(lambda x: visit(x, ()), tree, is_leaf=is_dict)
    missed = sorted(wanted.keys() - found)
    if missed:
        named = f"at={at!r}: " + (f"for {missed}, " if at else "")
        raise StructureError(
            f"{named}no dict whose path ends so has {what}.\nThe tree's leaves are at "
            f"{_some_paths(tree)}."
        )
    return result


def _some_paths(tree: Tree) -> str:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_node)
    keys = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in leaves[:3]]
    return ", ".join([*keys, "..."])


# -- stacking --------------------------------------------------------------------------


def _stacked(layers: list[Any], path: Path) -> dict[str, Any]:
    """Return one block of stacked leaves, and what only some layers have."""
    flat = [_flatten(layer) for layer in layers]
    out: dict[str, Any] = {}
    for key in dict.fromkeys(key for leaves in flat for key in leaves):
        having = [i for i, leaves in enumerate(flat) if key in leaves]
        if len(having) == len(layers):
            where = "/".join((*path, "*", *key))
            stack = _stack([leaves[key] for leaves in flat], where, len(key))
            _put(out, key, stack, path)
        else:
            for i in having:
                _put(out, (str(i), *key), flat[i][key], path)
    return out


def _flatten(node: Any, path: Path = ()) -> dict[Path, Any]:
    """Return the leaves of nested dicts by path; a jlora node is a leaf."""
    if not isinstance(node, Mapping):
        return {path: node}
    return {
        key: leaf
        for name, value in node.items()
        for key, leaf in _flatten(value, (*path, str(name))).items()
    }


def _put(tree: dict[str, Any], path: Path, leaf: Any, at: Path) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    if not path or not isinstance(tree, dict) or path[-1] in tree:
        raise StructureError(
            f"{'/'.join((*at, *path))} is there twice: blocks that are numbered "
            "directly under their number cannot be stacked.\nName the inner dicts in "
            "`at`."
        )
    tree[path[-1]] = leaf


def _stack(nodes: list[Any], where: str, depth: int) -> Any:
    """Return the stack of one leaf, which lies `depth` keys inside its layer."""
    first = nodes[0]
    kinds = [type(node) if is_node(node) else None for node in nodes]
    if len(set(kinds)) > 1:
        _differ(where, [_name(node) for node in nodes])
    if not isinstance(first, LowRank):
        return jax.tree.map(lambda *xs: _stack_arrays(list(xs), where), *nodes)
    _alike(where, [sorted(node.adapters) for node in nodes])
    adapters = {
        name: _stack_adapters([n.adapters[name] for n in nodes], where)
        for name in first.adapters
    }
    base = _stack_arrays([node.base for node in nodes], where)
    # A node's path begins where `lorafy` saw the tree begin, which may be elsewhere.
    parts = first.path.split("/")
    del parts[-depth - 1 : -depth]  # the layer's number
    return LowRank(base, adapters, "/".join(parts))


def _stack_adapters(layers: list[Adapter], where: str) -> Adapter:
    _alike(where, [_settings(t) for t in layers])
    _alike(where, [f"rank {t.rank}" for t in layers if hasattr(t.a, "shape")])
    # All but the arrays is alike, so each array gains the axis that its dims gain.
    arrays = [t.tree_flatten()[0] for t in layers]
    stacked = [_stack_arrays(list(xs), where) for xs in zip(*arrays, strict=True)]
    static = _with_dims(layers[0], lambda dims: (0, *(_moved(d, 1) for d in dims)))
    static = dataclasses.replace(static, starts=(0, *static.starts))
    return Adapter.tree_unflatten(static.tree_flatten()[1], stacked)


def _with_dims(t: Adapter, change: Callable[[Dims], Dims]) -> Adapter:
    """Change the dims of all arrays, those of arrays that are not there, too."""
    dims = {f.name: getattr(t, f.name) for f in dataclasses.fields(t)}
    # A scale may be one number. Every other array has an axis, or is never there.
    changed: dict[str, Any] = {
        name: change(held)
        for name, held in dims.items()
        if name == "s_dims" or (name.endswith("_dims") and held)
    }
    return dataclasses.replace(t, **changed)


def _moved(dim: int, by: int) -> int:
    return dim if dim == RANK else dim + by


def _settings(t: Adapter) -> dict[str, Any]:
    """Return what is no array: dims, window, dropout, role."""
    fields = {f.name: getattr(t, f.name) for f in dataclasses.fields(t)}
    plain = (int, float, str, bool, tuple, type(None))
    return {k: v for k, v in fields.items() if isinstance(v, plain) and v is not None}


def _stack_arrays(xs: list[Any], where: str) -> Any:
    if all(x is None for x in xs):
        return None  # a half of a split tree
    _alike(where, [f"{x.dtype}{list(x.shape)}" for x in xs], ShapeError)
    first, shape = xs[0], (len(xs), *xs[0].shape)
    sharding = _sharding(first, lambda spec: (None, *spec))
    if isinstance(first, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, first.dtype, sharding=sharding)
    if isinstance(first, np.ndarray):
        return np.stack(xs)
    stack = jax.jit(lambda *xs: jnp.stack(xs), out_shardings=sharding)
    return jnp.stack(xs) if sharding is None else stack(*xs)


def _sharding(x: Any, change: Callable[[Any], Any]) -> NamedSharding | None:
    sharding = None if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(*change(sharding.spec)))


def _alike(where: str, said: list[Any], error: type = StructureError) -> None:
    if any(each != said[0] for each in said):
        _differ(where, said, error)


def _differ(where: str, said: list[Any], error: type = StructureError) -> None:
    layers: dict[str, list[int]] = {}
    for i, each in enumerate(said):
        layers.setdefault(str(each), []).append(i)
    lines = "\n".join(f"  {each}: layers {i}" for each, i in layers.items())
    raise error(
        f"{where} differs from layer to layer, so the layers make no stack:\n{lines}\n"
        "Keep the numbered form, or make the layers alike (lorafy all of them with "
        "one rank)."
    )


def _name(node: Any) -> str:
    if isinstance(node, LowRank):
        return "adapted"
    return "fully trained" if is_node(node) else "plain"


# -- unstacking ------------------------------------------------------------------------


def _unstacked(node: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return numbered layers; what was under numbers goes back to its layer."""
    stacked = {k: v for k, v in node.items() if not str(k).isdigit()}
    flat = _flatten(stacked)
    sizes = {"/".join(key): _length(leaf) for key, leaf in flat.items()}
    lengths = set(sizes.values()) - {None}
    if len(lengths) != 1 or 0 in lengths:
        raise ShapeError(
            f"{'/'.join(path)}: its leaves do not share a leading axis of layers, but "
            f"have {sizes}.\nName the dict of the layers themselves in `at`."
        )
    (length,) = lengths
    out: dict[str, Any] = {str(i): {} for i in range(length or 0)}
    for key, leaf in flat.items():
        for i in range(length or 0):
            _put(out[str(i)], key, _take(leaf, i, len(key)), path)
    for number, block in node.items():
        if str(number).isdigit():
            for key, leaf in _flatten(block).items():
                _put(out, (str(number), *key), leaf, path)
    return out


def _length(node: Any) -> int | None:
    """Return the size of a leaf's first axis; `None` in a half without it."""
    sizes: list[int] = []

    def note(x: Any, dims: Any) -> Any:
        if x is not None and 0 in dims:
            sizes.append(x.shape[dims.index(0)])
        return x, dims

    if isinstance(node, LowRank):
        note(node.base, (0,))
        for t in node.adapters.values():
            t.map(note)
    else:
        sizes += [x.shape[0] if x.shape else 0 for x in jax.tree.leaves(node)]
    return sizes[0] if sizes else None


def _take(node: Any, i: int, depth: int) -> Any:
    """Return one layer of a leaf, which lies `depth` keys inside its layer."""
    if not isinstance(node, LowRank):
        return jax.tree.map(lambda x: _index(x, 0, i), node)

    def one(t: Adapter) -> Adapter:
        whole = any(x is None for x in (node.base, t.a, t.b)) or t.full(
            0, node.shape[0]
        )
        if t.starts[0] or not whole:
            raise StructureError(
                f"{node.path}: an adapter spans only some of the layers, so they "
                "cannot be told apart.\nAdapt all of them, or merge first."
            )

        def layer(x: Any, dims: Any) -> Any:
            # An array without that dimension is shared by all layers.
            return (_index(x, dims.index(0), i) if 0 in dims else x), dims

        t = _with_dims(
            t.map(layer), lambda dims: tuple(_moved(d, -1) for d in dims if d != 0)
        )
        return dataclasses.replace(t, starts=t.starts[1:])

    parts = node.path.split("/")
    path = "/".join([*parts[:-depth], str(i), *parts[-depth:]])
    changed = node.map(_index(node.base, 0, i), one)
    return dataclasses.replace(changed, path=path)


def _index(x: Any, axis: int, i: int) -> Any:
    if x is None:
        return None
    if isinstance(x, jax.ShapeDtypeStruct):
        shape = (*x.shape[:axis], *x.shape[axis + 1 :])
        sharding = _sharding(x, lambda spec: (*spec[:axis], *spec[axis + 1 :]))
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)
    return x[(slice(None),) * axis + (i,)]
