"""The example of chats and preferences: its settings, its data, and how it measures."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from jlora import data

EXAMPLES = Path(__file__).parents[1] / "examples"
CHAT = EXAMPLES / "assets" / "chat"


def script(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


example, maker = script("preference"), script("make_tiny_chat")


def test_the_script_makes_the_data_that_lies_there(tmp_path):
    maker.write_chats(tmp_path)
    for file in sorted(CHAT.iterdir()):
        assert (tmp_path / file.name).read_text() == file.read_text(), file.name


def test_the_tokenizer_is_the_one_that_the_script_makes(tmp_path):
    maker.make_tokenizer().save_pretrained(tmp_path)
    there = EXAMPLES / "assets" / "tiny-chat"
    made, kept = (
        json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
        for folder in (tmp_path, there)
    )
    assert made == kept
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        assert (tmp_path / name).read_text() == (there / name).read_text()


def test_held_out_countries_are_in_neither_training_set():
    names = {country["name"] for country in maker.countries()[-maker.HELD_OUT :]}
    assert len(names) == 10
    for kind in ("sft", "preferences"):
        text = (CHAT / f"{kind}.train.jsonl").read_text()
        assert not [name for name in names if re.search(rf"\b{name}\b", text)]
        tested = (CHAT / f"{kind}.test.jsonl").read_text()
        assert [name for name in names if name in tested] == list(names)


def test_answers_are_measured_by_statement_and_tone():
    pairs = data.read_preferences(CHAT / "preferences.test.jsonl")
    for pair in pairs:
        chosen, rejected = (x[0].content for x in (pair.chosen, pair.rejected))
        for answer, polite in ((chosen, 1), (rejected, 0)):
            assert example.is_true(answer, chosen) == 1
            assert example.is_polite(answer, chosen) == polite
    other = pairs[0].chosen[0].content
    assert example.is_true(other, pairs[40].chosen[0].content) == 0


@pytest.mark.parametrize("words", ["", "sft", "dpo --model x"])
def test_what_is_missing_is_embedded(words, monkeypatch, capsys):
    asked = []
    for name in ("sft", "dpo", "both"):
        monkeypatch.setattr(example, name, asked.append)
    assert example.main(words.split()) == 0
    (settings,) = asked
    if words:
        own = settings.complete()
        assert Path(own.train[0]).exists()
        assert own.ask == 80
        assert own.model == ("x" if "dpo" in words else example.EMBEDDED)
        assert example.measures(own).keys() == {"true", "polite"}


def test_one_s_own_settings_stay(monkeypatch):
    asked = []
    monkeypatch.setattr(example, "sft", asked.append)
    words = ["sft", "--model", "m", "--train", "t.jsonl", "--steps", "7", "--pack"]
    assert example.main(words) == 0
    own = asked[0].complete()
    assert (own.model, own.train, own.steps, own.lr) == ("m", ["t.jsonl"], 7, None)
    assert not example.measures(own)
    assert example.main(["sft", "--steps", "7"]) == 0
    assert (asked[1].complete().steps, asked[1].complete().lr) == (7, 3e-3)


def test_dpo_goes_on_with_a_model(capsys):
    assert example.main(["dpo"]) == 2
    assert "the `merged` folder that sft leaves" in capsys.readouterr().err
