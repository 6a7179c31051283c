"""The configuration of the Llama family, as `config.json` spells it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from jlora._errors import CheckpointError
from jlora.models._decoder_config import (
    check_activation,
    check_divides,
    check_sizes,
    plain,
    read_keys,
)
from jlora.models._rope import Rope

FULL, SLIDING = "full_attention", "sliding_attention"
_PLAIN = Rope()


class Kind(NamedTuple):
    """In what a `model_type` differs from the others.

    Attributes:
      architecture: the class of `transformers`.
      defaults: its values for keys that a file does not hold.
      reads: the optional keys it honours; they stay at their defaults elsewhere.
      qkv_bias: whether queries, keys and values have a bias in any case.
      qk_norm: whether each head of queries and keys is normalised.
    """

    architecture: str
    defaults: Mapping[str, Any]
    reads: frozenset[str]
    qkv_bias: bool = False
    qk_norm: bool = False


_QWEN = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
}
_MISTRAL = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
KINDS = {
    "llama": Kind("LlamaForCausalLM", {}, frozenset({"attention_bias", "mlp_bias"})),
    "mistral": Kind("MistralForCausalLM", _MISTRAL, frozenset({"sliding_window"})),
    "qwen2": Kind(
        "Qwen2ForCausalLM",
        _QWEN,
        frozenset({"sliding_window", "layer_types"}),
        qkv_bias=True,
    ),
    "qwen3": Kind(
        "Qwen3ForCausalLM",
        {**_QWEN, "head_dim": 128},
        frozenset({"sliding_window", "layer_types", "attention_bias"}),
        qk_norm=True,
    ),
}
_OPTIONAL = frozenset({"attention_bias", "mlp_bias", "sliding_window", "layer_types"})
# Read by `Rope` and `_sliding`; the first four are written as they are read.
_WRITTEN_ANEW = ("rope_theta", "rope_scaling", "rope_parameters", "use_sliding_window")
_HARMLESS = "|".join([*_WRITTEN_ANEW, "max_window_layers"])


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and choices of a Llama 2 or 3, Mistral, Qwen2 or Qwen3.

    Fields carry the names of `config.json`, and Llama's defaults; `from_dict` fills in
    the defaults of the `model_type`. `extra` holds the keys that do not change the
    computation; they are written back as they came and take no part in comparisons.

    Attributes:
      model_type: one of `KINDS`; says which biases and norms there are.
      vocab_size: V, the rows of the embedding.
      hidden_size: d, the width of the residual stream.
      intermediate_size: width of the feed-forward layer.
      num_hidden_layers: layers.
      num_attention_heads: H.
      num_key_value_heads: G, the heads of keys and values; `None` is H.
      head_dim: D; `None` is d/H.
      hidden_act: the activation of the gate.
      max_position_embeddings: the longest sequence it was trained for.
      initializer_range: standard deviation of the initial kernels.
      rms_norm_eps: added to the mean square.
      rope: how positions turn queries and keys.
      tie_word_embeddings: whether the head is the embedding.
      attention_bias: whether all projections of attention have a bias.
      mlp_bias: whether the feed-forward layer has.
      attention_dropout: dropout of attention's probabilities.
      sliding_window: how many keys a query of a sliding layer sees, its own included;
        `None` where no layer slides.
      layer_types: of every layer, `"full_attention"` or `"sliding_attention"`; `None`
        is all alike, sliding where there is a window.
      bos_token_id: begins a text.
      eos_token_id: ends a text; several where any of them does.
      pad_token_id: fills batches.
      extra: everything else that the file said.
      generation: what `generation_config.json` said; its end and padding tokens go
        before those here.
    """

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope: Rope = _PLAIN
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    generation: Mapping[str, Any] = dataclasses.field(
        default_factory=dict, compare=False
    )

    def __post_init__(self) -> None:
        """Fill what follows from other fields, and refuse what makes no model."""
        if self.num_key_value_heads is None:
            self._set("num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            check_sizes(self.model_type, self, ["hidden_size", "num_attention_heads"])
            check_divides(self.model_type, self, "num_attention_heads", "hidden_size")
            self._set("head_dim", self.hidden_size // self.num_attention_heads)
        if self.layer_types is None:
            every = FULL if self.sliding_window is None else SLIDING
            self._set("layer_types", (every,) * self.num_hidden_layers)
        self._check()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen

    def _check(self) -> None:
        kind = self.model_type
        if kind not in KINDS:
            raise CheckpointError(
                f"Llama config: model_type is {kind!r}.\nKnown are {', '.join(KINDS)}."
            )
        names = [f.name for f in dataclasses.fields(self)]
        sizes = [n for n in names if n.startswith("num_") or n.endswith("_size")]
        window = [] if self.sliding_window is None else ["sliding_window"]
        check_sizes(kind, self, [*sizes, "head_dim", *window])
        check_divides(kind, self, "num_key_value_heads", "num_attention_heads")
        check_activation(kind, self.hidden_act)
        for name in ("attention_bias", "mlp_bias", "sliding_window"):
            if getattr(self, name) and name not in KINDS[kind].reads:
                raise CheckpointError(
                    f"{kind} config: {name} is {getattr(self, name)!r}, and a {kind} "
                    "has no such thing.\nTake it out, or change model_type."
                )
        self._check_layers()

    def _check_layers(self) -> None:
        types = self.layer_types or ()
        strange = set(types) - {FULL, SLIDING}
        if strange or len(types) != self.num_hidden_layers:
            raise CheckpointError(
                f"{self.model_type} config: layer_types {list(types)} must name "
                f"{self.num_hidden_layers} layers, each {FULL!r} or {SLIDING!r}."
            )
        every = FULL if self.sliding_window is None else SLIDING
        if "layer_types" not in self.kind.reads and set(types) != {every}:
            raise CheckpointError(
                f"{self.model_type} config: layer_types {list(types)} do not follow "
                f"from sliding_window {self.sliding_window!r}, and a {self.model_type} "
                "has all its layers alike.\nTake layer_types out, or change model_type."
            )
        if SLIDING in types and self.sliding_window is None:
            raise CheckpointError(
                f"{self.model_type} config: layers slide, and there is no "
                "sliding_window.\nGive its width."
            )

    @property
    def kind(self) -> Kind:
        """In what this `model_type` differs from the others."""
        return KINDS[self.model_type]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Return the configuration that a `config.json` holds.

        Raises:
          CheckpointError: a key or a value that this model cannot honour.
          ShapeError: sizes that are no positive integers, or do not fit each other.
        """
        name = config.get("model_type", "llama")
        if name not in KINDS:
            return cls(model_type=name)  # which refuses it
        known, extra = read_keys(name, cls, config, _HARMLESS)
        known = {**KINDS[name].defaults, **known, **_sliding(name, config)}
        extra = {key: v for key, v in extra.items() if key not in _WRITTEN_ANEW}
        return cls(**known, rope=Rope.from_dict(name, config), extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """Return what belongs into `config.json`, the extra keys included."""
        fields = dataclasses.fields(self)
        own = {f.name: plain(getattr(self, f.name)) for f in fields}
        del own["rope"], own["extra"], own["generation"]
        for name in _OPTIONAL - self.kind.reads:
            del own[name]
        if "layer_types" in self.kind.reads:
            own["use_sliding_window"] = self.sliding_window is not None
        head = {"architectures": [self.kind.architecture]}
        whole = {**head, **self.extra, **own, **self.rope.to_dict()}
        return dict(sorted(whole.items()))


def _sliding(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return window and layers as Qwen's keys say them; others have a window alone."""
    if "layer_types" not in KINDS[name].reads:
        return {}
    if not config.get("use_sliding_window"):
        return {"sliding_window": None}
    if config.get("layer_types") is not None:
        return {"sliding_window": config.get("sliding_window", 4096)}
    first = config.get("max_window_layers", 28)
    layers = range(config.get("num_hidden_layers", 32))
    return {
        "sliding_window": config.get("sliding_window", 4096),
        "layer_types": tuple(SLIDING if i >= first else FULL for i in layers),
    }
