"""A step compiled for a GPU that is not here: XLA's account of it.

XLA compiles for a device that is described to it. It cannot time kernels there, so
where it would choose by timing it takes its defaults: bytes hold, times there are none.

Source: https://docs.jax.dev/en/latest/aot.html, and `jax.experimental.topologies`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import _runners
from benchmarks._workers import TARGETS
from benchmarks._workload import workload


class Compiled:
    """A contender's step, compiled for `target` and not run."""

    def __init__(self, case: Mapping[str, Any], contender: str, target: str) -> None:
        lies = _sharding(target)
        step, state, frozen = _runners.CONTENDERS[contender](work := workload(case))
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies),
            (state, frozen, work.batch),
        )
        compiled = jax.jit(step, donate_argnums=0).lower(*shapes).compile()
        self.facts = {"xla_bytes": _runners.memory(compiled), "compiled_for": target}

    def step(self) -> None:
        """Do nothing: the device is not here."""


def _sharding(target: str) -> NamedSharding:
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology="1x1x1", target_config=TARGETS[target].read_text()
        )
    except NotImplementedError as error:
        raise ModuleNotFoundError(
            "JAX's CUDA plugin is not here: pip install 'jax[cuda12]', or name an "
            "interpreter that has it, --python jax=PATH"
        ) from error
    mesh = topologies.make_mesh(topology, (1,), ("device",))
    return NamedSharding(mesh, PartitionSpec())
