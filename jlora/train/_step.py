"""The training step: gradients of the trainable leaves, clipped, applied, jitted."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding

from jlora import _compat
from jlora._errors import OptionError, StructureError
from jlora._transform.replay import OnMissing
from jlora._tree.options import one_of
from jlora.sharding._batches import place_batch
from jlora.train._ahead import abstract
from jlora.train._batch import Batch, as_batch
from jlora.train._codes import Kept, gathering, kept_parts
from jlora.train._form import Form, Lying
from jlora.train._gradients import (
    AxisName,
    GradientSettings,
    LossFn,
    Objective,
    at_least_f32,
    mean_gradients,
)
from jlora.train._layout import Layout, layout_of, traced
from jlora.train._prefetch import Placed
from jlora.train._state import TrainState, strongly_typed
from jlora.train._static import put_together, take_apart
from jlora.train._totals import Metrics, Totals, accumulation_dtype, means, totals_fn
from jlora.train._uses import IdCheck

Tree = Any
Parallel = Literal["jit", "pmap"]
PARALLEL = get_args(Parallel)


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


#: A function of what happens in a step that returns more metrics.
Hook = Callable[[StepInfo], Mapping[str, Array]]
#: The rest of a step once there are gradients: `(sums, moving) -> (moving, metrics)`.
Finish = Callable[[Tree, Any], tuple[Any, Metrics]]


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """The options of `make_train_step`, checked."""

    gradients: GradientSettings
    clip_norm: float | None
    skip_nonfinite: bool
    hooks: tuple[Hook, ...]

    def __post_init__(self) -> None:
        norm = self.clip_norm
        if norm is not None and not (_is_real(norm) and norm > 0):
            raise OptionError(
                f"clip_norm={norm!r}: expected a number above 0, or None."
            )
        for hook in self.hooks:
            if not callable(hook):
                raise OptionError(
                    f"hooks={hook!r}: expected functions of a StepInfo that return a "
                    "dict of metrics."
                )


def _is_real(x: Any) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    groups: int | None = None,
    clip_norm: float | None = None,
    compute_dtype: Any = None,
    cast_batch: bool = True,
    skip_nonfinite: bool = False,
    hooks: Hook | Sequence[Hook] = (),
    donate: bool = True,
    axis_name: AxisName | None = None,
    parallel: Parallel = "jit",
    mesh: Mesh | None = None,
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

    The optimiser is also told `value`, `grad` and `value_fn`: the mean loss, its
    gradients before clipping, and the loss as a function of the trainable leaves on the
    same batch. Line searches, L-BFGS and Polyak's step need them, and `optax`'s Sophia
    the last as `obj_fn`.

    Args:
      loss_fn: `(params, batch, key)`, written for plain parameters.
      tx: an optax optimiser, schedules and all.
      accumulate: number of microbatches, run one after another in the one compiled
        step. Every leaf of the batch has a leading axis that it divides; scalars are
        shared. Microbatch i holds the items i, i + accumulate, ..., which keeps a batch
        that is sharded along its leading axis where it is.
      groups: cut the batch into so many groups of neighbours, compute each by itself,
        and add their gradients always in one order, so that what is added does not
        depend on how many devices there are; dropout is each group's own. A multiple
        of the devices over which `mesh` cuts the batch; with two groups a device and
        more, runs on 2, 4, ... devices end alike to the bit on a CPU. In such a step
        parameters are whole, also those that are cut over `fsdp`.
      clip_norm: scale the gradients down to this global norm, as
        `optax.clip_by_global_norm` does, but with a norm that is summed in float32.
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
      mesh: put each batch on this mesh, by `jlora.sharding.place_batch`, and let models
        of `jlora.models` say there how their hidden states are cut. None leaves a batch
        where it is, and XLA puts one of NumPy where it likes.
      on_missing: as in `jlora.lora`.

    Returns:
      The step. Its metrics are device arrays, so reading none costs no wait: `loss`;
      `weight`, what it is a mean over (microbatches, if the loss function does not
      say); `grad_norm` before clipping, 0 if no adapter was touched; `nonfinite`, True
      if either is NaN or infinite; and those of the loss function and the hooks.

    Raises:
      OptionError: options out of range.
      DataError: when called, a batch that holds something else than arrays, or ids
        beyond a table's rows or a loss's classes. Arrays of NumPy are looked at in each
        step, those on a device in the first; not with `"pmap"`.
      ShapeError: when called, a batch that `accumulate` does not divide.
      StructureError: when called, a result of the loss function or of a hook that is
        none of the above.
    """
    _check_functions(loss_fn, tx)
    one_of("parallel", parallel, PARALLEL)
    check_mesh(mesh, parallel)
    if parallel == "pmap" and axis_name is None:
        axis_name = "batch"
    settings = StepSettings(
        GradientSettings(
            accumulate=accumulate,
            groups=groups,
            mesh=mesh,
            compute_dtype=compute_dtype,
            cast_batch=cast_batch,
            axis_name=axis_name,
        ),
        clip_norm,
        skip_nonfinite,
        (hooks,) if callable(hooks) else tuple(hooks),
    )
    tx = optax.with_extra_args_support(tx)
    loss = totals_fn(loss_fn, on_missing)
    pure = functools.partial(update, loss, tx, settings)
    finish = functools.partial(_finish, tx, dataclasses.replace(settings, hooks=()))
    return TrainStep(pure, donate, parallel, axis_name, mesh, groups, finish)


def check_mesh(mesh: Any, parallel: Parallel = "jit") -> None:
    """Refuse what is no mesh, and one where nothing is placed."""
    if mesh is None or (isinstance(mesh, Mesh) and parallel == "jit"):
        return
    if isinstance(mesh, Mesh):
        raise OptionError(
            "mesh goes with parallel='jit': a pmapped step takes batches with a "
            "leading axis of devices.\nLeave one of the two out."
        )
    raise OptionError(
        f"mesh={mesh!r}: expected a jax.sharding.Mesh, of "
        "jlora.sharding.make_mesh('data=2,fsdp=2') say."
    )


def _check_functions(loss_fn: Any, tx: Any) -> None:
    if not callable(loss_fn):
        raise OptionError(
            f"loss_fn is {type(loss_fn).__name__}: expected a function "
            "(params, batch, key) that returns the loss."
        )
    if not all(callable(getattr(tx, name, None)) for name in ("init", "update")):
        raise OptionError(
            f"tx is {type(tx).__name__}: expected an optax optimiser, such as "
            "optax.adamw(1e-4)."
        )


class TrainStep:
    """A compiled step; call it as `state, metrics = step(state, batch)`."""

    def __init__(
        self,
        pure: Callable[..., Any],
        donate: bool,
        parallel: Parallel,
        axis_name: Any,
        mesh: Mesh | None = None,
        groups: int | None = None,
        finish: Callable[..., Any] | None = None,
    ) -> None:
        self._pure, self._finish = pure, finish
        self._donate = (0,) if donate else ()
        self._parallel = parallel
        self._axis_name = axis_name
        self._mesh, self._traced_on = mesh, None if groups else mesh
        self._compiled: dict[Form, Any] = {}
        self._layouts: dict[Any, Layout] = {}
        self._traces = 0
        self._check_ids = IdCheck()

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Run one step."""
        ahead = isinstance(batch, Placed)
        host = batch.host if ahead else as_batch(batch)
        batch = batch.device if ahead else self._placed(host)
        lying = self._lying(state)
        run = self._program(lying.form, state.frozen)
        arguments = (lying.buffers, lying.frozen, state.key, batch)
        if self._parallel == "jit":
            trace = lambda: run.trace(*arguments).jaxpr  # noqa: E731
            self._check_ids(run, host, trace)
        buffers, metrics = run(*arguments)
        if self._donate:
            _give_up(state, lying.form)
        return self._next(state, lying._replace(buffers=buffers)), metrics

    def _next(self, state: Any, lying: Lying) -> Any:
        """The state after a step."""
        return type(state).as_it_lies(lying, state.frozen, state.key)

    def trace(self, state: TrainState, batch: Batch) -> jax.stages.Traced:
        """Trace without running, as `jax.jit(f).trace`: for the program itself."""
        lying, batch = self._lying(state), self._placed(as_batch(batch))
        run = self._program(lying.form, state.frozen)
        return run.trace(lying.buffers, lying.frozen, state.key, batch)

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        """Lower without running, as `jax.jit(f).lower`: for costs and memory."""
        lying, batch = self._lying(state), self._placed(as_batch(batch))
        run = self._program(lying.form, state.frozen)
        return run.lower(lying.buffers, lying.frozen, state.key, batch)

    def lower_ahead(self, state: TrainState) -> Callable[[Batch], jax.stages.Lowered]:
        """From a batch to the program that a call with this state compiles.

        The state's arrays are not kept, so that a step may be given them meanwhile.
        """
        lying = self._lying(state)
        run = self._program(lying.form, state.frozen)
        given = abstract((lying.buffers, lying.frozen, state.key))
        return lambda batch: run.lower(*given, self._placed(as_batch(batch)))

    def cache_size(self) -> int:
        """How many times the step was compiled: 1, or its arguments change shape."""
        if self._parallel == "pmap":
            return self._traces
        return sum(map(_compat.compilations, self._compiled.values()))

    def _lying(self, state: Any) -> Lying:
        """A state as it lies; one of trees is taken apart first."""
        known: Lying | None = state.__dict__.get("lying")
        if known is not None:
            return known
        moving = (state.step, state.trainable, state.opt_state)
        leaves, structure = jax.tree.flatten(moving)
        frozen, rest = take_apart(state.frozen)
        layout = self._layout(moving, leaves, structure)
        buffers = layout.pack(leaves)
        mapped = self._parallel == "pmap"
        shardings = () if mapped else tuple(map(named_sharding, buffers))
        return Lying(Form(structure, rest, layout, shardings), buffers, frozen)

    def _layout(self, moving: Any, leaves: list[Any], structure: Any) -> Layout:
        """How the leaves of a state shall lie."""
        if self._finish is None or self._parallel == "pmap":
            return Layout(len(leaves))
        places = tuple(getattr(x, "sharding", None) for x in leaves)
        looks = tuple((x.shape, x.dtype) for x in leaves)
        known = (structure, looks, places)
        if known not in self._layouts:
            program = functools.partial(self._update_alone, moving, leaves, structure)
            self._layouts[known] = layout_of(moving, program)
        return self._layouts[known]

    def _update_alone(self, moving: Any, leaves: list[Any], structure: Any) -> Any:
        """The program of an update, of a loss of which nothing is known."""
        assert self._finish is not None
        finish = functools.partial(
            self._finish,
            jax.random.key(0),
            {"loss": (jnp.ones(()), jnp.ones(()))},
            lambda half: sum(jnp.sum(at_least_f32(x)) for x in jax.tree.leaves(half)),
        )
        sums = jax.eval_shape(lambda half: jax.tree.map(at_least_f32, half), moving[1])
        grads, halves = jax.tree.flatten(sums)
        return traced(_of_leaves(finish, halves, structure), grads, leaves)[0]

    def _program(self, form: Form, half: Tree) -> Any:
        """The compiled function of a form, and of the frozen half of such a state."""
        if form not in self._compiled:
            if self._parallel == "pmap":
                wrap: Any = functools.partial(jax.pmap, axis_name=self._axis_name)
            else:
                # The new state is laid out as the old one; the compiler could choose
                # another layout, and the next call would be compiled anew.
                out = ([*form.shardings], None)
                wrap = functools.partial(jax.jit, out_shardings=out)
            kept = kept_parts(half, self._traced_on)
            flat = functools.partial(self._flat, form, kept)
            made = wrap(flat, donate_argnums=self._donate)
            self._compiled.setdefault(form, made)  # another thread's, if it was first
        return self._compiled[form]

    def place(self, batch: Batch) -> Batch:
        """Put a batch where the step takes it, while another step runs perhaps.

        It has been through `as_batch`. One for `"pmap"` is left as it is.
        """
        if self._parallel == "pmap":
            return batch
        return jax.device_put(batch) if self._mesh is None else self._placed(batch)

    def _placed(self, batch: Batch) -> Batch:
        return batch if self._mesh is None else place_batch(batch, self._mesh)

    def _flat(
        self,
        form: Form,
        kept: Kept | None,
        buffers: Any,
        frozen: Any,
        key: Any,
        batch: Any,
    ) -> Any:
        self._traces += 1
        leaves = form.layout.unpack(buffers)
        moving = jax.tree.unflatten(form.structure, leaves)
        of_run = (put_together(frozen, form.rest), key)
        with on_mesh(self._traced_on), gathering(kept):
            if not form.layout.stacks:
                moving, metrics = self._pure(moving, of_run, batch)
                return _leaves_of(moving, form.structure), metrics

            def finished(finish: Finish, sums: Tree, _: Any) -> Any:
                grads, halves = jax.tree.flatten(sums)
                f = _of_leaves(finish, halves, form.structure)
                return form.layout.apply(f, grads, buffers, leaves)

            return self._pure(moving, of_run, batch, finished)


def _of_leaves(finish: Finish, halves: Any, structure: Any) -> Any:
    """An update as a function of lists of leaves."""

    def f(grads: list[Any], leaves: list[Any]) -> tuple[list[Any], Metrics]:
        moving = jax.tree.unflatten(structure, leaves)
        moving, metrics = finish(jax.tree.unflatten(halves, grads), moving)
        return _leaves_of(moving, structure), metrics

    return f


def _leaves_of(moving: Any, structure: Any) -> list[Array]:
    leaves, own = jax.tree.flatten(moving)
    if own != structure:
        raise StructureError(
            "the optimiser returns a state of another structure than it was given."
            "\nMake the state with the optimiser that the step has: "
            f"TrainState.create(params, tx).\n  was {structure}\n  is  {own}"
        )
    return [strongly_typed(x) for x in leaves]


def _give_up(state: Any, form: Form) -> None:
    """Free the leaves of which the step has been given stacks, as if they had been."""
    if "lying" in state.__dict__ or not form.layout.stacks:
        return
    leaves = jax.tree.leaves((state.step, state.trainable, state.opt_state))
    for own in form.layout.stacks:
        for i in own:
            if isinstance(leaves[i], jax.Array):
                leaves[i].delete()


def on_mesh(mesh: Mesh | None) -> Any:
    """Tell what is traced of the mesh: models say there how their states are cut."""
    if mesh is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def named_sharding(x: Any) -> NamedSharding | None:
    """Where an array lies on a mesh; None if on none."""
    if isinstance(x, jax.core.Tracer):
        return None
    sharding = getattr(x, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def update(
    loss: Callable[..., Totals],
    tx: Any,
    settings: StepSettings,
    moving: Any,
    kept: Any,
    batch: Any,
    finished: Callable[[Finish, Tree, Any], Any] | None = None,
) -> tuple[Any, Metrics]:
    """One step of one run, uncompiled.

    Args:
      loss: from `totals_fn`.
      tx: the optimiser, of the kind that takes extra arguments.
      settings: the step's.
      moving: `(step, trainable, opt_state)`.
      kept: `(frozen, key)`, of the run.
      batch: the batch.
      finished: what to make of the rest of the step, a function of the summed gradients
        and what moves, and of these; None runs it.

    Returns:
      What moves, as it came, and the metrics; or what `finished` returns.
    """
    step, trainable, _ = moving
    frozen, run_key = kept
    key = jax.random.fold_in(run_key, step)
    objective = Objective(loss, settings.gradients, frozen, batch, key)
    sums, totals = objective.sums(trainable)
    finish: Finish = functools.partial(
        _finish, tx, settings, key, totals, objective.value_fn()
    )
    if finished is not None:
        return finished(finish, sums, moving)
    return finish(sums, moving)


def _finish(
    tx: Any,
    settings: StepSettings,
    key: Array,
    totals: Totals,
    value_fn: Callable[[Tree], Array],
    sums: Tree,
    moving: Any,
) -> tuple[Any, Metrics]:
    """What a step does with its gradients."""
    step, trainable, opt_state = moving
    raw = mean_gradients(sums, totals, trainable)
    metrics = means(totals)
    norm = _global_norm(raw)
    metrics["weight"] = totals["loss"][1]
    metrics["grad_norm"] = norm
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    metrics["nonfinite"] = ~finite
    grads = _clip(raw, norm, settings.clip_norm)
    updates, new_opt = tx.update(
        grads,
        opt_state,
        trainable,
        value=metrics["loss"],
        grad=raw,
        **_loss_functions(value_fn),
    )
    for hook in settings.hooks:
        info = StepInfo(step, trainable, grads, updates, key)
        metrics = _joined(metrics, hook(info))
    new = optax.apply_updates(trainable, updates)
    if settings.skip_nonfinite:
        keep = functools.partial(jnp.where, finite)
        new, new_opt = jax.tree.map(keep, (new, new_opt), (trainable, opt_state))
    return (step + 1, new, new_opt), metrics


def _loss_functions(value: Callable[[Tree], Array]) -> dict[str, Callable[..., Array]]:
    """The loss under both names that optax has for it."""

    def value_fn(trainable: Tree, obj_fn: Any = None) -> Array:
        # optax hands its line searches every argument that value_fn has, and refuses
        # any other; so this one has a place for Sophia's.
        del obj_fn
        return value(trainable)

    return {"value_fn": value_fn, "obj_fn": value}


def _global_norm(tree: Tree) -> Array:
    """As `optax.tree.norm`, summed in float32 at least whatever the leaves are."""
    squares = [jnp.sum(at_least_f32(x) ** 2) for x in jax.tree.leaves(tree)]
    dtype = max((x.dtype for x in squares), key=lambda d: d.itemsize)
    return jnp.sqrt(sum(x.astype(dtype) for x in squares))


def _clip(grads: Tree, norm: Array, clip_norm: float | None) -> Tree:
    """As `optax.clip_by_global_norm`, with the norm that is reported anyway."""
    if clip_norm is None:
        return grads

    def clip(g: Array) -> Array:
        scaled = at_least_f32(g) / norm.astype(accumulation_dtype(g.dtype))
        return jnp.where(norm < clip_norm, g, (scaled * clip_norm).astype(g.dtype))

    return jax.tree.map(clip, grads)


def _joined(metrics: Metrics, more: Mapping[str, Array]) -> Metrics:
    taken = sorted(set(metrics) & set(more))
    if taken:
        raise StructureError(
            f"a hook returns the metrics {taken}, which the step has already.\nGive "
            "them other names."
        )
    return {**metrics, **more}
