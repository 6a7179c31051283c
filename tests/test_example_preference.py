"""The conversations, preferences and tokenizer beside the examples."""

import importlib.util
import json
import re
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
CHAT = EXAMPLES / "assets" / "chat"


def script(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


maker = script("make_tiny_chat")


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
