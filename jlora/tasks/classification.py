"""Classification: sentences or pairs of them in, a class or a number out.

`Classification` reads and tokenises examples, measures a BERT or RoBERTa by the metrics
of GLUE, and reports what training changed. The eight tasks of GLUE are known by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jlora
from jlora import data, train
from jlora._processes import on_first
from jlora.tasks._class_settings import (
    ClassificationSettings as ClassificationSettings,
)
from jlora.tasks._classifier import Classifier as Classifier
from jlora.tasks._classifier import class_scores as class_scores
from jlora.tasks._classifier import logits_of as logits_of
from jlora.tasks._classifier import predictions
from jlora.tasks._examples import Examples
from jlora.tasks._losses import classification_loss
from jlora.tasks._options import Loaded, count_tokens
from jlora.tasks._reports import closing_part, model_name, print_facts, training_part

Tree = Any
Logits = dict[str, np.ndarray]  # of each test [examples, labels]

SAMPLES = 3  # in the report: of those that training mended, and of the wrong ones


class Classification:
    """Examples in batches of few shapes, and how a model does on them.

    Args:
      settings: what to read, and how.
      loaded: the model, its parameters and its tokenizer.

    Attributes:
      train, valid: batches of `input_ids`, `attention_mask`, `labels`, and of pairs
        `token_type_ids` where the tokenizer has them.
      tests: batches by the test's name.
      examples: the tests' texts and labels.
      remarks: what a user should know of the text, cut sentences say.
      loss_fn: the loss, as `jlora.train` takes it.
      count: how many tokens a batch holds.
    """

    def __init__(self, settings: ClassificationSettings, loaded: Loaded) -> None:
        self.settings, self.remarks = settings, list[str]()
        self._asked = Classifier(loaded, settings.max_length)
        config = loaded.model.config
        training, valid, self.examples = settings.read()
        splits = {"train": training, "valid": valid, **self.examples}
        columns = {name: self.columns(x, name) for name, x in splits.items()}
        shapes = data.shapes_for(list(columns.values()), settings.buckets)
        pad, size = config.pad_token_id, settings.eval_batch_size
        batches = {
            name: data.Batches(own, shapes, size, pad) for name, own in columns.items()
        }
        self.train = data.Batches(
            columns["train"], shapes, settings.batch_size, pad, settings.seed
        )
        self.valid = batches["valid"]
        self.tests = {name: batches[name] for name in self.examples}
        self.loss_fn = classification_loss(loaded.model, dropout=settings.model_dropout)
        self.count = count_tokens

    def columns(self, examples: Examples, name: str = "texts") -> dict[str, Any]:
        """Return examples as columns for `jlora.data.Batches`; note what is cut."""
        columns, remarks = self._asked.columns(examples, name)
        self.remarks.extend(remarks)
        return columns

    def logits(
        self, params: Tree, batches: data.Batches, title: str | None = None
    ) -> np.ndarray:
        """Return the logits of every example, `[n, labels]` float32, in their order.

        Args:
          params: the parameters, with adapters or without.
          batches: the examples.
          title: of a progress bar; None shows none.
        """
        return self._asked.logits(params, batches, title)

    def answer(self, when: str, params: Tree, folder: train.RunFolder) -> Logits:
        """Return the logits of the tests, and write them into the run's `outputs`.

        Args:
          when: `"before"` or `"after"` training. A resumed run has the former already.
          params: the parameters.
          folder: of the run.
        """
        found: Logits = {}
        keep = folder.resumed and when == "before"
        for name, batches in self.tests.items():
            file = folder.outputs / f"{name}.{when}.tsv"
            whole = functools.partial(_is_whole, file, batches)
            if keep and on_first(f"reading {file}", whole):
                found[name] = _read_logits(file)
                continue
            found[name] = self.logits(params, batches, f"{when}: {name}")
            on_first(
                f"writing {file}",
                functools.partial(
                    _write_logits,
                    file,
                    found[name],
                    self.predictions(found[name]),
                    self._heads,
                ),
            )
        return found

    @property
    def _heads(self) -> tuple[str, ...]:
        return self.settings.class_names or ("score",)

    def predictions(self, logits: np.ndarray) -> np.ndarray:
        """Return the class of each row of logits, or its number, `[n]`."""
        return predictions(logits, self.settings.class_names)

    def scores(self, logits: Logits) -> dict[str, dict[str, float]]:
        """Return each test's metrics, 1 for perfect, by their names."""
        s = self.settings
        return {
            name: class_scores(s.metric_names, s.class_names, rows, self.examples[name])
            for name, rows in logits.items()
        }

    def samples(self, before: Logits, after: Logits) -> list[Sequence[str]]:
        """Return examples of the first test: mended by training, then still wrong.

        Of each those that the model is surest of, or with the largest errors.

        Returns:
          Rows of how sure the model is (or its error), text, label, before and after.
        """
        first, examples = next(iter(self.examples.items()))
        old, new = self.predictions(before[first]), self.predictions(after[first])
        names = self.settings.class_names
        name_of: Callable[[Any], str] = "{:.2f}".format
        if names:
            name_of = names.__getitem__
            said = np.asarray(jax.nn.softmax(after[first], -1).max(-1))
            was, now = old != examples.labels, new != examples.labels
        else:  # a number is wrong if it is off by more than most are
            said = np.abs(new - examples.labels)
            now = said > np.median(said)
            was = np.abs(old - examples.labels) > np.median(said)
        order = np.argsort(-said, kind="stable")
        best = order if names else order[::-1]
        mended = [row for row in best if was[row] and not now[row]]
        wrong = [row for row in order if now[row]]
        return [
            (f"{said[row]:.2f}", examples.text(row),
             *(name_of(x[row]) for x in (examples.labels, old, new)))
            for row in [*mended[:SAMPLES], *wrong[:SAMPLES]]
        ]  # fmt: skip

    def report(
        self,
        folder: train.RunFolder,
        facts: Mapping[str, str],
        before: Logits,
        after: Logits,
        parameters: jlora.Summary,
    ) -> None:
        """Write the plot and the report, and print the gist of it.

        Args:
          folder: of the run.
          facts: lines on training.
          before: the tests' logits before it.
          after: those after.
          parameters: what was trained.
        """
        samples = self.samples(before, after)
        use = self.use(folder, samples)
        self.write_report(folder, facts, before, after, parameters, use)
        print_facts(facts)
        for said, text, label, old, new in samples[:1] + samples[-1:]:
            print(f"\n  text     {text}\n  label    {label}")
            print(f"  before   {old}\n  after    {new}   ({self._sure} {said})")
        head, rows = self.table(before, after)
        print(f"\n{train.table([head, *rows])}")
        print(f"\nNow use it:\n\n{use}\n\nThe report is {folder.report}.")

    @property
    def _sure(self) -> str:
        return "sure" if self.settings.class_names else "off by"

    def write_report(
        self,
        folder: train.RunFolder,
        facts: Mapping[str, str],
        before: Logits,
        after: Logits,
        parameters: jlora.Summary,
        use: str = "",
    ) -> None:
        """Write the plot and the report.

        Args:
          folder: of the run.
          facts: lines on training.
          before: the tests' logits before it.
          after: those after.
          parameters: what was trained.
          use: code that uses what was made, if there is any to show.
        """
        s, first = self.settings, next(iter(self.examples))
        what = s.glue or Path((s.train or [""])[0]).name.partition(".")[0]
        title = f"{model_name(s.model)}: {what}"
        document = train.Report(title).section("Before and after")
        document.table(*self.table(before, after)).text(FIGURES).items(self.remarks)
        if s.class_names:
            document.section(f"The classes of {first}")
            document.text(CLASSES).table(*self.by_class(first, after[first]))
        loss = "loss (nats a label)" if s.class_names else "loss (squared error)"
        training_part(document, folder, facts, title, loss)
        document.section("Examples").text(
            f"Of `{first}`: {'those' if s.class_names else 'numbers'} that training "
            "mended, and then what is still wrong."
        )
        head = (self._sure, "text", "label", "before", "after")
        document.table(head, self.samples(before, after))
        if use:
            document.section("Now use it").code(use, "python")
        closing_part(document, folder, parameters)

    def table(self, before: Logits, after: Logits) -> tuple[Sequence[str], list[Any]]:
        """Return the head and the rows of a table of the metrics, in percent."""
        old, new = self.scores(before), self.scores(after)
        rows = [
            (test, len(self.examples[test]), metric, f"{100 * old[test][metric]:.1f}",
             f"{100 * value:.1f}", f"{100 * (value - old[test][metric]):+.1f}")
            for test, values in new.items() for metric, value in values.items()
        ]  # fmt: skip
        return ("test", "examples", "metric", "before", "after", "change"), rows

    def by_class(
        self, test: str, logits: np.ndarray
    ) -> tuple[Sequence[str], list[Sequence[Any]]]:
        """Return a table of each class: precision, recall, F1, and what was said.

        Args:
          test: its name.
          logits: of the model.

        Returns:
          The head and the rows; the last columns count what examples of the row's class
          were taken for.
        """
        from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

        names, true = self.settings.class_names, self.examples[test].labels
        said, numbers = self.predictions(logits), range(len(names))
        shares = precision_recall_fscore_support(
            true, said, labels=numbers, zero_division=0.0
        )
        confused = confusion_matrix(true, said, labels=numbers)
        head = ("class", "examples", "precision", "recall", "F1",
                *(f"said {name}" for name in names))  # fmt: skip
        return head, [
            (name, int(shares[3][i]), *(f"{100 * x[i]:.1f}" for x in shares[:3]),
             *confused[i].tolist())
            for i, name in enumerate(names)
        ]  # fmt: skip

    def use(self, folder: train.RunFolder, samples: Sequence[Sequence[str]]) -> str:
        """Return code that uses the merged model."""
        texts = samples[0][1].split(" | ", 1)[: len(self.settings.text_columns)]
        words = ", ".join(repr([text]) for text in texts)
        names = self.settings.class_names
        last = f"{list(names)}[logits.argmax()]" if names else "logits[0, 0]"
        return USE.format(folder=folder.merged, words=words, last=last)


def _write_logits(
    file: Path, logits: np.ndarray, said: np.ndarray, names: Sequence[str]
) -> None:
    """Write a line an example: what the model says, and each logit."""
    is_class = len(names) > 1
    rows = [["prediction", *(f"logit {name}" for name in names)]]
    for row, prediction in zip(logits, said, strict=True):
        first = names[prediction] if is_class else f"{prediction:.4f}"
        rows.append([first, *(repr(float(x)) for x in row)])
    text = "".join("\t".join(row) + "\n" for row in rows)
    file.parent.mkdir(exist_ok=True)
    file.write_text(text, encoding="utf-8")


def _is_whole(file: Path, batches: data.Batches) -> bool:
    return file.exists() and len(_read_logits(file)) == batches.examples


def _read_logits(file: Path) -> np.ndarray:
    table = data.read_table(file)
    return np.stack([table.floats(name) for name in table.columns[1:]], -1)


FIGURES = """\
All in percent. Accuracy is the share of right answers; F1 weighs what was found against
what was missed; Matthews' correlation is 0 for one that guesses, whatever the classes'
sizes; Pearson's and Spearman's are of predicted and true numbers. The adapter of the
lowest validation loss is kept; `after` speaks of it."""
CLASSES = """\
Precision is the share of right ones among what was called so, recall the share of its
examples that were found; the last columns count what they were taken for."""
USE = """\
from jlora import data, models

model, params = models.load("{folder}")
tokenizer = data.load_tokenizer("{folder}")
batch = tokenizer({words}, return_tensors="np")
logits = model.apply({{"params": params}}, **batch)
print({last})"""
