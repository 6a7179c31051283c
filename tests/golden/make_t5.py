"""Make `golden/t5`: tiny random T5s, and what PyTorch's transformers makes of them.

    python -m tests.golden.make_t5

Each folder holds a checkpoint as `save_pretrained` writes it, `io.safetensors` (inputs
and logits) and `generated.json` (settings and tokens). The files are a few ten kB;
they are made once, and again only where a case is added.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

from ._common import write_versions

HERE = Path(__file__).parent / "t5"
VOCAB, EOS = 37, 1
FORMS = {
    "v10": {"feed_forward_proj": "relu"},
    "v11": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
# Offsets reach far beyond max_distance; buckets change at every power.
BUCKETS = [(32, 128), (32, 64), (16, 20), (64, 1000), (20, 100)]


def random_t5(form: str, seed: int) -> T5ForConditionalGeneration:
    """Return a model whose parts all matter, and which ends its sequences at times."""
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 3}  # H*D is not d
    layers = {"num_layers": 2, "num_decoder_layers": 2}
    config = T5Config(
        vocab_size=VOCAB, decoder_start_token_id=0, **sizes, **layers, **FORMS[form]
    )
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "layer_norm" in name:
                value.add_(0.3 * torch.randn_like(value))
            if "relative_attention_bias" in name or name.endswith("q.weight"):
                value.mul_(1.5)  # or attention would be nearly uniform
            if "shared" in name:
                value.mul_(0.3)  # or a tied head would repeat its input
        if form == "v11":
            head = 0.3 * torch.randn(VOCAB, config.d_model)
            model.lm_head.weight = torch.nn.Parameter(head)
    _end_sometimes(model)
    return model


def _end_sometimes(model: T5ForConditionalGeneration, often: float = 0.2) -> None:
    """Turn the end token's row of the head so that it wins `often`."""
    with torch.no_grad():
        ids = torch.randint(2, VOCAB, (64, 9))
        target = torch.randint(2, VOCAB, (64, 10))
        target[:, 0] = 0
        out = model(input_ids=ids, decoder_input_ids=target, output_hidden_states=True)
        h = out.decoder_hidden_states[-1].flatten(0, 1)
        along = h.mean(0) / h.mean(0).norm()
        head = model.lm_head.weight.clone()
        head[EOS] = 0
        ratio = (h @ head.T).amax(-1) / (h @ along)
        ratio = torch.where(ratio > 0, ratio, torch.inf)
        model.lm_head.weight[EOS] = along * torch.quantile(ratio, often)


def inputs(seed: int, batch: int = 4) -> dict[str, np.ndarray]:
    """Return a batch padded on the right, on the left, and not at all."""
    rng = np.random.default_rng(seed)
    ids, target = rng.integers(2, VOCAB, (2, batch, 9))
    mask, target_mask = np.ones((2, batch, 9), np.int64)
    mask[1, 6:], mask[2, :4], mask[3, 2:] = 0, 0, 0
    target_mask[0, 5:] = 0
    target[:, 0] = 0
    return {
        "input_ids": np.where(mask, ids, 0),
        "attention_mask": mask,
        "decoder_input_ids": np.where(target_mask, target, 0),
        "decoder_attention_mask": target_mask,
    }


def settings(new_tokens: int = 12) -> list[dict[str, Any]]:
    """Return greedy and beam settings, by the names both sides share."""
    # Every beam with every penalty; too short an output is forbidden in half of them.
    beams = itertools.product((2, 4), (0.6, 1.0, 2.0))
    every = [(1, 1.0, 0), (1, 1.0, 4)]
    every += [(*case, 4 * (i % 2)) for i, case in enumerate(beams)]
    return [
        {
            "num_beams": beams,
            "length_penalty": penalty,
            "min_new_tokens": least,
            "max_new_tokens": new_tokens,
        }
        for beams, penalty, least in every
    ]


def generated(
    model: T5ForConditionalGeneration, batch: dict[str, np.ndarray], **how: Any
) -> list[list[int]]:
    """Return transformers' tokens up to the end token, without the start token."""
    tensors = {k: torch.tensor(v) for k, v in batch.items() if "decoder" not in k}
    with torch.no_grad():
        rows = model.generate(**tensors, do_sample=False, **how)
    # What follows the end token is padding for greedy and end tokens for beams.
    return [until_end(row[1:]) for row in rows.tolist()]


def until_end(row: list[int]) -> list[int]:
    """Return `row` up to and including the end token."""
    return row[: row.index(EOS) + 1] if EOS in row else row


def logits(
    model: T5ForConditionalGeneration, batch: dict[str, np.ndarray]
) -> np.ndarray:
    """Return PyTorch's logits."""
    with torch.no_grad():
        out = model(**{name: torch.tensor(value) for name, value in batch.items()})
    return out.logits.numpy()


def buckets() -> dict[str, np.ndarray]:
    """Return PyTorch's buckets of the offsets -1500..1500, by settings."""
    offsets = torch.arange(-1500, 1501)
    bucket = T5Attention._relative_position_bucket
    return {
        f"{kind}/{number}/{distance}": bucket(offsets, both, number, distance)
        .numpy()
        .astype(np.uint8)
        for number, distance in BUCKETS
        for kind, both in (("both", True), ("past", False))
    }


def main() -> None:
    """Write every file."""
    HERE.mkdir(exist_ok=True)
    save_file(buckets(), HERE / "buckets.safetensors")
    for seed, form in enumerate(FORMS):
        model, batch = random_t5(form, seed), inputs(seed)
        model.save_pretrained(HERE / form)
        io = {**batch, "logits": logits(model, batch)}
        save_file(io, HERE / form / "io.safetensors")
        cases = [
            {"settings": how, "tokens": generated(model, batch, **how)}
            for how in settings()[:: 3 if form == "v10" else 1]
        ]
        text = ",\n".join(json.dumps(case) for case in cases)
        (HERE / form / "generated.json").write_text(f"[\n{text}\n]\n")
    write_versions(HERE)


if __name__ == "__main__":
    main()
