"""Rules against repeating: penalties of tokens, and n-grams that occur once.

Source: Keskar et al. 2019, arXiv:1909.05858 (penalty); Paulus et al. 2017,
arXiv:1705.04304 (n-grams).
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jlora.models._generate.config import GenerationConfig
from jlora.models._generate.history import History, occurring


def penalise_repetition(
    scores: Array, history: History, config: GenerationConfig
) -> Array:
    """Lower the scores `[R, V]` of tokens in prompt and output."""
    if config.repetition_penalty == 1:
        return scores
    found = occurring(history.tokens(), history.is_token(), scores.shape[-1])
    return jnp.where(found, _penalised(scores, config.repetition_penalty), scores)


def favour_source(scores: Array, history: History, config: GenerationConfig) -> Array:
    """Raise the scores `[R, V]` of the input's tokens."""
    if config.encoder_repetition_penalty == 1:
        return scores
    everywhere = jnp.ones(history.source.shape, bool)
    found = occurring(history.source, everywhere, scores.shape[-1])
    penalty = 1 / config.encoder_repetition_penalty
    return jnp.where(found, _penalised(scores, penalty), scores)


def _penalised(scores: Array, penalty: float) -> Array:
    return jnp.where(scores < 0, scores * penalty, scores / penalty)


def bar_ngrams(scores: Array, history: History, config: GenerationConfig) -> Array:
    """Bar tokens that would end an n-gram of the output again, or of the prompt's."""
    size = config.no_repeat_ngram_size
    tokens, length = history.new, history.step
    if config.no_repeat_ngram_prompt:
        tokens, length = history.tokens(), history.length
    if not 0 < size <= tokens.shape[1]:
        return scores
    ends = jnp.arange(size, tokens.shape[1] + 1, dtype=jnp.int32)  # of the windows
    made = (ends <= length)[None]
    return _bar_ends(scores, history, tokens, size, made)


def bar_source_ngrams(
    scores: Array, history: History, config: GenerationConfig
) -> Array:
    """Bar tokens that would end an n-gram of the input."""
    size = config.encoder_no_repeat_ngram_size
    if not 0 < size <= history.source.shape[1]:
        return scores
    everywhere = jnp.ones((1, history.source.shape[1] - size + 1), bool)
    return _bar_ends(scores, history, history.source, size, everywhere)


def _bar_ends(
    scores: Array, history: History, text: Array, size: int, made: Array
) -> Array:
    """Bar the ends of those windows of `text` whose beginning was made last.

    Args:
      scores: `[R, V]`.
      history: what the last tokens are of.
      text: `[R, L]`.
      size: of a window, its last token included.
      made: `[1 or R, L - size + 1]`, which windows there are.
    """
    beginnings = text.shape[1] - size + 1
    if size - 1 > history.prompt.shape[1] + history.new.shape[1]:
        return scores
    last = history.last(size - 1)
    matches = made & (history.length >= size - 1)
    for i in range(size - 1):
        matches = matches & (text[:, i : i + beginnings] == last[:, i : i + 1])
    ends = text[:, size - 1 :]
    matches = jnp.broadcast_to(matches, ends.shape)
    return jnp.where(occurring(ends, matches, scores.shape[-1]), -jnp.inf, scores)
