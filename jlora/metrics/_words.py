"""Text into words: as translations are evaluated, and as captions are."""

from __future__ import annotations

import re

# mteval-v13a: what is kept by SGML first, then punctuation apart from numbers.
_MTEVAL = (
    (re.compile(r"<skipped>"), ""),
    (re.compile(r"-\n"), ""),
    (re.compile(r"\n"), " "),
    (re.compile(r"&quot;"), '"'),
    (re.compile(r"&amp;"), "&"),
    (re.compile(r"&lt;"), "<"),
    (re.compile(r"&gt;"), ">"),
)
_MTEVAL_SPLITS = (
    (re.compile(r"([{-~\[-` -&(-+:-@/])"), r" \1 "),
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


def mteval_words(text: str) -> list[str]:
    """Return the words as mteval-v13a.pl has them, which BLEU and NIST were defined by.

    >>> mteval_words("Low-priced (20-25), 3.5 stars.")
    ['Low-priced', '(', '20', '-', '25', ')', ',', '3.5', 'stars', '.']
    """
    for pattern, new in _MTEVAL:
        text = pattern.sub(new, text)
    text = f" {text} "
    for pattern, new in _MTEVAL_SPLITS:
        text = pattern.sub(new, text)
    return text.split()


_CLITIC = r"n't|'(?:s|m|d|ll|re|ve)"
_TREEBANK_SPLITS = (
    (re.compile("[\u2018\u2019]"), "'"),
    (re.compile("£"), " # "),
    # In lower case the evaluation of captions takes brackets for words.
    (re.compile(r"[(]"), " -lrb- "),
    (re.compile(r"[)]"), " -rrb- "),
    (re.compile(rf"(?<=\w)({_CLITIC})(?![\w'])"), r" \1"),
    (re.compile(r"\bcannot\b"), "can not"),
)
_TREEBANK_WORD = re.compile(
    rf"(?:(?<=\s)(?:{_CLITIC})(?!\w))"
    r"|-[lr]rb-"
    r"|\d+(?:[.,:/]\d+)+(?:-\d+(?:[.,]\d+)*)?"
    r"|\w+(?:[-']\w+)*"
    r"|[^\w\s]"
)
_PUNCTUATION = frozenset("'\"`.?!,:;-[]{}\u2013\u2014\u2026\u201c\u201d")


def treebank_words(text: str) -> list[str]:
    """Return the words in lower case as the Penn Treebank has them, no punctuation.

    Captions are scored on these words. The rules are those of English text; what
    Stanford's tokenizer knows beside them (abbreviations, addresses) is left out.

    >>> treebank_words("It's a child-friendly pub; you can't pay £20.")
    ['it', "'s", 'a', 'child-friendly', 'pub', 'you', 'ca', "n't", 'pay', '#', '20']
    """
    text = text.lower()
    for pattern, new in _TREEBANK_SPLITS:
        text = pattern.sub(new, text)
    return [word for word in _TREEBANK_WORD.findall(text) if word not in _PUNCTUATION]
