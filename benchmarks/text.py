"""Tokens of real text a second: jlora's length buckets against PEFT's padding.

A pass trains on every sentence pair once, in batches of the same number of sentences.
jlora's hold sentences of about the same length, in as many shapes as there are buckets,
each compiled once: `jlora.data.Batches`.
PEFT's are padded to their longest, as `transformers` collates them, and drawn at random
as it does by default, or grouped by length as its `Trainer` does on request.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import _results
from benchmarks._cases import case
from benchmarks._choice import contenders
from benchmarks._race import Entry, call, race

LONGEST = 128
VOCABULARY = 8000
PAD, END = 0, 1
COLUMNS = (
    "case", "contender", "tokens_per_s", "to_peft", "to_grouped", "median_ms", "tokens",
    "steps", "padding", "compilations", "first_pass_s", "error",
)  # fmt: skip
GROUPED = "PEFT, grouped by length"


class Used:
    """Counts what passes over sentences take, padding included."""

    def __init__(self, sentences: Sentences) -> None:
        self.real, self.tokens, self.steps, self.passes = sentences.tokens, 0, 0, 0

    def add(self, tokens: int) -> None:
        """Count a batch."""
        self.tokens, self.steps = self.tokens + tokens, self.steps + 1

    def end(self) -> None:
        """Count a pass."""
        self.passes += 1

    @property
    def facts(self) -> dict[str, Any]:
        """Steps a pass, and the part of all tokens that is padding."""
        return {
            "steps": self.steps // self.passes,
            "padding": 1 - self.real * self.passes / self.tokens,
        }


class Sentences(NamedTuple):
    """Token ids of sources and targets."""

    sources: list[np.ndarray]
    targets: list[np.ndarray]

    @property
    def tokens(self) -> int:
        """Tokens without padding, both sides."""
        return sum(len(x) for side in self for x in side)


def main(options: Any) -> list[_results.Row]:
    """Measure, print a table, save."""
    if options.data is None:
        raise SystemExit("text: pass --data DIR, with train.de[.gz] and train.en[.gz]")
    shape = "t5-base-32x512" if options.gpu else "t5-small-8x64"
    one = case(shape, quick=options.quick)
    # The tokens are real, and so is the vocabulary.
    config = {**one.config, "vocab_size": 32128}
    one = dataclasses.replace(one, config=config)
    count = 8 if options.quick else options.sentences
    batch = 4 if options.quick else options.batch
    with tempfile.TemporaryDirectory() as folder:
        file = str(pathlib.Path(folder, "sentences.npz"))
        arguments = {"case": dataclasses.asdict(one), "file": file, "size": batch}
        every = _entries(arguments, options.buckets)
        names = contenders(options, [e.name for e in every])
        arguments = {"data": options.data, "count": count, "file": file}
        tokens, about = call("benchmarks.text:prepare", arguments, options)
        result = race([e for e in every if e.name in names], options)
    rows = []
    for name in names:
        median = result.median(name)
        rows.append(
            {
                "case": f"{one.model}, {count} pairs, batch {batch}",
                "contender": name,
                "tokens_per_s": None if median is None else 1e3 * tokens / median,
                # Times are the inverse of rates.
                "to_peft": result.ratio("PEFT", name),
                "to_grouped": result.ratio(GROUPED, name),
                "median_ms": median,
                "tokens": tokens,
                **result.facts.get(name, {}),
                "error": result.errors.get(name),
            }
        )
    print(_results.table(rows, COLUMNS))
    _results.save(options, about | result.about, rows)
    return rows


def _entries(arguments: Mapping[str, Any], buckets: int) -> list[Entry]:
    padded = "benchmarks._peers_torch:Padded"
    return [
        Entry("jlora", "benchmarks.text:Buckets", {**arguments, "buckets": buckets}),
        *(
            Entry(name, padded, {**arguments, "grouped": name == GROUPED}, "PEFT")
            for name in ("PEFT", GROUPED)
        ),
    ]


def prepare(data: str, count: int, file: str) -> int:
    """Tokenise `count` pairs into `file`; return their tokens. Runs in a worker.

    The tokenizer is byte-level BPE, trained here on all of the text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from jlora import data as text

    folder = pathlib.Path(data)
    paths = [_first(folder, f"train.{code}") for code in ("de", "en")]
    direction = text.direction("de-en")
    pairs = text.read_pairs(paths, direction, empty="skip")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "</s>"], show_progress=False
    )
    lines = [direction.prompt, *(side for pair in pairs for side in pair)]
    tokenizer.train_from_iterator(lines, trainer)
    chosen = np.random.default_rng(0).choice(len(pairs), count, replace=False)

    def ids(text: str) -> np.ndarray:
        return np.array([*tokenizer.encode(text).ids[: LONGEST - 1], END], np.int32)

    sentences = Sentences(
        [ids(direction.prompt + pairs[i].source) for i in chosen],
        [ids(pairs[i].target) for i in chosen],
    )
    np.savez(
        file,
        **{
            f"{name}_{part}": array
            for name, side in sentences._asdict().items()
            for part, array in (
                ("ids", np.concatenate(side)),
                ("lengths", np.array([len(x) for x in side])),
            )
        },
    )
    return sentences.tokens


def read(file: str) -> Sentences:
    """Return what `prepare` wrote."""
    arrays = np.load(file)
    sides = (
        np.split(arrays[f"{n}_ids"], np.cumsum(arrays[f"{n}_lengths"])[:-1])
        for n in Sentences._fields
    )
    return Sentences(*sides)


def padded(rows: Sequence[np.ndarray], fill: int) -> np.ndarray:
    """Return rows as one array, filled up to the longest."""
    out = np.full((len(rows), max(map(len, rows))), fill, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


class Buckets:
    """Passes of jlora's training step over batches of few shapes."""

    def __init__(
        self, case: Mapping[str, Any], file: str, size: int, buckets: int
    ) -> None:
        import time

        import jax

        import jlora.train
        from benchmarks._contenders import adamw
        from benchmarks._workload import workload
        from jlora.data import Batches, shapes_for

        sentences, work = read(file), workload(case)
        columns = {"input_ids": sentences.sources, "labels": sentences.targets}
        shapes = shapes_for([columns], buckets)
        self.batches = Batches(columns, shapes, size, PAD, seed=0)
        self.train = jlora.train.make_train_step(
            lambda params, batch, key: work.totals(params, batch), adamw()
        )
        self.state = jlora.train.TrainState.create(
            work.lorafied(), adamw(), jax.random.key(0)
        )
        self.epoch, self.used = 0, Used(sentences)
        start = time.perf_counter()
        self.step()
        self.first = time.perf_counter() - start

    @property
    def facts(self) -> dict[str, Any]:
        """What was found out by now."""
        compiled = {"compilations": self.train.cache_size()}
        return {"first_pass_s": self.first, **self.used.facts, **compiled}

    def step(self) -> None:
        """Train on every sentence once."""
        import jax

        for batch in self.batches.plan(self.epoch):
            arrays = self.batches.arrays(batch)
            self.used.add(arrays["input_ids"].size + arrays["labels"].size)
            self.state, metrics = self.train(self.state, arrays)
        jax.block_until_ready(metrics)
        self.epoch += 1
        self.used.end()


def _first(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Return the file of that name, gzipped or not."""
    found = [p for p in (folder / name, folder / f"{name}.gz") if p.is_file()]
    if not found:
        raise FileNotFoundError(f"{folder} holds neither {name} nor {name}.gz")
    return found[0]
