"""The low-rank node: a pytree node that stands where a kernel stood.

    LowRank                     .../query/kernel
      base   [*batch, *in, *out]              /base     frozen
      a      [*batch, *in, r]                 /a        trained
      b      [*batch, r, *out]                /b        trained
      scale  [*batch]                         /scale    frozen, alpha/r
      key    [*batch] PRNG keys               /key      only while dropout is on

Its value is `base + scale * a @ b`. A fused kernel may hold several adapters, each on
a slice of it, by name: `.../c_attn/kernel/query/a`.

Every factor carries the kernel dimensions its axes lie along (`dims`), with `RANK` for
the rank axis. Transposing, slicing or reshaping a kernel then means renaming dimensions
or touching one small factor, and a contraction needs no fixed layout.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import (
    Callable,
    Collection,
    Hashable,
    Mapping,
    Sequence,
)
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jlora import _compat
from jlora._errors import ShapeError, UnmergedError

Array = Any  # jax.Array, or a ShapeDtypeStruct in an abstract tree
Dims = tuple[int, ...]

RANK = -1


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """One low-rank term `scale * a @ b` on a kernel, or on a window of it.

    Attributes:
      a, b: the factors; each has one axis of size r, marked `RANK` in its dims.
      scale: alpha/r, or alpha/sqrt(r); float32, `[*batch]`.
      key: PRNG keys for dropout, `[*batch]`; None switches dropout off.
      a_dims, b_dims, s_dims: the kernel dimension along each axis of `a`, `b`, and of
        `scale` and `key`.
      starts: where the term's window begins in each kernel dimension; its size is that
        of the factors. All zero for an adapter of the whole kernel.
      dropout: probability of dropping an input of `a`.
      rslora: whether scale is alpha/sqrt(r); kept for files.
      role: the role name that chose this kernel, if any.
    """

    a: Array
    b: Array
    scale: Array
    key: Array | None
    a_dims: Dims
    b_dims: Dims
    s_dims: Dims
    starts: Dims
    dropout: float = 0.0
    rslora: bool = False
    role: str | None = None

    @property
    def rank(self) -> int:
        """The inner dimension r."""
        return self.a.shape[self.a_dims.index(RANK)]

    @property
    def a_only(self) -> tuple[int, ...]:
        """Kernel dimensions that only `a` spans: the inputs of an ordinary kernel."""
        return tuple(d for d in self.a_dims if d != RANK and d not in self.b_dims)

    @property
    def b_only(self) -> tuple[int, ...]:
        """Kernel dimensions that only `b` spans: the outputs of an ordinary kernel."""
        return tuple(d for d in self.b_dims if d != RANK and d not in self.a_dims)

    @property
    def both(self) -> tuple[int, ...]:
        """Kernel dimensions with an adapter of their own at each index."""
        return tuple(d for d in self.a_dims if d != RANK and d in self.b_dims)

    def size(self, dim: int) -> int | None:
        """The window's size along a kernel dimension; None if no factor spans it."""
        for array, dims in ((self.a, self.a_dims), (self.b, self.b_dims)):
            if dim in dims:
                return array.shape[dims.index(dim)]
        return None

    def map(self, f: Callable[[Array, Dims], tuple[Array, Dims]]) -> Adapter:
        """Apply `f(array, dims) -> (array, dims)` to every factor."""
        a, a_dims = f(self.a, self.a_dims)
        b, b_dims = f(self.b, self.b_dims)
        scale, s_dims = f(self.scale, self.s_dims)
        key = None if self.key is None else f(self.key, self.s_dims)[0]
        return dataclasses.replace(
            self, a=a, b=b, scale=scale, key=key,
            a_dims=a_dims, b_dims=b_dims, s_dims=s_dims,
        )  # fmt: skip

    def rename(self, new_dim: Mapping[int, int], ndim: int) -> Adapter:
        """The same term on a kernel whose dimension d is now `new_dim[d]` of `ndim`."""
        names = {**new_dim, RANK: RANK}
        starts = [0] * ndim
        for dim, new in new_dim.items():
            starts[new] = self.starts[dim]
        out = self.map(lambda x, dims: (x, tuple(names[d] for d in dims)))
        return dataclasses.replace(out, starts=tuple(starts))

    def covers(self, shape: Sequence[int]) -> bool:
        """Whether the term's window is the whole kernel."""
        return all(self.full(dim, size) for dim, size in enumerate(shape))

    def full(self, dim: int, size: int) -> bool:
        """Whether the window spans all of one dimension."""
        return self.size(dim) in (None, size)

    def delta(self, shape: Sequence[int]) -> Array:
        """The dense update `scale * a @ b` of a kernel of that shape, float32."""
        dims = tuple(range(len(shape)))
        a, b = self.a.astype(jnp.float32), self.b.astype(jnp.float32)
        a = a * spread(self.scale, self.s_dims, self.a_dims)
        out, labels = contract(
            a, self.a_dims, b, self.b_dims, keep=dims, precision="highest"
        )
        starts = [self.starts[d] if d in labels else None for d in dims]
        out = widen(spread(out, labels, dims), starts, shape)
        return jnp.broadcast_to(out, shape)

    @functools.cached_property
    def static(self) -> tuple[Any, ...]:
        """Everything that is not an array."""
        return tuple(getattr(self, n) for n in _STATIC)

    # A jitted step flattens the whole tree at each call, so this is kept lean.
    def tree_flatten(self) -> tuple[Any, Any]:
        """Children; the rest is static."""
        return (self.a, self.b, self.scale, self.key), self.static

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """Children by name."""
        children, static = self.tree_flatten()
        return list(zip(_KEYS, children, strict=True)), static

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> Adapter:
        """Inverse of `tree_flatten`; checks nothing, as JAX asks."""
        adapter = object.__new__(cls)  # a frozen dataclass sets each field slowly
        adapter.__dict__.update(
            zip(_FIELDS, (*children, *static), strict=True), static=static
        )
        return adapter


_ARRAYS = ("a", "b", "scale", "key")
_KEYS = tuple(jax.tree_util.GetAttrKey(n) for n in _ARRAYS)
_FIELDS = tuple(f.name for f in dataclasses.fields(Adapter))
_STATIC = _FIELDS[len(_ARRAYS) :]


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LowRank:
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

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's shape."""
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        """The kernel's dtype; adapters have their own."""
        return self.base.dtype

    @property
    def ndim(self) -> int:
        """The kernel's number of dimensions."""
        return len(self.base.shape)

    def map(self, base: Array, f: Callable[[Adapter], Adapter | None]) -> LowRank:
        """A new base, and every adapter changed by `f` (None drops it)."""
        changed = ((name, f(adapter)) for name, adapter in self.adapters.items())
        kept = {name: adapter for name, adapter in changed if adapter is not None}
        return dataclasses.replace(self, base=base, adapters=kept)

    def delta(self) -> Array:
        """The dense update, float32: the sum over adapters of `scale * a @ b`."""
        zero = jnp.zeros(self.shape, jnp.float32)
        return sum((t.delta(self.shape) for t in self.adapters.values()), zero)

    def merged(self) -> Array:
        """The dense kernel `base + delta`, accumulated in float32, rounded once."""
        return (self.base.astype(jnp.float32) + self.delta()).astype(self.dtype)

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

    def __jax_array__(self) -> Array:
        """Called by JAX when the node meets ordinary code: never a quiet merge."""
        raise UnmergedError(
            f"the adapted kernel {self.path!r} reached JAX code that does not know "
            "adapters.\nWrap the function that takes the parameters: "
            "`jlora.lora(model.apply)(params, x)`; or fold the adapters in first: "
            "`jlora.merge(params)`."
        )

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        """NumPy's way in, refused for the same reason."""
        return self.__jax_array__()

    def __getitem__(self, index: Any) -> Any:
        """Indexing's way in, refused for the same reason."""
        return self.__jax_array__()

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
        return children, (self.path, tuple(static))

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """Children by name."""
        children, static = self.tree_flatten()
        keys: list[Any] = [jax.tree_util.GetAttrKey("base")]
        for name, _ in static[1]:
            keys += [jax.tree_util.GetAttrKey(name)] if name else _KEYS
        return list(zip(keys, children, strict=True)), static

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> LowRank:
        """Inverse of `tree_flatten`."""
        path, metas = static
        base, *rest = children
        adapters, at = {}, 0
        for name, meta in metas:
            if name:
                adapters[name] = rest[at]
                at += 1
            else:
                end = at + len(_ARRAYS)
                adapters[name] = Adapter.tree_unflatten(meta, rest[at:end])
                at = end
        return cls(base, adapters, path)


def _brief(scale: Any) -> str:
    concrete = isinstance(scale, jax.Array) and not isinstance(scale, jax.core.Tracer)
    return f"{scale.ravel()[0]:g}" if concrete else "?"


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Full:
    """A leaf that is trained as it is, beside the adapters (PEFT's modules_to_save)."""

    value: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The leaf's shape."""
        return tuple(self.value.shape)

    @property
    def dtype(self) -> Any:
        """The leaf's dtype."""
        return self.value.dtype

    def __jax_array__(self) -> Array:
        """As for `LowRank`: one rule for the whole lorafied tree."""
        raise UnmergedError(
            "a fully trained leaf reached JAX code that does not know jlora.\nWrap the "
            "function that takes the parameters, `jlora.lora(model.apply)(params, x)`, "
            "or make the tree plain first, `jlora.merge(params)`."
        )

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """One child."""
        return [(jax.tree_util.GetAttrKey("full"), self.value)], None

    @classmethod
    def tree_unflatten(cls, _: Any, children: Any) -> Full:
        """Inverse of `tree_flatten_with_keys`."""
        return cls(*children)


def same_structure(*trees: Any, is_leaf: Callable[[Any], bool] | None = None) -> bool:
    """Whether the trees differ in their leaves alone."""
    structures: list[Any] = [jax.tree.flatten(t, is_leaf=is_leaf)[1] for t in trees]
    return all(bool(s == structures[0]) for s in structures)


def is_node(x: Any) -> bool:
    """Whether x is one of jlora's nodes; an `is_leaf` for `jax.tree` functions."""
    return isinstance(x, LowRank | Full)


def new_adapter(
    a: Array, b: Array, scale: Array, *, batch: Dims, ins: Dims, outs: Dims,
    starts: Dims | None = None, **static: Any,
) -> Adapter:  # fmt: skip
    """An adapter in the storage layout, `a [*batch, *in, r]`, `b [*batch, r, *out]`.

    Raises:
      ShapeError: the factors disagree on the rank.
    """
    if a.shape[-1] != b.shape[len(batch)]:
        raise ShapeError(
            f"a is {tuple(a.shape)} (rank {a.shape[-1]}) but b is {tuple(b.shape)} "
            f"(rank {b.shape[len(batch)]}).\nPass a as [*batch, *in, r] and b as "
            "[*batch, r, *out]; PyTorch files store both transposed."
        )
    starts = starts or (0,) * (len(batch) + len(ins) + len(outs))
    return Adapter(
        a, b, scale, None, (*batch, *ins, RANK), (*batch, RANK, *outs), batch, starts,
        **static,
    )  # fmt: skip


# -- contractions by label -------------------------------------------------------------


def contract(
    x: Array, x_labels: Sequence[Hashable], y: Array, y_labels: Sequence[Hashable],
    keep: Collection[Hashable], **dot_params: Any,
) -> tuple[Array, tuple[Hashable, ...]]:  # fmt: skip
    """Contract two arrays over every label they share, save those to keep.

    Returns:
      The product and its labels: shared ones that are kept, then x's, then y's.
    """
    shared = [n for n in x_labels if n in y_labels]
    batch = [n for n in shared if n in keep]
    inner = [n for n in shared if n not in keep]

    def axes(labels: Sequence[Hashable], names: Sequence[Hashable]) -> list[int]:
        return [list(labels).index(n) for n in names]

    numbers = (
        (axes(x_labels, inner), axes(y_labels, inner)),
        (axes(x_labels, batch), axes(y_labels, batch)),
    )
    free = [n for n in (*x_labels, *y_labels) if n not in shared]
    labels = (*batch, *free)
    specs = [_compat.explicit_specs(x, x_labels), _compat.explicit_specs(y, y_labels)]
    if any(spec.get(n) for spec in specs for n in inner):
        # Explicit sharding wants to be told what a sharded contraction gives: what
        # remains keeps its sharding, the contracted axes are summed over the mesh.
        both = {**specs[1], **{n: s for n, s in specs[0].items() if s}}
        dot_params["out_sharding"] = PartitionSpec(*(both.get(n) for n in labels))
    return lax.dot_general(x, y, numbers, **dot_params), labels


def align(x: Array, labels: Sequence[Hashable], order: Sequence[Hashable]) -> Array:
    """Transpose x so that its axes come in that order."""
    perm = [list(labels).index(n) for n in order]
    return x if perm == list(range(len(perm))) else lax.transpose(x, perm)


def spread(x: Array, labels: Sequence[Hashable], order: Sequence[Hashable]) -> Array:
    """X with its axes in that order, and one of size 1 for each label it lacks."""
    x = align(x, labels, [n for n in order if n in labels])
    lacking = [i for i, n in enumerate(order) if n not in labels]
    return lax.expand_dims(x, lacking) if lacking else x


def widen(x: Array, starts: Sequence[int | None], shape: Sequence[int]) -> Array:
    """Zero-pad a window to the whole; an axis whose start is None stays as it is."""
    pads = [
        (0, 0, 0) if start is None else (start, size - start - n, 0)
        for n, start, size in zip(x.shape, starts, shape, strict=True)
    ]
    return lax.pad(x, jnp.zeros((), x.dtype), pads) if any(map(any, pads)) else x
