"""Which sentence pairs a run trains on, validates with, and is tested by."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import _data
from _data import Pair
from _options import Settings

EMBEDDED_PAIRS = 4_000  # of the generated corpus, unless --train-size says otherwise


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Sentence pairs; of several tests the first is what the run is about."""

    train: list[Pair]
    valid: list[Pair]
    tests: dict[str, list[Pair]]


def load_corpus(s: Settings) -> Corpus:
    """Read the sentence pairs that the settings name."""
    if s.train is None and s.dataset is None:
        corpus = generated_corpus(s)
    else:
        corpus = read_corpus(s)
    tests = {name: pairs[: s.test_size] for name, pairs in corpus.tests.items()}
    train = _data.subset(corpus.train, s.train_size, s.seed)
    return Corpus(train, corpus.valid[: s.valid_size], tests)


def read_corpus(s: Settings) -> Corpus:
    """Read files, or a dataset from the hub or a folder."""
    read = partial(_read, direction=_data.direction(s.direction), s=s)
    if s.dataset is not None:
        limits = (s.train_size, None, None)
        train, valid, test = (
            read(_data.Rows(s.dataset, s.config, split, limit=limit, seed=s.seed))
            for split, limit in zip(s.splits, limits, strict=True)
        )
        return Corpus(train, valid, {"test": test})
    train = read(_data.source_of(s.train or []))
    if s.test is not None:
        test = read(_data.source_of(s.test))
    else:
        train, test = _data.hold_out(train, s.test_size, s.seed)
    if s.valid is not None:
        valid = read(_data.source_of(s.valid))
    else:
        train, valid = _data.hold_out(train, s.valid_size, s.seed)
    return Corpus(train, valid, {"test": test})


def _read(source: _data.Source, direction: _data.Direction, s: Settings) -> list[Pair]:
    # The hub's corpora hold a few empty lines, which nobody can mend.
    skip_empty = s.skip_empty or s.dataset is not None
    return source.read(direction, skip_empty=skip_empty)


def generated_corpus(s: Settings) -> Corpus:
    """Generate the domain `travel` to learn, and a test of `home` to remember."""
    from _corpus import pairs

    way = _data.direction(s.direction)

    def draw(domain: Any, split: Any, n: int) -> list[Pair]:
        drawn = pairs(domain, split, n, s.seed)
        return [Pair(getattr(p, way.source), getattr(p, way.target)) for p in drawn]

    tests = {name: draw(name, "test", s.test_size) for name in ("travel", "home")}
    train = draw("travel", "train", s.train_size or EMBEDDED_PAIRS)
    return Corpus(train, draw("travel", "validation", s.valid_size), tests)
