"""Validation loss after the same steps of AdamW, LoRA+, LoRA-FA and Riemannian AdamW.

    python -m benchmarks.optimisers --model DIR --data DIR [--steps 200]

A Hugging Face folder of a T5, and a folder with `train` and `val` texts in German and
English (`train.de`, perhaps gzipped). Every optimiser takes the same batches, from the
same factors, at each of the learning rates; all have the same warm-up and cosine. What
an update costs is XLA's count of the compiled update alone, and the step's time is the
median one.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import jlora
from benchmarks.results import RESULTS, machine, table
from jlora import data, models, train
from jlora.optim import lora_fa, lora_plus, riemannian

RANK, ALPHA, LONGEST, WARMUP = 16, 32, 48, 30
PROMPT = "translate German to English: "
COLUMNS = ("optimiser", "rate", "train_loss", "valid_loss", "median_ms",
           "step_mflop", "update_mflop", "update_mb", "state_mb")  # fmt: skip
Make = Callable[[Any, Any], optax.GradientTransformation]
OPTIMISERS: dict[str, Make] = {
    "AdamW": lambda rate, tree: optax.adamw(rate, weight_decay=0),
    "LoRA+, ratio 4": lambda rate, tree: optax.chain(
        optax.adamw(rate, weight_decay=0), lora_plus(4)
    ),
    "LoRA-FA": lambda rate, tree: lora_fa(optax.adamw(rate, weight_decay=0), tree),
    "Riemannian AdamW": lambda rate, tree: optax.chain(
        riemannian(), optax.adamw(rate, weight_decay=0)
    ),
}


def main() -> None:
    """Train with each, print the table and save it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 4e-3])
    options = parser.parse_args()
    model, params = models.load(options.model)
    batches, valid = corpus(options, model)
    tree = jlora.lorafy(params, RANK, "all-linear", alpha=ALPHA, exclude=["lm_head"])
    loss_fn = loss_of(model)
    rows = []
    for name, make in OPTIMISERS.items():
        counted: dict[str, float] = {}
        for rate in options.rates:
            tx = make(optax.warmup_cosine_decay_schedule(
                0, rate, WARMUP, options.steps), tree)  # fmt: skip
            found = trained(loss_fn, tree, tx, batches, valid, options.steps)
            state, found = found
            counted = counted or costs(loss_fn, tx, state, batches[0])
            rows.append({"optimiser": name, "rate": rate, **found, **counted})
            print(table(rows[-1:], COLUMNS), flush=True)
    print(table(rows, COLUMNS))
    about = {
        "device": jax.devices()[0].device_kind,
        "versions": {
            "jax": jax.__version__,
            "optax": optax.__version__,
            "jlora": jlora.__version__,
        },
    }
    told = {k: v for k, v in vars(options).items() if k not in ("model", "data")}
    result = {"settings": told | {"rank": RANK, "alpha": ALPHA, "longest": LONGEST},
              "machine": machine({"jax": about}), "rows": rows}  # fmt: skip
    place = RESULTS / "optimisers"
    place.mkdir(exist_ok=True)
    (place / "losses.json").write_text(json.dumps(result, indent=1) + "\n")


def corpus(options: Any, model: Any) -> tuple[list[Any], list[Any]]:
    """One batch a step, and those of the validation."""
    tokenizer, config = data.load_tokenizer(options.model), model.config

    def tokens(name: str, limit: int) -> dict[str, Any]:
        files = [next(options.data.glob(f"{name}.{code}*")) for code in ("de", "en")]
        pairs = data.subset(data.read_pairs(files, "de-en", empty="skip"), limit, 0)
        sources, targets = zip(*pairs, strict=True)
        known = {"vocabulary": config.vocab_size, "end": config.eos_token_id}
        read = data.tokenise(tokenizer, sources, LONGEST, prefix=PROMPT, **known)
        write = data.tokenise(tokenizer, targets, LONGEST, **known)
        return {"input_ids": read.rows, "labels": write.rows}

    training, held_out = (
        tokens("train", options.batch * options.steps),
        tokens("val", 500),
    )
    shapes = data.shapes_for([training, held_out], 2)
    pad = config.pad_token_id
    epoch = data.Batches(training, shapes, options.batch, pad, 0)
    return list(epoch)[: options.steps], list(data.Batches(held_out, shapes, 64, pad))


def loss_of(model: Any) -> Any:
    """The labels' losses and their number."""

    def loss_fn(params: Any, batch: Any, key: Any) -> Any:
        hidden, kernel = model.apply(
            {"params": params}, batch["input_ids"], batch["attention_mask"],
            models.shift_right(batch["labels"], model.config), method="features",
        )  # fmt: skip
        return train.linear_cross_entropy(hidden, kernel, batch["labels"])

    return loss_fn


def trained(
    loss_fn: Any, tree: Any, tx: Any, batches: list[Any], valid: list[Any], steps: int
) -> tuple[train.TrainState, dict[str, float]]:
    """The state after a run, and what the run comes to."""
    state = train.TrainState.create(tree, tx)
    step = train.make_train_step(loss_fn, tx, clip_norm=None)
    losses, times = [], []
    for n in range(steps):
        began = time.perf_counter()
        state, metrics = step(state, batches[n % len(batches)])
        losses.append(float(metrics["loss"]))
        times.append(time.perf_counter() - began)
    measure = lambda params, batch: {"loss": loss_fn(params, batch, None)}  # noqa: E731
    evaluate = train.make_eval_step(measure)
    found = train.evaluate(evaluate, state.params, valid)
    return state, {
        "train_loss": float(np.mean(losses[-50:])),
        "valid_loss": found["loss"],
        "median_ms": 1e3 * statistics.median(times),
    }


def costs(
    loss_fn: Any, tx: Any, state: train.TrainState, batch: Any
) -> dict[str, float]:
    """What XLA counts of a step and of its update alone."""
    half = state.trainable
    update = jax.jit(tx.update).lower(half, tx.init(half), half).compile()
    cost = update.cost_analysis()
    held = sum(x.nbytes for x in jax.tree.leaves(state.opt_state))
    step = train.make_train_step(loss_fn, tx)
    whole = step.lower(state, batch).compile().cost_analysis()
    return {
        "step_mflop": whole["flops"] / 1e6,
        "update_mflop": cost["flops"] / 1e6,
        "update_mb": cost["bytes accessed"] / 1e6,
        "state_mb": held / 1e6,
    }


if __name__ == "__main__":
    main()
