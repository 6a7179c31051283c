"""Make `golden/rules.json`: tokens of `transformers` under every rule of generation.

    python -m tests.golden.make_rules

The models are those in `golden/t5` and `golden/decoders`; they are read, not made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, T5ForConditionalGeneration

from . import make_decoders, make_t5

HERE = Path(__file__).parent
FORMS = ("t5/v11", "t5/v10", "decoders/gpt2", "decoders/llama")
BEAMS = {"num_beams": 3}
# `main` names those that change no token of any model: they test nothing.
RULES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.7, **BEAMS},
    {"encoder_repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3, **BEAMS},
    {"encoder_no_repeat_ngram_size": 1, **BEAMS},
    {"encoder_no_repeat_ngram_size": 2},
    {"bad_words_ids": [[1], [6], [23], [8, 30], [30, 8], [12, 12, 12], [5]]},
    {"bad_words_ids": [[16], [2, 20], [20]], **BEAMS},
    {"sequence_bias": [[[7], 3.0], [[9], -2.0], [[7, 11], 5.0], [[7, 11, 4], 6.0]]},
    {"sequence_bias": [[[3], 1.5], [[3, 3], -4.0]], **BEAMS},
    {"min_length": 13},
    {"min_length": 5, **BEAMS},
    {"min_new_tokens": 6},
    {"suppress_tokens": [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31]},
    {"suppress_tokens": [4, 6, 8, 10, 20, 30], **BEAMS},
    {"begin_suppress_tokens": list(range(10, 37))},
    {"begin_suppress_tokens": list(range(2, 20)), "forced_bos_token_id": 4},
    {"forced_bos_token_id": 9, **BEAMS},
    {"forced_eos_token_id": 1, "min_new_tokens": 9},
    {"forced_eos_token_id": [5], "eos_token_id": [1, 5], **BEAMS},
    {"exponential_decay_length_penalty": [2, 1.3]},
    {"exponential_decay_length_penalty": [1, 0.8], **BEAMS},
    {"length_penalty": -1.0, **BEAMS},
    {"early_stopping": True, **BEAMS},
    {"early_stopping": "never", **BEAMS},
    {"early_stopping": True, "length_penalty": 3.0, **BEAMS},
    {"early_stopping": "never", "length_penalty": 2.0, **BEAMS},
    {"num_return_sequences": 3, **BEAMS},
    {"num_return_sequences": 2, "num_beams": 4, "early_stopping": True},
    {"renormalize_logits": True, "remove_invalid_values": True, **BEAMS},
    {"decoder_start_token_id": 7},
    {"max_length": 13},
    {"eos_token_id": [1, 9, 4], "no_repeat_ngram_size": 2, **BEAMS},
    {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[4], [9, 9]],
        "suppress_tokens": [12],
        "min_new_tokens": 3,
        "exponential_decay_length_penalty": [4, 1.1],
        "renormalize_logits": True,
        **BEAMS,
    },
]


def load(form: str, folder: Path | None = None) -> Any:
    """Return a model of PyTorch."""
    kind = T5ForConditionalGeneration if form[:2] == "t5" else AutoModelForCausalLM
    return kind.from_pretrained(folder or HERE / form).eval()


def inputs(form: str, seed: int = 0) -> dict[str, Any]:
    """Return a padded batch, of a decoder with all padding on the left."""
    if form[:2] == "t5":
        batch = make_t5.inputs(seed)
    else:
        batch = make_decoders.to_the_right(make_decoders.inputs(seed))
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def generated(model: Any, batch: dict[str, Any], how: dict[str, Any]) -> Any:
    """Return the new tokens up to the first end token, and without the prompt."""
    tensors = {name: torch.tensor(value) for name, value in batch.items()}
    room = {} if "max_length" in how else {"max_new_tokens": 10}
    with torch.no_grad():
        rows = model.generate(**tensors, do_sample=False, **room, **how)
    encoder = model.config.is_encoder_decoder
    prompt = 1 if encoder else tensors["input_ids"].shape[1]
    ends = how.get("eos_token_id", [1])
    return [until_end(row[prompt:], ends) for row in rows.tolist()]


def until_end(row: list[int], ends: list[int]) -> list[int]:
    """Return `row` up to and including the first of `ends`."""
    first = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
    return row[: first + 1]


def main() -> None:
    """Write the file."""
    found: dict[str, Any] = {"rules": RULES}
    idle = list(RULES)
    for form in FORMS:
        model, batch = load(form), inputs(form)
        rows = [generated(model, batch, how) for how in RULES]
        same = {name: value.tolist() for name, value in batch.items()}
        found[form] = {**same, "tokens": rows}
        for how, tokens in zip(RULES, rows, strict=True):
            plain = {k: v for k, v in how.items() if k == "num_beams"}
            if how in idle and tokens != generated(model, batch, plain):
                idle.remove(how)
    print("rules that changed nothing:", *idle, sep="\n  ")
    text = ",\n".join(f'"{f}": {json.dumps(rows)}' for f, rows in found.items())
    (HERE / "rules.json").write_text(f"{{\n{text}\n}}\n")


if __name__ == "__main__":
    main()
