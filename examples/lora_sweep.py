r"""Which rank, which batch size? A grid of LoRA runs, trained together.

What it shows: the search that a course on LoRA begins with, rank {1, 4, 16} times batch
size {8, 64, 128}, as `jlora.sweep.run` does it. The runs of one batch size are one
compiled step on one base; each has its own rank, scale and rate, and ends as it would
alone. A table, three plots and a recommendation that is derived from the run.

On what: without arguments, on the T5 of 1.2 M parameters and the German-English corpus
that come with this file; each run sees the 4,000 pairs once. Losses are nats a token,
BLEU is that of sentences of travel that no run has seen.

How long: a minute and a half on two CPU cores, no connection needed; more with
--one-by-one, which trains every run by itself as well, and shows the time of both.

    python examples/lora_sweep.py
    python examples/lora_sweep.py --ranks 4 --lrs 1e-3 3e-3 1e-2 --alphas 4 8 16 \
        --batch-sizes 64 --targets query,value all-linear
    python examples/lora_sweep.py --model google/flan-t5-small --train a.de a.en \
        --epochs 3 --ranks 1 4 16 64 --one-by-one

Ctrl-C saves and prints the command that continues; --help lists all options. Needs
`pip install "jlora[train]"`.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optax

import jlora
from jlora import checkpoint, data, models, sweep, tasks, train
from jlora.train import option

ASSETS = Path(__file__).parent / "assets"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(tasks.DeviceOptions):
    """What was asked for; the defaults stand in brackets."""

    # fmt: off
    ranks: list[int] = option([1, 4, 16], "r (1 4 16)", least=1, group="grid")
    batch_sizes: list[int] = option([8, 64, 128], "pairs a step (8 64 128)", least=1)
    alphas: list[float] | None = option(None, "the scale is alpha/r (2r)", above=0)
    lrs: list[float] = option([3e-3], "peak rates (3e-3)", above=0)
    targets: list[str] = option(
        ["query,value"], "sets of layers, or all-linear (query,value)")
    one_by_one: bool = option(False, "train each run by itself too, and compare")

    epochs: float = option(
        1.0, "passes over the training pairs (1)", above=0, group="training")
    dropout: float = option(0.0, "on the adapters' inputs (0)", least=0, below=1)
    seed: int = option(0, "of adapters, data order and dropout (0)", least=0)

    model: str = option(
        str(ASSETS / "tiny-t5-de-en"), "folder or hub name of a T5 (embedded)",
        path=True, group="model and data", metavar="DIR|NAME")
    train: list[str] | None = option(
        None, "FILE.de FILE.en, or tables (embedded)", path=True, metavar="FILE")
    valid: list[str] | None = option(
        None, "the same (a part of --train)", path=True, metavar="FILE")
    test: list[str] | None = option(
        None, "the same (a part of --train)", path=True, metavar="FILE")
    direction: str = option("de-en", "two languages, such as en-cs (de-en)")
    train_size: int | None = option(None, "train on this many pairs (all)", least=1)
    valid_size: int = option(256, "pairs for the validation loss (256)", least=1)
    test_size: int = option(192, "pairs for BLEU (192)", least=1)
    # fmt: on

    @property
    def text(self) -> tasks.TranslationSettings:
        """The model and the text, in one shape of batches: a step is one program."""
        files = {"train": self.train, "valid": self.valid, "test": self.test}
        if not self.train:
            beside = ASSETS / "corpus"
            files = {n: [str(beside / f"travel.{n}.{x}") for x in ("de", "en")]
                     for n in files}  # fmt: skip
        names = ("model", "direction", "train_size", "valid_size", "test_size", "seed",
                 "mesh", "layout", "uneven")  # fmt: skip
        own = {name: getattr(self, name) for name in names}
        return tasks.TranslationSettings(**own, **files, buckets=1)

    def jobs(self, steps: int) -> list[sweep.Job]:
        """The runs of one batch size and one set of targets."""
        return [
            sweep.Job(
                name=f"rank={rank},alpha={alpha or 2 * rank:g},rate={rate:g}",
                rank=rank, alpha=alpha or 2.0 * rank, learning_rate=rate, steps=steps,
                dropout=self.dropout, seed=self.seed,
            )
            for rank, alpha, rate in itertools.product(
                self.ranks, self.alphas or [None], self.lrs
            )
        ]  # fmt: skip

    def check(self) -> None:
        """Refuse text that is none, and a value that stands twice."""
        for name in ("ranks", "batch_sizes", "alphas", "lrs", "targets"):
            values, flag = getattr(self, name) or [], f"--{name.replace('_', '-')}"
            tasks.refuse({f"{flag} has a value twice": len({*values}) < len(values)})
        alone = {"--valid and --test need --train": self.valid or self.test}
        tasks.refuse({} if self.train else alone)
        for size in self.batch_sizes:
            dataclasses.replace(self.text, batch_size=size).check()


@dataclasses.dataclass(frozen=True)
class Group:
    """The runs of one batch size on one set of targets: one compiled step."""

    s: Settings
    task: tasks.Translation
    names: str
    size: int

    @property
    def batches(self) -> data.Batches:
        """The pairs, in an order that all these runs share."""
        return dataclasses.replace(self.task.train, size=self.size)

    @property
    def steps(self) -> int:
        """How many updates each run makes."""
        return max(1, round(self.s.epochs * len(self.batches)))

    @property
    def targets(self) -> Any:
        """The layers as `jlora.lorafy` takes them."""
        return self.names if self.names == "all-linear" else self.names.split(",")

    def optimizer(self, hp: Any) -> optax.GradientTransformation:
        """AdamW; the rate rises over a tenth of the steps, then falls as a cosine."""
        unit = train.warmup_schedule(1.0, self.steps, warmup=self.steps // 10)
        return optax.adamw(lambda count: hp.learning_rate * unit(count), weight_decay=0)

    def together(self, params: Any, folder: train.RunFolder) -> list[tasks.GridRun]:
        """Train the runs in one step; those that a resumed grid has are read."""
        place = folder.state / f"{self.names}-{self.size}"
        try:
            results = sweep.run(
                self.task.loss_fn, params, self.s.jobs(self.steps), self.batches,
                optimizer=self.optimizer, targets=self.targets, clip_norm=1.0,
                valid=self.task.valid, eval_every=self.steps, folder=place,
                resume=True, progress=f"batches of {self.size}",
                mesh=self.s.device_mesh,
            )  # fmt: skip
        except train.Interrupted as said:
            where = f"{said}".partition(".")[0]
            raise said.saying(
                f"{where}, batches of {self.size}. To continue:\n  "
                f"{folder.resume_command}"
            ) from None
        seconds = results.seconds / len(results)
        return [tasks.GridRun(r, self.size, self.names, seconds) for r in results]

    def alone(self, run: tasks.GridRun, params: Any) -> None:
        """Train a run by itself; note its time, and how far apart the losses are."""
        began, job = time.perf_counter(), run.result.job
        tx = self.optimizer(job)
        tree = job.lorafy(params, targets=self.targets)
        state = train.TrainState.create(tree, tx, job.key)
        step = train.make_train_step(
            self.task.loss_fn, tx, clip_norm=1.0, mesh=self.s.device_mesh
        )
        losses = []
        for batch in itertools.islice(self.batches.stream(0), self.steps):
            state, metrics = step(state, batch)
            losses.append(metrics["loss"])
        validation_loss(self.task, state.params)
        run.alone = time.perf_counter() - began
        own = run.result.losses
        run.apart = float(np.abs(np.array(losses)[: len(own)] - own).max(initial=0.0))


def validation_loss(task: tasks.Translation, params: Any) -> float:
    """Return the loss of the validation pairs."""
    no_key: Any = None
    measure = train.make_eval_step(lambda p, b: {"loss": task.loss_fn(p, b, no_key)})
    return float(train.evaluate(measure, params, task.valid)["loss"])


def bleu(task: tasks.Translation, params: Any) -> float:
    """Return BLEU of the test. Merged models of all runs generate by one program."""
    lines = task.tests["test"].collect(lambda batch: task.translate(params, batch))
    return task.scores({"test": lines})["test"]


def run(s: Settings) -> None:
    """Train the grid, measure, keep the best, report."""
    s.check_alone("a sweep")
    began, text = time.perf_counter(), s.text
    model, params, tokenizer = loaded = text.load(s.model)
    task = tasks.Translation(text, loaded)
    before = validation_loss(task, params), bleu(task, params)
    with s.claim("sweep") as folder:
        folder.state.mkdir(exist_ok=True)
        runs: list[tasks.GridRun] = []
        for names, size in itertools.product(s.targets, s.batch_sizes):
            group = Group(s, task, names, size)
            runs += (own := group.together(params, folder))
            for one in own if s.one_by_one else ():
                group.alone(one, params)
        for one in runs:
            if one.ended:
                one.score = bleu(task, jlora.merge(one.result.params))
        grid = tasks.Grid(runs)
        best = grid.best().result.params
        checkpoint.save_adapter(folder.adapter, best, overwrite=True)
        models.save(model, jlora.merge(best), folder.merged, overwrite=True)
        tokenizer.save_pretrained(folder.merged)
        facts = facts_of(grid, before, time.perf_counter() - began)
        report(s, folder, grid, facts, before[0])


def facts_of(
    grid: tasks.Grid, before: tuple[float, float], seconds: float
) -> dict[str, str]:
    """Return what is to be said of the whole grid."""
    facts = {
        "before training": f"validation loss {before[0]:.3f}, BLEU {before[1]:.1f}",
        "trained together": f"{len(grid)} runs in {sum(r.seconds for r in grid):.0f} s",
    }
    if all(run.alone for run in grid):
        single, both = (sum(getattr(x, n) for x in grid) for n in ("alone", "seconds"))
        facts["one by one"] = f"{single:.0f} s, of which together takes "
        facts["one by one"] += f"{both / single:.2f}"
        apart = max(run.apart for run in grid)
        facts["losses apart"] = f"at most {apart:.1g}, over all steps of all runs"
    return {**facts, "whole script": f"{seconds:.0f} s"}


def report(
    s: Settings, folder: train.RunFolder, grid: tasks.Grid, facts: dict[str, str],
    before: float,
) -> None:  # fmt: skip
    """Write plots and report, and print the gist of it."""
    (head, *rows), said = grid.table(), grid.advice()
    document = train.Report(f"{Path(s.model).name}: rank and batch size")
    document.section("What the runs speak for").items(said)
    document.section("The runs").table(head, rows).text(NOTE)
    for file in grid.draw(folder.path, before):
        document.image(file, file.stem.replace("_", " "))
    document.section("Time").table(("what", ""), facts.items())
    document.section("The best run's model, merged").code(
        f'model, params = jlora.models.load("{folder.merged}")', "python"
    )
    parameters = jlora.summary(grid.best().result.params)
    tasks.closing_part(document, folder, parameters)
    tasks.print_facts(facts, [head, *rows])
    print("", *(textwrap.fill(f"- {x}", 88) for x in said), sep="\n")
    print(f"\nThe report is {folder.report}.")


NOTE = """\
`time` is a run's share of the step that it was trained in, compilation and validation
included; `alone` is its time by itself. `final loss` is the mean of the last ten steps,
the validation loss that after the last. BLEU is of greedy translations of the test,
which no run has seen."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return train.command_line(Settings, run, argv, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
