"""The layers of a BERT or RoBERTa: embeddings, attention, feed-forward, block.

Letters in shapes: B batch, S tokens, H heads, D width of a head, d the residual
stream, f the feed-forward layer, V the vocabulary.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jlora.models._parts.attention import Masking, fused
from jlora.models._parts.blocks import Configured
from jlora.models._parts.layers import ACTIVATIONS, Embedding, LayerNorm
from jlora.models._parts.segments import positions_in
from jlora.models.bert._config import BertConfig


class BertModule(Configured):
    """What the parts of a BERT share: layers as its configuration wants them."""

    def linear(self, features: int) -> nn.Dense:
        """Return a linear layer with bias."""
        return nn.Dense(
            features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.normal(self.config.initializer_range),
        )

    def table(self, rows: int) -> Embedding:
        """Return an embedding `[rows, d]`."""
        c = self.config
        std = c.initializer_range
        return Embedding(rows, c.hidden_size, std, self.dtype, self.param_dtype)

    def norm(self) -> LayerNorm:
        """Return a layer norm."""
        return LayerNorm(self.config.layer_norm_eps, self.dtype, self.param_dtype)

    def dropout(self) -> nn.Dropout:
        """Return the dropout of hidden states."""
        return nn.Dropout(self.config.hidden_dropout_prob)

    def classifier_dropout(self) -> nn.Dropout:
        """Return the dropout before a classifier."""
        rate = self.config.classifier_dropout
        return nn.Dropout(self.config.hidden_dropout_prob if rate is None else rate)

    def vocabulary_bias(self) -> Array:
        """Declare `bias` `[V]`, which a tied decoder adds."""
        shape = (self.config.vocab_size,)
        return self.param("bias", nn.initializers.zeros, shape, self.param_dtype)


def positions(
    input_ids: Array, config: BertConfig, segment_ids: Array | None = None
) -> Array:
    """Return each token's row of the position table.

    BERT numbers the columns, `[1, S]`. RoBERTa, `[B, S]`, counts the tokens that are no
    padding, from the row after the padding's own, which padding takes. Of several
    texts in a row, both count in each from its beginning.

    >>> config = BertConfig(model_type="roberta", pad_token_id=1)
    >>> positions(jnp.array([[1, 0, 7, 2, 1]]), config)
    Array([[1, 2, 3, 4, 1]], dtype=int32)
    """
    if segment_ids is not None:
        return positions_in(segment_ids) + config.first_position
    if not config.roberta:
        return jnp.arange(input_ids.shape[1])[None]
    padding = config.first_position - 1
    kept = jnp.not_equal(input_ids, padding).astype(jnp.int32)
    return jnp.cumsum(kept, axis=1) * kept + padding


class Embeddings(BertModule):
    """norm(words + token types + positions)."""

    def setup(self) -> None:
        """Declare tables and norm."""
        c = self.config
        self.word_embeddings = self.table(c.vocab_size)
        self.position_embeddings = self.table(c.max_position_embeddings)
        self.token_type_embeddings = self.table(c.type_vocab_size)
        self.LayerNorm = self.norm()
        self.drop = self.dropout()

    def __call__(
        self,
        input_ids: Array,
        token_type_ids: Array | None,
        deterministic: bool,
        segment_ids: Array | None = None,
    ) -> Array:
        """Return `[B, S, d]` for three of `[B, S]`; no token types are type 0."""
        if token_type_ids is None:
            token_type_ids = jnp.zeros((1, 1), jnp.int32)
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        x = x + self.position_embeddings(positions(input_ids, self.config, segment_ids))
        return self.drop(self.LayerNorm(x), deterministic=deterministic)


class SelfAttention(BertModule):
    """Multi-head attention without its output projection."""

    def setup(self) -> None:
        """Declare the projections."""
        c = self.config
        self.query = self.linear(c.hidden_size)
        self.key = self.linear(c.hidden_size)
        self.value = self.linear(c.hidden_size)
        self.drop = nn.Dropout(c.attention_probs_dropout_prob)

    def heads(self, x: Array) -> Array:
        """[B, S, d] -> [B, S, H, D]."""
        return x.reshape(*x.shape[:2], self.config.num_attention_heads, -1)

    def __call__(
        self, x: Array, masking: Array | Masking | None, deterministic: bool
    ) -> Array:
        """[B, S, d] -> [B, S, d]; `masking` is from `Configured.masking_of`."""
        drop = self.dropping(self.drop, deterministic)
        parts = (self.query(x), self.key(x), self.value(x))
        q, k, v = (self.heads(part) for part in parts)
        scale = q.shape[-1] ** -0.5
        if isinstance(masking, Masking):
            return fused(q, k, v, masking, scale=scale).reshape(x.shape)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        scores = scores * scale
        if masking is not None:
            scores = scores + masking
        probs = drop(jax.nn.softmax(scores, axis=-1).astype(self.dtype))
        return jnp.einsum("bhqk,bkhd->bqhd", probs, v).reshape(x.shape)


class Output(BertModule):
    """norm(residual + dense(x)): the end of attention, and of feed-forward."""

    def setup(self) -> None:
        """Declare projection and norm."""
        self.dense = self.linear(self.config.hidden_size)
        self.LayerNorm = self.norm()
        self.drop = self.dropout()

    def __call__(self, x: Array, residual: Array, deterministic: bool) -> Array:
        """[B, S, d or f] -> [B, S, d]; `residual` is `[B, S, d]`."""
        x = self.drop(self.dense(x), deterministic=deterministic)
        return self.LayerNorm(x + residual)


class Attention(BertModule):
    """Attention with output projection, residual and norm."""

    def setup(self) -> None:
        """Declare the two halves, under Hugging Face's names."""
        self.self = self.part(SelfAttention)()
        self.output = self.part(Output)()

    def __call__(
        self, x: Array, masking: Array | Masking | None, deterministic: bool
    ) -> Array:
        """[B, S, d] -> [B, S, d]."""
        return self.output(self.self(x, masking, deterministic), x, deterministic)


class Intermediate(BertModule):
    """act(dense), the first half of feed-forward."""

    def setup(self) -> None:
        """Declare the projection."""
        self.dense = self.linear(self.config.intermediate_size)

    def __call__(self, x: Array) -> Array:
        """[B, S, d] -> [B, S, f]."""
        return ACTIVATIONS[self.config.hidden_act](self.dense(x))


class Layer(BertModule):
    """One block: attention, then feed-forward, each normalised after its residual."""

    def setup(self) -> None:
        """Declare the parts."""
        self.attention = self.part(Attention)()
        self.intermediate = self.part(Intermediate)()
        self.output = self.part(Output)()

    def __call__(
        self, x: Array, masking: Array | Masking | None, deterministic: bool
    ) -> Array:
        """[B, S, d] -> [B, S, d]."""
        x = self.attention(x, masking, deterministic)
        return self.output(self.intermediate(x), x, deterministic)
