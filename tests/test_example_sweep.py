"""The example of a grid, at few pairs; and what a grid's runs speak for."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jlora
from jlora import checkpoint, models, sweep, tasks, train

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import lora_sweep as example  # noqa: E402

SMALL = {"ranks": [3], "batch_sizes": [5], "train_size": 15, "valid_size": 7,
         "test_size": 2}  # fmt: skip


def test_the_example_at_few_pairs(tmp_path, capsys):
    folder = tmp_path / "out"
    flags = ["--one-by-one", "--output", str(folder)]
    for name, value in SMALL.items():
        words = value if isinstance(value, list) else [value]
        flags += [f"--{name.replace('_', '-')}", *map(str, words)]
    assert example.main(flags) == 0
    told = capsys.readouterr().out
    assert "trained together" in told
    assert float(told.split("losses apart: at most ")[1].split(",")[0]) < 1e-4
    report = (folder / "report.md").read_text()
    assert "| rank | batch | steps | time | alone |" in report
    for name in ("loss_by_rank.png", "time_by_batch.png", "heat_map.png"):
        assert f"]({name})" in report
        assert (folder / name).stat().st_size > 10_000
    _, merged = models.load(folder / "merged")
    _, base = models.load(EXAMPLES / "assets/tiny-t5-de-en")
    best = checkpoint.load_adapter(folder / "adapter", base)
    assert any(np.abs(x).max() > 0 for x in jax.tree.leaves(jlora.split(best)[0]))
    want = jlora.merge(best)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), merged, want)
    # what a resumed grid finds there is read, and not trained again
    settings = example.Settings(**SMALL)
    task = tasks.Translation(settings.text, settings.text.load(settings.model))
    with train.RunFolder.resume(folder) as run:
        group = example.Group(settings, task, "query,value", 5)
        (again,) = group.together(base, run)
    (first,) = json.loads(
        (folder / "state/query,value-5/time.json").read_text()
    ).values()
    assert again.seconds == first
    assert again.result.steps == 3
    jax.tree.map(np.testing.assert_array_equal, jlora.merge(again.result.params), want)
    assert example.main(["--ranks", "2", "2"]) == 2
    assert "--ranks has a value twice" in capsys.readouterr().err
    assert len((EXAMPLES / "lora_sweep.py").read_text().splitlines()) <= 276


def run_of(rank, batch, loss, seconds=2.0, **job):
    job = sweep.Job(name=f"{rank}-{batch}", rank=rank, alpha=2.0 * rank, **job)
    steps = 128 // batch
    losses = np.full(steps, loss, np.float32)
    result = sweep.Result(job, "done", steps, losses, [(steps, loss)])
    return tasks.GridRun(result, batch, "query,value", seconds, score=10 / loss)


def test_a_grid_speaks_for_what_was_measured(tmp_path):
    grid = tasks.Grid([
        run_of(1, 8, 1.5), run_of(4, 8, 1.01), run_of(16, 8, 1.0),
        run_of(1, 64, 2.0, 1.0), run_of(4, 64, 1.2, 1.0),
        run_of(16, 64, float("nan"), 1.0),
    ])  # fmt: skip
    said = " ".join(grid.advice())
    assert "Best: rank 16, alpha 32, batches of 8" in said
    assert "Rank 4 is enough: its loss, 1.010, is within 2% of the best, with 4/16" in said  # fmt: skip
    assert "Batches of 64: at best 1.200 after 2 steps (batches of 8: 16), in 0.50" in said  # fmt: skip
    assert "larger batches make fewer steps" in said
    assert "best rank is the largest that was tried" in said
    assert "best alpha" not in said  # it goes with the rank
    head, *rows = grid.table()
    assert head == ("rank", "batch", "alpha", "steps", "time", "final loss",
                    "validation loss", "BLEU")  # fmt: skip
    assert rows[1] == ("4", "8", "8", "16", "2.0 s", "1.010", "1.010", "9.9")
    assert rows[-1][-3:] == ("done", "", "")
    assert all(file.exists() for file in grid.draw(tmp_path, 3.0))
    small = tasks.Grid([run_of(1, 8, 1.0), run_of(4, 8, 1.1)]).advice()
    assert "The best rank is the smallest" in " ".join(small)
    assert "enough" not in " ".join(small)
    with pytest.raises(jlora.NonFiniteError, match="no run with rank 3 ended"):
        grid.best(rank=3)
    with pytest.raises(jlora.OptionError, match="no runs"):
        tasks.Grid([])
