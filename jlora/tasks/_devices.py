"""The devices of a run: one, or a mesh of them by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import jax
from jax.sharding import Mesh

from jlora import data, sharding, train
from jlora._errors import OptionError
from jlora.sharding._batches import data_ways
from jlora.sharding._logical import LAYOUTS
from jlora.sharding._mesh import describe
from jlora.sharding._rules import Uneven
from jlora.train import option
from jlora.train._report import human_bytes

Tree = Any
Batch = Mapping[str, Any]
Batches = TypeVar("Batches")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceOptions(train.RunSettings):
    """Which devices a run uses, and what of the model lies where."""

    # fmt: off
    mesh: str | None = option(
        None, "devices by axis, such as data=2,fsdp=2,tensor=2; one size may be -1 "
        "(one device; data=-1 of several processes)",
        extends=True, group="devices", metavar="AXES")
    layout: str = option(
        "fsdp+tensor", "which parameters are cut over the mesh (fsdp+tensor)",
        choices=[*LAYOUTS], extends=True)
    uneven: str = option(
        "error", "what to do with an axis that the mesh does not divide (error)",
        choices=("error", "replicate"), extends=True)
    # fmt: on

    def check(self) -> None:
        """Refuse a mesh that cannot be, or that does not divide a batch."""
        super().check()
        mesh = self.device_mesh
        if mesh is None:
            return
        ways, size = data_ways(mesh), getattr(self, "batch_size", 0)
        parts = ways * getattr(self, "accumulate", 1)
        rows = getattr(self, "eval_batch_size", ways)
        if jax.process_count() > 1 and rows % ways:
            raise OptionError(
                f"--eval-batch-size {rows} does not fall into {ways} equal parts, as "
                f"the mesh {describe(mesh)} of {jax.process_count()} processes cuts it."
                f"\nTake --eval-batch-size {ways * -(-rows // ways)}, say."
            )
        if size % parts:
            whole = parts * -(-size // parts)
            raise OptionError(
                f"--batch-size {size} does not fall into {parts} equal parts: the mesh "
                f"{describe(mesh)} cuts it into {ways}, and --accumulate into "
                f"{parts // ways}.\nTake --batch-size {whole}, say."
            )

    @property
    def device_mesh(self) -> Mesh | None:
        """The mesh; None is one device. Of several processes it has all of theirs."""
        if self.mesh is None and jax.process_count() == 1:
            return None
        return sharding.make_mesh(self.mesh or "data=-1")

    def part(self, batches: Batches) -> Batches:
        """Return this process's part of batches; of one process it is all of them."""
        mesh = self.device_mesh
        if mesh is None or jax.process_count() == 1:
            return batches
        if not isinstance(batches, data.Batches | data.Streaming):
            return batches  # the caller's own, and its own affair
        part = dataclasses.replace(batches, shard=sharding.batch_shard(mesh))
        return cast(Batches, part)

    @property
    def rules(self) -> sharding.Rules:
        """Where the parameters lie on the mesh."""
        return sharding.rules(self.layout, uneven=cast(Uneven, self.uneven))

    def device_facts(self, params: Tree) -> dict[str, str]:
        """Return what lies where, in lines for a report; none of one device.

        Args:
          params: those of the run.
        """
        mesh = self.device_mesh
        if mesh is None:
            return {}
        held = sharding.device_bytes(params)
        whole = sum(x.nbytes for x in jax.tree.leaves(params) if hasattr(x, "nbytes"))
        kind = mesh.devices.flat[0].device_kind
        return {
            "devices": f"{mesh.size} ({kind}), {describe(mesh)}, layout {self.layout}",
            "parameters a device": f"{human_bytes(max(held.values()))} of "
            f"{human_bytes(whole)}",
        }


def beside(params: Tree, batch: Batch) -> Batch:
    """Put a batch on the mesh that the parameters lie on, if they lie on one.

    Args:
      params: the parameters.
      batch: arrays `[B, ...]`; where the mesh does not divide them every device gets
        all of them. Of several processes each has the whole batch.
    """
    mesh = sharding.mesh_of(params)
    if mesh is None:
        return batch
    placed = sharding.place_batch(batch, mesh, uneven="replicate", whole=True)
    return cast(Batch, placed)
