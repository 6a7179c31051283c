"""What sampling draws from: temperature, and which tokens are left out.

Each takes scores `[R, V]` and gives those that are not to be drawn minus infinity;
`keep` of the likeliest stay in any case.

Source: Holtzman et al. 2019, arXiv:1904.09751 (top_p); Nguyen et al. 2024,
arXiv:2407.01082 (min_p); Meister et al. 2022, arXiv:2202.00666 (typical_p); Hewitt et
al. 2022, arXiv:2210.15191 (epsilon and eta); Baghaei Potraghloo et al. 2025,
arXiv:2509.02510 (top_h).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from jlora.models._generate.config import GenerationConfig

_TOP_H_AMONG = 100


def warp(scores: Array, config: GenerationConfig) -> Array:
    """Return `scores` by temperature, without what is not to be drawn.

    Tokens as likely as the last one allowed stay with it.
    """
    # Beams need one that goes on beside all end tokens.
    keep = max(2, len(config.eos) + 1) if config.num_beams > 1 else 1
    keep = min(keep, scores.shape[-1])
    scores = scores / config.temperature
    if config.top_h is not None:
        scores = _top_h(scores, config.top_h)
    if 0 < config.top_k < scores.shape[-1]:
        least = lax.top_k(scores, max(config.top_k, keep))[0][:, -1:]
        scores = jnp.where(scores < least, -jnp.inf, scores)
    if config.top_p < 1:
        scores = _top_p(scores, config.top_p, keep)
    if config.min_p > 0:
        probs = jax.nn.softmax(scores, axis=-1)
        bound = config.min_p * jnp.max(probs, axis=-1, keepdims=True)
        scores = _without(scores, probs < bound, keep)
    if config.typical_p < 1:
        scores = _typical(scores, config.typical_p, keep)
    if 0 < config.epsilon_cutoff < 1:
        probs = jax.nn.softmax(scores, axis=-1)
        scores = _without(scores, probs < config.epsilon_cutoff, keep)
    if 0 < config.eta_cutoff < 1:
        epsilon, probs = config.eta_cutoff, jax.nn.softmax(scores, axis=-1)
        bound = jnp.minimum(epsilon, epsilon**0.5 * jnp.exp(-_entropy(scores)))
        scores = _without(scores, probs < bound, keep)
    return scores


def _without(scores: Array, left_out: Array, keep: int) -> Array:
    least = lax.top_k(scores, keep)[0][:, -1:]
    return jnp.where(left_out & (scores < least), -jnp.inf, scores)


def _top_p(scores: Array, mass: float, keep: int) -> Array:
    ordered = jnp.sort(scores, axis=-1, descending=True)
    probs = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    # A token stays while those before it do not reach the mass: one always does.
    kept = jnp.where(before < mass, ordered, jnp.inf)
    least = jnp.minimum(
        jnp.min(kept, axis=-1, keepdims=True), ordered[:, keep - 1, None]
    )
    return jnp.where(scores < least, -jnp.inf, scores)


def _typical(scores: Array, mass: float, keep: int) -> Array:
    logp = jax.nn.log_softmax(scores, axis=-1)
    distance = jnp.abs(-logp - _entropy(scores))
    order = jnp.argsort(distance, axis=-1)
    ordered = jnp.take_along_axis(distance, order, axis=-1)
    probs = jnp.take_along_axis(jnp.exp(logp), order, axis=-1)
    reached = jnp.sum(jnp.cumsum(probs, axis=-1) < mass, axis=-1, keepdims=True)
    last = jnp.clip(reached, keep - 1, scores.shape[-1] - 1)
    bound = jnp.take_along_axis(ordered, last, axis=-1)
    return jnp.where(distance > bound, -jnp.inf, scores)


def _top_h(scores: Array, part: float) -> Array:
    ordered = lax.top_k(scores, min(_TOP_H_AMONG, scores.shape[-1]))[0]
    terms = _entropy_terms(ordered)
    bound = part * jnp.sum(terms, axis=-1, keepdims=True)
    kept = (jnp.cumsum(terms, axis=-1) <= bound).at[:, 0].set(True)
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scores < least, -jnp.inf, scores)


def _entropy(scores: Array) -> Array:
    """Return the entropy `[R, 1]` of the distribution that `scores` `[R, V]` give."""
    return jnp.sum(_entropy_terms(scores), axis=-1, keepdims=True)


def _entropy_terms(scores: Array) -> Array:
    logp = jax.nn.log_softmax(scores, axis=-1)
    return jnp.where(logp > -jnp.inf, -jnp.exp(logp) * logp, 0.0)
