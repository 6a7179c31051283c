r"""Teach one BERT several tasks of GLUE, an adapter each, and use them in one batch.

What it shows: sentences to classes and numbers with jlora. For each task an adapter and
a head are trained on the same frozen encoder and measured by GLUE's metrics; each is a
file of kilobytes where a copy of the model would take megabytes; and then one batch
holds sentences of all tasks, each of which goes through its own adapter to its own head
(`jlora.tasks.Router`, which is `jlora.bank` and `jlora.mixed`).

On what: without arguments, on a BERT of 0.2 M parameters and two small tasks in the
manner of SST-2 and CoLA that come with this file: the mood of a review, and whether a
sentence is English.

How long: just over a minute on two CPU cores, no connection needed. On sentences that
it never saw, accuracy of the mood rises from 48% to 98%, and Matthews' correlation of
what is English from about 0 to 94%.

    python examples/nlu_glue.py

The same code takes GLUE itself, from the hub or from a folder of its files, and any
BERT or RoBERTa:

    python examples/nlu_glue.py --model DIR --tasks sst2 cola stsb --data GLUE
    python examples/nlu_glue.py --recipe roberta-base --precision bfloat16

The second line trains the LoRA paper's RoBERTa-base (Hu et al. 2021, arXiv:2106.09685,
appendix D): rank and alpha 8 on query and value, AdamW, 6% of warm-up, linear decay,
and each task's own rate, batch and epochs. The paper has, on GLUE's development sets:

              MNLI  SST-2  MRPC  CoLA  QNLI  QQP   RTE   STS-B  mean  trained
    LoRA      87.5  95.1   89.7  63.4  93.3  90.8  86.6  91.5   87.2   0.3 M
    full      87.6  94.8   90.2  63.6  92.8  91.9  78.7  91.2   86.4   125 M

It starts MRPC, RTE and STS-B from the adapter of MNLI; here each starts anew, so expect
less of these three. The authors' scripts (microsoft/LoRA, examples/NLU) say alpha 16
and take each batch on each of eight devices; the settings here are those of table 9.
This takes days on one GPU; `--tasks cola --steps 300` gives a first look.

Ctrl-C saves and prints the command that continues; --help lists all options. Needs
`pip install "jlora[train]"`.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import jlora
import jlora.peft
from jlora import tasks, train
from jlora.tasks import ClassificationSettings
from jlora.train import option

ASSETS = Path(__file__).parent / "assets"
EMBEDDED: Mapping[str, dict[str, Any]] = {
    "sentiment": {"classes": ["negative", "positive"]},
    "acceptability": {"classes": ["unacceptable", "acceptable"],
                      "metrics": ["matthews"]},
}  # fmt: skip
# Of the LoRA paper's table 9; the decay of weights is that of its scripts.
PAPER = {"rank": 8, "alpha": 8.0, "schedule": "linear", "warmup_ratio": 0.06,
         "weight_decay": 0.1, "max_length": 512, "model_dropout": True}  # fmt: skip
# Each task's peak rate, batch and epochs.
ROBERTA_BASE = {
    "mnli": (5e-4, 16, 30.0),
    "sst2": (5e-4, 16, 60.0),
    "mrpc": (4e-4, 16, 30.0),
    "cola": (4e-4, 32, 80.0),
    "qnli": (4e-4, 32, 25.0),
    "qqp": (5e-4, 16, 25.0),
    "rte": (5e-4, 32, 80.0),
    "stsb": (4e-4, 16, 40.0),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(tasks.AdapterOptions, tasks.TrainingOptions):
    """What was asked for; the defaults stand in brackets."""

    # fmt: off
    model: str | None = option(
        None, "folder or hub name of a BERT or RoBERTa (embedded tiny BERT)",
        path=True, group="model and data", metavar="DIR|NAME")
    tasks: list[str] | None = option(
        None, f"of GLUE: {' '.join(tasks.GLUE)} (two embedded ones)",
        choices=(*tasks.GLUE, *EMBEDDED), metavar="TASK")
    data: str | None = option(
        None, "a folder with a folder for each task (the hub's nyu-mll/glue)",
        path=True, metavar="DIR")
    recipe: str | None = option(
        None, "all of the LoRA paper's settings: --model, --tasks, --rank, --alpha, "
        "--lr, --batch-size, --epochs, ...", choices=("roberta-base",))
    train_size: int | None = option(None, "train on this many examples (all)", least=1)
    test_size: int | None = option(None, "test so many, the first (all)", least=1)
    max_length: int | None = option(
        None, "tokens; longer texts are cut (128)", least=4)
    # fmt: on

    def check(self) -> None:
        """Refuse what does not go together."""
        super().check()
        own = [self.rank, self.alpha, self.lr, self.epochs]
        is_glue = {*self.names} <= {*tasks.GLUE}
        tasks.refuse({
            "--recipe brings its own --rank, --alpha, --lr and --epochs": (
                self.recipe and (self.full or any(x is not None for x in own))
            ),
            "--model and --data are for tasks of GLUE: name some, --tasks sst2 cola": (
                not is_glue and (self.model or self.data)
            ),
            "the tasks beside this file need no --recipe": self.recipe and not is_glue,
            "a task stands twice in --tasks": len({*self.names}) < len(self.names),
        })  # fmt: skip
        for name in self.names:
            self.of_task(name, Path()).check()

    @property
    def names(self) -> list[str]:
        """The tasks."""
        return self.tasks or [*(ROBERTA_BASE if self.recipe else EMBEDDED)]

    def of_task(self, name: str, folder: Path) -> ClassificationSettings:
        """Return the settings of one task, which has a folder of its own."""
        known = {field.name for field in dataclasses.fields(ClassificationSettings)}
        mine = {k: v for k, v in dataclasses.asdict(self).items() if k in known}
        if name in EMBEDDED:
            tables = {split: [str(ASSETS / "sentences" / f"{name}.{split}.tsv")]
                      for split in ("train", "test")}  # fmt: skip
            mine |= {"model": str(ASSETS / "tiny-bert"), **tables, **EMBEDDED[name]}
            # So small a model needs all of its kernels, and more time.
            mine["epochs"] = self.epochs or (None if self.steps else 5.0)
            if not self.full:
                mine["targets"] = self.targets or ["all-linear"]
        else:
            mine |= {"glue": name, "model": self.model or "FacebookAI/roberta-base"}
        if self.recipe:
            lr, batch, epochs = ROBERTA_BASE[name]
            mine |= {**PAPER, "lr": lr, "batch_size": batch}
            mine |= {} if self.steps else {"epochs": epochs}
        place = folder / name
        mine["output"], started = str(place), (place / "state").is_dir()
        mine["resume"] = self.resume and started
        mine["overwrite"] = self.overwrite or (self.resume and not started)
        return ClassificationSettings(**mine)


class Solved(NamedTuple):
    """A task that was learned: the model as loaded, and with its adapter and head."""

    name: str
    task: tasks.Classification
    loaded: tasks.Loaded
    params: Any
    rows: list[Any]  # of the table of metrics

    @property
    def encoder(self) -> Any:
        """The frozen encoder, which the tasks share."""
        return self.loaded.params[self.loaded.model.config.prefix]


def solve(s: Settings, name: str, top: train.RunFolder, encoder: Any) -> Solved:
    """Train one task's adapter and head, and measure what they changed."""
    own, began = s.of_task(name, top.path), time.perf_counter()
    print(f"\n{name}")
    loaded = own.load(own.model or "")  # jlora.models.load, with a new head
    if encoder is not None:  # one in memory for all
        shared = {**loaded.params, loaded.model.config.prefix: encoder}
        loaded = loaded._replace(params=shared)
    tree = own.adapt(loaded.params, own.key)  # jlora.lorafy(..., train=["classifier"])
    summary, task = jlora.summary(tree), tasks.Classification(own, loaded)
    for remark in task.remarks:
        print(f"note: {remark}")
    with own.claim(name, "classify") as folder:
        before = task.answer("before", tree, folder)
        try:
            fit = own.fit(
                task.loss_fn, tree, task.train, folder, task.valid, base=loaded.params
            )
        except train.Interrupted as stop:
            again = f"{name} was stopped, and saved. To continue:\n  "
            raise stop.saying(again + top.resume_command) from None
        after = task.answer("after", fit.params, folder)
        facts = {
            **tasks.facts_of(own, summary, fit),
            "whole task": f"{time.perf_counter() - began:.0f} s",
        }
        task.write_report(folder, facts, before, after, summary)
    tasks.print_facts(facts)
    return Solved(name, task, loaded, fit.params, task.table(before, after)[1])


def route(solved: Sequence[Solved], each: int = 2) -> tuple[list[Sequence[str]], float]:
    """Send test sentences of every task, in one batch, to their own adapters.

    Returns:
      Rows of task, text, label and answer, and how much at most a logit differs from
      that of the task's own model.
    """
    tests = [next(iter(one.task.examples.values())) for one in solved]
    chosen = [(k, row) for row in range(each) for k in range(len(solved))]
    read = [(tests[k].texts[row], *[x[row] for x in [tests[k].pairs] if x])
            for k, row in chosen]  # fmt: skip
    tokenizer = solved[0].loaded.tokenizer
    batch = dict(tokenizer.pad([tokenizer(*x) for x in read], return_tensors="np"))
    router = tasks.Router({one.name: (one.loaded.model, one.params) for one in solved})
    routed = router(batch, [solved[k].name for k, _ in chosen])

    alone = [
        np.asarray(jlora.lora(tasks.logits_of(one.loaded.model))(one.params, batch))
        for one in solved
    ]
    rows, off = [], 0.0
    for place, ((k, row), mixed) in enumerate(zip(chosen, routed, strict=True)):
        off = max(off, float(np.abs(mixed - alone[k][place]).max()))
        names, label = solved[k].task.settings.class_names, tests[k].labels[row]
        said = names[mixed.argmax()] if names else f"{mixed[0]:.2f}"
        true = names[label] if names else f"{label:.2f}"
        rows.append((solved[k].name, tests[k].text(row), true, said))
    return rows, off


def sizes(solved: Sequence[Solved], folder: Path) -> list[Sequence[str]]:
    """Write each task's file for PEFT; return what they take, and copies would."""
    mega = lambda count: f"{count / 1e6:,.2f} MB"  # noqa: E731
    rows, total, copies = [], 0, 0
    for one in solved:
        model, params, _ = one.loaded
        jlora.peft.save(
            folder, one.params, model=model, adapter=one.name, task_type="SEQ_CLS",
            overwrite=True,
        )  # fmt: skip
        file = (folder / one.name / "adapter_model.safetensors").stat().st_size
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        total, copies = total + file, copies + whole
        rows.append((one.name, mega(file), mega(whole)))
    return [*rows, ("all", mega(total), mega(copies))]


def run(s: Settings) -> None:
    """Train every task, route a mixed batch, compare sizes, report."""
    s.check_alone("this example")
    began = time.perf_counter()
    with s.claim("glue") as top:
        top.state.mkdir(exist_ok=True)  # of the tasks each keeps its own
        solved: list[Solved] = []
        for name in s.names:
            solved.append(solve(s, name, top, solved[0].encoder if solved else None))
        answers, off = route(solved)
        parts = {
            "The tasks": [
                ("task", "test", "examples", "metric", "before", "after", "change"),
                *((one.name, *row) for one in solved for row in one.rows),
            ],
            "One batch, each sentence through its own adapter": [
                ("task", "text", "label", "answer"), *answers
            ],
            "What a task takes": [
                ("task", "adapter and head", "a copy of the model"),
                *sizes(solved, top.path / "peft"),
            ],
        }  # fmt: skip
        said = {
            "One batch, each sentence through its own adapter": "Beside the tasks' own "
            f"models, one after another, no logit differs by more than {off:.0e}.",
            "What a task takes": f"The files in {top.path / 'peft'} are PEFT's, too.",
        }
        document = train.Report(f"{Path(solved[0].task.settings.model or '').name}: "
                                f"{', '.join(s.names)}")  # fmt: skip
        for title, (head, *rows) in parts.items():
            document.section(title).table(head, rows).text(said.get(title, FIGURES))
            print(f"\n{title}\n\n{train.table([head, *rows])}")
            print(*(f"\n{said[title]}" for _ in [0] if title in said), sep="", end="")
        document.section("Each task").items(
            f"[{name}]({name}/report.md)" for name in s.names
        )
        document.section("Made with").table(("what", ""), train.machine().items())
        document.write(top.report)
        seconds = time.perf_counter() - began
        print(f"\n\nThe report is {top.report}, after {seconds:.0f} s.")


FIGURES = "In percent; the reports of the tasks say what the metrics mean."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return train.command_line(Settings, run, argv, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
