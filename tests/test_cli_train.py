"""`jlora train`: runs by files of settings, overridden, interrupted and resumed."""

import itertools
import json
import os
import signal
import sys
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest
from small_models import one_layer_t5

import jlora
from jlora import checkpoint, models, tasks, train
from jlora._options import read_file
from jlora.cli import _sources, _sweeping
from jlora.cli._commands import train as command

ROOT = Path(__file__).parents[1]
TINY = ROOT / "examples" / "assets" / "tiny-t5-de-en"
CORPUS = ROOT / "examples" / "assets" / "corpus"


@pytest.fixture
def config(tmp_path):
    """A file of settings for a T5 of one layer, which compiles fast."""
    one_layer_t5(TINY, tmp_path / "t5")
    lines = {
        "task": "translate",
        "model": str(tmp_path / "t5"),
        "rank": 2,
        "epochs": 3.0,
    }
    for name in ("train", "valid", "test"):
        lines[name] = [str(CORPUS / f"travel.{name}.{code}") for code in ("de", "en")]
    lines |= {"train_size": 64, "valid_size": 16, "test-size": 8, "batch_size": 16}
    lines |= {"buckets": 1, "eval_batch_size": 16, "eval_every": 2}
    file = tmp_path / "my.toml"
    file.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in lines.items()))
    return file


def test_a_run_is_interrupted_continued_and_made_longer(
    run, config, ctrl_c_at, monkeypatch
):
    folder = config.parent / "out"
    ctrl_c_at(2)
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/jlora"])
    words = ["--steps", 4, "--output", folder, "--targets", "query"]
    status, _, err = run("train", config, *words)
    monkeypatch.undo()
    assert status == 130
    assert "jlora: stopped and saved after step" in err
    assert f"jlora train --resume {folder}" in err
    saved = json.loads((folder / "settings.json").read_text())
    assert (saved["task"], saved["steps"], saved["epochs"]) == ("translate", 4, None)
    assert (saved["rank"], saved["targets"]) == (2, ["query"])

    status, _, err = run("train", "--resume", folder, "--rank", 3)
    assert status == 1
    assert "has --rank 2, not 3" in err
    status, out, _ = run("train", "--resume", folder, "--steps", 5)
    assert status == 0
    assert "Now use it" in out
    rows = train.MetricsLog(folder / "metrics.jsonl").rows("train")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    status, out, err = run("generate", folder, "Das Fass.", "--max-new-tokens", 3)
    assert (status, err) == (0, "")
    assert len(out.splitlines()) == 1


def settings(config, *words):
    options = command.read([str(config), *words], None, "jlora train")
    return command.read_task(options)


def test_words_override_the_file(config):
    name, got = settings(config, "--lr", "0.5", "--no-skip-empty")
    assert name == "translate"
    assert (got.rank, got.lr, got.epochs, got.test_size) == (2, 0.5, 3.0, 8)
    _, got = settings(config, "--steps", "7", "--rank", "5")
    assert (got.steps, got.epochs, got.rank) == (7, None, 5)


@pytest.mark.parametrize("name", sorted(tasks.KINDS))
def test_a_template_has_the_defaults_of_its_task(name, run):
    status, text, err = run("train", "--template", name)
    assert (status, err) == (0, "")
    values = tomllib.loads(text)
    assert values.pop("task") == name
    kind = tasks.KINDS[name].settings
    assert kind(**read_file(kind, values, "template")) == kind()


@pytest.mark.parametrize(
    ("text", "words", "status", "message"),
    [
        ('task = "translate"\nrnak = 3', [], 2, "'rnak' is no setting.\nDid you mean"),
        ('task = "translate"\nrank = 0', [], 2, "rank: '0' is not a whole number at"),
        ('task = "translat"', [], 2, "is no task.\nDid you mean 'translate'?"),
        ("rank = 3", [], 2, "names no task.\nBegin it with"),
        ("rank = = 3", [], 2, "is no TOML"),
        ('task = "translate"\nsteps = 3\nepochs = 2.0', [], 2, "exclude each other"),
        ('task = "translate"', ["--rnk", "3"], 2, "Did you mean --rank?"),
        ('task = "translate"', ["--resume"], 2, "--resume needs the folder of a run"),
        ('task = "translate"', [], 1, "--model needs data|a model is needed"),
    ],
)
def test_what_is_wrong_is_said(text, words, status, message, run, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(text)
    got, out, err = run("train", file, *words)
    assert (got, out) == (status, "")
    assert any(part in err for part in message.split("|")), err
    assert len(err.splitlines()) <= 3


def test_without_a_file(run, tmp_path):
    status, _, err = run("train")
    assert status == 2
    assert "CONFIG is missing" in err
    assert "--template translate" in err
    assert run("train", tmp_path / "none.toml")[0] == 2
    status, _, err = run("train", "--template", "translte")
    assert status == 2
    assert "Did you mean 'translate'?" in err
    folder = tmp_path / "other"
    (folder / "state").mkdir(parents=True)
    (folder / "settings.json").write_text('{"colour": "red"}')
    status, _, err = run("train", "--resume", folder)
    assert status == 2
    assert "is of no task of `jlora train`" in err
    status, text, _ = run("train", "c.toml", "--help")
    assert status == 2  # the file says which options there are


def test_help_of_a_files_task(run, config):
    status, text, err = run("train", config, "--help")
    assert (status, err) == (0, "")
    assert "usage: jlora train" in text
    assert "training:" in text
    assert "--rank N" in text
    assert jlora.__version__ not in text


# -- sweep -----------------------------------------------------------------------------


def members(config, **table):
    _, got = settings(config)
    return _sweeping.members_of(got, table)


def test_combinations_that_share_a_step(config):
    found = members(config, rank=[1, 2], batch_size=[8, 16], lr=[1e-3])
    assert [m.name for m in found] == [
        f"rank={r},batch_size={b},lr=0.001" for r in (1, 2) for b in (8, 16)
    ]
    groups = _sweeping.groups_of(found)
    assert [[m.settings.batch_size for m in group] for group in groups] == [
        [8, 8],
        [16, 16],
    ]
    found = members(config, init=["default", "pissa", "olora"], steps=[3])
    assert all(m.settings.epochs is None for m in found)
    assert [len(group) for group in _sweeping.groups_of(found)] == [1, 1, 1]
    assert [m.alone is None for m in found] == [True, False, False]
    with pytest.raises(
        jlora.OptionError, match="batch_size=15,accumulate=2: --batch-size 15"
    ):
        members(config, batch_size=[15], accumulate=[2])


def test_a_sweep_trains_together_or_alone_and_keeps_the_best(run, config):
    folder = config.parent / "grid"
    with config.open("a") as file:
        file.write('[sweep]\ninit = ["default", "pissa"]\nlr = [1e-2]\n')
    argv = ["sweep", config, "--steps", 2, "--rank", 1, "--output", folder]
    status, out, err = run(*argv, "--json")
    assert status == 0
    assert "init=pissa,lr=0.01: by itself, for its start shifts the base" in err
    rows = json.loads(out)
    assert rows == json.loads((folder / "results.json").read_text())
    assert [row["loss"] for row in rows] == sorted(row["loss"] for row in rows)
    assert {(r["values"]["init"], r["together"], r["steps"]) for r in rows} == {
        ("default", 1, 2),
        ("pissa", 1, 2),
    }
    (shifted,) = [row for row in rows if row["values"]["init"] == "pissa"]
    _, base = models.load(config.parent / "t5")
    tree = checkpoint.load_adapter(shifted["adapter"], base)  # though it shifted it
    found = jax.tree.leaves(tree, is_leaf=jlora.is_node)
    assert {x.adapters[""].rank for x in found if jlora.is_node(x)} == {2}
    saved = json.loads((folder / "settings.json").read_text())
    assert (saved["task"], saved["init"]) == ("translate", rows[0]["values"]["init"])
    source = _sources.find(str(folder))
    assert source.model == str(folder / "merged")
    assert source.prefix == "translate German to English: "
    pair = _sources.load(source).params, models.load(config.parent / "t5")[1]
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), *pair)
    attention = moved["encoder"]["block"]["0"]["layer"]["0"]["SelfAttention"]
    assert attention["q"]["kernel"]
    assert not attention["k"]["kernel"]
    status, _, err = run(*argv)
    assert (status, "holds another run" in err) == (1, True)


@pytest.mark.filterwarnings("always::jlora.JloraWarning")
def test_what_diverged_by_itself_is_not_tried_again(run, config):
    folder = config.parent / "grid"
    with config.open("a") as file:
        file.write('[sweep]\ninit = ["pissa"]\nlr = [3e38, 1e-2, 1e38]\n')
    status, out, err = run("sweep", config, "--steps", 2, "--output", folder, "--json")
    assert status == 0
    assert "init=pissa,lr=1e+38: its last validation loss is not finite" in err
    rows = json.loads(out)
    assert rows[0]["loss"] > 0
    lost = [(r["values"]["lr"], r["loss"], r["adapter"]) for r in rows[1:]]
    assert lost == [(3e38, None, None), (1e38, None, None)]
    status, out, err = run("sweep", "--resume", folder, "--json")
    assert status == 0
    assert "init=pissa,lr=1e+38: by itself" not in err
    assert without(json.loads(out), "seconds") == without(rows, "seconds")


@pytest.mark.parametrize(
    ("table", "status", "message"),
    [
        ("", 1, "no table of what to vary"),
        ("[sweep]\nrnk = [1]", 1, "[sweep] cannot vary 'rnk'"),
        ("[sweep]\nmodel = ['a']", 1, "[sweep] cannot vary 'model'"),
        ("[sweep]\nrank = 3", 1, "[sweep] rank is no list"),
        ("[sweep]\nrank = [3, 0]", 2, "rank: '0' is not a whole number at least 1"),
    ],
)
def test_tables_that_are_none(table, status, message, run, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(f'task = "translate"\n{table}\n')
    got, out, err = run("sweep", file)
    assert (got, out) == (status, "")
    assert message in err


@pytest.fixture
def ctrl_c_in_sweep(monkeypatch):
    """A function: a sweep's bar gets Ctrl-C when it has moved so often."""
    from jlora.sweep._progress import Progress

    def at(stop):
        made, say = itertools.count(1), Progress.say

        def interrupt(self, running, waiting):
            if next(made) == stop:
                os.kill(os.getpid(), signal.SIGINT)
            say(self, running, waiting)

        monkeypatch.setattr(Progress, "say", interrupt)

    return at


def without(rows, *names):
    return [{k: v for k, v in row.items() if k not in names} for row in rows]


def test_a_sweep_is_interrupted_and_goes_on(
    run, config, ctrl_c_in_sweep, ctrl_c_at, monkeypatch
):
    """In runs that share a step, then in one by itself: the same end."""
    with config.open("a") as file:
        file.write('[sweep]\nrank = [2]\ninit = ["default", "pissa"]\n')
    argv = ["sweep", config, "--steps", 3, "--eval-every", 3, "--json"]
    status, out, _ = run(*argv, "--output", config.parent / "whole")
    assert status == 0
    want = json.loads(out)

    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/jlora"])
    cut = config.parent / "cut"
    ctrl_c_in_sweep(2)
    status, out, err = run(*argv, "--output", cut)
    assert (status, out) == (130, "")
    assert "stopped and saved after 0 of 2 runs. To continue" in err
    again = f"jlora sweep --resume {cut}"
    assert again in err
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/jlora"])
    ctrl_c_at(2)  # of the run that begins with PiSSA
    status, _, err = run(*again.split()[1:])
    assert status == 130
    assert "after 1 of 2 runs. To continue" in err
    assert again in err
    monkeypatch.undo()
    status, out, _ = run(*again.split()[1:], "--json")
    assert status == 0
    got = json.loads(out)
    assert without(got, "seconds", "adapter") == without(want, "seconds", "adapter")
    assert all((Path(row["adapter"]) / "config").is_dir() for row in got)
    pair = [
        models.load(config.parent / name / "merged")[1] for name in ("whole", "cut")
    ]
    jax.tree.map(np.testing.assert_array_equal, *pair)

    # One that has ended is read again, and asked for nothing else.
    logs = {file: file.read_text() for file in cut.glob("state/**/*.jsonl")}
    status, out, _ = run(*again.split()[1:], "--json")
    assert status == 0
    assert without(json.loads(out), "seconds") == without(got, "seconds")
    assert len(logs) == 2
    assert logs == {file: file.read_text() for file in logs}
    for words, said in (
        (["--steps", 9], "--steps: a sweep that is resumed ends as it was begun"),
        (["--rank", 9], "--rank: the table [sweep] says this already"),
        (["--alpha", 9], "has --alpha as it is by default, not 9.0"),
    ):
        status, _, err = run("sweep", "--resume", cut, *words)
        assert status != 0
        assert said in err
    status, _, err = run("train", "--resume", cut)
    assert (status, f"jlora sweep --resume {cut}" in err) == (2, True)


def test_what_is_streamed_in_packed_rows(run, config, ctrl_c_at, monkeypatch):
    """Interrupted and continued, with a worker process: the same end."""
    folder = config.parent
    lines = [
        (CORPUS / f"travel.train.{c}").read_text().splitlines() for c in ("de", "en")
    ]
    file = folder / "train.jsonl"
    rows = [json.dumps({"de": de, "en": en}) for de, en in zip(*lines, strict=True)]
    file.write_text("\n".join(rows[:90]))
    words = ["--train", file, "--steps", 5, "--streaming", "--pack", "--batch-size", 4]
    words += ["--max-source-length", 48, "--max-target-length", 40, "--eval-every", 9]
    kept = "".join(
        line for line in config.read_text().splitlines(True) if "train_size" not in line
    )
    config.write_text(kept)
    status, out, err = run("train", config, *words, "--output", folder / "whole")
    assert (status, err.count("Error")) == (0, 0)
    assert "beside the first waited" in out
    ctrl_c_at(2)
    cut = [*words, "--workers", 1, "--output", folder / "cut"]
    assert run("train", config, *cut)[0] == 130
    monkeypatch.undo()
    assert run("train", "--resume", folder / "cut", "--workers", 0)[0] == 0
    one, two = (
        train.MetricsLog(folder / name / "metrics.jsonl").rows("train")
        for name in ("whole", "cut")
    )
    assert [row["step"] for row in one] == [1, 2, 3, 4, 5]
    assert [row["loss"] for row in one] == [row["loss"] for row in two]


def test_streams_that_are_not_to_be(run, config):
    for words, message in (
        (["--streaming"], "--streaming needs --steps"),
        (["--streaming", "--steps", 2], "--train-size chooses from text in memory"),
        (["--workers", 2], "--workers are for --streaming"),
    ):
        status, _, err = run("train", config, *words)
        assert status != 0
        assert message in err
