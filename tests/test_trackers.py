"""Logging to TensorBoard and Weights & Biases: every row once, resumed where it was."""

import struct
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_fit import Stream

import jlora
from jlora import train


def fit(run, steps):
    tree = jlora.lorafy({"w": {"kernel": jnp.ones((3, 2))}}, 1, ["w"])

    def loss_fn(params, batch, key):
        return jnp.mean((batch["x"] @ params["w"]["kernel"] - batch["y"]) ** 2)

    return train.fit(
        loss_fn, tree, optax.sgd(0.1), Stream(), run, steps=steps, log_every=2,
        eval_every=4, valid=[Stream().batch(99)], key=jax.random.key(0),
    )  # fmt: skip


def logged(run):
    """What the log says, as `(name, step) -> value`."""
    return {
        (f"{row['event']}/{name}", row["step"]): value
        for row in run.metrics.rows()
        for name, value in row.items()
        if name not in ("event", "step")
    }


def scalars(folder):
    """The scalars in a folder's event files, which are TFRecords of protobufs."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(folder.iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
            at += 12 + size + 4
    return found


def check(found, run):
    """Every row once; nothing else."""
    wanted = logged(run)
    assert len(found) == len(wanted)
    for name, step, value in found:
        np.testing.assert_allclose(value, wanted[name, step], rtol=1e-6)
    assert ("valid/loss", 0) in wanted
    assert {s for n, s in wanted if n == "train/loss"} == {2, 4, 6, 8}


def in_two_parts(tmp_path, name):
    settings = {"log_to": [name], "rank": 1}
    with train.RunFolder.claim(tmp_path / "run", settings) as run:
        fit(run, 4)
    with train.RunFolder.resume(tmp_path / "run") as run:
        fit(run, 8)
    return run


def test_tensorboard_holds_what_the_log_does(tmp_path):
    run = in_two_parts(tmp_path, "tensorboard")
    check(scalars(run.path / "tensorboard"), run)


class FakeRun:
    def __init__(self, given):
        self.given, self.rows, self.finished = given, [], False
        self.id = given["id"] or "made-by-wandb"

    def log(self, values, step):
        assert not self.finished
        self.rows.append((values, step))

    def finish(self):
        self.finished = True


def test_weights_and_biases_gets_the_same_and_one_run(tmp_path, monkeypatch):
    runs = []
    init = lambda **given: runs.append(FakeRun(given)) or runs[-1]
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    run = in_two_parts(tmp_path, "wandb")
    check([(k, s, v) for r in runs for row, s in r.rows for k, v in row.items()], run)
    steps = [step for r in runs for _, step in r.rows]
    assert steps == sorted(steps)
    first, second = runs
    assert (first.given["id"], first.given["resume"]) == (None, None)
    assert (second.given["id"], second.given["resume"]) == ("made-by-wandb", "allow")
    assert first.given["config"]["rank"] == 1
    assert all(r.finished for r in runs)


@pytest.mark.parametrize(
    ("name", "library"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")]
)
def test_what_is_missing_is_named_before_training(name, library, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with (
        train.RunFolder.claim(tmp_path / "run", {"log_to": [name]}) as run,
        pytest.raises(jlora.OptionError, match=rf'pip install "jlora\[{name}\]"'),
    ):
        fit(run, 2)
    assert not run.metrics.rows()
