"""LoRA on bases of 32, 8 and 4 bits: memory, time of a step, loss on real text.

All train the same adapters on the same batches in the same order. `base_mib` is what
the frozen parameters take, `temporary_mib` what XLA's program takes besides, with the
scheduler that keeps few arrays alive; `loss` is the mean over the last tenth of the
steps, `held_out` that of text no step has seen, both a token. PEFT's runs last and
alone, in PyTorch.
"""

from __future__ import annotations

import importlib.metadata
import pathlib
from collections.abc import Iterator
from typing import Any

from benchmarks.initialise import _device, _schedule, _versions, text
from benchmarks.race import Rows, curve

PEFT = "PEFT + bitsandbytes nf4"
FORMS: dict[str, Any] = {
    "LoRA": None,
    "int8": {"form": "int8"},
    "fp8": {"form": "fp8"},
    "nf4": {"form": "nf4"},
    "nf4, scales in float32": {"form": "nf4", "double": False},
}
CONTENDERS = [*FORMS, PEFT]
COLUMNS = (
    "case", "contender", "base_mib", "to_dense", "arguments_mib", "temporary_mib",
    "median_ms", "first_loss", "loss", "held_out", "error",
)  # fmt: skip
# A CPU's default scheduler makes kernels as early as it can, and keeps them all.
FRUGAL = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def run(options: Any) -> Iterator[Rows]:
    """Yield the rows."""
    from jlora import models

    model, params = models.load(options.model)
    steps, size = (4, 4) if options.quick else (options.steps, options.batch)
    batches, held_out = text(options, model, steps, size)
    rank = min(options.rank, 2) if options.quick else options.rank
    title = f"{pathlib.Path(options.model).name}, rank {rank}, {steps} x {size} pairs"
    rate, about, rows = options.rates[0], {}, []
    for name in options.contenders or CONTENDERS:
        curve = _peft if name == PEFT else _jlora
        arguments = (options, model, params, FORMS.get(name), rank, rate)
        try:
            row, about[name] = curve(*arguments, batches, held_out)
        except ImportError as error:  # a peer that is not here
            row = {"error": f"{type(error).__name__}: {error}"}
        rows.append({"case": title, "contender": name, "lr": rate, **row})
    dense = next((r["base_mib"] for r in rows if r["contender"] == "LoRA"), None)
    for row in rows:
        row["to_dense"] = (
            row["base_mib"] / dense if dense and "error" not in row else None
        )
    yield rows, about


def _jlora(
    options: Any, model: Any, params: Any, form: Any, rank: int, rate: float,
    batches: list[Any], held_out: list[Any],
) -> Rows:  # fmt: skip
    import jax
    import optax

    import jlora
    import jlora.train
    from jlora import models

    def loss(params: Any, batch: Any, key: Any = None) -> Any:
        decoder = models.shift_right(batch["labels"], model.config)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = model.apply({"params": params}, ids, mask, decoder)
        total, count = jlora.train.cross_entropy(logits, batch["labels"])
        return total / count

    if form is not None:
        block = {"block": 16} if options.quick and form["form"] == "nf4" else {}
        params = jlora.quantize(params, **form, **block, exclude=["lm_head"])
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(_schedule(rate, len(batches)))
    )
    tree = jlora.lorafy(params, rank, options.layers, alpha=rank)
    state = jlora.train.TrainState.create(tree, tx)
    step = jlora.train.make_train_step(loss, tx)
    memory = step.lower(state, batches[0]).compile(FRUGAL).memory_analysis()

    def one(batch: Any) -> float:
        nonlocal state
        state, metrics = step(state, batch)
        return float(metrics["loss"])

    row = curve(one, batches)
    measure = jax.jit(jlora.lora(loss))
    after = [float(measure(state.params, batch)) for batch in held_out]
    base = sum(x.nbytes for x in jax.tree.leaves(jlora.split(tree)[1]))
    return row | {
        "base_mib": base / 2**20,
        "arguments_mib": memory.argument_size_in_bytes / 2**20,
        "temporary_mib": memory.temp_size_in_bytes / 2**20,
        "held_out": sum(after) / len(after),
    }, {"versions": _versions(), "device": _device(jax)}


def _peft(
    options: Any, model: Any, params: Any, form: Any, rank: int, rate: float,
    batches: list[Any], held_out: list[Any],
) -> Rows:  # fmt: skip
    import bitsandbytes  # noqa: F401  transformers asks for it
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        options.model, quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    base.config.dropout_rate = 0.0
    names = {"query": "q", "key": "k", "value": "v", "out": "o"}
    lora = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=[names.get(n, n) for n in options.layers],
    )
    held = {id(x): x.nbytes for x in base.parameters()}
    net = peft.get_peft_model(base, lora).eval()  # without dropout, as ours
    trained = [p for p in net.parameters() if p.requires_grad]
    tx, schedule = torch.optim.Adam(trained), _schedule(rate, len(batches))

    def loss(batch: Any) -> Any:
        fields = {k: torch.from_numpy(v).long() for k, v in batch.items()}
        return net(
            **{k: fields[k] for k in ("input_ids", "attention_mask", "labels")}
        ).loss

    done = 0

    def one(batch: Any) -> float:
        nonlocal done
        for group in tx.param_groups:
            group["lr"] = float(schedule(done))
        value = loss(batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        tx.step()
        tx.zero_grad()
        done += 1
        return value.item()

    row = curve(one, batches)
    with torch.no_grad():
        after = [loss(batch).item() for batch in held_out]
    libraries = ("torch", "transformers", "peft", "bitsandbytes")
    versions = {n: importlib.metadata.version(n) for n in libraries}
    mib = sum(held.values()) / 2**20
    return row | {"base_mib": mib, "held_out": sum(after) / len(after)}, {
        "versions": versions, "device": "cpu"
    }  # fmt: skip
