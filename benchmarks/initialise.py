"""Loss after some steps on real text, by how adapters start; same data, same order.

Each start trains a model of its own with Adam at each learning rate, on the same
batches. `loss` is the mean over the last tenth of the steps, `held_out` that of text no
step has seen, both a token; `start_s` is what starting took, its compilation included.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.race import Row, Rows

PROMPT = "translate German to English: "
LONGEST = 48
CALIBRATION = 4  # batches
STARTS: dict[str, Callable[..., Any]] = {
    "default": lambda jlora, new, loss, batches: new("default"),
    "PiSSA": lambda jlora, new, loss, batches: new("pissa"),
    "OLoRA": lambda jlora, new, loss, batches: new("olora"),
    "EVA": lambda jlora, new, loss, batches: jlora.init.eva(
        loss, new("default"), batches
    ),
    "CorDA": lambda jlora, new, loss, batches: jlora.init.corda(
        loss, new("default"), batches
    ),
    "LoRA-GA": lambda jlora, new, loss, batches: jlora.init.lora_ga(
        loss, new("default"), batches
    ),
}
CONTENDERS = STARTS
COLUMNS = (
    "case", "lr", "contender", "loss", "held_out", "first_loss", "trainable", "start_s",
    "median_ms",
)  # fmt: skip


def run(options: Any) -> Iterator[Rows]:
    """Yield the rows of each learning rate."""
    import jax
    import optax

    import jlora
    import jlora.train
    from jlora import models

    model, params = models.load(options.model)
    steps, size = (4, 4) if options.quick else (options.steps, options.batch)
    batches, held_out = text(options, model, steps, size)
    rank = min(options.rank, 2) if options.quick else options.rank

    def loss(params: Any, batch: Any, key: Any = None) -> Any:
        decoder = models.shift_right(batch["labels"], model.config)
        logits = model.apply(
            {"params": params}, batch["input_ids"], batch["attention_mask"], decoder
        )
        total, count = jlora.train.cross_entropy(logits, batch["labels"])
        return total / count

    title = f"{pathlib.Path(options.model).name}, rank {rank}, {steps} x {size} pairs"
    about = {"jlora": {"versions": _versions(), "device": _device(jax)}}
    names = options.contenders or [*STARTS]

    def new(init: str) -> Any:
        return jlora.lorafy(params, rank, options.layers, alpha=rank, init=init)

    for rate in options.rates[: 1 if options.quick else None]:
        tx = optax.chain(
            optax.clip_by_global_norm(1.0), optax.adam(_schedule(rate, steps))
        )
        step = jlora.train.make_train_step(loss, tx)
        measure = jax.jit(jlora.lora(loss))
        rows: list[Row] = []
        for name in names:
            begun = time.perf_counter()
            tree = STARTS[name](jlora, new, loss, batches[:CALIBRATION])
            tree = jax.block_until_ready(tree)
            row = {"case": title, "lr": rate, "contender": name}
            row["start_s"] = time.perf_counter() - begun
            state = jlora.train.TrainState.create(tree, tx)
            losses, times = [], []
            for batch in batches:
                begun = time.perf_counter()
                state, metrics = step(state, batch)
                losses.append(float(metrics["loss"]))
                times.append((time.perf_counter() - begun) * 1e3)
            tail = losses[-max(1, steps // 10) :]
            after = [float(measure(state.params, b)) for b in held_out]
            row |= {
                "loss": sum(tail) / len(tail), "first_loss": losses[0],
                "held_out": sum(after) / len(after),
                "trainable": sum(x.size for x in jax.tree.leaves(jlora.split(tree)[0])),
                "median_ms": sorted(times)[len(times) // 2],
            }  # fmt: skip
            rows.append(row)
        yield rows, about


def _schedule(rate: float, steps: int) -> Any:
    import optax

    warmup = max(1, steps // 10)
    return optax.warmup_cosine_decay_schedule(0.0, rate, warmup, steps + 1)


def text(
    options: Any, model: Any, steps: int, size: int, held_out: int = 2
) -> tuple[list[Any], list[Any]]:
    """Batches of one shape: `steps` to train on, and some that are held out."""
    import random

    import numpy as np

    from jlora import data

    folder = pathlib.Path(options.data)
    files = [next(folder.glob(f"train.{code}*")) for code in ("de", "en")]
    pairs = data.read_pairs(files, "de-en", empty="skip")
    random.Random(0).shuffle(pairs)
    wanted = list(itertools.islice(itertools.cycle(pairs), (steps + held_out) * size))
    tokenizer = data.load_tokenizer(options.model)

    def side(number: int, prefix: str) -> list[Any]:
        texts = [pair[number] for pair in wanted]
        return data.tokenise(tokenizer, texts, LONGEST, prefix=prefix).rows

    columns = {"input_ids": side(0, PROMPT), "labels": side(1, "")}
    shape = (LONGEST, LONGEST)
    pad = model.config.pad_token_id
    made = list(data.Batches(columns, [shape], size, pad, seed=None))
    made = [{k: np.asarray(v) for k, v in batch.items()} for batch in made]
    return made[:steps], made[steps:]


def _versions() -> dict[str, str]:
    return {
        n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "flax", "optax")
    }


def _device(jax: Any) -> str:
    return f"{jax.default_backend()}: {jax.devices()[0].device_kind}"
