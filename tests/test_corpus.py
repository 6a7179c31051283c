"""The generated corpus and the checkpoint embedded beside it."""

import sys
from pathlib import Path

import pytest
import sacrebleu
import transformers

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import _corpus  # noqa: E402
import _grammar  # noqa: E402
from _corpus import DOMAINS, SPLITS, pairs  # noqa: E402
from _grammar import Clause, Modal, Phrase, Place, Pronoun  # noqa: E402

from jlora import models  # noqa: E402

CHECKPOINT = EXAMPLES / "assets" / "tiny-t5-de-en"
FILES = (
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def _word(kind, de, domain="home"):
    words = getattr(_grammar.lexicon(domain), kind)
    return next(w for w in words if w.de == de)


# ------------------------------------------------------------------------- grammar


@pytest.mark.parametrize(
    ("phrase", "case", "de", "en"),
    [
        (("Kuchen", "ein", "süß", False), "nom", "ein süßer Kuchen", "a sweet cake"),
        (("Kuchen", "ein", "süß", False), "acc", "einen süßen Kuchen", "a sweet cake"),
        (("Kuchen", "d", "süß", False), "dat", "dem süßen Kuchen", "the sweet cake"),
        (("Tomate", "", "süß", True), "dat", "süßen Tomaten", "sweet tomatoes"),
        (("Kind", "d", None, True), "dat", "den Kindern", "the children"),
        (("Nachbar", "d", None, False), "acc", "den Nachbarn", "the neighbour"),
        (("Ei", "ein", "alt", False), "acc", "ein altes Ei", "an old egg"),
        (
            ("Messer", "dies", "alt", True),
            "nom",
            "diese alten Messer",
            "these old knives",
        ),
        (("Milch", "", "warm", False), "acc", "warme Milch", "warm milk"),
        (("Hemd", "unser", "neu", False), "nom", "unser neues Hemd", "our new shirt"),
        (("Jacke", "kein", "neu", False), "dat", "keiner neuen Jacke", "no new jacket"),
    ],
)
def test_noun_phrases_decline(phrase, case, de, en):
    noun, determiner, adjective, plural = phrase
    said = Phrase(
        _word("nouns", noun),
        determiner,
        _word("adjectives", adjective) if adjective else None,
        plural,
    )
    assert (said.german(case), said.english()) == (de, en)


def test_places_contract():
    harbour = Phrase(_word("nouns", "Hafen", "travel"))
    island = Phrase(_word("nouns", "Insel", "travel"))
    assert Place(harbour).german() == "im Hafen"
    assert Place(island).german() == "auf der Insel"
    assert Place(island, goal=True).german() == "zur Insel"
    assert Place(island, goal=True).english() == "to the island"


def _tidy(**features):
    subject = Phrase(_word("nouns", "Mutter"))
    thing = Phrase(_word("nouns", "Küche"))
    today = next(a for a in _grammar.ADVERBS if a.de == "heute")
    verb = _word("verbs", "aufräumen")
    return Clause(subject, verb, object=thing, time=today, **features)


@pytest.mark.parametrize(
    ("order", "features", "de", "en"),
    [
        (
            "statement",
            {},
            "die Mutter räumt heute die Küche auf",
            "the mother tidies the kitchen today",
        ),
        (
            "fronted",
            {"past": True},
            "heute hat die Mutter die Küche aufgeräumt",
            "today the mother tidied the kitchen",
        ),
        (
            "question",
            {"negated": True},
            "räumt die Mutter heute die Küche nicht auf",
            "does the mother not tidy the kitchen today",
        ),
        (
            "final",
            {},
            "die Mutter heute die Küche aufräumt",
            "the mother tidies the kitchen today",
        ),
        (
            "final",
            {"modal": "wollen"},
            "die Mutter heute die Küche aufräumen will",
            "the mother wants to tidy the kitchen today",
        ),
        (
            "statement",
            {"modal": "können", "negated": True},
            "die Mutter kann heute die Küche nicht aufräumen",
            "the mother cannot tidy the kitchen today",
        ),
    ],
)
def test_clauses_order_their_verbs(order, features, de, en):
    if "modal" in features:
        modals = {m.de: m for m in _grammar.MODALS}
        features = features | {"modal": modals[features["modal"]]}
        assert isinstance(features["modal"], Modal)
    clause = _tidy(**features)
    assert (clause.german(order), clause.english(order)) == (de, en)


def test_verbs_agree_with_every_pronoun():
    iron = _word("verbs", "bügeln")
    said = [Clause(who, iron).german("statement") for who in _grammar.PRONOUNS]
    assert said[:3] == ["ich bügle", "du bügelst", "er bügelt"]
    wait = _word("verbs", "warten", "travel")
    assert Clause(Pronoun("du", "you", 1), wait).german("statement") == "du wartest"


def test_lexicon_tables_are_well_formed():
    for domain in DOMAINS:
        words = _grammar.lexicon(domain)
        kinds = {noun.kind for noun in words.nouns}
        assert {noun.gender for noun in words.nouns} <= set("mfn")
        own = _grammar.lexicon(domain, shared=False)
        assert all(adjective.kinds <= kinds for adjective in own.adjectives)
        assert all(set(verb.objects) <= kinds for verb in own.verbs)
        assert all(set(verb.subjects) <= kinds for verb in own.verbs)


# -------------------------------------------------------------------------- corpus


def test_the_corpus_is_deterministic_and_seeded():
    assert pairs("home", "train", 50) == pairs("home", "train", 80)[:50]
    assert pairs("home", "train", 50) != pairs("home", "train", 50, seed=1)


def test_splits_share_no_sentence_in_either_language():
    for domain in DOMAINS:
        drawn = [pairs(domain, s, 1500, seed=i) for i, s in enumerate(SPLITS)]
        for language in ("de", "en"):
            sets = [{getattr(pair, language) for pair in split} for split in drawn]
            assert not sets[0] & sets[1]
            assert not sets[0] & sets[2]
            assert not sets[1] & sets[2]


@pytest.mark.parametrize("domain", DOMAINS)
def test_there_are_enough_sentences_and_german_decides_english(domain):
    found = pairs(domain, "train", 20_000)
    assert len({pair.de for pair in found}) == 20_000
    assert max(len(pair.de.split()) for pair in found) < 30


def test_sentences_look_like_sentences():
    for domain in DOMAINS:
        for sentence in (s for pair in pairs(domain, "validation", 1000) for s in pair):
            assert sentence[0].isupper()
            assert sentence[-1] in ".?"
            assert not any(
                odd in sentence for odd in ("  ", " .", " ,", ",.", "_", "|")
            )


def test_unknown_domains_and_splits_are_rejected():
    with pytest.raises(ValueError, match=r"no domain 'sea'.*home"):
        pairs("sea", "train", 1)
    with pytest.raises(ValueError, match=r"no split 'dev'.*validation"):
        pairs("home", "dev", 1)


def test_prompts_end_in_a_space():
    assert _corpus.PROMPT == "translate German to English: "
    assert _corpus.REVERSE_PROMPT == "translate English to German: "


# ---------------------------------------------------------- the embedded checkpoint


def test_the_checkpoint_is_complete_and_small():
    sizes = {file: (CHECKPOINT / file).stat().st_size for file in FILES}
    assert sum(sizes.values()) <= 6_000_000
    assert "dtype" in (CHECKPOINT / "config.json").read_text()


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.mark.parametrize("domain", DOMAINS)
def test_tokenizer_round_trips_the_corpus(tokenizer, domain):
    sentences = [s for pair in pairs(domain, "test", 200) for s in pair]
    ids = tokenizer(sentences)["input_ids"]
    assert all(row[-1] == tokenizer.eos_token_id == 1 for row in ids)
    assert not any(tokenizer.unk_token_id in row for row in ids)
    assert tokenizer.pad_token_id == 0
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == sentences


def test_tokenizer_spells_what_it_does_not_know(tokenizer):
    sentence = "Xaver mag Zwiebeln!"
    ids = tokenizer(sentence)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == sentence


def test_the_base_translates_home_and_not_travel(tokenizer):
    model, params = models.load(CHECKPOINT)
    scores = {}
    for domain in DOMAINS:
        test = pairs(domain, "test", 60)
        prompts = [_corpus.PROMPT + pair.de for pair in test]
        read = tokenizer(
            prompts, padding="max_length", max_length=40, return_tensors="np"
        )
        out = models.generate(
            model,
            params,
            read["input_ids"],
            read["attention_mask"],
            max_new_tokens=32,
        )
        said = tokenizer.batch_decode(out.tolist(), skip_special_tokens=True)
        references = [[pair.en for pair in test]]
        scores[domain] = sacrebleu.corpus_bleu(said, references).score
    assert scores["home"] > 60
    assert scores["travel"] < 30


def test_glossary_has_words_and_no_sentences():
    for domain in DOMAINS:
        words = _corpus.glossary(domain)
        assert len(set(words)) == len(words) > 300
        assert not any(" " in pair.de or pair.de[-1] in ".?" for pair in words)
    assert ("Häfen", "harbours") in _corpus.glossary("travel")
    assert ("ankommt", "arrives") in _corpus.glossary("travel")
