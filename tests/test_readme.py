"""The README's code runs, in order, and says what it prints."""

import pathlib
import re
import shlex

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"


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


def test_the_console_runs(tmp_path, monkeypatch, capsys):
    """After the example at the top: its adapter lies where its first run puts it."""
    import jlora
    from jlora import checkpoint, cli, models

    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    _, params = models.load("examples/assets/tiny-t5-de-en")
    tree = jlora.lorafy(params, 2, ["query", "value"])
    checkpoint.save_adapter("runs/translate-1/adapter", tree)
    (block,) = [block for name, block in blocks("bash") if name == "console"]
    lines = block.replace("\\\n", " ").splitlines()
    assert len(lines) == 5
    for line in lines:
        command, *argv = shlex.split(line)
        assert command == "jlora"
        assert cli.main(argv) == 0, line
    out, err = capsys.readouterr()
    assert err == ""
    assert '"task": "SEQ_2_SEQ_LM"' in out
    found = checkpoint.load_adapter("out/back", params)
    for x, y in zip(*map(jax.tree.leaves, (found, tree)), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
