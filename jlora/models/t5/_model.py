"""T5 v1.0, v1.1 and FLAN-T5 in Flax, with Hugging Face's names for the parameters.

`encoder.block.0.layer.0.SelfAttention.q.weight` is found at
`encoder/block/0/layer/0/SelfAttention/q/kernel`, and so on throughout: linear layers
hold `kernel` as [in, out], embeddings `embedding`, layer norms `weight`.

Letters in shapes: B batch, T queries, S keys, H heads, D width of a head,
d the residual stream, V the vocabulary, L room in the cache.

Source: Raffel et al. 2020, arXiv:1910.10683; v1.1's gated feed-forward layer is from
Shazeer 2020, arXiv:2002.05202.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jlora._errors import ShapeError
from jlora.models._parts.attention import Masking
from jlora.models._parts.layers import Numbered, mask_bias
from jlora.models._parts.segments import check_segments, keys_seen, positions_in
from jlora.models.t5._config import T5Config
from jlora.models.t5._layers import (
    Block,
    KeysValues,
    ScannedBlock,
    T5Module,
    spread_bias,
)

Cache = dict[str, Any]


def shift_right(
    labels: Array, config: T5Config, segment_ids: Array | None = None
) -> Array:
    """Return the decoder's inputs for `labels`: one step later, start token first.

    Args:
      labels: `[B, T]` target tokens; -100 marks positions that the loss ignores.
      config: names the start token and the padding that takes the place of -100.
      segment_ids: `[B, T]`, of several targets in a row: each begins with the start
        token.

    Returns:
      `[B, T]`, the dtype of `labels`.

    >>> shift_right(jnp.array([[5, 6, 1, -100]]), T5Config())
    Array([[0, 5, 6, 1]], dtype=int32)
    """
    start = jnp.full_like(labels[:, :1], config.decoder_start_token_id)
    shifted = jnp.concatenate([start, labels[:, :-1]], axis=1)
    if segment_ids is not None:
        shifted = jnp.where(positions_in(segment_ids) == 0, start, shifted)
    return jnp.where(shifted == -100, config.pad_token_id, shifted)


class Stack(T5Module):
    """The blocks of the encoder or the decoder, and the norm after them."""

    decoder: bool = False

    def setup(self) -> None:
        """Declare the blocks; the first holds the position bias of all."""
        c = self.config
        self.length = (c.num_decoder_layers or 0) if self.decoder else c.num_layers
        if self.scan_layers:
            self.block = self.part(ScannedBlock, decoder=self.decoder)()
        else:
            make = self.part(Block, decoder=self.decoder)
            blocks = range(self.length)
            self.block = Numbered(tuple(partial(make, relative=i == 0) for i in blocks))
        self.final_layer_norm = self.norm()
        self.drop = self.dropout()

    def offset_bias(self, length: int, *, hide: bool) -> Array:
        """Return the stack's position bias by offset, `[H, 2 * length - 1]`.

        In a decoder it hides keys after the query where `hide` is on.
        """
        first = self.block.first if self.scan_layers else self.block.items[0]
        return first.layer.items[0].SelfAttention.offset_bias(
            length, length, causal=self.decoder, hide=hide and self.decoder
        )

    def mask_for(self, length: int, seen: Array | None) -> Array | Masking:
        """Return what `length` queries see of themselves: `seen` `[B, 1 or S, S]`.

        By einsum it is added to the scores, `[B, H, S, S]`, B 1 where all is seen. The
        bias goes by distance, which is the same in a row as in a text of it.
        """
        by_offset = self.offset_bias(length, hide=not self.fuses)
        bias = spread_bias(by_offset, np.arange(length), length)
        if not self.fuses:
            return bias if seen is None else bias + mask_bias(seen)
        return self.masking(bias=bias, mask=seen, causal=self.decoder)

    def layers(self) -> Any:
        """Return the layers of every block, or those of the scanned one."""
        if self.scan_layers:
            return self.block.layer
        return [block.layer for block in self.block.items]

    def cross_keys_values(self, encoded: Array) -> Any:
        """Return each block's keys and values of the encoder's output `[B, S, d]`."""

        def keys_values(layers: Any) -> KeysValues:
            return layers.items[1].EncDecAttention.keys_values(encoded)

        return self.of_each(self.layers(), keys_values, length=self.length)

    def __call__(
        self,
        x: Array,
        masking: Array | Masking,
        deterministic: bool,
        *,
        encoded: Array | None = None,
        cross: Any = None,
        cross_seen: Array | Masking | None = None,
        past: Any = None,
        index: Array | int = 0,
    ) -> tuple[Array, Any]:
        """Return `[B, T, d]` and each block's keys and values of self-attention.

        A decoder takes either `encoded` `[B, S, d]`, the encoder's output, or `cross`,
        what `cross_keys_values` makes of it.
        """
        x = self.drop(x, deterministic=deterministic)

        def step(block: Any, carry: Any, past: Any, cross: Any) -> tuple[Any, Any]:
            (x, source), layers = carry, block.items
            x, kv = layers[0](x, masking, deterministic, past, index)
            if encoded is not None:
                x, source = _not_before(x, source)
                own = encoded if source is None else source
                cross = layers[1].EncDecAttention.keys_values(own)
            if cross is not None:
                x = layers[1](x, cross, cross_seen, deterministic)
            return (layers[-1](x, deterministic), source), kv

        # A scan keeps what it carries, for each block.
        carry = x, None if self.scan_layers else encoded
        (x, _), kept = self.run_blocks(
            self.layers(), step, carry, length=self.length, past=past, own=cross
        )
        x = self.final_layer_norm(x)
        return self.drop(x, deterministic=deterministic), kept


def _not_before(x: Array, source: Array | None) -> tuple[Array, Array | None]:
    """Return both as they are; the encoder's output no earlier than `x`.

    It has a use in each block. On a GPU XLA would make the keys and values of all
    blocks in one product and cut it up, keep all of them at once though blocks be
    recomputed, and sum the gradients of all at the end.
    """
    if source is None:
        return x, None
    return lax.optimization_barrier((x, source))


class T5(T5Module):
    """A T5 with its language-model head.

    Attributes:
      config: sizes and choices.
      dtype: what it computes in. Norms, scores and softmax stay in float32.
      param_dtype: what `init` makes parameters in.
      scan_layers: whether blocks are scanned, and their parameters stacked.
      remat: whether the backward pass computes a block's activations again.
      attn_implementation: `"einsum"`, `"xla"` or `"cudnn"`, as in `Configured`.
    """

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether its output begins anew, rather than go on from the input."""
        return True

    def setup(self) -> None:
        """Declare embedding, stacks and head."""
        c = self.config
        self.shared = self.table(c.vocab_size, c.d_model, 1.0)
        self.encoder = self.part(Stack)()
        self.decoder = self.part(Stack, decoder=True)()
        if not c.tie_word_embeddings:
            # With 1.0, as for the embedding, an unscaled head starts saturated.
            self.lm_head = self.linear(c.vocab_size, c.d_model**-0.5)

    def torch_names(self) -> dict[str, tuple[str, ...]]:
        """Return what PyTorch calls the users of the embedding, by its path.

        The name in parentheses holds the table and is never called itself; one that
        ends in ".T" is of a head that multiplies with the table.
        """
        head = ("lm_head.T",) if self.config.tie_word_embeddings else ()
        stacks = ("encoder.embed_tokens", "decoder.embed_tokens")
        return {"shared": ("(shared)", *stacks, *head)}

    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        decoder_input_ids: Array | None = None,
        decoder_attention_mask: Array | None = None,
        deterministic: bool = True,
        segment_ids: Array | None = None,
        decoder_segment_ids: Array | None = None,
    ) -> Array:
        """Return the logits of every decoder position.

        Args:
          input_ids: `[B, S]` the encoder's tokens.
          attention_mask: `[B, S]`, 0 at padding; `None` attends to everything.
          decoder_input_ids: `[B, T]`, in training `shift_right(labels, config)`.
          decoder_attention_mask: `[B, T]`, 0 at padding. Padding on the right needs
            none: the decoder is causal.
          deterministic: `False` drops out, and needs `rngs={"dropout": key}`.
          segment_ids: `[B, S]`, where several pairs stand in a row, as
            `jlora.data.pack` has them: the number of each source token's pair.
          decoder_segment_ids: `[B, T]`, that of each target token's. Attention, within
            a side and across, is kept within a pair.

        Returns:
          `[B, T, V]` in `dtype`.

        Raises:
          ShapeError: `decoder_input_ids` is missing, or one side's segments are.
        """
        return self.head(
            self._last(
                input_ids,
                attention_mask,
                decoder_input_ids,
                decoder_attention_mask,
                deterministic,
                segment_ids,
                decoder_segment_ids,
            )
        )

    def features(self, *args: Any, **kwargs: Any) -> tuple[Array, Array]:
        """Return what goes into the head, and the head's kernel.

        `jlora.train.linear_cross_entropy` takes the two, and spares the logits. The
        arguments are those of `__call__`.

        Returns:
          `[B, T, d]` and `[d, V]`, both in `dtype`; of a tied head the embedding's
          table as it lies, `[V, d]`.

        Raises:
          ShapeError: `decoder_input_ids` is missing.
        """
        x = self._last(*args, **kwargs)
        if self.config.tie_word_embeddings:
            kernel = self.shared.embedding
        else:
            kernel = self.lm_head.get_variable("params", "kernel")
        return self.into_head(x), kernel.astype(self.dtype)

    def _last(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        decoder_input_ids: Array | None = None,
        decoder_attention_mask: Array | None = None,
        deterministic: bool = True,
        segment_ids: Array | None = None,
        decoder_segment_ids: Array | None = None,
    ) -> Array:
        """Return the decoder's output `[B, T, d]`, of whole sequences."""
        if decoder_input_ids is None:
            raise ShapeError(
                "T5 needs decoder_input_ids [B, T] beside input_ids "
                f"{input_ids.shape}.\nIn training pass shift_right(labels, config)."
            )
        encoded = self.encode(input_ids, attention_mask, deterministic, segment_ids)
        return self._decoded(
            decoder_input_ids,
            encoded,
            attention_mask,
            decoder_attention_mask,
            deterministic,
            segment_ids,
            decoder_segment_ids,
        )

    def encode(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        deterministic: bool = True,
        segment_ids: Array | None = None,
    ) -> Array:
        """Return the encoder's output `[B, S, d]` for `input_ids` `[B, S]`."""
        check_segments("segment_ids", segment_ids, input_ids)
        seen = keys_seen(attention_mask, segment_ids, segment_ids)
        masking = self.encoder.mask_for(input_ids.shape[1], seen)
        return self.encoder(self.shared(input_ids), masking, deterministic)[0]

    def decode(
        self,
        decoder_input_ids: Array,
        encoded: Array,
        attention_mask: Array | None = None,
        decoder_attention_mask: Array | None = None,
        deterministic: bool = True,
        segment_ids: Array | None = None,
        decoder_segment_ids: Array | None = None,
    ) -> Array:
        """Return the logits `[B, T, V]` of `decoder_input_ids` `[B, T]`.

        Args:
          decoder_input_ids: the decoder's tokens, the start token first.
          encoded: `[B, S, d]`, from `encode`.
          attention_mask: `[B, S]`, the encoder's.
          decoder_attention_mask: `[B, T]`.
          deterministic: as in `__call__`.
          segment_ids: `[B, S]`, the encoder's.
          decoder_segment_ids: `[B, T]`.
        """
        return self.head(
            self._decoded(
                decoder_input_ids,
                encoded,
                attention_mask,
                decoder_attention_mask,
                deterministic,
                segment_ids,
                decoder_segment_ids,
            )
        )

    def _decoded(
        self,
        decoder_input_ids: Array,
        encoded: Array,
        attention_mask: Array | None,
        decoder_attention_mask: Array | None,
        deterministic: bool,
        segment_ids: Array | None,
        decoder_segment_ids: Array | None,
    ) -> Array:
        T, own = decoder_input_ids.shape[1], decoder_segment_ids
        check_segments("decoder_segment_ids", own, decoder_input_ids)
        if (segment_ids is None) != (own is None):
            raise ShapeError(
                "of packed pairs T5 needs segment_ids [B, S] and decoder_segment_ids "
                "[B, T], and one is missing.\njlora.data.pack makes both."
            )
        seen = keys_seen(decoder_attention_mask, own, own)
        across = keys_seen(attention_mask, own, segment_ids)
        x, _ = self.decoder(
            self.shared(decoder_input_ids),
            self.decoder.mask_for(T, seen),
            deterministic,
            encoded=encoded,
            cross_seen=self.masking_of(across),
        )
        return x

    def prefill(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        *,
        length: int,
        beams: int = 1,
    ) -> tuple[Array, Cache]:
        """Run the encoder, and make room for L steps.

        Args:
          input_ids: `[B, S]`, the encoder's tokens.
          attention_mask: `[B, S]`, 0 at padding; `None` attends to everything.
          length: L, the most tokens that will be fed.
          beams: K, how many sequences are decoded for each row of `input_ids`.

        Returns:
          The start tokens `[B*K]`, to be fed next; and the cache of `init_cache`.
        """
        encoded = self.encode(input_ids, attention_mask)
        cache = self.init_cache(encoded, attention_mask, length=length, beams=beams)
        rows = input_ids.shape[0] * beams
        start = jnp.full(rows, self.config.decoder_start_token_id, jnp.int32)
        return start, cache

    def init_cache(
        self,
        encoded: Array,
        attention_mask: Array | None = None,
        *,
        length: int,
        beams: int = 1,
    ) -> Cache:
        """Return what `decode_step` needs to know of the encoder, and room for L steps.

        Args:
          encoded: `[B, S, d]`, from `encode`.
          attention_mask: `[B, S]`, the encoder's.
          length: L, the most tokens that will be fed.
          beams: K, how many sequences are decoded for each row of `encoded`.

        Returns:
          `beams`: each block's past keys and values, two of `[B*K, H, L, D]` (with
          scanned layers two of `[B*K, layers, H, L, D]`);
          `shared`: what does not depend on the beam, cross-attention's keys and values
          among it, computed here once.
        """
        c = self.config
        mask = None if attention_mask is None else mask_bias(attention_mask)
        shape = (encoded.shape[0] * beams, c.num_heads, length, c.d_kv)
        return {
            "beams": self.empty(c.num_decoder_layers or 0, shape),
            "shared": {
                "index": jnp.zeros((), jnp.int32),
                "bias": self.decoder.offset_bias(length, hide=True),
                "cross": self.decoder.cross_keys_values(encoded),
                "cross_bias": mask,
            },
        }

    def decode_step(
        self, decoder_input_ids: Array, cache: Cache
    ) -> tuple[Array, Cache]:
        """Feed the next tokens; return the logits after each and the new cache.

        Args:
          decoder_input_ids: `[B*K, T]`, most often with T = 1.
          cache: from `init_cache` or from the step before.

        Returns:
          `[B*K, T, V]`, and the cache that the next step takes.
        """
        shared, past = cache["shared"], cache["beams"]
        index, T = shared["index"], decoder_input_ids.shape[1]
        length = jax.tree.leaves(past)[0].shape[-2]
        x, past = self.decoder(
            self.shared(decoder_input_ids),
            spread_bias(shared["bias"], index + jnp.arange(T), length),
            True,
            cross=shared["cross"],
            cross_seen=shared["cross_bias"],
            past=past,
            index=index,
        )
        return self.head(x), {"beams": past, "shared": {**shared, "index": index + T}}

    def into_head(self, x: Array) -> Array:
        """Scale `[B, T, d]` as a tied head of v1.0 wants it."""
        scaled = self.config.scale_decoder_outputs
        return x * self.config.d_model**-0.5 if scaled else x

    def head(self, x: Array) -> Array:
        """[B, T, d] -> the logits [B, T, V]."""
        x = self.into_head(x)
        if self.config.tie_word_embeddings:
            return self.shared.attend(x)
        return self.lm_head(x)
