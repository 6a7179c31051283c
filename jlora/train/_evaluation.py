"""Evaluation steps, and the check that a loss trains what it should."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh

from jlora._errors import OptionError, StructureError
from jlora._paths import leaf_paths, module_of
from jlora._transform.lora import lora
from jlora._transform.replay import OnMissing
from jlora._tree.dropout import with_dropout
from jlora._tree.options import one_of
from jlora.sharding._batches import place_batch
from jlora.train._batch import Batch, as_batch
from jlora.train._codes import gathering, kept_parts, with_gathers
from jlora.train._gradients import (
    AxisName,
    GradientSettings,
    LossFn,
    Objective,
    cast,
    cast_base,
    cast_full,
    check_compute_dtype,
)
from jlora.train._state import TrainState, unreplicate
from jlora.train._static import put_together, take_apart
from jlora.train._step import PARALLEL, Parallel, check_mesh, on_mesh
from jlora.train._totals import Metrics, Totals, means, pair, totals_fn
from jlora.train._uses import IdCheck

Tree = Any
MetricFn = Callable[[Tree, Batch], Mapping[str, Any]]


class EvalStep:
    """A compiled `(state or params, batch) -> metrics`."""

    def __init__(
        self,
        totals: Callable[[Tree, Batch], Totals],
        parallel: Parallel = "jit",
        axis_name: AxisName | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        def of_arrays(known: Any, arrays: Any, batch: Batch) -> Totals:
            rest, kept = known
            with on_mesh(mesh), gathering(kept):
                return totals(with_gathers(put_together(arrays, rest)), batch)

        self._is_mapped, self._mesh = parallel == "pmap", mesh
        self._check_ids = IdCheck()
        self._totals: Any = (
            jax.pmap(of_arrays, axis_name=axis_name, static_broadcasted_argnums=0)
            if self._is_mapped
            else jax.jit(of_arrays, static_argnums=0)
        )

    def __call__(self, state: TrainState | Tree, batch: Batch) -> Metrics:
        """The metrics of one batch."""
        return means(self.totals(state, batch))

    def totals(self, state: TrainState | Tree, batch: Batch) -> Totals:
        """Each metric as `(total, count)`, to be summed over batches."""
        batch = as_batch(batch)
        arguments = self._arguments(state, batch)
        if not self._is_mapped:
            trace = lambda: self._totals.trace(*arguments).jaxpr  # noqa: E731
            self._check_ids(arguments[0][0], batch, trace)
        totals = self._totals(*arguments)
        return unreplicate(totals) if self._is_mapped else totals

    def lower(self, state: TrainState | Tree, batch: Batch) -> jax.stages.Lowered:
        """Lower without running, as `jax.jit(f).lower`: for costs and memory."""
        return self._totals.lower(*self._arguments(state, as_batch(batch)))

    def _arguments(self, state: TrainState | Tree, batch: Batch) -> tuple[Any, ...]:
        """What is static, the parameters' arrays, and the batch where it is taken."""
        if isinstance(state, TrainState):
            params, arrays, rest = state.evaluated
        else:
            params = with_dropout(state, None)
            arrays, rest = take_apart(params)
        return (rest, kept_parts(params, self._mesh)), arrays, self._placed(batch)

    def _placed(self, batch: Batch) -> Batch:
        # What does not divide is computed by all: no example is lost or counted twice.
        if self._mesh is None:
            return batch
        return place_batch(batch, self._mesh, uneven="replicate")


def make_eval_step(
    metric_fn: MetricFn,
    *,
    compute_dtype: Any = None,
    cast_batch: bool = True,
    axis_name: AxisName | None = None,
    parallel: Parallel = "jit",
    mesh: Mesh | None = None,
    on_missing: OnMissing = "error",
) -> EvalStep:
    """Compile an evaluation step, without dropout and without gradients.

    Args:
      metric_fn: `(params, batch)`, written for plain parameters; returns a dict of
        metrics, each a scalar or a pair `(total, count)`. A `"weight"` among them says
        what the scalars are means over.
      compute_dtype: as in `make_train_step`.
      cast_batch: as in `make_train_step`.
      axis_name: as in `make_train_step`.
      parallel: as in `make_train_step`; the metrics of `"pmap"` have no axis of
        devices.
      mesh: as in `make_train_step`. A batch that the mesh does not divide is computed
        whole on every device.
      on_missing: as in `jlora.lora`.

    Returns:
      The step; `evaluate` runs it over many batches.

    Raises:
      OptionError: options out of range.
      DataError: when called, as of a training step.
      StructureError: when called, a result that is no dict of metrics.
    """
    if not callable(metric_fn):
        raise OptionError(
            f"metric_fn is {type(metric_fn).__name__}: expected a function "
            "(params, batch) that returns a dict of metrics."
        )
    check_compute_dtype(compute_dtype)
    one_of("parallel", parallel, PARALLEL)
    check_mesh(mesh, parallel)
    if parallel == "pmap" and axis_name is None:
        axis_name = "batch"

    def read(params: Tree, batch: Any) -> Totals:
        metrics = metric_fn(params, batch)
        if not isinstance(metrics, Mapping):
            is_array = isinstance(metrics, jax.Array)
            kind = "an array" if is_array else type(metrics).__name__
            raise StructureError(
                f"the metric function returns {kind}: expected a "
                "dict of metrics, each a scalar or a pair (total, count)."
            )
        weight = jnp.asarray(metrics.get("weight", 1.0), jnp.float32)
        named = {name: x for name, x in metrics.items() if name != "weight"}
        return {name: pair(name, x, weight) for name, x in named.items()}

    of_lorafied = lora(read, on_missing=on_missing)

    def totals(params: Tree, batch: Any) -> Totals:
        params = cast_full(cast_base(params, compute_dtype), compute_dtype)
        if cast_batch:
            batch = cast(batch, compute_dtype)
        out = of_lorafied(params, batch)
        return out if axis_name is None else lax.psum(out, axis_name)

    return EvalStep(totals, parallel, axis_name, mesh)


def evaluate(
    step: EvalStep, state: TrainState | Tree, batches: Iterable[Batch]
) -> dict[str, float]:
    """The metrics over all batches; waits for the device once, at the end.

    Args:
      step: from `make_eval_step`.
      state: the state, or a lorafied or plain tree of parameters.
      batches: what to average over, each a batch of the step.

    Raises:
      StructureError: there are no batches.
      DataError: a batch that holds something else than arrays.
    """
    sums: Totals | None = None
    for batch in batches:
        totals = step.totals(state, batch)
        sums = totals if sums is None else jax.tree.map(jnp.add, sums, totals)
    if sums is None:
        raise StructureError(
            "evaluate was given no batches.\nA generator is used up after one pass: "
            "make a new one for each evaluation."
        )
    return {name: float(x) for name, x in jax.device_get(means(sums)).items()}


def check_gradients(
    loss_fn: LossFn,
    state: TrainState,
    batch: Batch,
    *,
    compute_dtype: Any = None,
    cast_batch: bool = True,
    on_missing: OnMissing = "error",
) -> tuple[str, ...]:
    """Name what the loss does not train: adapters and leaves of zero gradient.

    An adapter counts as dead if the gradient of all its factors is zero; at the start
    that of `a` is, as `b` is zero. Run it once, before a long run.

    Args:
      loss_fn: as in `make_train_step`.
      state: the state.
      batch: one batch.
      compute_dtype: as in `make_train_step`.
      cast_batch: as in `make_train_step`.
      on_missing: as in `jlora.lora`.

    Returns:
      The paths of the dead ones; empty if all is well.

    Raises:
      StructureError: every gradient is zero: the loss uses none of the adapters.
      DataError: the batch holds something else than arrays.
    """
    settings = GradientSettings(compute_dtype=compute_dtype, cast_batch=cast_batch)
    loss = totals_fn(loss_fn, on_missing)
    arrays, rest = take_apart(state.frozen)

    @jax.jit
    def is_zero(trainable: Tree, arrays: list[Any], batch: Batch, key: Array) -> Tree:
        frozen = put_together(arrays, rest)
        grads, _ = Objective(loss, settings, frozen, batch, key).gradients(trainable)
        return jax.tree.map(lambda g: ~jnp.any(g != 0), grads)

    zero = is_zero(state.trainable, arrays, as_batch(batch), state.key)
    parts: dict[str, bool] = {}
    flags = jax.tree.leaves(jax.device_get(zero))
    for path, x in zip(leaf_paths(zero), flags, strict=True):
        owner = module_of(path)
        parts[owner] = parts.get(owner, True) and bool(x)
    dead = tuple(path for path, is_dead in parts.items() if is_dead)
    if len(dead) == len(parts):
        raise StructureError(
            f"the loss has no gradient at all: none of the {len(parts)} adapters and "
            f"trained leaves ({', '.join(dead[:3])}, ...) moves it.\nSee that loss_fn "
            "uses the params it is given (not some from outside), and that nothing "
            "stops the gradient on the way."
        )
    return dead
