"""From a step that was read to a plan's numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from jlora.planning import _program
from jlora.planning._account import Account, account
from jlora.planning._costs import Costs
from jlora.planning._machines import Accelerator
from jlora.planning._read import Read, Request, mesh_of, read_step
from jlora.planning._report import Memory, Operations, Plan, Times, Traffic
from jlora.planning._values import value
from jlora.sharding._batches import data_ways

ESTIMATE = "Temporaries are an estimate, of XLA's as a rule within a tenth of the whole"


def plan_of(request: Request, machine: Accelerator, mesh: Any, read: Read) -> Plan:
    work, step = read.work, read.step
    traffic = traffic_of(step.costs, machine, mesh)
    trainable = sum(x.size for x in jax.tree.leaves(work.state.trainable))
    gradients = min(read.parts["adapters"], step.peak)
    memory = Memory(
        **read.parts,
        gradients=gradients,
        activations=step.peak - gradients,
        loss_head=_loss_head(work, mesh),
        source=ESTIMATE,
    )
    times = times_of(step.costs, machine, traffic)
    largest = sorted(step.memory.at_peak, key=lambda item: -item[1].bytes)[:5]
    return Plan(
        model=work.name,
        trained=request.what_is_trained,
        parameters=work.parameters,
        trainable=trainable,
        batch=work.batch_words,
        tokens=work.tokens,
        mesh=dict(mesh.shape) if request.mesh is not None else {},
        layout=request.layout if isinstance(request.layout, str) else "of your own",
        accelerator=machine,
        memory=memory,
        operations=_operations(request, mesh, read),
        times=times,
        traffic=traffic,
        largest=tuple((what, v.shape, v.bytes) for what, v in largest),
        notes=_notes(step.costs, times),
    )


def times_of(costs: Costs, machine: Accelerator, traffic: Sequence[Traffic]) -> Times:
    return Times(
        compute=sum(n / machine.rate(dtype) for dtype, n in costs.flops.items()),
        memory=costs.moved / machine.bandwidth,
        link=sum(t.seconds for t in traffic if t.link == "link"),
        network=sum(t.seconds for t in traffic if t.link == "network"),
    )


def traffic_of(costs: Costs, machine: Accelerator, mesh: Any) -> tuple[Traffic, ...]:
    found = []
    for (axes, kind), sent in sorted(costs.sent.items(), key=lambda item: -item[1]):
        link, speed = machine.speed(axes, dict(mesh.shape))
        key = axes, kind
        found.append(
            Traffic(axes, kind, costs.collectives[key], costs.held[key], sent, link,
                    sent / speed)
        )  # fmt: skip
    return tuple(found)


def _operations(request: Request, mesh: Any, read: Read) -> Operations:
    """Of all devices together; what one device alone would compute is useful."""
    total = sum(read.step.costs.flops.values()) * math.prod(mesh.shape.values())
    alone = dataclasses.replace(request, mesh=None, uneven="replicate", remat=False)
    once = read_step(alone, mesh_of(None)).step if request.remat else read.alone()
    plain = sum(once.costs.flops.values())
    forward = sum(_forward(read.work).costs.flops.values())
    return Operations(forward, max(0.0, plain - forward), max(0.0, total - plain))


def _forward(work: _program.Work) -> Account:
    """The loss alone, on one device."""
    jaxpr, arrays = work.forward()
    whole = [value(x.shape, x.dtype, (), {}) for x in arrays]
    return account(jaxpr, whole, {})


def _loss_head(work: _program.Work, mesh: Any) -> int | None:
    """What the loss needs from the head's input on, of a device's examples."""
    found = work.loss_head(data_ways(mesh))
    if found is None:
        return None
    jaxpr, arrays = found
    whole = [value(x.shape, x.dtype, (), {}) for x in arrays]
    return account(jaxpr, whole, {}).peak


def _notes(costs: Costs, times: Times) -> tuple[str, ...]:
    notes = []
    if costs.unknown:
        names = ", ".join(sorted(costs.unknown))
        notes.append(f"how these are shared out is not known: {names}.")
    if times.memory > 2 * times.compute:
        notes.append(
            "by this count the device waits for its memory more than for its products: "
            "more tokens a step would be better use of it."
        )
    return tuple(notes)
