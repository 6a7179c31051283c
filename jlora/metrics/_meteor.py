"""METEOR of exact and stemmed matches: words aligned with the references'."""

from __future__ import annotations

import functools
import heapq
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jlora.metrics._pairs import texts
from jlora.metrics._words import treebank_words

# English, tuned on the rankings of WMT: table 4 of the paper.
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_STEM = 0.6  # what a match of stems counts; an exact one counts 1
_BEAM = 40

# "Words of a relative frequency above 10^-3", as the paper has it.
_FREQUENT = """
a about after all also an and are as at be been but by can could for from had has have
he her his i if in into is it its more new no not of on one or other out over said she
so some than that the their them then there they this to two up was we were what when
which who will with would years you your ' 's 't s -lrb- -rrb-
"""
_FUNCTION_WORDS = frozenset(_FREQUENT.split())


def meteor(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]]
) -> float:
    """Return METEOR 1.5 for English of exact and stemmed matches, 0 to 100.

    Words of a prediction are aligned with equal words, or words of equal stems, of each
    reference; the best reference counts. The whole METEOR also matches synonyms of
    WordNet and a table of paraphrases, which are tens of megabytes and come with its
    Java program. Its score is therefore a little higher, on the development set of the
    E2E challenge by half a point.

    Args:
      predictions: a text for each example.
      references: a text for each example, or several, not equally many for all.

    Raises:
      DataError: the two differ in length, or an example has no reference.
      ImportError: `snowballstemmer` is missing, which `jlora[metrics]` brings.

    Source: Denkowski and Lavie 2014, aclanthology.org/W14-3348.

    >>> round(meteor(["the cats sat on a mat"], [["the cat sat on the mat"]]), 1)
    40.9
    """
    import snowballstemmer

    stem = functools.cache(snowballstemmer.stemmer("english").stemWord)
    said, true = texts(predictions, references)
    totals = _Counts()
    for text, refs in zip(said, true, strict=True):
        mine = _words(text, stem)
        totals += max((_compare(mine, _words(r, stem)) for r in refs), key=_score)
    return 100.0 * _score(totals)


class _Word(NamedTuple):
    word: str
    stem: str

    @property
    def weight(self) -> float:
        return 1 - _DELTA if self.word in _FUNCTION_WORDS else _DELTA


def _words(text: str, stem: Any) -> list[_Word]:
    """METEOR takes compounds and contractions apart."""
    apart = re.sub(r"(?<=\w)-(?=\w)", " ", " ".join(treebank_words(text)))
    apart = re.sub(r"(?<=\w)'", " '", re.sub(r"(?<!\w)'", " ' ", apart))
    return [_Word(word, stem(word)) for word in apart.split()]


class _Counts(NamedTuple):
    """What the score is made of; of a whole corpus they are sums."""

    said: float = 0.0  # words of the prediction, by weight
    true: float = 0.0  # words of the reference, by weight
    found: float = 0.0  # the prediction's matched words, by weight
    covered: float = 0.0  # the reference's matched words, by weight
    matches: int = 0
    chunks: int = 0  # runs of matches in the same order without a gap

    def __add__(self, other: Any) -> _Counts:
        return _Counts(*(a + b for a, b in zip(self, other, strict=True)))


def _compare(said: list[_Word], true: list[_Word]) -> _Counts:
    path = _align(said, true)
    factors = [(i, j, 1.0 if said[i] == true[j] else _STEM) for i, j in path.pairs]
    whole = path.chunks == 1 and len(said) == len(true) == len(factors)
    return _Counts(
        sum(word.weight for word in said),
        sum(word.weight for word in true),
        sum(factor * said[i].weight for i, _, factor in factors),
        sum(factor * true[j].weight for _, j, factor in factors),
        len(factors),
        0 if whole else path.chunks,
    )


def _score(counts: _Counts) -> float:
    if not counts.matches:
        return 0.0
    precision, recall = counts.found / counts.said, counts.covered / counts.true
    mean = 1 / ((1 - _ALPHA) / precision + _ALPHA / recall)
    return mean * (1 - _GAMMA * (counts.chunks / counts.matches) ** _BETA)


class _Path(NamedTuple):
    """An alignment of the reference's first words; the smaller tuple is the better.

    The more is matched the better; then few chunks, then small distances.
    """

    missed: float = 0.0  # less by what each match gains
    chunks: int = 0
    distance: int = 0
    expected: int = -1  # the prediction's word that would go on with the chunk
    used: int = 0  # words of the prediction, a bit each
    pairs: tuple[tuple[int, int], ...] = ()  # (of the prediction, of the reference)

    def match(self, i: int, j: int, gain: float) -> _Path:
        return _Path(
            self.missed - gain,
            self.chunks + (i != self.expected),
            self.distance + abs(i - j),
            i + 1,
            self.used | 1 << i,
            (*self.pairs, (i, j)),
        )


def _align(said: list[_Word], true: list[_Word]) -> _Path:
    """Search the best one-to-one alignment, from left to right with a beam."""
    alike = [[i for i, w in enumerate(said) if w.stem == word.stem] for word in true]
    wanted = [sum(i in choices for choices in alike) for i in range(len(said))]
    paths = [_Path()]
    for j, choices in enumerate(alike):
        # What fits nothing else is matched; otherwise leaving it out is a choice, too.
        sure = len(choices) == 1 and wanted[choices[0]] == 1
        gains = [(i, 1.0 if said[i] == true[j] else 0.5) for i in choices]
        ways = _ways(paths, j, gains, sure)
        paths = heapq.nsmallest(_BEAM, ways)
    return paths[0]


def _ways(
    paths: list[_Path], j: int, gains: list[tuple[int, float]], sure: bool
) -> Iterable[_Path]:
    for path in paths:
        if not sure:
            yield path._replace(expected=-1)
        for i, gain in gains:
            if not path.used >> i & 1:
                yield path.match(i, j, gain)
