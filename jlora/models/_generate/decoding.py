"""How generation chooses tokens: its settings, and what they do to the scores."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

from jlora._errors import StructureError


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How to choose the next token, and when to stop.

    Attributes:
      max_new_tokens: n, the most tokens made, the end token included. Where
        `transformers` counts `max_length`, an encoder-decoder model's start token
        counts too.
      min_new_tokens: no end token before so many others.
      num_beams: K; 1 is greedy search, or sampling.
      length_penalty: a finished beam's score is divided by length**length_penalty.
      do_sample: draws from the distribution; needs a key.
      temperature: divides the logits before drawing.
      top_k: draws among the k most likely tokens; 0 among all.
      top_p: draws among the most likely tokens that together reach this probability.
      eos_token_id: the end token, or several; `None` is the model's.
      pad_token_id: what follows the end token; `None` is the model's.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        """Refuse settings out of range, or that exclude each other."""
        rules = {
            "max_new_tokens must be at least 1": self.max_new_tokens >= 1,
            "min_new_tokens must be at least 0": self.min_new_tokens >= 0,
            "num_beams must be at least 1": self.num_beams >= 1,
            "temperature must be above 0; for 0 leave do_sample off": (
                self.temperature > 0
            ),
            "top_k must be at least 0": self.top_k >= 0,
            "top_p must be above 0 and at most 1": 0 < self.top_p <= 1,
            "do_sample draws single sequences; leave num_beams at 1": (
                not self.do_sample or self.num_beams == 1
            ),
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise StructureError(f"{self}: {'; '.join(broken)}.")

    @property
    def eos(self) -> tuple[int, ...]:
        """The end tokens, as a tuple."""
        ids = self.eos_token_id
        if ids is None:
            return ()
        return tuple(ids) if isinstance(ids, (tuple, list)) else (ids,)


def suppress_eos(scores: Array, step: Array, config: GenerationConfig) -> Array:
    """Return `scores` `[..., V]` without end tokens while the output is too short."""
    if not config.eos or config.min_new_tokens == 0:
        return scores
    barred = jnp.zeros(scores.shape[-1], bool).at[jnp.array(config.eos)].set(True)
    return jnp.where(barred & (step < config.min_new_tokens), -jnp.inf, scores)


def warp(logits: Array, config: GenerationConfig) -> Array:
    """Return `logits` `[B, V]` by temperature, without what is not to be drawn.

    Tokens as likely as the last one allowed stay with it.
    """
    logits = logits / config.temperature
    if 0 < config.top_k < logits.shape[-1]:
        least = lax.top_k(logits, config.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if config.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        # A token stays while those before it do not reach top_p: one always does.
        kept = jnp.where(before < config.top_p, ordered, jnp.inf)
        logits = jnp.where(
            logits < jnp.min(kept, axis=-1, keepdims=True), -jnp.inf, logits
        )
    return logits
