"""LoRA for JAX as a transformation of functions and parameter trees.

>>> params = jlora.lorafy(params, rank=8, targets=["query", "value"])
>>> trainable, frozen = jlora.split(params)
>>> loss = lambda t, x: jnp.mean(jlora.lora(apply)(jlora.combine(t, frozen), x) ** 2)
>>> grads = jax.grad(loss)(trainable, x)
"""

from jlora._adapter import Adapter as Adapter
from jlora._errors import CheckpointError as CheckpointError
from jlora._errors import DataError as DataError
from jlora._errors import DtypeError as DtypeError
from jlora._errors import JloraWarning as JloraWarning
from jlora._errors import LoraError as LoraError
from jlora._errors import NonFiniteError as NonFiniteError
from jlora._errors import ShapeError as ShapeError
from jlora._errors import StructureError as StructureError
from jlora._errors import TargetError as TargetError
from jlora._errors import UnmergedError as UnmergedError
from jlora._errors import UnsupportedOpError as UnsupportedOpError
from jlora._lorafy import lorafy as lorafy
from jlora._lowrank import Full as Full
from jlora._lowrank import LowRank as LowRank
from jlora._lowrank import Rows as Rows
from jlora._lowrank import is_node as is_node
from jlora._merge import merge as merge
from jlora._merge import unmerge as unmerge
from jlora._partition import combine as combine
from jlora._partition import labels as labels
from jlora._partition import split as split
from jlora._partition import trainable_mask as trainable_mask
from jlora._partition import with_dropout as with_dropout
from jlora._stack import stack_layers as stack_layers
from jlora._stack import unstack_layers as unstack_layers
from jlora._summary import Summary as Summary
from jlora._summary import summary as summary
from jlora._survey import Survey as Survey
from jlora._survey import survey as survey
from jlora._targets import Target as Target
from jlora._transform import lora as lora

__version__ = "0.1.0"
