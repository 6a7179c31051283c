"""The configuration of Mixtral and Qwen's mixtures, as `config.json` spells it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jlora._errors import CheckpointError, ShapeError
from jlora.models.llama._config import FULL, SLIDING, Kind, LlamaConfig

_QWEN = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
}
_QWEN2 = {
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
}
_QWEN3 = {
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
_MIXTRAL = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}
_READS = frozenset(
    {
        "sliding_window",
        "moe_intermediate_size",
        "norm_topk_prob",
        "decoder_sparse_step",
        "mlp_only_layers",
    }
)
_EXPERTS = {"num_experts": "num_local_experts"}
_KINDS = {
    "mixtral": Kind(
        "MixtralForCausalLM",
        _MIXTRAL,
        frozenset({"sliding_window"}),
        also=_EXPERTS,
        theta=1e6,
        norm_topk=True,
    ),
    "qwen2_moe": Kind(
        "Qwen2MoeForCausalLM",
        {**_QWEN, **_QWEN2},
        _READS | {"layer_types", "shared_expert_intermediate_size"},
        switched=True,
        qkv_bias=True,
    ),
    "qwen3_moe": Kind(
        "Qwen3MoeForCausalLM",
        {**_QWEN, **_QWEN3},
        _READS | {"attention_bias"},
        also=_EXPERTS,
        switched=True,
        qk_norm=True,
    ),
}


@dataclasses.dataclass(frozen=True)
class MoeConfig(LlamaConfig):
    """Sizes and choices of a Mixtral, a Qwen2-MoE or a Qwen3-MoE.

    Fields are those of `LlamaConfig`, and with its defaults; `from_dict` fills in the
    defaults of the `model_type`. `output_router_logits` is kept and not acted upon: the
    loss is not the model's, and `jlora.models.router_loss` is there for it.

    Attributes:
      num_experts: E; files of Mixtral call it `num_local_experts`.
      num_experts_per_tok: how many experts each token meets.
      moe_intermediate_size: width of an expert; `None` is `intermediate_size`.
      shared_expert_intermediate_size: width of the expert that every token meets;
        `None` is no such expert.
      norm_topk_prob: whether the chosen experts' weights are divided by their sum,
        which a Mixtral does in any case.
      decoder_sparse_step: of so many layers the last has experts.
      mlp_only_layers: numbers of layers that have none in any case.
      router_aux_loss_coef: the weight of `router_loss` in a loss.
    """

    model_type: str = "mixtral"
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    shared_expert_intermediate_size: int | None = None
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    router_aux_loss_coef: float = 0.001

    kinds: ClassVar[Mapping[str, Kind]] = _KINDS
    optional: ClassVar[frozenset[str]] = LlamaConfig.optional | {
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "norm_topk_prob",
        "decoder_sparse_step",
        "mlp_only_layers",
    }
    harmless: ClassVar[str] = f"{LlamaConfig.harmless}|qkv_bias"

    def _check(self) -> None:
        super()._check()
        if self.num_experts_per_tok > self.num_experts:
            raise ShapeError(
                f"{self.model_type} config: num_experts_per_tok is "
                f"{self.num_experts_per_tok}, and there are {self.num_experts} experts."
            )

    def is_sparse(self, layer: int) -> bool:
        """Whether the layer of that number chooses among experts."""
        step = (layer + 1) % self.decoder_sparse_step == 0
        return step and layer not in self.mlp_only_layers

    @classmethod
    def _corrected(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Refuse queries without biases where the weights always have them."""
        if not config.get("qkv_bias", True):
            raise CheckpointError(
                f"{config['model_type']} config: qkv_bias is {config['qkv_bias']!r}, "
                "and this model has biases of queries, keys and values."
            )
        return config

    @classmethod
    def _layers_beyond(cls, first: int, layers: range) -> tuple[str, ...]:
        """Return the kinds of layers that follow from `max_window_layers`."""
        return tuple(SLIDING if i < first and i % 2 == 0 else FULL for i in layers)
