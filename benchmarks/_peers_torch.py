"""The steps of PyTorch's libraries, at their best settings, on the same sizes.

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

from benchmarks import merge, text
from benchmarks._batch import HEAD_STD, batch_of
from benchmarks._cases import NAMES, Case

MODELS = {
    "t5": (transformers.T5Config, transformers.T5ForConditionalGeneration),
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
}
KINDS = ("PEFT", "PEFT, torch.compile", "loralib", "torch full")


def device() -> torch.device:
    """Return the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Training:
    """A step of one of `KINDS`."""

    def __init__(self, case: Mapping[str, Any], kind: str) -> None:
        settle()
        self.case = Case(**case)
        model = adapted(self.case, kind).train().to(device())
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)
        # A model of its own name, for compiling wraps it.
        self.model = torch.compile(model) if "compile" in kind else model
        self.batch = on_device(batch_of(self.case))
        start = time.perf_counter()
        loss = float(self.step())
        self.facts = {
            "first_step_s": time.perf_counter() - start,
            "loss": loss,
            "trainable": sum(p.numel() for p in self.trained),
        }

    def step(self) -> Any:
        """Run one step and wait for it."""
        loss = self.train(self.batch)
        if loss.is_cuda:
            torch.cuda.synchronize()
        return loss

    def train(self, batch: Mapping[str, Any]) -> Any:
        """Run one step on a batch."""
        with autocast(self.case):
            loss = self.model(**batch, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


class Padded:
    """Passes over real text in batches that are each padded to their longest.

    Batches are drawn at random, or `grouped`: of sources of about the same length, as
    `Trainer` draws them with `train_sampling_strategy="group_by_length"`.
    """

    def __init__(
        self, case: Mapping[str, Any], file: str, size: int, grouped: bool
    ) -> None:
        self.sentences, self.size = text.read(file), size
        self.grouped, self.rng = grouped, torch.Generator().manual_seed(0)
        self.training = Training(case, "PEFT")
        self.used = text.Used(self.sentences)
        start = time.perf_counter()
        self.step()
        self.first = time.perf_counter() - start

    @property
    def facts(self) -> dict[str, Any]:
        """What was found out by now."""
        return {"first_pass_s": self.first, **self.used.facts}

    def step(self) -> None:
        """Train on every sentence once."""
        order = self.order()
        for start in range(0, len(order), self.size):
            batch = self.batch(order[start : start + self.size])
            self.used.add(batch["input_ids"].size + batch["labels"].size)
            self.training.train(on_device(batch))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.used.end()

    def order(self) -> list[int]:
        """Return a pass's order."""
        lengths = [len(x) for x in self.sentences.sources]
        if self.grouped:
            group = transformers.trainer_pt_utils.get_length_grouped_indices
            return group(lengths, self.size, generator=self.rng)
        return torch.randperm(len(lengths), generator=self.rng).tolist()

    def batch(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Return a batch as `DataCollatorForSeq2Seq` makes it."""
        sources = [self.sentences.sources[i] for i in rows]
        ids = text.padded(sources, text.PAD)
        return {
            "input_ids": ids,
            "attention_mask": text.padded([np.ones_like(x) for x in sources], 0),
            "labels": text.padded([self.sentences.targets[i] for i in rows], -100),
        }


class Matmul:
    """PyTorch's square products, beside XLA's."""

    def __init__(self, size: int, dtype: str, times: int) -> None:
        settle()
        kind = {"dtype": getattr(torch, dtype), "device": device()}
        self.x, self.y = (torch.randn(size, size, **kind) for _ in range(2))
        self.x *= size**-0.5  # products stay as large as y
        self.times = times
        self.facts = {"gflop": times * 2 * size**3 / 1e9, "size": size, "dtype": dtype}

    def step(self) -> None:
        """Multiply so many times, each product with the one before."""
        z = self.y
        for _ in range(self.times):
            z = self.x @ z
        if self.x.is_cuda:
            torch.cuda.synchronize()


class Generation:
    """Tokens from PEFT's model, greedy or by beams."""

    def __init__(self, case: Mapping[str, Any], beams: int, tokens: int) -> None:
        settle()
        self.case = Case(**case)
        self.model = adapted(self.case, "PEFT").eval().to(device())
        ids = on_device(batch_of(self.case))["input_ids"]
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self.settings = {
            "max_new_tokens": tokens,
            "min_new_tokens": tokens,
            "num_beams": beams,
            "do_sample": False,
            "pad_token_id": 0,
        }
        self.step()
        self.facts = {"tokens": tokens * self.case.batch}

    def step(self) -> None:
        """Generate once."""
        with torch.inference_mode(), autocast(self.case):
            out = self.model.generate(**self.inputs, **self.settings)
        out.cpu()


class Merge:
    """PEFT's merge of every adapted kernel; the next one is of what it made."""

    def __init__(self, case: Mapping[str, Any], safe: bool) -> None:
        from peft.tuners.lora import LoraLayer

        settle()
        model = adapted(Case(**case), "PEFT").to(device())
        self.layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
        self.safe = safe
        base = sum(m.get_base_layer().weight.nbytes for m in self.layers)
        factors = sum(
            x.weight.nbytes
            for m in self.layers
            for x in (*m.lora_A.values(), *m.lora_B.values())
        )
        self.facts = merge.first(self.step, base, factors)

    def step(self) -> None:
        """Merge once."""
        with torch.no_grad():
            for layer in self.layers:
                layer.merge(safe_merge=self.safe)
                layer.merged_adapters.clear()  # else the next merge does nothing
        if torch.cuda.is_available():
            torch.cuda.synchronize()


@functools.cache
def settle() -> None:
    """Let PyTorch use the machine as well as it can."""
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_flush_denormal(True)
    torch.backends.cudnn.benchmark = True


def autocast(case: Case) -> Any:
    """Compute a bfloat16 case in bfloat16, adapters and full parameters being wider."""
    if case.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device().type, getattr(torch, case.dtype))


def on_device(batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return a batch as PyTorch takes it."""
    return {k: torch.from_numpy(v).long().to(device()) for k, v in batch.items()}


def adapted(case: Case, kind: str) -> Any:
    """Return the model as one of `KINDS` trains it."""
    model = plain(case)
    if kind == "torch full":
        return model  # float32: autocast computes, the optimiser needs the bits
    model = model.to(getattr(torch, case.dtype))
    return loralib(case, model) if kind == "loralib" else peft(case, model)


def plain(case: Case) -> Any:
    """Return a random model without dropout; the head as in `_workload`."""
    config_class, model_class = MODELS[case.family]
    model = model_class(config_class(**case.config))
    if case.config.get("tie_word_embeddings") is False:
        # T5 ties its head whatever the configuration says; another tensor unties it.
        head = torch.empty_like(model.lm_head.weight)
        model.lm_head.weight = torch.nn.Parameter(head.normal_(std=HEAD_STD))
    return model


def peft(case: Case, model: Any) -> Any:
    """Return the model with PEFT's adapters."""
    import peft as library

    config = library.LoraConfig(
        r=case.rank,
        lora_alpha=int(case.alpha),
        target_modules=targets(case),
        lora_dropout=0.0,
        fan_in_fan_out=case.family == "gpt2",
    )
    return library.get_peft_model(model, config)


def targets(case: Case) -> list[str] | str:
    """Return PEFT's names of what the case adapts."""
    if isinstance(case.targets, str):
        return case.targets
    roles = {"query", "key", "value"} & set(case.targets)
    if case.family == "gpt2" and roles:
        raise ValueError(
            f"no adapters for {sorted(roles)}, thirds of a fused kernel; compare with "
            "--targets c_attn"
        )
    return [NAMES[case.family].get(name, name) for name in case.targets]


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
            i, o, r=case.rank, lora_alpha=case.alpha, merge_weights=False,
            bias=module.bias is not None, fan_in_fan_out=conv,
        )  # fmt: skip
        layer.weight, layer.bias = module.weight, module.bias
        model.set_submodule(name, layer)
    library.mark_only_lora_as_trainable(model)
    return model
