"""The corpus and the checkpoint that lie beside the examples."""

from pathlib import Path

import numpy as np
import pytest
import sacrebleu

from jlora import data, models

ASSETS = Path(__file__).parents[1] / "examples" / "assets"
CHECKPOINT = ASSETS / "tiny-t5-de-en"
PROMPT = "translate German to English: "
SIZES = {
    "travel.train": 4000,
    "travel.valid": 500,
    "travel.test": 500,
    "home.test": 500,
}


def pairs(name):
    files = [ASSETS / "corpus" / f"{name}.{code}" for code in ("de", "en")]
    return data.read_pairs(files, "de-en")


def base(name):
    return data.read_lines(ASSETS / "corpus" / "base" / f"{name}.gz")


def test_the_corpus_is_complete():
    assert {name: len(pairs(name)) for name in SIZES} == SIZES
    assert len(base("home.train.de")) == len(base("home.train.en")) == 28_000
    assert (len(base("travel.de")), len(base("travel.en"))) == (5000, 6000)
    words = data.read_pairs(ASSETS / "corpus" / "base" / "words.tsv", "de-en")
    assert len(words) == 1013
    assert ("Häfen", "harbours") in words


def test_no_test_sentence_is_trained_on():
    for side in (0, 1):
        sets = {name: {pair[side] for pair in pairs(name)} for name in SIZES}
        assert not sets["travel.test"] & (sets["travel.train"] | sets["travel.valid"])
        assert not sets["travel.valid"] & sets["travel.train"]
        code = ("de", "en")[side]
        assert not sets["travel.test"] & set(base(f"travel.{code}"))
        assert not sets["home.test"] & set(base(f"home.train.{code}"))


def test_sentences_look_like_sentences():
    for sentence in (text for name in SIZES for pair in pairs(name) for text in pair):
        assert sentence[0].isupper()
        assert sentence[-1] in ".?"
        assert not any(odd in sentence for odd in ("  ", " .", " ,", ",.", "_", "|"))


# ---------------------------------------------------------- the embedded checkpoint


def test_the_checkpoint_is_complete_and_small():
    sizes = {file.name: file.stat().st_size for file in CHECKPOINT.iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= {
        *sizes
    }
    assert sum(sizes.values()) <= 6_000_000
    assert "dtype" in (CHECKPOINT / "config.json").read_text()


@pytest.fixture(scope="module")
def tokenizer():
    return data.load_tokenizer(CHECKPOINT)


@pytest.mark.parametrize("name", ["travel.test", "home.test"])
def test_tokenizer_round_trips_the_corpus(tokenizer, name):
    sentences = [text for pair in pairs(name)[:200] for text in pair]
    tokens = data.tokenise(tokenizer, sentences, 128)
    assert tokens.remarks(name) == []
    assert tokens.sampled == 200
    assert all(row[-1] == tokenizer.eos_token_id == 1 for row in tokens.rows)
    assert tokenizer.pad_token_id == 0


def test_tokenizer_spells_what_it_does_not_know(tokenizer):
    sentence = "Xaver mag Zwiebeln!"
    ids = tokenizer(sentence)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == sentence


def test_the_base_translates_home_and_not_travel(tokenizer):
    model, params = models.load(CHECKPOINT)
    scores = {}
    for name in ("home.test", "travel.test"):
        sources, targets = zip(*pairs(name)[:60], strict=True)
        read = tokenizer(
            [PROMPT + source for source in sources],
            padding="max_length",
            max_length=40,
            return_tensors="np",
        )
        ids, mask = read["input_ids"], read["attention_mask"]
        out = models.generate(model, params, ids, mask, max_new_tokens=32)
        said = tokenizer.batch_decode(np.asarray(out), skip_special_tokens=True)
        scores[name] = sacrebleu.corpus_bleu(said, [list(targets)]).score
    assert scores["home.test"] > 60
    assert scores["travel.test"] < 30
