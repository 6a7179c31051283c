"""What would make a plan smaller: the same run with one change, each read anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from jlora._errors import LoraError
from jlora.planning._machines import accelerator
from jlora.planning._numbers import times_of, traffic_of
from jlora.planning._read import Request, mesh_of, read_step
from jlora.planning._report import Remedy
from jlora.sharding._batches import data_ways


def remedies_of(request: Request) -> tuple[Remedy, ...]:
    """Return what helps, best first; what cannot be is left out."""
    mesh = mesh_of(request.mesh)
    tried = [_tried(request, *change) for change in _changes(request, mesh)]
    found = sorted(filter(None, tried), key=lambda r: (not r.fits, r.total))
    return tuple(found)


def _changes(request: Request, mesh: Any) -> list[tuple[str, dict[str, Any]]]:
    """What may make it smaller: words, and other arguments."""
    found: list[tuple[str, dict[str, Any]]] = []
    if request.full:
        found.append(("adapters of rank 8 instead", {"full": False}))
    elif request.quantize is None:
        found.append(("the base in nf4", {"quantize": "nf4"}))
        found.append(("the base in int8", {"quantize": "int8"}))
    if request.precision == "float32":
        found.append(("bfloat16", {"precision": "bfloat16"}))
    if request.loss_fn is None and not request.remat:
        found.append(("recomputed blocks", {"remat": True}))
    smaller = _smaller_batch(request, mesh)
    if smaller is not None:
        found.append((f"accumulate={smaller}", {"accumulate": smaller}))
    if request.loss_fn is None and request.quantize is None and not request.full:
        both = {"quantize": "nf4", "remat": True}
        found.append(("nf4 and recomputed blocks", both))
    if isinstance(request.layout, str) and "fsdp" in request.layout:
        sizes = dict(mesh.shape) if request.mesh is not None else {}
        wider = {**sizes, "fsdp": 2 * sizes.get("fsdp", 1)}
        words = ",".join(f"{name}={n}" for name, n in wider.items())
        found.append((f"a mesh of {words}", {"mesh": wider}))
    return found


def _smaller_batch(request: Request, mesh: Any) -> int | None:
    """Twice the parts of a batch, if each still gives every device an example."""
    sizes = [x.shape[0] for x in jax.tree.leaves(request.batch) if hasattr(x, "shape")]
    examples = sizes[0] if sizes else request.batch[0]
    parts = 2 * request.accumulate
    return parts if examples % (parts * data_ways(mesh)) == 0 else None


def _tried(request: Request, words: str, change: Mapping[str, Any]) -> Remedy | None:
    """The plan with a change; None where the change cannot be."""
    other = dataclasses.replace(request, **change)
    mesh = mesh_of(other.mesh)
    try:
        read = read_step(other, mesh)
    except LoraError:  # an axis that the wider mesh does not divide, say
        return None
    machine = accelerator(request.devices)
    total = sum(read.parts.values()) + read.step.peak
    traffic = traffic_of(read.step.costs, machine, mesh)
    overlapped = times_of(read.step.costs, machine, traffic).overlapped
    fits = total <= machine.memory * machine.usable
    return Remedy(words, dict(change), total, overlapped, fits)
