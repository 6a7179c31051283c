"""Generation as one compiled program: greedy search, sampling, and beams.

Two pure functions stand for the model, so any model serves, adapted or not, with an
encoder or without:

    apply_encode(params, input_ids, attention_mask, *, length, beams)
        -> first tokens [B*K], cache
    apply_decode(params, tokens, cache) -> logits [B*K, V], cache

The cache is a dict: `"beams"` holds leaves `[B*K, ...]` that follow their beam, all
else goes from step to step as `apply_decode` returns it. A model with an encoder
answers with its start token; one without reads the prompt up to its last token and
answers with that. B is the batch, K the beams or samples of a prompt, V the vocabulary,
n the room for new tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jlora._errors import DataError, DtypeError, ShapeError, StructureError
from jlora._processes import on_host
from jlora.models._generate.beam import beam_search
from jlora.models._generate.config import GenerationConfig
from jlora.models._generate.functions import Decode, Encode, functions_of
from jlora.models._generate.history import History
from jlora.models._generate.settings import resolve, with_room
from jlora.models._generate.single import one_by_one
from jlora.models._parts.decoder import padding_left
from jlora.models._parts.explicit import without_explicit_axes

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
    is_encoder_decoder: bool = False,
) -> Array:
    """Generate with the two functions that stand for a model.

    It is compiled once for each shape, `config`, and pair of functions; pass the same
    function objects again, since a new closure is a new program.

    Args:
      apply_encode: `(params, input_ids, attention_mask, *, length, beams)`, starts:
        returns the first tokens `[B*K]`, and a cache in which `"beams"` holds the
        leaves `[B*K, ...]` that follow their beam. K is the beams of a prompt.
      apply_decode: `(params, tokens, cache)`, makes one step: returns the logits
        `[B*K, V]` and the cache.
      params: the first argument of both.
      input_ids: `[B, S]`.
      attention_mask: `[B, S]`, 0 at padding; `None` is no padding. A row that is all
        padding generates nothing but padding.
      config: what to do. `eos_token_id=None` never stops early.
      key: for sampling.
      transform: applied to both functions, for instance `jlora.lora`.
      is_encoder_decoder: whether the output begins anew, with the token that
        `apply_encode` returns (or `config.decoder_start_token_id`), rather than going
        on from the input. Rules about repetition and length look at what it follows.

    Returns:
      `[B*N, n]` int32: the new tokens, the end token included and padding after it. N
      is `config.num_return_sequences`.

    Raises:
      ShapeError: `input_ids` and `attention_mask` are not alike or not `[B, S]`.
      DataError: prompts of no tokens.
      StructureError: sampling without a key, or no room for new tokens.
    """
    return _generated(
        (apply_encode, apply_decode),
        params,
        input_ids,
        attention_mask,
        key,
        Plan(config, transform, is_encoder_decoder),
    )


class Plan(NamedTuple):
    """What a program of generation is compiled for, beside functions and shapes.

    Attributes:
      config: what to do.
      transform: applied to both functions.
      is_encoder_decoder: whether the output begins anew.
      left: turn rows so that padding stands on their left before they are read, and
        tell the function that reads them.
    """

    config: GenerationConfig
    transform: Transform | None
    is_encoder_decoder: bool
    left: bool = False


def _generated(
    functions: tuple[Encode, Decode],
    params: Any,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None,
    key: Array | None,
    plan: Plan,
) -> Array:
    """Check the prompts, and run the program."""
    ids = jnp.asarray(input_ids)
    mask = jnp.ones_like(ids) if attention_mask is None else jnp.asarray(attention_mask)
    config = plan.config
    if ids.ndim != 2 or ids.shape != mask.shape:
        raise ShapeError(
            f"input_ids {ids.shape} and attention_mask {mask.shape} must both be "
            "[batch, length].\nA single prompt is input_ids[None]."
        )
    if config.do_sample and key is None:
        raise StructureError("do_sample=True draws tokens: pass key=jax.random.key(0).")
    if ids.shape[0] and not ids.shape[1]:
        raise DataError(
            f"input_ids {ids.shape} are empty prompts: there is no token to go on "
            "from.\nBegin each with the tokenizer's bos_token_id, [[bos_token_id]]."
        )
    config = with_room(config, 1 if plan.is_encoder_decoder else ids.shape[1])
    if not ids.shape[0]:
        return jnp.zeros((0, config.max_new_tokens), jnp.int32)
    run = compiled(*functions, plan._replace(config=config))
    return run(ids.astype(jnp.int32), mask, params, key)


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
) -> np.ndarray | Array:
    """Generate with a model of `jlora.models`.

    The settings that count are those given here, then those of the checkpoint's
    `generation_config.json` (or, where there is none, of its `config.json`), then the
    defaults of `GenerationConfig`.

    Args:
      model: from `load`.
      params: its parameters; with `transform=jlora.lora` the lorafied ones.
      input_ids: `[B, S]`.
      attention_mask: `[B, S]`, 0 at padding; `None` is no padding. A row that is all
        padding generates nothing but padding.
      config: what to do, instead of what the files say; tokens that it leaves `None`
        are the model's.
      key: for sampling. Without one, files that ask for sampling are not followed,
        and a warning says so.
      transform: applied to the model's pure functions, for instance `jlora.lora`.
        Pass the same object again, or the program is compiled again.
      **settings: fields of `GenerationConfig`.

    Returns:
      `[B*N, n]` int32: the new tokens, padding after the end token, N sequences for
      each prompt and n the room for new tokens. The prompt and the start token are not
      repeated. It is a NumPy array, which `tokenizer.batch_decode` takes; under a
      transformation of JAX, or where it is spread over several processes, a
      `jax.Array`.

    Raises:
      ShapeError: `input_ids` and `attention_mask` are not alike or not `[B, S]`.
      DataError: an id beyond the vocabulary, or prompts of no tokens.
      DtypeError: `input_ids` are no integers.
      StructureError: settings that are not known, not honoured or exclude each other,
        sampling without a key, or a model that generates nothing.
    """
    functions = functions_of(model)
    config = resolve(model.config, config, settings, sampling=key is not None)
    _check_ids(input_ids, model.config.vocab_size)
    has_encoder = getattr(model, "is_encoder_decoder", False)
    plan = Plan(config, transform, has_encoder, left=not has_encoder)
    out = _generated(functions, params, input_ids, attention_mask, key, plan)
    if isinstance(out, jax.core.Tracer) or not out.is_fully_addressable:
        return out
    return np.asarray(out)


def _check_ids(input_ids: ArrayLike, vocab_size: int) -> None:
    """Refuse what is no token: its embedding would be NaN, and the output senseless."""
    if isinstance(input_ids, jax.core.Tracer):
        return
    ids = on_host(input_ids)
    if not ids.size:
        return  # an empty list is of no dtype
    if not np.issubdtype(ids.dtype, np.integer):
        raise DtypeError(f"input_ids must be integers, not {ids.dtype}.")
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.size:
        raise DataError(
            f"input_ids hold {wrong[0]}, and the model knows 0 to {vocab_size - 1}.\n"
            "Use the tokenizer that belongs to this checkpoint."
        )


@lru_cache(maxsize=64)
def compiled(apply_encode: Encode, apply_decode: Decode, plan: Plan) -> Any:
    """Return the jitted program; it holds no parameters."""
    config, transform = plan.config, plan.transform
    length, rows = config.max_new_tokens, config.rows_per_prompt
    left = {"left": True} if plan.left else {}
    encode: Encode = partial(apply_encode, length=length, beams=rows, **left)
    decode = apply_decode
    if transform is not None:
        encode, decode = transform(encode), transform(decode)

    def run(ids: Array, mask: Array, params: Any, key: Array | None) -> Array:
        if plan.left:
            ids, mask = padding_left(ids, mask.astype(bool))
        tokens, cache = encode(params, ids, mask)
        step, held = partial(decode, params), mask.astype(bool)
        history = _history(ids, held, tokens, config)
        if plan.is_encoder_decoder:
            start = config.decoder_start_token_id
            tokens = tokens if start is None else jnp.full_like(tokens, start)
            prompt, counted = tokens[:, None], jnp.ones((tokens.size, 1), bool)
            history = history._replace(prompt=prompt, counted=counted)
        search = beam_search if config.num_beams > 1 else one_by_one
        given = jnp.any(held, axis=1)
        out = search(step, tokens, cache, history, given, config, key)
        given = jnp.repeat(given, config.num_return_sequences)
        return jnp.where(given[:, None], out, config.pad_token_id or 0)

    return jax.jit(partial(without_explicit_axes, run))


def _history(
    ids: Array, mask: Array, tokens: Array, config: GenerationConfig
) -> History:
    """Return the history of rows that continue their inputs."""
    rows = config.rows_per_prompt
    source = jnp.repeat(ids, rows, axis=0)
    counted = jnp.repeat(mask, rows, axis=0)
    new = jnp.full(
        (tokens.shape[0], config.max_new_tokens), config.pad_token_id or 0, jnp.int32
    )
    prompt, counted = padding_left(source, counted)
    return History(source, prompt, counted, new, jnp.int32(0))
