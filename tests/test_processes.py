"""Two real processes on one file system: what one writes is there for both."""

import dataclasses
import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora.peft
from jlora import checkpoint, models
from jlora.train import TrainState

FLAGS = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
SCRIPT = """
import json, os, shutil, sys, time
from pathlib import Path

index, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
import jax

jax.distributed.initialize(f"localhost:{port}", 2, index)
sys.path.insert(0, TESTS)
import test_processes as t
from jlora import _files
from jlora.checkpoint import _storage

said = {}


def attempt(name, work):
    try:
        said[name] = work()
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"


def late(module, name):
    real = getattr(module, name)

    def slow(*args, **kwargs):
        time.sleep(0.7)
        return real(*args, **kwargs)

    if index == 0:
        setattr(module, name, slow)


def full(*args, **kwargs):
    raise OSError("no space left")


mesh = jax.make_mesh((2, 2), ("d", "e"))
with jax.default_device(jax.local_devices()[0]):
    t.work(index, folder, mesh, attempt, late, full)
Path(folder, f"said-{index}.json").write_text(json.dumps(said))
"""


def on_mesh(mesh, x, *axes):
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    return jax.make_array_from_callback(x.shape, where, lambda i: x[i])


def sharded(mesh):
    """A lorafied tree over both processes, and the one model it is."""
    placed = functools.partial(on_mesh, mesh)
    tree = plain()
    q = tree["q"]["kernel"]
    big = placed(np.asarray(tree["big"]["kernel"]), None, "d")
    odd = placed(np.asarray(tree["odd"]), "d")
    cut = placed(np.asarray(tree["cut"]), ("d", "e"))
    base = {
        "q": {"kernel": placed(np.asarray(q), "d", None)},
        "big": {"kernel": big},
        "odd": odd,
        "cut": cut,
    }
    return base, adapted(base)


def adapted(base):
    trainable, frozen = jlora.split(jlora.lorafy(base, 2, ["q"]))
    return jlora.combine(jax.tree.map(lambda x: x + 0.5, trainable), frozen)


def plain():
    """The same parameters in one process."""
    rng = np.random.default_rng(0)
    return {
        "q": {"kernel": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)},
        # Several blocks, of which each process holds half.
        "big": {"kernel": jnp.asarray(rng.normal(size=(128, 1024)), jnp.float32)},
        # Blocks that shards cut across, several and one.
        "cut": jnp.asarray(rng.normal(size=(128, 1024)), jnp.float32),
        "odd": jnp.asarray(rng.normal(size=(10,)), jnp.float32),
    }


def model():
    config = models.LlamaConfig(vocab_size=12, hidden_size=8, intermediate_size=6,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=8)  # fmt: skip
    model = models.Llama(config=config)
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    rng = np.random.default_rng(1)
    return model, jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes
    )


def placed_key(mesh, seed):
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    data = np.asarray(jax.random.key_data(jax.random.key(seed)))
    return jax.random.wrap_key_data(jax.device_put(data, replicated))


def state_on(mesh, tree):
    """A training state, all of it on the mesh."""
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    trainable, frozen = jlora.split(tree)
    step = jax.device_put(np.zeros((), np.int32), replicated)
    return TrainState(step, trainable, frozen, (), placed_key(mesh, 4))


def work(index, folder, mesh, attempt, late, full):
    """What both processes do, the first one late."""
    from jlora import _files
    from jlora.checkpoint import _storage

    base, tree = sharded(mesh)
    net, weights = model()
    is_there = lambda *path: folder.joinpath(*path).exists()
    late(_storage, "replace")
    late(_files, "write_tensors")
    late(_files.TensorFile, "begin")

    def adapter():
        checkpoint.save_adapter(folder / "adapter", tree)
        return is_there("adapter", "config", "metadata")

    def again():
        checkpoint.save_adapter(folder / "adapter", tree, overwrite=True)
        jax.block_until_ready(checkpoint.load_adapter(folder / "adapter", base))
        return is_there("adapter", "config", "metadata")

    def merged():
        checkpoint.save_merged(folder / "merged", tree)
        return is_there("merged", "config", "metadata")

    def peft():
        jlora.peft.save(folder / "peft", tree)
        return is_there("peft", "adapter_config.json")

    def hf():
        # Kernels that each process holds half of.
        cut = jax.tree.map(lambda x: on_mesh(mesh, x, *["d"][: x.ndim - 1]), weights)
        models.save(net, cut, folder / "hf", max_shard_bytes=1200)
        return is_there("hf", "config.json")

    def states():
        state = state_on(mesh, tree)
        with checkpoint.Checkpoints(folder / "run", keep_last=1) as checkpoints:
            checkpoints.save(dataclasses.replace(state, step=state.step + 1))
            checkpoints.save(dataclasses.replace(state, step=state.step + 2))
        other = dataclasses.replace(state, key=placed_key(mesh, 5))
        with checkpoint.Checkpoints(folder / "run", overwrite=True) as checkpoints:
            checkpoints.save(other)
            restored, _ = checkpoints.restore(other)
        checkpoint.save_state(folder / "state", restored)
        return is_there("run", "0") and is_there("state") and not is_there("run", "2")

    attempt("states", states)
    attempt("adapter", adapter)
    attempt("again", again)
    attempt("merged", merged)
    attempt("peft", peft)
    attempt("hf", hf)
    attempt("digest", lambda: checkpoint.fingerprint(tree).digest)
    attempt("refused", lambda: jlora.peft.save(folder / "peft", tree))
    attempt("taken", lambda: checkpoint.save_adapter(folder / "adapter", tree))
    if index == 0:  # and the disk of one of them is full
        _files.write_tensors = _storage.replace = full
        _files.TensorFile.append = full
    attempt("full peft", lambda: jlora.peft.save(folder / "peft", tree, overwrite=True))
    attempt("full hf", lambda: models.save(net, weights, folder / "hf2"))
    attempt("full", lambda: checkpoint.save_merged(folder / "merged", tree,
                                                   overwrite=True))  # fmt: skip
    attempt("digest again", lambda: checkpoint.fingerprint(base).digest)


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each of two processes says, and the folder they wrote to."""
    folder = tmp_path_factory.mktemp("shared")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    script = SCRIPT.replace("TESTS", repr(str(Path(__file__).parent)))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS}
    commands = [[sys.executable, "-c", script, str(i), port, folder] for i in (0, 1)]
    running = [
        subprocess.Popen(c, env=environment, stderr=subprocess.PIPE, text=True)
        for c in commands
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [p.returncode for p in running] == [0, 0], "\n\n".join(errors)
    return folder, [json.loads((folder / f"said-{i}.json").read_text()) for i in (0, 1)]


@pytest.mark.parametrize("what", ["states", "adapter", "again", "merged", "peft", "hf"])
def test_both_processes_end_with_what_is_written(said, what):
    _, words = said
    assert [word[what] for word in words] == [True, True]


def test_what_two_processes_write_one_reads(said):
    folder, _ = said
    base = plain()
    with jax.default_device(jax.devices()[0]):
        tree = checkpoint.load_adapter(folder / "adapter", base)
        same = jlora.peft.load(folder / "peft", base)
        merged = checkpoint.load_merged(folder / "merged", base)
    again = adapted(base)
    for got in (tree, same):
        for name in "ab":
            want = getattr(again["q"]["kernel"].adapters[""], name)
            have = getattr(got["q"]["kernel"].adapters[""], name)
            np.testing.assert_array_equal(have, want)
    dense = jlora.merge(again)
    np.testing.assert_array_equal(merged["big"]["kernel"], dense["big"]["kernel"])
    np.testing.assert_allclose(
        merged["q"]["kernel"], dense["q"]["kernel"], rtol=1e-6, atol=1e-6
    )
    _, weights = models.load(folder / "hf")
    assert jax.tree.all(jax.tree.map(np.array_equal, weights, model()[1]))


def test_a_fingerprint_is_one_for_all_processes(said):
    _, words = said
    want = checkpoint.fingerprint(plain()).digest
    for word in words:
        assert word["digest"] == word["digest again"] == want


@pytest.mark.parametrize("what", ["refused", "taken"])
def test_what_is_there_is_refused_by_both(said, what):
    _, words = said
    for word in words:
        assert "already" in word[what]
        assert word[what].startswith("CheckpointError")


@pytest.mark.parametrize("what", ["full peft", "full hf", "full"])
def test_a_failure_of_one_process_is_told_by_both(said, what):
    folder, words = said
    for word in words:
        assert word[what].startswith("CheckpointError")
        assert "no space left" in word[what]
    assert not (folder / "hf2").exists()
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []
    checkpoint.load_merged(folder / "merged", plain())
