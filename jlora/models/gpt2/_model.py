"""GPT-2 in Flax, with Hugging Face's names for the parameters.

`transformer.h.0.attn.c_attn.weight` is found at
`transformer/h/0/attn/c_attn/kernel`, and so on throughout: linear layers hold `kernel`
as [in, out], which for GPT-2 is the file's layout too; embeddings `embedding`, layer
norms `weight` and `bias`. Queries, keys and values are the thirds of `c_attn`.

Letters in shapes: B batch, T tokens, S keys, H heads, D width of a head, d the residual
stream, V the vocabulary.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from jlora._errors import ShapeError
from jlora.models._parts.attention import Masking
from jlora.models._parts.decoder import (
    Decoder,
    DecoderModule,
    KeysValues,
    Past,
    QueryPlace,
    attend,
    heads,
    remember,
)
from jlora.models._parts.layers import ACTIVATIONS, Embedding, LayerNorm


class GPT2Module(DecoderModule):
    """What the parts of a GPT-2 share."""

    def into_residual(self) -> nn.Dense:
        """Return a linear layer whose output is added to the residual stream."""
        # There are two a block: their sum shall not grow with the depth.
        scale = (2 * self.config.n_layer) ** -0.5
        return self.linear(self.config.n_embd, bias=True, scale=scale)

    def norm(self) -> LayerNorm:
        """Return a layer norm."""
        return LayerNorm(self.config.layer_norm_epsilon, self.dtype, self.param_dtype)


class Attention(GPT2Module):
    """Multi-head attention to the tokens before."""

    def setup(self) -> None:
        """Declare the projections."""
        self.c_attn = self.linear(3 * self.config.n_embd, bias=True)
        self.c_proj = self.into_residual()
        self.attn_dropout = nn.Dropout(self.config.attn_pdrop)
        self.resid_dropout = nn.Dropout(self.config.resid_pdrop)

    def __call__(
        self,
        x: Array,
        number: Array | int,
        masking: Array | Masking,
        past: KeysValues | None,
        index: Array | int,
        deterministic: bool,
    ) -> tuple[Array, KeysValues]:
        """Return `[B, T, d]`, and the keys and values that were attended to.

        `number` is the block's, from 0.
        """
        q, k, v = (
            heads(part, self.config.n_head)
            for part in jnp.split(self.c_attn(x), 3, axis=-1)
        )
        kv = remember((k, v), past, index)
        drop = self.dropping(self.attn_dropout, deterministic)
        y = attend(q, kv, masking, self.scale(q.shape[-1], number), drop)
        return self.resid_dropout(self.c_proj(y), deterministic=deterministic), kv

    def scale(self, width: int, number: Array | int) -> Array | float:
        """Return what the scores are multiplied by."""
        c = self.config
        scale = width**-0.5 if c.scale_attn_weights else 1.0
        if not c.scale_attn_by_inverse_layer_idx:
            return scale
        if isinstance(number, int):
            return scale / (number + 1)
        return scale / (number + 1).astype(jnp.float32)


class FeedForward(GPT2Module):
    """act(x·c_fc)·c_proj."""

    def setup(self) -> None:
        """Declare the projections."""
        c = self.config
        self.c_fc = self.linear(c.n_inner or 4 * c.n_embd, bias=True)
        self.c_proj = self.into_residual()
        self.dropout = nn.Dropout(c.resid_pdrop)

    def __call__(self, x: Array, deterministic: bool) -> Array:
        """[B, T, d] -> [B, T, d]."""
        h = ACTIVATIONS[self.config.activation_function](self.c_fc(x))
        return self.dropout(self.c_proj(h), deterministic=deterministic)


class Block(GPT2Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def setup(self) -> None:
        """Declare norms and layers."""
        self.ln_1 = self.norm()
        self.attn = self.part(Attention)()
        self.ln_2 = self.norm()
        self.mlp = self.part(FeedForward)()

    def __call__(
        self,
        x: Array,
        number: Array | int,
        masking: Array | Masking,
        past: KeysValues | None,
        index: Array | int,
        deterministic: bool,
    ) -> tuple[Array, KeysValues]:
        """Return `[B, T, d]`, and the keys and values that were attended to."""
        h, kv = self.attn(self.ln_1(x), number, masking, past, index, deterministic)
        x = x + h
        return x + self.mlp(self.ln_2(x), deterministic), kv


class Stack(GPT2Module):
    """Embeddings, blocks, and the norm after them."""

    def setup(self) -> None:
        """Declare the parts."""
        c = self.config
        self.wte = self.table(c.vocab_size, c.n_embd)
        self.wpe = self.table(c.n_positions, c.n_embd)
        self.drop = nn.Dropout(c.embd_pdrop)
        self.h = self.blocks([self.part(Block)] * c.n_layer)
        self.ln_f = self.norm()

    def __call__(
        self, input_ids: Array, place: QueryPlace, past: Past, deterministic: bool
    ) -> tuple[Array, list[KeysValues]]:
        """Return `[B, T, d]`, and each block's keys and values."""
        x = self.wte(input_ids) + self.wpe(place.positions)
        x = self.drop(x, deterministic=deterministic)
        masking, length = self.mask_for(place, past), self.config.n_layer

        def step(block: Any, x: Array, past: Any, number: Any) -> tuple[Array, Any]:
            return block(x, number, masking, past, place.first, deterministic)

        numbers = jnp.arange(length) if self.scan_layers else range(length)
        x, kept = self.run_blocks(
            self.h, step, x, length=length, past=past, own=numbers
        )
        return self.ln_f(x), kept


class GPT2(Decoder):
    """A GPT-2 with its language-model head.

    Attributes:
      config: sizes and choices, a `GPT2Config`.
      dtype: what it computes in. Norms, scores and softmax stay in float32.
      param_dtype: what `init` makes parameters in.
      scan_layers: whether blocks are scanned, and their parameters stacked.
      remat: whether the backward pass computes a block's activations again.
      attn_implementation: `"einsum"`, `"xla"` or `"cudnn"`, as in `Configured`.
    """

    def setup(self) -> None:
        """Declare the stack, beside the head."""
        super().setup()
        self.transformer = self.part(Stack)()

    def hidden(
        self, input_ids: Array, place: QueryPlace, past: Past, deterministic: bool
    ) -> tuple[Array, list[KeysValues]]:
        """Return `[B, T, d]` after the last norm, and each block's keys and values."""
        return self.transformer(input_ids, place, past, deterministic)

    def embedding(self) -> Embedding:
        """Return the table of tokens."""
        return self.transformer.wte

    def torch_names(self) -> dict[str, tuple[str, ...]]:
        """Return what PyTorch calls the users of the embedding, by its path.

        A name that ends in ".T" is of a head that multiplies with the table.
        """
        head = ("lm_head.T",) if self.config.tie_word_embeddings else ()
        return {"transformer/wte": ("transformer.wte", *head)}

    def cache_shape(self) -> tuple[int, int, int]:
        """Return the number of blocks, H and D."""
        c = self.config
        return c.n_layer, c.n_head, c.n_embd // c.n_head

    def check_room(self, length: int) -> None:
        """Refuse sequences that are longer than the table of positions."""
        if length > self.config.n_positions:
            raise ShapeError(
                f"{length} tokens (prompt, padding and new ones together), and this "
                f"GPT-2 has n_positions={self.config.n_positions}.\nShorten the "
                "texts, or lower max_new_tokens."
            )
