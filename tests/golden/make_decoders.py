"""Make `golden/decoders`: tiny random decoders, and what transformers makes of them.

    python -m tests.golden.make_decoders

Each folder holds a checkpoint as `save_pretrained` writes it, `io.safetensors` (inputs
and logits) and `generated.json` (settings and tokens).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

from ._common import write_versions

HERE = Path(__file__).parent / "decoders"
VOCAB, EOS = 37, 1
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_positions": 32,
    "n_embd": 18,
    "n_layer": 2,
    "n_head": 3,
    "bos_token_id": 2,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,  # some waves are longer, some shorter
}
WINDOW = {"sliding_window": 4}
# Caps that bend, and a scale that is not the heads' width.
GEMMA = {**LLAMA, "head_dim": 6, "query_pre_attn_scalar": 11}
GEMMA2 = {
    **GEMMA,
    **WINDOW,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 0.5,
}
GEMMA3 = {
    **GEMMA,
    **WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 200.0, "factor": 4.0},
    },
}
QWEN_MOE = {
    **LLAMA,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,  # which PyTorch wants to be a multiple of 4
}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2),
    "llama": ("llama", {**LLAMA, "head_dim": 8, "rope_parameters": LLAMA3}),
    "mistral": ("mistral", {**LLAMA, **WINDOW}),
    "qwen2": ("qwen2", {**LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**LLAMA, "head_dim": 6}),
    "gemma2": ("gemma2", GEMMA2),
    "gemma3": ("gemma3_text", GEMMA3),
    "mixtral": ("mixtral", {**LLAMA, "num_local_experts": 3}),
    "qwen2_moe": (
        "qwen2_moe",
        {**QWEN_MOE, "shared_expert_intermediate_size": 14, "mlp_only_layers": [0]},
    ),
    "qwen3_moe": ("qwen3_moe", {**QWEN_MOE, "head_dim": 6, "norm_topk_prob": True}),
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
# What is compared live only.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2 untied": ("gpt2", {**GPT2, "tie_word_embeddings": False, "n_inner": 20}),
    "gpt2 scaled": (
        "gpt2",
        {
            **GPT2,
            "scale_attn_by_inverse_layer_idx": True,
            "scale_attn_weights": False,
            "activation_function": "relu",
        },
    ),
    "llama plain": ("llama", {**LLAMA, "num_key_value_heads": 4}),
    "llama one key head": ("llama", {**LLAMA, "num_key_value_heads": 1}),
    "llama linear": ("llama", {**LLAMA, "rope_parameters": LINEAR}),
    "llama biases": ("llama", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "mistral without window": ("mistral", {**LLAMA, "sliding_window": None}),
    "qwen2 half sliding": (
        "qwen2",
        {**LLAMA, **WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "qwen3 biases, sliding": (
        "qwen3",
        {
            **LLAMA,
            **WINDOW,
            "use_sliding_window": True,
            "attention_bias": True,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gemma": ("gemma", {**LLAMA, "head_dim": 6, "hidden_act": "gelu"}),
    "gemma2 untied, uncapped": (
        "gemma2",
        {
            **GEMMA2,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
            "attention_bias": True,
        },
    ),
    "gemma3 by its period": (
        "gemma3_text",
        {
            **GEMMA,
            **WINDOW,
            "sliding_window_pattern": 2,
            "final_logit_softcapping": 0.5,
        },
    ),
    "mixtral sliding, all experts": (
        "mixtral",
        {**LLAMA, **WINDOW, "num_local_experts": 3, "num_experts_per_tok": 3},
    ),
    "qwen2_moe half sliding": (
        "qwen2_moe",
        {
            **QWEN_MOE,
            **WINDOW,
            "shared_expert_intermediate_size": 14,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "use_sliding_window": True,
        },
    ),
    "qwen3_moe sliding": (
        "qwen3_moe",
        {**QWEN_MOE, **WINDOW, "use_sliding_window": True, "num_experts_per_tok": 1},
    ),
}


def random_decoder(form: str, seed: int) -> Any:
    """Return a model whose parts all matter, and which ends its sequences at times."""
    torch.manual_seed(seed)
    kind, settings = {**FORMS, **MORE}[form]
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            spread = 0.35
            if "embed_tokens" in name or "wte" in name:
                # Or a tied head would repeat its input.
                embedding = model.get_input_embeddings()
                spread = 0.15 / getattr(embedding, "scalar_embed_scale", 1)
            value.add_(spread * torch.randn_like(value))
    _end_sometimes(model)
    return model


def _end_sometimes(model: Any, often: float = 0.15) -> None:
    """Turn the end token's row of the head so that it wins `often`."""
    with torch.no_grad():
        ids = torch.randint(2, VOCAB, (64, 9))
        out = model(input_ids=ids, output_hidden_states=True)
        h = out.hidden_states[-1].flatten(0, 1)
        along = h.mean(0) / h.mean(0).norm()
        head = model.lm_head.weight.clone()
        head[EOS] = 0
        ratio = (h @ head.T).amax(-1) / (h @ along)
        ratio = torch.where(ratio > 0, ratio, torch.inf)
        model.lm_head.weight[EOS] = along * torch.quantile(ratio, often)


def inputs(seed: int, batch: int = 4, length: int = 9) -> dict[str, np.ndarray]:
    """Return a batch padded on the right, on the left, and not at all."""
    ids = np.random.default_rng(seed).integers(2, VOCAB, (batch, length))
    mask = np.ones((batch, length), np.int64)
    mask[1, 6:], mask[2, :4], mask[3, :7] = 0, 0, 0
    return {"input_ids": np.where(mask, ids, 0), "attention_mask": mask}


def logits(model: Any, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Return PyTorch's logits, 0 at padding, with the positions `generate` counts."""
    tensors = {name: torch.tensor(value) for name, value in batch.items()}
    mask = tensors["attention_mask"]
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
    with torch.no_grad():
        out = model(**tensors, position_ids=positions)
    return (out.logits * mask[..., None]).numpy()


def settings(new_tokens: int = 10) -> list[dict[str, Any]]:
    """Return greedy and beam settings, by the names both sides share."""
    every = [(1, 1.0, 0), (1, 1.0, 4), (3, 1.0, 0), (2, 0.6, 4), (4, 2.0, 0)]
    return [
        {
            "num_beams": beams,
            "length_penalty": penalty,
            "min_new_tokens": least,
            "max_new_tokens": new_tokens,
        }
        for beams, penalty, least in every
    ]


def to_the_right(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the batch with all padding on the left, as `generate` of PyTorch needs."""
    order = np.argsort(batch["attention_mask"], axis=1, kind="stable")
    return {k: np.take_along_axis(v, order, axis=1) for k, v in batch.items()}


def generated(model: Any, batch: dict[str, np.ndarray], **how: Any) -> list[list[int]]:
    """Return transformers' new tokens up to the end token."""
    tensors = {k: torch.tensor(v) for k, v in to_the_right(batch).items()}
    with torch.no_grad():
        rows = model.generate(**tensors, do_sample=False, **how)
    new = rows[:, tensors["input_ids"].shape[1] :].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in new]


def main() -> None:
    """Write the files of every form that has none; remove its folder to make it anew."""
    HERE.mkdir(exist_ok=True)
    for seed, form in enumerate(FORMS):
        if (HERE / form).exists():
            continue
        model, batch = random_decoder(form, seed), inputs(seed)
        model.save_pretrained(HERE / form)
        save_file(
            {**batch, "logits": logits(model, batch)}, HERE / form / "io.safetensors"
        )
        cases = [
            {"settings": how, "tokens": generated(model, batch, **how)}
            for how in settings()
        ]
        text = ",\n".join(json.dumps(case) for case in cases)
        (HERE / form / "generated.json").write_text(f"[\n{text}\n]\n")
    write_versions(HERE)


if __name__ == "__main__":
    main()
