"""LoRA for JAX as a transformation of functions and parameter trees.

    lorafy                    adapters on the chosen kernels of a parameter tree
    lora                      a function that uses such trees, from any JAX function
    split  combine            the trainable half for the optimiser, and the rest
    labels  trainable_mask    the same as labels and as a mask, for optax
    merge  unmerge            adapters folded into their kernels, and undone bit for bit
    with_dropout              dropout on for a step
    without_adapters          the model that training started from, inside a loss too
    quantize  dequantize      frozen kernels in 8 or 4 bits, and back
    quantizer                 the same while `models.load` reads, leaf by leaf
    survey                    how a function uses each parameter: exact targets and axes
    summary                   what is trained, as a table
    plan                      what a run will take, before anything is allocated
    stack_layers  unstack_layers    numbered layers as one stack, and back
    replicate_layers          a deeper model of repeated layers
    add  activate  disable    several named adapters on one base, an `AdapterSet`
    rename  remove  update    its names, and other numbers for an adapter
    weighted                  one adapter of several: sums, TIES, DARE, compression
    bank  pick  with_ids      adapters stacked on a base, and who acts on which example
    mixed  mixed_steps        functions of such batches, and of generation
    activated  activated_ids    adapters from some tokens on, and who acts on each token
    Target                    settings of some kernels: rank, alpha, axes
    Accelerator               a kind of device in numbers, for plans
    VeRA  LoHa  LoKr  AdaLoRA other forms of the update, with their settings
    LowRank  Full  Rows  Quantized    stand in the place of leaves; `is_node` tells

    jlora.train               states, steps, losses, evaluation, whole runs
    jlora.sweep               many adapters trained in one step
    jlora.checkpoint          adapters, training states and merged parameters on disk
    jlora.optim               LoRA+, LoRA-FA, Riemannian steps, weight decay, for optax
    jlora.peft                PEFT's adapter folders, read and written
    jlora.sharding            meshes by name, and where parameters lie on them
    jlora.init                how adapters start: PiSSA, EVA, LoRA-GA and others
    jlora.models              Flax models that read and write Hugging Face folders
    jlora.data                text and tables, tokens, batches
    jlora.metrics             predictions scored against references
    jlora.tasks               what training scripts share: options, losses, reports
    jlora.cli                 the console

Every error is a `LoraError`. A tree is any pytree of parameters:

>>> params = jlora.lorafy(params, rank=8, targets=["query", "value"])
>>> trainable, frozen = jlora.split(params)
>>> loss = lambda t, x: jnp.mean(jlora.lora(apply)(jlora.combine(t, frozen), x) ** 2)
>>> grads = jax.grad(loss)(trainable, x)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jlora import checkpoint as checkpoint
    from jlora import cli as cli
    from jlora import data as data
    from jlora import init as init
    from jlora import metrics as metrics
    from jlora import models as models
    from jlora import optim as optim
    from jlora import peft as peft
    from jlora import sharding as sharding
    from jlora import sweep as sweep
    from jlora import tasks as tasks
    from jlora import train as train
    from jlora._errors import CheckpointError as CheckpointError
    from jlora._errors import DataError as DataError
    from jlora._errors import DtypeError as DtypeError
    from jlora._errors import JloraWarning as JloraWarning
    from jlora._errors import LoraError as LoraError
    from jlora._errors import NonFiniteError as NonFiniteError
    from jlora._errors import OptionError as OptionError
    from jlora._errors import ProcessError as ProcessError
    from jlora._errors import ShapeError as ShapeError
    from jlora._errors import StructureError as StructureError
    from jlora._errors import TargetError as TargetError
    from jlora._errors import UnmergedError as UnmergedError
    from jlora._errors import UnsupportedOpError as UnsupportedOpError
    from jlora._kernel.adapter import Adapter as Adapter
    from jlora._kernel.nodes import Full as Full
    from jlora._kernel.nodes import LowRank as LowRank
    from jlora._kernel.nodes import Rows as Rows
    from jlora._kernel.nodes import is_node as is_node
    from jlora._kernel.quantized import Quantized as Quantized
    from jlora._transform.lora import lora as lora
    from jlora._transform.survey import Survey as Survey
    from jlora._transform.survey import survey as survey
    from jlora._transform.without import without_adapters as without_adapters
    from jlora._tree.dropout import with_dropout as with_dropout
    from jlora._tree.lorafy import lorafy as lorafy
    from jlora._tree.merge import merge as merge
    from jlora._tree.merge import unmerge as unmerge
    from jlora._tree.partition import combine as combine
    from jlora._tree.partition import labels as labels
    from jlora._tree.partition import split as split
    from jlora._tree.partition import trainable_mask as trainable_mask
    from jlora._tree.replicate import replicate_layers as replicate_layers
    from jlora._tree.stack import stack_layers as stack_layers
    from jlora._tree.stack import unstack_layers as unstack_layers
    from jlora._tree.summary import Summary as Summary
    from jlora._tree.summary import summary as summary
    from jlora._tree.targets import Target as Target
    from jlora._tree.variants import AdaLoRA as AdaLoRA
    from jlora._tree.variants import LoHa as LoHa
    from jlora._tree.variants import LoKr as LoKr
    from jlora._tree.variants import VeRA as VeRA
    from jlora.adapters._activated import activated as activated
    from jlora.adapters._activated import activated_ids as activated_ids
    from jlora.adapters._bank import bank as bank
    from jlora.adapters._bank import pick as pick
    from jlora.adapters._edit import activate as activate
    from jlora.adapters._edit import add as add
    from jlora.adapters._edit import disable as disable
    from jlora.adapters._edit import remove as remove
    from jlora.adapters._edit import rename as rename
    from jlora.adapters._edit import update as update
    from jlora.adapters._generation import mixed_steps as mixed_steps
    from jlora.adapters._mixed import Mixture as Mixture
    from jlora.adapters._mixed import mixed as mixed
    from jlora.adapters._mixed import with_ids as with_ids
    from jlora.adapters._set import AdapterSet as AdapterSet
    from jlora.adapters._weighted import WeightedReport as WeightedReport
    from jlora.adapters._weighted import weighted as weighted
    from jlora.planning._machines import Accelerator as Accelerator
    from jlora.planning._plan import plan as plan
    from jlora.planning._report import Plan as Plan
    from jlora.quant._loading import Quantizer as Quantizer
    from jlora.quant._loading import quantizer as quantizer
    from jlora.quant._quantize import dequantize as dequantize
    from jlora.quant._quantize import quantize as quantize

__version__ = "0.1.0"

# Everything is imported when it is first asked for (PEP 562), so that `import jlora`
# costs next to nothing. Submodules need more than JAX.
_SUBMODULES = (
    "checkpoint",
    "cli",
    "data",
    "init",
    "metrics",
    "models",
    "optim",
    "peft",
    "sharding",
    "sweep",
    "tasks",
    "train",
)
_MODULE_OF = {
    "Accelerator": "planning._machines",
    "AdaLoRA": "_tree.variants",
    "Adapter": "_kernel.adapter",
    "AdapterSet": "adapters._set",
    "CheckpointError": "_errors",
    "DataError": "_errors",
    "DtypeError": "_errors",
    "Full": "_kernel.nodes",
    "JloraWarning": "_errors",
    "LoHa": "_tree.variants",
    "LoKr": "_tree.variants",
    "LoraError": "_errors",
    "LowRank": "_kernel.nodes",
    "Mixture": "adapters._mixed",
    "NonFiniteError": "_errors",
    "ProcessError": "_errors",
    "OptionError": "_errors",
    "Quantized": "_kernel.quantized",
    "Quantizer": "quant._loading",
    "Rows": "_kernel.nodes",
    "Plan": "planning._report",
    "ShapeError": "_errors",
    "StructureError": "_errors",
    "Summary": "_tree.summary",
    "Survey": "_transform.survey",
    "Target": "_tree.targets",
    "TargetError": "_errors",
    "UnmergedError": "_errors",
    "UnsupportedOpError": "_errors",
    "WeightedReport": "adapters._weighted",
    "activate": "adapters._edit",
    "activated": "adapters._activated",
    "activated_ids": "adapters._activated",
    "add": "adapters._edit",
    "bank": "adapters._bank",
    "VeRA": "_tree.variants",
    "combine": "_tree.partition",
    "disable": "adapters._edit",
    "dequantize": "quant._quantize",
    "is_node": "_kernel.nodes",
    "labels": "_tree.partition",
    "lora": "_transform.lora",
    "lorafy": "_tree.lorafy",
    "merge": "_tree.merge",
    "mixed": "adapters._mixed",
    "mixed_steps": "adapters._generation",
    "pick": "adapters._bank",
    "plan": "planning._plan",
    "remove": "adapters._edit",
    "rename": "adapters._edit",
    "quantize": "quant._quantize",
    "quantizer": "quant._loading",
    "replicate_layers": "_tree.replicate",
    "split": "_tree.partition",
    "stack_layers": "_tree.stack",
    "summary": "_tree.summary",
    "survey": "_transform.survey",
    "trainable_mask": "_tree.partition",
    "unmerge": "_tree.merge",
    "unstack_layers": "_tree.stack",
    "update": "adapters._edit",
    "weighted": "adapters._weighted",
    "with_dropout": "_tree.dropout",
    "with_ids": "adapters._mixed",
    "without_adapters": "_transform.without",
}

__all__ = sorted(_MODULE_OF)


if not TYPE_CHECKING:  # or type checkers would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name in _SUBMODULES:
            return importlib.import_module(f"jlora.{name}")
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'jlora' has no attribute {name!r}")
        found = getattr(importlib.import_module(f"jlora.{_MODULE_OF[name]}"), name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBMODULES, "__version__"])
