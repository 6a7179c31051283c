"""All rules that change scores, in the order in which `transformers` applies them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jlora.models._generate import bias, ending, repetition
from jlora.models._generate.config import GenerationConfig
from jlora.models._generate.history import History
from jlora.models._generate.warpers import warp


def apply_rules(scores: Array, history: History, config: GenerationConfig) -> Array:
    """Return the scores `[R, V]` in float32 as the settings change them.

    Args:
      scores: logits, or of beams their log-probabilities.
      history: the tokens so far.
      config: the settings; of those at their defaults nothing is computed.
    """
    for rule in _RULES:
        scores = rule(scores, history, config)
    if config.do_sample:
        scores = warp(scores, config)
    return jax.nn.log_softmax(scores, axis=-1) if config.renormalize_logits else scores


def _remove_invalid(scores: Array, history: History, config: GenerationConfig) -> Array:
    if not config.remove_invalid_values:
        return scores
    return jnp.nan_to_num(scores, nan=0.0)


_RULES = (
    bias.bias_sequences,
    repetition.favour_source,
    repetition.penalise_repetition,
    repetition.bar_ngrams,
    repetition.bar_source_ngrams,
    bias.bar_words,
    ending.bar_early_end,
    ending.force_first,
    ending.force_last,
    _remove_invalid,
    ending.favour_end,
    bias.suppress,
    bias.suppress_first,
)
