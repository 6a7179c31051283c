r"""Train an adapter for each of many tenants, several at a time in one compiled step.

What it shows: `jlora.sweep.run`. A queue of jobs, one JSON object a line, goes through
four slots of one step: each job has its own rank, rates, data and number of steps. One
that ends makes room for the next, and nothing is compiled for it. A tenant whose files
are missing fails alone, one that learns nothing more would be stopped, and the others
never notice. Each adapter ends as a run of its own would have made it, and is written
in PEFT's format.

On what: a T5 of 1.2 M parameters and tenants/translations that come with this file.

How long: under a minute on two CPU cores, no connection needed.

    python examples/many_adapters.py
    python examples/many_adapters.py --jobs my.jsonl --model google/flan-t5-small \
        --slots 16 --steps 500 --output runs/tenants
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jlora.peft
from jlora import data, models, sweep, tasks

ASSETS = Path(__file__).parent / "assets"
PREFIX = {"de-en": "translate German to English: ",
          "en-de": "translate English to German: "}  # fmt: skip


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=Path, default=ASSETS / "tenants.jsonl")
    parser.add_argument("--model", default=str(ASSETS / "tiny-t5-de-en"))
    parser.add_argument("--slots", type=int, default=4, help="adapters at a time")
    parser.add_argument("--steps", type=int, default=80, help="of jobs that say none")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=24, help="tokens of a sentence")
    parser.add_argument("--output", type=Path, default=Path("runs/tenants"))
    parser.add_argument("--resume", action="store_true", help="go on in --output")
    return parser.parse_args(argv)


@dataclasses.dataclass(frozen=True)
class Tenants:
    """The text of each job, as batches. What goes wrong here, fails one job alone."""

    root: Path
    tokenizer: Any
    config: Any
    batch_size: int
    length: int

    def train(self, job: sweep.Job) -> data.Batches:
        """Return a job's training stream."""
        first, last = job.data["rows"]
        return self._batches(job, self._pairs(job)[first:last], seed=job.seed)

    def valid(self, job: sweep.Job) -> data.Batches:
        """Return held-out sentences in a job's direction."""
        files = [ASSETS / f"corpus/travel.valid.{x}" for x in ("de", "en")]
        pairs = data.read_pairs(files, job.data["direction"])[:64]
        return self._batches(job, pairs, seed=None)

    def _pairs(self, job: sweep.Job) -> list[data.Pair]:
        files = [self.root / name for name in job.data["files"]]
        return data.read_pairs(files, job.data["direction"])

    def _batches(
        self, job: sweep.Job, pairs: list[data.Pair], seed: int | None
    ) -> data.Batches:
        sources, targets = zip(*pairs, strict=True)
        prefix = PREFIX[job.data["direction"]]

        def encode(texts: Any, before: str = "") -> list[Any]:
            return data.tokenise(self.tokenizer, texts, self.length, prefix=before).rows

        columns = {"input_ids": encode(sources, prefix), "labels": encode(targets)}
        # One shape for all, so that any job's batch can stand beside any other's.
        shape = (self.length, self.length)
        pad = self.config.pad_token_id
        return data.Batches(columns, [shape], self.batch_size, pad, seed)


def main(argv: list[str] | None = None) -> sweep.Results:
    """Train every job; print a table; write adapters."""
    options = arguments(argv)
    model, params = models.load(options.model)
    tokenizer = data.load_tokenizer(options.model)
    tenants = Tenants(
        options.jobs.parent, tokenizer, model.config, options.batch_size, options.length
    )

    def export(result: sweep.Result) -> None:
        print(f"{result.name}: {result.status} after {result.steps} steps", flush=True)
        if result.status == "done":
            place = options.output / result.name / "peft"
            jlora.peft.save(
                place, result.params, model=model, task_type="SEQ_2_SEQ_LM",
                base_model_name_or_path=str(options.model), overwrite=True,
            )  # fmt: skip

    results = sweep.run(
        tasks.seq2seq_loss(model),
        params,
        sweep.read_jobs(options.jobs),
        tenants.train,
        steps=options.steps,
        slots=options.slots,
        valid=tenants.valid,
        stop=sweep.Plateau(patience=3, least=0.01),
        folder=options.output,
        resume=options.resume,
        on_result=export,
        targets=["query", "value"],
        clip_norm=1.0,
    )
    results.save(options.output / "results.csv")
    print(f"\n{results}\n\nAdapters, and results.csv, are in {options.output}.")
    return results


if __name__ == "__main__":
    main()
