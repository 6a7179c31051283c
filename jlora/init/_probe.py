"""Sums over a kernel's inputs, as the gradient of something that changes nothing.

A probe stands in an adapter's place and has no rank, so products are what they were.
On its way to the product x passes through the identity, whose derivative ignores what
it is given and returns XᵀX, Xᵀ1 and the number of rows. JAX then does the rest: over a
scan's layers these stay apart, over its uses, microbatches and shards they are summed,
under `jax.checkpoint` x is made again; and nothing of the model is edited.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _compat
from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import RANK, Array, Dims, Label, align, contract, expand


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Probe(Adapter):
    """An adapter that adds nothing, and whose gradient says what its inputs were.

    That of `a [*batch, *in, i + 1]` is XᵀX with Xᵀ1 in the last column, in float32, and
    that of `scale [*batch]` is the number of rows of X. `b` is empty.
    """

    @property
    def rank(self) -> int:
        """None: there is no term."""
        return 0

    def watched(self, x: Array, labels: Sequence[Label], contracted: Dims) -> Array:
        """X, watched where it is contracted with the kernel's inputs."""
        if not {*self.in_axes} <= {*contracted}:
            return x
        spec = _Spec(tuple(labels), self.a_dims, self.in_axes, self.starts)
        return _watch(spec, *_compat.alike_varying(x, self.a, self.scale))


def probe_of(adapter: Adapter) -> Probe:
    """The probe for a kernel's adapter, with zeros to differentiate by."""
    batch, ins, outs = adapter.batch_axes, adapter.in_axes, adapter.out_axes
    many, i, o = (
        tuple(adapter.size(d) or 1 for d in dims) for dims in (batch, ins, outs)
    )
    fields = {f.name: getattr(adapter, f.name) for f in dataclasses.fields(adapter)}
    own = {
        "a": jnp.zeros((*many, *i, math.prod(i) + 1)), "b": jnp.zeros((*many, 0, *o)),
        "scale": jnp.zeros(many), "a_dims": (*batch, *ins, RANK),
        "b_dims": (*batch, RANK, *outs), "s_dims": batch, "o_dims": (),
        "dropout": 0.0, "key": None, "magnitude": None, "bias": None,
    }  # fmt: skip
    return Probe(**{**fields, **own})


@dataclasses.dataclass(frozen=True)
class _Spec:
    """The labels of x's axes, and the dimensions of `a`."""

    labels: tuple[Label, ...]
    a_dims: Dims
    ins: Dims
    starts: Dims


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _watch(spec: _Spec, x: Array, a: Array, rows: Array) -> Array:
    return x


def _forward(spec: _Spec, x: Array, a: Array, rows: Array) -> Any:
    return x, (x, a, rows)


def _backward(spec: _Spec, kept: Any, g: Array) -> Any:
    x, a, rows = kept
    dims = [d for d in spec.a_dims if d != RANK]
    labels = list(spec.labels)
    for d in spec.ins:  # a window of the inputs
        axis, size = labels.index(d), a.shape[spec.a_dims.index(d)]
        x = lax.slice_in_dim(x, spec.starts[d], spec.starts[d] + size, axis=axis)
    free = [n for n in labels if n not in dims]
    count = math.prod(x.shape[labels.index(n)] for n in free)
    again = [("in", n) if n in spec.ins else n for n in labels]
    keep = {*dims} - {*spec.ins}
    second, names = contract(
        x, labels, x, again, keep, precision="highest",
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    columns = [("in", d) for d in sorted(spec.ins)]
    second = expand(second, names, [*dims, *columns])
    second = second.reshape(*second.shape[: len(dims)], -1)
    axes = [labels.index(n) for n in free]
    first = jnp.sum(x, axis=axes, dtype=jnp.float32)
    first = expand(first, [n for n in labels if n in dims], dims)[..., None]
    found = jnp.concatenate([second, first], axis=-1)
    found = align(found, [*dims, RANK], spec.a_dims)
    return (
        g, jnp.broadcast_to(found, a.shape).astype(a.dtype),
        jnp.full_like(rows, count),
    )  # fmt: skip


_watch.defvjp(_forward, _backward)
