"""What is measured: published model sizes, batches, ranks and targets.

No framework is imported here: workers of JAX and of PyTorch build the same model from
the same `config.json` keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

Config = Mapping[str, Any]

T5_SMALL: Config = {
    "model_type": "t5", "d_model": 512, "d_ff": 1024, "d_kv": 64, "num_heads": 6,
    "num_layers": 8, "num_decoder_layers": 8, "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    "dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0,
    "eos_token_id": 1,
}  # fmt: skip
T5_BASE: Config = {
    **T5_SMALL, "d_model": 768, "d_ff": 2048, "num_heads": 12, "num_layers": 12,
    "num_decoder_layers": 12,
}  # fmt: skip
T5_XXL: Config = {
    **T5_SMALL, "d_model": 4096, "d_ff": 10240, "num_heads": 64, "num_layers": 24,
    "num_decoder_layers": 24,
}  # fmt: skip
GPT2: Config = {
    "model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12,
    "n_positions": 1024, "vocab_size": 50257, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}  # fmt: skip
# Llama 3.2 1B, with its tied head.
LLAMA_1B: Config = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True,
}  # fmt: skip

# What `--quick` makes of each family. Widths stay apart, so that a mix-up shows.
TINY: Mapping[str, Config] = {
    "t5": {
        "d_model": 24, "d_ff": 40, "d_kv": 8, "num_heads": 2, "num_layers": 1,
        "num_decoder_layers": 1, "vocab_size": 96,
    },
    "gpt2": {
        "n_embd": 24, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 96,
    },
    "llama": {
        "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "vocab_size": 96,
    },
}  # fmt: skip
# What `jlora.lorafy`'s roles are called in each family; GPT-2's queries, keys and
# values are thirds of one kernel.
NAMES: Mapping[str, Mapping[str, str]] = {
    "t5": {
        "query": "q", "key": "k", "value": "v", "out": "o", "gate": "wi_0",
        "up": "wi_1", "down": "wo",
    },
    "gpt2": {"out": "c_proj", "up": "c_fc", "down": "c_proj"},
    "llama": {
        "query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj",
        "gate": "gate_proj", "up": "up_proj", "down": "down_proj",
    },
}  # fmt: skip
# Fields of our Flax modules that can be asked for, as titles name them.
MODEL_FIELDS = ("scan_layers", "remat", "attn_implementation")
DEPTH_KEYS = {
    "t5": ("num_layers", "num_decoder_layers"),
    "gpt2": ("n_layer",),
    "llama": ("num_hidden_layers",),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model with a batch: `batch` sequences of `source` (and `target`) tokens."""

    config: Config
    batch: int
    source: int
    target: int = 0
    dtype: str = "float32"


SHAPES: Mapping[str, Shape] = {
    "t5-small-8x64": Shape(T5_SMALL, 8, 64, 64),
    "t5-small-16x128": Shape(T5_SMALL, 16, 128, 128),
    "t5-base-8x64": Shape(T5_BASE, 8, 64, 64),
    "gpt2-4x128": Shape(GPT2, 4, 128),
    "t5-base-32x512": Shape(T5_BASE, 32, 512, 128, "bfloat16"),
    "llama-1b-2x2048": Shape(LLAMA_1B, 2, 2048, 0, "bfloat16"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to measure. `dataclasses.asdict` of it goes to workers and files.

    Attributes:
      shape: its name in `SHAPES`.
      config: keys of `config.json`.
      batch, source, target: sizes; decoder-only models have `target` 0.
      rank, alpha: of the adapters.
      targets: as `jlora.lorafy` takes them; `"all-linear"` leaves the head out, as
        PEFT does.
      dtype: of base and computation. Adapters are float32.
      model_fields: values of `MODEL_FIELDS`, in that order; peers have none.
    """

    shape: str
    config: Config
    batch: int
    source: int
    target: int
    rank: int
    alpha: float
    targets: Sequence[str] | str
    dtype: str
    model_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def family(self) -> str:
        """The `model_type`."""
        return self.config["model_type"]

    @property
    def title(self) -> str:
        """What it is called in tables."""
        lengths = f"{self.source}/{self.target}" if self.target else f"{self.source}"
        sizes = f"{self.model} {self.batch}x{lengths}, {self.dtype}"
        fields = [
            name if value is True else f"{name} {value}"
            for name, value in self.model_fields.items()
        ]
        return ", ".join([sizes, f"r{self.rank}", self.targets_text, *fields])

    @property
    def model(self) -> str:
        """The shape's name without its batch."""
        return self.shape.rpartition("-")[0]

    @property
    def targets_text(self) -> str:
        """The targets as one string."""
        return self.targets if isinstance(self.targets, str) else " ".join(self.targets)


def case(
    shape: str,
    *,
    rank: int = 8,
    targets: Sequence[str] | str | None = None,
    quick: bool = False,
    depth: int | None = None,
    model_fields: Mapping[str, Any] | None = None,
    **sizes: Any,
) -> Case:
    """Return a case.

    Args:
      shape: a name in `SHAPES`.
      rank: r; alpha is 2r.
      targets: `None` is query and value, for GPT-2 the fused kernel that holds them.
      quick: shrink everything.
      depth: another number of layers.
      model_fields: as `Case` has them.
      **sizes: `batch`, `source`, `target`, `dtype`; `None` keeps the shape's own.
    """
    chosen = SHAPES[shape]
    config = dict(chosen.config)
    family = config["model_type"]
    if quick:
        config |= TINY[family]
        small = {"batch": 2, "source": 8, "target": 7 if chosen.target else 0}
        chosen = dataclasses.replace(chosen, **small)
        rank = min(rank, 4)
    if depth is not None:
        config |= dict.fromkeys(DEPTH_KEYS[family], depth)
    given = {name: value for name, value in sizes.items() if value is not None}
    chosen = dataclasses.replace(chosen, **given)
    if targets is None:
        targets = ["c_attn"] if family == "gpt2" else ["query", "value"]
    if list(targets) == ["all-linear"]:
        targets = "all-linear"
    fields = sorted(
        (model_fields or {}).items(), key=lambda x: MODEL_FIELDS.index(x[0])
    )
    return Case(
        shape, config, chosen.batch, chosen.source, chosen.target, rank, 2.0 * rank,
        targets, chosen.dtype, dict(fields),
    )  # fmt: skip
