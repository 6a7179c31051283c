"""BLEU, chrF and NIST: n-grams that predictions share with their references."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

from jlora.metrics._pairs import texts
from jlora.metrics._words import mteval_words

Ngram = tuple[str, ...]


def bleu(
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    *,
    lowercase: bool = False,
    tokenize: str = "13a",
) -> float:
    """Return the corpus BLEU, 0 to 100, by sacrebleu.

    Args:
      predictions: a text for each example.
      references: a text for each example, or several, not equally many for all.
      lowercase: take upper and lower case as one, as the E2E challenge does.
      tokenize: sacrebleu's name of a tokenizer; "13a" is the one of WMT.

    Raises:
      DataError: the two differ in length, or an example has no reference.

    Source: Papineni et al. 2002, ACL; Post 2018, arXiv:1804.08771.

    >>> round(bleu(["the cat sat on a mat"], [["the cat sat on the mat"]]), 1)
    53.7
    """
    import sacrebleu

    said, true = texts(predictions, references)
    streams = _streams(true)
    metric = sacrebleu.BLEU(lowercase=lowercase, tokenize=tokenize)
    return float(metric.corpus_score(said, streams).score)


def chrf(
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    *,
    word_order: int = 0,
) -> float:
    """Return the corpus chrF, 0 to 100, by sacrebleu; chrF++ with `word_order=2`.

    Args:
      predictions: a text for each example.
      references: a text for each example, or several, not equally many for all.
      word_order: n-grams of so many words count beside those of six characters.

    Raises:
      DataError: the two differ in length, or an example has no reference.

    Source: Popović 2015, WMT, aclanthology.org/W15-3049.

    >>> round(chrf(["the cats"], ["the cat"]), 1)
    93.3
    """
    import sacrebleu

    said, true = texts(predictions, references)
    metric = sacrebleu.CHRF(word_order=word_order)
    return float(metric.corpus_score(said, _streams(true)).score)


def _streams(references: Sequence[Sequence[str]]) -> list[list[Any]]:
    """The first reference of each example, the second of each, None where none is."""
    return [list(stream) for stream in zip_longest(*references)]


_LONGEST = 5  # words of an n-gram of NIST
_BETA = math.log(0.5) / math.log(1.5) ** 2  # two thirds of the length halve the score


def nist(
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    *,
    lowercase: bool = True,
) -> float:
    """Return the corpus NIST score of n-grams up to five words; it has no upper bound.

    A shared n-gram counts by its information: how much rarer it is in the references
    than its beginning. The words are those of mteval-v13a.

    Args:
      predictions: a text for each example.
      references: a text for each example, or several, not equally many for all.
      lowercase: take upper and lower case as one.

    Returns:
      The score, equal to that of the E2E challenge's `measure_scores.py -p`. The Perl
      script of mteval counts empty references where examples have unequally many, and
      its score differs there.

    Raises:
      DataError: the two differ in length, or an example has no reference.

    Source: Doddington 2002, HLT, "Automatic evaluation of machine translation quality
    using n-gram co-occurrence statistics".

    >>> round(nist(["the cat sat on a mat"], [["the cat sat on the mat"]]), 2)
    2.19
    """
    said, true = texts(predictions, references)
    case = str.lower if lowercase else str
    words = [mteval_words(case(text)) for text in said]
    several = [[mteval_words(case(text)) for text in each] for each in true]
    seen = Counter(
        gram for each in several for ref in each for gram in grams(ref, _LONGEST)
    )
    seen[()] = sum(len(ref) for each in several for ref in each)
    score = 0.0
    for n in range(1, _LONGEST + 1):
        gained, total = 0.0, 0
        for mine, refs in zip(words, several, strict=True):
            for gram, hits in _shared(mine, refs, n).items():
                gained += hits * math.log2(seen[gram[:-1]] / seen[gram])
            total += max(0, len(mine) - n + 1)
        score += gained / total if total else 0.0
    written = sum(map(len, words))
    wanted = sum(sum(map(len, refs)) / len(refs) for refs in several)
    return score * _brevity(written / wanted)


def _brevity(ratio: float) -> float:
    """NIST's penalty of predictions that are `ratio` as long as their references."""
    if ratio >= 1:
        return 1.0
    return math.exp(_BETA * math.log(ratio) ** 2) if ratio > 0 else 0.0


def grams(words: Sequence[str], longest: int) -> Iterator[Ngram]:
    """Yield the n-grams of one word up to `longest` words."""
    for n in range(1, longest + 1):
        yield from _of_length(words, n)


def _of_length(words: Sequence[str], n: int) -> Iterator[Ngram]:
    return zip(*(words[i:] for i in range(n)), strict=False)


def _shared(
    words: Sequence[str], references: list[list[str]], n: int
) -> Counter[Ngram]:
    """N-grams of the prediction, each at most as often as one reference has it."""
    most: Counter[Ngram] = Counter()
    for reference in references:
        most |= Counter(_of_length(reference, n))
    return Counter(_of_length(words, n)) & most
