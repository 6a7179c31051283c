"""What was read and made so far, as the rules of generation look at it.

Letters in shapes: R the rows that are continued (prompts times beams or samples), P the
prompt's length, S the input's, n the room for new tokens, V the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax


class History(NamedTuple):
    """The tokens of every row.

    Attributes:
      source: `[R, S]` the input. A model without an encoder continues it.
      prompt: `[R, P]` what the output follows: the input, or the start token.
      counted: `[R, P]`, on where the prompt is no padding.
      new: `[R, n]`, of which the first `step` are made.
      step: int32, how many were made.
    """

    source: Array
    prompt: Array
    counted: Array
    new: Array
    step: Array

    @property
    def length(self) -> Array:
        """How many tokens the prompt and the output have."""
        return self.prompt.shape[1] + self.step

    def tokens(self) -> Array:
        """Return prompt and output, `[R, P + n]`."""
        return jnp.concatenate([self.prompt, self.new], axis=1)

    def is_token(self) -> Array:
        """Return where `tokens` are made and no padding, `[R, P + n]`."""
        made = jnp.arange(self.new.shape[1], dtype=jnp.int32) < self.step
        made = jnp.broadcast_to(made[None], self.new.shape)
        return jnp.concatenate([self.counted, made], axis=1)

    def last(self, number: int) -> Array:
        """Return the last `number` tokens, `[R, number]`; there must be so many."""
        start = jnp.maximum(self.length - number, 0)
        return lax.dynamic_slice_in_dim(self.tokens(), start, number, axis=1)


def occurring(tokens: Array, where: Array, vocabulary: int) -> Array:
    """Return whether each of V tokens is among `tokens` `[R, L]` that count: `[R, V]`.

    Args:
      tokens: ids; those beyond the vocabulary occur nowhere.
      where: `[R, L]`, which of them count.
      vocabulary: V.
    """
    rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None]
    columns = jnp.where(where, tokens, vocabulary)  # those beyond are dropped
    found = jnp.zeros((tokens.shape[0], vocabulary), bool)
    return found.at[rows, columns].set(True, mode="drop")


def among(ids: tuple[int, ...], vocabulary: int) -> Array:
    """Return which of V tokens are among `ids`, `[1, V]`."""
    tokens = jnp.arange(vocabulary, dtype=jnp.int32)
    return jnp.isin(tokens, jnp.array(ids, jnp.int32))[None]
