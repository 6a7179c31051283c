"""The example of data to text, run in process at few steps, and what lies beside it."""

import json
import re
import sys
from pathlib import Path

import pytest

from jlora import data, models, tasks

EXAMPLES = Path(__file__).parents[1] / "examples"
PLACES = EXAMPLES / "assets" / "places"
CHECKPOINT = EXAMPLES / "assets" / "tiny-gpt2-places"
sys.path.insert(0, str(EXAMPLES))

import make_places  # noqa: E402
import nlg_e2e as example  # noqa: E402

SMALL = ["--steps", "6", "--warmup", "1", "--train-size", "48", "--valid-size", "8"]
SMALL += ["--test-size", "5", "--beams", "2", "--buckets", "1", "--lr", "1e-2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of all three commands."""
    folder = tmp_path_factory.mktemp("run") / "nlg"
    assert example.main([*SMALL, "--output", str(folder)]) == 0
    return folder


def test_a_run_trains_says_and_scores(finished):
    rows = example.train.MetricsLog(finished / "metrics.jsonl").rows("valid")
    valid = [row["loss"] for row in rows]
    assert valid[-1] < valid[0] - 0.1
    said = [
        data.read_lines(finished / "outputs" / f"test.{when}.txt")
        for when in ("before", "after")
    ]
    assert len(said[0]) == len(said[1]) == 5
    assert said[0] != said[1]
    report = (finished / "report.md").read_text()
    for part in (
        "| metric | before | after |",
        "| BLEU |",
        "| CIDEr |",
        "loss.png",
        "c_attn",
        "c_fc",  # all-linear
    ):
        assert part in report
    assert (finished / "loss.png").stat().st_size > 10_000


def test_the_command_line_judges_such_a_run_as_the_example_did(finished, run):
    status, out, err = run("evaluate", finished, "--json")
    assert status == 0, err
    found = json.loads(out)["tests"]["test"]
    report = (finished / "report.md").read_text()
    for name, score in found.items():
        assert re.search(rf"\| {name} \| [\d.]+ \| {score:.2f} \|", report), name
    status, out, _ = run("evaluate", finished, "--limit", 2, "--num-beams", 1, "--json")
    assert json.loads(out)["tests"]["test"] != found


def test_a_finished_run_says_its_test_again_in_another_way(finished, capsys):
    words = ["infer", str(finished), "--beams", "1", "--test-size", "3"]
    assert example.main(words) == 0
    new = (finished / "outputs" / "test.after.txt").read_text()
    assert len(new.splitlines()) == 3
    capsys.readouterr()
    assert example.main(["evaluate", str(finished)]) == 0
    printed = capsys.readouterr().out
    assert "| beams | 1 |" in (finished / "report.md").read_text()
    assert "BLEU" in printed


def test_what_has_no_texts_yet_and_what_is_no_run_is_said(finished, tmp_path, capsys):
    (finished / "outputs" / "test.after.txt").rename(tmp_path / "kept")
    assert example.main(["evaluate", str(finished)]) == 2
    assert "has no texts yet: run `infer`" in capsys.readouterr().err
    (tmp_path / "kept").rename(finished / "outputs" / "test.after.txt")
    assert example.main(["infer", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_a_recipe_is_overridden_by_what_is_given():
    words = example.with_recipe(
        ["--recipe", "gpt2-medium", "--rank", "8", "--steps", "9"]
    )
    settings = example.train.read_settings(
        example.Settings, [*words, "--data", "somewhere"]
    )
    assert (settings.rank, settings.alpha, settings.steps) == (8, 32, 9)
    assert (settings.beams, settings.length_penalty, settings.no_repeat) == (10, 0.9, 4)
    assert settings.published["bleu"] == 70.4
    assert settings.schedule == "linear"
    assert example.with_recipe(["--rank", "2"]) == ["--rank", "2"]
    plain = example.train.read_settings(example.Settings, [])
    assert not plain.published


def test_the_corpus_is_what_its_script_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_places.py", "--output", str(tmp_path)])
    make_places.main()
    for file in PLACES.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name
    assert len(list(PLACES.iterdir())) == 6


def test_no_tested_meaning_is_trained_on():
    names = ["stay.train.csv", "stay.valid.csv", "stay.test.csv", "eat.train.csv.gz"]
    names += ["eat.test.csv"]
    texts = [m.text for name in names for m in tasks.read_meanings([PLACES / name])]
    assert len(set(texts)) == len(texts)
    for meaning in tasks.read_meanings([PLACES / "stay.test.csv"])[:20]:
        assert len(set(meaning.references)) == len(meaning.references)
        assert all("{" not in text and text[-1] == "." for text in meaning.references)


def test_the_checkpoint_is_small_and_knows_places_to_eat():
    sizes = [f.stat().st_size for f in [*CHECKPOINT.iterdir(), *PLACES.iterdir()]]
    assert sum(sizes) < 3_000_000
    model, params = models.load(CHECKPOINT)
    tokenizer = data.load_tokenizer(CHECKPOINT)
    places = tasks.read_meanings([PLACES / "eat.test.csv"])[:8]
    rows = data.tokenise(tokenizer, [p.prompt for p in places], 128).rows
    columns = {"input_ids": rows}
    batches = data.Batches(columns, data.shapes_for([columns], 1), 8, 0)
    answer = tasks.Generator(model, tokenizer, 48)
    said = batches.collect(lambda batch: answer(params, batch))
    for place, text in zip(places, said, strict=True):
        name = place.prompt.removeprefix("name : ").partition(" |")[0]
        assert text.endswith(".")
        assert name.split()[1] in text  # The Copper Kettle
