"""The Llama family in Flax, with Hugging Face's names.

Llama 2 and 3, Mistral, Qwen2 and 3, Gemma 1 to 3, Mixtral and Qwen's mixtures of
experts are one definition; what one has and another lacks, their configurations say.

`model.layers.0.self_attn.q_proj.weight` is found at
`model/layers/0/self_attn/q_proj/kernel`, and so on throughout: linear layers hold
`kernel` as [in, out], embeddings `embedding`, norms `weight`.

Letters in shapes: B batch, T tokens, S keys, H query heads, G heads of keys and values,
D width of a head, d the residual stream, V the vocabulary.

Source: Touvron et al. 2023, arXiv:2307.09288; Jiang et al. 2023, arXiv:2310.06825
(sliding window); Yang et al. 2024 and 2025, arXiv:2407.10671 and 2505.09388; Gemma Team
2024 and 2025, arXiv:2408.00118 and 2503.19786.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from jlora._errors import StructureError
from jlora.models._parts.attention import Masking
from jlora.models._parts.blocks import of_kind
from jlora.models._parts.decoder import (
    Decoder,
    KeysValues,
    Past,
    QueryPlace,
    attend,
    heads,
    remember,
    soft_cap,
)
from jlora.models._parts.layers import Embedding
from jlora.models._parts.rope import turn, turning
from jlora.models.llama._config import SLIDING
from jlora.models.llama._feed_forward import FeedForward, LlamaModule, Mixture


class View(NamedTuple):
    """How the queries of one kind of layer see the keys.

    Attributes:
      turns: cosine and sine of the positions, two of `[B, 1, T, D/2]`.
      masking: which keys a query may look at, as `attend` takes it.
    """

    turns: tuple[Array, Array]
    masking: Array | Masking


class Attention(LlamaModule):
    """Attention to the tokens before, query heads sharing heads of keys and values."""

    def setup(self) -> None:
        """Declare the projections, and norms of queries and keys where there are."""
        c = self.config
        bias = c.attention_bias
        linear = partial(self.linear, bias=bias or c.kind.qkv_bias)
        self.q_proj = linear(c.num_attention_heads * c.head_dim)
        self.k_proj = linear(c.num_key_value_heads * c.head_dim)
        self.v_proj = linear(c.num_key_value_heads * c.head_dim)
        self.o_proj = self.linear(c.hidden_size, bias=bias)
        if c.kind.qk_norm:
            self.q_norm, self.k_norm = self.rms_norm(), self.rms_norm()
        self.drop = nn.Dropout(c.attention_dropout)

    def __call__(
        self,
        x: Array,
        view: View,
        past: KeysValues | None,
        index: Array | int,
        deterministic: bool,
    ) -> tuple[Array, KeysValues]:
        """Return `[B, T, d]`, and the keys and values that were attended to."""
        c = self.config
        q = heads(self.q_proj(x), c.num_attention_heads)
        k = heads(self.k_proj(x), c.num_key_value_heads)
        v = heads(self.v_proj(x), c.num_key_value_heads)
        if c.kind.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        kv = remember((turn(k, view.turns), v), past, index)
        drop = self.dropping(self.drop, deterministic)
        q = turn(q, view.turns)
        y = attend(q, kv, view.masking, c.score_scale, drop, c.score_cap)
        return self.o_proj(y), kv


class Layer(LlamaModule):
    """x + attention(norm(x)), then x + feed_forward(norm(x)).

    Where norms stand around the layers, what is added passes through one, too; then
    `post_attention_layernorm` is the norm behind attention, elsewhere the one after it.
    """

    sparse: bool = False

    def setup(self) -> None:
        """Declare norms and layers."""
        c = self.config
        self.input_layernorm = self.rms_norm()
        self.self_attn = self.part(Attention)()
        self.post_attention_layernorm = self.rms_norm()
        if c.kind.around:
            self.pre_feedforward_layernorm = self.rms_norm()
            self.post_feedforward_layernorm = self.rms_norm()
        dense = self.part(FeedForward, width=c.intermediate_size)
        self.mlp = self.part(Mixture)() if self.sparse else dense()

    def __call__(self, x: Array, *args: Any) -> tuple[Array, KeysValues]:
        """Return `[B, T, d]`, and keys and values; takes what `Attention` takes."""
        h, kv = self.self_attn(self.input_layernorm(x), *args)
        if not self.config.kind.around:
            x = x + h
            return x + self.mlp(self.post_attention_layernorm(x)), kv
        x = x + self.post_attention_layernorm(h)
        h = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(h), kv


class Stack(LlamaModule):
    """Embedding, layers, and the norm after them."""

    def setup(self) -> None:
        """Declare the parts."""
        c = self.config
        self.embed_tokens = self.table(c.vocab_size, c.hidden_size)
        sparse = [c.is_sparse(i) for i in range(c.num_hidden_layers)]
        if self.scan_layers and len(set(sparse)) > 1:
            raise StructureError(
                f"scan_layers=True: of {len(sparse)} layers {sum(sparse)} choose among "
                "experts, and a scan needs them alike.\nLeave scan_layers off."
            )
        self.layers = self.blocks([self.part(Layer, sparse=each) for each in sparse])
        self.norm = self.rms_norm()

    def __call__(
        self, input_ids: Array, place: QueryPlace, past: Past, deterministic: bool
    ) -> tuple[Array, list[KeysValues]]:
        """Return `[B, T, d]`, and each layer's keys and values."""
        c, x = self.config, self.embed_tokens(input_ids)
        if c.kind.centred:
            x = x * jnp.asarray(c.hidden_size**0.5, x.dtype)
        views = {
            kind: self.view(kind, place, past) for kind in sorted({*c.layer_types})
        }
        kinds, view_of = of_kind(views, c.layer_types, self.scan_layers)

        def step(layer: Any, x: Array, past: Any, kind: Any) -> tuple[Array, Any]:
            return layer(x, view_of(kind), past, place.first, deterministic)

        x, kept = self.run_blocks(
            self.layers, step, x, length=c.num_hidden_layers, past=past, own=kinds
        )
        return self.norm(x), kept

    def view(self, kind: str, place: QueryPlace, past: Past) -> View:
        """Return how the queries of that kind of layer see the keys."""
        c = self.config
        turns = turning(c.ropes[kind], place.positions, c.head_dim)
        window = c.sliding_window if kind == SLIDING else None
        alike = not self.scan_layers or len({*c.layer_types}) == 1
        return View(turns, self.mask_for(place, past, window, alike=alike))


class Llama(Decoder):
    """A model of the Llama family with its language-model head.

    Attributes:
      config: sizes and choices: a `LlamaConfig`, `GemmaConfig` or `MoeConfig`.
      dtype: what it computes in. Norms, angles, scores and softmax stay in float32.
      param_dtype: what `init` makes parameters in.
      scan_layers: whether blocks are scanned, and their parameters stacked.
      remat: whether the backward pass computes a block's activations again.
      attn_implementation: `"einsum"`, `"xla"` or `"cudnn"`, as in `Configured`.
    """

    def setup(self) -> None:
        """Declare the stack, beside the head."""
        super().setup()
        self.model = self.part(Stack)()

    def hidden(
        self, input_ids: Array, place: QueryPlace, past: Past, deterministic: bool
    ) -> tuple[Array, list[KeysValues]]:
        """Return `[B, T, d]` after the last norm, and each layer's keys and values."""
        return self.model(input_ids, place, past, deterministic)

    def embedding(self) -> Embedding:
        """Return the table of tokens."""
        return self.model.embed_tokens

    def head(self, x: Array) -> Array:
        """[B, T, d] -> the logits [B, T, V]."""
        return soft_cap(super().head(x), self.config.logit_cap)

    def torch_names(self) -> dict[str, tuple[str, ...]]:
        """Return what PyTorch calls the users of the embedding, by its path.

        A name that ends in ".T" is of a head that multiplies with the table.
        """
        head = ("lm_head.T",) if self.config.tie_word_embeddings else ()
        return {"model/embed_tokens": ("model.embed_tokens", *head)}

    def head_kernel(self) -> Array:
        """Return the head's kernel `[d, V]`, where no cap follows it."""
        if self.config.logit_cap is not None:
            raise StructureError(
                f"{self.config.model_type} caps its logits at {self.config.logit_cap}, "
                "so its head is more than a product.\nTake the logits: call the model, "
                "and jlora.train.cross_entropy."
            )
        return super().head_kernel()

    def cache_shape(self) -> tuple[int, int, int]:
        """Return the number of layers, G and D."""
        c = self.config
        return c.num_hidden_layers, c.num_key_value_heads, c.head_dim
