"""The low-rank node: a pytree node that stands where a kernel stood.

    LowRank                     .../query/kernel
      base       [*batch, *in, *out]          /base       frozen
      a          [*batch, *in, r]             /a          trained
      b          [*batch, r, *out]            /b          trained
      scale      [*batch]                     /scale      frozen, alpha/r
      magnitude  [*batch, *out]               /magnitude  trained, of DoRA
      bias       [*batch, *out]               /bias       trained, with lora_bias
      key        [*batch] PRNG keys           /key        only while dropout is on
      parts      what a and b are made of     /parts/...  of VeRA, LoHa, LoKr

The base may be a `Quantized`, which also stands alone in a tree: a kernel without
adapters, to all that reads one.

Its value is `base + scale * a @ b`; with DoRA that, each column brought to the length
`magnitude`. A fused kernel may hold several adapters, each on a slice of it, by name:
`.../c_attn/kernel/query/a`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora import _compat
from jlora._errors import StructureError
from jlora._kernel import dora, forms
from jlora._kernel.adapter import KEYS, Adapter, new_adapter
from jlora._kernel.axes import Array, Dims, accumulation_dtype, expand, rounded
from jlora._kernel.opaque import Note, Opaque, Origin, Several
from jlora._kernel.quantized import Quantized, dense
from jlora._paths import leaf_paths


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
      base: the frozen kernel, an array or a `Quantized`.
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
        """The same kernel with factors for parts, and a gain for each magnitude.

        The factors of a float64 kernel are float64 then, as all that is made of them.
        """
        dtype = accumulation_dtype(self.dtype)

        def one(t: Adapter) -> Adapter:
            if dtype == jnp.float64:
                t = t.map(lambda x, dims: (_cast(x, dtype), dims))
            return dora.with_gain(self.base, forms.formed(t, self.shape))

        return self.map(self.base, one)

    def with_magnitudes(self) -> LowRank:
        """The same kernel with a magnitude in the place of each gain."""
        return self.map(self.base, lambda t: dora.with_magnitude(self.base, t))

    def gain(self) -> tuple[Array, Dims] | None:
        """What the adapters multiply the base's columns by, float32, and its dims."""
        return dora.common_gain(self.shape, list(self.adapters.values()))

    def delta(self, *, fuse_up_to: int = 0) -> Array:
        """The dense update: what all adapters change of the base.

        It is summed in float32, or in float64 for a kernel of that.

        Args:
          fuse_up_to: as of `Adapter.delta`.
        """
        w = self.with_gains()
        update, gained = w._sum_of_terms(fuse_up_to), w.gain()
        if gained is None:
            return update
        gain = expand(*gained, range(w.ndim))
        return update + (gain - 1) * dense(w.base).astype(update.dtype)

    def value(self, *, fuse_up_to: int = 0) -> Array:
        """The dense kernel `base + delta`, in what it is summed in.

        Args:
          fuse_up_to: as of `Adapter.delta`.
        """
        w = self.with_gains()
        update, gained = w._sum_of_terms(fuse_up_to), w.gain()
        base = dense(w.base).astype(update.dtype)
        if gained is not None:
            base = expand(*gained, range(w.ndim)) * base
        return base + update

    def _sum_of_terms(self, fuse_up_to: int) -> Array:
        dtype = accumulation_dtype(self.dtype)
        update = jnp.zeros(self.shape, dtype)
        for t in self.adapters.values():
            update = update + t.delta(self.shape, dtype, fuse_up_to=fuse_up_to)
        return update

    def merged(self) -> Array:
        """The dense kernel, summed in float32 at least and rounded once."""
        return self.value().astype(self.dtype)

    def __repr__(self) -> str:
        # Halves of a split, masks and labels hold other things than arrays.
        if not hasattr(self.base, "shape"):
            return f"LowRank({self.path!r}, base={self.base!r}, {self.adapters!r})"
        terms = [
            f", {name or t.form or 'rank'} {t.rank}, scale {_brief(t.scale)}"
            for name, t in self.adapters.items()
            if any(hasattr(x, "shape") for x in t.trained().values())
        ]
        shape = f"{self.dtype}{list(self.shape)}"
        if isinstance(self.base, Quantized):
            shape = f"{self.base.layout.form} of {shape}"
        return f"LowRank({self.path!r}, {shape}" + "".join(terms) + ")"

    @functools.cached_property
    def static(self) -> tuple[Any, ...]:
        """Everything that is not an array; the path is a note."""
        metas = [
            (name, None if name else t.static) for name, t in self.adapters.items()
        ]
        return Note(self.path), tuple(metas)

    # Trees have hundreds of these and are flattened often, so this is kept lean.
    def tree_flatten(self) -> tuple[Any, Any]:
        """Base first; the unnamed adapter's factors directly under the node."""
        children: list[Any] = [self.base]
        for name, adapter in self.adapters.items():
            if name:
                children.append(adapter)
            else:
                children += adapter.children
        return children, self.static

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
        node = object.__new__(cls)  # a frozen dataclass sets each field slowly
        node.__dict__.update(
            base=base, adapters=adapters, path=note.text, static=static
        )
        return node


def _cast(x: Array, dtype: Any) -> Array:
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x


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
        """The same value as a low-rank node, bit by bit that of the merged table.

        The base's rows that are trained have a gain of zero, and the term is a
        selection times the trained rows. They have the table's precision, and their
        gradient that of their own dtype.
        """
        where = jnp.asarray(self.indices)
        select = jax.nn.one_hot(where, self.shape[0], axis=0, dtype=self.rows.dtype)
        rows = self.rows
        if jnp.finfo(self.dtype).nmant < jnp.finfo(rows.dtype).nmant:
            # The difference is exact, so the sum is what the table would hold.
            rows = rows + lax.stop_gradient(rounded(rows, self.dtype) - rows)
        keep = jnp.ones(self.shape[:1], accumulation_dtype(self.dtype))
        one = jnp.ones((), jnp.float32)
        term = new_adapter(select, rows, one, batch=(), ins=(0,), outs=(1,))
        term = dataclasses.replace(term, gain=keep.at[where].set(0), o_dims=(0,))
        return LowRank(self.base, {"": term}, self.path)

    def merged(self) -> Array:
        """The dense table, in the base's dtype."""
        rows = self.rows.astype(self.dtype)
        base = dense(self.base)
        return _compat.replace_rows(base, jnp.asarray(self.indices), rows)

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


def with_origin(tree: Any) -> Any:
    """The tree whose nodes remember their paths in it, and which leaves are frozen.

    Whoever makes a lorafied tree ends with this: `jlora.lora` gives no gradient to the
    leaves that were there, and lets those pass that somebody puts beside the tree.
    """
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_node)
    paths = leaf_paths(tree, is_leaf=is_node)
    pairs = list(zip(paths, leaves, strict=True))
    frozen = frozenset(path for path, x in pairs if not is_node(x))
    marked = [
        dataclasses.replace(x, path=Origin(path, frozen)) if is_node(x) else x
        for path, x in pairs
    ]
    return jax.tree.unflatten(structure, marked)


def same_structure(*trees: Any, is_leaf: Callable[[Any], bool] | None = None) -> bool:
    """Whether the trees differ in their leaves alone."""
    structures: list[Any] = [jax.tree.flatten(t, is_leaf=is_leaf)[1] for t in trees]
    return all(bool(s == structures[0]) for s in structures)


def is_node(x: Any) -> bool:
    """Whether x is one of jlora's nodes; an `is_leaf` for `jax.tree` functions.

    All that walks a tree of parameters asks this of what it meets, so that here is the
    one place to refuse what only looks like such a tree.

    Raises:
      StructureError: x is a set of adapters.
    """
    if isinstance(x, Several):
        raise StructureError(x.no_parameters())
    return isinstance(x, LowRank | Full | Rows | Quantized)


def is_trained(x: Any) -> bool:
    """Whether x is a node of which something is trained: all but quantised kernels."""
    return is_node(x) and not isinstance(x, Quantized)


def is_array(x: Any) -> bool:
    """Whether x is an array or the shape of one.

    Other leaves, functions and settings say, are none of jlora's business.
    """
    return isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
