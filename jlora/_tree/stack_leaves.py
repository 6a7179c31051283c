"""One leaf of all layers as a stack, with its adapters, and one layer of a stack."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jlora._errors import ShapeError, StructureError
from jlora._kernel.adapter import DIMS_OF, PARTS, Adapter
from jlora._kernel.axes import Dims
from jlora._kernel.nodes import Full, LowRank, Rows, is_array, is_node
from jlora._kernel.opaque import Note
from jlora._kernel.quantized import Quantized
from jlora._paths import module_of

# -- stacking --------------------------------------------------------------------------


def stack_leaf(leaves: list[Any], where: str, inner: str) -> Any:
    """The stack of one leaf of all layers; jlora's nodes are leaves.

    Args:
      leaves: the leaf of each layer.
      where: its path, for messages.
      inner: its path inside its layer, which ends the path that a node knows.

    Raises:
      StructureError: leaves that are not alike; trained rows of a table.
      ShapeError: arrays of different shapes or dtypes.
    """
    first = leaves[0]
    _alike(where, [_kind(leaf) for leaf in leaves])
    if isinstance(first, Rows):
        raise StructureError(
            f"{where} is a table with trained rows, and tables make no stack.\nKeep "
            "the numbered form, or merge first."
        )
    if isinstance(first, Full):
        value = _stack_arrays([leaf.value for leaf in leaves], where)
        return Full(value, _without_number(first.path, inner))
    if not isinstance(first, LowRank):
        return _stack_bases(leaves, where, inner)
    _alike(where, [sorted(node.adapters) for node in leaves])
    adapters = {
        name: _stack_adapters([node.adapters[name] for node in leaves], where)
        for name in first.adapters
    }
    base = _stack_bases([node.base for node in leaves], where, inner)
    return LowRank(base, adapters, _without_number(first.path, inner))


def _stack_bases(layers: list[Any], where: str, inner: str) -> Any:
    """Kernels, of which all or none are quantised."""
    first = layers[0]
    _alike(where, [type(x) is Quantized for x in layers])
    if not isinstance(first, Quantized):
        return _stack_arrays(layers, where)
    _alike(where, [x.layout for x in layers])
    arrays = zip(*(x.tree_flatten()[0] for x in layers), strict=True)
    stacked = [_stack_arrays(list(xs), where) for xs in arrays]
    path = _without_number(first.path, inner)
    return Quantized.tree_unflatten((first.layout, Note(path)), stacked)


# A node's path begins where `lorafy` saw the tree begin, which may be elsewhere.


def _without_number(path: str, inner: str) -> str:
    """A node's path without the number of its layer."""
    above = module_of(path.removesuffix(inner).removesuffix("/"))
    return f"{above}/{inner}" if above else inner


def _with_number(path: str, inner: str, number: int) -> str:
    """A node's path with the number of its layer."""
    return f"{path.removesuffix(inner)}{number}/{inner}"


def _stack_adapters(layers: list[Adapter], where: str) -> Adapter:
    _alike(where, [_settings(t) for t in layers])
    _alike(where, [f"rank {t.rank}" for t in layers if hasattr(t.a, "shape")])
    # All but the arrays is alike, so each array gains the axis that its dims gain.
    arrays = [t.tree_flatten()[0][:-1] for t in layers]
    stacked = [_stack_arrays(list(xs), where) for xs in zip(*arrays, strict=True)]
    stacked.append(_stack_parts([t.parts for t in layers], where))
    static = _with_dims(layers[0], lambda dims: (0, *(_moved(d, 1) for d in dims)))
    dims = tuple((n, d[PARTS[n] == "frozen" :]) for n, d in static.p_dims)
    static = dataclasses.replace(static, starts=(0, *static.starts), p_dims=dims)
    return Adapter.tree_unflatten(static.tree_flatten()[1], stacked)


def _stack_parts(layers: list[Any], where: str) -> Any:
    """The stack of what other forms are made of; all layers share the projections."""
    if layers[0] is None:
        return None
    return {
        n: (_same if PARTS[n] == "frozen" else _stack_arrays)(
            [parts[n] for parts in layers], where
        )
        for n in layers[0]
    }


def _with_dims(t: Adapter, change: Callable[[Dims], Dims]) -> Adapter:
    """Change the dims of all arrays, those of arrays that are not there, too."""
    dims = {f.name: getattr(t, f.name) for f in dataclasses.fields(t)}
    # A scale may be one number. Every other array has an axis, or is never there.
    changed: dict[str, Any] = {
        name: change(held)
        for name, held in dims.items()
        if name == "s_dims" or (name in DIMS_OF.values() and held)
    }
    parts = tuple((name, change(held)) for name, held in t.p_dims)
    return dataclasses.replace(t, **changed, p_dims=parts)


def _moved(dim: int, by: int) -> int:
    return dim if dim < 0 else dim + by


def _settings(t: Adapter) -> dict[str, Any]:
    """Return what is no array: dims, window, dropout, role."""
    fields = {f.name: getattr(t, f.name) for f in dataclasses.fields(t)}
    plain = (int, float, str, bool, tuple, type(None))
    return {k: v for k, v in fields.items() if isinstance(v, plain) and v is not None}


def _stack_arrays(xs: list[Any], where: str) -> Any:
    if not any(map(is_array, xs)):
        return _same(xs, where)  # or None, in a half of a split tree
    kinds = [f"{x.dtype}{list(x.shape)}" if is_array(x) else repr(x) for x in xs]
    _alike(where, kinds, ShapeError)
    first, shape = xs[0], (len(xs), *xs[0].shape)
    sharding = _sharding(first, lambda spec: (None, *spec))
    if isinstance(first, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, first.dtype, sharding=sharding)
    if isinstance(first, np.ndarray):
        return np.stack(xs)
    stack = jax.jit(lambda *xs: jnp.stack(xs), out_shardings=sharding)
    return jnp.stack(xs) if sharding is None else stack(*xs)


def _same(xs: list[Any], where: str) -> Any:
    """What is no array, if all layers have the same."""
    if any(x is not xs[0] and not _equal(x, xs[0]) for x in xs):
        _differ(where, [repr(x) for x in xs])
    return xs[0]


def _equal(x: Any, y: Any) -> bool:
    return type(x) is type(y) and bool(np.all(x == y))


def _sharding(x: Any, change: Callable[[Any], Any]) -> NamedSharding | None:
    sharding = None if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(*change(sharding.spec)))


def _alike(where: str, kinds: list[Any], error: type = StructureError) -> None:
    if any(kind != kinds[0] for kind in kinds):
        _differ(where, kinds, error)


def _differ(where: str, kinds: list[Any], error: type = StructureError) -> None:
    layers: dict[str, list[int]] = {}
    for i, each in enumerate(kinds):
        layers.setdefault(str(each), []).append(i)
    lines = "\n".join(f"  {each}: layers {i}" for each, i in layers.items())
    raise error(
        f"{where} differs from layer to layer, so the layers make no stack:\n{lines}\n"
        "Keep the numbered form, or make the layers alike (lorafy all of them with "
        "one rank)."
    )


def _kind(leaf: Any) -> str:
    if isinstance(leaf, LowRank):
        return "adapted"
    return "trained" if is_node(leaf) else "plain"


# -- unstacking ------------------------------------------------------------------------


def number_of_layers(leaf: Any, path: str) -> int | None:
    """The size of a leaf's first axis; `None` in a half without it, and of no array.

    Raises:
      StructureError: trained rows of a table, which are no stack.
    """
    if isinstance(leaf, Rows):
        raise StructureError(
            f"{path} is a table with trained rows, and no stack of layers.\nName the "
            "dict of the layers themselves in `at`, or merge first."
        )
    if isinstance(leaf, LowRank):
        sizes: list[int] = []

        def note(x: Any, dims: Any) -> Any:
            if is_array(x) and 0 in dims:
                sizes.append(x.shape[dims.index(0)])
            return x, dims

        for x in jax.tree.leaves(leaf.base):
            note(x, (0,))
        for t in leaf.adapters.values():
            t.map(note)
        return sizes[0] if sizes else None
    x = leaf.value if isinstance(leaf, Full) else leaf
    if isinstance(x, Quantized):
        codes = x.codes
        return codes.shape[0] if is_array(codes) and x.batch else None
    if not is_array(x):
        return None
    return x.shape[0] if x.shape else 0


def layer_of(leaf: Any, i: int, inner: str) -> Any:
    """One layer of a stacked leaf, whose path inside of the stack is `inner`.

    Raises:
      StructureError: an adapter that spans only some of the layers.
    """
    if isinstance(leaf, Full):
        return Full(_index(leaf.value, 0, i), _with_number(leaf.path, inner, i))
    if not isinstance(leaf, LowRank):
        return _base_of(leaf, i, inner)

    def one(t: Adapter) -> Adapter:
        is_half = not all(map(is_array, (*jax.tree.leaves(leaf.base), t.a, t.b)))
        is_half = is_half or not jax.tree.leaves(leaf.base)
        if t.starts[0] or not (is_half or t.full(0, leaf.shape[0])):
            raise StructureError(
                f"{leaf.path}: an adapter spans only some of the layers, so they "
                "cannot be told apart.\nAdapt all of them, or merge first."
            )

        def layer(x: Any, dims: Any) -> Any:
            # An array without that dimension is shared by all layers.
            return (_index(x, dims.index(0), i) if 0 in dims else x), dims

        t = _with_dims(
            t.map(layer), lambda dims: tuple(_moved(d, -1) for d in dims if d != 0)
        )
        return dataclasses.replace(t, starts=t.starts[1:])

    changed = leaf.map(_base_of(leaf.base, i, inner), one)
    return dataclasses.replace(changed, path=_with_number(leaf.path, inner, i))


def _base_of(x: Any, i: int, inner: str) -> Any:
    if not isinstance(x, Quantized):
        return _index(x, 0, i)
    one = x.map(lambda array: _index(array, 0, i))
    return dataclasses.replace(one, path=_with_number(x.path, inner, i))


def _index(x: Any, axis: int, i: int) -> Any:
    if not is_array(x):
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        shape = (*x.shape[:axis], *x.shape[axis + 1 :])
        sharding = _sharding(x, lambda spec: (*spec[:axis], *spec[axis + 1 :]))
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)
    return x[(slice(None),) * axis + (i,)]
