"""What is added to the scores of tokens and sequences, or bars them."""

from __future__ import annotations

from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
from jax import Array

from jlora.models._generate.config import GenerationConfig
from jlora.models._generate.history import History, among

Biases = Iterable[tuple[tuple[int, ...], float]]


def bias_sequences(scores: Array, history: History, config: GenerationConfig) -> Array:
    """Add `sequence_bias` to the scores `[R, V]` of tokens that end a sequence."""
    return _biased(scores, history, config.sequence_bias)


def bar_words(scores: Array, history: History, config: GenerationConfig) -> Array:
    """Bar the tokens that would end one of `bad_words_ids`; end tokens may occur."""
    ends = {(token,) for token in config.eos}
    words = dict.fromkeys(ids for ids in config.bad_words_ids if ids not in ends)
    return _biased(scores, history, [(ids, -np.inf) for ids in words])


def suppress(scores: Array, history: History, config: GenerationConfig) -> Array:
    """Bar `suppress_tokens`."""
    if not config.suppress_tokens:
        return scores
    barred = among(config.suppress_tokens, scores.shape[-1])
    return jnp.where(barred, -jnp.inf, scores)


def suppress_first(scores: Array, history: History, config: GenerationConfig) -> Array:
    """Bar `begin_suppress_tokens` where the output begins: after a forced token."""
    if not config.begin_suppress_tokens:
        return scores
    forced = config.forced_bos_token_id is not None and history.prompt.shape[1] == 1
    barred = among(config.begin_suppress_tokens, scores.shape[-1])
    return jnp.where(barred & (history.step == int(forced)), -jnp.inf, scores)


def _biased(scores: Array, history: History, biases: Biases) -> Array:
    by_length: dict[int, list[tuple[tuple[int, ...], float]]] = {}
    room = history.prompt.shape[1] + history.new.shape[1]
    for ids, bias in biases:
        if len(ids) <= room:
            by_length.setdefault(len(ids) - 1, []).append((ids, bias))
    added = jnp.zeros(scores.shape, scores.dtype)
    for before, group in by_length.items():
        # [N, before] the tokens before, [N] the last ones, and [N] what these get
        prefixes = np.array([ids[:-1] for ids, _ in group], np.int32)
        ends = np.array([ids[-1] for ids, _ in group], np.int32)
        amounts = jnp.array([bias for _, bias in group], scores.dtype)[None]
        last = history.last(before)[:, None]
        holds = jnp.all(last == prefixes[None], axis=-1) & (history.length >= before)
        added = added.at[:, ends].add(jnp.where(holds, amounts, 0))
    return scores + added if by_length else scores
