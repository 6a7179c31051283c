"""Make the tiny BERT and the two tasks that `nlu_glue.py` runs without arguments.

A BERT of 0.2 M parameters is trained from scratch to fill gaps in sentences of a small
grammar, single ones and pairs that say much the same, and to name a word of the text at
its first token. Two tasks in the manner of GLUE are drawn from the same words: the mood
of a review, and whether a sentence is English. Nothing of GLUE is in them. They are for
learning and for tests: a rule made every label, and one may look it up below.

    python examples/make_tiny_bert.py --output DIR             # minutes on two cores
    python examples/make_tiny_bert.py --output DIR --steps 20  # a trial
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from transformers import PreTrainedTokenizerFast

import jlora
from jlora import data, models, train

TRAIN, TEST = 2000, 400  # examples of a task
LONGEST = 32
GAPS = 0.2  # the part of the words that the base learns to fill

# ---------------------------------------------------------------------------- a grammar

GOOD = ["lovely", "warm", "bright", "fresh", "charming", "clever", "kind", "superb",
        "funny", "delicious"]  # fmt: skip
BAD = ["awful", "cold", "gloomy", "stale", "boring", "clumsy", "rude", "dreadful",
       "tedious", "bland"]  # fmt: skip
THINGS = ["soup", "room", "film", "book", "waiter", "garden", "story", "music",
          "bread", "view", "song", "play"]  # fmt: skip
ANIMALS = {"dog": "dogs", "cat": "cats", "horse": "horses", "bird": "birds",
           "goat": "goats", "duck": "ducks", "sheep": "sheep"}  # fmt: skip
PEOPLE = {"farmer": "farmers", "girl": "girls", "boy": "boys", "baker": "bakers",
          "sailor": "sailors", "teacher": "teachers"}  # fmt: skip
NOUNS = {**ANIMALS, **PEOPLE}
# Each verb with its plural, and another one that means about the same.
VERBS = {"chases": "chase", "follows": "follow", "sees": "see", "watches": "watch",
         "feeds": "feed", "finds": "find", "hears": "hear",
         "calls": "call"}  # fmt: skip
SAME = {"chases": "follows", "sees": "watches", "big": "large", "quick": "fast",
        "in the garden": "in the yard", "every day": "daily"}  # fmt: skip
SAME |= {other: word for word, other in SAME.items()}
ADJECTIVES = ["big", "large", "quick", "fast", "old", "young", "brown", "quiet"]
PLACES = ["in the garden", "in the yard", "on the hill", "near the river",
          "behind the barn", "at the market"]  # fmt: skip
TIMES = ["every day", "daily", "at noon", "in the morning", "on monday"]
ENDS = ["", " this time", " again", " in the end", " today"]


class Event(NamedTuple):
    """What a sentence says; `weights` is what each part of it counts for likeness."""

    who: str
    verb: str
    adjective: str
    whom: str
    place: str
    time: str

    def text(self) -> str:
        """Say it."""
        return (f"the {self.who} {self.verb} the {self.adjective} {self.whom} "
                f"{self.place} {self.time}")  # fmt: skip


WEIGHTS = Event(1.5, 1.25, 0.5, 1.0, 0.5, 0.25)  # type: ignore[arg-type]  # 5 in all
Rng = np.random.Generator


def pick(rng: Rng, words: Any) -> str:
    """Draw one of some words."""
    return str(rng.choice([*words]))


def event(rng: Rng) -> Event:
    """Draw what a sentence says."""
    return Event(*(pick(rng, words) for words in
                   (NOUNS, VERBS, ADJECTIVES, NOUNS, PLACES, TIMES)))  # fmt: skip


# ---------------------------------------------------------------------------- the tasks


def sentiment(rng: Rng) -> tuple[str, str]:
    """A review; "not" turns an adjective over, and after "but" comes the verdict."""

    def clause(good: bool) -> str:
        turned = rng.random() < 0.2
        words = GOOD if good != turned else BAD
        very = pick(rng, ["", "", "very ", "really ", "quite "])
        adverb = "not " if turned else very
        return f"the {pick(rng, THINGS)} was {adverb}{pick(rng, words)}"

    good = bool(rng.random() < 0.5)
    forms = [
        lambda: f"{clause(not good)} but {clause(good)}",
        lambda: f"{clause(good)} and {clause(good)}",
        lambda: clause(good),
    ]
    text = forms[rng.integers(3)]()
    return text + pick(rng, ENDS), "positive" if good else "negative"


def acceptability(rng: Rng) -> tuple[str, str]:
    """A sentence; one in two has a fault of agreement, of order or of an article."""
    singular, other = bool(rng.random() < 0.5), pick(rng, NOUNS)
    noun, verb = pick(rng, NOUNS), pick(rng, VERBS)
    words = ["the", pick(rng, ADJECTIVES), noun if singular else NOUNS[noun],
             verb if singular else VERBS[verb], "the", pick(rng, ADJECTIVES),
             other]  # fmt: skip
    good = bool(rng.random() < 0.5)
    if not good:
        fault = rng.integers(4)
        if fault == 0:
            words[3] = VERBS[verb] if singular else verb  # the dogs chases
            if noun == "sheep":
                words[2] = "dog" if singular else "dogs"
        elif fault == 1:
            words[1:3] = words[2:0:-1]  # the dog big
        elif fault == 2:
            words[4:5] = ["the", "the"] if rng.random() < 0.5 else []
        else:
            words[3:5] = words[4:2:-1]  # the dog the chases
    text = " ".join(words) + (f" {pick(rng, PLACES)}" if rng.random() < 0.5 else "")
    return text, "acceptable" if good else "unacceptable"


def similarity(rng: Rng) -> tuple[str, str, str]:
    """Two sentences for the base to read, and from 0 to 5 how much they agree."""
    first, changes = event(rng), rng.random() * 1.2
    other, score = event(rng), 0.0
    parts = []
    for mine, yours, weight in zip(first, other, WEIGHTS, strict=True):
        kept = rng.random() > changes
        part = mine if kept else yours
        if part == mine:
            part = SAME.get(mine, mine) if rng.random() < 0.5 else mine
        score += float(weight) * (part in (mine, SAME.get(mine)))
        parts.append(part)
    return first.text(), Event(*parts).text(), f"{score:.2f}"


TASKS: dict[str, tuple[Callable[[Rng], tuple[str, ...]], str]] = {
    "sentiment": (sentiment, "sentence\tlabel"),
    "acceptability": (acceptability, "sentence\tlabel"),
}


def write_tasks(folder: Path) -> set[str]:
    """Write the tables of all tasks; return the texts of their tests."""
    folder.mkdir(parents=True, exist_ok=True)
    tested: set[str] = set()
    for number, (name, (draw, head)) in enumerate(TASKS.items()):
        rng, rows = np.random.default_rng(number), dict[str, str]()
        while len(rows) < TRAIN + TEST:
            *texts, label = draw(rng)
            rows.setdefault("\t".join(texts), label)
        lines = [f"{text}\t{label}\n" for text, label in rows.items()]
        splits = {"train": lines[:TRAIN], "test": lines[TRAIN:]}
        for split, some in splits.items():
            file = folder / f"{name}.{split}.tsv"
            file.write_text(f"{head}\n{''.join(some)}", encoding="utf-8")
        tested.update([*rows][TRAIN:])
    return tested


# ------------------------------------------------------------------------ the tokenizer


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the grammar's words, and of letters for all others."""
    texts = [*GOOD, *BAD, *THINGS, *NOUNS, *NOUNS.values(), *VERBS, *VERBS.values(),
             *ADJECTIVES, *PLACES, *TIMES, *ENDS]  # fmt: skip
    texts += ["the was not very really quite but and"]
    letters = "abcdefghijklmnopqrstuvwxyz"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = sorted({word for text in texts for word in text.split()} - {*letters})
    pieces = [
        *special,
        *words,
        *letters,
        *(f"##{x}" for x in letters),
        *"0123456789.,!?'-",
    ]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    made = tokenizers.Tokenizer(
        tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]")
    )
    made.normalizer = tokenizers.normalizers.BertNormalizer()
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.decoder = tokenizers.decoders.WordPiece()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


# ----------------------------------------------------------------------------- the base


def sentences(rng: Rng, tested: set[str]) -> Iterator[tuple[str, str]]:
    """Yield text without end: single sentences, and pairs that say much the same."""
    while True:
        kind = rng.integers(3)
        if kind == 0:
            text, second = sentiment(rng)[0], ""
        elif kind == 1:
            (text, label), second = acceptability(rng), ""
            if label == "unacceptable":
                continue
        else:
            text, second, score = similarity(rng)
            if float(score) < 3:
                continue
        if "\t".join([text, second]).strip() not in tested:
            yield text, second


def batches(made: Any, tested: set[str], size: int) -> Iterator[dict[str, Any]]:
    """Yield batches with gaps; the labels are the words that were there."""
    rng = np.random.default_rng(100)
    source, mask = sentences(rng, tested), made.mask_token_id
    while True:
        texts = [next(source) for _ in range(size)]
        found = [made(a, b) if b else made(a) for a, b in texts]
        batch = made.pad(found, padding="max_length", max_length=LONGEST,
                         return_tensors="np")  # fmt: skip
        ids = batch["input_ids"]
        is_word = (ids > mask) & (rng.random(ids.shape) < GAPS)
        labels = np.where(is_word, ids, data.IGNORED)
        # The first token learns to hold the whole text: it names one of its words.
        odds = np.where(ids > mask, rng.random(ids.shape), -1.0)
        labels[:, 0] = ids[np.arange(size), odds.argmax(-1)]
        shown = np.where(is_word & (rng.random(ids.shape) < 0.9), mask, ids)
        yield {**batch, "input_ids": shown, "labels": labels}


def main() -> None:
    """Write the tasks, train the base, write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    tested, made = write_tasks(args.output / "sentences"), tokenizer()
    config = models.BertConfig(
        head="masked_lm",
        vocab_size=len(made),
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=192,
        max_position_embeddings=LONGEST,
    )
    model, ids = models.BertMaskedLM(config=config), jnp.ones((1, 4), jnp.int32)
    params = model.init(jax.random.key(0), ids)["params"]

    def loss_fn(params: Any, batch: Any, key: Any) -> Any:
        read = batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]
        return train.cross_entropy(
            model.apply({"params": params}, *read), batch["labels"]
        )

    warmup = min(50, args.steps // 2)
    rate = train.warmup_schedule(args.rate, args.steps, warmup=warmup)
    tx = optax.adamw(rate, weight_decay=0.01)
    # Every leaf is trained, from scratch: the same step as for adapters.
    state = train.TrainState.create(jax.tree.map(jlora.Full, params), tx)
    step = train.make_train_step(loss_fn, tx, clip_norm=1.0)
    stream = batches(made, tested, args.batch)
    for number in range(1, args.steps + 1):
        state, metrics = step(state, next(stream))
        if number % 100 == 0 or number == args.steps:
            print(f"step {number:5d}  loss {float(metrics['loss']):.3f}", flush=True)

    folder = args.output / "tiny-bert"
    models.save(model, jlora.merge(state.params), folder, overwrite=True)
    made.save_pretrained(folder)


if __name__ == "__main__":
    main()
