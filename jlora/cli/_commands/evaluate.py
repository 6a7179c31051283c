"""`jlora evaluate`: how well a model knows texts, and how well it answers."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jlora._errors import DataError, StructureError
from jlora._options import UsageError, option
from jlora._programs import ProgramOptions
from jlora.cli._common import DTYPES, progress

if TYPE_CHECKING:
    from jlora.cli._sources import Source
    from jlora.data import Batches

Pairs = Mapping[str, list[Any]]  # of a test its sentences beside their answers


# fmt: off
@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ProgramOptions):
    """What `jlora evaluate` takes."""

    source: str = option(
        about="a run, a model or an adapter: a folder, or a model's name on the hub",
        metavar="SOURCE", positional=True)
    data: list[Path] | None = option(
        None, "of a model with an encoder FILE.de FILE.en, or tables of pairs; of one "
        "that continues texts, files with a text a line (the tests of a run)",
        metavar="FILE")
    direction: str | None = option(
        None, "of pairs, such as en-cs (the run's)", metavar="A-B")
    prefix: str | None = option(
        None, "before each text (what a run's model was trained with)", metavar="TEXT")
    adapter: Path | None = option(
        None, "an adapter to put on the model SOURCE", metavar="DIR")
    base: str | None = option(
        None, "the model that the adapter SOURCE belongs to (what it says)",
        metavar="DIR|NAME")
    dtype: str | None = option(
        None, "of the model's weights (its own)", choices=DTYPES)
    longest: int = option(512, "tokens of a text; longer ones are cut (512)", least=2)
    limit: int | None = option(None, "the first so many texts of each file", least=1)
    batch_size: int = option(16, "texts at once (16)", least=1)
    num_beams: int = option(1, "of the answers; 1 is greedy (1)", least=1)
    loss_only: bool = option(False, "without answers, which take longest")
    json: bool = option(False, "print the numbers for programs")
# fmt: on


def run(options: Options) -> None:
    """Print loss and perplexity of each test, and BLEU where there are answers."""
    from jlora.cli import _sources

    options.keep_programs()
    source = _sources.find(options.source, base=options.base, adapter=options.adapter)
    tests = _tests(options, source)  # before anything heavy, for it may be wrong
    check = "values" if options.dtype is None else "shapes"
    loaded = _sources.load(source, check=check, dtype=options.dtype)
    judge = _Judge(options, source, loaded)
    found = {name: judge(name, texts) for name, texts in tests.items()}
    if options.json:
        print(json.dumps({"model": source.model, "tests": found}, indent=2))
        return
    from jlora._text import table

    columns = list(next(iter(found.values())))
    rows = [(name, *map(_cell, row.values())) for name, row in found.items()]
    print(table([("test", *columns), *rows]))


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _tests(options: Options, source: Source) -> dict[str, list[Any]]:
    """Texts, or pairs of them, by the test's name."""
    from jlora import data

    if options.data is None:
        tests = _of_run(source)
    elif direction := options.direction or source.settings.get("direction"):
        pairs = data.read_pairs(options.data, direction)
        tests = {" ".join(file.name for file in options.data): pairs}
    else:
        tests = {file.name: data.read_lines(file) for file in options.data}
    return {name: texts[: options.limit] for name, texts in tests.items()}


def _of_run(source: Source) -> dict[str, list[Any]]:
    """What a run was tested on."""
    from jlora import tasks

    settings = dict(source.settings)
    kind = tasks.KINDS.get(settings.pop("task", ""))
    if kind is None or not hasattr(kind.settings, "read"):
        raise UsageError("what to read is missing: pass --data FILE.")
    tests: dict[str, list[Any]] = kind.settings(**settings).read()[2]
    return tests


class _Judge:
    """A model that is given tests.

    Args:
      options: of the command.
      source: what the model is.
      loaded: the model, and its parameters.
    """

    def __init__(self, options: Options, source: Source, loaded: Any) -> None:
        import jax

        import jlora
        from jlora import data, tasks

        self.options, self.model, self.params = options, loaded.model, loaded.params
        self.prefix = source.prefix if options.prefix is None else options.prefix
        self.tokenizer = data.load_tokenizer(source.model)
        self.answers = getattr(self.model, "is_encoder_decoder", False)
        if not self.answers and not hasattr(self.model.config, "generation"):
            raise StructureError(
                f"a {type(self.model).__name__} writes no text, so none can be judged."
                "\nPass a T5, or a model that continues texts."
            )
        make = tasks.seq2seq_loss if self.answers else tasks.causal_loss
        loss = jlora.lora(make(self.model))
        self._loss = jax.jit(lambda params, batch: loss(params, batch, None))

    def __call__(self, name: str, texts: list[Any]) -> dict[str, Any]:
        """Return a test's numbers."""
        if not texts:
            raise DataError(f"{name} holds no text.")
        if self.answers == isinstance(texts[0], str):
            raise UsageError(
                "a model with an encoder is judged by pairs: add --direction A-B."
                if self.answers
                else "this model continues texts: leave --direction out."
            )
        batches = self._batches(texts)
        total = count = 0.0
        for batch in progress(batches, len(batches), "batch", show=True):
            loss, number = self._loss(self.params, batch)
            total, count = total + float(loss), count + float(number)
        if not count:
            raise DataError(
                f"{name} holds no token to predict: texts are of one token."
            )
        mean = total / count
        found = {"texts": len(texts), "tokens": int(count), "loss": mean}
        found["perplexity"] = math.exp(mean) if mean < 700 else math.inf
        if self.answers and not self.options.loss_only:
            found |= self._scores(texts)
        return found

    def _batches(self, texts: list[Any]) -> Batches:
        from jlora import data

        if self.answers:
            sources, targets = zip(*texts, strict=True)
            columns = {
                "input_ids": self._rows(sources, self.prefix),
                "labels": self._rows(targets, ""),
            }
        else:
            rows = self._rows(texts, self.prefix)
            columns = {"input_ids": rows, "labels": rows}
        shapes = data.shapes_for([columns], 3)
        pad = self.model.config.pad_token_id or 0
        return data.Batches(columns, shapes, self.options.batch_size, pad)

    def _rows(self, texts: Any, prefix: str) -> list[Any]:
        import sys

        from jlora import data

        tokens = data.tokenise(
            self.tokenizer, texts, self.options.longest, prefix=prefix,
            end=self.answers, vocabulary=self.model.config.vocab_size,
        )  # fmt: skip
        for remark in tokens.remarks("texts"):
            print(f"jlora: warning: {remark}", file=sys.stderr)
        return tokens.rows

    def _scores(self, pairs: list[Any]) -> dict[str, float]:
        """BLEU and chrF of the model's answers."""
        from jlora import metrics
        from jlora.cli._texts import Writer

        sources, targets = zip(*pairs, strict=True)
        settings = {
            "num_beams": self.options.num_beams,
            "max_new_tokens": min(self.options.longest, self._room(targets)),
        }
        write = Writer(self.model, self.params, self.tokenizer, settings)
        prompts = [self.prefix + text for text in sources]
        batches = write.batches(prompts, self.options.batch_size)
        said = list(progress(_first(batches), len(prompts), "answer", show=True))
        return {
            "BLEU": metrics.bleu(said, list(targets)),
            "chrF": metrics.chrf(said, list(targets)),
        }

    def _room(self, targets: Any) -> int:
        """As many tokens as the longest answer has, and some: it is cut beyond."""
        longest = max(len(self.tokenizer(text)["input_ids"]) for text in targets)
        return longest + longest // 4 + 1


def _first(batches: Iterator[list[list[str]]]) -> Iterator[str]:
    for batch in batches:
        yield from (" ".join(answers[0].split()) for answers in batch)
