"""Rules of where a sequence begins and ends."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array

from jlora.models._generate.config import GenerationConfig, as_tuple
from jlora.models._generate.history import History, among


def bar_early_end(scores: Array, history: History, config: GenerationConfig) -> Array:
    """Bar end tokens while the output is too short."""
    least = max(config.min_new_tokens, config.min_length - history.prompt.shape[1])
    if not config.eos or least <= 0:
        return scores
    ends = among(config.eos, scores.shape[-1])
    return jnp.where(ends & (history.step < least), -jnp.inf, scores)


def force_first(scores: Array, history: History, config: GenerationConfig) -> Array:
    """Allow `forced_bos_token_id` alone after a prompt of one token."""
    if config.forced_bos_token_id is None or history.prompt.shape[1] != 1:
        return scores
    forced = among((config.forced_bos_token_id,), scores.shape[-1])
    alone = jnp.where(forced, 0.0, -jnp.inf).astype(scores.dtype)
    return jnp.where(history.step == 0, alone, scores)


def force_last(scores: Array, history: History, config: GenerationConfig) -> Array:
    """Allow `forced_eos_token_id` alone where the room is at its end."""
    if config.forced_eos_token_id is None:
        return scores
    forced = among(as_tuple(config.forced_eos_token_id), scores.shape[-1])
    alone = jnp.where(forced, 0.0, -jnp.inf).astype(scores.dtype)
    return jnp.where(history.step == history.new.shape[1] - 1, alone, scores)


def favour_end(scores: Array, history: History, config: GenerationConfig) -> Array:
    """Raise the scores of end tokens, the more the longer the output is."""
    if config.exponential_decay_length_penalty is None or not config.eos:
        return scores
    start, factor = config.exponential_decay_length_penalty
    # In float64 and rounded once, as the reference does.
    beyond = np.maximum(np.arange(history.new.shape[1]) - start, 0)
    growth = jnp.asarray(np.float64(factor) ** beyond - 1, scores.dtype)
    ends = among(config.eos, scores.shape[-1]) & jnp.isfinite(scores)
    raised = scores + jnp.abs(scores) * growth[history.step]
    return jnp.where(ends, raised, scores)
