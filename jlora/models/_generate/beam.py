"""Beam search with the rules of `transformers`.

B is the batch, K the beams, V the vocabulary, n the room for new tokens, C the
candidates looked at in each step: enough that K go on even where others end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jlora.models._generate.config import GenerationConfig
from jlora.models._generate.history import History
from jlora.models._generate.rules import apply_rules

LOW = -1.0e9  # below every real score, and still finite when two are added


class _State(NamedTuple):
    step: Array  # how many tokens were made
    tokens: Array  # [B*K] the last ones
    cache: Any
    running: Array  # [B, K, n]
    scores: Array  # [B, K] sums of log-probabilities, best first
    ended: Array  # [B, K, n]
    ended_scores: Array  # [B, K] penalised by length, best first
    has_ended: Array  # [B, K] whether that place is taken
    improvable: Array  # [B, 1] whether running beams may still win
    go_on: Array


class _Candidates(NamedTuple):
    scores: Array  # [B, C]
    beam: Array  # [B, C] which one they continue
    sequences: Array  # [B, C, n]
    end: Array  # [B, C] by an end token or for want of room


def beam_search(
    step: Callable[[Array, Any], tuple[Array, Any]],
    tokens: Array,
    cache: Any,
    history: History,
    given: Array,
    config: GenerationConfig,
    key: Array | None,
) -> Array:
    """Return the best sequences of each row, padded after their end token.

    Args:
      step: takes tokens `[B*K]` and the cache; returns logits `[B*K, V]` and the cache.
      tokens: `[B*K]` the first tokens.
      cache: its `"beams"` are leaves `[B*K, ...]`.
      history: input and prompt of all beams, with nothing made.
      given: `[B]`, off where the input is all padding: no such row is waited for.
      config: beams, penalty, lengths and tokens.
      key: for sampling.

    Returns:
      `[B*N, n]` int32, N the sequences to return for each row.
    """
    # In float64 and rounded once, as the divisors of the reference are.
    room = history.new.shape[1]
    lengths = np.arange(1, room + 1, dtype=np.float64)
    penalty = jnp.asarray(lengths**config.length_penalty, jnp.float32)

    def body(state: _State) -> _State:
        logits, cache = step(state.tokens, state.cache)
        found = _candidates(logits, state, history, config, key)
        running, scores, beam = _next_beams(found, config.num_beams)
        ended, ended_scores, has_ended = _collect(found, state, penalty, config)
        longest = config.early_stopping == "never" and config.length_penalty > 0
        best = scores[:, :1] / (penalty[-1] if longest else penalty[state.step])
        worst = jnp.where(has_ended, jnp.min(ended_scores, 1, keepdims=True), LOW)
        improvable = state.improvable & jnp.any(best > worst, 1, keepdims=True)
        go_on = jnp.any(improvable) & ~jnp.all(found.end)
        if config.early_stopping is True:
            go_on = go_on & ~jnp.all(has_ended)
        return _State(
            step=state.step + 1,
            tokens=jnp.take(running, state.step, axis=2).reshape(-1),
            cache={**cache, "beams": _follow(cache["beams"], beam)},
            running=running,
            scores=scores,
            ended=ended,
            ended_scores=ended_scores,
            has_ended=has_ended,
            improvable=improvable,
            go_on=go_on,
        )

    start = _start(tokens, cache, given, room, config)
    ended = lax.while_loop(lambda state: state.go_on, body, start).ended
    return ended[:, : config.num_return_sequences].reshape(-1, room)


def _start(
    tokens: Array, cache: Any, given: Array, room: int, config: GenerationConfig
) -> _State:
    K = config.num_beams
    B = tokens.shape[0] // K
    empty = jnp.full((B, K, room), config.pad_token_id or 0, jnp.int32)
    low = jnp.full((B, K), LOW, jnp.float32)
    return _State(
        step=jnp.int32(0),
        tokens=tokens,
        cache=cache,
        running=empty,
        # All beams start alike: only the first may go on, or K would be the same.
        scores=low.at[:, 0].set(0.0),
        ended=empty,
        ended_scores=low,
        has_ended=jnp.zeros((B, K), bool),
        improvable=given[:, None],
        go_on=jnp.array(True),
    )


def _candidates(
    logits: Array,
    state: _State,
    history: History,
    config: GenerationConfig,
    key: Array | None,
) -> _Candidates:
    """Return the C best continuations of all beams of a row, best first."""
    (B, K), V = state.scores.shape, logits.shape[-1]
    logp = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    room = state.running.shape[-1]
    history = history._replace(new=state.running.reshape(-1, room), step=state.step)
    logp = apply_rules(logp, history, config)
    total = (logp.reshape(B, K, V) + state.scores[:, :, None]).reshape(B, K * V)
    number = max(2, 1 + len(config.eos)) * K
    if config.do_sample and key is not None:
        scores, chosen = _draw(total, number, jax.random.fold_in(key, state.step))
    else:
        scores, chosen = lax.top_k(total, number)
    beam, token = chosen // V, (chosen % V).astype(jnp.int32)
    sequences = lax.dynamic_update_slice_in_dim(
        _gather(state.running, beam), token[:, :, None], state.step, axis=2
    )
    last = state.step + 1 >= room
    end = jnp.isin(token, jnp.array(config.eos, jnp.int32)) | last
    return _Candidates(scores, beam, sequences, end)


def _draw(total: Array, number: int, key: Array) -> tuple[Array, Array]:
    """Draw so many of `total` `[B, K*V]` without replacement; the best come first.

    Source: Kool et al. 2019, arXiv:1903.06059: the largest after Gumbel noise is added.
    """
    noise = jax.random.gumbel(key, total.shape, total.dtype)
    drawn = lax.top_k(total + noise, number)[1]
    scores, order = lax.top_k(jnp.take_along_axis(total, drawn, axis=1), number)
    return scores, jnp.take_along_axis(drawn, order, axis=1)


def _next_beams(found: _Candidates, K: int) -> tuple[Array, Array, Array]:
    """Return the K best that have not ended: sequences, scores, the beams continued."""
    scores, chosen = lax.top_k(found.scores + jnp.where(found.end, LOW, 0.0), K)
    beam = jnp.take_along_axis(found.beam, chosen, axis=1)
    return _gather(found.sequences, chosen), scores, beam


def _collect(
    found: _Candidates, state: _State, penalty: Array, config: GenerationConfig
) -> tuple[Array, Array, Array]:
    """Return the K best ended so far: sequences, scores, which places are taken."""
    K, C = state.scores.shape[1], found.scores.shape[1]
    # The candidates beyond K are a reserve to go on with; they do not end.
    ends = found.end & (jnp.arange(C) < K)[None]
    scores = found.scores / penalty[state.step]
    if config.early_stopping is True:
        full = jnp.all(state.has_ended, axis=1, keepdims=True)
        scores = scores + jnp.where(full, LOW, 0.0)
    scores = scores + jnp.where(state.improvable, 0.0, LOW) + jnp.where(ends, 0.0, LOW)
    scores, chosen = lax.top_k(jnp.concatenate([state.ended_scores, scores], 1), K)
    sequences = jnp.concatenate([state.ended, found.sequences], axis=1)
    taken = jnp.concatenate([state.has_ended, ends], axis=1)
    return (
        _gather(sequences, chosen),
        scores,
        jnp.take_along_axis(taken, chosen, axis=1),
    )


def _gather(sequences: Array, chosen: Array) -> Array:
    """[B, A, n] at `chosen` [B, C] -> [B, C, n]."""
    return jnp.take_along_axis(sequences, chosen[:, :, None], axis=1)


def _follow(beams: Any, beam: Array) -> Any:
    """Reorder the cache `[B*K, ...]`: each beam gets that of the one it continues."""
    B, K = beam.shape
    rows = (jnp.arange(B)[:, None] * K + beam).reshape(-1)
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0), beams)
