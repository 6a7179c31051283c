"""The configuration of a T5, as the `config.json` beside its weights spells it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jlora._errors import CheckpointError, ShapeError
from jlora.models._parts.config import check_activation, plain, read_keys

# By `model_type`: the class in `transformers`, and its defaults where they are others.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", {}),
    "mt5": (
        "MT5ForConditionalGeneration",
        {
            "vocab_size": 250112,
            "d_ff": 1024,
            "num_layers": 8,
            "num_heads": 6,
            "feed_forward_proj": "gated-gelu",
        },
    ),
}
# Values that would change what the model computes, and which it cannot honour.
_REQUIRED = {
    "is_decoder": False,
    "is_encoder_decoder": True,
    "quantization_config": None,
}
# Positions are offsets, and `n_positions` no limit; dropout of a classifier is not the
# language model's; the flags are checked.
_HARMLESS = (
    r"n_positions|classifier_dropout|bos_token_id|is_decoder|is_encoder_decoder"
    r"|is_gated_act"
)


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes and choices of a T5 v1.0, v1.1, FLAN-T5, ByT5 or mT5.

    Fields carry the names and the defaults of `config.json`. `extra` holds the keys
    that do not change the computation (`n_positions`, `task_specific_params`, ...);
    they are written back as they came and take no part in comparisons.

    Attributes:
      vocab_size: V, the rows of the shared embedding.
      d_model: width of the residual stream.
      d_kv: D, the width of one head.
      d_ff: width of the feed-forward layer.
      num_layers: blocks of the encoder.
      num_decoder_layers: blocks of the decoder; `None` takes `num_layers`.
      num_heads: H.
      relative_attention_num_buckets: rows of the position bias.
      relative_attention_max_distance: offsets beyond it share one bucket.
      dropout_rate: where `deterministic=False`.
      layer_norm_epsilon: added to the mean square.
      initializer_factor: scales every initial standard deviation.
      feed_forward_proj: `"relu"`, `"gated-gelu"`, ...
      dense_act_fn: the activation; derived from `feed_forward_proj` where empty.
      tie_word_embeddings: whether the head is the shared embedding.
      scale_decoder_outputs: whether the head's input is scaled by d_model**-0.5;
        `None` follows `tie_word_embeddings`, but an mT5 never scales.
      pad_token_id: fills batches, and takes the place of ignored labels.
      eos_token_id: ends a sequence; several where any of them does.
      decoder_start_token_id: the decoder's first input.
      extra: everything else that the file said.
      generation: what `generation_config.json` said; its end and padding tokens go
        before those here.
      model_type: `"t5"` or `"mt5"`.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    dense_act_fn: str = ""
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool | None = None
    pad_token_id: int = 0
    eos_token_id: int | tuple[int, ...] = 1
    decoder_start_token_id: int = 0
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    generation: Mapping[str, Any] = dataclasses.field(
        default_factory=dict, compare=False
    )
    model_type: str = "t5"

    def __post_init__(self) -> None:
        """Fill what follows from other fields, and refuse what makes no model."""
        if self.num_decoder_layers is None:
            self._set("num_decoder_layers", self.num_layers)
        if self.scale_decoder_outputs is None:
            scaled = self.tie_word_embeddings and self.model_type == "t5"
            self._set("scale_decoder_outputs", scaled)
        if not self.dense_act_fn:
            self._set("dense_act_fn", _activation_name(self.feed_forward_proj))
        if isinstance(self.eos_token_id, list):
            self._set("eos_token_id", tuple(self.eos_token_id))
        self._check()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen

    def _check(self) -> None:
        if self.model_type not in KINDS:
            raise CheckpointError(
                f"T5 config: model_type is {self.model_type!r}.\nKnown are "
                f"{', '.join(KINDS)}."
            )
        if self.model_type == "mt5" and self.scale_decoder_outputs:
            raise CheckpointError(
                "T5 config: scale_decoder_outputs is True, and an mT5 scales nothing."
                "\nTake it out, or change model_type."
            )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            size = field.name.startswith(("d_", "num_", "relative_", "vocab"))
            if size and (not isinstance(value, int) or value < 1):
                raise ShapeError(
                    f"T5 config: {field.name} is {value!r}; it must be a positive "
                    "integer."
                )
        near = self.relative_attention_num_buckets // 2
        if near < 2 or self.relative_attention_max_distance <= near:
            raise ShapeError(
                "T5 config: relative_attention_num_buckets is "
                f"{self.relative_attention_num_buckets} and "
                "relative_attention_max_distance is "
                f"{self.relative_attention_max_distance}; there must be at least 4 "
                "buckets, and a distance of more than half of them."
            )
        parts = self.feed_forward_proj.split("-")
        if len(parts) > 2 or (len(parts) == 2 and parts[0] != "gated"):
            raise CheckpointError(
                f"T5 config: feed_forward_proj is {self.feed_forward_proj!r}; it must "
                "read ACTIVATION or gated-ACTIVATION."
            )
        check_activation("T5", self.dense_act_fn)

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layer multiplies two projections."""
        return self.feed_forward_proj.startswith("gated-")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> T5Config:
        """Return the configuration that a `config.json` holds.

        Args:
          config: the parsed file. The known keys that do not change the computation
            are kept in `extra`.

        Returns:
          The configuration, with defaults as `transformers` fills them.

        Raises:
          CheckpointError: a key or a value that this model cannot honour.
          ShapeError: a size that is no positive integer.
        """
        for key, wanted in _REQUIRED.items():
            if config.get(key, wanted) != wanted:
                raise CheckpointError(
                    f"T5 config: {key} is {config[key]!r}, and only {wanted!r} is "
                    "supported."
                )
        if config.get("is_gated_act") not in (None, _is_gated(config)):
            raise CheckpointError(
                f"T5 config: is_gated_act is {config['is_gated_act']!r} but "
                f"feed_forward_proj is {config.get('feed_forward_proj')!r}.\n"
                "Correct the one that is wrong."
            )
        known, extra = read_keys("T5", cls, config, _HARMLESS)
        _, defaults = KINDS.get(known.get("model_type", "t5"), ("", {}))
        return cls(**{**defaults, **known}, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """Return what belongs into `config.json`, the extra keys included."""
        fields = dataclasses.fields(self)
        own = {f.name: plain(getattr(self, f.name)) for f in fields}
        del own["generation"]
        head = {
            "architectures": [KINDS[self.model_type][0]],
            "is_encoder_decoder": True,
            "is_gated_act": self.gated,
        }
        if self.model_type != "t5":
            del own["scale_decoder_outputs"]
        return dict(sorted({**head, **own.pop("extra"), **own}.items()))


def _is_gated(config: Mapping[str, Any]) -> bool:
    return str(config.get("feed_forward_proj", "relu")).startswith("gated-")


def _activation_name(feed_forward_proj: str) -> str:
    # By "gated-gelu" the published files mean the tanh approximation.
    if feed_forward_proj == "gated-gelu":
        return "gelu_new"
    return feed_forward_proj.split("-")[-1]
