r"""Which learning rate for which rank, alpha and targets? A grid, in a few sweeps.

What it shows: validation loss against learning rate, for several ranks, for adapters on
query and value and on all linear layers, for several alphas, and for full fine-tuning.
The adapters of one choice of targets are trained together, in one compiled step
(`jlora.sweep`).

On what: the T5 of 1.2 M parameters that comes with the examples, German to English,
sentences about travel.

How long: a quarter of an hour on two CPU cores; `--quick` tries it in a minute. It
prints Markdown tables, those of docs/guides/choosing.md.

    python examples/rank_and_rate.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import optax

import jlora
from jlora import data, models, sweep, train

ASSETS = Path(__file__).parent / "assets"
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
FULL_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
RANKS = (1, 4, 16)
WARMUP, CLIP = 20, 1.0

Tree = Any


def batches(model: Any, name: str, size: int, seed: int | None) -> data.Batches:
    """Batches of one shape, which all adapters of a sweep share."""
    tokenizer = data.load_tokenizer(ASSETS / "tiny-t5-de-en")
    files = [ASSETS / "corpus" / f"{name}.{code}" for code in ("de", "en")]
    pairs = data.read_pairs(files, "de-en")
    prefix = data.direction("de-en").prompt
    sources = data.tokenise(tokenizer, [p.source for p in pairs], 64, prefix=prefix)
    targets = data.tokenise(tokenizer, [p.target for p in pairs], 64)
    columns = {"input_ids": sources.rows, "labels": targets.rows}
    shapes = data.shapes_for([columns], buckets=1)
    return data.Batches(columns, shapes, size, model.config.pad_token_id, seed)


def make_loss(model: Any) -> Any:
    """The loss of the labels: its sum, and their number."""

    def loss_fn(params: Tree, batch: Any, key: Any) -> Any:
        logits = model.apply(
            {"params": params},
            batch["input_ids"],
            batch["attention_mask"],
            models.shift_right(batch["labels"], model.config),
        )
        return train.cross_entropy(logits, batch["labels"])

    return loss_fn


def table(title: str, rows: dict[str, Iterable[float]], rates: Iterable[float]) -> None:
    """Print a Markdown table: a row's values by learning rate, the best in bold."""
    print(f"\n| {title} | " + " | ".join(f"{rate:g}" for rate in rates) + " |")
    print("|---" * (1 + len(list(rates))) + "|")
    for name, values in rows.items():
        values = list(values)
        best = min(values)
        cells = (f"**{v:.3f}**" if v == best else f"{v:.3f}" for v in values)
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


class Experiment:
    """The model, its data, and how a run of each kind is made."""

    def __init__(self, steps: int) -> None:
        self.model, self.params = models.load(ASSETS / "tiny-t5-de-en")
        self.loss_fn, self.steps = make_loss(self.model), steps
        self.train = batches(self.model, "travel.train", 32, seed=0)
        self.valid = list(batches(self.model, "travel.valid", 64, seed=None))

    def schedule(self, peak: Any) -> optax.Schedule:
        """A rise, and a fall to zero; `peak` may be traced."""
        shape = train.warmup_schedule(1.0, self.steps, warmup=WARMUP)
        return lambda count: peak * shape(count)

    def adapters(self, jobs: list[sweep.Job], targets: Any) -> list[float]:
        """The validation loss of each job, all trained in one step."""
        results = sweep.run(
            self.loss_fn,
            self.params,
            jobs,
            self.train,
            steps=self.steps,
            optimizer=lambda hp: optax.adam(self.schedule(hp.learning_rate)),
            targets=targets,
            clip_norm=CLIP,
            valid=self.valid,
            eval_every=self.steps,
        )
        # A run that diverged ends with NaN.
        return [r.value if r.status == "done" else float("nan") for r in results]

    def full(self, rate: float) -> float:
        """The validation loss of a run that trains every weight."""
        tx = optax.adam(self.schedule(rate))
        state = train.TrainState.create(jax.tree.map(jlora.Full, self.params), tx)
        step = train.make_train_step(self.loss_fn, tx, clip_norm=CLIP)
        stream = self.train.stream()
        for _ in range(self.steps):
            state, _ = step(state, next(stream))
        measure = train.make_eval_step(lambda p, b: {"loss": self.loss_fn(p, b, None)})
        return train.evaluate(measure, state, self.valid)["loss"]


def main(argv: list[str] | None = None) -> int:
    """Run the grids and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps of a part")
    args = parser.parse_args(argv)
    ranks, rates, full = RANKS, RATES, FULL_RATES
    if args.quick:
        ranks, rates, full = (1, 4), (1e-3, 1e-2), (1e-3,)
    e = Experiment(steps=10 if args.quick else 200)
    measure = train.make_eval_step(lambda p, b: {"loss": e.loss_fn(p, b, None)})
    before = train.evaluate(measure, e.params, e.valid)["loss"]
    print(f"{e.steps} steps of 32 pairs; validation loss before: {before:.3f}")

    def grid(targets: Any, alpha: Any) -> dict[str, list[float]]:
        jobs = [
            sweep.Job(name=f"{r}/{lr}", rank=r, alpha=alpha(r), learning_rate=lr)
            for r in ranks
            for lr in rates
        ]
        losses = e.adapters(jobs, targets)
        return {
            f"rank {r}": losses[i * len(rates) : (i + 1) * len(rates)]
            for i, r in enumerate(ranks)
        }

    table("query, value; alpha = 2r", grid(["query", "value"], lambda r: 2 * r), rates)
    table("all linear; alpha = 2r", grid("all-linear", lambda r: 2 * r), rates)
    table("query, value; alpha = 16", grid(["query", "value"], lambda r: 16), rates)
    table("every weight", {"full": [e.full(rate) for rate in full]}, full)
    return 0


if __name__ == "__main__":
    sys.exit(main())
