"""The configuration of Gemma, Gemma 2 and Gemma 3, as `config.json` spells it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jlora._errors import CheckpointError
from jlora.models._parts.rope import Rope
from jlora.models.llama._config import FULL, SLIDING, Kind, LlamaConfig, layers_of

_GEMMA = {
    "vocab_size": 256000,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_FIRST = {
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
_LATER = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
}
_SECOND = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_THIRD = {"vocab_size": 262208, "max_position_embeddings": 131072}
_READS = frozenset(
    {
        "attention_bias",
        "sliding_window",
        "layer_types",
        "query_pre_attn_scalar",
        "final_logit_softcapping",
    }
)
_ACTIVATION = {"hidden_act": "hidden_activation"}
_KINDS = {
    "gemma": Kind(
        "GemmaForCausalLM",
        {**_GEMMA, **_FIRST},
        frozenset({"attention_bias"}),
        also=_ACTIVATION,
        centred=True,
    ),
    "gemma2": Kind(
        "Gemma2ForCausalLM",
        {**_GEMMA, **_LATER, **_SECOND},
        _READS | {"attn_logit_softcapping"},
        also=_ACTIVATION,
        period=2,
        around=True,
        centred=True,
    ),
    "gemma3_text": Kind(
        "Gemma3ForCausalLM",
        {**_GEMMA, **_LATER, **_THIRD},
        _READS,
        also=_ACTIVATION,
        theta=1e6,
        period=6,
        qk_norm=True,
        around=True,
        centred=True,
    ),
}
_GEMMA3_ALONE = ("sliding_window_pattern", "rope_local_base_freq")
_HARMLESS = ("cache_implementation", "sliding_window_size", *_GEMMA3_ALONE)


@dataclasses.dataclass(frozen=True)
class GemmaConfig(LlamaConfig):
    """Sizes and choices of a Gemma, a Gemma 2 or the text model of a Gemma 3.

    Fields are those of `LlamaConfig`, and with its defaults; `from_dict` fills in the
    defaults of the `model_type`.

    Attributes:
      query_pre_attn_scalar: scores are divided by its square root; `None` becomes D.
      attn_logit_softcapping: what scores stay within, softly; `None` is no bound.
      final_logit_softcapping: what logits stay within, softly; `None` is no bound.
      local_rope: how positions turn queries and keys of sliding layers; `None` is as
        in full ones.
    """

    model_type: str = "gemma2"
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    local_rope: Rope | None = None

    kinds: ClassVar[Mapping[str, Kind]] = _KINDS
    optional: ClassVar[frozenset[str]] = LlamaConfig.optional | {
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    }
    harmless: ClassVar[str] = "|".join([LlamaConfig.harmless, *_HARMLESS])

    def _check(self) -> None:
        super()._check()
        # `transformers` wants a file to name it.
        read = "query_pre_attn_scalar" in self.kind.reads
        if read and self.query_pre_attn_scalar is None:
            self._set("query_pre_attn_scalar", self.head_dim)

    @property
    def ropes(self) -> dict[str, Rope]:
        """How positions turn queries and keys, by the kind of layer."""
        return {FULL: self.rope, SLIDING: self.local_rope or self.rope}

    @property
    def score_scale(self) -> float:
        """What attention's scores are multiplied by."""
        return float(self.query_pre_attn_scalar or self.head_dim or 1) ** -0.5

    @property
    def score_cap(self) -> float | None:
        """What attention's scores stay within, softly."""
        return self.attn_logit_softcapping

    @property
    def logit_cap(self) -> float | None:
        """What the logits stay within, softly."""
        return self.final_logit_softcapping

    @classmethod
    def _corrected(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Take the first release's "gelu" for what it was trained with."""
        name = config.get("model_type")
        for key in _GEMMA3_ALONE:
            if name != "gemma3_text" and config.get(key) is not None:
                raise CheckpointError(
                    f"{name} config: {key} is {config[key]!r}, which only a "
                    "gemma3_text reads.\nTake it out, or change model_type."
                )
        if config.get("hidden_act") == "gelu" and name == "gemma":
            return {**config, "hidden_act": "gelu_pytorch_tanh"}
        return config

    @classmethod
    def _sliding(cls, kind: Kind, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the layers that follow from a period of the file's own."""
        period = config.get("sliding_window_pattern")
        if config.get("layer_types") is not None or period is None:
            return {}
        layers = layers_of(period, config["num_hidden_layers"], SLIDING)
        return {"layer_types": layers}

    @classmethod
    def _ropes_of(
        cls, name: str, kind: Kind, config: Mapping[str, Any]
    ) -> dict[str, Rope]:
        """Return the ropes of full and of sliding layers, which Gemma 3 tells apart."""
        if name != "gemma3_text":
            return super()._ropes_of(name, kind, config)
        by_kind = config.get("rope_parameters") or {}
        strange = sorted(set(by_kind) - {FULL, SLIDING})
        if strange:
            raise CheckpointError(
                f"{name} config: rope_parameters has {', '.join(strange)}, where "
                f"{FULL!r} and {SLIDING!r} belong, each with its own."
            )
        local = {"rope_theta": config.get("rope_local_base_freq")}
        local |= {"rope_parameters": by_kind.get(SLIDING)}
        rope = Rope.from_dict(
            name, {**config, "rope_parameters": by_kind.get(FULL)}, kind.theta
        )
        return {"rope": rope, "local_rope": Rope.from_dict(name, local)}

    def _ropes_to_dict(self) -> dict[str, Any]:
        if self.model_type != "gemma3_text":
            return super()._ropes_to_dict()
        full, local = (self.ropes[kind].to_dict() for kind in (FULL, SLIDING))
        new = "rope_parameters"
        by_kind = {FULL: full.pop(new), SLIDING: local[new]}
        return {**full, new: by_kind, "rope_local_base_freq": local["rope_theta"]}
