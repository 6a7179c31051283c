"""Data to text: what is to be said in, sentences out, as in the E2E challenge.

A decoder reads a meaning, `name : The Heron | Type : pub`, and goes on with a text. The
loss is of the text alone; texts are measured by the challenge's five metrics.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jlora import data, metrics, train
from jlora._errors import DataError
from jlora.tasks._generation import Generator
from jlora.tasks._losses import causal_loss
from jlora.tasks._options import (
    AdapterOptions,
    Loaded,
    TrainingOptions,
    count_tokens,
    refuse,
)
from jlora.tasks._reports import closing_part, model_name, print_facts, training_part
from jlora.tasks._streams import packed_remark, stream_refusals, streamed
from jlora.train import option

Tree = Any

SAMPLES = 3  # good texts in the report, and as many bad ones


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataToTextSettings(AdapterOptions, TrainingOptions):
    """What was asked for; the defaults stand in brackets."""

    # fmt: off
    model: str | None = option(
        None, "folder or hub name of a GPT-2", path=True, group="model and data",
        metavar="DIR|NAME")
    data: str | None = option(
        None, "folder of the E2E challenge's files", path=True, metavar="DIR")
    train: list[str] | None = option(
        None, "tables with the columns mr and ref", path=True, metavar="FILE")
    valid: list[str] | None = option(
        None, "the same (a part of the training meanings)", path=True, metavar="FILE")
    test: list[str] | None = option(
        None, "the same (another part)", path=True, metavar="FILE", extends=True)
    train_size: int | None = option(None, "train on this many meanings (all)", least=1)
    valid_size: int = option(200, "meanings for the loss, the first (200)", least=1)
    test_size: int | None = option(
        None, "meanings to put into words, the first (all)", least=2, extends=True)
    max_meaning_length: int = option(128, "tokens; longer ones are cut (128)", least=2)
    max_text_length: int = option(64, "tokens; longer ones are cut (64)", least=2)
    pack: bool = option(
        False, "put several examples in a row of both lengths; a batch counts rows")
    streaming: bool = option(
        False, "read --train (tables) during training; it need not fit in memory")
    workers: int = option(
        0, "processes that tokenise what is streamed (0: this one)", least=0,
        extends=True)
    label_smoothing: float = option(
        0.0, "of the loss: probability spread over all tokens (0)", least=0, below=1)
    beams: int = option(
        4, "1 is greedy (4)", least=1, extends=True, group="inference")
    length_penalty: float = option(
        0.9, "above 0 favours longer texts (0.9)", extends=True)
    no_repeat: int = option(
        4, "no n-gram of this many tokens twice in a text; 0 is off (4)", least=0,
        extends=True)
    # fmt: on

    def check(self) -> None:
        """Refuse options that do not go together."""
        super().check()
        refuse({
            "--data brings its own files; leave --train and --valid out": (
                self.data and (self.train or self.valid)
            ),
            **stream_refusals(self, "train", "valid", "test"),
            "--model needs data: --data DIR, or --train FILE": (
                not (self.data or self.train)
            ),
            "a model is needed: --model DIR, or its name on the hub": not self.model,
        })  # fmt: skip

    @property
    def published(self) -> Mapping[str, float]:
        """Scores to stand beside the run's, by the metric's name."""
        return {}

    def read(self) -> dict[str, list[Meaning]]:
        """Read `train`, `valid` and `test`; no meaning is in two that are held out.

        What is to be streamed is not read.
        """
        files: dict[str, Any] = _files_of(Path(self.data)) if self.data else {}
        files |= {
            name: given
            for name in ("train", "valid", "test")
            if (given := getattr(self, name))
        }
        if self.streaming:
            del files["train"]
        splits = {name: read_meanings(some) for name, some in files.items()}
        for name, size in (("test", self.test_size or 200), ("valid", self.valid_size)):
            if name not in splits:
                held = set(
                    data.hold_out([m.text for m in splits["train"]], size, self.seed)[1]
                )
                splits[name] = [m for m in splits["train"] if m.text in held]
                splits["train"] = [m for m in splits["train"] if m.text not in held]
        if not self.streaming:
            splits["train"] = data.subset(splits["train"], self.train_size, self.seed)
        splits["valid"] = splits["valid"][: self.valid_size]
        splits["test"] = splits["test"][: self.test_size]
        return splits


_NAMES = {  # as the challenge calls its files, and as others would
    "train": ("trainset.csv", "train.csv"),
    "valid": ("devset.csv", "valid.csv"),
    "test": ("testset_w_refs.csv", "test.csv"),
}


def _files_of(folder: Path) -> dict[str, list[str]]:
    """Find the tables of a folder; the one to validate with trains where none does."""
    found = {
        split: [str(folder / name)]
        for split, names in _NAMES.items()
        for name in reversed(names)
        if (folder / name).exists()
    }
    if "train" not in found and "valid" in found:
        found["train"] = found.pop("valid")
    if "train" not in found:
        known = ", ".join(name for names in _NAMES.values() for name in names)
        raise DataError(
            f"{folder} holds nothing to train on.\nThe files are called {known}; name "
            "others with --train."
        )
    return found


_SLOT = re.compile(r"([^,\[\]]+)\[([^\]]*)\]")
# What loralib's examples call the slots of E2E.
_CALLED = {
    "eatType": "Type",
    "priceRange": "price",
    "familyFriendly": "family friendly",
}


class Meaning(NamedTuple):
    """What is to be said, and texts that say it.

    >>> Meaning("name[The Heron], eatType[pub]", []).prompt
    'name : The Heron | Type : pub'
    """

    text: str
    references: list[str]

    @property
    def prompt(self) -> str:
        """The meaning as the model reads it: slots and values, as in loralib."""
        slots = [(n.strip(), value.strip()) for n, value in _SLOT.findall(self.text)]
        return " | ".join(f"{_CALLED.get(n, n)} : {value}" for n, value in slots)


def read_meanings(files: Sequence[str | Path]) -> list[Meaning]:
    """Read tables of `mr` and `ref`; rows of one meaning are its references.

    Raises:
      DataError: a file that cannot be read, or has no such column; a row whose meaning
        is not of the form `slot[value], slot[value]`.
    """
    found: dict[str, list[str]] = {}
    for file in files:
        table = data.read_table(file)
        rows = zip(table.text("mr"), table.text("ref"), strict=True)
        for row, (meaning, text) in enumerate(rows):
            _meaning(meaning, table.place(row))
            found.setdefault(meaning, []).append(text)
    return [Meaning(text, references) for text, references in found.items()]


def _meaning(text: str, place: str) -> Meaning:
    if not _SLOT.search(text):
        raise DataError(
            f"{place}: {text!r} is no meaning.\nWrite it as slot[value], slot[value]."
        )
    return Meaning(text, [])


def say_columns(
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    config: Any,
    longest: tuple[int, int] = (128, 64),
) -> tuple[dict[str, Any], list[str]]:
    """Return prompts and texts as columns for `jlora.data.Batches`, and remarks.

    An end token stands between the two and after the text, as in loralib's examples;
    the labels are those of the text and its end.

    Args:
      tokenizer: of the model.
      pairs: a prompt and a text each.
      config: of the model.
      longest: tokens of a prompt and of a text.
    """
    prompts, texts = zip(*pairs, strict=True)
    known = {"vocabulary": config.vocab_size, "end": config.eos_token_id}
    read = data.tokenise(tokenizer, prompts, longest[0], **known)
    write = data.tokenise(tokenizer, texts, longest[1], prefix=" ", **known)
    remarks = [*read.remarks("meanings"), *write.remarks("texts")]
    return data.prompted(read.rows, write.rows), remarks


@dataclasses.dataclass(frozen=True)
class EncodeMeanings:
    """Rows of `mr` and `ref` as columns, for `jlora.data.Streaming`.

    Attributes:
      tokenizer: of the model.
      config: of the model.
      longest: tokens of a prompt and of a text.
    """

    tokenizer: Any
    config: Any
    longest: tuple[int, int]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the columns of rows.

        Raises:
          DataError: a row without these columns, or whose `mr` is no meaning.
        """
        pairs = []
        for number, row in enumerate(rows, 1):
            if not isinstance(row.get("mr"), str) or not isinstance(
                row.get("ref"), str
            ):
                raise DataError(
                    f"row {number} has the columns {', '.join(row)}; expected are the "
                    "texts mr and ref."
                )
            pairs.append((_meaning(row["mr"], f"row {number}").prompt, row["ref"]))
        return say_columns(self.tokenizer, pairs, self.config, self.longest)[0]


class DataToText:
    """Meanings and texts in batches of few shapes, and how a model does on them.

    Args:
      settings: what to read, and how.
      loaded: the model, its parameters and its tokenizer.

    Attributes:
      train, valid: batches of `input_ids`, `attention_mask` and `labels`.
      prompts: the test's meanings alone, for generation.
      meanings: the test's meanings.
      remarks: what a user should know of the text, cut texts say.
      loss_fn: the loss, as `jlora.train` takes it.
      count: how many tokens a batch holds.
      say: a `Generator`.
    """

    def __init__(self, settings: DataToTextSettings, loaded: Loaded) -> None:
        s, self.settings, self.remarks = settings, settings, list[str]()
        config = loaded.model.config
        splits, longest = s.read(), (s.max_meaning_length, s.max_text_length)
        self.meanings = splits["test"]
        columns = {}
        for name in [name for name in ("train", "valid") if name in splits]:
            pairs = [(m.prompt, text) for m in splits[name] for text in m.references]
            columns[name], said = say_columns(loaded.tokenizer, pairs, config, longest)
            self.remarks += [f"{name}, {line}" for line in said]
        shapes = data.shapes_for(list(columns.values()), s.buckets)
        pad = config.pad_token_id
        if pad is None:  # as GPT-2's is; labels do not count there
            pad = loaded.tokenizer.eos_token_id
        self.train: data.Batches | data.Streaming
        if s.streaming:
            encode = EncodeMeanings(loaded.tokenizer, config, longest)
            self.train = streamed(s, encode, sum(longest), pad)
        else:
            self.train = self._batches(columns["train"], shapes, pad)
        self.valid = data.Batches(columns["valid"], shapes, s.eval_batch_size, pad)
        rows = data.tokenise(
            loaded.tokenizer, [m.prompt for m in self.meanings], longest[0],
            end=config.eos_token_id,
        ).rows  # fmt: skip
        prompts = {"input_ids": rows}
        size = max(1, s.eval_batch_size // s.beams)
        self.prompts = data.Batches(prompts, data.shapes_for([prompts], 2), size, pad)
        self.loss_fn = causal_loss(loaded.model, s.label_smoothing)
        self.count = count_tokens
        self.say = Generator(loaded.model, loaded.tokenizer, longest[1], {
            "num_beams": s.beams,
            "length_penalty": s.length_penalty,
            "no_repeat_ngram_size": s.no_repeat,
            "no_repeat_ngram_prompt": False,  # or long names could not be said
        })  # fmt: skip

    def _batches(
        self, columns: dict[str, Any], shapes: Sequence[data.Shape], pad: int
    ) -> data.Batches:
        """Return the batches to train on, packed if that is asked for."""
        s = self.settings
        if s.pack:
            most, texts = (
                s.max_meaning_length + s.max_text_length,
                len(columns["labels"]),
            )
            packed = data.pack(columns, most)
            self.remarks.append(packed_remark(f"train: {texts:,} texts", packed))
            columns, shapes = dict(packed.columns), [packed.shape]
        return data.Batches(columns, shapes, s.batch_size, pad, s.seed)

    def answer(self, when: str, params: Tree, folder: train.RunFolder) -> list[str]:
        """Say the test's meanings, a line each, into a file of the run's `outputs`.

        Args:
          when: `"before"` or `"after"` training. A resumed run has the former already.
          params: the parameters.
          folder: of the run.
        """
        keep = folder.resumed and when == "before"
        file = self.file(when, folder)
        return self.say.to_file(params, self.prompts, file, keep=keep, title=when)

    def scores(self, texts: Sequence[str]) -> dict[str, dict[str, float]]:
        """Return the challenge's metrics of texts for the test's meanings."""
        references = [meaning.references for meaning in self.meanings]
        found = metrics.generation(texts, references)
        return {"test": {_SHOWN[name]: value for name, value in found.items()}}

    def file(self, when: str, folder: train.RunFolder) -> Path:
        """Return where what was said `"before"` or `"after"` training lies."""
        return folder.outputs / f"test.{when}.txt"

    def samples(self, *said: Sequence[str]) -> list[list[str]]:
        """Return the best and the worst of the last: chrF, prompt, reference, texts."""
        found = [
            (metrics.chrf([texts[-1]], [m.references]), m.prompt, m.references[0],
             *texts)
            for m, *texts in zip(self.meanings, *said, strict=True)
        ]  # fmt: skip
        found.sort(key=lambda row: -row[0])
        chosen = found[:SAMPLES] + found[max(SAMPLES, len(found) - SAMPLES) :]
        return [[f"{quality:.0f}", *texts] for quality, *texts in chosen]

    def report(
        self,
        folder: train.RunFolder,
        facts: Mapping[str, str],
        before: Sequence[str] | None,
        after: Sequence[str],
        parameters: object,
    ) -> None:
        """Write the plot and the report, and print the gist of it.

        Args:
          folder: of the run.
          facts: lines on training.
          before: what the model said before it, where it was asked.
          after: what it said after.
          parameters: what was trained, a `jlora.Summary` or its text.
        """
        s = self.settings
        said = {"before": before} if before is not None else {}
        said["after"] = after
        references = [meaning.references for meaning in self.meanings]
        scores = {n: metrics.generation(texts, references) for n, texts in said.items()}
        names = [*said, *(["published"] if s.published else [])]
        scores["published"] = dict(s.published)
        rows = [
            [_SHOWN[metric], *(f"{scores[name][metric]:.2f}" for name in names)]
            for metric in scores["after"]
        ]
        chosen = self.samples(*said.values())
        inference = {
            "meanings": len(self.meanings),
            "references": sum(map(len, references)),
            "beams": s.beams,
            "length penalty": s.length_penalty,
            "no repeated n-grams of": s.no_repeat or "any length",
        }
        title = f"{model_name(s.model)}: data to text"
        document = train.Report(title).section("Scores")
        document.table(["metric", *names], rows).text(FIGURES).items(self.remarks)
        document.table(("inference", ""), inference.items())
        training_part(document, folder, facts, title)
        document.section("Texts").text("The best by chrF, and the worst.")
        document.table(("chrF", "meaning", "a reference", *said), chosen)
        closing_part(document, folder, parameters)

        print_facts(facts)
        for quality, prompt, reference, *texts in chosen[:2] + chosen[-2:]:
            print(f"\n  meaning    {prompt}\n  reference  {reference}")
            for name, text in zip(said, texts, strict=True):
                print(f"  {name:<9}  {text}")
            print(f"             chrF {quality}")
        table = train.table([["metric", *names], *rows])
        print(f"\n{table}\n\nThe report is {folder.report}.")


_SHOWN = {
    "bleu": "BLEU",
    "nist": "NIST",
    "meteor": "METEOR",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
}
FIGURES = """\
The metrics are those of the E2E challenge, with its tokenisation: BLEU, METEOR and
ROUGE-L of 100, CIDEr of 10, NIST without a bound. METEOR matches words and stems; with
the synonyms and paraphrases of the original it is about half a point higher on E2E. The
loss is the mean of -log p of a token of the texts; the adapter of the lowest validation
loss is kept."""
