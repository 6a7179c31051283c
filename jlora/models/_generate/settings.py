"""Whose settings count: the call's, then those of the checkpoint's files."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora._errors import DataError, JloraWarning, StructureError
from jlora._text import listed
from jlora.models._generate.config import FIELDS, GenerationConfig, as_tuple

# What `transformers` does and this does not, by the values that ask for nothing.
_NOT_HERE: dict[str, tuple[Any, ...]] = {
    "assistant_early_exit": (None,),
    "constraints": (None, []),
    "custom_generate": (None,),
    "diversity_penalty": (None, 0),
    "dola_layers": (None,),
    "force_words_ids": (None, []),
    "guidance_scale": (None, 1),
    "logits_processor": (None, []),
    "low_memory": (None, False),
    "max_time": (None,),
    "num_beam_groups": (None, 1),
    "penalty_alpha": (None, 0),
    "prefix_allowed_tokens_fn": (None,),
    "prompt_lookup_num_tokens": (None, 0),
    "stop_strings": (None, [], ""),
    "stopping_criteria": (None, []),
    "token_healing": (None, False),
    "use_mtp": (None, False),
    "watermarking_config": (None, {}),
}
# What changes no token here: how the reference computes, and what it returns besides.
_NEUTRAL = frozenset(
    {
        "assistant_confidence_threshold",
        "assistant_ensemble_weight",
        "assistant_lookbehind",
        "bos_token_id",
        "cache_config",
        "cache_implementation",
        "compile_config",
        "continuous_batching_config",
        "disable_compile",
        "is_assistant",
        "max_cache_len",
        "max_matching_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "prefill_chunk_size",
        "return_dict_in_generate",
        "speculation_type",
        "synced_gpus",
        "target_lookbehind",
        "transformers_version",
        "use_cache",
    }
)
# What other libraries call an argument of `generate`.
_OTHER_NAMES = {
    "decoder_input_ids": "decoder_start_token_id",
    "generation_config": "config",
    "generator": "key",
    "inputs": "input_ids",
    "max_tokens": "max_new_tokens",
    "prng_key": "key",
    "rng": "key",
    "seed": "key",
}
_ARGUMENTS = ("config", "key", "transform", "input_ids", "attention_mask")
# `transformers`' own defaults: a `config.json` that holds them asks for nothing.
_DEFAULTS = {"max_length": 20, "top_k": 50}
_LENGTHS = (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length"))
_UNSAMPLED = (
    "generation_config.json asks for sampling, which needs a key: without one the "
    "likeliest tokens are taken.\nPass key=jax.random.key(0) to draw, or "
    "do_sample=False."
)
_TOKENS = ("eos_token_id", "pad_token_id", "decoder_start_token_id")


def said_in_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of generation that a `config.json` of old holds.

    They count where there is no `generation_config.json`.

    Args:
      config: the parsed file.
    """
    said = {}
    for name in [*FIELDS, *_NOT_HERE]:
        value = config.get(name)
        nothing = (
            None,
            _DEFAULTS.get(name, FIELDS.get(name)),
            *_NOT_HERE.get(name, ()),
        )
        if name not in _TOKENS and value not in nothing and value != []:
            said[name] = value
    return said


def resolve(
    own: Any,
    config: GenerationConfig | None,
    given: Mapping[str, Any],
    *,
    sampling: bool,
) -> GenerationConfig:
    """Return the settings that count.

    Args:
      own: the model's configuration; `generation` holds what its files said.
      config: takes the place of what the files said, tokens aside.
      given: fields by name, which go before both.
      sampling: whether there is a key. Without one, a file that asks for sampling gets
        greedy or beam search, and a warning.

    Raises:
      StructureError: a name that is not known or not honoured, or a value that makes
        no sense.
      DataError: a token beyond the vocabulary.
    """
    given = _checked(given)
    said = dict(own.generation)
    tokens = {name: _token(name, own, said) for name in _TOKENS}
    if config is None:
        base, complaints = _honoured(said)
        asked = base.get("do_sample") and given.get("do_sample") is None
        if asked and not sampling:
            base["do_sample"] = False
            complaints.append(_UNSAMPLED)
        for text in complaints:
            warnings.warn(text, JloraWarning, stacklevel=3)
    else:
        base = {name: getattr(config, name) for name in FIELDS}
        tokens = {name: value for name, value in tokens.items() if base[name] is None}
    lengths = base if config is None else {}
    settings = {**base, **tokens, **_one_length(lengths, given)}
    resolved = GenerationConfig(**settings)
    _check_tokens(resolved, own.vocab_size)
    return resolved


def _one_length(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return `given`, and `None` for a length that counts otherwise and goes after.

    What is given goes before the rest, and the number of new tokens before the length
    of the whole.
    """
    chosen = dict(given)
    for new, whole in _LENGTHS:
        if new in given:
            chosen[whole] = None
        elif whole in given:
            chosen[new] = None
        elif base.get(new) != FIELDS[new] and base.get(new) is not None:
            chosen[whole] = None
    return chosen


def _checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was given as fields; refuse names that are none."""
    fields = {}
    for name, value in given.items():
        if name in FIELDS:
            if value is not None:  # which leaves it to the files
                fields[name] = value
        elif name in _NOT_HERE:
            if value not in _NOT_HERE[name]:
                raise StructureError(
                    f"generate: {name}={value!r} is not honoured here.\nLeave it out; "
                    "what can be set are the fields of models.GenerationConfig."
                )
        elif name not in _NEUTRAL:
            raise StructureError(_unknown(name))
    return fields


def _unknown(name: str) -> str:
    known = [*FIELDS, *_ARGUMENTS]
    near = [_OTHER_NAMES[name]] if name in _OTHER_NAMES else []
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return (
        f"generate has no argument {name!r}; the nearest is {near[0]!r}.\nIts settings "
        "are the fields of models.GenerationConfig."
    )


def _honoured(said: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of a `generation_config.json`, and what to warn of."""
    fields: dict[str, Any] = {}
    not_here: list[str] = []
    unknown: list[str] = []
    for name, value in said.items():
        if name in FIELDS:
            if value is not None and name not in _TOKENS:
                fields[name] = value
        elif name in _NOT_HERE:
            not_here += [] if value in _NOT_HERE[name] else [f"{name}: {value!r}"]
        elif name not in _NEUTRAL and not name.startswith("_") and value is not None:
            unknown.append(f"{name}: {value!r}")
    complaints = []
    if not_here:
        complaints.append(
            "generation_config.json has settings that are not honoured here:\n  "
            f"{listed(not_here)}\nThe output is as without them."
        )
    if unknown:
        complaints.append(
            "generation_config.json has settings that are not known and were passed "
            f"over:\n  {listed(unknown)}"
        )
    return fields, complaints


def _token(name: str, own: Any, said: Mapping[str, Any]) -> Any:
    """Return a token from a model's files: `generation_config.json` goes first."""
    value = said.get(name)
    value = getattr(own, name, None) if value is None else value
    value = tuple(value) if isinstance(value, list) else value
    if name == "pad_token_id" and value is None:
        # Models without a padding token fill up with their end token.
        ends = as_tuple(_token("eos_token_id", own, said))
        value = ends[0] if ends else None
    return value


def _check_tokens(config: GenerationConfig, vocabulary: int) -> None:
    """Refuse tokens that the model does not have where they would matter."""
    named = {
        "bad_words_ids": [t for ids in config.bad_words_ids for t in ids],
        "sequence_bias": [t for ids, _ in config.sequence_bias for t in ids],
        "forced_bos_token_id": as_tuple(config.forced_bos_token_id),
        "forced_eos_token_id": as_tuple(config.forced_eos_token_id),
        "decoder_start_token_id": as_tuple(config.decoder_start_token_id),
    }
    for name, ids in named.items():
        if any(np.asarray(ids, np.int64) >= vocabulary):
            raise DataError(
                f"{name} names token {max(ids)}, and the model knows 0 to "
                f"{vocabulary - 1}.\nUse the tokens of this checkpoint's tokenizer."
            )


def with_room(config: GenerationConfig, prompt: int) -> GenerationConfig:
    """Return `config` with `max_new_tokens` where it counts the prompt of that length.

    Raises:
      StructureError: the prompt alone is as long.
    """
    if config.max_length is None:
        return config
    room = config.max_length - prompt
    if room < 1:
        raise StructureError(
            f"max_length is {config.max_length}, and the prompt has {prompt} tokens, "
            "padding included: there is no room for new ones.\nPass max_new_tokens, "
            "which does not count the prompt."
        )
    return dataclasses.replace(config, max_new_tokens=room, max_length=None)
