"""The layers of a T5: norm, embedding, attention, feed-forward, block.

Letters in shapes: B batch, T queries, S keys, H heads, D width of a head,
d the residual stream, V the vocabulary, L room in the cache.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jlora.models._parts.attention import Masking, fused
from jlora.models._parts.blocks import Configured
from jlora.models._parts.layers import ACTIVATIONS, MASKED, Embedding, Numbered, RMSNorm

KeysValues = tuple[Array, Array]  # two of [B, H, S, D]


def position_buckets(
    offsets: np.ndarray, *, bidirectional: bool, buckets: int, max_distance: int
) -> np.ndarray:
    """Return the bucket of each offset (key position minus query position).

    Near offsets have a bucket each, far ones share logarithmically wider ones. The
    positions are known when the model is traced, so this is NumPy: the compiled
    program sees constants.

    Args:
      offsets: integers of any shape.
      bidirectional: whether keys after the query have buckets of their own.
      buckets: number of buckets, both directions together.
      max_distance: from here on every offset falls into the last bucket.

    Returns:
      Bucket numbers, the shape of `offsets`.
    """
    first = np.zeros_like(offsets)
    if bidirectional:
        buckets //= 2
        first = np.where(offsets > 0, buckets, 0)
        distance = np.abs(offsets)
    else:
        distance = np.maximum(-offsets, 0)
    exact = buckets // 2
    # float32 step by step: the reference rounds there, and buckets change at integers.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(np.log(max_distance / exact))
    far = exact + (ratio * np.float32(buckets - exact)).astype(np.int64)
    far = np.minimum(far, buckets - 1)
    return first + np.where(distance < exact, distance, far)


class T5Module(Configured):
    """What the parts of a T5 share: layers as its configuration wants them."""

    def linear(self, features: int, std: float) -> nn.Dense:
        """Return a linear layer without bias."""
        return nn.Dense(
            features,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.normal(std * self.config.initializer_factor),
        )

    def table(self, rows: int, features: int, std: float) -> Embedding:
        """Return an embedding."""
        std = std * self.config.initializer_factor
        return Embedding(rows, features, std, self.dtype, self.param_dtype)

    def norm(self) -> RMSNorm:
        """Return a layer norm."""
        return RMSNorm(self.config.layer_norm_epsilon, self.dtype, self.param_dtype)

    def dropout(self) -> nn.Dropout:
        """Return the dropout layer, the same everywhere."""
        return nn.Dropout(self.config.dropout_rate)


class Attention(T5Module):
    """Multi-head attention, its scores not scaled: the initialisation does that."""

    relative: bool = False  # holds the position bias for its whole stack

    def setup(self) -> None:
        """Declare the projections."""
        c = self.config
        inner = c.num_heads * c.d_kv
        self.q = self.linear(inner, (c.d_model * c.d_kv) ** -0.5)
        self.k = self.linear(inner, c.d_model**-0.5)
        self.v = self.linear(inner, c.d_model**-0.5)
        self.o = self.linear(c.d_model, inner**-0.5)
        self.drop = self.dropout()
        if self.relative:
            self.relative_attention_bias = self.table(
                c.relative_attention_num_buckets, c.num_heads, c.d_model**-0.5
            )

    def heads(self, x: Array) -> Array:
        """[B, S, H*D] -> [B, H, S, D]."""
        B, S, _ = x.shape
        x = x.reshape(B, S, self.config.num_heads, self.config.d_kv)
        return x.transpose(0, 2, 1, 3)

    def keys_values(self, x: Array) -> KeysValues:
        """Return the keys and values of `x` `[B, S, d]`."""
        return self.heads(self.k(x)), self.heads(self.v(x))

    def __call__(
        self,
        x: Array,
        kv: KeysValues,
        masking: Array | Masking | None,
        deterministic: bool,
    ) -> Array:
        """Return `[B, T, d]`: `x` `[B, T, d]` attends to `kv`.

        `masking` carries positions and masks: an array is added to the scores
        `[B, H, T, S]`.
        """
        B, T, _ = x.shape
        q, (k, v) = self.heads(self.q(x)), kv
        drop = self.dropping(self.drop, deterministic)
        if isinstance(masking, Masking):
            q, k, v = (part.swapaxes(1, 2) for part in (q, k, v))
            return self.o(fused(q, k, v, masking, scale=1.0).reshape(B, T, -1))
        scores = jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=jnp.float32)
        if masking is not None:
            scores = scores + masking
        probs = drop(jax.nn.softmax(scores, axis=-1).astype(self.dtype))
        y = jnp.einsum("bhts,bhsd->bhtd", probs, v)
        return self.o(y.transpose(0, 2, 1, 3).reshape(B, T, -1))

    def offset_bias(
        self, queries: int, keys: int, *, causal: bool, hide: bool
    ) -> Array:
        """Return the bias of every offset, -(queries-1) to keys-1: `[H, T+S-1]`.

        The bias depends on the offset alone; `spread_bias` lays it out as `[T, S]`. It
        hides keys after the query where `hide` is on.
        """
        c, offsets = self.config, np.arange(1 - queries, keys)
        buckets = position_buckets(
            offsets,
            bidirectional=not causal,
            buckets=c.relative_attention_num_buckets,
            max_distance=c.relative_attention_max_distance,
        )
        bias = self.relative_attention_bias(jnp.asarray(buckets)).astype(jnp.float32).T
        return jnp.where((offsets > 0)[None], MASKED, bias) if hide else bias


def spread_bias(by_offset: Array, positions: Array | np.ndarray, keys: int) -> Array:
    """Lay out `offset_bias` for queries at `positions` `[T]`: `[1, H, T, S]`."""
    zero = by_offset.shape[-1] - keys  # where offset 0 stands
    offsets = np.arange(keys)[None] - positions[:, None]
    return jnp.take(by_offset, zero + offsets, axis=1, mode="clip")[None]


class SelfAttentionLayer(T5Module):
    """x + attention(norm(x)), over x itself."""

    relative: bool = False

    def setup(self) -> None:
        """Declare norm and attention."""
        self.SelfAttention = self.part(Attention, relative=self.relative)()
        self.layer_norm = self.norm()
        self.drop = self.dropout()

    def __call__(
        self,
        x: Array,
        masking: Array | Masking,
        deterministic: bool,
        past: KeysValues | None = None,
        index: Array | int = 0,
    ) -> tuple[Array, KeysValues]:
        """Return `[B, T, d]` and the keys and values that were attended to.

        With `past` (two of `[B, H, L, D]`) those of `x` are written into it at `index`.
        """
        h = self.layer_norm(x)
        kv = self.SelfAttention.keys_values(h)
        if past is not None:
            write = partial(lax.dynamic_update_slice_in_dim, start_index=index, axis=2)
            kv = write(past[0], kv[0]), write(past[1], kv[1])
        h = self.SelfAttention(h, kv, masking, deterministic)
        return x + self.drop(h, deterministic=deterministic), kv


class CrossAttentionLayer(T5Module):
    """x + attention(norm(x)), over the encoder's output."""

    def setup(self) -> None:
        """Declare norm and attention."""
        self.EncDecAttention = self.part(Attention)()
        self.layer_norm = self.norm()
        self.drop = self.dropout()

    def __call__(
        self,
        x: Array,
        kv: KeysValues,
        masking: Array | Masking | None,
        deterministic: bool,
    ) -> Array:
        """Return `[B, T, d]`; `kv` may hold fewer rows, each for B/rows beams."""
        # Neither order nor causality matters to cross-attention, so beams over one
        # sentence are further queries of it: its keys and values are held once.
        h = self.layer_norm(x).reshape(kv[0].shape[0], -1, x.shape[-1])
        h = self.EncDecAttention(h, kv, masking, deterministic).reshape(x.shape)
        return x + self.drop(h, deterministic=deterministic)


class FeedForward(T5Module):
    """act(x·wi)·wo, or (act(x·wi_0) * x·wi_1)·wo where gated."""

    def setup(self) -> None:
        """Declare the projections."""
        c = self.config
        if c.gated:
            self.wi_0 = self.linear(c.d_ff, c.d_model**-0.5)
            self.wi_1 = self.linear(c.d_ff, c.d_model**-0.5)
        else:
            self.wi = self.linear(c.d_ff, c.d_model**-0.5)
        self.wo = self.linear(c.d_model, c.d_ff**-0.5)
        self.drop = self.dropout()

    def __call__(self, x: Array, deterministic: bool) -> Array:
        """[B, T, d] -> [B, T, d]."""
        act = ACTIVATIONS[self.config.dense_act_fn]
        h = act(self.wi_0(x)) * self.wi_1(x) if self.config.gated else act(self.wi(x))
        return self.wo(self.drop(h, deterministic=deterministic))


class FeedForwardLayer(T5Module):
    """x + feed_forward(norm(x))."""

    def setup(self) -> None:
        """Declare norm and feed-forward."""
        self.DenseReluDense = self.part(FeedForward)()
        self.layer_norm = self.norm()
        self.drop = self.dropout()

    def __call__(self, x: Array, deterministic: bool) -> Array:
        """[B, T, d] -> [B, T, d]."""
        h = self.DenseReluDense(self.layer_norm(x), deterministic)
        return x + self.drop(h, deterministic=deterministic)


class Block(T5Module):
    """The layers of one block: attention (to itself, to the encoder), feed-forward."""

    decoder: bool = False
    relative: bool = False

    def setup(self) -> None:
        """Declare the layers."""
        first = self.part(SelfAttentionLayer, relative=self.relative)
        cross = [self.part(CrossAttentionLayer)] if self.decoder else []
        self.layer = Numbered((first, *cross, self.part(FeedForwardLayer)))


class ScannedBlock(Block):
    """The block that is scanned, and beside it what the first block alone holds.

    The position bias keeps its path, `block/0/layer/0/SelfAttention/...`, and stays
    unstacked; all else is at `block/layer/...`.
    """

    def setup(self) -> None:
        """Declare the layers, and a block of which the position bias alone is used."""
        super().setup()
        self.first = self.part(Block, relative=True)(name="0")
