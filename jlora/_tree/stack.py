"""Layers of equal shape as one stack, and back: the two forms of a repeated block.

    layers/0/q/kernel [i, o], layers/1/q/kernel [i, o]      numbered
    layers/q/kernel [L, i, o]                               stacked, for `lax.scan`

Adapters go along: each array gains an axis for the layers, and remembers that it lies
along the kernel's new first dimension. Dicts keep their types, `nnx.State` and
`FrozenDict` among them.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax

from jlora._errors import OptionError, ShapeError, StructureError
from jlora._kernel.nodes import is_node
from jlora._paths import Tree, leaf_paths, leaves_by_path, map_with_path
from jlora._tree.stack_leaves import layer_of, number_of_layers, stack_leaf

Path = tuple[str, ...]
Keys = type[str] | type[int]  # of numbered layers: "0", "1", ... or 0, 1, ...
M = TypeVar("M", bound=Mapping[Any, Any])
Change = Callable[[Any, Path], Any]


def stack_layers(
    tree: Tree, at: Sequence[str] | None = None, *, keys: Keys | None = None
) -> Tree:
    """Stack numbered layers into leaves with a leading axis.

    What only some of the layers hold stays where it is, under their numbers (T5's
    position bias, in the first block alone). Leaves that are no arrays, functions say,
    must be equal in all layers, and stay as they are.

    Args:
      tree: parameters, plain or lorafied, of arrays or of shapes; dicts inside other
        containers (an optimiser's state) are found.
      at: the dicts to stack, by the end of their paths (`"model/layers"`, `"layers"`);
        `None` is every outermost dict with keys that number layers from 0 on.
      keys: what these keys are: `str` for `"0", "1", ...`, `int` for `0, 1, ...`.
        `None` is `int` in an `nnx.State` and `str` in other dicts.

    Returns:
      The tree with `[L, ...]` for every leaf of those layers, and one adapter a layer
      where there were adapters. Dicts are of the types they were.

    Raises:
      StructureError: nothing to stack, or layers that are not alike: another rank,
        dropout or role, adapters on some of them alone, or other containers.
      ShapeError: leaves of different shapes or dtypes.
      OptionError: `keys` that are neither.

    >>> layers = {str(i): {"kernel": jnp.ones((3, 5))} for i in range(2)}
    >>> stack_layers({"layers": layers})["layers"]["kernel"].shape
    (2, 3, 5)
    """
    _check_keys(keys)

    def change(node: M, path: Path) -> M | None:
        kind = keys or _usual_keys(node)
        numbers = [key for key in node if _is_number(key, kind)]
        if not node or sorted(map(int, numbers)) != list(range(len(node))):
            return None
        return _stacked(node, sorted(numbers, key=int), path)

    return _walk(tree, at, change, "keys that number layers from 0 on", keys)


def unstack_layers(tree: Tree, at: Sequence[str], *, keys: Keys | None = None) -> Tree:
    """Undo `stack_layers`: every layer under its number.

    Args:
      tree: parameters as there.
      at: the dicts whose leaves are stacked, by the end of their paths. Those of
        jlora.models are `"layers"` (Llama), `"h"` (GPT-2), `"block"` (T5) and
        `"encoder/layer"` (BERT).
      keys: what the numbers are, as there.

    Raises:
      StructureError: no such dict, or adapters that span only some of the layers.
      ShapeError: leaves that disagree on the number of layers.
      OptionError: `keys` that are neither.

    >>> unstack_layers({"layers": {"kernel": jnp.ones((2, 3, 5))}}, ["layers"]).keys()
    dict_keys(['layers'])
    """
    _check_keys(keys)

    def change(node: M, path: Path) -> M | None:
        kind = keys or _usual_keys(node)
        if all(_is_number(key, kind) for key in node):
            return None
        return _unstacked(node, kind, path)

    return _walk(tree, at, change, "stacked leaves", keys)


# -- dicts and their keys --------------------------------------------------------------


def _check_keys(keys: Any) -> None:
    if keys not in (None, str, int):
        raise OptionError(f"keys={keys!r}: expected str, int or None.")


def _usual_keys(node: Mapping[Any, Any]) -> Keys:
    """What numbers a framework's layers: NNX's lists have integers in a state."""
    return int if _is_state(node) else str


def _is_state(node: Any) -> bool:
    """Whether it is an `nnx.State`; Flax is not imported for it."""
    return any(
        c.__name__ == "State" and c.__module__.startswith("flax.")
        for c in type(node).__mro__
    )


def _is_number(key: Any, kind: Keys) -> bool:
    if kind is int:
        return isinstance(key, int) and not isinstance(key, bool) and key >= 0
    return isinstance(key, str) and re.fullmatch(r"0|[1-9][0-9]*", key) is not None


def _is_dict(x: Any) -> bool:
    """Whether it is a dict of JAX's trees; other mappings are leaves."""
    return isinstance(x, Mapping) and not (x and jax.tree_util.all_leaves([x]))


def _like(node: M, items: Mapping[Any, Any], path: Path) -> M:
    """A dict of the same type as `node` with other items."""
    make: Callable[[Any], Any] = type(node)
    if isinstance(node, collections.defaultdict):
        make = lambda items: collections.defaultdict(node.default_factory, items)  # noqa: E731
    if _is_state(node):  # a state inside of a state is a plain dict there
        items = {k: x.raw_mapping if _is_state(x) else x for k, x in items.items()}
    try:
        made = make(dict(items))
        jax.tree.structure(made)  # JAX sorts keys
        if type(made) is type(node) and {*made} == {*items}:
            return made
    except (TypeError, ValueError):
        pass
    raise StructureError(
        f"{_joined(path)} is a {type(node).__name__}, and none can be made with the "
        f"keys {list(items)[:8]}.\nMake a dict of it first, with strings for keys."
    )


def _joined(path: Path) -> str:
    return "/".join(filter(None, path))


def _walk(
    tree: Tree, at: Sequence[str] | None, change: Change, what: str, keys: Keys | None
) -> Tree:
    """Change the outermost dicts that `at` means and `change` answers for."""
    if isinstance(at, str):
        raise StructureError(f"at={at!r}: pass a list, [{at!r}].")
    # Every path ends with nothing.
    wanted = {"": ""} if at is None else {e: "/" + e.replace(".", "/") for e in at}
    found: set[str] = set()
    other_keys: list[Path] = []

    def visit(node: Any, path: Path) -> Any:
        if is_node(node):
            return node
        if not _is_dict(node):
            return _map_children(visit, node, path)
        joined = "/" + "/".join(path)
        hits = [entry for entry, end in wanted.items() if joined.endswith(end)]
        changed = change(node, path) if hits else None
        if changed is not None:
            found.update(hits)
            return changed
        other = str if (keys or _usual_keys(node)) is int else int
        if hits and node and all(_is_number(key, other) for key in node):
            other_keys.append(path)
        held = dict(node.items())
        items = {key: visit(x, (*path, str(key))) for key, x in held.items()}
        same = all(items[key] is held[key] for key in held)
        return node if same else _like(node, items, path)

    result = visit(tree, ())
    missed = sorted(wanted.keys() - found)
    if missed:
        named = f"at={at!r}: " + (f"for {missed}, " if at else "")
        hint = ""
        if other_keys:
            kind = "int" if keys is not int else "str"
            hint = (
                f"\nThe numbers in {_joined(other_keys[0])} are keys of another type: "
                f"pass keys={kind}, here and to jlora.unstack_layers."
            )
        raise StructureError(
            f"{named}no dict whose path ends so has {what}.{hint}\nThe tree's leaves "
            f"are at {', '.join([*leaf_paths(tree, is_node)[:3], '...'])}."
        )
    return result


def _map_children(f: Change, node: Any, path: Path) -> Any:
    """`f(dict, path)` of the outermost dicts inside another container."""
    stop = lambda x: x is not node and (is_node(x) or _is_dict(x))  # noqa: E731

    def one(keys: Any, x: Any) -> Any:
        if is_node(x) or not _is_dict(x):
            return x
        inner = (jax.tree_util.keystr((key,), simple=True) for key in keys)
        return f(x, (*path, *inner))

    return jax.tree_util.tree_map_with_path(one, node, is_leaf=stop)


# -- stacking --------------------------------------------------------------------------

_NOTHING: Any = object()  # no part of the layers has it


def _stacked(node: M, numbers: list[Any], path: Path) -> M:
    """One block of stacked leaves, and what only some layers have."""
    layers = [node[number] for number in numbers]
    if any(not _is_dict(layer) for layer in layers):
        raise StructureError(
            f"{_joined(path)} numbers layers that are no dicts, so a stack of them "
            "could not be told from one layer.\nGive each leaf a name: "
            "{'0': {'kernel': ...}, ...}."
        )
    types = {type(node).__name__, *(type(layer).__name__ for layer in layers)}
    if len(types) > 1:
        raise StructureError(
            f"{_joined(path)} and its layers are of different types, {sorted(types)}.\n"
            "Make them all of one."
        )
    block, rest = _stack_dicts(layers, (*path, "*"), ())
    numbered = dict(zip(numbers, rest, strict=True))
    items = {} if block is _NOTHING else dict(block.items())
    twice = [key for key in items if any(_is_number(key, kind) for kind in (str, int))]
    if twice:
        raise StructureError(
            f"{_joined((*path, '*', str(twice[0])))} is there twice: blocks that are "
            "numbered directly under their number cannot be stacked.\nName the inner "
            "dicts in `at`."
        )
    items |= {n: own for n, own in numbered.items() if own is not _NOTHING}
    return _like(node, items, path)


def _stack_dicts(layers: list[Any], where: Path, inner: Path) -> tuple[Any, list[Any]]:
    """The stack of what all dicts have, and for each what is its own."""
    first = layers[0]
    shared: dict[Any, Any] = {}
    own: list[dict[Any, Any]] = [{} for _ in layers]
    for key in dict.fromkeys(key for layer in layers for key in layer):
        having = [i for i, layer in enumerate(layers) if key in layer]
        if len(having) < len(layers):
            for i in having:
                own[i][key] = layers[i][key]
            continue
        parts = [layer[key] for layer in layers]
        stack, rest = _stack(parts, (*where, str(key)), (*inner, str(key)))
        if stack is not _NOTHING:
            shared[key] = stack
        for held, part in zip(own, rest, strict=True):
            if part is not _NOTHING:
                held[key] = part
    empty = not any(layers)
    block = _like(first, shared, where) if shared or empty else _NOTHING
    rest = [
        _like(layer, held, where) if held else _NOTHING
        for layer, held in zip(layers, own, strict=True)
    ]
    return block, rest


def _stack(parts: list[Any], where: Path, inner: Path) -> tuple[Any, list[Any]]:
    """The stack of a part of all layers, and for each layer what is its own."""
    if all(map(_is_dict, parts)) and len({*map(type, parts)}) == 1:
        return _stack_dicts(parts, where, inner)
    kinds: list[Any] = [jax.tree.structure(part, is_leaf=is_node) for part in parts]
    if any(kind != kinds[0] for kind in kinds):
        raise StructureError(
            f"{_joined(where)} has another structure in some of the layers: "
            f"{' and '.join(dict.fromkeys(map(str, kinds)))}.\nKeep the numbered form, "
            "or make the layers alike."
        )
    paths = leaf_paths(parts[0], is_node)
    leaves = [jax.tree.leaves(part, is_leaf=is_node) for part in parts]
    stacks = [
        stack_leaf(list(xs), _joined((*where, path)), _joined((*inner, path)))
        for path, *xs in zip(paths, *leaves, strict=True)
    ]
    return jax.tree.unflatten(kinds[0], stacks), [_NOTHING] * len(parts)


# -- unstacking ------------------------------------------------------------------------


def _unstacked(node: M, kind: Keys, path: Path) -> M:
    """Numbered layers; what was under numbers goes back to its layer."""
    stacked = {key: x for key, x in node.items() if not _is_number(key, kind)}
    own = {key: x for key, x in node.items() if _is_number(key, kind)}
    leaves = leaves_by_path(stacked, is_leaf=is_node)
    sizes = {name: number_of_layers(x, name) for name, x in leaves.items()}
    lengths = set(sizes.values()) - {None}
    if len(lengths) != 1 or 0 in lengths:
        raise ShapeError(
            f"{_joined(path)}: its leaves do not share a leading axis of layers, but "
            f"have {sizes}.\nName the dict of the layers themselves in `at`."
        )
    (length,) = lengths
    numbers = [kind(i) for i in range(length or 0)]
    if extra := [key for key in own if key not in numbers]:
        raise ShapeError(
            f"{_joined(path)} has {length} layers, and leaves of a layer {extra[0]!r}."
        )
    layers: dict[Any, Any] = {}
    for i, number in enumerate(numbers):
        items = {key: _layer(x, i, str(key)) for key, x in stacked.items()}
        layer = _like(node, items, path)
        layers[number] = _united(layer, own.get(number, {}), (*path, str(number)))
    return _like(node, layers, path)


def _layer(stacked: Any, i: int, key: str) -> Any:
    """One layer of what the stack holds under a key."""
    one = lambda name, leaf: layer_of(leaf, i, _joined((key, name)))  # noqa: E731
    return map_with_path(one, stacked, is_node)


def _united(one: M, other: Mapping[Any, Any], path: Path) -> M:
    """Two dicts of other leaves as one."""
    if not other:
        return one
    items = dict(one.items())
    for key, x in other.items():
        if key in items and not (_is_dict(items[key]) and _is_dict(x)):
            raise StructureError(f"{_joined((*path, str(key)))} is there twice.")
        inner = (*path, str(key))
        items[key] = _united(items[key], x, inner) if key in items else x
    return _like(one, items, path)
