"""The example of ranks and rates: its sweep is the runs that it stands for."""

import pathlib
import sys

import jax
import numpy as np
import optax
import pytest

import jlora
from jlora import sweep, train

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import rank_and_rate

    yield rank_and_rate
    sys.modules.pop("rank_and_rate")


def test_the_sweep_ends_where_a_run_alone_does(example):
    e = example.Experiment(steps=3)
    e.valid = e.valid[:2]
    job = sweep.Job(name="one", rank=2, alpha=4, learning_rate=1e-2)
    (swept,) = e.adapters([job], ["query"])

    tx = optax.adam(e.schedule(job.learning_rate))
    tree = job.lorafy(e.params, targets=["query"])
    state = train.TrainState.create(tree, tx, job.key)
    step = train.make_train_step(e.loss_fn, tx, clip_norm=example.CLIP)
    for _, batch in zip(range(e.steps), e.train.stream(), strict=False):
        state, _ = step(state, batch)
    loss = jax.jit(e.loss_fn)
    merged = jlora.merge(state.params)
    sums = [loss(merged, batch, None) for batch in e.valid]
    alone = sum(float(s[0]) for s in sums) / sum(float(s[1]) for s in sums)
    np.testing.assert_allclose(swept, alone, rtol=1e-4)


def test_a_table_marks_the_best_of_each_row(example, capsys):
    example.table("title", {"rank 1": [2.0, 1.5], "rank 4": [1.0, 9.0]}, (1e-3, 1e-2))
    assert capsys.readouterr().out.splitlines()[1:] == [
        "| title | 0.001 | 0.01 |",
        "|---|---|---|",
        "| rank 1 | 2.000 | **1.500** |",
        "| rank 4 | **1.000** | 9.000 |",
    ]
