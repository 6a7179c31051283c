"""What `jlora.plan` says of a step's bytes, beside XLA's account of its program.

Every case is planned from shapes, then compiled for faked devices of a CPU, whose XLA
says what it holds. Small models, so that a case takes seconds; the models' parts have
sizes that differ, so that one cannot stand for another. The parameters and states of a
plan are exact; `temporaries` are what it estimates.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.race import Contender, Row, Rows, race

COLUMNS = (
    "case", "trained", "mesh", "remat", "examples_a_device", "plan_mib", "xla_mib",
    "plan_to_xla", "temporaries_plan_mib", "temporaries_xla_mib", "error",
)  # fmt: skip
DEVICES = 8
MODELS: Mapping[str, Row] = {
    "llama": {
        "model_type": "llama", "vocab_size": 1024, "hidden_size": 256,
        "intermediate_size": 640, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 1024, "n_embd": 256, "n_layer": 4,
        "n_head": 8, "n_positions": 128,
    },
    "t5": {
        "model_type": "t5", "vocab_size": 1024, "d_model": 256, "d_kv": 32, "d_ff": 640,
        "num_layers": 4, "num_heads": 8, "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
    "bert": {
        "model_type": "bert", "vocab_size": 1024, "hidden_size": 256,
        "intermediate_size": 640, "num_hidden_layers": 4, "num_attention_heads": 8,
        "max_position_embeddings": 128, "num_labels": 3,
        "architectures": ["BertForSequenceClassification"],
    },
    "mixture": {
        "model_type": "qwen3_moe", "vocab_size": 1024, "hidden_size": 256,
        "intermediate_size": 640, "moe_intermediate_size": 192, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "num_experts": 8,
        "num_experts_per_tok": 2,
    },
}  # fmt: skip
TRAINED: Mapping[str, Row] = {
    "LoRA": {},
    "LoRA, all-linear": {"targets": "all-linear"},
    "QLoRA, int8": {"quantize": "int8", "targets": "all-linear"},
    "QLoRA, nf4": {"quantize": "nf4", "targets": "all-linear"},
    "every weight": {"full": True},
}
CUT = ("data=8", "data=2,fsdp=4", "data=2,fsdp=2,tensor=2")


@dataclasses.dataclass(frozen=True)
class Planned:
    """A case.

    Attributes:
      model: of `MODELS`.
      trained: of `TRAINED`.
      mesh: of the faked devices; None is one device.
      remat: whether blocks are recomputed.
      size: examples a device.
      length: tokens an example.
    """

    model: str
    trained: str = "LoRA"
    mesh: str | None = None
    remat: bool = False
    size: int = 8
    length: int = 64

    @property
    def head(self) -> Row:
        """The row's first columns."""
        return {
            "case": f"{self.model}, {self.length} tokens", "trained": self.trained,
            "mesh": self.mesh or "1 device", "remat": "yes" if self.remat else "no",
            "examples_a_device": self.size,
        }  # fmt: skip


def all_cases() -> list[list[Planned]]:
    """The cases, table by table."""
    families = [
        Planned(model, mesh=mesh, remat=remat)
        for model in MODELS
        for mesh in (None, "data=2,fsdp=2,tensor=2")
        for remat in (False, True)
    ]
    forms = [
        Planned(model, trained, remat=remat)
        for model in ("llama", "gpt2", "t5")
        for trained in [*TRAINED][1:]
        for remat in (False, True)
    ]
    meshes = [
        Planned("llama", trained, mesh, remat=True)
        for trained in ("LoRA, all-linear", "QLoRA, nf4", "every weight")
        for mesh in CUT
    ]
    few = [
        Planned(model, trained, mesh, size=1, length=128)
        for model in ("llama", "t5")
        for trained in ("LoRA", "QLoRA, nf4")
        for mesh in (None, "data=2,fsdp=4")
    ]
    return [families, forms, meshes, few]


QUICK = [Planned("llama", "QLoRA, nf4", "data=2,fsdp=2", remat=True, size=2, length=16)]


def run(options: Any) -> Iterator[Rows]:
    """Plan and compile each case in a worker with eight faked devices."""
    options = copy.copy(options)
    options.repeats, options.warmup, options.fake_devices = 1, 0, DEVICES
    for cases in [QUICK] if options.quick else all_cases():
        entries = [
            Contender(str(n), "benchmarks.plan:both", dataclasses.asdict(one))
            for n, one in enumerate(cases)
        ]
        result = race(entries, options)
        yield (
            [{**one.head, **_figures(result, str(n))} for n, one in enumerate(cases)],
            result.about,
        )


def _figures(result: Any, name: str) -> Row:
    if name in result.errors:
        return {"error": result.errors[name]}
    return dict(result.facts[name])


def both(
    model: str, trained: str, mesh: str | None, remat: bool, size: int, length: int
) -> Any:
    """The plan's bytes and XLA's; runs in a worker."""
    import jlora

    asked: Row = {"rank": 8, "mesh": mesh, "remat": remat, **TRAINED[trained]}
    ways = 1
    if mesh:  # of the axes that cut a batch
        sizes = dict(part.split("=") for part in mesh.split(","))
        ways = int(sizes.get("data", 1)) * int(sizes.get("fsdp", 1))
    plans = {
        "plan": jlora.plan(MODELS[model], batch=(size * ways, length), **asked),
        "xla": jlora.plan(
            MODELS[model], batch=(size * ways, length), compiled=True, **asked
        ),
    }
    facts: Row = {}
    for name, plan in plans.items():
        memory = plan.memory
        facts[f"{name}_mib"] = memory.total / 2**20
        temporaries = memory.gradients + memory.activations
        facts[f"temporaries_{name}_mib"] = temporaries / 2**20
    facts["plan_to_xla"] = facts["plan_mib"] / facts["xla_mib"]
    return lambda: None, facts
