"""Llama 2 and 3, Mistral, Qwen2 and Qwen3 in Flax, with Hugging Face's names.

`model.layers.0.self_attn.q_proj.weight` is found at
`model/layers/0/self_attn/q_proj/kernel`, and so on throughout: linear layers hold
`kernel` as [in, out], embeddings `embedding`, norms `weight`. What a family has and
another has not is in `_llama_config.KINDS`.

Letters in shapes: B batch, T tokens, S keys, H query heads, G heads of keys and values,
D width of a head, d the residual stream, V the vocabulary.

Source: Touvron et al. 2023, arXiv:2307.09288; Jiang et al. 2023, arXiv:2310.06825
(sliding window); Yang et al. 2024 and 2025, arXiv:2407.10671 and 2505.09388.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
from jax import Array

from jlora.models._decoder import (
    Decoder,
    KeysValues,
    Part,
    Past,
    Place,
    attend,
    heads,
    remember,
    visible,
)
from jlora.models._layers import ACTIVATIONS, Numbered, RMSNorm
from jlora.models._llama_config import FULL, SLIDING
from jlora.models._rope import turn, turning


class LlamaPart(Part):
    """What the parts of a Llama share."""

    def rms_norm(self) -> RMSNorm:
        """Return a norm."""
        return RMSNorm(self.config.rms_norm_eps, self.dtype, self.param_dtype)


class Attention(LlamaPart):
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
        turns: tuple[Array, Array],
        seen: Array,
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
        kv = remember((turn(k, turns), v), past, index)
        drop = partial(self.drop, deterministic=deterministic)
        y = attend(turn(q, turns), kv, seen, q.shape[-1] ** -0.5, drop)
        return self.o_proj(y), kv


class FeedForward(LlamaPart):
    """(act(x·gate) * x·up)·down."""

    def setup(self) -> None:
        """Declare the projections."""
        c = self.config
        self.gate_proj = self.linear(c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = self.linear(c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = self.linear(c.hidden_size, bias=c.mlp_bias)

    def __call__(self, x: Array) -> Array:
        """[B, T, d] -> [B, T, d]."""
        act = ACTIVATIONS[self.config.hidden_act]
        return self.down_proj(act(self.gate_proj(x)) * self.up_proj(x))


class Layer(LlamaPart):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def setup(self) -> None:
        """Declare norms and layers."""
        self.input_layernorm = self.rms_norm()
        self.self_attn = self.part(Attention)()
        self.post_attention_layernorm = self.rms_norm()
        self.mlp = self.part(FeedForward)()

    def __call__(self, x: Array, *args: Any) -> tuple[Array, KeysValues]:
        """Return `[B, T, d]`, and keys and values; takes what `Attention` takes."""
        h, kv = self.self_attn(self.input_layernorm(x), *args)
        x = x + h
        return x + self.mlp(self.post_attention_layernorm(x)), kv


class Stack(LlamaPart):
    """Embedding, layers, and the norm after them."""

    def setup(self) -> None:
        """Declare the parts."""
        c = self.config
        self.embed_tokens = self.table(c.vocab_size, c.hidden_size)
        self.layers = Numbered((self.part(Layer),) * c.num_hidden_layers)
        self.norm = self.rms_norm()

    def __call__(
        self, input_ids: Array, place: Place, past: Past, deterministic: bool
    ) -> tuple[Array, list[KeysValues]]:
        """Return `[B, T, d]`, and each layer's keys and values."""
        c, x = self.config, self.embed_tokens(input_ids)
        turns = turning(c.rope, place.positions, c.head_dim)
        windows = {FULL: None, SLIDING: c.sliding_window}
        seen = {
            name: visible(place, windows[name]) for name in sorted({*c.layer_types})
        }
        kept = []
        for i, layer in enumerate(self.layers.items):
            own = None if past is None else past[i]
            sees = seen[c.layer_types[i]]
            x, kv = layer(x, turns, sees, own, place.first, deterministic)
            kept.append(kv)
        return self.norm(x), kept


class Llama(Decoder):
    """A model of the Llama family with its language-model head.

    Attributes:
      config: sizes and choices, a `LlamaConfig`.
      dtype: what it computes in. Norms, angles, scores and softmax stay in float32.
      param_dtype: what `init` makes parameters in.
    """

    def setup(self) -> None:
        """Declare the stack, and the head where it is not the embedding."""
        self.model = self.part(Stack)()
        if not self.config.tie_word_embeddings:
            self.lm_head = self.linear(self.config.vocab_size, bias=False)

    def hidden(
        self, input_ids: Array, place: Place, past: Past, deterministic: bool
    ) -> tuple[Array, list[KeysValues]]:
        """Return `[B, T, d]` after the last norm, and each layer's keys and values."""
        return self.model(input_ids, place, past, deterministic)

    def head(self, x: Array) -> Array:
        """[B, T, d] -> the logits [B, T, V]."""
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.attend(x)
        return self.lm_head(x)

    def torch_names(self) -> dict[str, tuple[str, ...]]:
        """Return what PyTorch calls the users of the embedding, by its path.

        A name that ends in ".T" is of a head that multiplies with the table.
        """
        head = ("lm_head.T",) if self.config.tie_word_embeddings else ()
        return {"model/embed_tokens": ("model.embed_tokens", *head)}

    def cache_shape(self) -> tuple[int, int, int]:
        """Return the number of layers, G and D."""
        c = self.config
        return c.num_hidden_layers, c.num_key_value_heads, c.head_dim
