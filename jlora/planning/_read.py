"""The step that is asked for: traced on shapes, and its program read on a mesh."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from jlora._errors import OptionError, ShapeError
from jlora.planning import _program
from jlora.planning._account import Account, account
from jlora.planning._values import spec_of, value
from jlora.sharding import _mesh, place, rules
from jlora.sharding._batches import batch_spec
from jlora.train._codes import gathering, kept_parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request(_program.Settings):
    """What is asked for: the arguments of `jlora.plan`."""

    model: Any
    batch: Any
    tx: Any
    mesh: Any
    layout: Any
    uneven: Any
    devices: Any
    loss_fn: Callable[..., Any] | None

    def work(self) -> _program.Work:
        """The step that is asked for."""
        tx = optax.adamw(1e-3) if self.tx is None else self.tx
        return _program.work_of(self.model, self, self.batch, tx, self.loss_fn)


@dataclasses.dataclass(frozen=True)
class Read:
    """A step, read on a mesh.

    Attributes:
      work: the step.
      parts: bytes of a device, by part of what the step is given.
      step: what it costs.
      jaxpr: its program.
    """

    work: _program.Work
    parts: Mapping[str, int]
    step: Account
    jaxpr: Any

    def alone(self) -> Account:
        """The same program on one device."""
        arrays = [x for part in _arrays(self.work.state, self.work.batch) for x in part]
        return account(
            self.jaxpr, [value(x.shape, x.dtype, (), {}) for x in arrays], {}
        )


def mesh_of(given: Any) -> Any:
    """Return a mesh, abstract where only its sizes are given; None is one device."""
    if given is None:
        return jax.sharding.AbstractMesh((1,), ("data",))
    if isinstance(given, jax.sharding.Mesh | jax.sharding.AbstractMesh):
        return given
    return abstract_mesh(given)


def abstract_mesh(sizes: Any) -> Any:
    """Return a mesh of those axes, of devices that need not be there."""
    axes = _mesh.parsed(sizes)
    for name, number in axes.items():
        _mesh.check_name(name, [*_mesh.AXES])
        if number < 1:
            raise OptionError(
                f"mesh {sizes!r}: a plan has no devices to count, so {name} needs a "
                "size of its own, 1 or more."
            )
    return jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes))


def read_step(request: Request, mesh: Any) -> Read:
    """Trace the step and read its program."""
    work = request.work()
    sizes = dict(mesh.shape)
    specs = _specs(work, request, mesh)
    arrays = _arrays(work.state, work.batch)
    inputs = [
        [value(x.shape, x.dtype, spec, sizes) for x, spec in zip(xs, own, strict=True)]
        for xs, own in zip(arrays, specs, strict=True)
    ]
    for v in inputs[-1]:
        v.is_data = True
    step, trainable, opt_state, frozen, key, batch = inputs
    donated = [*step, *trainable, *opt_state]
    flat = [*donated, *frozen, *key, *batch]
    with _as_on(request, mesh), gathering(_kept(work, request, mesh)):
        jaxpr = work.step().trace(work.state, work.batch).jaxpr
    found = account(jaxpr, flat, sizes, donated=len(donated))
    parts = {"base": frozen, "adapters": trainable, "optimiser": opt_state,
             "batch": [*batch, *key, *step]}  # fmt: skip
    held = {name: sum(v.bytes for v in vs) for name, vs in parts.items()}
    return Read(work, held, found, jaxpr)


def _as_on(request: Request, mesh: Any) -> Any:
    """Trace as a step that is given the mesh: the head's chunks are of its tokens."""
    if request.mesh is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(getattr(mesh, "abstract_mesh", mesh))


def _kept(work: _program.Work, request: Request, mesh: Any) -> Any:
    """How a step on the mesh gathers codes."""
    if request.mesh is None:
        return None
    own = rules(request.layout, uneven=request.uneven)
    return kept_parts(place(work.state.frozen, mesh, own), mesh)


def _arrays(state: Any, batch: Any) -> list[list[Any]]:
    parts = (state.step, state.trainable, state.opt_state, state.frozen, state.key)
    return [
        [x for x in jax.tree.leaves(part) if hasattr(x, "shape")]
        for part in (*parts, batch)
    ]


def _specs(work: _program.Work, request: Request, mesh: Any) -> list[list[Any]]:
    """How each array of `_arrays` is cut."""
    if request.mesh is None:
        return [[()] * len(xs) for xs in _arrays(work.state, work.batch)]
    own = rules(request.layout, uneven=request.uneven)
    where = own.shardings(work.state, mesh)
    parts = (where.step, where.trainable, where.opt_state, where.frozen, where.key)
    named = [[s.spec for s in jax.tree.leaves(part)] for part in parts]
    arrays = _arrays(work.state, work.batch)
    named.append([spec_of_batch(x, request, mesh) for x in arrays[-1]])
    return [
        [spec_of(spec, len(x.shape)) for x, spec in zip(xs, specs, strict=True)]
        for xs, specs in zip(arrays, named, strict=True)
    ]


def spec_of_batch(x: Any, request: Request, mesh: Any) -> Any:
    """As `jlora.sharding.place_batch` cuts it."""
    spec = batch_spec(len(x.shape), mesh)
    parts = []
    for size, axes in zip(x.shape, spec_of(spec, len(x.shape)), strict=True):
        ways = math.prod(mesh.shape[a] for a in axes)
        if size % ways and request.uneven == "error":
            raise ShapeError(
                f"batch {tuple(x.shape)}: the mesh {_mesh.describe(mesh)} cuts "
                f"{size} into {ways} unequal parts.\nTake a multiple of {ways}, or "
                "uneven='replicate'."
            )
        parts.append(axes or None if size % ways == 0 else None)
    return jax.sharding.PartitionSpec(*parts)
