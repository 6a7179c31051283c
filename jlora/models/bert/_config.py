"""The configuration of a BERT or RoBERTa, as its `config.json` spells it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from jlora._errors import CheckpointError, ShapeError
from jlora.models._parts.config import check_type, pass_over
from jlora.models._parts.layers import ACTIVATIONS


class Names(NamedTuple):
    """What a `model_type` is called elsewhere.

    Attributes:
      prefix: what the encoder's tensors begin with in a model with a head.
      classes: what its classes in `transformers` begin with.
    """

    prefix: str
    classes: str


# All but the first are RoBERTas, which differ in their data and tokenizers.
NAMES = {
    "bert": Names("bert", "Bert"),
    "roberta": Names("roberta", "Roberta"),
    "xlm-roberta": Names("roberta", "XLMRoberta"),
    "camembert": Names("roberta", "Camembert"),
    "data2vec-text": Names("data2vec_text", "Data2VecText"),
}
HEADS = {
    "base": "Model",
    "classification": "ForSequenceClassification",
    "masked_lm": "ForMaskedLM",
}
PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")

# Values that would change what the model computes, and which it cannot honour.
_REQUIRED: dict[str, Any] = {
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "position_embedding_type": "absolute",
    "pruned_heads": {},
    "quantization_config": None,
}
# Keys that an encoder's computation does not read, beside those of every model.
_HARMLESS = (
    r"adapters|directionality|language|model_name|name|name_or_path|pooler_fc_size"
    r"|pooler_num_attention_heads|pooler_num_fc_layers|pooler_size_per_head"
    r"|pooler_type|return_dict_in_generate|sentence_transformers|use_return_dict"
)
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
    "num_labels",
)


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes and choices of a BERT or RoBERTa, and which head it carries.

    Fields but `head` and `pooler` carry the names and the defaults of `config.json`.
    `extra` holds the keys that do not change the computation; they are written back as
    they came and take no part in comparisons.

    Attributes:
      model_type: one of `NAMES`, `"bert"` or a RoBERTa.
      head: `"base"` (hidden states), `"classification"` or `"masked_lm"`; in
        `config.json` it is the end of `architectures`' only entry.
      pooler: whether a base model has the layer over its first token; `None` is yes.
      num_labels: outputs of the classification head.
      problem_type: one of `PROBLEMS`, or `None`, which is regression for a single
        label. The logits do not depend on it.
      vocab_size: V, the rows of the word embedding.
      hidden_size: d, width of the residual stream.
      num_hidden_layers: blocks of the encoder.
      num_attention_heads: H; d/H is the width of one head.
      intermediate_size: width of the feed-forward layer.
      hidden_act: the activation.
      hidden_dropout_prob: where `deterministic=False`.
      attention_probs_dropout_prob: likewise, of attention.
      classifier_dropout: likewise, before the classifier; `None` takes
        `hidden_dropout_prob`.
      max_position_embeddings: rows of the position table. RoBERTa's first
        `pad_token_id + 1` rows stand for no position.
      type_vocab_size: rows of the token type table.
      initializer_range: standard deviation of initial kernels and tables.
      layer_norm_eps: added to the variance.
      pad_token_id: fills batches; RoBERTa counts positions from it.
      tie_word_embeddings: the masked-LM head's decoder is the word embedding.
      extra: everything else that the file said.
    """

    model_type: str = "bert"
    head: str = "base"
    pooler: bool | None = None
    num_labels: int = 2
    problem_type: str | None = None
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        """Fill what follows from other fields, and refuse what makes no model."""
        _check_choice(self, "model_type", NAMES)
        _check_choice(self, "head", HEADS)
        _check_choice(self, "hidden_act", ACTIVATIONS)
        _check_choice(self, "problem_type", (None, *PROBLEMS))
        if self.pad_token_id is None:
            self._set("pad_token_id", 1 if self.roberta else 0)
        by_head = {"base": self.pooler is not False, "masked_lm": False}
        self._set("pooler", by_head.get(self.head, not self.roberta))
        _check_sizes(self)
        if self.head == "masked_lm" and not self.tie_word_embeddings:
            raise CheckpointError(
                "BERT config: tie_word_embeddings is False, and a masked-LM head with "
                "a decoder of its own is not supported."
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen

    @property
    def roberta(self) -> bool:
        """Whether it is a RoBERTa, whose positions and heads differ from BERT's."""
        return self.model_type != "bert"

    @property
    def prefix(self) -> str:
        """What the encoder's names begin with in a model with a head."""
        return NAMES[self.model_type].prefix

    @property
    def first_position(self) -> int:
        """The row of the position table that the first token takes."""
        return (self.pad_token_id or 0) + 1 if self.roberta else 0

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> BertConfig:
        """Return the configuration that a `config.json` holds.

        Args:
          config: the parsed file. The known keys that do not change the computation
            are kept in `extra`.

        Returns:
          The configuration, with defaults as `transformers` fills them.

        Raises:
          CheckpointError: a key or a value that this model cannot honour, or a head
            that is not defined here.
          ShapeError: sizes that make no model.
        """
        for key, wanted in _REQUIRED.items():
            if config.get(key) not in (None, wanted):
                raise CheckpointError(
                    f"BERT config: {key} is {config[key]!r}, and only {wanted!r} is "
                    "supported."
                )
        names = {field.name for field in dataclasses.fields(cls)}
        names -= {"extra", "head", "pooler"}
        others = {k: v for k, v in config.items() if k not in names | _REQUIRED.keys()}
        pass_over("BERT", others, _HARMLESS)
        # A null stands for the default, as in files written by older releases.
        known = {k: v for k, v in config.items() if k in names and v is not None}
        known["num_labels"] = _num_labels(config)
        types = {field.name: str(field.type) for field in dataclasses.fields(cls)}
        for key, value in known.items():
            check_type("BERT", key, value, types[key])
        extra = {k: v for k, v in config.items() if k not in known}
        return cls(**known, head=_head(config), extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """Return what belongs into `config.json`, the extra keys included."""
        own = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("extra", "head", "pooler", "num_labels")
        }
        own["architectures"] = [NAMES[self.model_type].classes + HEADS[self.head]]
        if "id2label" not in self.extra and self.num_labels != 2:
            labels = [f"LABEL_{i}" for i in range(self.num_labels)]
            own["id2label"] = {str(i): label for i, label in enumerate(labels)}
            own["label2id"] = {label: i for i, label in enumerate(labels)}
        return dict(sorted({**self.extra, **own}.items()))


def with_head(
    config: Mapping[str, Any], head: str | None, num_labels: int | None
) -> dict[str, Any]:
    """Return a parsed `config.json` with another head, or number of labels.

    Raises:
      CheckpointError: `head` is not defined, or has no labels to number.
    """
    changed = dict(config)
    if head is not None:
        if head not in HEADS:
            raise CheckpointError(
                f"head={head!r} is not defined.\nKnown are {', '.join(HEADS)}."
            )
        prefix = NAMES[config["model_type"]].classes
        changed["architectures"] = [prefix + HEADS[head]]
    if num_labels is None:
        return changed
    if _head(changed) != "classification":
        raise CheckpointError(
            f"num_labels={num_labels} is for a classification head, and this is "
            f"{changed['architectures'][0]}.\nPass head='classification' as well."
        )
    if num_labels != _num_labels(config):
        # The names and the problem were those of the other labels.
        for key in ("id2label", "label2id", "problem_type", "_num_labels"):
            changed.pop(key, None)
    changed["num_labels"] = num_labels
    return changed


def _head(config: Mapping[str, Any]) -> str:
    prefix = NAMES.get(config.get("model_type", "bert"), Names("", "")).classes
    heads = {prefix + suffix: head for head, suffix in HEADS.items()}
    named = config.get("architectures") or []
    if len(named) != 1 or named[0] not in heads:
        raise CheckpointError(
            f"BERT config: architectures is {named}, and one of {', '.join(heads)} is "
            f"needed.\nChoose a head: load(..., head=...), one of {', '.join(HEADS)}."
        )
    return heads[named[0]]


def _num_labels(config: Mapping[str, Any]) -> int:
    said, names = config.get("num_labels"), config.get("id2label")
    if said is not None and names is not None and len(names) != said:
        raise CheckpointError(
            f"BERT config: num_labels is {said}, but id2label names {len(names)}.\n"
            "Correct the one that is wrong."
        )
    if said is not None:
        return said
    return 2 if names is None else len(names)


def _check_choice(config: BertConfig, field: str, known: Any) -> None:
    value = getattr(config, field)
    if value not in known:
        raise CheckpointError(
            f"BERT config: {field} is {value!r}, which is not known.\n"
            f"Known are {', '.join(map(str, known))}."
        )


def _check_sizes(config: BertConfig) -> None:
    for name in _SIZES:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ShapeError(
                f"BERT config: {name} is {value!r}; it must be a positive integer."
            )
    if config.hidden_size % config.num_attention_heads:
        raise ShapeError(
            f"BERT config: hidden_size is {config.hidden_size}, which "
            f"num_attention_heads, {config.num_attention_heads}, must divide."
        )
    if config.max_position_embeddings <= config.first_position:
        raise ShapeError(
            "BERT config: max_position_embeddings is "
            f"{config.max_position_embeddings}, and the first token's position is "
            f"{config.first_position}."
        )
