"""One task by several methods: full fine-tuning, LoRA, DoRA, QLoRA, side by side."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import jlora
from jlora import data, train
from jlora._errors import OptionError
from jlora.tasks._memory import step_memory
from jlora.tasks._run import KINDS, started, trained
from jlora.train._report import human_bytes, size_of

TIMED = 5  # steps, of which the median counts

# What each method changes in a task's settings; full fine-tuning has no adapter.
_NO_ADAPTER = {
    "rank": None, "alpha": None, "targets": None, "dropout": 0.0, "init": None,
    "rslora": False, "dora": False, "quantize": None, "lr": None,
}  # fmt: skip
METHODS: dict[str, Mapping[str, Any]] = {
    "full": {**_NO_ADAPTER, "full": True},
    "LoRA": {},
    "DoRA": {"dora": True},
    "QLoRA": {"quantize": "nf4"},
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one method came to.

    Attributes:
      method: its name.
      trained: what it trained, in words.
      trainable, total: numbers of parameters.
      before, after: the score of each test.
      loss: the lowest validation loss.
      seconds: of training, validation and saving included.
      step_seconds: of a step that is compiled: the median of several.
      peak_bytes: what is alive at the peak of a step, by XLA's account.
      file_bytes: what has to be kept of it on disk.
    """

    method: str
    trained: str
    trainable: int
    total: int
    before: dict[str, float]
    after: dict[str, float]
    loss: float
    seconds: float
    step_seconds: float
    peak_bytes: int
    file_bytes: int

    def gain(self, test: str) -> float:
        """How much a test's score rose."""
        return self.after[test] - self.before[test]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Several methods on one task, with equal data and steps.

    Attributes:
      outcomes: of each method.
      measure: what the scores count.
    """

    outcomes: tuple[Outcome, ...]
    measure: str

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """A table whose first row is its head."""
        tests = [*self.outcomes[0].after]
        scores = [f"{self.measure} {test}" for test in tests]
        head = ["method", "trained parameters", "validation loss", *scores]
        head += ["training s", "ms a step", "peak memory", "on disk"]
        return [tuple(head), *(self._row(outcome, tests) for outcome in self.outcomes)]

    def _row(self, one: Outcome, tests: Sequence[str]) -> tuple[str, ...]:
        scores = (f"{one.before[test]:.1f} -> {one.after[test]:.1f}" for test in tests)
        return (
            one.method,
            f"{one.trainable:,} ({one.trainable / one.total:.2%})",
            f"{one.loss:.3f}",
            *scores,
            f"{one.seconds:.0f}",
            f"{1000 * one.step_seconds:.0f}",
            human_bytes(one.peak_bytes),
            human_bytes(one.file_bytes),
        )

    def advice(self) -> list[str]:
        """What this run's own figures say of each method beside full fine-tuning."""
        full = next((x for x in self.outcomes if x.method == "full"), None)
        if full is None:
            return []
        test, *others = full.after
        return [
            said
            for one in self.outcomes
            if one is not full
            for said in (self._beside(one, full, test, others),)
        ]

    def _beside(
        self, one: Outcome, full: Outcome, test: str, others: Sequence[str]
    ) -> str:
        quality = one.after[test] - full.after[test]
        verdict = (
            f"{abs(quality):.1f} {self.measure} {'above' if quality > 0 else 'below'}"
        )
        if abs(quality) < 0.05:
            verdict = f"the same {self.measure} as"
        kept = ""
        for other in others:
            more = one.after[other] - full.after[other]
            word = "more" if more > 0 else "less"
            kept += f" It keeps {abs(more):.1f} {self.measure} {word} of {other}."
        return (
            f"{one.method}: {verdict} full fine-tuning on {test}, with "
            f"{one.trainable / full.trainable:.1%} of its trained parameters, "
            f"{one.step_seconds / full.step_seconds:.2f} of its time a step, "
            f"{one.peak_bytes / full.peak_bytes:.2f} of its memory and "
            f"{one.file_bytes / full.file_bytes:.3f} of its file.{kept}"
        )

    def plot(self, path: Path, title: str = "") -> None:
        """Draw the scores, the time, the memory and the size of the methods.

        Args:
          path: the picture to write, a PNG for instance.
          title: its title.
        """
        from matplotlib.figure import Figure

        first = self.outcomes[0]
        panels = {
            f"{self.measure}, {test}": [x.after[test] for x in self.outcomes]
            for test in first.after
        } | {
            "ms a step": [1000 * x.step_seconds for x in self.outcomes],
            "peak memory, MB": [x.peak_bytes / 1e6 for x in self.outcomes],
            "on disk, MB": [x.file_bytes / 1e6 for x in self.outcomes],
        }
        names = [x.method for x in self.outcomes]
        figure = Figure(figsize=(2.3 * len(panels), 2.8), layout="constrained")
        figure.suptitle(title)
        for axes, (label, values) in zip(
            figure.subplots(1, len(panels)), panels.items(), strict=True
        ):
            bars = axes.bar(
                names, values, color=["0.6", "C0", "C1", "C2"][: len(names)]
            )
            axes.bar_label(bars, fmt="%.3g", fontsize=8, padding=1)
            axes.set_title(label, fontsize=10)
            axes.tick_params(axis="x", labelsize=8)
            axes.margins(y=0.15)
            axes.spines[["top", "right"]].set_visible(False)
        for axes, before in zip(figure.axes, first.before.values(), strict=False):
            axes.axhline(before, color="k", linestyle=":", linewidth=1)
            axes.annotate(
                "before", (1, before), xycoords=axes.get_yaxis_transform(), fontsize=8,
                xytext=(2, 0), textcoords="offset points", va="center",
            )  # fmt: skip
        figure.savefig(path, dpi=120)


def compare(
    name: str, settings: Any, folder: train.RunFolder, methods: Sequence[str] = ()
) -> Comparison:
    """Train one task by several methods, with equal data, order and steps.

    Each method is a run of its own, in a folder below `folder`. Learning rates are
    those of the settings' defaults for adapters and for whole weights, unless `lr` is
    given, which is then the adapters'.

    Args:
      name: one of `KINDS`, whose task has `scores(said)`, of which more is better, and
        says in `measure` what they count: `"translate"`.
      settings: of that kind.
      folder: of the run.
      methods: of `METHODS`; all of them if empty.

    Raises:
      OptionError: an unknown method, or a task without one score.
    """
    if unknown := [method for method in methods if method not in METHODS]:
        raise OptionError(f"methods {unknown}: expected some of {', '.join(METHODS)}.")
    measure = getattr(KINDS[name].make, "measure", None)
    if measure is None:
        raise OptionError(f"the task {name!r} has no one score to compare by.")
    settings.check_alone("a comparison")
    outcomes = []
    for method in methods or METHODS:
        own = dataclasses.replace(
            settings, **METHODS[method], output=str(folder.path / method),
            resume=False, overwrite=True,
        )  # fmt: skip
        print(f"\n{method}: {own.what_is_trained}")
        outcomes.append(_outcome(name, method, own))
    comparison = Comparison(tuple(outcomes), measure)
    _report(comparison, folder, f"{name}: {', '.join(x.method for x in outcomes)}")
    return comparison


def _report(comparison: Comparison, folder: train.RunFolder, title: str) -> None:
    """Write the picture and the report, and print the table and what it means."""
    comparison.plot(folder.path / "comparison.png", title)
    head, *rows = comparison.rows
    document = train.Report(title).section("Side by side").table(head, rows)
    document.image(folder.path / "comparison.png", "comparison").text(FIGURES)
    document.section("Which to choose, by these figures").items(comparison.advice())
    document.section("Runs").items(
        f"{x.method}: {x.trained}; its files are in `{x.method}/`"
        for x in comparison.outcomes
    )
    document.section("Made with").table(("what", ""), train.machine().items())
    document.write(folder.report)
    print(f"\n{train.table(comparison.rows)}\n")
    for line in comparison.advice():
        print(textwrap.fill(line, 88))
    print(f"\nThe report is {folder.report}.")


FIGURES = """\
All methods saw the same examples in the same order, for as many steps. A step's time
is the median of several that are compiled. Memory is what XLA's account of the compiled
step has alive at its peak: parameters, optimiser, activations. On disk lies what has to
be kept beside the base: the adapter, or every weight."""


def _outcome(name: str, method: str, settings: Any) -> Outcome:
    loaded, tree, task = started(name, settings)
    summary = jlora.summary(tree)
    with settings.claim(name) as folder:
        before, fit, after = trained(settings, task, tree, folder, loaded.params)
        step_seconds, peak = _measured(settings, task, tree)
        return Outcome(
            method,
            settings.what_is_trained,
            summary.trainable,
            summary.total,
            task.scores(before),
            task.scores(after),
            fit.best_loss if fit.best_step else math.nan,
            fit.seconds,
            step_seconds,
            peak,
            size_of(folder.adapter),
        )


def _largest(batches: data.Batches | data.Streaming) -> Any:
    """Return a batch of the largest shape, which needs the most memory."""
    if isinstance(batches, data.Streaming):  # among those of a window
        window = itertools.islice(batches, batches.window)
        return max(window, key=lambda batch: batch["input_ids"].shape)
    return batches.arrays(max(batches.plan(), key=lambda one: one.shape))


def _measured(settings: Any, task: Any, tree: Any) -> tuple[float, int]:
    """Return the time of a compiled step, and the memory of it by XLA's account."""
    tx, _ = settings.optimizer(TIMED)
    options = {"accumulate": settings.accumulate, "clip_norm": settings.clip or None}
    options["mesh"] = settings.device_mesh
    step = train.make_train_step(task.loss_fn, tx, **options)
    state = train.TrainState.create(tree, tx, settings.key)
    batch = _largest(task.train)
    memory = step_memory(task.loss_fn, tree, tx, batch, **options) or {}
    state, _ = step(state, batch)
    times = []
    for _ in range(TIMED):
        began = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - began)
    return statistics.median(times), sum(memory.values())
