"""The training step: gradients of the trainable leaves, clipped, applied, jitted."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from jlora import _compat
from jlora._errors import StructureError
from jlora._transform.replay import OnMissing
from jlora.train._gradients import AxisName, GradientSettings, LossFn, gradients
from jlora.train._state import TrainState
from jlora.train._totals import Metrics, means

Array = Any
Tree = Any


class StepInfo(NamedTuple):
    """What a step's hook sees, inside the compiled step.

    Attributes:
      step: the number of updates before this one.
      trainable: the leaves before the update.
      grads: their gradients, after clipping.
      updates: what is added to them.
      key: the run's key, folded with the step.
    """

    step: Array
    trainable: Tree
    grads: Tree
    updates: Tree
    key: Array


Hook = Callable[[StepInfo], Mapping[str, Array]]


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The options of `make_train_step`, checked."""

    gradients: GradientSettings
    clip_norm: float | None
    skip_nonfinite: bool
    hooks: tuple[Hook, ...]

    def __post_init__(self) -> None:
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm={self.clip_norm!r}; it is above 0, or None.")


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    clip_norm: float | None = None,
    compute_dtype: Any = None,
    cast_batch: bool = True,
    skip_nonfinite: bool = False,
    hooks: Hook | Sequence[Hook] = (),
    donate: bool = True,
    axis_name: AxisName | None = None,
    parallel: Literal["jit", "pmap"] = "jit",
    on_missing: OnMissing = "error",
) -> TrainStep:
    """Compile a training step `(state, batch) -> (state, metrics)`.

    The loss function returns a loss, or `(loss, metrics)` with a dict of metrics. The
    loss, and each metric, is one of

    - a scalar: a mean over the batch. If batches hold unequal numbers of items, say
      how many this one is a mean over by `metrics["weight"]`;
    - a pair `(total, count)`, as `cross_entropy` returns it: stands for total/count.

    Totals and counts are summed over microbatches and devices before the division, so
    accumulation equals the one big batch also where padding is uneven.

    Args:
      loss_fn: `(params, batch, key)`, written for plain parameters.
      tx: an optax optimiser, schedules and all.
      accumulate: number of microbatches, run one after another in the one compiled
        step. Every leaf of the batch has a leading axis that it divides; scalars are
        shared. Microbatch i holds the items i, i + accumulate, ..., which keeps a batch
        that is sharded along its leading axis where it is.
      clip_norm: scale the gradients down to this global norm.
      compute_dtype: cast the base (and fully trained leaves, at use) to this dtype.
        Adapters and optimiser state stay as they are, and follow the base at use. The
        cast copy lives for the step; a base that is stored so takes no second one.
      cast_batch: whether `compute_dtype` goes for the batch's floating leaves too.
      skip_nonfinite: leave parameters and optimiser as they were in a step whose loss
        or gradient is not finite. The step still counts.
      hooks: functions of a `StepInfo` that return more metrics, such as
        `lambda info: {"learning_rate": schedule(info.step)}`.
      donate: let the step reuse the memory of the trainable leaves and the optimiser
        state it is given; that state cannot be used again. The frozen half, the key
        and the batch are never donated.
      axis_name: sum over this mapped axis, for use inside `jax.pmap` or
        `jax.shard_map`. Not needed for sharded arrays under `jax.jit`.
      parallel: `"jit"`, which follows the shardings of its arguments; or `"pmap"`, for
        a state from `replicate` and a batch with a leading axis of devices.
      on_missing: as in `jlora.lora`.

    Returns:
      The step. Its metrics are device arrays, so reading none costs no wait: `loss`;
      `weight`, what it is a mean over (microbatches, if the loss function does not
      say); `grad_norm` before clipping, 0 if no adapter was touched; `nonfinite`, True
      if either is NaN or infinite; and those of the loss function and the hooks.

    Raises:
      ValueError: options out of range.
      ShapeError: when called, a batch that `accumulate` does not divide.
      StructureError: when called, a result of the loss function or of a hook that is
        none of the above.
    """
    if parallel == "pmap" and axis_name is None:
        axis_name = "batch"
    settings = _Settings(
        GradientSettings(
            accumulate=accumulate,
            compute_dtype=compute_dtype,
            cast_batch=cast_batch,
            axis_name=axis_name,
            on_missing=on_missing,
        ),
        clip_norm,
        skip_nonfinite,
        (hooks,) if callable(hooks) else tuple(hooks),
    )
    tx = optax.with_extra_args_support(tx)
    pure = functools.partial(_step, loss_fn, tx, settings)
    return TrainStep(pure, donate, parallel, axis_name)


class TrainStep:
    """A compiled step; call it as `state, metrics = step(state, batch)`."""

    def __init__(
        self, pure: Callable[..., Any], donate: bool, parallel: str, axis_name: Any
    ) -> None:
        if parallel not in ("jit", "pmap"):
            raise ValueError(f"parallel={parallel!r}; it is 'jit' or 'pmap'.")
        self._pure = pure
        self._donate = (0,) if donate else ()
        self._parallel = parallel
        self._axis_name = axis_name
        self._compiled: dict[Any, Any] = {}
        self._traces = 0

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """Run one step."""
        run, leaves, treedef = self._prepare(state)
        leaves, metrics = run(leaves, (state.frozen, state.key), batch)
        step, trainable, opt_state = jax.tree.unflatten(treedef, leaves)
        return dataclasses.replace(
            state, step=step, trainable=trainable, opt_state=opt_state
        ), metrics

    def lower(self, state: TrainState, batch: Any) -> Any:
        """Lower without running, as `jax.jit(f).lower`: for costs and memory."""
        run, leaves, _ = self._prepare(state)
        return run.lower(leaves, (state.frozen, state.key), batch)

    def cache_size(self) -> int:
        """How many times the step was compiled: 1, or its arguments change shape."""
        if self._parallel == "pmap":
            return self._traces
        return sum(map(_compat.compilations, self._compiled.values()))

    def _prepare(self, state: TrainState) -> tuple[Any, list[Any], Any]:
        """The compiled function, and what a step changes: the leaves it may donate."""
        moving = (state.step, state.trainable, state.opt_state)
        # Flattened once: nodes are flattened in Python, and a model has hundreds.
        leaves, treedef = jax.tree.flatten(moving)
        if self._parallel == "pmap":
            known: Any = treedef
            wrap = functools.partial(jax.pmap, axis_name=self._axis_name)
        else:
            # The new state is laid out as the old one; the compiler could choose
            # another layout, and the next call would be compiled anew.
            shardings = [_named_sharding(x) for x in leaves]
            known = (treedef, tuple(shardings))
            wrap = functools.partial(jax.jit, out_shardings=(shardings, None))
        if known not in self._compiled:
            flat = functools.partial(self._flat, treedef)
            self._compiled[known] = wrap(flat, donate_argnums=self._donate)
        return self._compiled[known], leaves, treedef

    def _flat(self, treedef: Any, leaves: Any, kept: Any, batch: Any) -> Any:
        self._traces += 1
        moving = jax.tree.unflatten(treedef, leaves)
        moving, metrics = self._pure(moving, kept, batch)
        leaves, structure = jax.tree.flatten(moving)
        if structure != treedef:
            raise StructureError(
                "the optimiser returns a state of another structure than it was given."
                "\nMake the state with the optimiser that the step has: "
                f"TrainState.create(params, tx).\n  was {treedef}\n  is  {structure}"
            )
        return leaves, metrics


def _named_sharding(x: Any) -> NamedSharding | None:
    if isinstance(x, jax.core.Tracer):
        return None
    sharding = getattr(x, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def _step(
    loss_fn: LossFn, tx: Any, settings: _Settings, moving: Any, kept: Any, batch: Any
) -> tuple[Any, Metrics]:
    step, trainable, opt_state = moving
    frozen, run_key = kept
    key = jax.random.fold_in(run_key, step)
    grads, totals = gradients(
        loss_fn, settings.gradients, trainable, frozen, batch, key
    )
    metrics = means(totals)
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
    metrics["weight"] = totals["loss"][1]
    metrics["grad_norm"] = norm
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    metrics["nonfinite"] = ~finite
    grads = _clip(grads, norm, settings.clip_norm)
    updates, new_opt = tx.update(grads, opt_state, trainable, value=metrics["loss"])
    for hook in settings.hooks:
        info = StepInfo(step, trainable, grads, updates, key)
        metrics = _joined(metrics, hook(info))
    new = optax.apply_updates(trainable, updates)
    if settings.skip_nonfinite:
        keep = functools.partial(jnp.where, finite)
        new, new_opt = jax.tree.map(keep, (new, new_opt), (trainable, opt_state))
    return (step + 1, new, new_opt), metrics


def _clip(grads: Tree, norm: Array, clip_norm: float | None) -> Tree:
    """As `optax.clip_by_global_norm`, with the norm that is reported anyway."""
    if clip_norm is None:
        return grads
    clip = lambda g: jnp.where(norm < clip_norm, g, (g / norm) * clip_norm)  # noqa: E731
    return jax.tree.map(lambda g: clip(g).astype(g.dtype), grads)


def _joined(metrics: Metrics, more: Mapping[str, Array]) -> Metrics:
    taken = sorted(set(metrics) & set(more))
    if taken:
        raise StructureError(
            f"a hook returns the metrics {taken}, which the step has already.\nGive "
            "them other names."
        )
    return {**metrics, **more}
