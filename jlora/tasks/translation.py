"""Translation: pairs of sentences in, a model that turns one language into another.

Also the pattern of any task from text to text: `Translation` reads and tokenises a
corpus, measures a model by BLEU, and reports what training changed.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jlora
from jlora import data, train
from jlora.tasks._generation import Generator
from jlora.tasks._losses import seq2seq_loss
from jlora.tasks._options import (
    AdapterOptions,
    Loaded,
    TrainingOptions,
    count_both_sides,
    refuse,
)
from jlora.tasks._reports import closing_part, model_name, print_facts, training_part
from jlora.tasks._streams import packed_remark, stream_refusals, streamed
from jlora.train import option

Tree = Any
Pairs = list[data.Pair]
Said = dict[str, list[str]]  # what a model makes of each test

SAMPLES = 3  # good translations in the report, and as many bad ones


@dataclasses.dataclass(frozen=True, kw_only=True)
class TranslationSettings(AdapterOptions, TrainingOptions):
    """What was asked for; the defaults stand in brackets."""

    # fmt: off
    model: str | None = option(
        None, "folder or hub name of a T5", path=True, group="model and data",
        metavar="DIR|NAME")
    dataset: str | None = option(
        None, "dataset: folder or hub name", path=True, metavar="DIR|NAME")
    config: str | None = option(None, "the dataset's configuration, such as de-en")
    splits: list[str] = option(
        ["train", "validation", "test"], "its splits (train validation test)",
        count=3, metavar=("TRAIN", "VALID", "TEST"))
    train: list[str] | None = option(
        None, "FILE.de FILE.en, or tables: parquet, jsonl, json, csv, tsv; or .gz",
        path=True, metavar="FILE")
    valid: list[str] | None = option(
        None, "the same (a part of --train)", path=True, metavar="FILE")
    test: list[str] | None = option(
        None, "the same (a part of --train)", path=True, metavar="FILE")
    keep: list[str] | None = option(
        None, "the same: a test of what should not be forgotten", path=True,
        metavar="FILE")
    direction: str = option("de-en", "two languages, such as en-cs (de-en)")
    prompt: str | None = option(None, "put before each source (translate X to Y: )")
    train_size: int | None = option(None, "train on this many pairs (all)", least=1)
    valid_size: int = option(500, "pairs for the loss (500)", least=1)
    test_size: int = option(500, "pairs for BLEU, the first (500)", least=1)
    skip_empty: bool = option(False, "leave out pairs with an empty side")
    max_source_length: int = option(128, "tokens; longer texts are cut (128)", least=2)
    max_target_length: int = option(128, "tokens; longer texts are cut (128)", least=2)
    pack: bool = option(
        False, "put several pairs in a row of these lengths; a batch counts rows")
    streaming: bool = option(
        False, "read --train (tables) during training; it need not fit in memory")
    workers: int = option(
        0, "processes that tokenise what is streamed (0: this one)", least=0,
        extends=True)
    beams: int = option(1, "of the tests' translations; 1 is greedy (1)", least=1)
    # fmt: on

    def check(self) -> None:
        """Refuse options that do not go together."""
        data.direction(self.direction)
        own = self.train or self.dataset
        super().check()
        refuse({
            "--dataset brings its own splits; leave --train, --valid and --test out": (
                self.dataset and (self.train or self.valid or self.test)
            ),
            "--config belongs to a --dataset": self.config and not self.dataset,
            "--valid, --test and --keep need --train or --dataset": (
                not own and (self.valid or self.test or self.keep)
            ),
            **stream_refusals(self, "train", "valid", "test"),
            "--model needs data: --train FILE.de FILE.en, or --dataset": not own,
            "a model is needed: --model DIR, or its name on the hub": not self.model,
        })  # fmt: skip

    @property
    def prefix(self) -> str:
        """What the model reads before each source."""
        if self.prompt is not None:
            return self.prompt
        return data.direction(self.direction).prompt

    @property
    def test_names(self) -> tuple[str, str]:
        """What reports call the test and the one of what should not be forgotten."""
        return "test", "keep"

    def read(self) -> tuple[Pairs, Pairs, dict[str, Pairs]]:
        """Read what to train on, to validate with, and to test.

        What is to be streamed is not read: there are no pairs to train on.
        """

        def pairs(files: Sequence[str | Path]) -> Pairs:
            return data.read_pairs(
                files, self.direction, empty="skip" if self.skip_empty else "error"
            )

        if self.dataset is not None:
            training, valid, test = self._splits(self.dataset)
        else:
            training = [] if self.streaming else pairs(self.train or [])
            if self.test:
                test = pairs(self.test)
            else:
                training, test = data.hold_out(training, self.test_size, self.seed)
            if self.valid:
                valid = pairs(self.valid)
            else:
                training, valid = data.hold_out(training, self.valid_size, self.seed)
        first, other = self.test_names
        tests = {first: test} | ({other: pairs(self.keep)} if self.keep else {})
        tests = {name: some[: self.test_size] for name, some in tests.items()}
        training = data.subset(training, self.train_size, self.seed)
        return training, valid[: self.valid_size], tests

    def _splits(self, source: str) -> list[Pairs]:
        limits = (self.train_size, None, None)
        return [
            data.read_dataset_pairs(
                source, self.direction, self.config, split, limit=limit, seed=self.seed
            )
            for split, limit in zip(self.splits, limits, strict=True)
        ]


class Translation:
    """A corpus in batches of few shapes, and how a model does on it.

    Args:
      settings: what to read, and how.
      loaded: the model, its parameters and its tokenizer.

    Attributes:
      train, valid: batches of `input_ids`, `attention_mask` and `labels`. Packed ones
        to train on have `segment_ids` and `decoder_segment_ids` as well.
      tests: batches by the test's name.
      pairs: the tests' sentences.
      remarks: what a user should know of the text, cut sentences say.
      loss_fn: the loss, as `jlora.train` takes it.
      measure: what `scores` counts.
      count: how many tokens a batch holds.
      translate: a `Generator`.
    """

    measure = "BLEU"

    def __init__(self, settings: TranslationSettings, loaded: Loaded) -> None:
        self.settings, self.remarks = settings, list[str]()
        self._tokenizer, config = loaded.tokenizer, loaded.model.config
        self._known = {"vocabulary": config.vocab_size, "end": config.eos_token_id}
        training, valid, self.pairs = settings.read()
        splits = {"train": training} if training else {}
        splits |= {"valid": valid, **self.pairs}
        tokens = {name: self._tokens(name, pairs) for name, pairs in splits.items()}
        stream = self._stream(config.pad_token_id) if settings.streaming else None
        shapes = data.shapes_for(list(tokens.values()), settings.buckets)
        pad, size = config.pad_token_id, settings.eval_batch_size
        batches = {
            name: data.Batches(columns, shapes, size, pad)
            for name, columns in tokens.items()
        }
        self.train = stream or self._batches(tokens["train"], shapes, pad)
        self.valid = batches["valid"]
        self.tests = {name: batches[name] for name in self.pairs}
        self.loss_fn, self.count = seq2seq_loss(loaded.model), count_both_sides
        self.translate = Generator(
            loaded.model, loaded.tokenizer, shapes[-1][1], {"num_beams": settings.beams}
        )

    @property
    def _lengths(self) -> tuple[int, int]:
        return self.settings.max_source_length, self.settings.max_target_length

    def _batches(
        self, columns: dict[str, Any], shapes: Sequence[data.Shape], pad: int
    ) -> data.Batches:
        """Return the batches to train on, packed if that is asked for."""
        s = self.settings
        if s.pack:
            packed, pairs = data.pack(columns, self._lengths), len(columns["labels"])
            self.remarks.append(packed_remark(f"train: {pairs:,} pairs", packed))
            columns, shapes = dict(packed.columns), [packed.shape]
        return data.Batches(columns, shapes, s.batch_size, pad, s.seed)

    def _stream(self, pad: int) -> data.Streaming:
        """Return batches of what is read, tokenised and cut up while training."""
        s = self.settings
        encode = data.EncodePairs(
            self._tokenizer,
            s.direction,
            self._lengths,
            prefix=s.prefix,
            empty="skip" if s.skip_empty else "error",
            **self._known,
        )
        return streamed(s, encode, self._lengths, pad)

    def _tokens(self, name: str, pairs: Pairs) -> dict[str, Any]:
        s = self.settings
        sources, targets = zip(*pairs, strict=True)
        known, tokenizer = self._known, self._tokenizer
        read = data.tokenise(
            tokenizer, sources, s.max_source_length, prefix=s.prefix, **known
        )
        write = data.tokenise(tokenizer, targets, s.max_target_length, **known)
        self.remarks.extend(read.remarks(f"{name}, sources"))
        self.remarks.extend(write.remarks(f"{name}, targets"))
        return {"input_ids": read.rows, "labels": write.rows}

    def answer(self, when: str, params: Tree, folder: train.RunFolder) -> Said:
        """Translate the tests into files of the run's `outputs`.

        Args:
          when: `"before"` or `"after"` training. A resumed run has the former already.
          params: the parameters.
          folder: of the run.
        """
        keep = folder.resumed and when == "before"
        return {
            name: self.translate.to_file(
                params,
                batches,
                folder.outputs / f"{name}.{when}.txt",
                keep=keep,
                title=f"{when}: {name}",
            )
            for name, batches in self.tests.items()
        }

    def scores(self, said: Said) -> dict[str, float]:
        """Return sacrebleu's corpus BLEU of each test, 13a tokenisation, mixed case."""
        import sacrebleu

        def score(lines: list[str], pairs: Pairs) -> float:
            return sacrebleu.corpus_bleu(lines, [[p.target for p in pairs]]).score

        return {name: score(lines, self.pairs[name]) for name, lines in said.items()}

    def samples(self, before: Said, after: Said) -> list[Sequence[str]]:
        """Return the best translations that training changed, and the worst of all.

        Returns:
          Rows of chrF, source, reference, before and after, of the first test.
        """
        import sacrebleu

        first = next(iter(self.pairs))
        rows = [
            (sacrebleu.sentence_chrf(new, [pair.target]).score, *pair, old, new)
            for pair, old, new in zip(
                self.pairs[first], before[first], after[first], strict=True
            )
        ]
        rows.sort(key=lambda row: -row[0])
        changed = [row for row in rows if row[3] != row[4]]
        chosen = dict.fromkeys([*changed[:SAMPLES], *rows[-SAMPLES:]])
        return [(f"{quality:.0f}", *texts) for quality, *texts in chosen]

    def report(
        self,
        folder: train.RunFolder,
        facts: Mapping[str, str],
        before: Said,
        after: Said,
        parameters: jlora.Summary,
    ) -> None:
        """Write the plot and the report, and print the gist of it.

        Args:
          folder: of the run.
          facts: lines on training.
          before: what the model said before it.
          after: what it said after.
          parameters: what was trained.
        """
        s = self.settings
        old, new = self.scores(before), self.scores(after)
        head = ("test", "sentences", "BLEU before", "BLEU after", "change")
        scores = [
            (x, len(after[x]), f"{old[x]:.1f}", f"{new[x]:.1f}",
             f"{new[x] - old[x]:+.1f}")
            for x in new
        ]  # fmt: skip
        remarks = [
            FORGETTING.format(name=name, fall=old[name] - new[name]).replace("\n", " ")
            for name in list(new)[1:]
            if new[name] < old[name] - 1
        ]
        chosen = self.samples(before, after)
        use = USE.format(
            folder=folder.merged,
            prefix=s.prefix,
            source=chosen[0][1].replace('"', "'"),
            longest=self.translate.max_new_tokens,
        )
        title = f"{model_name(s.model)}: {s.direction}"
        document = train.Report(title).section("Before and after").table(head, scores)
        document.text(FIGURES).items([*remarks, *self.remarks])
        training_part(document, folder, facts, title)
        document.section("Translations of held-out sentences")
        document.text(
            f"Of `{next(iter(new))}`: the best that training changed, and the worst."
        )
        document.table(("chrF", "source", "reference", "before", "after"), chosen)
        document.section("Now use it").code(use, "python")
        closing_part(document, folder, parameters)

        print_facts(facts)
        shown = dict.fromkeys(chosen[:2] + chosen[-2:])
        for quality, source, target, one, two in shown:
            print(f"\n  source     {source}\n  reference  {target}")
            print(f"  before     {one}\n  after      {two}   (chrF {quality})")
        print(f"\n{train.table([head, *scores])}")
        for remark in remarks:
            print(textwrap.fill(remark, 88))
        print(f"\nNow use it:\n\n{use}\n\nThe report is {folder.report}.")


FIGURES = """\
BLEU counts the words and phrases that translations share with their references, from 0
to 100 (sacrebleu, whole test); it compares models on one test, and says little alone.
The loss is the mean of -log p of a target token; e to its power is the perplexity. The
adapter of the lowest validation loss is kept; `after` speaks of it."""
FORGETTING = """\
{name} fell by {fall:.1f}: trained on other text alone, a model forgets. A lower --lr,
fewer --steps, a smaller --alpha, or some pairs of that kind among the training text
lessen it; without the adapter the model is as it was."""
USE = """\
from jlora import data, models

model, params = models.load("{folder}")
tokenizer = data.load_tokenizer("{folder}")
batch = tokenizer(["{prefix}{source}"], return_tensors="np")
tokens = models.generate(model, params, **batch, max_new_tokens={longest})
print(tokenizer.batch_decode(tokens, skip_special_tokens=True))"""
