"""Meshes by name, and rules that say where parameters lie on them.

    make_mesh      a mesh from "data=2,fsdp=2,tensor=2"
    rules          where parameters lie: a layout by name, or rules of your own
    place          a tree, or its shapes, on a mesh by such rules
    place_batch    a batch on a mesh
    batch_shard    the part of each batch that a process reads
    initialize     let several processes meet, before anything else
    mesh_of        the mesh that a tree's arrays lie on
    device_bytes   what lies on each device, of a tree or of all that is alive
    collectives    what devices send each other in a compiled program
    Rules          what `rules` returns: `spec`, `on`, `shardings`

JAX and XLA do the rest: `jax.jit` follows its arguments and inserts the communication.

>>> mesh = make_mesh({"data": -1})
>>> params = {"layers_0": {"mlp": {"up_proj": {"kernel": jnp.ones((4, 8))}}}}
>>> params = place(params, mesh, "fsdp+tensor")
"""

from jlora.sharding._account import device_bytes as device_bytes
from jlora.sharding._batches import batch_shard as batch_shard
from jlora.sharding._batches import mesh_of as mesh_of
from jlora.sharding._batches import place_batch as place_batch
from jlora.sharding._collectives import Collective as Collective
from jlora.sharding._collectives import Collectives as Collectives
from jlora.sharding._collectives import collectives as collectives
from jlora.sharding._distributed import initialize as initialize
from jlora.sharding._mesh import make_mesh as make_mesh
from jlora.sharding._rules import Rules as Rules
from jlora.sharding._rules import rules as rules
from jlora.sharding._trees import place as place

__all__ = [name for name in dir() if not name.startswith("_")]


def __dir__() -> list[str]:
    return __all__
