"""The set: a base held once, adapters by name, and which of them are active."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Mapping
from typing import Any

import jax

from jlora._errors import OptionError
from jlora._kernel.nodes import LowRank
from jlora._kernel.opaque import Several
from jlora._paths import Tree
from jlora.adapters._parts import is_part, put_all_on, put_on


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AdapterSet(Several):
    """Several named adapters on one base; `jlora.add` makes one.

    A pytree of the base's leaves and those of every adapter. Functions of parameters do
    not take the set but `params`, the lorafied tree of what is active: adapters of one
    structure and shape share a jitted step's programs. Handed the set, they refuse it.

    Attributes:
      base: the plain parameters.
      adapters: by name, a tree of the base's structure with the adapter's factors,
        whole leaves and rows in their places and None in the others.
      active: the names of the active ones, in the set's order; none is the base alone.

    >>> base = {"query": jnp.ones((3, 2)), "norm": jnp.ones(2)}
    >>> tree = jlora.lorafy(base, rank=1, targets=["query"])
    >>> adapters = jlora.add(base, "german", tree)
    >>> adapters
    AdapterSet(german (rank 1, active); a base of 2 leaves)
    >>> adapters.params
    {'norm': Array([1., 1.], dtype=float32), 'query': LowRank('query', ...)}
    """

    base: Tree
    adapters: Mapping[str, Tree]
    active: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in the order in which they were added."""
        return tuple(self.adapters)

    @functools.cached_property
    def params(self) -> Tree:
        """The lorafied tree of the active adapters; with none of them, the base.

        It is made once, of the set's own arrays. Several active adapters add their
        updates, each a term of its own on a kernel.
        """
        if not self.active:
            return self.base
        if len(self.active) == 1:
            return self[self.active[0]]
        return put_all_on(self.base, [(n, self.adapters[n]) for n in self.active])

    def __getitem__(self, name: str) -> Tree:
        """The lorafied tree of one adapter, to train, save or merge it.

        Raises:
          OptionError: there is none of that name.
        """
        return put_on(self.base, self.adapters[self.known(name)])

    def __contains__(self, name: object) -> bool:
        return name in self.adapters

    def known(self, name: Any) -> str:
        """The name, of an adapter that is there.

        Raises:
          OptionError: there is none of that name.
        """
        if isinstance(name, str) and name in self.adapters:
            return name
        near = difflib.get_close_matches(str(name), self.names, 1)
        hint = f"Did you mean {near[0]!r}?" if near else (
            "A function of parameters takes those of the active adapters, "
            "adapters.params."
        )  # fmt: skip
        has = ", ".join(map(repr, self.names)) or "none"
        raise OptionError(f"there is no adapter {name!r}; the set has {has}.\n{hint}")

    def no_parameters(self) -> str:
        """What the error says of a set in the place of parameters."""
        one = next(iter(self.active or self.names), "...")
        return (
            f"{self!r} is a set, and parameters were expected.\nPass adapters.params, "
            f"those with what is active, or those of one adapter, adapters[{one!r}]."
        )

    def __repr__(self) -> str:
        told = [f"{n} ({_brief(self.adapters[n], n in self.active)})"
                for n in self.adapters]  # fmt: skip
        size = len(jax.tree.leaves(self.base))
        leaves = "1 leaf" if size == 1 else f"{size} leaves"
        return f"AdapterSet({', '.join(told)}; a base of {leaves})"

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """Base, and adapters by name; the names and what is active are static."""
        keys = map(jax.tree_util.GetAttrKey, ("base", "adapters"))
        children = zip(keys, (self.base, dict(self.adapters)), strict=True)
        return list(children), (self.names, self.active)

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> AdapterSet:
        """Inverse of `tree_flatten_with_keys`."""
        (names, active), (base, adapters) = static, children
        if isinstance(adapters, Mapping):  # JAX sorts keys
            adapters = {name: adapters[name] for name in names}
        return cls(base, adapters, active)


def _brief(parts: Tree, is_active: bool) -> str:
    nodes = [p.node for p in jax.tree.leaves(parts, is_leaf=is_part) if p is not None]
    ranks = sorted(
        {t.rank for x in nodes if isinstance(x, LowRank)
         for t in x.adapters.values() if hasattr(t.a, "shape")}
    )  # fmt: skip
    words = []
    if ranks:
        words.append(
            "rank "
            + "-".join(str(r) for r in dict.fromkeys(ranks[:: len(ranks) - 1 or 1]))
        )
    others = sum(not isinstance(x, LowRank) for x in nodes)
    if others:
        words.append(f"{others} whole")
    if is_active:
        words.append("active")
    return ", ".join(words)
