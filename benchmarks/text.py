"""Tokens of real text a second: jlora's length buckets against PEFT's padding.

A pass trains on every sentence pair once, in batches of the same number of sentences.
jlora's hold sentences of about the same length, in as many shapes as there are buckets,
each compiled once: `jlora.data.Batches`. PEFT's are padded to their longest, as
`transformers` collates them, and drawn at random as it does by default, or grouped by
length as its `Trainer` does on request.
"""

from __future__ import annotations

import itertools
import pathlib
import random
import time
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.cases import Case
from benchmarks.race import Row, Rows, chosen, race

LONGEST = 128
VOCABULARY = 8000
PROMPT = "translate German to English: "
GROUPED = "PEFT, grouped by length"
BUILD = "text:bucketed"
CONTENDERS: dict[str, tuple[str, str, Row]] = {
    "jlora": ("jax", BUILD, {}),
    "PEFT": ("PEFT", "torch_steps:text", {"grouped": False}),
    GROUPED: ("PEFT", "torch_steps:text", {"grouped": True}),
}
COLUMNS = (
    "case", "contender", "tokens_per_s", "to_peft", "to_grouped", "median_ms", "tokens",
    "steps", "padding", "compilations", "first_pass_s", "error",
)  # fmt: skip
Sides = tuple[list[list[int]], list[list[int]]]  # token ids of sources and targets


def run(options: Any) -> Iterator[Rows]:
    """Yield the rows."""
    shape = "t5-base-32x512" if options.gpu else "t5-small-8x64"
    # The tokens are real, and so is the vocabulary.
    one = Case(shape, vocab_size=32128, quick=options.quick)
    count, size = (8, 4) if options.quick else (options.sentences, options.batch)
    sides = tokenised(pathlib.Path(options.data), count)
    tokens = sum(len(ids) for side in sides for ids in side)
    names = options.contenders or [*CONTENDERS]
    table = {**CONTENDERS, "jlora": ("jax", BUILD, {"buckets": options.buckets})}
    arguments = {"case": one.json, "sides": sides, "size": size}
    result = race(chosen(table, names, **arguments), options)
    title = f"{shape.rpartition('-')[0]}, {count} pairs, batch {size}"
    rows = result.rows({"case": title, "tokens": tokens}, names)
    for row in rows:
        name, padded = row["contender"], row.pop("padded_tokens", None)
        row["padding"] = padded and 1 - tokens / padded
        row["tokens_per_s"] = result.rate(name, tokens)
        # Of rates, which are the inverse of times.
        row["to_peft"] = result.ratio("PEFT", name)
        row["to_grouped"] = result.ratio(GROUPED, name)
    yield rows, result.about


def tokenised(folder: pathlib.Path, count: int) -> Sides:
    """Tokenise `count` pairs of `train.de` and `train.en`, drawn from all of them.

    The tokenizer is byte-level BPE, trained here on all of the text.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    from jlora import data

    names = [folder / f"train.{code}" for code in ("de", "en")]  # perhaps gzipped
    files = [next(folder.glob(f"{name.name}*"), name) for name in names]
    pairs = data.read_pairs(files, "de-en", empty="skip")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "</s>"], show_progress=False
    )
    sentences = (side for pair in pairs for side in pair)
    tokenizer.train_from_iterator([PROMPT, *sentences], trainer)
    chosen = random.Random(0).sample(pairs, count)

    def ids(text: str) -> list[int]:
        return [*tokenizer.encode(text).ids[: LONGEST - 1], 1]  # </s>

    return [ids(PROMPT + de) for de, _ in chosen], [ids(en) for _, en in chosen]


def bucketed(case: Mapping[str, Any], sides: Any, size: int, buckets: int) -> Any:
    """Passes of jlora's step over batches of few shapes; runs in a worker."""
    import jax
    import numpy as np

    from benchmarks.jax_steps import transformed
    from benchmarks.work import workload
    from jlora.data import Batches, shapes_for

    ids, labels = ([np.array(row, np.int32) for row in side] for side in sides)
    columns = {"input_ids": ids, "labels": labels}
    batches = Batches(columns, shapes_for([columns], buckets), size, 0, seed=0)
    work, stream = workload(Case(**case)), batches.stream()
    train, state = transformed(work, work.params)
    states, facts = [state], {"steps": len(batches)}

    def step() -> None:
        facts["padded_tokens"] = 0
        for arrays in itertools.islice(stream, len(batches)):
            facts["padded_tokens"] += arrays["input_ids"].size + arrays["labels"].size
            states[0], metrics = train(states[0], arrays)
        jax.block_until_ready(metrics)
        facts["compilations"] = train.cache_size()

    start = time.perf_counter()
    step()
    facts["first_pass_s"] = time.perf_counter() - start
    return step, facts
