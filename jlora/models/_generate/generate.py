"""Generation as one compiled program: greedy, sampling, and beams (`_beam`).

Two pure functions stand for the model, so any model serves, adapted or not, with an
encoder or without:

    apply_encode(params, input_ids, attention_mask, *, length, beams)
        -> first tokens [B*K], cache
    apply_decode(params, tokens, cache) -> logits [B*K, V], cache

The cache is a dict: `"beams"` holds leaves `[B*K, ...]` that follow their beam, all
else goes from step to step as `apply_decode` returns it. A model with an encoder
answers with its start token; one without reads the prompt up to its last token and
answers with that. B is the batch, K the beams, V the vocabulary, n the room for new
tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jlora._errors import DataError, DtypeError, ShapeError, StructureError
from jlora.models._generate.beam import beam_search
from jlora.models._generate.decoding import GenerationConfig, suppress_eos, warp

Encode = Callable[..., tuple[Array, Any]]
Decode = Callable[[Any, Array, Any], tuple[Array, Any]]
Transform = Callable[[Callable[..., Any]], Callable[..., Any]]


def generate_with(
    apply_encode: Encode,
    apply_decode: Decode,
    params: Any,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None,
    config: GenerationConfig,
    *,
    key: Array | None = None,
    transform: Transform | None = None,
) -> Array:
    """Generate with the two functions that stand for a model.

    It is compiled once for each shape, `config`, and pair of functions; pass the same
    function objects again, since a new closure is a new program.

    Args:
      apply_encode: starts the cache; see the top of this file.
      apply_decode: makes one step.
      params: the first argument of both.
      input_ids: `[B, S]`.
      attention_mask: `[B, S]`, 0 at padding; `None` is no padding.
      config: what to do. `eos_token_id=None` never stops early.
      key: for sampling.
      transform: applied to both functions, for instance `jlora.lora`.

    Returns:
      `[B, n]` int32: the new tokens, the end token included and padding after it.

    Raises:
      ShapeError: `input_ids` and `attention_mask` are not alike or not `[B, S]`.
      StructureError: sampling without a key.
    """
    ids = jnp.asarray(input_ids).astype(jnp.int32)
    mask = jnp.ones_like(ids) if attention_mask is None else jnp.asarray(attention_mask)
    if ids.ndim != 2 or ids.shape != mask.shape:
        raise ShapeError(
            f"input_ids {ids.shape} and attention_mask {mask.shape} must both be "
            "[batch, length].\nA single prompt is input_ids[None]."
        )
    if config.do_sample and key is None:
        raise StructureError("do_sample=True draws tokens: pass key=jax.random.key(0).")
    run = compiled(apply_encode, apply_decode, config, transform)
    return run(params, ids, mask, key)


def generate(
    model: Any,
    params: Any,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    config: GenerationConfig | None = None,
    *,
    key: Array | None = None,
    transform: Transform | None = None,
    **settings: Any,
) -> Array:
    """Generate with a model of `jlora.models`.

    Args:
      model: from `load`.
      params: its parameters; with `transform=jlora.lora` the lorafied ones.
      input_ids: `[B, S]`.
      attention_mask: `[B, S]`, 0 at padding; `None` is no padding.
      config: what to do; end and padding tokens default to the model's, of which
        those in `generation_config.json` go first.
      key: for sampling.
      transform: applied to the model's pure functions, for instance `jlora.lora`.
        Pass the same object again, or the program is compiled again.
      **settings: fields of `GenerationConfig` that replace those of `config`.

    Returns:
      `[B, max_new_tokens]` int32: the new tokens, padding after the end token. It
      does not repeat the prompt or the start token.

    Raises:
      ShapeError: `input_ids` and `attention_mask` are not alike or not `[B, S]`.
      DataError: an id beyond the vocabulary.
      DtypeError: `input_ids` are no integers.
      StructureError: settings that exclude each other, sampling without a key, or a
        model that generates nothing.
    """
    encode, decode = functions_of(model)
    config = dataclasses.replace(config or GenerationConfig(), **settings)
    _check_ids(input_ids, model.config.vocab_size)
    config = _with_tokens(config, model.config)
    return generate_with(
        encode,
        decode,
        params,
        input_ids,
        attention_mask,
        config,
        key=key,
        transform=transform,
    )


def _with_tokens(config: GenerationConfig, own: Any) -> GenerationConfig:
    """Fill in end and padding tokens from a model's configuration."""

    def said(name: str) -> Any:
        value = own.generation.get(name)
        value = getattr(own, name) if value is None else value
        return tuple(value) if isinstance(value, list) else value

    if config.eos_token_id is None:
        config = dataclasses.replace(config, eos_token_id=said("eos_token_id"))
    if config.pad_token_id is None:
        # Models without a padding token fill up with their end token.
        pad = said("pad_token_id")
        if pad is None and config.eos:
            pad = config.eos[0]
        config = dataclasses.replace(config, pad_token_id=pad)
    return config


def _check_ids(input_ids: ArrayLike, vocab_size: int) -> None:
    """Refuse what is no token: its embedding would be NaN, and the output senseless."""
    if isinstance(input_ids, jax.core.Tracer):
        return
    ids = np.asarray(input_ids)
    if not np.issubdtype(ids.dtype, np.integer):
        raise DtypeError(f"input_ids must be integers, not {ids.dtype}.")
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.size:
        raise DataError(
            f"input_ids hold {wrong[0]}, and the model knows 0 to {vocab_size - 1}.\n"
            "Use the tokenizer that belongs to this checkpoint."
        )


@lru_cache(maxsize=64)
def functions_of(model: Any) -> tuple[Encode, Decode]:
    """Return a model's two functions, the same objects at every call.

    They are its methods `prefill` and `decode_step`.
    """
    if not hasattr(model, "prefill"):
        raise StructureError(
            f"{type(model).__name__} is an encoder and generates no tokens.\nCall it "
            "with model.apply."
        )

    def encode(
        params: Any, input_ids: Array, attention_mask: Array, *, length: int, beams: int
    ) -> tuple[Array, Any]:
        """Read the inputs; answer with the first tokens `[B*K]` and the cache."""
        how = {"length": length, "beams": beams, "method": "prefill"}
        read: Any = model.apply({"params": params}, input_ids, attention_mask, **how)
        return read

    def decode(params: Any, tokens: Array, cache: Any) -> tuple[Array, Any]:
        """Feed one token `[B*K]` each; return the logits `[B*K, V]` and the cache."""
        variables = {"params": params}
        logits, cache = model.apply(
            variables, tokens[:, None], cache, method="decode_step"
        )
        return logits[:, 0], cache

    return encode, decode


@lru_cache(maxsize=64)
def compiled(
    apply_encode: Encode,
    apply_decode: Decode,
    config: GenerationConfig,
    transform: Transform | None,
) -> Any:
    """Return the jitted program; it holds no parameters."""
    length, beams = config.max_new_tokens, config.num_beams
    encode: Encode = partial(apply_encode, length=length, beams=beams)
    decode = apply_decode
    if transform is not None:
        encode, decode = transform(encode), transform(decode)

    def run(params: Any, ids: Array, mask: Array, key: Array | None) -> Array:
        tokens, cache = encode(params, ids, mask)
        step = partial(decode, params)
        if config.num_beams > 1:
            return beam_search(step, tokens, cache, config)
        return _one_by_one(step, tokens, cache, config, key)

    return jax.jit(run)


class _State(NamedTuple):
    step: Array  # how many tokens were made
    tokens: Array  # [B] the last ones
    cache: Any
    finished: Array  # [B]
    out: Array  # [B, n]


def _one_by_one(
    step: Callable[[Array, Any], tuple[Array, Any]],
    tokens: Array,
    cache: Any,
    config: GenerationConfig,
    key: Array | None,
) -> Array:
    """Greedy search or sampling, until every sequence has ended."""
    pad = config.pad_token_id or 0
    eos = jnp.array(config.eos, jnp.int32)

    def body(state: _State) -> _State:
        logits, cache = step(state.tokens, state.cache)
        logits = suppress_eos(logits.astype(jnp.float32), state.step, config)
        if key is None or not config.do_sample:
            tokens = jnp.argmax(logits, axis=-1)
        else:
            draw = jax.random.fold_in(key, state.step)
            tokens = jax.random.categorical(draw, warp(logits, config))
        tokens = jnp.where(state.finished, pad, tokens.astype(jnp.int32))
        out = lax.dynamic_update_slice(state.out, tokens[:, None], (0, state.step))
        finished = state.finished | jnp.isin(tokens, eos)
        return _State(state.step + 1, tokens, cache, finished, out)

    def unfinished(state: _State) -> Array:
        return (state.step < config.max_new_tokens) & ~jnp.all(state.finished)

    rows = tokens.shape[0]
    out = jnp.full((rows, config.max_new_tokens), pad, jnp.int32)
    start = _State(jnp.int32(0), tokens, cache, jnp.zeros(rows, bool), out)
    return lax.while_loop(unfinished, body, start).out
