"""Tests for a model, and its numbers: of texts, answers, labels, whole tasks."""

from __future__ import annotations

import dataclasses
import math
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jlora._errors import DataError, JloraWarning, StructureError
from jlora._files import read_json
from jlora._options import UsageError
from jlora.cli._common import progress

if TYPE_CHECKING:
    from jlora.cli._sources import Source
    from jlora.data import Batches
    from jlora.tasks import ClassificationSettings, Loaded

Numbers = dict[str, dict[str, Any]]  # of each test

# The tasks that are judged as training does, and what `--data` is to their settings.
_OWN = {"describe": "test", "chat": "valid", "preference": "valid"}
_OF_LABELS = ("text", "label", "classes", "metrics")


def judge_of(options: Any, source: Source) -> Callable[[Any, Source], Numbers]:
    """Return what judges such a model, by the options of the command and the source."""
    task = source.settings.get("task")
    if task in _OWN:
        return by_task
    config = Path(source.model).expanduser() / "config.json"
    family = read_json(config).get("model_type") if config.is_file() else None
    asked = any(getattr(options, name) is not None for name in _OF_LABELS)
    if task == "classify" or asked or family in ("bert", "roberta"):
        return by_labels
    return by_texts


def by_texts(options: Any, source: Source) -> Numbers:
    """Loss and perplexity of each test, and BLEU where there are answers."""
    from jlora.cli import _sources

    tests = _tests(options, source)  # before anything heavy, for it may be wrong
    loaded = _sources.load(
        source, check=_sources.check_of(options), dtype=options.dtype
    )
    judge = Judge(options, source, loaded)
    return {name: judge(name, texts) for name, texts in tests.items()}


def _settings(kind: Any, source: Source) -> dict[str, Any]:
    """What a run has of a task's settings; an example's own options are left out."""
    known = {field.name for field in dataclasses.fields(kind)}
    return {name: x for name, x in source.settings.items() if name in known}


def _tests(options: Any, source: Source) -> dict[str, list[Any]]:
    """Texts, or pairs of them, by the test's name."""
    from jlora import data, tasks

    if options.data is None:
        if source.settings.get("task") != "translate":
            raise UsageError("what to read is missing: pass --data FILE.")
        tests: Any = tasks.TranslationSettings(
            **_settings(tasks.TranslationSettings, source)
        ).read()[2]
    elif direction := options.direction or source.settings.get("direction"):
        pairs = data.read_pairs(options.data, direction)
        tests = {" ".join(file.name for file in options.data): pairs}
    else:
        tests = {file.name: data.read_lines(file) for file in options.data}
    return {name: texts[: options.limit] for name, texts in tests.items()}


class Judge:
    """A model that is given tests.

    Args:
      options: of the command.
      source: what the model is.
      loaded: the model, and its parameters.
    """

    def __init__(self, options: Any, source: Source, loaded: Any) -> None:
        import jax

        import jlora
        from jlora import data, tasks

        self.options, self.model, self.params = options, loaded.model, loaded.params
        self.prefix = source.prefix if options.prefix is None else options.prefix
        self.tokenizer = data.load_tokenizer(source.model)
        self.longest = options.longest or 512
        self.answers = getattr(self.model, "is_encoder_decoder", False)
        if not self.answers and not hasattr(self.model.config, "generation"):
            raise StructureError(
                f"a {type(self.model).__name__} writes no text, so none can be judged."
                "\nPass a T5, a model that continues texts, or one that classifies."
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
        from jlora import data

        tokens = data.tokenise(
            self.tokenizer, texts, self.longest, prefix=prefix,
            end=self.answers, vocabulary=self.model.config.vocab_size,
        )  # fmt: skip
        _say(tokens.remarks("texts"))
        return tokens.rows

    def _scores(self, pairs: list[Any]) -> dict[str, float]:
        """BLEU and chrF of the model's answers."""
        from jlora import metrics
        from jlora.cli._texts import Writer

        sources, targets = zip(*pairs, strict=True)
        settings = {
            "num_beams": self.options.num_beams or 1,
            "max_new_tokens": min(self.longest, self._room(targets)),
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


# -- whole tasks -----------------------------------------------------------------------


def by_task(options: Any, source: Source) -> Numbers:
    """What the run's own task measures."""
    from jlora import data, tasks
    from jlora.cli import _sources

    name = source.settings["task"]
    kind = tasks.KINDS[name]
    given: dict[str, Any] = {}
    if options.data is not None:
        given[_OWN[name]] = list(map(str, options.data))
    if options.limit is not None:
        given[f"{_OWN[name]}_size"] = options.limit
    if options.num_beams is not None and name == "describe":
        given["beams"] = options.num_beams
    settings = kind.settings(**{**_settings(kind.settings, source), **given})
    if name == "preference":  # its measure compares with the base
        source = _sources.find(
            options.source, base=options.base or settings.model, merged=False
        )
    model, params = _sources.load(
        source, check=_sources.check_of(options), dtype=options.dtype
    )
    loaded = tasks.Loaded(model, params, data.load_tokenizer(source.model))
    task: Any = kind.make(settings, loaded)
    with tempfile.TemporaryDirectory() as folder:
        place: Any = types.SimpleNamespace(outputs=Path(folder), resumed=False)
        scores: Numbers = task.scores(task.answer("after", params, place))
    return scores


# -- labels ----------------------------------------------------------------------------


def by_labels(options: Any, source: Source) -> Numbers:
    """The metrics of a classifier's answers, or of the numbers that it says."""
    from jlora import data, tasks

    settings = _of_labels(options, source)
    tests = None if settings is None else _labelled(options, settings)
    loaded = _classifier(options, source, settings)
    if settings is None or tests is None:  # a model that says itself what it knows
        settings = _of_model(options, loaded)
        tests = _labelled(options, settings)
    labels = getattr(loaded.model.config, "num_labels", None)
    if labels != settings.num_labels:
        raise UsageError(
            f"the model tells {labels} classes apart, and {settings.num_labels} are "
            f"named: {', '.join(settings.class_names) or 'none'}.\nName them all, in "
            "the order of their numbers: --classes NAME NAME."
        )
    longest = options.longest or settings.max_length
    asked = tasks.Classifier(loaded, longest)
    found = {}
    for name, examples in tests.items():
        columns, remarks = asked.columns(examples, name)
        _say(remarks)
        shapes = data.shapes_for([columns], 3)
        pad = loaded.model.config.pad_token_id
        batches = data.Batches(columns, shapes, options.batch_size, pad)
        title = name if sys.stderr.isatty() else None
        logits = asked.logits(loaded.params, batches, title)
        scores = tasks.class_scores(
            settings.metric_names, settings.class_names, logits, examples
        )
        found[name] = {"examples": len(examples), **scores}
    return found


def _of_labels(options: Any, source: Source) -> ClassificationSettings | None:
    """What a run says of labels, or the options; None where the model has to say it."""
    from jlora import tasks

    given = {name: getattr(options, name) for name in _OF_LABELS}
    given = {name: value for name, value in given.items() if value is not None}
    if source.settings.get("task") == "classify":
        run = tasks.ClassificationSettings(
            **_settings(tasks.ClassificationSettings, source)
        )
        if options.data is not None and run.glue:
            known: dict[str, Any] = {"classes": list(run.class_names) or None}
            known |= {"regression": not run.class_names, "text": [*run.text_columns]}
            known["metrics"] = list(run.metric_names)
            run = dataclasses.replace(run, glue=None, **known)
        return dataclasses.replace(run, **given)
    if options.data is None:
        raise UsageError("what to read is missing: pass --data FILE.")
    if options.classes is None:
        return None
    return tasks.ClassificationSettings(**given)


def _of_model(options: Any, loaded: Loaded) -> ClassificationSettings:
    """What a model's configuration says of its labels."""
    from jlora import tasks

    config = loaded.model.config
    given = {name: getattr(options, name) for name in ("text", "label", "metrics")}
    given = {name: value for name, value in given.items() if value is not None}
    if config.num_labels == 1:
        return tasks.ClassificationSettings(regression=True, **given)
    named = config.extra.get("id2label") or {}
    numbers = [str(number) for number in range(config.num_labels)]
    names = [str(named.get(number, number)) for number in numbers]
    if all(name == f"LABEL_{n}" for n, name in enumerate(names)):  # as good as none
        names = numbers
    return tasks.ClassificationSettings(classes=names, **given)


def _labelled(options: Any, settings: ClassificationSettings) -> dict[str, Any]:
    """Examples by the test's name."""
    if options.data is None:
        tests = settings.read()[2]
    else:
        tests = {file.name: settings.examples([file]) for file in options.data}
    limit = options.limit
    return {name: x.take(range(len(x))[:limit]) for name, x in tests.items()}


def _classifier(
    options: Any, source: Source, settings: ClassificationSettings | None
) -> Loaded:
    """The model with its head, which an adapter brings, or its own folder has."""
    from jlora import data, tasks
    from jlora.cli import _sources

    own: dict[str, Any] = {"dtype": options.dtype}
    if source.adapter is not None:
        own["head"] = "classification"
        if settings is not None:
            own["num_labels"] = settings.num_labels
    with warnings.catch_warnings():  # of a head that the adapter brings
        warnings.filterwarnings("ignore", ".*leaves of the chosen", JloraWarning)
        model, params = _sources.load(source, check=_sources.check_of(options), **own)
    if getattr(model.config, "head", None) != "classification":
        raise StructureError(
            f"a {type(model).__name__} sorts no texts into classes.\nPass a run of the "
            "task classify, or a BERT or RoBERTa with a classification head."
        )
    return tasks.Loaded(model, params, data.load_tokenizer(source.model))


def _say(remarks: list[str]) -> None:
    for remark in remarks:
        print(f"jlora: warning: {remark}", file=sys.stderr)
