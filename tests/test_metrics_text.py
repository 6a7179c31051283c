"""Metrics of texts: equal to the E2E challenge's own programs, and what is refused."""

import json
from pathlib import Path

import pytest

from jlora import DataError, OptionError, metrics
from jlora.metrics._words import mteval_words, treebank_words

GOLDEN = json.loads(
    Path(__file__).with_name("golden").joinpath("metrics.json").read_text()
)
SAID = [example[0] for example in GOLDEN["examples"]]
TRUE = [example[1:] for example in GOLDEN["examples"]]


def test_scores_are_those_of_the_e2e_challenge():
    got = metrics.generation(SAID, TRUE)
    want = GOLDEN["scores"]  # of 1, to four places
    assert got["bleu"] == pytest.approx(100 * want["BLEU"], abs=0.0051)
    assert got["nist"] == pytest.approx(want["NIST"], abs=5.1e-5)
    assert got["rouge_l"] == pytest.approx(100 * want["ROUGE_L"], abs=0.0051)
    assert got["cider"] == pytest.approx(want["CIDEr"], abs=5.1e-5)
    assert got["meteor"] == pytest.approx(100 * want["METEOR exact stem"], abs=0.0051)
    assert want["METEOR exact stem"] < want["METEOR"]  # synonyms and paraphrases


@pytest.mark.oracle
def test_rouge_l_of_equal_weights_is_the_package_of_its_name(monkeypatch):
    scorer = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = scorer.RougeScorer(["rougeL"])
    monkeypatch.setattr("jlora.metrics._captions._RECALL_WEIGHT", 1.0)
    plain = [(a, b[0]) for a, b in zip(SAID, TRUE, strict=True)]
    plain = [(a, b) for a, b in plain if not set(a + b) & set("£'&-(")]
    assert len(plain) > 3
    for said, true in plain:
        want = scorer.score(true, said)["rougeL"].fmeasure
        assert metrics.rouge_l([said], [true]) == pytest.approx(100 * want)


def test_case_counts_for_bleu_alone_and_only_where_asked():
    upper = [text.upper() for text in SAID]
    assert metrics.generation(upper, TRUE) == pytest.approx(
        metrics.generation(SAID, TRUE)
    )
    assert metrics.bleu(upper, TRUE) < metrics.bleu(SAID, TRUE)
    assert metrics.nist(upper, TRUE, lowercase=False) < metrics.nist(upper, TRUE)


@pytest.mark.parametrize("name", ["bleu", "nist", "meteor", "rouge_l", "cider", "chrf"])
def test_a_second_reference_helps_and_nothing_said_scores_nothing(name):
    def score(said, true):
        return metrics.generation(said, true, [name])[name]

    firsts = [refs[:1] for refs in TRUE]
    better = [[*refs[:1], said] for refs, said in zip(TRUE, SAID, strict=True)]
    assert score(SAID, better) > score(SAID, firsts) > 0
    assert score(SAID, [refs[0] for refs in TRUE]) == score(SAID, firsts)
    assert score([""] * len(SAID), TRUE) == 0
    best = {"nist": score(SAID, better), "cider": 10.0}.get(name, 100.0)
    assert score(SAID, SAID) <= best + 1e-9
    if name != "nist":
        assert score(SAID, SAID) == pytest.approx(best)


def test_meteor_takes_what_comes_in_one_piece():
    # All words match either way: "the" of the reference goes with the nearer one.
    said = ["red the cat sees the dog", "a red dog"]
    assert metrics.meteor(said[:1], ["the dog sees the red cat"]) < metrics.meteor(
        said[:1], ["red the cat sees a dog"]
    )
    assert metrics.meteor(["running dogs"], ["run dog"]) == pytest.approx(60.0)
    assert metrics.meteor(["a dog runs"], ["a dog runs"]) == 100.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It isn't £20-25 (cash).", "it is n't # 20-25 -lrb- cash -rrb-"),
        ("We cannot; they\u2019re Joe's!", "we can not they 're joe 's"),
        ("3.5 stars, 1,000 rooms...", "3.5 stars 1,000 rooms"),
        ('d\'oeuvre "Café" - kid-friendly', "d'oeuvre café kid-friendly"),
    ],
)
def test_words_of_captions_are_the_treebanks(text, words):
    assert treebank_words(text) == words.split()


def test_words_of_translations_are_mtevals():
    words = mteval_words("A&amp;B: 3-4, kid-friendly (1.5)!")
    assert " ".join(words) == "A & B : 3 - 4 , kid-friendly ( 1.5 ) !"


@pytest.mark.parametrize(
    ("said", "true", "message"),
    [
        (["a"], ["a", "b"], "1 predictions stand beside 2 references"),
        ("a", ["a"], "predictions are one string"),
        (["a", "b"], [["a"], []], "example 1 has no reference"),
        (["a", "b"], [["a"], ["", " "]], "example 1 has no reference"),
        (["a", None], ["a", "b"], "example 1 .* is no text"),
        ([], [], "no prediction"),
    ],
)
def test_what_is_no_pair_of_texts_is_an_error(said, true, message):
    for metric in (metrics.bleu, metrics.meteor, metrics.cider):
        with pytest.raises(DataError, match=message):
            metric(said, true)


def test_one_example_has_no_cider_and_an_unknown_metric_is_listed():
    with pytest.raises(DataError, match="pass two"):
        metrics.cider(["a dog"], ["a dog"])
    with pytest.raises(OptionError, match=r"'rouge'.*\n.*rouge_l"):
        metrics.generation(SAID, TRUE, ["rouge"])
