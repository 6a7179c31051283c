"""Real processes that train one run together: as one process does, on any number."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from small_models import one_layer_t5

from jlora import models, sharding
from jlora._errors import OptionError, ProcessError
from jlora.sharding._distributed import VARIABLES, Place, place_of

ASSETS = Path(__file__).parents[1] / "examples" / "assets"
TINY, CORPUS = ASSETS / "tiny-t5-de-en", ASSETS / "corpus"

# Run by each process with the number of the last step and what else it is to do.
SCRIPT = """
import dataclasses, json, sys
from pathlib import Path

where, folder, steps, resume, axes = sys.argv[1:]
from jlora import checkpoint, data, sharding, train

if where != "alone":
    sharding.initialize(where, timeout=60)
import jax, numpy as np, optax
import jlora

rng = np.random.default_rng(0)
base = {
    "embed": {"embedding": jax.numpy.asarray(rng.normal(0, 1, (13, 6)), np.float32)},
    "out": {"kernel": rng.normal(0, 1, (6, 4)).astype(np.float32)},
}
rules = [("embedding$", jax.sharding.PartitionSpec()),
         ("kernel$", jax.sharding.PartitionSpec(
             "fsdp" if "fsdp" in axes else None, None))]
mesh = sharding.make_mesh(axes)
tree = jlora.lorafy(sharding.place(base, mesh, rules), 2, ["out"], init="gaussian")


def loss_fn(params, batch, key):
    x = params["embed"]["embedding"][batch["input_ids"]].mean(1)
    logits = jax.nn.log_softmax(x @ params["out"]["kernel"])
    labels = batch["labels"]
    counted = labels >= 0
    picked = jax.numpy.take_along_axis(logits, labels[:, None] * counted[:, None], 1)
    weight = counted.sum()
    return -(picked[:, 0] * counted).sum() / jax.numpy.maximum(weight, 1), {
        "weight": weight.astype(jax.numpy.float32), "seen": weight}


def columns(count, seed):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(1, 13, n).astype(np.int32) for n in rng.integers(2, 6, count)]
    return {"input_ids": rows, "labels": rng.integers(0, 4, count)}


shard = sharding.batch_shard(mesh)
# 22 examples in batches of 8 and 11 in batches of 4: the last ones are not full.
batches = data.Batches(columns(22, 1), [(5,)], 8, 0, 0, shard=shard)
valid = data.Batches(columns(11, 2), [(5,)], 4, 0, shard=shard)


class Seen(train.Callback):
    weights = []

    def on_step(self, loop, step, metrics):
        self.weights.append(metrics["weight"])


claim = train.RunFolder.resume if resume == "resume" else train.RunFolder.claim
with claim(folder, {"seed": 1}) as run:
    fit = train.fit(loss_fn, tree, optax.adam(0.05), batches, run, steps=int(steps),
                    valid=valid, eval_every=2, log_every=1, mesh=mesh,
                    count=lambda batch: len(batch["labels"]), callbacks=[Seen()])
print(json.dumps({"best": fit.best_loss, "first": fit.first_loss, "weights": Seen.weights,
                  "shard": shard}))
"""
FLAGS = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count="


def start(words, devices=1, **more):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{FLAGS}{devices}",
    }
    for name in VARIABLES:
        environment.pop(name, None)
    return subprocess.Popen(
        [sys.executable, *map(str, words)], env=environment | more, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ended(running, timeout=150):
    """What processes printed, and their errors, when all have ended well."""
    try:
        said = [process.communicate(timeout=timeout) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [p.returncode for p in running] == [0] * len(running), said
    return said


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def by_slurm(count):
    """What SLURM tells each of so many processes on one host."""
    common = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(count),
    }
    return [
        {**common, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}
        for i in range(count)
    ]


def by_open_mpi(count):
    """What Open MPI 4 tells them."""
    job = 4096 * (os.getpid() + 1)
    common = {
        "OMPI_MCA_orte_hnp_uri": f"{job}.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": str(count),
    }
    return [
        {**common, "OMPI_COMM_WORLD_RANK": str(i), "OMPI_COMM_WORLD_LOCAL_RANK": str(i)}
        for i in range(count)
    ]


def trains(folder, count, steps, resume=False, axes="data=-1", devices=1):
    """Train by so many processes; return what each came to."""
    port, go = free_port(), "resume" if resume else "new"
    places = [f"localhost:{port},{count},{i}" for i in range(count)]
    places = places if count > 1 else ["alone"]
    words = [["-c", SCRIPT, place, folder, steps, go, axes] for place in places]
    said = ended([start(w, devices) for w in words])
    for out, errors in said[1:]:
        own = [line for line in out.splitlines() if not line.startswith("[Gloo]")]
        assert len(own) == 1  # what the script prints, and nothing else
        assert "train:" not in errors
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


def rows(folder, event):
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == event]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process with whole batches."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    (came_to,) = trains(folder, 1, 8)
    return folder, came_to


def check_same(folder, results, alone):
    """The same losses to 1e-5 of their size, of the same examples, written once."""
    other, one = alone
    for event in ("train", "valid"):
        mine, theirs = (
            rows(folder, event),
            rows(other, event)[: len(rows(folder, event))],
        )
        assert [row["step"] for row in mine] == [row["step"] for row in theirs]
        np.testing.assert_allclose(
            [row["loss"] for row in mine], [row["loss"] for row in theirs], 1e-5
        )
    for result in results:
        np.testing.assert_allclose(result["first"], one["first"], 1e-5)
        assert result["best"] == results[0]["best"]


def test_two_then_one_then_four_then_two_train_as_one_does(alone, tmp_path):
    run, weights = tmp_path / "run", []
    for count, steps in ((2, 2), (1, 4), (4, 6), (2, 8)):
        results = trains(run, count, steps, resume=steps > 2)
        assert [r["shard"] for r in results] == [[i, count] for i in range(count)]
        assert all(r["weights"] == results[0]["weights"] for r in results)
        weights += results[0]["weights"]
        check_same(run, results, alone)
    # Of 22 examples 8, 8 and the 6 that are left: none is lost or seen twice.
    assert weights == alone[1]["weights"]
    assert sorted(weights[:3]) == sorted(weights[3:6]) == [6, 8, 8]
    np.testing.assert_allclose(results[0]["best"], alone[1]["best"], 1e-5)


@pytest.mark.parametrize(
    ("axes", "parts"), [("data=1,tensor=4", 1), ("fsdp=2,tensor=2", 2)]
)
def test_processes_that_hold_the_same_examples_read_the_same(
    axes, parts, alone, tmp_path
):
    results = trains(tmp_path / "run", 2, 2, axes=axes, devices=2)
    assert [r["shard"] for r in results] == [[i % parts, parts] for i in range(2)]
    check_same(tmp_path / "run", results, alone)


FAULTS = """
import json, sys
from pathlib import Path

where, folder = sys.argv[1], Path(sys.argv[2])
from jlora import sharding, train

sharding.initialize(where, timeout=60)
import jax

index, said = jax.process_index(), []


def attempt(work):
    try:
        work()
        said.append("nothing")
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")


attempt(lambda: sharding.initialize(where))
attempt(lambda: train.RunFolder.claim(folder / "a", {"rank": 8, "seed": index}))
folder.joinpath("b").mkdir(exist_ok=True)
folder.joinpath("b", "own").write_text("")
attempt(lambda: train.RunFolder.claim(folder / "b", {}))
attempt(lambda: train.RunFolder.claim(folder / "c", {}).close())
attempt(lambda: sharding.batch_shard(
    sharding.make_mesh("data=2", devices=jax.devices()[2:])))
attempt(lambda: sharding.batch_shard(jax.sharding.Mesh(
    [jax.devices()[i] for i in (0, 2, 1, 3)], ("data",))))
folder.joinpath(f"said-{index}.json").write_text(json.dumps(said))
"""


def test_what_goes_wrong_is_told_by_every_process(tmp_path):
    running = [
        start(["-c", FAULTS, "auto", tmp_path], 2, **of) for of in by_open_mpi(2)
    ]
    ended(running)
    both = [json.loads((tmp_path / f"said-{i}.json").read_text()) for i in (0, 1)]
    for index, said in enumerate(both):
        assert "met already" in said[0]
        other = f"process {index} was started with other settings than process"
        assert f"{other} {1 - index}: seed" in said[1]
        assert "exists and is no run" in said[2]
        assert said[3] == "nothing"
        assert "does not give each process one part" in said[5]
    assert "has no device of process 0" in both[0][4]
    assert both[1][4] == "nothing"


def test_a_whole_task_is_written_and_shown_by_the_first(tmp_path):
    params = one_layer_t5(TINY, tmp_path / "t5")
    corpus = {
        name: [str(CORPUS / f"travel.{name}.{code}") for code in ("de", "en")]
        for name in ("train", "valid", "test")
    }
    # Of 18 and 7 examples the last batches are not full, and one does not divide.
    lines = {
        "task": "translate",
        "model": str(tmp_path / "t5"),
        **corpus,
        "rank": 2,
        "steps": 2,
        "batch_size": 8,
        "buckets": 1,
        "eval_batch_size": 8,
        "train_size": 32,
        "valid_size": 18,
        "test_size": 7,
        "beams": 1,
        "max_source_length": 24,
        "max_target_length": 8,
    }
    file = tmp_path / "my.toml"
    file.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in lines.items()))
    words = ["-m", "jlora", "train", file, "--output", tmp_path / "run"]
    words += ["--distributed", "auto"]
    (out, err), (other, errors) = ended([start(words, **of) for of in by_slurm(2)])
    assert "Now use it" in out
    assert "train: 100%" in err
    assert [x for x in other.splitlines() if not x.startswith("[Gloo]")] == []
    assert errors == ""
    run = tmp_path / "run"
    assert [row["step"] for row in rows(run, "train")] == [1, 2]
    for when in ("before", "after"):
        lines = (run / "outputs" / f"test.{when}.txt").read_text().splitlines()
        assert len(lines) == 7
    assert "2 (cpu), data=2" in (run / "report.md").read_text()
    settings = json.loads((run / "settings.json").read_text())
    assert "distributed" not in settings  # it may be another when the run goes on
    with jax.default_device(jax.devices()[0]):
        merged = models.load(run / "merged")[1]
    assert jax.tree.structure(merged) == jax.tree.structure(params)


def test_a_fault_that_all_find_is_said_by_each_and_ends_all(tmp_path):
    file = tmp_path / "my.toml"
    model, absent = json.dumps(str(TINY)), json.dumps(str(tmp_path / "no.tsv"))
    file.write_text(f'task = "translate"\nmodel = {model}\ntrain = [{absent}]\n')
    words = ["-m", "jlora", "train", file, "--output", tmp_path / "run"]
    words += ["--distributed", "auto"]
    running = [start(words, **of) for of in by_slurm(2)]
    for process in running:
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 1
        assert "no.tsv" in errors
        assert "Traceback" not in errors
        assert "stack trace" not in errors
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------- where processes meet


def refuses(kind, message, function, *args, **kwargs):
    with pytest.raises(kind, match=f"(?s){message}"):
        function(*args, **kwargs)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("node0:1234", "expected 'auto', or HOST:PORT,COUNT,INDEX"),
        ("node0,2,0", "'node0' is no address"),
        (":1234,2,0", "is no address"),
        ("node0:port,2,0", "is no address"),
        ("node0:70000,2,0", "is no address"),
        ("node0:1234,2,2", "process '2' of '2'.*of 4 the last is 3"),
        ("node0:1234,2,-1", "process '-1' of '2'"),
        ("node0:1234,two,0", "process '0' of 'two'"),
    ],
)
def test_a_place_that_cannot_be_is_refused(where, message):
    refuses(OptionError, message, sharding.initialize, where)


def test_variables_say_where_to_meet(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert place_of("auto") is None
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "node0:9")
    assert place_of("auto") is None  # JAX takes it in the place of what it finds
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    refuses(OptionError, "JAX_PROCESS_ID is not set", place_of, "auto")
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    assert place_of("auto") == Place("node0:9", 4, 3)
    assert place_of("[::1]:9,2,0") == Place("[::1]:9", 2, 0)
    monkeypatch.setenv("JAX_PROCESS_ID", "4")
    refuses(OptionError, "JAX_PROCESS_ID: process '4' of '4'", place_of, "auto")


def test_after_a_device_was_used_it_is_too_late():
    jax.devices()
    message = "a device was used before"
    refuses(ProcessError, message, sharding.initialize, "localhost:1234,2,0")


ALONE = "from jlora import sharding; sharding.initialize({!r}, timeout=1)"


def test_no_cluster_and_nobody_there(tmp_path):
    unknown = start(["-c", ALONE.format("auto")])
    alone = start(["-c", ALONE.format(f"localhost:{free_port()},2,1")])
    _, errors = unknown.communicate(timeout=60)
    assert "OptionError: distributed 'auto': no cluster is detected" in errors
    _, errors = alone.communicate(timeout=60)
    assert alone.returncode == 1
    said = "error: process 1 of 2 has not met the others at localhost:[0-9]+ within 1 s"
    assert re.search(said, errors), errors


def test_one_process_reads_whole_batches():
    assert sharding.batch_shard(sharding.make_mesh("data=2,fsdp=-1")) == (0, 1)
    x = np.arange(16).reshape(8, 2)
    placed = sharding.place_batch(x, sharding.make_mesh("data=-1"), whole=True)
    np.testing.assert_array_equal(placed, x)
