"""The quantised kernel: codes and statistics in the place of a dense array.

    Quantized                        .../query/kernel, or .../kernel/base of a LowRank
      codes          [*batch, *rows, n]      /codes
      absmax         [*batch, *rows, ...]    /absmax
      nested_absmax  [*batch, m]             /nested_absmax  with double quantisation
      offset         [*batch]                /offset         with double quantisation

The codes lie as PyTorch holds the weight, a row for each output and its inputs along
the row (a table's rows are its tokens), so a checkpoint of bitsandbytes is these arrays
as they stand. A block of inputs never crosses a row, so codes and statistics are cut
between rows, and between blocks of a row, wherever a mesh cuts the kernel. A product
contracts either side, so that nothing is transposed for it.

Dimensions of stacks, layers or experts, lead in every array: a scan slices codes, and
the dense stack never exists.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jlora._kernel import codebooks
from jlora._kernel.axes import Array
from jlora._kernel.opaque import Note, Opaque
from jlora._kernel.specs import fitting

PACKED = ("nf4", "fp4")  # two codes a byte
FORMS = ("int8", "nf4", "fp4", "fp8")
NESTED_BLOCK = 256  # statistics of a block of statistics, in bitsandbytes
FP8 = jnp.float8_e4m3fn


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a quantised kernel's arrays mean; static.

    Attributes:
      form: `"int8"`, `"nf4"`, `"fp4"` or `"fp8"`.
      dtype: the dense kernel's.
      block: how many numbers of a row have one statistic; None where all have.
      rows: the kernel's dimensions along the leading axes of the codes, counted from
        the last, -1: stacks do not change them.
      cols: those along the last axis, in order; together with `rows` all but stacks.
      sizes: of each of `cols`. The first is 0 where a row may be cut: it follows from
        the codes then.
      then: operations on the dense kernel, by primitive and parameters; in no tree of
        parameters.
      kept: the mesh, and how the codes' axes behind the stacks' are cut once they are
        gathered, before the kernel is dense; None leaves that to XLA, which gathers the
        dense kernel. While a program is traced, in no tree of parameters.
    """

    form: str
    dtype: Any
    block: int | None
    rows: tuple[int, ...]
    cols: tuple[int, ...]
    sizes: tuple[int, ...]
    then: tuple[tuple[Any, Any, tuple[int, ...], Any], ...] = ()
    kept: tuple[Any, tuple[Any, ...]] | None = None


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Quantized(Opaque):
    """A frozen kernel in 8 or 4 bits.

    Attributes:
      codes: int8, float8_e4m3fn, or uint8 of two codes each, the high bits first.
      absmax: the largest absolute value of each row (int8, fp8: `[*batch, *rows]`) or
        block (`[*batch, *rows, n / block]`), float32; with double quantisation codes
        of it, uint8.
      nested_absmax: of each 256 such codes, float32, or None.
      offset: what the codes of `absmax` are added to, float32, or None.
      layout: what the arrays mean.
      path: where the kernel stood, for messages.

    Source: Dettmers et al. 2022, arXiv:2208.07339 (int8 by rows), and 2023,
    arXiv:2305.14314 (nf4 and double quantisation); bitsandbytes for what they left
    open.
    """

    codes: Array
    absmax: Array
    nested_absmax: Array | None
    offset: Array | None
    layout: Layout
    path: str = ""
    kind = "quantised kernel"

    @property
    def shape(self) -> tuple[int, ...]:
        """The dense kernel's shape."""
        then = self.layout.then
        return next((s for _, _, s, _ in then[::-1] if s), None) or self._own_shape

    @property
    def dtype(self) -> Any:
        """The dense kernel's dtype."""
        return self.layout.then[-1][3] if self.layout.then else self.layout.dtype

    @property
    def ndim(self) -> int:
        """The dense kernel's number of dimensions."""
        return len(self.shape)

    @property
    def batch(self) -> tuple[int, ...]:
        """The sizes of the leading dimensions that every array has."""
        return tuple(self.codes.shape[: -1 - len(self.layout.rows)])

    @property
    def is_sliceable(self) -> bool:
        """Whether a slice along the first dimension is one of every array."""
        return bool(self.batch) and not any(s for _, _, s, _ in self.layout.then)

    @property
    def _own_shape(self) -> tuple[int, ...]:
        layout, batch = self.layout, self.batch
        sizes = dict(zip(layout.rows, self.codes.shape[len(batch) : -1], strict=True))
        sizes.update(zip(layout.cols, self._col_sizes, strict=True))
        return (*batch, *(sizes[d] for d in range(-len(sizes), 0)))

    @property
    def _col_sizes(self) -> tuple[int, ...]:
        first, *rest = self.layout.sizes
        if not first:
            per_byte = 2 if self.layout.form in PACKED else 1
            first = self.codes.shape[-1] * per_byte // math.prod(rest)
        return (first, *rest)

    def dense(self) -> Array:
        """The dense kernel, in its dtype."""
        layout, batch = self.layout, self.batch
        x = self._gathered()._values().astype(layout.dtype)
        sizes = (*self.codes.shape[len(batch) : -1], *self._col_sizes)
        x = lax.reshape(x, (*batch, *sizes))
        dims = (*layout.rows, *layout.cols)
        order = [len(batch) + dims.index(d) for d in range(-len(dims), 0)]
        x = lax.transpose(x, [*range(len(batch)), *order])
        for primitive, params, _, _ in layout.then:
            x = primitive.bind(x, **dict(params))
        return x

    def _gathered(self) -> Quantized:
        """The same kernel, its codes cut as `layout.kept` says."""
        if self.layout.kept is None:
            return self
        mesh, parts = self.layout.kept
        free = [PartitionSpec.UNCONSTRAINED] * len(self.batch)

        def whole(name: str) -> Array:
            x = getattr(self, name)
            own = fitting(PartitionSpec(*parts[: x.ndim - len(free)]),
                          x.shape[len(free) :], mesh)  # fmt: skip
            where = NamedSharding(mesh, PartitionSpec(*free, *own))
            return lax.with_sharding_constraint(x, where)

        layout = dataclasses.replace(self.layout, kept=None)
        codes, absmax = whole("codes"), whole("absmax")
        return dataclasses.replace(self, codes=codes, absmax=absmax, layout=layout)

    def with_dtype(self, dtype: Any) -> Quantized:
        """The same codes of a kernel that is of that dtype once it is dense."""
        layout = dataclasses.replace(self.layout, dtype=jnp.dtype(dtype))
        return dataclasses.replace(self, layout=layout)

    def astype(self, dtype: Any) -> Array:
        """The dense kernel in another dtype, as an array's method."""
        return self.dense().astype(dtype)

    def _values(self) -> Array:
        """The numbers in the codes' order, float32 `[*batch, *rows, n]`."""
        form, absmax = self.layout.form, self.statistics()
        if form == "int8":
            return self.codes.astype(jnp.float32) * absmax[..., None] * _OVER_127
        if form == "fp8":
            return self.codes.astype(jnp.float32) * (absmax * _OVER_448)[..., None]
        x = jnp.asarray(codebooks.pairs(form))[self.codes.astype(jnp.int32)]
        count = math.prod(self._col_sizes)
        x = lax.reshape(x, (*self.codes.shape[:-1], 2 * self.codes.shape[-1]))
        x = lax.slice_in_dim(x, 0, count, axis=x.ndim - 1)
        scale = jnp.repeat(absmax, self.layout.block or count, axis=-1)
        return x * lax.slice_in_dim(scale, 0, count, axis=scale.ndim - 1)

    def statistics(self) -> Array:
        """`absmax` in float32, double quantisation undone."""
        if self.nested_absmax is None or self.offset is None:
            return self.absmax
        own = self.absmax.shape[len(self.batch) :]
        block = np.arange(math.prod(own)).reshape(own) // NESTED_BLOCK
        x = jnp.asarray(codebooks.dynamic_map())[self.absmax.astype(jnp.int32)]
        x = x * jnp.take(self.nested_absmax, jnp.asarray(block), axis=-1)
        return x + lax.expand_dims(
            self.offset, range(len(self.batch), len(self.batch) + len(own))
        )

    def single(self) -> Quantized:
        """The same kernel without double quantisation."""
        return dataclasses.replace(
            self, absmax=self.statistics(), nested_absmax=None, offset=None
        )

    def map(self, f: Callable[[Array], Any]) -> Quantized:
        """A node like this that holds `f(array)` for each array."""
        changed = {n: f(getattr(self, n)) for n in _ARRAYS if self.has(n)}
        return dataclasses.replace(self, **changed)

    def has(self, name: str) -> bool:
        """Whether there is an array of that name."""
        return getattr(self, name) is not None

    def along(self, name: str) -> tuple[int | None, ...]:
        """The kernel dimension along each axis of an array, None for none.

        Of a row's dimensions only the first may be cut, where the row may be.
        """
        layout, batch = self.layout, tuple(range(len(self.batch)))
        ndim = len(batch) + len(layout.rows) + len(layout.cols)
        col = layout.cols[0] % ndim if not layout.sizes[0] else None
        rows = tuple(d % ndim for d in layout.rows)
        if name == "offset":
            return batch
        if name == "nested_absmax":
            return (*batch, None)
        by_row = name == "absmax" and layout.block is None
        return (*batch, *rows) if by_row else (*batch, *rows, col)

    def place_spec(
        self, spec: PartitionSpec, make: Callable[[PartitionSpec], Any] = lambda s: s
    ) -> Quantized:
        """A node like this that holds, for each array, its part of a kernel's spec."""
        parts = tuple(spec)

        def part(d: int | None) -> Any:
            return parts[d] if d is not None and d < len(parts) else None

        changed = {
            n: make(PartitionSpec(*map(part, self.along(n))))
            for n in _ARRAYS
            if self.has(n)
        }
        return dataclasses.replace(self, **changed)

    def __repr__(self) -> str:
        if not hasattr(self.codes, "shape"):
            return f"Quantized({self.path!r}, {self.codes!r})"
        nested = ", double" if self.has("nested_absmax") else ""
        block = f", block {self.layout.block}" if self.layout.block else ""
        form = f"{self.layout.form} of {self.dtype}{list(self.shape)}"
        return f"Quantized({self.path!r}, {form}{block}{nested})"

    def tree_flatten(self) -> tuple[Any, Any]:
        """The arrays; the rest is static."""
        return [getattr(self, n) for n in _ARRAYS], (self.layout, Note(self.path))

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """The arrays by name."""
        children, static = self.tree_flatten()
        return list(zip(_KEYS, children, strict=True)), static

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> Quantized:
        """Inverse of `tree_flatten`; checks nothing, as JAX asks."""
        layout, note = static
        codes, absmax, nested_absmax, offset = children
        return cls(codes, absmax, nested_absmax, offset, layout, note.text)


_ARRAYS = ("codes", "absmax", "nested_absmax", "offset")
_KEYS = tuple(jax.tree_util.GetAttrKey(n) for n in _ARRAYS)
_OVER_127 = np.float32(1 / 127)
_OVER_448 = np.float32(1 / 448)  # the largest float8_e4m3fn


def is_abstract(x: Any) -> bool:
    """Whether a kernel, of codes or not, has shapes and no values."""
    x = x.codes if isinstance(x, Quantized) else x
    return isinstance(x, jax.ShapeDtypeStruct)


def dense(x: Any) -> Any:
    """A quantised kernel as an array; anything else as it is."""
    return x.dense() if isinstance(x, Quantized) else x
