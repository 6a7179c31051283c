"""PyTorch's libraries at their best settings, on the same sizes.

Best settings: all cores, denormals flushed, the fused optimiser, scaled-dot-product
attention, no cache, autocast around a bfloat16 base with float32 adapters.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
import transformers.trainer_pt_utils

from benchmarks.cases import Case

MODELS = {
    "t5": (transformers.T5Config, transformers.T5ForConditionalGeneration),
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
}
STD = 0.02  # of the head, as in `work`
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# -- models ----------------------------------------------------------------------------


@functools.cache
def settle() -> None:
    """Let PyTorch use the machine as well as it can."""
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_flush_denormal(True)
    torch.backends.cudnn.benchmark = True


def made(case: Case, kind: str) -> Any:
    """Return a random model without dropout, as `kind` trains it."""
    settle()
    config_class, model_class = MODELS[case.model_type]
    model = model_class(config_class(**case.config))
    if case.config.get("tie_word_embeddings") is False:
        # T5 ties its head whatever the configuration says; another tensor unties it.
        head = torch.empty_like(model.lm_head.weight)
        model.lm_head.weight = torch.nn.Parameter(head.normal_(std=STD))
    model = model.to(getattr(torch, case.dtype))
    adapt = loralib if kind == "loralib" else peft
    return adapt(case, model).to(DEVICE)


def peft(case: Case, model: Any) -> Any:
    """Return the model with PEFT's adapters."""
    import peft as library

    config = library.LoraConfig(
        r=case.rank,
        lora_alpha=2 * case.rank,
        target_modules=targets(case),
        lora_dropout=0.0,
        fan_in_fan_out=case.model_type == "gpt2",
    )
    return library.get_peft_model(model, config)


def loralib(case: Case, model: Any) -> Any:
    """Return the model with loralib's layers in the place of PyTorch's."""
    import loralib as library

    if case.targets == "all-linear":
        raise ValueError("loralib has no all-linear; name the layers")
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] not in targets(case):
            continue
        conv = isinstance(module, transformers.pytorch_utils.Conv1D)
        i, o = module.weight.shape if conv else module.weight.shape[::-1]
        layer = library.Linear(
            i, o, r=case.rank, lora_alpha=2 * case.rank, merge_weights=False,
            bias=module.bias is not None, fan_in_fan_out=conv,
        )  # fmt: skip
        layer.weight, layer.bias = module.weight, module.bias
        model.set_submodule(name, layer)
    library.mark_only_lora_as_trainable(model)
    return model


def targets(case: Case) -> list[str] | str:
    """Return PyTorch's names of what the case adapts."""
    if case.targets == "all-linear":
        return case.targets
    roles = {"query", "key", "value"} & {*case.names}
    if case.model_type == "gpt2" and roles:
        raise ValueError(
            f"no adapters for {sorted(roles)}, thirds of a fused kernel; compare with "
            "--targets c_attn"
        )
    return [case.family["names"].get(name, name) for name in case.names]


def autocast(case: Case) -> Any:
    """Compute a bfloat16 case in bfloat16, adapters and full parameters being wider."""
    if case.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(DEVICE, getattr(torch, case.dtype))


def on_device(batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return a batch as PyTorch takes it."""
    return {k: torch.from_numpy(v).long().to(DEVICE) for k, v in batch.items()}


def waited(x: Any = None) -> Any:
    """Return `x` when the device has done its work."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return x


# -- what a worker builds --------------------------------------------------------------


def trainer(case: Case, kind: str) -> Any:
    """Return a function that trains on a batch, and what it trains."""
    model = made(case, kind).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    run = torch.compile(model) if "compile" in kind else model

    def train(batch: Mapping[str, Any]) -> Any:
        with autocast(case):
            loss = run(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return train, trained


def training(case: Mapping[str, Any], kind: str) -> Any:
    """A step of PEFT, eager or compiled, or of loralib."""
    one = Case(**case)
    train, trained = trainer(one, kind)
    batch = on_device(one.arrays())
    start = time.perf_counter()
    loss = float(train(batch))
    facts = {
        "first_step_s": time.perf_counter() - start,
        "loss": loss,
        "trainable": sum(p.numel() for p in trained),
    }
    return lambda: waited(train(batch)), facts


def text(case: Mapping[str, Any], sides: Any, size: int, grouped: bool) -> Any:
    """Passes over real text in batches that are each padded to their longest.

    Batches are drawn at random, or `grouped`: of sources of about the same length, as
    `Trainer` draws them with `train_sampling_strategy="group_by_length"`.
    """
    one = Case(**case)
    train, _ = trainer(one, "PEFT")
    generator = torch.Generator().manual_seed(0)
    lengths = [len(ids) for ids in sides[0]]
    facts = {"steps": 0, "padded_tokens": 0}

    def order() -> Sequence[int]:
        if grouped:
            group = transformers.trainer_pt_utils.get_length_grouped_indices
            return group(lengths, size, generator=generator)
        return torch.randperm(len(lengths), generator=generator).tolist()

    def step() -> None:
        rows, facts["steps"], facts["padded_tokens"] = order(), 0, 0
        for start in range(0, len(rows), size):
            chosen = rows[start : start + size]
            ids, labels = ([side[i] for i in chosen] for side in sides)
            batch = {
                "input_ids": padded(ids, 0),
                "attention_mask": padded([[1] * len(x) for x in ids], 0),
                "labels": padded(labels, -100),
            }
            facts["steps"] += 1
            facts["padded_tokens"] += batch["input_ids"].size + batch["labels"].size
            train(on_device(batch))
        waited()

    start = time.perf_counter()
    step()
    facts["first_pass_s"] = time.perf_counter() - start
    return step, facts


def padded(rows: Sequence[Sequence[int]], fill: int) -> np.ndarray:
    """Return rows as one array, filled up to the longest."""
    longest = max(map(len, rows))
    return np.array([[*row, *[fill] * (longest - len(row))] for row in rows], np.int32)


def generation(case: Mapping[str, Any], beams: int, tokens: int) -> Any:
    """Tokens from PEFT's model, greedy or by beams."""
    one = Case(**case)
    model = made(one, "PEFT").eval()
    ids = on_device(one.arrays())["input_ids"]
    settings = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
        "num_beams": beams,
        "do_sample": False,
        "pad_token_id": 0,
    }

    def step() -> None:
        with torch.inference_mode(), autocast(one):
            model.generate(input_ids=ids, **settings).cpu()

    return step, {}


def merge(case: Mapping[str, Any], safe: bool) -> Any:
    """PEFT's merge of every adapted kernel; the next one is of what it made."""
    from peft.tuners.lora import LoraLayer

    model = made(Case(**case), "PEFT")
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    factors = [x for m in layers for x in (*m.lora_A.values(), *m.lora_B.values())]
    # The least there is to do: read base and factors, write the merged kernels.
    moved = sum(2 * m.get_base_layer().weight.nbytes for m in layers)
    moved += sum(x.weight.nbytes for x in factors)

    def step() -> None:
        with torch.no_grad():
            for layer in layers:
                layer.merge(safe_merge=safe)
                layer.merged_adapters.clear()  # else the next merge does nothing
        waited()

    start = time.perf_counter()
    step()
    return step, {"bytes_moved": moved, "first_s": time.perf_counter() - start}


def mixed_batches(case: Mapping[str, Any], adapters: int) -> Any:
    """PEFT's mixed batch: `adapter_names` in a forward pass."""
    from benchmarks.mixed_batches import numbers

    one = Case(**case)
    model = made(one, "PEFT").eval()
    names = ["default", *(f"adapter{n}" for n in range(1, adapters))]
    for name in names[1:]:
        model.add_adapter(name, model.peft_config["default"])
    ids = on_device(one.arrays())["input_ids"]
    which = [names[n] for n in numbers(len(ids), adapters)]

    def step() -> None:
        with torch.inference_mode(), autocast(one):
            waited(model(input_ids=ids, adapter_names=which).logits)

    return step, {}
