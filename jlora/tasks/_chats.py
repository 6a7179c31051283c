"""What tasks on conversations share: data, templates, answers to held-out prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import optax

from jlora import data, train
from jlora.tasks._generation import Generator
from jlora.tasks._options import AdapterOptions, Loaded, TrainingOptions, refuse
from jlora.tasks._reports import (
    closing_part,
    model_name,
    print_facts,
    training_part,
)
from jlora.train import option

Tree = Any
T = TypeVar("T")
Messages = tuple[data.Message, ...]
#: Says of an answer, and of the one in the data, how good it is, from 0 to 1.
Measure = Callable[[str, str], float]

SAMPLES = 6  # of answers in the report
ASKED = 32  # prompts that are answered


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatOptions(AdapterOptions, TrainingOptions):
    """Which model talks, about what."""

    # fmt: off
    lr: float | None = option(None, "peak rate (2e-4)", above=0)
    batch_size: int = option(16, "examples per step (16)", least=1, group="training")
    model: str | None = option(
        None, "folder or hub name of a causal language model", path=True,
        group="model and data", metavar="DIR|NAME")
    template: str | None = option(
        None, "its chat template: a Jinja file, or plain (the tokenizer's)", path=True,
        metavar="FILE")
    dataset: str | None = option(
        None, "dataset: folder or hub name", path=True, metavar="DIR|NAME")
    config: str | None = option(None, "the dataset's configuration")
    splits: list[str] = option(
        ["train", "test"], "its splits (train test)", count=2,
        metavar=("TRAIN", "VALID"))
    train: list[str] | None = option(
        None, "tables of examples: jsonl, json, parquet; or .gz", path=True,
        metavar="FILE")
    valid: list[str] | None = option(
        None, "the same, held out (a part of --train)", path=True, metavar="FILE")
    train_size: int | None = option(None, "train on this many examples (all)", least=1)
    valid_size: int = option(200, "held-out examples (200)", least=1)
    max_length: int = option(1024, "tokens; longer examples are cut (1024)", least=2)
    max_new_tokens: int = option(64, "of answers to held-out prompts (64)", least=1)
    ask: int | None = option(
        None, "held-out prompts that are answered (32)", least=1)
    # fmt: on

    usual_lr: ClassVar[float] = 2e-4

    def check(self) -> None:
        """Refuse options that do not go together."""
        super().check()
        refuse({
            "--dataset brings its own splits; leave --train and --valid out": (
                self.dataset and (self.train or self.valid)
            ),
            "--config belongs to a --dataset": self.config and not self.dataset,
            "data is needed: --train FILE, or --dataset": (
                not self.train and not self.dataset
            ),
            "a model is needed: --model DIR, or its name on the hub": not self.model,
        })  # fmt: skip

    def optimizer(
        self, steps: int
    ) -> tuple[optax.GradientTransformation, optax.Schedule]:
        """Return AdamW, and its rate over so many steps."""
        if self.lr is None:
            return dataclasses.replace(self, lr=self.usual_lr).optimizer(steps)
        return super().optimizer(steps)

    def read(self, reader: Callable[[Any], list[T]]) -> tuple[list[T], list[T]]:
        """Read what to train on, and what to hold out.

        Args:
          reader: of tables: `jlora.data.read_conversations`, say.

        What is to be streamed is not read: there is nothing to train on.
        """
        if self.dataset is not None:
            limits = (self.train_size, self.valid_size)
            training, valid = (
                reader(
                    data.read_dataset(
                        self.dataset, self.config, split, limit=limit, seed=self.seed
                    )
                )
                for split, limit in zip(self.splits, limits, strict=True)
            )
        elif self.valid:
            streams = getattr(self, "streaming", False)
            training = [] if streams else reader(self.train)
            valid = reader(self.valid)
        else:
            training, valid = data.hold_out(
                reader(self.train), self.valid_size, self.seed
            )
        training = data.subset(training, self.train_size, self.seed)
        return training, valid[: self.valid_size]


class Answers(NamedTuple):
    """What a model makes of what was held out.

    Attributes:
      scores: numbers by name, the loss among them.
      texts: its answers.
    """

    scores: dict[str, float]
    texts: list[str]


class Prompts:
    """Held-out prompts, and how a model answers them.

    Args:
      settings: how many, and how long answers are.
      loaded: the model and its tokenizer.
      prompts: messages before an answer.
      wanted: the answers that the data has.
      measures: of answers, by name.
    """

    def __init__(
        self,
        settings: ChatOptions,
        loaded: Loaded,
        prompts: Sequence[Messages],
        wanted: Sequence[str],
        measures: Mapping[str, Measure],
    ) -> None:
        self.prompts, self.wanted = prompts, wanted
        self.measures = measures
        tokens = {"input_ids": [data.chat_prompt(loaded.tokenizer, p) for p in prompts]}
        self._batches = data.Batches(
            tokens,
            data.shapes_for([tokens], 1),
            min(settings.eval_batch_size, len(prompts)),
            padding_of(loaded),
        )
        self._generator = Generator(
            loaded.model, loaded.tokenizer, settings.max_new_tokens
        )

    def answer(
        self, when: str, params: Tree, folder: train.RunFolder
    ) -> tuple[list[str], dict[str, float]]:
        """Answer the prompts into a file of the run's `outputs`, and measure that.

        Args:
          when: `"before"` or `"after"` training.
          params: the parameters.
          folder: of the run.
        """
        texts = self._generator.to_file(
            params,
            self._batches,
            folder.outputs / f"{when}.txt",
            keep=folder.resumed and when == "before",
            title=f"{when}: answers",
        )
        scores = {
            name: sum(map(measure, texts, self.wanted)) / len(texts)
            for name, measure in self.measures.items()
        }
        words = sum(len(text.split()) for text in texts)
        return texts, {**scores, "words an answer": words / len(texts)}

    def samples(
        self, before: Sequence[str], after: Sequence[str]
    ) -> list[tuple[str, str, str, str]]:
        """Return some rows of prompt, wanted answer, and answers before and after."""
        asked = [prompt[-1].content for prompt in self.prompts]
        rows = list(zip(asked, self.wanted, before, after, strict=True))
        every = max(1, len(rows) // SAMPLES)
        return rows[::every][:SAMPLES]


def prepared(settings: ChatOptions, loaded: Loaded) -> dict[str, Any]:
    """Give the tokenizer its template; return what tokenising has to know.

    Args:
      settings: the template.
      loaded: the model and its tokenizer, which is changed.
    """
    data.with_template(loaded.tokenizer, settings.template)
    return {"stops": stops_of(loaded), "vocabulary": loaded.model.config.vocab_size}


def stops_of(loaded: Loaded) -> list[int]:
    """Return the tokens at which the model stops."""
    config = loaded.model.config
    ends = dict(config.generation).get("eos_token_id", config.eos_token_id)
    if ends is None:
        return []
    return list(ends) if isinstance(ends, Iterable) else [ends]


def padding_of(loaded: Loaded) -> int:
    """Return a token to fill batches with; nothing is computed of it."""
    known = (loaded.model.config.pad_token_id, loaded.tokenizer.pad_token_id)
    return next((token for token in known if token is not None), 0)


def score_rows(
    before: Mapping[str, float], after: Mapping[str, float], shares: Iterable[str]
) -> list[tuple[str, str, str]]:
    """Return rows of a table, of each score before and after.

    Args:
      before: scores by name.
      after: the same.
      shares: those that are shares, from 0 to 1.
    """
    shares = set(shares)
    shown = lambda name, x: f"{x:.0%}" if name in shares else f"{x:.3f}"  # noqa: E731
    return [
        (name, shown(name, before[name]), shown(name, after[name])) for name in after
    ]


def scores_part(
    settings: ChatOptions,
    folder: train.RunFolder,
    facts: Mapping[str, str],
    scores: Sequence[Sequence[str]],
    what: str,
    figures: str,
    remarks: Sequence[str],
    loss: str = "loss (nats a label)",
) -> train.Report:
    """Begin a report: the scores, and what training was.

    Args:
      settings: of the run.
      folder: of the run.
      facts: lines on training.
      scores: a table whose first row is its head.
      what: the data is of.
      figures: says what the scores are.
      remarks: what a user should know of the data.
      loss: what stands beside the axis of the plot.
    """
    title = f"{model_name(settings.model)}: {what}"
    document = train.Report(title).section("Before and after")
    document.table(scores[0], scores[1:]).text(figures).items(remarks)
    return training_part(document, folder, facts, title, loss)


def answers_part(
    report: train.Report,
    folder: train.RunFolder,
    facts: Mapping[str, str],
    scores: Sequence[Sequence[str]],
    answers: Sequence[tuple[str, str, str, str]],
    wanted: str,
    use: str,
    parameters: object,
) -> None:
    """Add answers and what every report ends with; write it, and print its gist.

    Args:
      report: to add to.
      folder: of the run.
      facts: lines on training.
      scores: a table whose first row is its head.
      answers: rows of prompt, wanted answer, and answers before and after.
      wanted: what the wanted answers are called.
      use: code that uses what was made.
      parameters: a `jlora.Summary`.
    """
    report.section("Answers to held-out prompts")
    report.table(("prompt", wanted, "before", "after"), answers)
    report.section("Now use it").code(use, "python")
    closing_part(report, folder, parameters)

    print_facts(facts)
    for asked, there, old, new in answers[:3]:
        print(f"\n  prompt     {asked}\n  in data    {there}")
        print(f"  before     {old}\n  after      {new}")
    print(f"\n{train.table(scores)}")
    print(f"\nNow use it:\n\n{use}\n\nThe report is {folder.report}.")


def use_of(folder: Path, question: str, longest: int) -> str:
    """Return a program that asks the merged model."""
    asked = question.replace('"', "'").splitlines()[0][:80]
    return USE.format(folder=folder, question=asked, longest=longest)


USE = """\
from jlora import data, models

model, params = models.load("{folder}")
tokenizer = data.load_tokenizer("{folder}")
ids = data.chat_prompt(tokenizer, [data.Message("user", "{question}")])
tokens = models.generate(model, params, ids[None], max_new_tokens={longest})
print(tokenizer.decode(tokens[0], skip_special_tokens=True))"""
