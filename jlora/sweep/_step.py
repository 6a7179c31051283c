"""One compiled step of a whole bank: jlora.train's own step, mapped over the slots.

The base is not mapped. A product of K·batch inputs with a kernel is one large product,
and what lies below the first adapter is computed once where the slots share a batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.sharding import Mesh

from jlora._errors import OptionError
from jlora._transform.replay import OnMissing
from jlora._tree.partition import combine
from jlora.sharding._batches import place_batch
from jlora.sharding._rules import Uneven
from jlora.sweep._bank import Bank, Kept
from jlora.sweep._jobs import Hyper
from jlora.sweep._plan import Optimizer, adamw, checked_optimizer
from jlora.train._evaluation import EvalStep
from jlora.train._form import Lying
from jlora.train._gradients import GradientSettings, LossFn, cast, cast_base, cast_full
from jlora.train._step import (
    Hook,
    StepSettings,
    TrainStep,
    check_mesh,
    on_mesh,
    update,
)
from jlora.train._totals import Metrics, Totals, totals_fn

Tree = Any
Batch = Any


def sweep_step(
    loss_fn: LossFn,
    optimizer: Optimizer = adamw,
    *,
    group: int | None = None,
    accumulate: int = 1,
    clip_norm: float | None = None,
    compute_dtype: Any = None,
    cast_batch: bool = True,
    hooks: Hook | Sequence[Hook] = (),
    donate: bool = True,
    mesh: Mesh | None = None,
    on_missing: OnMissing = "error",
) -> SweepStep:
    """Compile a step `(bank, batch) -> (bank, metrics)` of all slots of a bank.

    Each slot is what `jlora.train.make_train_step` would make of it alone: its own
    gradient norm is clipped, and a slot whose loss or gradient is not finite keeps its
    state in that step, while the others go on.

    Args:
      loss_fn: as of `make_train_step`, as are the options that are not named here.
      optimizer: as of `Plan`.
      group: slots at a time, which divides their number: the groups run one after
        another in the one step, and need the memory of one. None takes all at once.
      accumulate: microbatches, of each slot.
      clip_norm: the largest gradient norm, of each slot.
      compute_dtype: of the base.
      cast_batch: whether that goes for the batch too.
      hooks: they see one slot.
      donate: reuse the bank's memory; the one that is given cannot be used again.
      mesh: put batches on this mesh, the examples of each slot over its data axes.
      on_missing: as in `jlora.lora`.

    Returns:
      The step. Metrics are arrays `[K]`.

    Raises:
      OptionError: options out of range.
    """
    if not callable(loss_fn) or not callable(optimizer):
        raise OptionError("loss_fn and optimizer: expected functions.")
    settings = StepSettings(
        GradientSettings(
            accumulate=accumulate, compute_dtype=compute_dtype, cast_batch=cast_batch
        ),
        clip_norm,
        True,
        (hooks,) if callable(hooks) else tuple(hooks),
    )
    loss = totals_fn(loss_fn, on_missing)
    pure = functools.partial(_bank_update, loss, optimizer, settings, group)
    check_mesh(mesh)
    return SweepStep(pure, donate, "jit", None, mesh)


class SweepStep(TrainStep):
    """A compiled step of a bank."""

    def _placed(self, batch: Batch) -> Batch:
        return _on_mesh(batch, self._mesh, "error")

    def _next(self, state: Bank, lying: Lying) -> Bank:
        step, trainable, opt_state = lying.moving()
        return dataclasses.replace(
            state, step=step, trainable=trainable, opt_state=opt_state
        )

    def __call__(  # type: ignore[override]
        self, bank: Bank, batch: Batch, *, shared: bool = False
    ) -> tuple[Bank, Metrics]:
        """Run one step.

        Args:
          bank: from `Plan.bank`, or from the step before.
          batch: the slots' batches stacked, `[K, ...]` each leaf; or the one batch.
          shared: whether it is one batch for all slots.
        """
        return super().__call__(bank, _wrapped(batch, shared))  # type: ignore[arg-type, return-value]

    def lower(  # type: ignore[override]
        self, bank: Bank, batch: Batch, *, shared: bool = False
    ) -> jax.stages.Lowered:
        """Lower without running: for costs and memory."""
        return super().lower(bank, _wrapped(batch, shared))  # type: ignore[arg-type]


def _on_mesh(batch: dict[str, Batch], mesh: Mesh | None, uneven: Uneven) -> Batch:
    """A batch on the mesh; of one that is stacked the slots lead."""
    if mesh is None:
        return batch
    return place_batch(batch, mesh, uneven=uneven, axis=int("each" in batch))


def _wrapped(batch: Batch, shared: bool) -> dict[str, Batch]:
    return {"shared" if shared else "each": batch}


def _bank_update(
    loss: Callable[..., Totals],
    optimizer: Optimizer,
    settings: StepSettings,
    group: int | None,
    moving: Any,
    kept: tuple[Kept, Array],
    batch: dict[str, Batch],
) -> tuple[Any, Metrics]:
    (shared, own, hyper, sizes), key = kept

    def one(moving: Any, own: Any, hyper: Any, sizes: Any, key: Any, each: Any) -> Any:
        tx = _within(checked_optimizer(optimizer, Hyper(hyper)), sizes)
        frozen = combine(own, shared)
        given = batch.get("shared", each)
        return update(loss, tx, settings, moving, (frozen, key), given)

    each = batch.get("each")
    return _mapped(one, group, (moving, own, hyper, sizes, key, each))


def _mapped(one: Callable[..., Any], group: int | None, slots: tuple[Any, ...]) -> Any:
    """A function mapped over slots, all at once or group by group."""
    count = jax.tree.leaves(slots)[0].shape[0]
    if group is None or group >= count:
        return jax.vmap(one)(*slots)
    if group < 1 or count % group:
        raise OptionError(f"group={group} does not divide the bank's {count} slots.")
    cut = lambda x: x.reshape(count // group, group, *x.shape[1:])  # noqa: E731
    out = lax.map(lambda xs: jax.vmap(one)(*xs), jax.tree.map(cut, slots))
    return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), out)


def _within(
    tx: optax.GradientTransformationExtraArgs, sizes: Sequence[Mapping[int, Array]]
) -> optax.GradientTransformationExtraArgs:
    """An optimiser that leaves the padding of a smaller rank at zero."""

    def cut(x: Array, own: Mapping[int, Array]) -> Array:
        for axis, size in own.items():
            place = lax.broadcasted_iota(jnp.int32, x.shape, axis)
            x = jnp.where(place < size, x, jnp.zeros((), x.dtype))
        return x

    def within(updates: Tree, state: Any, params: Tree, **extra: Any) -> Any:
        updates, state = tx.update(updates, state, params, **extra)
        leaves, structure = jax.tree.flatten(updates)
        leaves = [cut(x, own) for x, own in zip(leaves, sizes, strict=True)]
        return jax.tree.unflatten(structure, leaves), state

    return optax.GradientTransformationExtraArgs(tx.init, within)


# -- evaluation ------------------------------------------------------------------------


class SweepEval:
    """A compiled evaluation of all slots, without dropout; see `__call__`."""

    def __init__(
        self,
        loss_fn: LossFn,
        *,
        group: int | None = None,
        compute_dtype: Any = None,
        cast_batch: bool = True,
        mesh: Mesh | None = None,
        on_missing: OnMissing = "error",
    ) -> None:
        """Make the step.

        Args:
          loss_fn: as of `sweep_step`; its key is None.
          group: as there, as is the rest.
          compute_dtype: of the base.
          cast_batch: whether that goes for the batch too.
          mesh: as there; what it does not divide is computed on every device.
          on_missing: as in `jlora.lora`.
        """
        loss = totals_fn(loss_fn, on_missing)
        no_key: Any = None

        def totals(tree: Any, batch: dict[str, Batch]) -> Totals:
            trainable, own, shared = tree
            shared = cast_base(shared, compute_dtype)
            if cast_batch:
                batch = cast(batch, compute_dtype)

            def one(trainable: Any, own: Any, each: Any) -> Totals:
                params = cast_full(
                    combine(trainable, combine(own, shared)), compute_dtype
                )
                return loss(params, batch.get("shared", each), no_key)

            with on_mesh(mesh):
                return _mapped(one, group, (trainable, own, batch.get("each")))

        self._mesh, self._step = mesh, EvalStep(totals)

    def __call__(self, bank: Bank, batch: Batch, *, shared: bool = False) -> Totals:
        """Each metric as `(total, count)`, `[K]` both."""
        tree = (bank.trainable, bank.frozen.own, bank.frozen.shared)
        wrapped = _wrapped(batch, shared)
        return self._step.totals(tree, _on_mesh(wrapped, self._mesh, "replicate"))
