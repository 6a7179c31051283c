"""Plans made."""

from __future__ import annotations

import dataclasses

from jlora.planning._machines import accelerator
from jlora.planning._numbers import plan_of
from jlora.planning._read import Request, mesh_of, read_step
from jlora.planning._remedies import remedies_of
from jlora.planning._report import Plan
from jlora.planning._xla import compiled_memory


def make(
    request: Request, *, compiled: bool = False, remedies: bool | None = None
) -> Plan:
    """Make the plan; see `jlora.plan`."""
    machine = accelerator(request.devices)
    mesh = mesh_of(request.mesh)
    read = read_step(request, mesh)
    plan = plan_of(request, machine, mesh, read)
    if compiled:
        memory = compiled_memory(plan.memory, request, mesh, read)
        plan = dataclasses.replace(plan, memory=memory)
    if remedies or (remedies is None and not plan.fits):
        plan = dataclasses.replace(plan, remedies=remedies_of(request))
    return plan
