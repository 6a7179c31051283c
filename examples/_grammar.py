"""A small German-English feature grammar: words, noun phrases, clauses.

A clause is features (`Clause`), said in each language: German with its cases,
adjective endings, separable prefixes and verb at the end, English with its do-support
and word order. `_corpus.py` draws the clauses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import _lexicon

Domain = Literal["home", "travel"]
Case = Literal["nom", "acc", "dat"]

DOMAINS: tuple[Domain, ...] = ("home", "travel")
CASES: tuple[Case, ...] = ("nom", "acc", "dat")


# --------------------------------------------------------------------------- words

# Columns of the ending tables: masculine, feminine, neuter, plural.
GENDERS = "mfnp"
DEFINITE = {
    "nom": ("der", "die", "das", "die"),
    "acc": ("den", "die", "das", "die"),
    "dat": ("dem", "der", "dem", "den"),
}
STRONG = {
    "nom": ("er", "e", "es", "e"),
    "acc": ("en", "e", "es", "e"),
    "dat": ("em", "er", "em", "en"),
}
# Where `ein`, `kein` and the possessives have no ending.
ENDINGLESS = {("nom", "m"), ("nom", "n"), ("acc", "n")}
CONTRACTIONS = {
    "in dem": "im",
    "an dem": "am",
    "zu dem": "zum",
    "zu der": "zur",
}
# German stem: English singular and plural.
DETERMINERS = {
    "d": ("the", "the"),
    "dies": ("this", "these"),
    "ein": ("a", ""),
    "kein": ("no", "no"),
    "mein": ("my", "my"),
    "dein": ("your", "your"),
    "sein": ("his", "his"),
    "ihr": ("her", "her"),
    "unser": ("our", "our"),
    "": ("", ""),
}
POSSESSIVES = ("mein", "dein", "sein", "ihr", "unser")


def _join(*words: str) -> str:
    return " ".join(w for w in words if w)


@dataclass(frozen=True)
class Noun:
    """A noun of both languages; `preposition` is set for places."""

    de: str
    gender: str
    plural: str
    en: str
    en_plural: str
    kind: str
    preposition: tuple[str, str] = ("", "")
    weak: bool = False

    @property
    def mass(self) -> bool:
        """Whether the noun has no plural and takes no `ein`."""
        return self.plural == "-"

    def german(self, case: Case, plural: bool) -> str:
        """The form in a case: dative plural adds n, weak nouns end in n."""
        if plural and case == "dat" and self.plural[-1] not in "ns":
            return self.plural + "n"
        return self.plural if plural or (self.weak and case != "nom") else self.de


@dataclass(frozen=True)
class Adjective:
    """An adjective, the kinds of noun it suits, and its places (`a`, `p`)."""

    de: str
    en: str
    kinds: frozenset[str]
    places: str


@dataclass(frozen=True)
class Verb:
    """A verb: German forms, English forms and its frame."""

    de: str
    forms: tuple[str, str, str, str]  # ich, du, er, wir
    prefix: str
    participle: str
    auxiliary: str
    en: str
    en_past: str
    subjects: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
    follows: str = ""


class Modal(NamedTuple):
    """A modal verb, or `werden` for the future."""

    de: str
    forms: tuple[str, str, str, str]
    en: str


class Adverb(NamedTuple):
    """An adverb of time, its tenses and its English place."""

    de: str
    en: str
    tenses: str
    place: str


BE = Verb("sein", ("bin", "bist", "ist", "sind"), "", "", "", "be", "")
WAS = ("war", "warst", "war", "waren")
HAVE = {"hat": ("habe", "hast", "hat", "haben"), "ist": BE.forms}


def third_person(en: str) -> str:
    """Inflect the first word of a verb: `look for` to `looks for`."""
    verb, _, rest = en.partition(" ")
    return _join(_plural(verb), rest)


def _plural(en: str) -> str:
    """Append the regular English -s; verbs in the third person take the same."""
    if en.endswith(("s", "sh", "ch", "x")):
        return en + "es"
    if en.endswith("y") and en[-2] not in "aeiou":
        return en[:-1] + "ies"
    return en + "s"


def _forms(infinitive: str, third: str) -> tuple[str, str, str, str]:
    """Conjugate in the present from the infinitive and the third person."""
    first = infinitive[:-1]
    if infinitive.endswith("eln"):
        first = infinitive[:-3] + "le"
    stem = third[:-1]
    second = third if stem[-1] in "sßz" else stem + "st"
    return first, second, third, infinitive


# --------------------------------------------------------------------- the lexicon


def _rows(table: str) -> list[list[str]]:
    lines = (line.split() for line in table.strip().splitlines())
    return [[cell.replace("_", " ") for cell in line] for line in lines]


def _noun(de: str, gender: str, plural: str, *rest: str) -> Noun:
    en, en_plural, kind, *prep = rest
    many = _plural(en) if en_plural == "." else en_plural
    german, _, english = prep[0].partition("/") if prep else ("", "", "")
    pair = (german, english)
    return Noun(de, gender[0], plural, en, many, kind, pair, weak="~" in gender)


def _verb(de: str, third: str, participle: str, *rest: str) -> Verb:
    en, past, subjects, follows, objects = rest
    prefix, _, stem = de.rpartition("|")
    return Verb(
        prefix + stem,
        _forms(stem, third),
        prefix,
        participle.lstrip("+"),
        "ist" if participle.startswith("+") else "hat",
        en,
        past,
        tuple(subjects.split(",")),
        tuple(objects.split(",")) if objects != "." else (),
        follows.strip("."),
    )


def _adjective(de: str, en: str, kinds: str, places: str) -> Adjective:
    return Adjective(de, en, frozenset(kinds.split(",")), places)


def _modal(de: str, *forms: str) -> Modal:
    ich, du, er, wir, en = forms
    return Modal(de, (ich, du, er, wir), en.replace("+", " "))


ADVERBS = [Adverb(*row) for row in _rows(_lexicon.ADVERBS)]
MODALS = [_modal(*row) for row in _rows(_lexicon.MODALS)]


class Lexicon(NamedTuple):
    """The words of a domain, its own and the shared ones."""

    nouns: tuple[Noun, ...]
    adjectives: tuple[Adjective, ...]
    verbs: tuple[Verb, ...]

    def of(self, *kinds: str) -> list[Noun]:
        """The nouns of some semantic classes."""
        return [n for n in self.nouns if n.kind in kinds]


@cache
def lexicon(domain: Domain, shared: bool = True) -> Lexicon:
    """The lexicon of a domain; without the shared words on request.

    Raises:
      ValueError: there is no such domain.
    """
    if domain not in DOMAINS:
        raise ValueError(f"no domain {domain!r}; choose one of {DOMAINS}")

    def rows(name: str) -> list[list[str]]:
        own = _rows(getattr(_lexicon, f"{domain.upper()}_{name}"))
        return (_rows(getattr(_lexicon, f"SHARED_{name}")) if shared else []) + own

    return Lexicon(
        tuple(_noun(*row) for row in rows("NOUNS")),
        tuple(_adjective(*row) for row in rows("ADJECTIVES")),
        tuple(_verb(*row) for row in rows("VERBS")),
    )


# --------------------------------------------------------------------- noun phrases


@dataclass(frozen=True)
class Phrase:
    """A noun phrase: determiner, adjective, noun and perhaps a relative clause."""

    noun: Noun
    determiner: str = "d"
    adjective: Adjective | None = None
    plural: bool = False
    relative: Clause | None = None

    @property
    def person(self) -> int:
        """Index into the four verb forms."""
        return 3 if self.plural else 2

    def german(self, case: Case) -> str:
        """Decline; the adjective is strong where the determiner has no ending."""
        gender = "p" if self.plural else self.noun.gender
        column = GENDERS.index(gender)
        strong, ending = STRONG[case][column], ""
        if self.determiner == "d":
            determiner = ending = DEFINITE[case][column]
        else:
            endingless = self.determiner != "dies" and (case, gender) in ENDINGLESS
            ending = "" if endingless or not self.determiner else strong
            determiner = self.determiner + ending
        adjective = ""
        if self.adjective:
            e = gender != "p" and (case == "nom" or (case == "acc" and gender in "fn"))
            weak = "e" if e else "en"
            adjective = self.adjective.de + (weak if ending else strong)
        words = _join(determiner, adjective, self.noun.german(case, self.plural))
        if self.relative is None:
            return words
        which = DEFINITE["nom"][column]
        return f"{words}, {_join(which, self.relative.german('final'))},"

    def english(self) -> str:
        """Say it in English, `a` or `an` by the next letter."""
        determiner = DETERMINERS[self.determiner][self.plural]
        noun = self.noun.en_plural if self.plural else self.noun.en
        words = _join(self.adjective.en if self.adjective else "", noun)
        if determiner == "a" and words[0] in "aeiou":
            determiner = "an"
        words = _join(determiner, words)
        if self.relative is None:
            return words
        which = "who" if self.noun.kind == "person" else "that"
        return _join(words, which, self.relative.english())


@dataclass(frozen=True)
class Pronoun:
    """A subject pronoun, or nothing at all inside a relative clause."""

    de: str
    en: str
    person: int

    def german(self, case: Case) -> str:
        """The nominative; the corpus has no other."""
        return self.de

    def english(self) -> str:
        """The English subject form."""
        return self.en


PRONOUNS = (
    Pronoun("ich", "I", 0),
    Pronoun("du", "you", 1),
    Pronoun("er", "he", 2),
    Pronoun("sie", "she", 2),
    Pronoun("wir", "we", 3),
    Pronoun("sie", "they", 3),
)
WHO = Pronoun("wer", "who", 2)


@dataclass(frozen=True)
class Place:
    """A noun phrase under a preposition; `goal` is a destination."""

    phrase: Phrase
    goal: bool = False

    def german(self) -> str:
        """`in der Küche`, `zum Hafen`."""
        preposition = "zu" if self.goal else self.phrase.noun.preposition[0]
        first, _, rest = self.phrase.german("dat").partition(" ")
        start = f"{preposition} {first}"
        return _join(CONTRACTIONS.get(start, start), rest)

    def english(self) -> str:
        """`in the kitchen`, `to the harbour`."""
        preposition = "to" if self.goal else self.phrase.noun.preposition[1]
        return _join(preposition, self.phrase.english())


# -------------------------------------------------------------------------- clauses

# `statement` has the verb second, `fronted` starts with the adverb, `question` with
# the verb, and `final` is a subordinate clause with the verb at the end.
Order = Literal["statement", "fronted", "question", "final"]


@dataclass(frozen=True)
class Clause:
    """What is said, before any language: each realises it in its own order."""

    subject: Phrase | Pronoun
    verb: Verb
    past: bool = False
    modal: Modal | None = None
    negated: bool = False
    receiver: Phrase | None = None
    object: Phrase | None = None
    place: Place | None = None
    time: Adverb | None = None
    state: tuple[str, str] = ("", "")  # what follows the verb to be

    def german(self, order: Order) -> str:
        """German word order: adverb, then object, `nicht`, place and the verbs."""
        finite, tail = self._german_verbs(final=order == "final")
        subject = self.subject.german("nom")
        time = self.time.de if self.time else ""
        rest = _join(
            self.receiver.german("dat") if self.receiver else "",
            "" if order == "fronted" else time,
            self.object.german("acc") if self.object else "",
            "nicht" if self.negated else "",
            self.place.german() if self.place else "",
            self.state[0],
        )
        if order == "final":
            return _join(subject, rest, tail, finite)
        front = {"statement": subject, "fronted": time, "question": ""}[order]
        follow = "" if order == "statement" else subject
        return _join(front, finite, follow, rest, tail)

    def _german_verbs(self, final: bool) -> tuple[str, str]:
        """The finite verb and what stands at the end of the clause."""
        verb, person = self.verb, self.subject.person
        if self.modal:
            return self.modal.forms[person], verb.de
        if verb is BE:
            return (WAS if self.past else BE.forms)[person], ""
        if self.past:
            return HAVE[verb.auxiliary][person], verb.participle
        if final:
            return verb.prefix + verb.forms[person], ""
        return verb.forms[person], verb.prefix

    def english(self, order: Order = "statement") -> str:
        """English word order; questions and negation bring in `do`."""
        asked = order == "question"
        auxiliary, main = self._english_verbs(asked or self.negated)
        negation = "not" if self.negated else ""
        if auxiliary == "can" and self.negated and not asked:
            auxiliary, negation = "cannot", ""
        subject, mid = self.subject.english(), ""
        front, end = "", self.time.en if self.time else ""
        if self.time and self.time.place == "mid":
            mid, end = end, ""
        if order == "fronted":
            front, end = end, ""
        return _join(
            front,
            _join(auxiliary, subject) if asked else _join(subject, auxiliary),
            negation,
            mid,
            main,
            self.receiver.english() if self.receiver else "",
            self.object.english() if self.object else "",
            self.place.english() if self.place else "",
            self.state[1],
            end,
        )

    def _english_verbs(self, do: bool) -> tuple[str, str]:
        """The auxiliary, perhaps empty, and the main verb."""
        verb, person = self.verb, self.subject.person
        third = person == 2
        if self.modal and self.modal.en != "want to":
            return self.modal.en, verb.en
        if verb is BE and not self.modal:
            be = ("was", "were", "was", "were") if self.past else _ENGLISH_BE
            return be[person], ""
        lemma = f"want to {verb.en}" if self.modal else verb.en
        if do:
            return ("did" if self.past else "does" if third else "do"), lemma
        if self.past:
            return "", verb.en_past
        return "", third_person(lemma) if third else lemma


_ENGLISH_BE = ("am", "are", "is", "are")
