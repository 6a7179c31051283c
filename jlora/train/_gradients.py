"""Gradients of the trainable leaves, over microbatches, devices and dtypes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora._compat import varying
from jlora._errors import ShapeError
from jlora._kernel.nodes import Full, LowRank, Rows, is_node
from jlora._paths import path_str
from jlora._transform.replay import OnMissing
from jlora._tree.dropout import with_dropout
from jlora._tree.partition import combine
from jlora.train._totals import Totals, nonzero, totals_fn

Array = Any
Tree = Any
AxisName = str | tuple[str, ...]
LossFn = Callable[[Tree, Any, Array], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientSettings:
    """The options of `make_train_step` that concern the gradients."""

    accumulate: int = 1
    compute_dtype: Any = None
    cast_batch: bool = True
    axis_name: AxisName | None = None
    on_missing: OnMissing = "error"

    def __post_init__(self) -> None:
        n = self.accumulate
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ValueError(f"accumulate={n!r}; it is a whole number from 1 on.")


def gradients(
    loss_fn: LossFn,
    settings: GradientSettings,
    trainable: Tree,
    frozen: Tree,
    batch: Any,
    key: Array,
) -> tuple[Tree, Totals]:
    """Gradients of the mean loss, and all totals, over microbatches and devices."""
    axis = settings.axis_name
    dtypes = jax.tree.map(lambda x: x.dtype, trainable)
    if axis is not None:
        # Each device its own dropout; and its own gradient, which shard_map would
        # sum by itself for parameters that it knows to be the same everywhere.
        key = jax.random.fold_in(key, lax.axis_index(axis))
        vary = functools.partial(_varying, axis=axis)
        trainable, frozen = jax.tree.map(vary, (trainable, frozen))
    # The cast base is the same for all microbatches: cast it once, outside the loop.
    frozen = cast_base(frozen, settings.compute_dtype)
    if settings.cast_batch:
        batch = cast(batch, settings.compute_dtype)
    loss = totals_fn(loss_fn, settings.on_missing)

    def total_loss(trainable: Tree, batch: Any, key: Array) -> tuple[Array, Totals]:
        own, params_key = jax.random.split(key)
        params = with_dropout(combine(trainable, frozen), params_key)
        totals = loss(cast_full(params, settings.compute_dtype), batch, own)
        return totals["loss"][0], totals

    def one(batch: Any, key: Array) -> tuple[Tree, Totals]:
        grads, totals = jax.grad(total_loss, has_aux=True)(trainable, batch, key)
        return jax.tree.map(_at_least_f32, grads), totals

    sums = _accumulated(one, batch, key, settings.accumulate, axis)
    grads, totals = sums if axis is None else lax.psum(sums, axis)
    weight = nonzero(totals["loss"][1])
    return jax.tree.map(lambda g, d: (g / weight).astype(d), grads, dtypes), totals


def _accumulated(
    one: Callable[[Any, Array], Any], batch: Any, key: Array, n: int, axis: Any
) -> Any:
    """The sum of `one` over n microbatches, in one loop."""
    if n == 1:
        return one(batch, jax.random.fold_in(key, 0))
    microbatches, shared = _microbatches(batch, n)

    def run(number: Array, microbatch: list[Any]) -> Any:
        return one(_reunite(microbatch, shared), jax.random.fold_in(key, number))

    def body(sums: Any, xs: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, run(*xs)), None

    xs = (jnp.arange(n), microbatches)
    shapes = jax.eval_shape(run, *jax.tree.map(lambda x: x[0], xs))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    if axis is not None:
        zeros = jax.tree.map(functools.partial(_varying, axis=axis), zeros)
    return lax.scan(body, zeros, xs)[0]


def _microbatches(batch: Any, n: int) -> tuple[list[Any], Any]:
    """The leaves with a leading axis, cut up `[n, size/n, ...]`, and what puts back."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(batch)
    cut: list[Any] = []
    for path, x in leaves:
        if jnp.ndim(x) == 0:
            continue
        if x.shape[0] % n:
            raise ShapeError(
                f"accumulate={n} does not divide the batch: its leaf "
                f"{path_str(path)!r} is {tuple(x.shape)}.\nPass a leading axis of a "
                f"multiple of {n}; fill up with masked items if need be."
            )
        # Every n-th item: contiguous microbatches of a sharded batch would each lie
        # on a few of the devices.
        rows = jnp.reshape(x, (x.shape[0] // n, n, *x.shape[1:]))
        cut.append(jnp.swapaxes(rows, 0, 1))
    if not cut:
        raise ShapeError(
            f"accumulate={n}, but no leaf of the batch has a leading axis to cut."
        )
    return cut, (treedef, [x if jnp.ndim(x) == 0 else None for _, x in leaves])


def _reunite(microbatch: list[Any], shared: Any) -> Any:
    treedef, scalars = shared
    feed = iter(microbatch)
    return treedef.unflatten([next(feed) if x is None else x for x in scalars])


def _varying(x: Array, axis: AxisName) -> Array:
    return varying(x, (axis,) if isinstance(axis, str) else axis)


def _at_least_f32(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


# -- dtypes ----------------------------------------------------------------------------


def cast(tree: Tree, dtype: Any) -> Tree:
    def one(x: Any) -> Any:
        is_float = isinstance(x, jax.Array | np.ndarray)
        is_float = is_float and jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(dtype) if is_float else x

    return tree if dtype is None else jax.tree.map(one, tree)


def cast_base(frozen: Tree, dtype: Any) -> Tree:
    """Kernels and plain leaves; the adapters' scales stay float32."""

    def one(x: Any) -> Any:
        if isinstance(x, LowRank | Rows):
            return dataclasses.replace(x, base=cast(x.base, dtype))
        return x if isinstance(x, Full) else cast(x, dtype)

    return jax.tree.map(one, frozen, is_leaf=is_node)


def cast_full(params: Tree, dtype: Any) -> Tree:
    return jax.tree.map(
        lambda x: Full(cast(x.value, dtype)) if isinstance(x, Full) else x,
        params,
        is_leaf=is_node,
    )
