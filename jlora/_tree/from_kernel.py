"""Factors that are made of a kernel, and the kernel with their product taken out."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jlora import _compat
from jlora._errors import NonFiniteError
from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import Array, Dims, accumulation_dtype, rounded
from jlora._transform._rules.matmul import small_product_dtype
from jlora._tree.initializers import FromKernel


@dataclasses.dataclass(frozen=True)
class Form:
    """How a kernel's window is a stack of matrices `[n, i, o]`.

    Attributes:
      batch, ins, outs: the kernel's dimensions.
      starts: where the window begins.
      shape: the window's.
    """

    batch: Dims
    ins: Dims
    outs: Dims
    starts: Dims
    shape: tuple[int, ...]

    def sizes(self, dims: Dims) -> tuple[int, ...]:
        """The window's sizes along some dimensions."""
        return tuple(self.shape[d] for d in dims)

    def matrices(self, kernel: Array) -> Array:
        """The window as matrices, in what kernels are summed in."""
        ends = [start + n for start, n in zip(self.starts, self.shape, strict=True)]
        window = lax.slice(kernel, self.starts, ends)
        window = window.transpose(*self.batch, *self.ins, *self.outs)
        ends = [math.prod(self.sizes(x)) for x in (self.batch, self.ins, self.outs)]
        return window.reshape(ends).astype(accumulation_dtype(kernel.dtype))


def form_of(adapter: Adapter, kernel: Array) -> Form:
    """The form of the window that an adapter is on."""
    shape = tuple(adapter.size(d) or n for d, n in enumerate(kernel.shape))
    return Form(
        adapter.batch_axes, adapter.in_axes, adapter.out_axes, adapter.starts, shape
    )


def start_from_kernel(
    init: FromKernel, key: Array, kernel: Array, adapter: Adapter, path: str,
    data: Any = (),
) -> tuple[Adapter, Array]:  # fmt: skip
    """The adapter with its first factors, and the kernel without their product.

    Args:
      init: makes the factors.
      key: the kernel's own.
      kernel: an array; a sharded one is gathered, for a decomposition needs all of it.
      adapter: with shapes in the place of its factors, and its scale.
      path: the kernel's, for messages.
      data: what else the initialiser takes, each `[n, ...]` with an entry a matrix.

    Raises:
      NonFiniteError: the kernel holds NaN or infinity.
    """
    whole = gathered(kernel)
    form, rank = form_of(adapter, kernel), adapter.rank
    a, b = _factors(init, form, rank, adapter.a.dtype, key, whole, adapter.scale, data)
    if not isinstance(a, jax.core.Tracer) and not _is_finite(a, b):
        raise NonFiniteError(
            f"the kernel {path!r} {tuple(kernel.shape)} {kernel.dtype} has no "
            f"decomposition for {init!r}: it holds NaN or infinity.\nCheck the "
            "checkpoint that it was loaded from."
        )
    made = dataclasses.replace(adapter, a=a, b=b, shifted=True)
    return made, without_product(kernel, made)


def without_product(kernel: Array, adapter: Adapter) -> Array:
    """`W - s·a·b`, summed in float32 at least, rounded once and sharded as W."""
    t = dataclasses.replace(adapter, key=None, magnitude=None, bias=None, role=None)
    out = _without_product(gathered(kernel), t)
    if _on_mesh(kernel):
        return jax.device_put(out, kernel.sharding)
    return _compat.sharded_like(out, kernel) if isinstance(kernel, jax.Array) else out


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _factors(
    init: FromKernel, form: Form, rank: int, dtype: Any, key: Array, kernel: Array,
    scale: Array, data: Any,
) -> tuple[Array, Array]:  # fmt: skip
    """The factors, with numbers that products take as they are.

    A bfloat16 network rounds `s·a` and `b`. Rounded here, before the product is taken
    out, they cost nothing: the base makes up for it. Matrices are decomposed one after
    another, so that of a stack there is one in memory.
    """
    w = form.matrices(kernel)
    keys, scales = jax.random.split(key, len(w)), scale.reshape(-1)
    one = lambda x: init.factors(*x[:2], rank, *x[2:])  # noqa: E731
    with jax.default_matmul_precision("highest"):
        a, b = lax.map(one, (keys, w, scales, *data))
    seen = small_product_dtype(kernel.dtype)
    s = scales[:, None, None].astype(a.dtype)
    a, b = (rounded(a * s, seen) / s).astype(dtype), rounded(b, seen).astype(dtype)
    many = form.sizes(form.batch)
    return (
        a.reshape(*many, *form.sizes(form.ins), rank),
        b.reshape(*many, rank, *form.sizes(form.outs)),
    )


@jax.jit
def _without_product(kernel: Array, adapter: Adapter) -> Array:
    dtype = accumulation_dtype(kernel.dtype)
    shifted = kernel.astype(dtype) - adapter.delta(kernel.shape, dtype)
    return rounded(shifted, kernel.dtype).astype(kernel.dtype)


def gathered(kernel: Array) -> Array:
    """A sharded kernel whole on every device of its mesh."""
    if _on_mesh(kernel):
        everywhere = NamedSharding(kernel.sharding.mesh, PartitionSpec())
        return jax.device_put(kernel, everywhere)
    if isinstance(kernel, jax.Array) and _compat.is_explicit(kernel):
        return _compat.reshard(kernel, _compat.on_mesh_of(kernel, ()))
    return kernel


def _on_mesh(kernel: Array) -> bool:
    traced = isinstance(kernel, jax.core.Tracer)
    return not traced and isinstance(getattr(kernel, "sharding", None), NamedSharding)


def _is_finite(*factors: Array) -> bool:
    return all(bool(jnp.all(jnp.isfinite(x))) for x in factors)
