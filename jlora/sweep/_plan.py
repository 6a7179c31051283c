"""Adapters of unlike rank in arrays of one shape: padded with zeros, and cut again.

A bank holds each array of an adapter and of its optimiser once for all slots,
`[K, ...]`, at the largest size that any job needs. What a smaller rank leaves is zero,
and stays so: a factor of zeros gives its partner a gradient of zeros, and whatever an
optimiser makes of those is cut from its updates.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import NamedSharding

from jlora._errors import OptionError
from jlora._kernel.adapter import Adapter
from jlora._kernel.nodes import LowRank, is_array, is_node
from jlora._paths import leaf_paths
from jlora._text import first_line
from jlora._tree.partition import split
from jlora.sweep._bank import Bank, Kept, put, stack, take
from jlora.sweep._jobs import ADAPTER_FIELDS, Hyper, Job, check_jobs, hyper_of
from jlora.train._state import TrainState

Tree = Any
Optimizer = Callable[[Any], optax.GradientTransformation]
Adapt = Callable[[Tree, Job], Tree]


def adamw(hp: Any) -> optax.GradientTransformation:
    """The optimiser of a sweep that is given none."""
    return optax.adamw(hp.learning_rate, weight_decay=hp.weight_decay)


class Plan:
    """How jobs share a bank: the common sizes, and the way in and out of a slot.

    >>> params = {"query": {"kernel": jnp.ones((5, 3))}}
    >>> jobs = jlora.sweep.grid(rank=[1, 2], learning_rate=[1e-3])
    >>> plan = Plan(params, jobs, targets=["query"])
    >>> bank = plan.bank(jobs)
    >>> bank.trainable["query"]["kernel"].adapters[""].a.shape
    (2, 5, 2)
    >>> plan.state(bank, 0, jobs[0]).params["query"]["kernel"]
    LowRank('query/kernel', float32[5, 3], rank 1, scale 1)
    """

    def __init__(
        self,
        params: Tree,
        jobs: Sequence[Job],
        optimizer: Optimizer = adamw,
        *,
        adapt: Adapt | None = None,
        **shared: Any,
    ) -> None:
        """Find the common sizes.

        Args:
          params: the base, plain parameters. One copy serves all jobs.
          jobs: all that will ever be in the bank.
          optimizer: makes a job's optimiser of its numbers,
            `lambda hp: optax.adamw(hp.learning_rate, b2=hp.b2)`. They are traced: no
            Python decision may depend on them.
          adapt: makes a job's tree, `(params, job) -> tree`; None is `Job.lorafy` with
            what follows.
          **shared: arguments of `jlora.lorafy` that all jobs share, `targets` say.

        Raises:
          OptionError: jobs that adapt different kernels; an optimiser that is none.
          LoraError: what `jlora.lorafy` refuses, with the job's name.
        """
        self.jobs = check_jobs(jobs)
        if adapt is not None and shared:
            raise OptionError(f"adapt= and {sorted(shared)}: pass one of the two.")
        # On the device once: else each job's state would take a copy of its own.
        self.params = jax.tree.map(_on_device, params)
        self._base = {id(x) for x in jax.tree.leaves(self.params)}
        self.optimizer = optimizer
        self._adapt = adapt or (lambda params, job: job.lorafy(params, **shared))
        self._by_fields = adapt is None
        self._own: dict[Any, TrainState] = {}
        self._frozen: dict[str, Tree] = {}  # the frozen half of each job's tree
        shapes = [self.shapes(job) for job in self.jobs]
        self._check_alike(shapes)
        self._drops = any(t.dropout for s in self._own.values() for t in _adapters(s))
        self._sizes = [
            np.max([x.shape for x in xs], axis=0)
            for xs in zip(*map(_moving, shapes), strict=True)
        ]
        first = self._normal(shapes[0].params)
        self._trainable: Any = jax.tree.structure(split(first)[0])
        normal = TrainState.create(first, self.tx(self.jobs[0]))
        self._opt_state: Any = jax.tree.structure(normal.opt_state)
        self._padded = [
            tuple(a for a, n in enumerate(most) if any(s.shape[a] != n for s in xs))
            for most, xs in zip(self._sizes, zip(*map(_moving, shapes), strict=True),
                                strict=True)
        ]  # fmt: skip

    # -- one job -----------------------------------------------------------------------

    def tx(self, job: Job) -> optax.GradientTransformation:
        """The optimiser of a job, for a run of its own."""
        return checked_optimizer(self.optimizer, Hyper(hyper_of(job)))

    def start(self, job: Job) -> TrainState:
        """A job's state before its first step, at its own rank.

        It is what `jlora.train` starts a run of its own with:
        `TrainState.create(job.lorafy(params, ...), tx, job.key)`.

        Raises:
          OptionError: an initialisation that changes the base.
        """
        tree = self._adapt(self.params, job)
        for node in jax.tree.leaves(tree, is_leaf=is_node):
            base = getattr(node, "base", None)
            if base is not None and any(
                id(x) not in self._base for x in jax.tree.leaves(base)
            ):
                raise OptionError(
                    f"the job {job.name!r} changes the kernel {node.path!r}: its init "
                    f"is {job.init!r}. All jobs of a sweep share one base.\nChoose an "
                    "init that leaves the base as it is."
                )
        state = TrainState.create(tree, self.tx(job), job.key)
        self._frozen[job.name] = state.frozen
        return state

    def frozen(self, job: Job) -> Tree:
        """The frozen half of a job's tree: the base, and scales of its own."""
        if job.name not in self._frozen:
            self.start(job)
        return self._frozen[job.name]

    def shapes(self, job: Job) -> TrainState:
        """A job's state without values; made once for jobs that look alike."""
        alike = tuple(getattr(job, name) for name in ADAPTER_FIELDS)
        known: Any = (alike, tuple(sorted(job.hyper))) if self._by_fields else job.name
        if known not in self._own:
            abstract = jax.tree.map(_shape, self.params)
            tree = self._adapt(abstract, job)
            if not any(
                isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree)
            ):
                raise OptionError("params hold no arrays to adapt.")
            self._own[known] = TrainState.create(tree, self.tx(job), job.key)
        return self._own[known]

    def _check_alike(self, shapes: Sequence[TrainState]) -> None:
        first = shapes[0]
        for job, other in zip(self.jobs, shapes, strict=True):
            for what in ("trainable", "opt_state"):
                one, two = (set(leaf_paths(getattr(s, what))) for s in (first, other))
                if one != two:
                    raise OptionError(
                        f"the job {job.name!r} has other {what} leaves than "
                        f"{self.jobs[0].name!r}: {sorted(one ^ two)[:4]}.\nThe jobs "
                        "of a sweep adapt the same kernels in the same way; make one "
                        "sweep for each."
                    )

    # -- in and out --------------------------------------------------------------------

    def bank(
        self,
        jobs: Sequence[Job],
        states: Sequence[TrainState] | None = None,
        *,
        sharding: NamedSharding | None = None,
    ) -> Bank:
        """A bank with a job in each slot.

        Args:
          jobs: the jobs.
          states: where each of them stands; None starts all anew.
          sharding: of the slots, `NamedSharding(mesh, PartitionSpec("slots"))` say, so
            that each device trains its own. The plan's base has to be on all devices of
            that mesh, whose axes are of the automatic type.
        """
        states = states or [self.start(job) for job in jobs]
        slots = [self._slot(j, s) for j, s in zip(jobs, states, strict=True)]
        leaves = stack(slots)
        return self._as_bank(
            leaves if sharding is None else jax.device_put(leaves, sharding)
        )

    def put(self, bank: Bank, slot: int, job: Job, state: TrainState) -> Bank:
        """The bank with a job's state in a slot; the others keep their bits.

        The bank that is given cannot be used again. Nothing is compiled for another
        job, of whatever rank.
        """
        return self._as_bank(put(self._leaves(bank), slot, self._slot(job, state)))

    def state(self, bank: Bank, slot: int, job: Job) -> TrainState:
        """A slot's state, cut to the job's own rank: that of a run of its own."""
        own = self.shapes(job)
        leaves = take([bank.step, *_moving(bank)], slot)
        step, *moving = (np.asarray(x) if not _is_key(x) else x for x in leaves)
        wanted = _moving(own)
        cut = [_cut(x, w.shape) for x, w in zip(moving, wanted, strict=True)]
        count = len(jax.tree.leaves(own.trainable))
        trainable, opt_state = (
            jax.tree.unflatten(jax.tree.structure(part), list(map(jnp.asarray, xs)))
            for part, xs in ((own.trainable, cut[:count]), (own.opt_state, cut[count:]))
        )
        return TrainState(
            jnp.asarray(step), trainable, self.frozen(job), opt_state, job.key
        )

    def _slot(self, job: Job, state: TrainState) -> list[Any]:
        """The arrays of one slot, at the common sizes; the order of `_leaves`."""
        moving = _moving(state)
        padded = [_pad(x, n) for x, n in zip(moving, self._sizes, strict=True)]
        own, _ = self._own_and_shared(split(self._normal(state.params))[1])
        hyper = [np.float32(x) for _, x in sorted(hyper_of(job).items())]
        count = len(jax.tree.leaves(state.trainable))
        sizes = [
            np.int32(x.shape[axis])
            for x, axes in zip(moving[:count], self._padded, strict=False)
            for axis in axes
        ]
        return [
            np.asarray(state.step), *padded, *jax.tree.leaves(own), *hyper, *sizes,
            state.key,
        ]  # fmt: skip

    def _leaves(self, bank: Bank) -> list[Any]:
        kept = bank.frozen
        return [
            bank.step, *_moving(bank), *jax.tree.leaves(kept.own),
            *jax.tree.leaves(kept.hyper), *jax.tree.leaves(kept.sizes), bank.key,
        ]  # fmt: skip

    def _as_bank(self, leaves: Sequence[Array]) -> Bank:
        feed = iter(leaves)
        take_ = lambda n: [next(feed) for _ in range(n)]  # noqa: E731
        step = next(feed)
        trainable = jax.tree.unflatten(
            self._trainable, take_(self._trainable.num_leaves)
        )
        opt_state = jax.tree.unflatten(
            self._opt_state, take_(self._opt_state.num_leaves)
        )
        structure, shared = self._frozen_halves
        own = jax.tree.unflatten(structure, take_(structure.num_leaves))
        hyper = {name: next(feed) for name in sorted(hyper_of(self.jobs[0]))}
        axes = self._padded[: self._trainable.num_leaves]
        sizes = [{axis: next(feed) for axis in found} for found in axes]
        return Bank(
            step, trainable, opt_state, Kept(shared, own, hyper, sizes), next(feed)
        )

    @functools.cached_property
    def _frozen_halves(self) -> tuple[Any, Tree]:
        """The structure of what each slot has of the frozen half, and the base."""
        tree = self._normal(self.start(self.jobs[0]).params)
        own, shared = self._own_and_shared(split(tree)[1])
        return jax.tree.structure(own), shared

    def _normal(self, tree: Tree) -> Tree:
        """The tree with nothing of a job in its structure, dropout rates as data."""

        def one(t: Adapter) -> Adapter:
            if not self._drops:
                return dataclasses.replace(t, dropout=0.0, rslora=False)
            dtype = jax.dtypes.canonicalize_dtype(float)
            keep = np.full(t.scale.shape, 1.0 - t.dropout, dtype)
            return dataclasses.replace(t, dropout=0.5, rslora=False, keep=keep)

        return jax.tree.map(
            lambda x: x.map(x.base, one) if isinstance(x, LowRank) else x,
            tree,
            is_leaf=is_node,
        )

    def _own_and_shared(self, frozen: Tree) -> tuple[Tree, Tree]:
        """What each slot has of the frozen half, and what is the base's."""
        own = jax.tree.map(lambda x: None if id(x) in self._base else x, frozen)
        shared = jax.tree.map(lambda x: x if id(x) in self._base else None, frozen)
        return own, shared


def checked_optimizer(
    make: Optimizer, hp: Any
) -> optax.GradientTransformationExtraArgs:
    """An optimiser of a job's numbers.

    Raises:
      OptionError: what makes it is no function, makes something else, or decides by a
        number that is traced.
    """
    try:
        tx = make(hp)
    except jax.errors.ConcretizationTypeError as error:
        raise OptionError(
            "the optimiser decides by the value of a number that differs from slot to "
            "slot, which is known on the device alone: "
            f"{first_line(error)}\nWrite a schedule as a function of the "
            "count, lambda count: hp.learning_rate * jnp.exp(-count / 100)."
        ) from error
    if not all(callable(getattr(tx, name, None)) for name in ("init", "update")):
        raise OptionError(
            f"the optimiser function returns {type(tx).__name__}: expected an optax "
            "optimiser, lambda hp: optax.adamw(hp.learning_rate)."
        )
    return optax.with_extra_args_support(tx)


def _moving(state: Any) -> list[Any]:
    return [*jax.tree.leaves(state.trainable), *jax.tree.leaves(state.opt_state)]


def _adapters(state: TrainState) -> list[Adapter]:
    nodes = jax.tree.leaves(state.params, is_leaf=is_node)
    return [t for x in nodes if isinstance(x, LowRank) for t in x.adapters.values()]


def _shape(x: Any) -> Any:
    if not is_array(x):
        return x
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _on_device(x: Any) -> Any:
    return jnp.asarray(x) if isinstance(x, np.ndarray) else x


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.extended)


def _pad(x: Any, shape: Sequence[int]) -> Any:
    """X on the host with zeros behind it along each axis, up to a shape."""
    if tuple(x.shape) == tuple(shape):
        return x if _is_key(x) else np.asarray(x)
    out = np.zeros(tuple(shape), x.dtype)
    out[tuple(map(slice, x.shape))] = np.asarray(x)
    return out


def _cut(x: Any, shape: Sequence[int]) -> Any:
    return x if tuple(x.shape) == tuple(shape) else x[tuple(map(slice, shape))]
