"""The README's code runs, in order, and says what it prints."""

import pathlib
import re

import pytest

README = pathlib.Path(__file__).parent.parent / "README.md"


def blocks(language):
    text = README.read_text()
    return re.findall(rf"^```{language}\b *(\w*)\n(.*?)^```", text, re.M | re.S)


def test_the_code_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    code = [block for label, block in blocks("python") if label != "norun"]
    assert len(code) >= 7
    for block in code:
        exec(compile(block, "README.md", "exec"), names)
        if "params = jlora.lorafy(params" in block:
            summary = str(names["jlora"].summary(names["params"]))
            assert summary in README.read_text()
    assert "lost to rounding" in capsys.readouterr().out


@pytest.mark.parametrize("label", ["main", "test"])
def test_the_two_commands_are_there(label):
    (command,) = [block for name, block in blocks("bash") if name == label]
    extra = {"main": "train", "test": "test"}[label]
    assert f'pip install -q -e ".[{extra}]"' in command
