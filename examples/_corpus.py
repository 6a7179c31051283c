"""German-English sentence pairs, generated, in two domains.

`home` speaks of family, kitchen and garden, `travel` of ships, harbours and weather.
Both share the grammar (`_grammar.py`) and the function words, so a model that
translates one lacks only the other's vocabulary (`_lexicon.py`).

>>> pairs("travel", "test", 1)[0].en[-1] in ".?"
True
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from _grammar import (
    ADVERBS,
    BE,
    CASES,
    DOMAINS,
    MODALS,
    POSSESSIVES,
    PRONOUNS,
    WHO,
    Adverb,
    Clause,
    Domain,
    Noun,
    Order,
    Phrase,
    Place,
    Pronoun,
    lexicon,
    third_person,
)

Split = Literal["train", "validation", "test"]
T = TypeVar("T")

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
PROMPT = "translate German to English: "
REVERSE_PROMPT = "translate English to German: "
DEGREES = (("", ""), ("", ""), ("sehr ", "very "), ("ganz ", "quite "))


class Pair(NamedTuple):
    """A sentence in both languages."""

    de: str
    en: str


# ------------------------------------------------------------------------- sampling


class Sampler:
    """Draws sentences of one domain."""

    def __init__(self, domain: Domain, rng: np.random.Generator) -> None:
        self.words = lexicon(domain)
        self.rng = rng

    def chance(self, probability: float) -> bool:
        """True with some probability."""
        return self.rng.random() < probability

    def pick(self, items: Sequence[T]) -> T:
        """One of the items, each as likely."""
        return items[int(self.rng.random() * len(items))]

    def phrase(self, nouns: Sequence[Noun], *, rich: float, define: float) -> Phrase:
        """A noun phrase; `rich`, `define`: chances of an adjective, of `the`."""
        noun = self.pick(nouns)
        plural = not noun.mass and self.chance(0.04 if noun.preposition[0] else 0.25)
        determiner = "d"
        if not self.chance(define):
            indefinite = "" if plural or noun.mass else "ein"
            # `mein Mann` is my husband, and nobody owns the weather.
            unowned = noun.kind in ("storm", "weather") or noun.de in ("Mann", "Frau")
            possessive = "d" if unowned else self.pick(POSSESSIVES)
            determiner = self.pick((indefinite, indefinite, possessive, "dies"))
        adjective = None
        if self.chance(rich):
            fit = [a for a in self.words.adjectives if noun.kind in a.kinds]
            fit = [a for a in fit if "a" in a.places]
            adjective = self.pick(fit) if fit else None
        return Phrase(noun, determiner, adjective, plural)

    def subject(self, kinds: Sequence[str], rich: float) -> Phrase | Pronoun:
        """A subject: a noun phrase or, for persons, often a pronoun."""
        if "person" in kinds and self.chance(0.25):
            return self.pick(PRONOUNS)
        return self.phrase(self.words.of(*kinds), rich=rich, define=0.7)

    def time(self, tense: str, free: bool) -> Adverb | None:
        """An adverb that suits the tense; only plain ones beside a negation."""
        fit = [a for a in ADVERBS if tense in a.tenses and (free or a.place == "end")]
        return self.pick(fit)

    def state(self, past: bool, rich: float, timed: float) -> Clause:
        """A clause with the verb to be and an adjective."""
        while True:
            subject = self.subject([self.pick(self.words.nouns).kind], rich / 2)
            kind = subject.noun.kind if isinstance(subject, Phrase) else "person"
            fit = [a for a in self.words.adjectives if kind in a.kinds]
            fit = [a for a in fit if "p" in a.places]
            if isinstance(subject, Phrase):
                fit = [a for a in fit if a != subject.adjective]
            if fit:
                break
        adjective = self.pick(fit)
        degree = self.pick(
            (("", ""), ("", ""), ("sehr ", "very "), ("ganz ", "quite "))
        )
        negated = not degree[0] and self.chance(0.2)
        time = None
        if self.chance(timed):
            time = self.time("p" if past else "n", free=not negated)
        said = (degree[0] + adjective.de, degree[1] + adjective.en)
        return Clause(subject, BE, past, negated=negated, time=time, state=said)

    def action(
        self,
        *,
        past: bool,
        rich: float = 0.35,
        timed: float = 0.4,
        subject: Phrase | Pronoun | None = None,
    ) -> Clause:
        """A clause with a full verb; a subject that is given is a person."""
        words = self.words
        verbs = [v for v in words.verbs if subject is None or "person" in v.subjects]
        verb = self.pick(verbs)
        who = subject or self.subject(verb.subjects, rich)
        modal = self.pick(MODALS) if not past and self.chance(0.35) else None
        if modal and "person" not in verb.subjects:
            modal = next(m for m in MODALS if m.de == "werden")
        # `muss nicht` is `need not`, not `must not`: leave it out.
        negated = self.chance(0.18) and (modal is None or modal.en != "must")
        thing = receiver = place = None
        if verb.objects:
            define = 1.0 if negated else 0.55
            thing = self.phrase(words.of(*verb.objects), rich=rich, define=define)
            if negated and self.chance(0.5):
                thing = Phrase(thing.noun, "kein", thing.adjective, thing.plural)
                negated = False
        if verb.follows == "d":
            receiver = self.phrase(words.of("person"), rich=0.1, define=0.7)
        # Intransitive verbs are bare without a place.
        placed = self.chance(0.3 if verb.objects else 0.8)
        if placed and verb.follows and verb.follows != "d":
            kinds = (verb.follows[1:],) if verb.follows[1:] else ("place", "shore")
            where = self.phrase(words.of(*kinds), rich=rich / 2, define=0.85)
            place = Place(where, goal=verb.follows[0] == ">")
        time = None
        if self.chance(timed):
            tense = "p" if past else "f" if modal else "n"
            plain = not negated and (thing is None or thing.determiner != "kein")
            time = self.time(tense, free=plain)
        return Clause(who, verb, past, modal, negated, receiver, thing, place, time)

    def light(self, past: bool) -> Clause:
        """A short clause, for one half of a longer sentence."""
        if self.chance(0.35):
            return self.state(past, rich=0.1, timed=0.1)
        return self.action(past=past, rich=0.12, timed=0.12)

    def sentence(self) -> Pair:
        """One sentence of a kind drawn at random."""
        de, en = self.pick(TEMPLATES)(self)
        return Pair(de[0].upper() + de[1:], en[0].upper() + en[1:])


# ------------------------------------------------------------------------ templates


def _statement(s: Sampler) -> tuple[str, str]:
    clause = s.action(past=s.chance(0.4), timed=0.5)
    order: Order = "statement"
    if clause.time and clause.time.place == "end" and s.chance(0.5):
        order = "fronted"
    return clause.german(order) + ".", clause.english(order) + "."


def _state(s: Sampler) -> tuple[str, str]:
    clause = s.state(s.chance(0.4), rich=0.4, timed=0.4)
    return clause.german("statement") + ".", clause.english() + "."


def _question(s: Sampler) -> tuple[str, str]:
    clause = s.action(past=s.chance(0.4))
    return clause.german("question") + "?", clause.english("question") + "?"


def _asked(s: Sampler) -> tuple[str, str]:
    de, en = s.pick((("warum", "why"), ("wann", "when"), ("wo", "where")))
    clause = s.action(past=s.chance(0.4), timed=0.4 if de == "warum" else 0.0)
    while de == "wo" and clause.place:  # it is what is asked for
        clause = s.action(past=s.chance(0.4), timed=0.0)
    return (
        f"{de} {clause.german('question')}?",
        f"{en} {clause.english('question')}?",
    )


def _who(s: Sampler) -> tuple[str, str]:
    clause = s.action(past=s.chance(0.4), subject=WHO)
    return clause.german("statement") + "?", clause.english() + "?"


def _that(s: Sampler) -> tuple[str, str]:
    pairs = (
        ("ich weiß", "I know"),
        ("ich glaube", "I believe"),
        ("wir hoffen", "we hope"),
        ("er sagt", "he says"),
        ("sie denkt", "she thinks"),
    )
    de, en = s.pick(pairs)
    clause = s.light(s.chance(0.4))
    return f"{de}, dass {clause.german('final')}.", f"{en} that {clause.english()}."


def _joined(s: Sampler) -> tuple[str, str]:
    past = s.chance(0.4)
    first, second = s.light(past), s.light(past)
    de, en, order = s.pick(
        (
            (", weil ", " because ", "final"),
            (", wenn ", " when ", "final"),
            (", obwohl ", " although ", "final"),
            (", aber ", ", but ", "statement"),
            (" und ", " and ", "statement"),
        )
    )
    if past and "wenn" in de:  # once in the past is `als`
        de = ", als "
    return (
        f"{first.german('statement')}{de}{second.german(order)}.",
        f"{first.english()}{en}{second.english()}.",
    )


def _condition(s: Sampler) -> tuple[str, str]:
    first, second = s.light(False), s.light(False)
    return (
        f"wenn {first.german('final')}, {second.german('question')}.",
        f"when {first.english()}, {second.english()}.",
    )


def _relative(s: Sampler) -> tuple[str, str]:
    who = s.phrase(s.words.of("person"), rich=0.1, define=0.8)
    nobody = Pronoun("", "", who.person)
    clause = s.action(past=s.chance(0.5), rich=0.1, timed=0.0, subject=nobody)
    subject = Phrase(who.noun, who.determiner, who.adjective, who.plural, clause)
    state = s.state(False, rich=0.0, timed=0.0)
    while not isinstance(state.subject, Pronoun):  # an adjective for a person
        state = s.state(False, rich=0.0, timed=0.0)
    whole = Clause(subject, BE, state.past, negated=state.negated, state=state.state)
    return whole.german("statement") + ".", whole.english() + "."


TEMPLATES = (
    *(_statement,) * 6,
    *(_state,) * 2,
    *(_question,) * 2,
    _asked,
    _who,
    *(_that,) * 2,
    *(_joined,) * 2,
    _condition,
    _relative,
)


# ------------------------------------------------------------------------- the pairs


def split_of(pair: Pair) -> Split:
    """The split a pair belongs to, by a checksum of its English.

    German decides English, so no sentence of either language is in two splits.
    """
    slot = zlib.crc32(pair.en.encode()) % 10
    return "test" if slot == 0 else "validation" if slot == 1 else "train"


def pairs(domain: Domain, split: Split, n: int, seed: int = 0) -> list[Pair]:
    """Draw `n` distinct sentence pairs of a split.

    Args:
      domain: `home` or `travel`.
      split: `train`, `validation` or `test`; no sentence is in two of them, whatever
        the seed.
      n: how many.
      seed: another seed gives other sentences of the same split.

    Returns:
      The pairs, in an order that depends on the arguments alone.

    Raises:
      ValueError: an unknown domain or split.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; choose one of {SPLITS}")
    lexicon(domain)  # rejects an unknown domain
    order = [seed, DOMAINS.index(domain), SPLITS.index(split)]
    sampler = Sampler(domain, np.random.default_rng(order))
    found: dict[Pair, None] = {}
    while len(found) < n:
        pair = sampler.sentence()
        if split_of(pair) == split:
            found.setdefault(pair)
    return list(found)


def glossary(domain: Domain) -> list[Pair]:
    """Every form of the domain's own words beside its English, without any sentence.

    Verbs and adjectives come in lower case and as they begin a sentence.
    """
    words = lexicon(domain, shared=False)
    nouns, others = set(), set()
    for noun in words.nouns:
        for plural in (False,) if noun.mass else (False, True):
            english = noun.en_plural if plural else noun.en
            nouns |= {Pair(noun.german(case, plural), english) for case in CASES}
    for adjective in words.adjectives:
        endings = ("", "e", "em", "en", "er", "es")
        others |= {Pair(adjective.de + ending, adjective.en) for ending in endings}
    for verb in words.verbs:
        english = (verb.en, verb.en, third_person(verb.en), verb.en)
        for prefix in {"", verb.prefix}:
            forms = (prefix + form for form in verb.forms)
            others |= {Pair(*said) for said in zip(forms, english, strict=True)}
        others |= {Pair(verb.de, verb.en), Pair(verb.participle, verb.en_past)}
    others |= {Pair(de[0].upper() + de[1:], en) for de, en in others}
    return sorted(nouns | others)
