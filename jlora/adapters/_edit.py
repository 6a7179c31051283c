"""Changing a set: each function returns another one, of the same arrays."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax

from jlora._errors import OptionError, StructureError
from jlora._kernel.bank import has_bank
from jlora._kernel.nodes import LowRank, is_node, is_trained, same_structure
from jlora._paths import Tree, leaf_paths, leaves_by_path, map_with_path
from jlora._text import listed
from jlora._tree import options
from jlora._tree.partition import check_trained
from jlora.adapters._pad import pad_parts
from jlora.adapters._parts import Part, is_part, parts_of
from jlora.adapters._same_base import check_same_base
from jlora.adapters._set import AdapterSet

_NAME = re.compile(r"\w[\w.-]*")


def add(
    to: AdapterSet | Tree,
    name: str,
    tree: Tree,
    *,
    pad_to: int | None = None,
    inference: bool = False,
) -> AdapterSet:
    """Add an adapter to a set, or begin one with it.

    A set's first adapter is active; others become so by `jlora.activate`.

    Args:
      to: a set, or the plain parameters that are to be its base.
      name: a word that a file may be called: letters, digits, `_`, `-` and `.`.
      tree: the adapter on that base: from `jlora.lorafy`, `jlora.peft.load`,
        `jlora.checkpoint.load_adapter`, `jlora.weighted` or a training run. Its base's
        arrays are not kept.
      pad_to: the rank of all its factors, from which zeros make up what is missing. It
        computes the same, and adapters of different ranks share compiled programs.
      inference: forget `dropout` and `rslora`, which only training and files need, so
        that adapters which differ in them share programs too. The scale stays.

    Raises:
      OptionError: a name that is taken or cannot be one; an unknown argument.
      StructureError: `to` is a lorafied tree; `tree` is of another base, or holds no
        adapter.
      ShapeError: a `pad_to` below a rank of the adapter.

    >>> base = {"query": jnp.ones((3, 2))}
    >>> adapters = jlora.add(base, "a", jlora.lorafy(base, 1, ["query"]))
    >>> jlora.add(adapters, "b", jlora.lorafy(base, 2, ["query"])).names
    ('a', 'b')
    """
    adapters = to if isinstance(to, AdapterSet) else _begun(to)
    _check_free(adapters, name)
    options.flags(inference=inference)
    parts = _checked_parts(adapters, name, tree)
    if inference:
        parts = _with_settings(
            parts, lambda path, role: {"dropout": 0.0, "rslora": False}
        )
    if pad_to is not None:
        rank = options.whole_rank(pad_to)
        parts = pad_parts(parts, lambda path, role: rank)
    active = adapters.active or (() if adapters.adapters else (name,))
    return AdapterSet(adapters.base, {**adapters.adapters, name: parts}, active)


def activate(adapters: AdapterSet, names: str | Sequence[str]) -> AdapterSet:
    """Make one adapter active, or several whose updates add.

    Args:
      adapters: a set.
      names: one name, or a list of them; their order does not matter.

    Returns:
      The set, of which `params` is the tree of these adapters.

    Raises:
      OptionError: a name that is not there, or no name at all.
      StructureError: several adapters train one leaf whole, or the same rows.
    """
    _check_set("jlora.activate", adapters)
    wanted = [names] if isinstance(names, str) else list(names)
    if not wanted:
        raise OptionError(
            "jlora.activate was given no names.\nThe base alone is "
            "jlora.disable(adapters).params."
        )
    known = [adapters.known(name) for name in wanted]
    active = tuple(name for name in adapters.names if name in known)
    made = dataclasses.replace(adapters, active=active)
    _ = made.params  # what cannot be active together is refused here
    return made


def disable(adapters: AdapterSet) -> AdapterSet:
    """Make no adapter active: `params` is the base, the same arrays."""
    _check_set("jlora.disable", adapters)
    return dataclasses.replace(adapters, active=())


def rename(adapters: AdapterSet, old: str, new: str) -> AdapterSet:
    """Give an adapter another name; it stays active if it was.

    Raises:
      OptionError: there is none of that name, or the new one is taken or cannot be one.
    """
    _check_set("jlora.rename", adapters)
    adapters.known(old)
    _check_free(adapters, new)
    called = lambda name: new if name == old else name  # noqa: E731
    return AdapterSet(
        adapters.base,
        {called(name): parts for name, parts in adapters.adapters.items()},
        tuple(map(called, adapters.active)),
    )


def remove(adapters: AdapterSet, name: str) -> AdapterSet:
    """Leave out an adapter that is not active; its arrays are free if nobody has them.

    Raises:
      OptionError: there is none of that name, or it is active.
    """
    _check_set("jlora.remove", adapters)
    if adapters.known(name) in adapters.active:
        raise OptionError(
            f"the adapter {name!r} is active and cannot be removed.\nActivate another "
            "one first, jlora.activate(adapters, name), or none, "
            "jlora.disable(adapters)."
        )
    rest = {n: parts for n, parts in adapters.adapters.items() if n != name}
    return dataclasses.replace(adapters, adapters=rest)


def update(adapters: AdapterSet, name: str, tree: Tree) -> AdapterSet:
    """Put other numbers into an adapter: what was trained of it, or another's.

    The adapter keeps its structure and shapes, so that no jitted function compiles
    again: lower ranks are padded to those that it has, which computes the same, and
    its `dropout` and `rslora` stay.

    Args:
      adapters: a set.
      name: of an adapter in it.
      tree: a lorafied tree on the set's base: after training
        `jlora.combine(trainable, frozen)`, or what was loaded.

    Raises:
      OptionError: there is no adapter of that name.
      StructureError: a tree of another base; other targets, variants or dtypes.
      ShapeError: a higher rank than the adapter has.
    """
    _check_set("jlora.update", adapters)
    old = adapters.adapters[adapters.known(name)]
    new = _checked_parts(adapters, name, tree)
    terms = _terms(old)
    same = lambda path, role: _settings(terms.get((path, role)))  # noqa: E731
    new = _with_settings(new, same)
    if _terms(new).keys() == terms.keys():
        new = pad_parts(new, lambda path, role: terms[path, role].rank)
    if lines := _differences(old, new):
        raise StructureError(
            f"the adapter {name!r} has another structure than what it is to be "
            f"updated with:\n  {listed(lines)}\nRemove it and add the other; functions "
            "of its tree compile anew."
        )
    return dataclasses.replace(adapters, adapters={**adapters.adapters, name: new})


# -- what an adapter is ----------------------------------------------------------------


def _checked_parts(adapters: AdapterSet, name: str, tree: Tree) -> Tree:
    if isinstance(tree, AdapterSet):
        raise StructureError(
            f"the adapter {name!r} is given as a set.\nPass one of it, adapters['...']."
        )
    nodes = jax.tree.leaves(tree, is_leaf=is_node)
    if any(has_bank(x) for x in nodes):
        raise StructureError(
            f"the adapter {name!r} is a bank of several.\nAdd them one by one: "
            "jlora.pick(tree, 0) and so on."
        )
    check_trained(tree)
    check_same_base(adapters.base, tree, name)
    return parts_of(tree)


def _terms(parts: Tree) -> dict[tuple[str, str], Any]:
    """The low-rank terms by path and role."""
    leaves = leaves_by_path(parts, is_leaf=is_part)
    return {
        (path, role): t
        for path, part in leaves.items()
        if part is not None and isinstance(part.node, LowRank)
        for role, t in part.node.adapters.items()
    }


def _settings(t: Any) -> dict[str, Any]:
    return {} if t is None else {"dropout": t.dropout, "rslora": t.rslora}


def _with_settings(parts: Tree, settings: Any) -> Tree:
    """The parts with `settings(path, role)` in every low-rank term."""

    def one(path: str, part: Part | None) -> Part | None:
        if part is None or not isinstance(part.node, LowRank):
            return part
        changed = {
            role: dataclasses.replace(t, **settings(path, role))
            for role, t in part.node.adapters.items()
        }
        return Part(dataclasses.replace(part.node, adapters=changed))

    return map_with_path(one, parts, is_leaf=is_part)


def _differences(old: Tree, new: Tree) -> list[str]:
    """How two trees of parts differ but for their numbers, one line a leaf."""
    pairs = zip(
        leaf_paths(old, is_leaf=is_part),
        jax.tree.leaves(old, is_leaf=is_part),
        jax.tree.leaves(new, is_leaf=is_part),
        strict=True,
    )
    lines = []
    for path, x, y in pairs:
        if _described(x) != _described(y):
            lines.append(f"{path!r} is {_described(x)}, and {_described(y)}")
        elif not same_structure(x, y):
            lines.append(f"{path!r} has other axes, or other rows")
    return lines


def _described(x: Part | None) -> str:
    if x is None:
        return "as it was"
    arrays, _ = jax.tree_util.tree_flatten_with_path(x)
    return ", ".join(
        f"{jax.tree_util.keystr(key, simple=True, separator='/')} {v.dtype}"
        f"{list(v.shape)}"
        for key, v in arrays
    )


# -- bad input -------------------------------------------------------------------------


def _begun(params: Tree) -> AdapterSet:
    leaves = jax.tree.leaves(params, is_leaf=is_node)
    if any(map(is_trained, leaves)):
        raise StructureError(
            "jlora.add begins a set with the plain parameters, and these have adapters "
            "already.\nPass the base that they were made of, jlora.add(params, name, "
            "lorafied)."
        )
    return AdapterSet(params, {})


def _check_set(function: str, adapters: Any) -> None:
    if not isinstance(adapters, AdapterSet):
        raise OptionError(
            f"{function} takes a set of adapters, and was given a "
            f"{type(adapters).__name__}.\nBegin one with jlora.add(params, name, tree)."
        )


def _check_free(adapters: AdapterSet, name: Any) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise OptionError(
            f"name={name!r} cannot name an adapter, for files are called by it.\nUse "
            "letters, digits, '_', '-' and '.', and begin with a letter or a digit."
        )
    if name in adapters:
        raise OptionError(
            f"there is an adapter {name!r} already.\nChange it with jlora.update, call "
            "it otherwise with jlora.rename, or leave it out with jlora.remove."
        )
