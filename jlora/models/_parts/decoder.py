"""What decoder-only models share: masks, positions, the cache, generation.

Letters in shapes: B batch, T queries, S keys, H query heads, G heads of keys and
values, D width of a head, d the residual stream, V the vocabulary, K beams, n the room
for new tokens, L room in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from jlora._errors import ShapeError
from jlora.models._parts.attention import Masking, fused
from jlora.models._parts.blocks import Configured
from jlora.models._parts.layers import MASKED, Embedding
from jlora.models._parts.segments import check_segments, keys_seen, positions_in

KeysValues = tuple[Array, Array]  # two of [B, G, S, D]
Past = Sequence[KeysValues] | None
Cache = dict[str, Any]


class QueryPlace(NamedTuple):
    """Where the queries stand among the keys.

    Attributes:
      positions: `[B, T]`, how many tokens of its sequence precede each one.
      first: where the first query stands among the keys; the others follow.
      keys: `[B, S]`, on where a key is a token and no padding; `None` where S is T and
        there is no padding.
      segments: `[B, T]`, which text of its row a token is of; `None` where rows are of
        one text. S is T.
    """

    positions: Array
    first: Array | int
    keys: Array | None
    segments: Array | None = None

    @property
    def seen(self) -> Array | None:
        """The keys that are to be seen before causality, `[B, 1 or T, S]`, or all."""
        return keys_seen(self.keys, self.segments, self.segments)


def positions_of(mask: Array) -> Array:
    """Return the position of every token of `mask` `[B, S]`; 0 at padding.

    >>> positions_of(jnp.array([[0, 0, 1, 1], [1, 1, 1, 0]]))
    Array([[0, 0, 0, 1],
           [0, 1, 2, 0]], dtype=int32)
    """
    mask = mask.astype(bool)
    return jnp.where(mask, jnp.cumsum(mask, axis=1) - 1, 0).astype(jnp.int32)


def visible(place: QueryPlace, window: int | None = None) -> Array:
    """Return the keys that each query may look at, `[B, T, S]`, B 1 without padding.

    Args:
      place: of queries and keys.
      window: how many keys, the query's own included; `None` is all before it.
    """
    T = place.positions.shape[1]
    S = T if place.keys is None else place.keys.shape[1]
    behind = place.first + jnp.arange(T)[:, None] - jnp.arange(S)[None]  # [T, S]
    near = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    near = near[None]
    return near if place.seen is None else near & place.seen


def attend(
    q: Array,
    kv: KeysValues,
    masking: Array | Masking,
    scale: Array | float,
    drop: Callable[[Array], Array],
    cap: float | None = None,
) -> Array:
    """Return softmax(scale · q·k)·v, `[B, T, H*D]`; scores and softmax in float32.

    Args:
      q: `[B, H, T, D]`; query heads share keys H/G at a time.
      kv: two of `[B, G, S, D]`.
      masking: from `DecoderModule.mask_for`; its form says how scores are computed.
      scale: of the scores.
      drop: dropout of the probabilities.
      cap: what the scores stay within, softly.
    """
    (B, H, T, D), (k, v) = q.shape, kv
    if isinstance(masking, Masking):
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        return fused(q, k, v, masking, scale=scale, cap=cap).reshape(B, T, H * D)
    q = q.reshape(B, k.shape[1], -1, T, D)  # [B, G, H/G, T, D]
    scores = jnp.einsum("bghtd,bgsd->bghts", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(masking[:, None, None], soft_cap(scale * scores, cap), MASKED)
    probs = drop(jax.nn.softmax(scores, axis=-1).astype(v.dtype))
    y = jnp.einsum("bghts,bgsd->bghtd", probs, v)
    return y.reshape(B, H, T, D).transpose(0, 2, 1, 3).reshape(B, T, H * D)


def soft_cap(x: Array, cap: float | None) -> Array:
    """Return cap·tanh(x/cap), which stays within ±cap; `None` returns `x`."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def heads(x: Array, number: int) -> Array:
    """[B, T, H*D] -> [B, H, T, D]."""
    B, T, _ = x.shape
    return x.reshape(B, T, number, -1).transpose(0, 2, 1, 3)


def remember(kv: KeysValues, past: KeysValues | None, index: Array | int) -> KeysValues:
    """Write `kv` into the cache of one layer at `index`; without a cache return it."""
    if past is None:
        return kv
    write = partial(lax.dynamic_update_slice_in_dim, start_index=index, axis=2)
    return write(past[0], kv[0]), write(past[1], kv[1])


class DecoderModule(Configured):
    """What the parts of a decoder share: layers as its configuration wants them."""

    def linear(self, features: int, *, bias: bool, scale: float = 1.0) -> nn.Dense:
        """Return a linear layer; `scale` is of the initial kernel."""
        return nn.Dense(
            features,
            use_bias=bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.normal(scale * self.config.initializer_range),
        )

    def table(self, rows: int, features: int) -> Embedding:
        """Return an embedding."""
        std = self.config.initializer_range
        return Embedding(rows, features, std, self.dtype, self.param_dtype)

    def mask_for(
        self,
        place: QueryPlace,
        past: Any,
        window: int | None = None,
        *,
        alike: bool = True,
    ) -> Array | Masking:
        """Return what `attend` wants to know of the keys that the queries see.

        Args:
          place: of queries and keys.
          past: a cache, with which attention is by einsum: `[B, T, S]`.
          window: how many keys, the query's own included; `None` is all before it.
          alike: whether all blocks have that window. In a scan of others it cannot be
            part of the program, and is a mask.
        """
        if past is not None or not self.fuses:
            return visible(place, window)
        if not alike:
            return self.masking(mask=visible(place, window), causal=True)
        return self.masking(mask=place.seen, causal=True, window=window)


class Decoder(DecoderModule):
    """A language model without an encoder.

    A family says in `hidden` what it computes, in `cache_shape` what it remembers of a
    token, and in `embedding` with which table a tied head multiplies.

    Attributes:
      config: sizes and choices.
      dtype: what it computes in. Norms, scores and softmax stay in float32.
      param_dtype: what `init` makes parameters in.
      scan_layers: whether blocks are scanned, and their parameters stacked.
      remat: whether the backward pass computes a block's activations again.
      attn_implementation: `"einsum"`, `"xla"` or `"cudnn"`, as in `Configured`.
    """

    def setup(self) -> None:
        """Declare the head where it is not the embedding; a family adds the rest."""
        if not self.config.tie_word_embeddings:
            self.lm_head = self.linear(self.config.vocab_size, bias=False)

    def hidden(
        self, input_ids: Array, place: QueryPlace, past: Past, deterministic: bool
    ) -> tuple[Array, list[KeysValues]]:
        """Return `[B, T, d]` after the last norm, and each layer's keys and values."""
        raise NotImplementedError

    def embedding(self) -> Embedding:
        """Return the table of tokens."""
        raise NotImplementedError

    def head(self, x: Array) -> Array:
        """[B, T, d] -> the logits [B, T, V]."""
        if self.config.tie_word_embeddings:
            return self.embedding().attend(x)
        return self.lm_head(x)

    def cache_shape(self) -> tuple[int, int, int]:
        """Return the number of layers, G and D."""
        raise NotImplementedError

    def check_room(self, length: int) -> None:
        """Refuse sequences that are longer than the model's positions reach."""

    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        deterministic: bool = True,
        segment_ids: Array | None = None,
    ) -> Array:
        """Return the logits of every position.

        Args:
          input_ids: `[B, T]`.
          attention_mask: `[B, T]`, 0 at padding on either side; `None` is no padding.
          position_ids: `[B, T]`; `None` counts the tokens of `attention_mask`, so
            that padding shifts nothing, and those of each segment from 0.
          deterministic: `False` drops out, and needs `rngs={"dropout": key}`.
          segment_ids: `[B, T]`, where several texts stand in a row, one behind the
            other, as `jlora.data.pack` has them: the number of each token's text.
            Tokens see those of their own alone.

        Returns:
          `[B, T, V]` in `dtype`; at padding they mean nothing.

        Raises:
          ShapeError: more tokens than the model has positions.
        """
        given = (input_ids, attention_mask, position_ids, deterministic, segment_ids)
        return self.head(self._last(*given))

    def features(self, *args: Any, **kwargs: Any) -> tuple[Array, Array]:
        """Return what goes into the head, and the head's kernel.

        `jlora.train.linear_cross_entropy` takes the two, and spares the logits. The
        arguments are those of `__call__`.

        Returns:
          `[B, T, d]` and `[d, V]`, both in `dtype`; of a tied head the embedding's
          table as it lies, `[V, d]`.

        Raises:
          ShapeError: more tokens than the model has positions.
          StructureError: the head is more than a product.
        """
        return self._last(*args, **kwargs), self.head_kernel()

    def head_kernel(self) -> Array:
        """Return the head's kernel `[d, V]`, or the tied embedding's table `[V, d]`.

        Raises:
          StructureError: the head is more than a product.
        """
        if self.config.tie_word_embeddings:
            return self.embedding().embedding.astype(self.dtype)
        return self.lm_head.get_variable("params", "kernel").astype(self.dtype)

    def _last(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        deterministic: bool = True,
        segment_ids: Array | None = None,
    ) -> Array:
        """Return `[B, T, d]` after the last norm, of whole sequences."""
        self.check_room(input_ids.shape[1])
        mask = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
        if mask.shape != input_ids.shape:
            raise ShapeError(
                f"attention_mask {mask.shape} must have the shape of input_ids "
                f"{input_ids.shape}: 1 at tokens, 0 at padding.\nWhat a token may see "
                "before it, the model knows by itself."
            )
        positions = position_ids
        if segment_ids is not None:
            check_segments("segment_ids", segment_ids, input_ids)
            positions = positions_in(segment_ids) if positions is None else positions
        positions = positions_of(mask) if positions is None else positions
        place = QueryPlace(positions, 0, attention_mask, segment_ids)
        return self.hidden(input_ids, place, None, deterministic)[0]

    def prefill(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        *,
        length: int,
        beams: int = 1,
        left: bool = False,
    ) -> tuple[Array, Cache]:
        """Read prompts up to their last tokens, and make room for n steps.

        Args:
          input_ids: `[B, S]`.
          attention_mask: `[B, S]`, 0 at padding on either side.
          length: n, the most tokens that will be fed: the last of the prompt, and what
            is generated.
          beams: K, how many sequences continue each prompt.
          left: padding is on the left already, so rows need not be turned.

        Returns:
          The last tokens `[B*K]`, to be fed next; and the cache. `beams` of it are
          each layer's keys and values, two of `[B*K, G, L, D]` (with scanned layers
          two of `[B*K, layers, G, L, D]`); `shared` is the place of the next token.

        Raises:
          ShapeError: prompt and new tokens are more than the model has positions.
        """
        B, S = input_ids.shape
        room = S - 1 + length
        self.check_room(room)
        mask = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
        ids, mask = input_ids, mask.astype(bool)
        if not left:
            ids, mask = padding_left(ids, mask)
        keys = jnp.concatenate([mask, jnp.ones((B, length - 1), bool)], axis=1)
        layers, G, D = self.cache_shape()
        past = self.empty(layers, (B, G, room, D))
        if S > 1:
            place = QueryPlace(positions_of(mask)[:, :-1], 0, keys)
            past = self.hidden(ids[:, :-1], place, past, True)[1]
        cache = {
            "beams": past,
            "shared": {"keys": keys, "next": jnp.sum(mask, axis=1) - 1},
        }
        cache = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), cache)
        cache["shared"]["index"] = jnp.int32(S - 1)
        return jnp.repeat(ids[:, -1], beams), cache

    def decode_step(self, input_ids: Array, cache: Cache) -> tuple[Array, Cache]:
        """Feed the next tokens; return the logits after each and the new cache.

        Args:
          input_ids: `[B*K, T]`, most often with T = 1.
          cache: from `prefill` or from the step before.

        Returns:
          `[B*K, T, V]`, and the cache that the next step takes.
        """
        shared, T = cache["shared"], input_ids.shape[1]
        positions = shared["next"][:, None] + jnp.arange(T)[None]
        place = QueryPlace(jnp.maximum(positions, 0), shared["index"], shared["keys"])
        x, past = self.hidden(input_ids, place, cache["beams"], True)
        moved = {"next": shared["next"] + T, "index": shared["index"] + T}
        return self.head(x), {"beams": past, "shared": {**shared, **moved}}


def padding_left(ids: Array, mask: Array) -> tuple[Array, Array]:
    """Turn each row so that padding on its right stands on its left."""
    S = ids.shape[1]
    shift = jnp.argmax(mask[:, ::-1], axis=1)  # [B], the padding on the right
    source = (jnp.arange(S)[None] - shift[:, None]) % S
    take = partial(jnp.take_along_axis, indices=source, axis=1)
    return take(ids), take(mask)
