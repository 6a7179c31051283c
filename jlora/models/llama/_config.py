"""The configuration of the Llama family, as `config.json` spells it.

What Gemma and the mixtures of experts add is in `_gemma_config` and `_moe_config`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self

from jlora._errors import CheckpointError, ShapeError
from jlora.models._parts.config import (
    check_activation,
    check_divides,
    check_sizes,
    plain,
    read_keys,
)
from jlora.models._parts.rope import Rope

FULL, SLIDING = "full_attention", "sliding_attention"
_PLAIN = Rope()


class Kind(NamedTuple):
    """In what a `model_type` differs from the others.

    Attributes:
      architecture: the class of `transformers`.
      defaults: its values for keys that a file does not hold.
      reads: the optional keys it honours; they stay at their defaults elsewhere.
      also: second names of keys, by the first; files hold either or both.
      theta: base of the wavelengths where a file gives none.
      switched: whether the window counts only where `use_sliding_window` is on.
      period: of how many layers the last is full and the others slide; 0 where that
        does not repeat.
      qkv_bias: whether queries, keys and values have a bias in any case.
      qk_norm: whether each head of queries and keys is normalised.
      around: whether norms stand behind attention and feed-forward layer, too.
      centred: whether norms multiply by 1 + weight, and embeddings by sqrt(d).
      norm_topk: whether the chosen experts' weights add up to 1 in any case.
    """

    architecture: str
    defaults: Mapping[str, Any]
    reads: frozenset[str]
    also: Mapping[str, str] = MappingProxyType({})
    theta: float = 10000.0
    switched: bool = False
    period: int = 0
    qkv_bias: bool = False
    qk_norm: bool = False
    around: bool = False
    centred: bool = False
    norm_topk: bool = False


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
    "ministral": Kind(
        "MinistralForCausalLM",
        _MISTRAL,
        frozenset({"sliding_window", "layer_types"}),
    ),
    "qwen2": Kind(
        "Qwen2ForCausalLM",
        _QWEN,
        frozenset({"sliding_window", "layer_types"}),
        switched=True,
        qkv_bias=True,
    ),
    "qwen3": Kind(
        "Qwen3ForCausalLM",
        {**_QWEN, "head_dim": 128},
        frozenset({"sliding_window", "layer_types", "attention_bias"}),
        switched=True,
        qk_norm=True,
    ),
}
# Read by `Rope` and `_sliding`, and written as they are read.
_WRITTEN_ANEW = (
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "use_sliding_window",
)


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
      rope: how positions turn queries and keys, of full layers where others differ.
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

    kinds: ClassVar[Mapping[str, Kind]] = KINDS
    # Keys that only some kinds read, and keys that change nothing.
    optional: ClassVar[frozenset[str]] = frozenset(
        {"attention_bias", "mlp_bias", "sliding_window", "layer_types"}
    )
    harmless: ClassVar[str] = "|".join([*_WRITTEN_ANEW, "max_window_layers"])

    def __post_init__(self) -> None:
        """Fill what follows from other fields, and refuse what makes no model."""
        if self.num_key_value_heads is None:
            self._set("num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            check_sizes(self.model_type, self, ["hidden_size", "num_attention_heads"])
            check_divides(self.model_type, self, "num_attention_heads", "hidden_size")
            self._set("head_dim", self.hidden_size // self.num_attention_heads)
        if self.layer_types is None:
            self._set("layer_types", self._usual_layers())
        self._check()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen

    def _usual_layers(self) -> tuple[str, ...]:
        period = self.kind.period if self.model_type in self.kinds else 0
        every = FULL if self.sliding_window is None else SLIDING
        return layers_of(period, self.num_hidden_layers, every)

    def _check(self) -> None:
        kind = self.model_type
        if kind not in self.kinds:
            raise CheckpointError(
                f"{type(self).__name__}: model_type is {kind!r}.\nKnown are "
                f"{', '.join(self.kinds)}."
            )
        fields = {f.name: f for f in dataclasses.fields(self)}
        sizes = [
            name
            for name, field in fields.items()
            if name.startswith("num_") or name.endswith(("_size", "_step", "_window"))
            if getattr(self, name) is not None or "None" not in str(field.type)
        ]
        check_sizes(kind, self, [*sizes, "head_dim"])
        check_divides(kind, self, "num_key_value_heads", "num_attention_heads")
        if self.head_dim is not None and self.head_dim % 2:
            raise ShapeError(
                f"{kind} config: head_dim is {self.head_dim}; positions turn pairs of "
                "numbers, so it must be even."
            )
        check_activation(kind, self.hidden_act)
        for name in sorted(self.optional - self.kind.reads - {"layer_types"}):
            if getattr(self, name) != fields[name].default:
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
        return self.kinds[self.model_type]

    @property
    def ropes(self) -> dict[str, Rope]:
        """How positions turn queries and keys, by the kind of layer."""
        return dict.fromkeys((FULL, SLIDING), self.rope)

    @property
    def score_scale(self) -> float:
        """What attention's scores are multiplied by."""
        return float(self.head_dim or 1) ** -0.5

    @property
    def score_cap(self) -> float | None:
        """What attention's scores stay within, softly."""
        return None

    @property
    def logit_cap(self) -> float | None:
        """What the logits stay within, softly."""
        return None

    def is_sparse(self, layer: int) -> bool:
        """Whether the layer of that number chooses among experts."""
        return False

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Return the configuration that a `config.json` holds.

        Raises:
          CheckpointError: a key or a value that this model cannot honour.
          ShapeError: sizes that are no positive integers, or do not fit each other.
        """
        name = config.get("model_type", cls.model_type)
        if name not in cls.kinds:
            return cls(model_type=name)  # which refuses it
        kind = cls.kinds[name]
        config = _by_first_names(name, kind, cls._corrected(config))
        known, extra = read_keys(name, cls, config, cls.harmless)
        known = {**kind.defaults, **known}
        known |= cls._sliding(kind, {**known, **extra})
        known |= cls._ropes_of(name, kind, config)
        extra = {key: v for key, v in extra.items() if key not in _WRITTEN_ANEW}
        return cls(**known, extra=extra)

    @classmethod
    def _corrected(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the file as it is meant; refuse what only this kind can tell."""
        return config

    @classmethod
    def _ropes_of(
        cls, name: str, kind: Kind, config: Mapping[str, Any]
    ) -> dict[str, Rope]:
        """Return the fields that hold what the file says of positions."""
        return {"rope": Rope.from_dict(name, config, kind.theta)}

    def _ropes_to_dict(self) -> dict[str, Any]:
        return self.rope.to_dict()

    @classmethod
    def _sliding(cls, kind: Kind, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return window and layers as Qwen's keys say them."""
        if not kind.switched:
            return {}
        if not config.get("use_sliding_window"):
            return {"sliding_window": None}
        window = {"sliding_window": config.get("sliding_window", 4096)}
        if "layer_types" not in kind.reads or config.get("layer_types") is not None:
            return window
        first = config.get("max_window_layers", 28)
        layers = range(config.get("num_hidden_layers", 32))
        return {**window, "layer_types": cls._layers_beyond(first, layers)}

    @classmethod
    def _layers_beyond(cls, first: int, layers: range) -> tuple[str, ...]:
        """Return the kinds of layers that follow from `max_window_layers`."""
        return tuple(SLIDING if i >= first else FULL for i in layers)

    def to_dict(self) -> dict[str, Any]:
        """Return what belongs into `config.json`, the extra keys included."""
        fields = dataclasses.fields(self)
        own = {f.name: plain(getattr(self, f.name)) for f in fields}
        unread = {"rope", "local_rope", "extra", "generation"}
        for name in unread | (self.optional - self.kind.reads):
            own.pop(name, None)
        own |= {second: own[first] for first, second in self.kind.also.items()}
        if self.kind.switched:
            own["use_sliding_window"] = self.sliding_window is not None
        head = {"architectures": [self.kind.architecture]}
        whole = {**head, **self.extra, **own, **self._ropes_to_dict()}
        return dict(sorted(whole.items()))


def layers_of(period: int, number: int, every: str) -> tuple[str, ...]:
    """Return the kinds of layers of which the last of each `period` is full.

    >>> layers_of(3, 4, SLIDING)[1:]
    ('sliding_attention', 'full_attention', 'sliding_attention')
    """
    if not period:
        return (every,) * number
    return tuple(SLIDING if (i + 1) % period else FULL for i in range(number))


def _by_first_names(name: str, kind: Kind, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` with second names of keys replaced by the first ones."""
    config = dict(config)
    for first, second in kind.also.items():
        said = [config.pop(key, None) for key in (first, second)]
        values = [value for value in said if value is not None]
        if values[1:] and values[0] != values[1]:
            raise CheckpointError(
                f"{name} config: {first} is {values[0]!r} and {second} is "
                f"{values[1]!r}, which mean the same.\nRemove what is wrong."
            )
        if values:
            config[first] = values[0]
    return config
