"""What is classified: the model, the examples and their labels, and the metrics."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jlora import metrics
from jlora._errors import JloraWarning
from jlora.data import Table, read_table
from jlora.tasks._examples import (
    UNLABELLED,
    Examples,
    hold_out,
    join,
    label_cells,
    read_examples,
    subset,
)
from jlora.tasks._glue import GLUE, HUB, glue_examples
from jlora.tasks._options import AdapterOptions, Loaded, TrainingOptions, refuse
from jlora.train import option

Tree = Any

LONGEST = 128  # tokens, where the model has places for as many
HEAD = "classifier"
METRICS: Mapping[str, Callable[..., float]] = {
    "accuracy": metrics.accuracy,
    "f1": metrics.f1,
    "macro_f1": functools.partial(metrics.f1, average="macro"),
    "matthews": metrics.matthews,
    "pearson": metrics.pearson,
    "spearman": metrics.spearman,
}
OF_NUMBERS = ("pearson", "spearman")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassificationSettings(AdapterOptions, TrainingOptions):
    """What was asked for; the defaults stand in brackets."""

    # fmt: off
    model: str | None = option(
        None, "folder or hub name of a BERT or RoBERTa", path=True,
        group="model and data", metavar="DIR|NAME")
    glue: str | None = option(
        None, f"a task of GLUE: {' '.join(GLUE)}", choices=tuple(GLUE), metavar="NAME")
    data: str | None = option(
        None, f"a folder of GLUE's files, for --glue (the hub's {HUB})", path=True,
        metavar="DIR")
    train: list[str] | None = option(
        None, "or tables of your own: tsv, csv, jsonl, json, parquet; or .gz",
        path=True, metavar="FILE")
    valid: list[str] | None = option(
        None, "the same (a part of --train)", path=True, metavar="FILE")
    test: list[str] | None = option(
        None, "the same (a part of --train)", path=True, metavar="FILE")
    text: list[str] = option(
        ["sentence"], "columns of the text, one or two (sentence); numbers where a "
        "file does not name its columns", metavar="COLUMN")
    label: str = option("label", "column of the label (label)", metavar="COLUMN")
    classes: list[str] | None = option(
        None, "names of the classes in the order of their numbers (those of --train)",
        metavar="NAME")
    regression: bool = option(False, "labels are numbers to predict, not classes")
    metrics: list[str] | None = option(
        None, "to report: accuracy f1 macro_f1 matthews, pearson spearman (the task's)",
        choices=tuple(METRICS), metavar="NAME")
    train_size: int | None = option(None, "train on this many examples (all)", least=1)
    valid_size: int = option(500, "examples for the loss (500)", least=1)
    test_size: int | None = option(None, "test so many, the first (all)", least=1)
    model_dropout: bool = option(
        False, "drop out within the model too, as its configuration says")
    max_length: int | None = option(
        None, f"tokens; longer texts are cut ({LONGEST})", least=4)
    # fmt: on

    def check(self) -> None:
        """Refuse options that do not go together."""
        super().check()
        own = [self.train, self.valid, self.test, self.classes, self.regression or None]
        refuse({
            "--glue brings its own data; leave --train, --valid, --test, --classes and "
            "--regression out": self.glue and any(x is not None for x in own),
            "--data is a folder of GLUE's files; say which --glue": (
                self.data and not self.glue
            ),
            "data is needed: --glue NAME, or --train FILE": (
                not self.glue and not self.train
            ),
            "--classes names classes, and --regression has none": (
                self.regression and self.classes
            ),
            "--text takes one column, or two that are read together": (
                not 1 <= len(self.text) <= 2
            ),
            "a model is needed: --model DIR, or its name on the hub": not self.model,
        })  # fmt: skip
        for name in self.metrics or ():
            others = self._is_regression != (name in OF_NUMBERS)
            refuse({f"the metric {name} is not for such labels": others})

    @property
    def _is_regression(self) -> bool:
        return self.regression or bool(self.glue and not GLUE[self.glue].classes)

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes in the order of their numbers; () is a regression.

        Without a task and `classes` they are what `train` says, in order.
        """
        if self.glue:
            return GLUE[self.glue].classes
        if self.regression or self.classes:
            return tuple(self.classes or ())
        found = {
            cell
            for file in self.train or ()
            for cell in label_cells(self._table(file), self.label)
        }
        by_number = lambda name: (int(name) if name.isdigit() else -1, name)  # noqa: E731
        return tuple(sorted(found.difference(UNLABELLED), key=by_number))

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns of the text, one or two."""
        return GLUE[self.glue].text if self.glue else tuple(self.text)

    @property
    def num_labels(self) -> int:
        """The outputs of the model's head."""
        return len(self.class_names) or 1

    @property
    def metric_names(self) -> tuple[str, ...]:
        """What to report."""
        if self.metrics:
            return tuple(self.metrics)
        if self.glue:
            return metrics.GLUE_TASKS[self.glue]
        by_labels = {1: OF_NUMBERS, 2: ("accuracy", "f1")}
        return by_labels.get(self.num_labels, ("accuracy", "macro_f1"))

    def load(self, source: str | Path, **options: Any) -> Loaded:
        """Load a model with a head for the labels, and its tokenizer.

        A head that the checkpoint lacks is made anew, by the run's key, and trained.
        """
        own = {"head": "classification", "num_labels": self.num_labels, "key": self.key}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*leaves of the chosen", JloraWarning)
            loaded = super().load(source, **{**own, **options})
        config, names = loaded.model.config, self.class_names
        if not names:
            return loaded
        said = {  # the classes' names go with the model, as transformers has them
            "id2label": {str(number): name for number, name in enumerate(names)},
            "label2id": {name: number for number, name in enumerate(names)},
        }
        named = dataclasses.replace(config, extra={**config.extra, **said})
        return loaded._replace(model=loaded.model.clone(config=named))

    def adapt(
        self,
        params: Tree,
        key: jax.Array | None = None,
        whole: Sequence[str] = (HEAD,),
    ) -> Tree:
        """Put adapters on the targets, and train the head as it is."""
        return super().adapt(params, key, whole)

    def read(self) -> tuple[Examples, Examples, dict[str, Examples]]:
        """Read what to train on, to validate with, and to test."""
        if self.glue:
            (training,) = glue_examples(self.glue, "train", self.data).values()
            tests = glue_examples(self.glue, "test", self.data)
        else:
            training = self.examples(self.train or [])
            if self.test:
                tests = {"test": self.examples(self.test)}
            else:
                training, held = hold_out(training, self.test_size or 500, self.seed)
                tests = {"test": held}
        if self.valid:
            valid = self.examples(self.valid)
        else:
            training, valid = hold_out(training, self.valid_size, self.seed)
        limit = self.test_size
        tests = {name: x.take(range(len(x))[:limit]) for name, x in tests.items()}
        valid = valid.take(range(len(valid))[: self.valid_size])
        return subset(training, self.train_size, self.seed), valid, tests

    def examples(self, files: Sequence[str | Path]) -> Examples:
        """Return the labelled texts of tables.

        Raises:
          DataError: a table lacks a column, or a label is none of the classes.
        """
        return join(
            [
                read_examples(
                    self._table(file), self.text, self.label, self.class_names
                )
                for file in files
            ]
        )

    def _table(self, file: str | Path) -> Table:
        """Read a table; columns that are called by numbers have no names in it."""
        numbered = all(name.isdigit() for name in (*self.text, self.label))
        return read_table(file, columns="numbered" if numbered else None)
