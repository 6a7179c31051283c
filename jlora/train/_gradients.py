"""Gradients of the trainable leaves, over microbatches, devices and dtypes."""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora._compat import varying
from jlora._errors import OptionError, ShapeError
from jlora._kernel.nodes import Full, LowRank, Rows, is_node
from jlora._kernel.quantized import Quantized
from jlora._paths import path_str
from jlora._tree.dropout import with_dropout
from jlora._tree.partition import combine
from jlora.sharding._batches import data_axes, data_ways
from jlora.train._codes import with_gathers
from jlora.train._static import is_array
from jlora.train._totals import Totals, accumulation_dtype, means, nonzero

Tree = Any
AxisName = str | tuple[str, ...]
#: `(params, batch, key)`, written for plain parameters; returns a loss, or a loss and
#: metrics, each a scalar or a pair `(total, count)`.
LossFn = Callable[[Tree, Any, Array], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientSettings:
    """The options of `make_train_step` that concern the gradients, checked."""

    accumulate: int = 1
    groups: int | None = None
    mesh: Mesh | None = None
    compute_dtype: Any = None
    cast_batch: bool = True
    axis_name: AxisName | None = None

    def __post_init__(self) -> None:
        n = self.accumulate
        if not isinstance(n, numbers.Integral) or isinstance(n, bool) or n < 1:
            raise OptionError(
                f"accumulate={n!r}: expected a number of microbatches, at least 1."
            )
        check_compute_dtype(self.compute_dtype)
        self._check_groups()

    def _check_groups(self) -> None:
        n = self.groups
        if n is None:
            return
        if not isinstance(n, numbers.Integral) or isinstance(n, bool) or n < 1:
            raise OptionError(
                f"groups={n!r}: expected a number of groups, a multiple of the devices "
                "that a batch may be cut over, or None."
            )
        ways = 1 if self.mesh is None else data_ways(self.mesh)
        if n % ways:
            raise OptionError(
                f"groups={n} do not fall on {ways} devices alike, over which the mesh "
                f"cuts a batch.\nTake a multiple, {ways * -(-n // ways)} say."
            )
        if self.accumulate != 1 or self.axis_name is not None:
            raise OptionError(
                f"groups={n} goes neither with accumulate nor with axis_name: they sum "
                "in an order of their own.\nLeave one of the two out."
            )


def check_compute_dtype(dtype: Any) -> None:
    """Refuse what is no floating dtype.

    Raises:
      OptionError: `dtype` is neither None nor a floating dtype.
    """
    if dtype is None:
        return
    try:
        known = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        known = False
    if not known:
        raise OptionError(
            f"compute_dtype={dtype!r}: expected a floating dtype such as jnp.bfloat16, "
            "or None."
        )


class Objective:
    """The mean loss of one batch, as a function of the trainable leaves.

    The same microbatches, PRNG keys and dtypes at every call: line searches compare
    values of one function. `loss` is what `totals_fn` makes of a loss function.
    """

    def __init__(
        self,
        loss: Callable[..., Totals],
        settings: GradientSettings,
        frozen: Tree,
        batch: Any,
        key: Array,
    ) -> None:
        axis = settings.axis_name
        if axis is not None:
            key = jax.random.fold_in(key, lax.axis_index(axis))  # its own dropout
            frozen = _all_varying(frozen, axis)
        # Cast once, outside the loop over microbatches, for which it is the same.
        self._frozen = cast_base(frozen, settings.compute_dtype)
        cast_batch = settings.compute_dtype if settings.cast_batch else None
        self._batch = cast(batch, cast_batch)
        self._key = key
        self._loss = loss
        self._settings = settings

    def gradients(self, trainable: Tree) -> tuple[Tree, Totals]:
        """Gradients of the mean loss, in the leaves' dtypes, and all totals."""
        sums, totals = self.sums(trainable)
        return mean_gradients(sums, totals, trainable), totals

    def sums(self, trainable: Tree) -> tuple[Tree, Totals]:
        """Gradients of the loss's total, in float32 at least, and all totals."""

        def one(trainable: Tree, batch: Any, key: Array) -> tuple[Tree, Totals]:
            grad = jax.grad(self._total, has_aux=True)
            grads, totals = grad(trainable, batch, key)
            return jax.tree.map(at_least_f32, grads), totals

        sums: tuple[Tree, Totals] = self._sum(one, trainable)
        return sums

    def value_fn(self) -> Callable[[Tree], Array]:
        """The mean loss as a function that can be differentiated in both modes.

        Its derivative is made of `gradients`: one pass over the microbatches, of which
        none keeps anything for another, and the sum over devices.
        """

        @jax.custom_jvp
        def value(trainable: Tree) -> Array:
            totals = self._sum(lambda *args: self._total(*args)[1], trainable)
            return means(totals)["loss"]

        @value.defjvp
        def derivative(
            primals: tuple[Tree], tangents: tuple[Tree]
        ) -> tuple[Array, Array]:
            grads, totals = self.gradients(*primals)
            loss = means(totals)["loss"]
            products = jax.tree.leaves(jax.tree.map(_product, grads, *tangents))
            return loss, sum(x.astype(loss.dtype) for x in products)

        return value

    def _total(self, trainable: Tree, batch: Any, key: Array) -> tuple[Array, Totals]:
        """The loss's total, to be differentiated, and all totals."""
        own, params_key = jax.random.split(key)
        params = with_gathers(combine(trainable, self._frozen))
        params = with_dropout(params, params_key)
        totals = self._loss(cast_full(params, self._settings.compute_dtype), batch, own)
        return totals["loss"][0], totals

    def _sum(self, one: Callable[..., Any], trainable: Tree) -> Any:
        """The sum of `one(trainable, batch, key)` over microbatches and devices."""
        axis = self._settings.axis_name
        if axis is not None:
            # Each device its own gradient, which shard_map would sum by itself for
            # parameters that it knows to be the same everywhere.
            trainable = _all_varying(trainable, axis)
        if self._settings.groups is not None:
            return self._in_order(one, trainable, int(self._settings.groups))
        sums = _accumulated(
            functools.partial(one, trainable),
            self._batch,
            self._key,
            int(self._settings.accumulate),
            axis,
        )
        return sums if axis is None else lax.psum(sums, axis)

    def _in_order(self, one: Callable[..., Any], trainable: Tree, n: int) -> Any:
        """The sum of `one` over n groups of neighbours, always in one order.

        Each device computes its groups one after the other, each by itself, and all are
        added as a binary tree of their numbers. A sum over devices would follow how
        many there are, and one product of several groups how many meet on a device.
        """
        groups, shared = _microbatches(self._batch, n, neighbours=True)
        mesh = self._settings.mesh

        def of_group(xs: Any) -> Any:
            number, group = xs
            key = jax.random.fold_in(self._key, number)
            return one(trainable, _reunite(group, shared), key)

        def of_device(numbers: Array, groups: Any) -> Any:
            return lax.map(of_group, (numbers, groups))

        if mesh is not None:
            data = (data_axes(mesh),)
            of_device = jax.shard_map(
                of_device,
                mesh=mesh,
                in_specs=PartitionSpec(*data),
                out_specs=PartitionSpec(*data),
                axis_names={*data[0]},
                check_vma=False,
            )
        found = of_device(jnp.arange(n), groups)
        if mesh is not None:
            whole = NamedSharding(mesh, PartitionSpec())
            found = lax.with_sharding_constraint(found, whole)
        return jax.tree.map(_tree_sum, found)


def mean_gradients(sums: Tree, totals: Totals, trainable: Tree) -> Tree:
    """Gradients of the mean loss, in the leaves' dtypes."""
    weight = nonzero(totals["loss"][1])
    mean = lambda g, x: (g / weight.astype(g.dtype)).astype(x.dtype)  # noqa: E731
    return jax.tree.map(mean, sums, trainable)


def _product(grad: Array, tangent: Array) -> Array:
    return jnp.sum(at_least_f32(grad) * at_least_f32(tangent))


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
        zeros = _all_varying(zeros, axis)
    return lax.scan(body, zeros, xs)[0]


def _tree_sum(x: Array) -> Array:
    """The sum of `[n, ...]` over n, by halves."""
    parts = [x[i] for i in range(x.shape[0])]
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=False)
        parts = [a + b for a, b in pairs] + parts[len(parts) & ~1 :]
    return parts[0]


def _microbatches(
    batch: Any, n: int, neighbours: bool = False
) -> tuple[list[Any], Any]:
    """The leaves with a leading axis, cut up `[n, size/n, ...]`, and what puts back."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(batch)
    what = "groups" if neighbours else "accumulate"
    cut: list[Any] = []
    for path, x in leaves:
        if jnp.ndim(x) == 0:
            continue
        if x.shape[0] % n:
            raise ShapeError(
                f"{what}={n} does not divide the batch: its leaf "
                f"{path_str(path)!r} is {tuple(x.shape)}.\nPass a leading axis of a "
                f"multiple of {n}; fill up with masked items if need be."
            )
        if neighbours:
            cut.append(jnp.reshape(x, (n, x.shape[0] // n, *x.shape[1:])))
            continue
        # Every n-th item: contiguous microbatches of a sharded batch would each lie
        # on a few of the devices.
        rows = jnp.reshape(x, (x.shape[0] // n, n, *x.shape[1:]))
        cut.append(jnp.swapaxes(rows, 0, 1))
    if not cut:
        raise ShapeError(
            f"{what}={n}, but no leaf of the batch has a leading axis to cut."
        )
    return cut, (treedef, [x if jnp.ndim(x) == 0 else None for _, x in leaves])


def _reunite(microbatch: list[Any], shared: Any) -> Any:
    treedef, scalars = shared
    feed = iter(microbatch)
    return treedef.unflatten([next(feed) if x is None else x for x in scalars])


def _all_varying(tree: Tree, axis: AxisName) -> Tree:
    axes = (axis,) if isinstance(axis, str) else axis
    return jax.tree.map(lambda x: varying(x, axes) if is_array(x) else x, tree)


# -- dtypes ----------------------------------------------------------------------------


def at_least_f32(x: Array) -> Array:
    """X in what is summed in: float32, or float64 where it is."""
    return x.astype(accumulation_dtype(x.dtype))


def cast(tree: Tree, dtype: Any) -> Tree:
    """The tree with its floating arrays in that dtype; None leaves them."""

    def one(x: Any) -> Any:
        is_float = isinstance(x, jax.Array | np.ndarray)
        is_float = is_float and jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(dtype) if is_float else x

    return tree if dtype is None else jax.tree.map(one, tree)


def cast_base(frozen: Tree, dtype: Any) -> Tree:
    """Kernels and plain leaves; scales, of adapters and of codes, stay float32."""

    def one(x: Any) -> Any:
        if isinstance(x, LowRank | Rows):
            return dataclasses.replace(x, base=one(x.base))
        return x if isinstance(x, Full | Quantized) else cast(x, dtype)

    return jax.tree.map(one, frozen, is_leaf=is_node)


def cast_full(params: Tree, dtype: Any) -> Tree:
    """Fully trained leaves, at use: what is updated stays as it is.

    And quantised kernels, of which only the dense form has a dtype.
    """

    def one(x: Any) -> Any:
        if isinstance(x, Full):
            return Full(cast(x.value, dtype))
        if isinstance(x, LowRank | Rows):
            return dataclasses.replace(x, base=one(x.base))
        return x.with_dtype(dtype) if isinstance(x, Quantized) else x

    return params if dtype is None else jax.tree.map(one, params, is_leaf=is_node)
