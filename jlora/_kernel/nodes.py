"""The low-rank node: a pytree node that stands where a kernel stood.

    LowRank                     .../query/kernel
      base       [*batch, *in, *out]          /base       frozen
      a          [*batch, *in, r]             /a          trained
      b          [*batch, r, *out]            /b          trained
      scale      [*batch]                     /scale      frozen, alpha/r
      magnitude  [*batch, *out]               /magnitude  trained, of DoRA
      bias       [*batch, *out]               /bias       trained, with lora_bias
      key        [*batch] PRNG keys           /key        only while dropout is on

Its value is `base + scale * a @ b`; with DoRA that, each column brought to the length
`magnitude`. A fused kernel may hold several adapters, each on a slice of it, by name:
`.../c_attn/kernel/query/a`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._kernel import dora
from jlora._kernel.adapter import KEYS, Adapter, new_adapter
from jlora._kernel.axes import Array, Dims, spread
from jlora._kernel.opaque import Note, Opaque


class _OnBase(Opaque):
    """What a node with a frozen base is to code that asks an array's questions."""

    base: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's shape."""
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        """The kernel's dtype; what is trained has their own."""
        return self.base.dtype

    @property
    def ndim(self) -> int:
        """The kernel's number of dimensions."""
        return len(self.base.shape)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LowRank(_OnBase):
    """A kernel `base` with adapters on it.

    Attributes:
      base: the frozen kernel.
      adapters: the terms by name. The name "" is the usual single adapter, whose
        factors sit directly under the kernel's path.
      path: where the kernel came from, for messages.
    """

    base: Array
    adapters: Mapping[str, Adapter]
    path: str = ""

    def map(self, base: Array, f: Callable[[Adapter], Adapter | None]) -> LowRank:
        """A new base, and every adapter changed by `f` (None drops it)."""
        changed = ((name, f(adapter)) for name, adapter in self.adapters.items())
        kept = {name: adapter for name, adapter in changed if adapter is not None}
        return dataclasses.replace(self, base=base, adapters=kept)

    def with_gains(self) -> LowRank:
        """The same kernel with a gain in the place of each magnitude."""
        return self.map(self.base, lambda t: dora.with_gain(self.base, t))

    def gain(self) -> tuple[Array, Dims] | None:
        """What the adapters multiply the base's columns by, float32, and its dims."""
        return dora.common_gain(self.shape, list(self.adapters.values()))

    def delta(self, *, fuse_up_to: int = 0) -> Array:
        """The dense update, float32: what all adapters change of the base.

        `fuse_up_to` is that of `Adapter.delta`.
        """
        w = self.with_gains()
        update = jnp.zeros(w.shape, jnp.float32)
        for t in w.adapters.values():
            update = update + t.delta(w.shape, fuse_up_to=fuse_up_to)
        gained = w.gain()
        if gained is None:
            return update
        gain = spread(*gained, range(w.ndim))
        return update + (gain - 1) * w.base.astype(jnp.float32)

    def merged(self) -> Array:
        """The dense kernel `base + delta`, summed in float32 at least, rounded once."""
        return (wide(self.base) + self.delta()).astype(self.dtype)

    def __repr__(self) -> str:
        # Halves of a split, masks and labels hold other things than arrays.
        if not hasattr(self.base, "shape"):
            return f"LowRank({self.path!r}, base={self.base!r}, {self.adapters!r})"
        terms = [
            f", {name or 'rank'} {t.rank}, scale {_brief(t.scale)}"
            for name, t in self.adapters.items()
            if hasattr(t.a, "shape")
        ]
        shape = f"{self.dtype}{list(self.shape)}"
        return f"LowRank({self.path!r}, {shape}" + "".join(terms) + ")"

    def tree_flatten(self) -> tuple[Any, Any]:
        """Base first; the unnamed adapter's factors directly under the node."""
        children: list[Any] = [self.base]
        static: list[Any] = []
        for name, adapter in self.adapters.items():
            if name:
                children.append(adapter)
                static.append((name, None))
            else:
                inline, meta = adapter.tree_flatten()
                children.extend(inline)
                static.append((name, meta))
        return children, (Note(self.path), tuple(static))

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """Children by name."""
        children, static = self.tree_flatten()
        keys: list[Any] = [jax.tree_util.GetAttrKey("base")]
        for name, _ in static[1]:
            keys += [jax.tree_util.GetAttrKey(name)] if name else KEYS
        return list(zip(keys, children, strict=True)), static

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> LowRank:
        """Inverse of `tree_flatten`."""
        note, metas = static
        base, *rest = children
        adapters, at = {}, 0
        for name, meta in metas:
            if name:
                adapters[name] = rest[at]
                at += 1
            else:
                end = at + len(KEYS)
                adapters[name] = Adapter.tree_unflatten(meta, rest[at:end])
                at = end
        return cls(base, adapters, note.text)


def wide(x: Array) -> Array:
    """X in what kernels are summed in: float32, or float64 where they are."""
    return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def _brief(scale: Any) -> str:
    concrete = isinstance(scale, jax.Array) and not isinstance(scale, jax.core.Tracer)
    return f"{scale.ravel()[0]:g}" if concrete else "?"


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Full(Opaque):
    """A leaf that is trained as it is, beside the adapters (PEFT's modules_to_save).

    Attributes:
      value: the leaf.
      path: where it stood, for messages.
    """

    value: Array
    path: str = ""
    kind = "fully trained leaf"

    @property
    def shape(self) -> tuple[int, ...]:
        """The leaf's shape."""
        return tuple(self.value.shape)

    @property
    def dtype(self) -> Any:
        """The leaf's dtype."""
        return self.value.dtype

    @property
    def ndim(self) -> int:
        """The leaf's number of dimensions."""
        return len(self.value.shape)

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """One child."""
        return [(jax.tree_util.GetAttrKey("full"), self.value)], Note(self.path)

    @classmethod
    def tree_unflatten(cls, note: Any, children: Any) -> Full:
        """Inverse of `tree_flatten_with_keys`."""
        (value,) = children
        return cls(value, note.text)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Rows(_OnBase):
    """A table of which some rows are trained as they are, new tokens say.

    Attributes:
      base: the frozen table, `[V, d]`.
      rows: what stands in the place of some of its rows, `[n, d]`.
      indices: which rows these are.
      path: where the table came from, for messages.

    Source: PEFT's trainable tokens, which replace rows and do not add to them.
    """

    base: Array
    rows: Array
    indices: tuple[int, ...]
    path: str = ""
    kind = "table with trained rows"

    def lowrank(self) -> LowRank:
        """The same value as a low-rank node: selected rows, times what they change."""
        where = jnp.asarray(self.indices)
        select = jax.nn.one_hot(where, self.shape[0], axis=0, dtype=self.rows.dtype)
        change = self.rows - self.base[where].astype(self.rows.dtype)
        one = jnp.ones((), jnp.float32)
        term = new_adapter(select, change, one, batch=(), ins=(0,), outs=(1,))
        return LowRank(self.base, {"": term}, self.path)

    def merged(self) -> Array:
        """The dense table, in the base's dtype."""
        rows = self.rows.astype(self.dtype)
        return self.base.at[jnp.asarray(self.indices)].set(rows)

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """Two children."""
        children = [(jax.tree_util.GetAttrKey(n), getattr(self, n)) for n in _ROWS]
        return children, (self.indices, Note(self.path))

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> Rows:
        """Inverse of `tree_flatten_with_keys`."""
        (base, rows), (indices, note) = children, static
        return cls(base, rows, indices, note.text)


_ROWS = ("base", "rows")


def same_structure(*trees: Any, is_leaf: Callable[[Any], bool] | None = None) -> bool:
    """Whether the trees differ in their leaves alone."""
    structures: list[Any] = [jax.tree.flatten(t, is_leaf=is_leaf)[1] for t in trees]
    return all(bool(s == structures[0]) for s in structures)


def is_node(x: Any) -> bool:
    """Whether x is one of jlora's nodes; an `is_leaf` for `jax.tree` functions."""
    return isinstance(x, LowRank | Full | Rows)


def is_array(x: Any) -> bool:
    """Whether x is an array or the shape of one.

    Other leaves, functions and settings say, are none of jlora's business.
    """
    return isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
