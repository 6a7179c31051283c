"""The README's code runs, in order, and says what it prints."""

import json
import pathlib
import re
import shlex

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"


def blocks(language, page=README):
    text = page.read_text()
    return re.findall(rf"^```{language}\b *(\w*)\n(.*?)^```", text, re.M | re.S)


def test_the_code_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    code = [block for label, block in blocks("python") if label != "norun"]
    assert len(code) == 3
    for block in code:
        exec(compile(block, "README.md", "exec"), names)
        if "params = jlora.lorafy(params" in block:
            summary = str(names["jlora"].summary(names["params"]))
            assert summary in README.read_text()


def test_the_numbers_are_those_of_the_results():
    def value(file, column, **where):
        rows = json.loads((ROOT / f"benchmarks/results/{file}.json").read_text())[
            "rows"
        ]
        (found,) = [row for row in rows if where.items() <= row.items()]
        return found[column]

    small = "t5-small 8x64/64, float32, r8, query value"
    ours, theirs = {"contender": "jlora"}, {"contender": "PEFT"}
    full = {"contender": "full fine-tuning", "case": small}
    step = value("step_time", "median_ms", case=small, **ours)
    step /= value("step_time", "median_ms", **full)
    base = {"case": "t5-base 8x64/64, bfloat16, r8, query value"}
    numbers = [
        f"takes {value('step_time_peers', 'to_floor', **ours):.2f} of the time",
        f"with PEFT {value('step_time_peers', 'to_floor', **theirs):.2f};",
        f"it takes {step:.2f}.",
        f"{value('text', 'to_peft', **ours):.1f} times as many tokens",
        f"at {value('memory', 'peak_mib', case=small, **ours):.0f} MiB",
        f"takes {value('memory', 'peak_mib', **full):,.0f};",
        f"at {value('memory_h100', 'peak_mib', **ours, **base):.0f} MiB",
    ]
    text = " ".join(README.read_text().split())
    assert [number for number in numbers if number not in text] == []


def test_it_is_short_and_its_links_lead_somewhere():
    text = README.read_text()
    assert len(text.splitlines()) < 200
    links = re.findall(r"\]\(([^):#]+)\)", text)
    assert len(links) > 20
    assert [link for link in links if not (ROOT / link).exists()] == []


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
    commands = blocks("bash", ROOT / "docs" / "reference" / "console.md")
    (block,) = [block for name, block in commands if name == "console"]
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
