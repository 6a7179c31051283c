"""One adapter: two factors, a scale, and what its variants add."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora._compat import is_explicit
from jlora._errors import ShapeError
from jlora._kernel.axes import (
    BANK,
    RANK,
    Array,
    Dims,
    Label,
    contract,
    expand,
    outer_sum,
    pad_to,
)
from jlora._kernel.opaque import Note


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """One low-rank term `scale * a @ b` on a kernel, or on a window of it.

    Attributes:
      a, b: the factors; each has one axis of size r, marked `RANK` in its dims.
      scale: alpha/r, or alpha/sqrt(r); float32, `[*batch]`.
      key: PRNG keys for dropout, `[*batch]`; None switches dropout off.
      magnitude: DoRA's lengths of the columns, `[*batch, *out]`; None without DoRA.
      bias: of `b`'s product, `[*batch, *out]`; it counts `scale` times, and is added to
        the bias of the kernel's layer. None without.
      gain: what each column of the kernel is multiplied by, `[*batch, *out]`, where
        `jlora.lora` has put it in the magnitude's place; in no tree of parameters.
      keep: probability of keeping an input of `a`, `[*batch]`, where it is data beside
        the key and not `1 - dropout`: adapters of unlike rates in one program.
      which: of a bank, whose arrays have an axis `BANK` more, the number of the adapter
        that acts, int32, or of that of each token; a negative one is none. In no tree
        of parameters.
      parts: what `a` and `b` are made of, by name, where the update has another form;
        `a` and `b` are None then, until `forms.formed` makes them. None without.
      a_dims, b_dims, s_dims, o_dims: the kernel dimension along each axis of `a`, `b`,
        of `scale`, `key` and `keep`, and of `magnitude`, `bias` and `gain`.
      starts: where the term's window begins in each kernel dimension; its size is that
        of the factors. All zero for an adapter of the whole kernel.
      dropout: probability of dropping an input of `a`.
      rslora: whether scale is alpha/sqrt(r); kept for files.
      shifted: whether `scale * a @ b` as it started was taken out of the kernel
        (PiSSA), so that the adapter belongs to that base and to no other.
      form: how `a` and `b` are made of `parts`, a name in `forms`; None without.
      p_dims: the dimension along each axis of each part, by its name. Axes along none,
        of which `RANK` is one, have negative numbers.
      invocation: token ids from whose last occurrence on the adapter acts (aLoRA), of a
        bank those of each adapter; None acts everywhere.
      role: the role name that chose this kernel, if any.
    """

    a: Array
    b: Array
    scale: Array
    key: Array | None
    magnitude: Array | None
    bias: Array | None
    gain: Array | None
    keep: Array | None
    which: Array | None
    parts: Mapping[str, Array] | None
    a_dims: Dims
    b_dims: Dims
    s_dims: Dims
    o_dims: Dims
    starts: Dims
    dropout: float = 0.0
    rslora: bool = False
    shifted: bool = False
    form: str | None = None
    p_dims: tuple[tuple[str, Dims], ...] = ()
    invocation: tuple[Any, ...] | None = None
    role: str | None = None

    @property
    def rank(self) -> int:
        """The inner dimension r; of parts theirs."""
        for array, dims in self._factors():
            if RANK in dims:
                return array.shape[dims.index(RANK)]
        raise AssertionError("an adapter without a rank")

    @property
    def in_axes(self) -> tuple[int, ...]:
        """Kernel dimensions that only `a` spans: the inputs of an ordinary kernel."""
        others = {RANK, *self.b_dims, *self.batch_axes}
        return tuple(d for d in self.a_dims if d not in others)

    @property
    def out_axes(self) -> tuple[int, ...]:
        """Kernel dimensions that only `b` spans: the outputs of an ordinary kernel."""
        others = {RANK, *self.a_dims, *self.batch_axes}
        return tuple(d for d in self.b_dims if d not in others)

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """Kernel dimensions with an adapter of their own at each index.

        Both factors span them, or one does and the other is the same at each.
        """
        both = {*self.a_dims} & {*self.b_dims}
        dims = dict.fromkeys((*self.a_dims, *self.b_dims))
        return tuple(d for d in dims if d >= 0 and (d in both or d in self.s_dims))

    @property
    def is_bank(self) -> bool:
        """Whether this is several adapters, of which at most one acts."""
        return BANK in self.a_dims

    def _factors(self) -> list[tuple[Array, Dims]]:
        """The factors, or the parts that they are made of, with their dims."""
        if self.parts is None:
            return [(self.a, self.a_dims), (self.b, self.b_dims)]
        return [(self.parts[name], dims) for name, dims in self.p_dims]

    def trained(self) -> dict[str, Array]:
        """The arrays that are trained, by name."""
        own = {n: getattr(self, n) for n in ("a", "b", "magnitude", "bias")}
        parts = {n: x for n, x in (self.parts or {}).items() if PARTS[n] != "frozen"}
        return {n: x for n, x in (own | parts).items() if x is not None}

    def size(self, dim: int) -> int | None:
        """The window's size along a kernel dimension; None if no factor spans it."""
        for array, dims in self._factors():
            if dim in dims:
                return array.shape[dims.index(dim)]
        return None

    def map(self, f: Callable[[Array, Dims], tuple[Array, Dims]]) -> Adapter:
        """Apply `f(array, dims) -> (array, dims)` to every factor and part."""
        changed: dict[str, Any] = {}
        if self.parts is not None:
            parts, dims_of = dict(self.parts), dict(self.p_dims)
            for name, array in self.parts.items():
                if array is not None:  # as in a half of a split tree
                    parts[name], dims_of[name] = f(array, dims_of[name])
            changed = {"parts": parts, "p_dims": tuple(dims_of.items())}
        for name, dims in DIMS_OF.items():
            array = getattr(self, name)
            if array is not None:
                changed[name], changed[dims] = f(array, getattr(self, dims))
        return dataclasses.replace(self, **changed)

    def rename(self, new_dim: Mapping[int, int], ndim: int) -> Adapter:
        """The same term on a kernel whose dimension d is now `new_dim[d]` of `ndim`."""
        starts = [0] * ndim
        for dim, new in new_dim.items():
            starts[new] = self.starts[dim]
        renamed = lambda dims: tuple(new_dim.get(d, d) for d in dims)  # noqa: E731
        out = self.map(lambda x, dims: (x, renamed(dims)))
        return dataclasses.replace(out, starts=tuple(starts))

    def covers(self, shape: Sequence[int]) -> bool:
        """Whether the term's window is the whole kernel."""
        return all(self.full(dim, size) for dim, size in enumerate(shape))

    def full(self, dim: int, size: int) -> bool:
        """Whether the window spans all of one dimension."""
        return self.size(dim) in (None, size)

    def watched(self, x: Array, labels: Sequence[Label], contracted: Dims) -> Array:
        """An input as a product takes it; a subclass may note what it is.

        Args:
          x: the input.
          labels: of its axes, the kernel dimension each of them meets or another label.
          contracted: the kernel dimensions that are summed over.
        """
        return x

    def delta(
        self, shape: Sequence[int], dtype: Any = jnp.float32, *, fuse_up_to: int = 0
    ) -> Array:
        """The dense update `scale * a @ b` of a kernel of that shape.

        Args:
          shape: the kernel's.
          dtype: what the update is summed in.
          fuse_up_to: the largest rank of which the update is in a form that XLA fuses
            with the sum it goes into.
        """
        dims = tuple(range(len(shape)))
        a, b = self.a.astype(dtype), self.b.astype(dtype)
        if {*self.s_dims} <= {*self.a_dims}:
            a = a * expand(self.scale, self.s_dims, self.a_dims)
        else:  # of a stack whose layers share it
            b = b * expand(self.scale, self.s_dims, self.b_dims)
        explicit = is_explicit(a) or is_explicit(b)
        if self.rank <= fuse_up_to and not explicit:
            out, labels = outer_sum(a, self.a_dims, b, self.b_dims)
        else:
            out, labels = contract(
                a, self.a_dims, b, self.b_dims, keep=dims, precision="highest"
            )
        starts = [self.starts[d] if d in labels else None for d in dims]
        out = pad_to(expand(out, labels, dims), starts, shape)
        return jnp.broadcast_to(out, shape)

    @functools.cached_property
    def static(self) -> tuple[Any, ...]:
        """Everything that is not an array; the role is a note."""
        return (*(getattr(self, n) for n in _STATIC[:-1]), Note(self.role))

    @property
    def children(self) -> tuple[Any, ...]:
        """The arrays, in the order of `KEYS`."""
        return (
            self.a, self.b, self.scale, self.key, self.magnitude, self.bias, self.gain,
            self.keep, self.which, self.parts,
        )  # fmt: skip

    def tree_flatten(self) -> tuple[Any, Any]:
        """Children; the rest is static."""
        return self.children, self.static

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """Children by name."""
        children, static = self.tree_flatten()
        return list(zip(KEYS, children, strict=True)), static

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> Adapter:
        """Inverse of `tree_flatten`; checks nothing, as JAX asks."""
        adapter = object.__new__(cls)  # a frozen dataclass sets each field slowly
        adapter.__dict__.update(
            zip(_FIELDS, (*children, *static), strict=True),
            role=static[-1].text, static=static,
        )  # fmt: skip
        return adapter


# What the parts of other forms are to optimisers: like the factor of their side.
PARTS = {
    "proj_a": "frozen", "proj_b": "frozen", "lambda_d": "a", "lambda_b": "b",
    "a1": "a", "a2": "a", "b1": "b", "b2": "b", "w1": "b", "a": "a", "e": "e", "b": "b",
}  # fmt: skip
# Each array, and the field that says which dimensions its axes lie along.
DIMS_OF = {
    "a": "a_dims", "b": "b_dims", "scale": "s_dims", "key": "s_dims",
    "magnitude": "o_dims", "bias": "o_dims", "gain": "o_dims",
    "keep": "s_dims",
}  # fmt: skip
_CHILDREN = (*DIMS_OF, "which", "parts")
KEYS = tuple(jax.tree_util.GetAttrKey(n) for n in _CHILDREN)
_FIELDS = tuple(f.name for f in dataclasses.fields(Adapter))
_STATIC = _FIELDS[len(_CHILDREN) :]


def new_adapter(
    a: Array, b: Array, scale: Array, *, batch: Dims, ins: Dims, outs: Dims,
    magnitude: Array | None = None, bias: Array | None = None,
    starts: Dims | None = None, **static: Any,
) -> Adapter:  # fmt: skip
    """An adapter in the storage layout, `a [*batch, *in, r]`, `b [*batch, r, *out]`.

    Magnitude and bias are `[*batch, *out]`.

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
    wide = magnitude is not None or bias is not None
    return Adapter(
        a, b, scale, None, magnitude, bias, None, None, None, None,
        (*batch, *ins, RANK), (*batch, RANK, *outs), batch,
        (*batch, *outs) if wide else (), starts, **static,
    )  # fmt: skip


def adapter_of_parts(
    form: str, parts: Mapping[str, Array], dims: Mapping[str, Dims], scale: Array, *,
    batch: Dims, ins: Dims, outs: Dims, starts: Dims | None = None, **static: Any,
) -> Adapter:  # fmt: skip
    """An adapter of another form, whose parts lie along the dimensions `dims`."""
    starts = starts or (0,) * (len(batch) + len(ins) + len(outs))
    return Adapter(
        None, None, scale, None, None, None, None, None, None, dict(parts),
        (*batch, *ins, RANK), (*batch, RANK, *outs), batch, (), starts,
        form=form, p_dims=tuple(dims.items()), **static,
    )  # fmt: skip
