"""Make `golden/peft`: adapters that PEFT made and saved, and what they compute.

    python tests/golden/make_peft.py

`net` holds the base of the cases `net_*` (of `tests/peft_live.py`), `llama_tied` one as
`save_pretrained` writes it. Each case has PEFT's folder, and `io.safetensors` with the
inputs and PEFT's logits; of several adapters one a name. The cases `gpt2_cattn`,
`llama_dora_patterns`, `roberta_cls` and `t5_qv` are from elsewhere and stay. Files are
made once, and again only where a case is added.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from peft_live import net, peft_model, peft_save
from peft_nets import IDS

HERE = Path(__file__).parent / "peft"
EXPERTS = ["experts.down_proj", "experts.gate_up_proj"]
NET: dict[str, dict[str, Any]] = {
    "net_conv": dict(target_modules=["image", "time"], r=3, rank_pattern={"time": 2}),
    "net_experts": dict(
        target_modules=["q"], target_parameters=EXPERTS, r=2,
        rank_pattern={"down_proj": 3}, alpha_pattern={"gate_up_proj": 5},
    ),
    "net_dora": dict(
        target_modules=["q", "v", "c_attn", "image", "time", "emb"], use_dora=True, r=2,
    ),
    "net_lora_bias": dict(target_modules=["q", "image"], r=2, lora_bias=True),
    "net_tokens": dict(target_modules=["q"], trainable_token_indices={"emb": [3, 0]}),
}  # fmt: skip
SEVERAL: dict[str, dict[str, Any]] = {
    "default": dict(target_modules=["q"], r=2),
    "second": dict(target_modules=["q", "v"], r=3, use_rslora=True, lora_alpha=5),
}
LLAMA: dict[str, dict[str, Any]] = {
    "llama_tied": dict(
        target_modules=["embed_tokens", "q_proj"], r=2, ensure_weight_tying=True
    ),
    "llama_tied_tokens": dict(target_modules=["q_proj"], trainable_token_indices=[7, 2]),
    "llama_tied_saved": dict(
        target_modules=["v_proj"], modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    ),
}  # fmt: skip


def llama() -> Any:
    """Return a tiny Llama with a tied head."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=13, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.3)
    return model


def logits(model: Any) -> np.ndarray:
    """Return what the model makes of the ids."""
    with torch.no_grad():
        out = model(torch.tensor(IDS))
    return np.ascontiguousarray(getattr(out, "logits", out).numpy())


def write(case: str, model: Any, **io: np.ndarray) -> None:
    """Write one case."""
    peft_save(model, HERE / case / "adapter")
    (HERE / case / "adapter" / "README.md").unlink()
    save_file({"input_ids": IDS, **io}, HERE / case / "io.safetensors")


def several() -> None:
    """Write two adapters of one folder."""
    model = peft_model(net(), **SEVERAL["default"])
    model.add_adapter("second", peft.LoraConfig(**SEVERAL["second"]))
    torch.manual_seed(3)
    for name, value in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.4)
    io = {}
    for name in SEVERAL:
        model.set_adapter(name)
        io[f"{name}_logits"] = logits(model)
    write("net_several", model, **io)
    (HERE / "net_several" / "adapter" / "second" / "README.md").unlink(missing_ok=True)


def main() -> None:
    """Write every file."""
    (HERE / "net").mkdir(exist_ok=True)
    base = {n: p.detach().numpy() for n, p in net().named_parameters()}
    save_file(base, HERE / "net" / "base.safetensors")
    for case, settings in NET.items():
        model = peft_model(net(), **settings)
        write(case, model, adapter_logits=logits(model))
    several()
    llama().save_pretrained(HERE / "llama_tied" / "base")
    for case, settings in LLAMA.items():
        model = peft_model(llama(), **settings)
        write(case, model, adapter_logits=logits(model))
    packages = {"torch": torch, "transformers": transformers, "peft": peft}
    versions = {n: p.__version__ for n, p in packages.items()}
    versions["python"] = platform.python_version()
    (HERE / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
