"""The configuration of a GPT-2, as the `config.json` beside its weights spells it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jlora._errors import CheckpointError
from jlora.models._parts.config import (
    check_activation,
    check_divides,
    check_sizes,
    plain,
    read_keys,
)

# Scores are in float32 here, which is what `reorder_and_upcast_attn` asks for.
_HARMLESS = r"summary_.*|n_ctx|reorder_and_upcast_attn"


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """Sizes and choices of a GPT-2.

    Fields carry the names and the defaults of `config.json`. `extra` holds the keys
    that do not change the computation; they are written back as they came and take no
    part in comparisons.

    Attributes:
      vocab_size: V, the rows of the token embedding.
      n_positions: rows of the position embedding: the longest sequence.
      n_embd: d, the width of the residual stream.
      n_layer: blocks.
      n_head: H.
      n_inner: width of the feed-forward layer; `None` is 4d.
      activation_function: of the feed-forward layer.
      resid_pdrop: dropout of what is added to the residual stream.
      embd_pdrop: dropout of the embeddings.
      attn_pdrop: dropout of attention's probabilities.
      layer_norm_epsilon: added to the variance.
      initializer_range: standard deviation of the initial kernels.
      scale_attn_weights: whether scores are divided by sqrt(D).
      scale_attn_by_inverse_layer_idx: whether they are by the block's number, too.
      tie_word_embeddings: whether the head is the token embedding.
      bos_token_id: begins a text.
      eos_token_id: ends a text; several where any of them does.
      pad_token_id: fills batches.
      extra: everything else that the file said.
      generation: what `generation_config.json` said; its end and padding tokens go
        before those here.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256
    pad_token_id: int | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    generation: Mapping[str, Any] = dataclasses.field(
        default_factory=dict, compare=False
    )

    def __post_init__(self) -> None:
        """Refuse what makes no model."""
        sizes = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"]
        inner = [] if self.n_inner is None else ["n_inner"]
        check_sizes("GPT-2", self, [*sizes, *inner])
        check_divides("GPT-2", self, "n_head", "n_embd")
        check_activation("GPT-2", self.activation_function)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> GPT2Config:
        """Return the configuration that a `config.json` holds.

        Raises:
          CheckpointError: a key or a value that this model cannot honour.
          ShapeError: sizes that are no positive integers, or do not fit each other.
        """
        if config.get("model_type", "gpt2") != "gpt2":
            raise CheckpointError(
                f"GPT-2 config: model_type is {config['model_type']!r}, and only "
                "'gpt2' is supported."
            )
        known, extra = read_keys("GPT-2", cls, config, _HARMLESS)
        return cls(**known, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """Return what belongs into `config.json`, the extra keys included."""
        fields = dataclasses.fields(self)
        own = {f.name: plain(getattr(self, f.name)) for f in fields}
        del own["generation"]
        head = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
        return dict(sorted({**head, **own.pop("extra"), **own}.items()))
