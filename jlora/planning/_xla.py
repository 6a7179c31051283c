"""XLA's own account of a planned step, compiled for devices that are here."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from jlora._errors import OptionError
from jlora.planning import _program
from jlora.planning._read import Read, Request, spec_of_batch
from jlora.planning._report import Memory
from jlora.sharding import make_mesh, place, rules
from jlora.train._codes import gathering, kept_parts


def compiled_memory(memory: Memory, request: Request, mesh: Any, read: Read) -> Memory:
    """An account of memory with what XLA says of the temporaries."""
    found = compiled_step(request, mesh, read.work).memory_analysis()
    device = jax.devices()[0]
    if found is None:
        raise OptionError(
            f"compiled=True: XLA says nothing of memory on {device.platform}."
        )
    more = found.output_size_in_bytes - found.alias_size_in_bytes
    peak = found.temp_size_in_bytes + max(0, more)
    source = f"Temporaries are XLA's own account, for {device.device_kind}"
    gradients = min(read.parts["adapters"], peak)
    return dataclasses.replace(
        memory, gradients=gradients, activations=peak - gradients, source=source
    )


def compiled_step(request: Request, mesh: Any, work: _program.Work) -> Any:
    """The step, compiled for devices that are here."""
    count = math.prod(mesh.shape.values())
    here = jax.devices()
    if count > len(here):
        raise OptionError(
            f"compiled=True: the mesh has {count} devices, and there are {len(here)}.\n"
            "Leave it out, or fake them on a CPU: XLA_FLAGS="
            f"--xla_force_host_platform_device_count={count}."
        )
    if request.mesh is None:
        return work.step().lower(work.state, work.batch).compile()
    real = mesh
    if not isinstance(mesh, jax.sharding.Mesh):
        real = make_mesh(dict(mesh.shape), devices=here[:count])
    own = rules(request.layout, uneven=request.uneven)
    state = place(work.state, real, own)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype,
            sharding=jax.sharding.NamedSharding(real, spec_of_batch(x, request, real)),
        ),
        work.batch,
    )  # fmt: skip
    # As a step that is given `mesh=`: models say there how their states are cut.
    kept = kept_parts(state.frozen, real)
    with jax.sharding.use_abstract_mesh(real.abstract_mesh), gathering(kept):
        return work.step().lower(state, batch).compile()
