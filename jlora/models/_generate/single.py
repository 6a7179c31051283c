"""One token after the other: greedy search and sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jlora.models._generate.config import GenerationConfig
from jlora.models._generate.history import History
from jlora.models._generate.rules import apply_rules

Step = Callable[[Array, Any], tuple[Array, Any]]


class _State(NamedTuple):
    tokens: Array  # [R] the last ones
    cache: Any
    finished: Array  # [R]
    history: History


def one_by_one(
    step: Step,
    tokens: Array,
    cache: Any,
    history: History,
    given: Array,
    config: GenerationConfig,
    key: Array | None,
) -> Array:
    """Return the likeliest tokens or drawn ones, `[R, n]`, padded after an end token.

    Args:
      step: takes tokens `[R]` and the cache; returns logits `[R, V]` and the cache.
      tokens: `[R]` the first tokens.
      cache: what `step` takes and returns.
      history: input and prompt, with nothing made.
      given: `[B]`, off where the input is all padding: such rows have ended.
      config: the settings.
      key: for sampling.
    """
    pad = config.pad_token_id or 0
    eos = jnp.array(config.eos, jnp.int32)
    room = history.new.shape[1]

    def body(state: _State) -> _State:
        logits, cache = step(state.tokens, state.cache)
        history = state.history
        scores = apply_rules(logits.astype(jnp.float32), history, config)
        if key is None or not config.do_sample:
            tokens = jnp.argmax(scores, axis=-1)
        else:
            draw = jax.random.fold_in(key, history.step)
            tokens = jax.random.categorical(draw, scores)
        tokens = jnp.where(state.finished, pad, tokens.astype(jnp.int32))
        new = lax.dynamic_update_slice_in_dim(
            history.new, tokens[:, None], history.step, axis=1
        )
        finished = state.finished | jnp.isin(tokens, eos)
        history = history._replace(new=new, step=history.step + 1)
        return _State(tokens, cache, finished, history)

    def unfinished(state: _State) -> Array:
        return (state.history.step < room) & ~jnp.all(state.finished)

    finished = ~jnp.repeat(given, config.rows_per_prompt)
    start = _State(tokens, cache, finished, history)
    return lax.while_loop(unfinished, body, start).history.new
