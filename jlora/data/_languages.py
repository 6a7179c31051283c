"""Languages: their names, directions of translation, and what file names tell."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jlora._errors import DataError

#: Names of languages by their codes, for prompts: `LANGUAGES["de"]` is "German".
LANGUAGES = {
    "af": "Afrikaans", "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali",
    "ca": "Catalan", "cs": "Czech", "cy": "Welsh", "da": "Danish", "de": "German",
    "el": "Greek", "en": "English", "eo": "Esperanto", "es": "Spanish",
    "et": "Estonian", "eu": "Basque", "fa": "Persian", "fi": "Finnish",
    "fr": "French", "ga": "Irish", "gl": "Galician", "gu": "Gujarati",
    "ha": "Hausa", "he": "Hebrew", "hi": "Hindi", "hr": "Croatian",
    "hu": "Hungarian", "hy": "Armenian", "id": "Indonesian", "is": "Icelandic",
    "it": "Italian", "ja": "Japanese", "ka": "Georgian", "kk": "Kazakh",
    "km": "Khmer", "kn": "Kannada", "ko": "Korean", "la": "Latin",
    "lt": "Lithuanian", "lv": "Latvian", "mk": "Macedonian", "ml": "Malayalam",
    "mr": "Marathi", "ms": "Malay", "mt": "Maltese", "ne": "Nepali", "nl": "Dutch",
    "no": "Norwegian", "pa": "Punjabi", "pl": "Polish", "ps": "Pashto",
    "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "si": "Sinhala",
    "sk": "Slovak", "sl": "Slovenian", "sq": "Albanian", "sr": "Serbian",
    "sv": "Swedish", "sw": "Swahili", "ta": "Tamil", "te": "Telugu", "th": "Thai",
    "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu", "vi": "Vietnamese",
    "xh": "Xhosa", "yo": "Yoruba", "zh": "Chinese", "zu": "Zulu",
}  # fmt: skip
# Words in file names that stand for a side whatever its language.
_SIDES = ({"source", "src"}, {"target", "tgt", "trg", "ref", "reference"})


class Direction(NamedTuple):
    """From which language to which, by their codes."""

    source: str
    target: str

    def __str__(self) -> str:
        """As it is written: `de-en`."""
        return f"{self.source}-{self.target}"

    @property
    def prompt(self) -> str:
        """What T5 expects before the sentence.

        Raises:
          DataError: a language whose name is not known here.
        """
        for code in self:
            if code not in LANGUAGES:
                raise DataError(
                    f"the English name of the language {code!r} is not known, so "
                    f"there is no prompt for {self}.\nWrite the prompt yourself."
                )
        source, target = (LANGUAGES[code] for code in self)
        return f"translate {source} to {target}: "


def direction(name: str) -> Direction:
    """Parse a direction such as `de-en`.

    Raises:
      DataError: anything but two different codes of two or three letters.

    >>> direction("en-cs").prompt
    'translate English to Czech: '
    """
    match = re.fullmatch(r"([a-z]{2,3})[-_]([a-z]{2,3})", name.strip().lower())
    if match is None or match[1] == match[2]:
        raise DataError(
            f"unknown direction {name!r}; expected the codes of two languages, such "
            "as de-en or en-cs."
        )
    return Direction(*match.groups())


def sides_of(files: Sequence[Path], way: Direction) -> tuple[Path, Path]:
    """Return two files in the order source, target, as their names tell.

    A name tells by a language's code or English name, or by a word such as `source`
    or `tgt`, anywhere in it, in which the two names differ; where the names are equal,
    their folders' names do.

    Raises:
      DataError: the names do not tell, or speak of other languages.
    """
    for one, two in _differences(files):
        kinds = [_said(one, way), _said(two, way)]
        if kinds == [{0}, {1}]:
            return files[0], files[1]
        if kinds == [{1}, {0}]:
            return files[1], files[0]
    names = " and ".join(str(path) for path in files)
    raise DataError(
        f"the names of {names} do not tell which holds {way.source} and which "
        f"{way.target}.\nName them so, for instance corpus.{way.source} and corpus."
        f"{way.target}, or corpus.source and corpus.target; or pass --direction."
    )


def _differences(files: Sequence[Path]) -> Iterator[tuple[set[str], set[str]]]:
    """Yield the words in which the names differ, then those of folder by folder."""
    parts = [reversed(path.absolute().parts) for path in files]
    for one, two in zip(*parts, strict=False):
        first, second = (Counter(re.findall("[a-z]+", x.lower())) for x in (one, two))
        if first != second:
            yield set(first - second), set(second - first)


def _said(words: set[str], way: Direction) -> set[int]:
    """Return the sides that words speak of: 0 source, 1 target, 2 another language."""
    found = set()
    for side, code in enumerate(way):
        names = {code, LANGUAGES.get(code, code).lower()} | _SIDES[side]
        if words & names:
            found.add(side)
    return found
