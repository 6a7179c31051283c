"""ROUGE-L and CIDEr as captions of images are scored with them, and E2E's texts too."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from jlora._errors import DataError
from jlora.metrics._ngrams import Ngram, grams
from jlora.metrics._pairs import texts
from jlora.metrics._words import treebank_words

_RECALL_WEIGHT = 1.2  # beta of ROUGE-L
_LENGTHS = 6.0  # sigma of CIDEr's penalty, in words
_LONGEST = 4  # words of an n-gram of CIDEr


def rouge_l(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]]
) -> float:
    """Return the mean ROUGE-L, 0 to 100: the longest common subsequence of words.

    It is the form of the COCO captions: the best precision and the best recall over an
    example's references, recall weighing 1.44 times as much; words are the Penn
    Treebank's in lower case without punctuation. (The package rouge-score weighs both
    alike and splits words at every mark.)

    Args:
      predictions: a text for each example.
      references: a text for each example, or several, not equally many for all.

    Raises:
      DataError: the two differ in length, or an example has no reference.

    Source: Lin 2004, aclanthology.org/W04-1013; Chen et al. 2015, arXiv:1504.00325.

    >>> round(rouge_l(["the cat sat on a mat"], [["the cat sat on the mat"]]), 1)
    83.3
    """
    said, true = texts(predictions, references)
    scores = [
        _rouge_l(treebank_words(mine), [treebank_words(x) for x in refs])
        for mine, refs in zip(said, true, strict=True)
    ]
    return 100.0 * float(np.mean(scores))


def _rouge_l(words: list[str], references: list[list[str]]) -> float:
    common = [_common(words, ref) for ref in references]
    precision = max(common) / max(1, len(words))
    recall = max(
        length / max(1, len(ref))
        for length, ref in zip(common, references, strict=True)
    )
    if not precision:
        return 0.0
    weight = _RECALL_WEIGHT**2
    return (1 + weight) * precision * recall / (recall + weight * precision)


def _common(one: list[str], other: list[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = 0  # of the row above, one to the left
        for i, beside in enumerate(other, 1):
            above = row[i]
            row[i] = before + 1 if word == beside else max(above, row[i - 1])
            before = above
    return row[-1]


def cider(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]]
) -> float:
    """Return CIDEr, 0 to 10: how alike n-grams are, weighed by how rare they are.

    It is CIDEr-D, the form of the COCO captions and of the E2E challenge: counts are
    clipped, and differing lengths cost. An n-gram weighs the less the more examples
    have it among their references, so that the score depends on the whole test: compare
    models on the same one.

    Args:
      predictions: a text for each example.
      references: a text for each example, or several, not equally many for all.

    Raises:
      DataError: the two differ in length, an example has no reference, or there is one
        example alone: rarity among examples needs several.

    Source: Vedantam, Zitnick and Parikh 2015, arXiv:1411.5726, section 6.

    >>> said, true = ["a red cat", "one blue dog"], ["a red cat", "two blue birds"]
    >>> round(cider(said, true), 2)
    4.17
    """
    said, true = texts(predictions, references)
    if len(said) < 2:
        raise DataError(
            "CIDEr weighs n-grams by the examples that have them: pass two."
        )
    counted = [[_counts(text) for text in refs] for refs in true]
    having = Counter(g for refs in counted for g in {g for ref in refs for g in ref})
    rarity = {gram: math.log(len(said) / having[gram]) for gram in having}
    scores = []
    for text, refs in zip(said, counted, strict=True):
        mine = _counts(text)
        for gram in mine:  # one that no reference has is the rarest
            rarity.setdefault(gram, math.log(len(said)))
        scores.append(np.mean([_likeness(mine, ref, rarity) for ref in refs]))
    return 10.0 * float(np.mean(scores))


def _counts(text: str) -> Counter[Ngram]:
    return Counter(grams(treebank_words(text), _LONGEST))


def _likeness(
    mine: Counter[Ngram], true: Counter[Ngram], rarity: dict[Ngram, float]
) -> float:
    """The clipped cosine of two vectors, the mean over lengths of n-grams."""
    dots, squares, wanted = (np.zeros(_LONGEST) for _ in range(3))
    for gram, times in mine.items():
        n, clipped = len(gram) - 1, min(times, true[gram])
        dots[n] += clipped * true[gram] * rarity[gram] ** 2
        squares[n] += (times * rarity[gram]) ** 2
    for gram, times in true.items():
        wanted[len(gram) - 1] += (times * rarity[gram]) ** 2
    norms = np.sqrt(squares * wanted)
    cosines = np.divide(dots, norms, out=np.zeros(_LONGEST), where=norms > 0)
    gap = _length(mine) - _length(true)
    return float(np.mean(cosines)) * math.exp(-(gap**2) / (2 * _LENGTHS**2))


def _length(counts: Counter[Ngram]) -> int:
    return sum(times for gram, times in counts.items() if len(gram) == 1)
