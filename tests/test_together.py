"""Several real processes: they stop together, and none waits for ever for another."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

FLAGS = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
SCRIPT = """
import dataclasses, itertools, os, signal, sys, time
from pathlib import Path

mode, index, port, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
import jax

jax.distributed.initialize(f"localhost:{port}", 2, index)
import jax.numpy as jnp, numpy as np, optax
import jlora
from jlora import train

P = jax.sharding.PartitionSpec
mesh = jax.make_mesh((2,), ("data",))
put = lambda x, *axes: jax.make_array_from_callback(
    x.shape, jax.sharding.NamedSharding(mesh, P(*axes)), lambda i: x[i]
)
with jax.default_device(jax.local_devices()[0]):
    tree = jlora.lorafy({"w": {"kernel": jnp.ones((4, 3))}}, 2, ["w"])
    tx = optax.adam(0.1)
    state = train.TrainState.create(tree, tx)
    key = np.asarray(jax.random.key_data(state.key))
    state = dataclasses.replace(state, key=jnp.zeros(()))
    state = jax.tree.map(lambda x: put(np.asarray(x)), state)
    state = dataclasses.replace(state, key=jax.random.wrap_key_data(put(key)))
step = train.make_train_step(lambda p, x, key: jnp.mean((x @ p["w"]["kernel"] - 2) ** 2), tx)


def batches(start):
    for n in itertools.count(start):
        if n == 5 and index == 1:
            if mode == "preempted":
                os.kill(os.getpid(), signal.SIGTERM)
            if mode == "interrupted":
                os.kill(os.getpid(), signal.SIGINT)
            if mode == "hangs":
                time.sleep(100)
            if mode == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02)
        x = np.random.default_rng(n).normal(size=(4, 4)).astype(np.float32)
        yield put(x, "data")


watchdog = train.Watchdog(patience=4.0, period=0.2)
save = train.Save(folder / "state", 50)
loop = train.Loop(step, state, batches, steps=400, callbacks=[watchdog, save])
try:
    loop.run()
except train.Interrupted as place:
    print(place, flush=True)
    sys.exit(place.status)
except jlora.LoraError as error:
    print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(1)  # JAX waits for the dead otherwise
"""


def two(mode, folder):
    """Two processes in a mode: their exit statuses, what they print, their errors."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, mode, str(i), port, folder],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in (0, 1)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
    return [p.returncode for p in running], *zip(*said, strict=True)


@pytest.mark.parametrize("mode", ["preempted", "interrupted"])
def test_processes_stop_after_the_same_step(mode, tmp_path):
    status, said, errors = two(mode, tmp_path)
    assert status == [0, 0], errors
    stopped, other = (out.splitlines()[-1].split()[1] for out in said)
    assert stopped == other
    assert 5 <= int(stopped) < 100
    assert {p.name for p in Path(tmp_path, "state").iterdir()} >= {stopped}


def test_a_process_that_hangs_ends_the_others_and_is_named(tmp_path):
    status, _, errors = two("hangs", tmp_path)
    assert status[0] == 1
    assert status[1] != 0  # by itself, or because the service of process 0 is gone
    # Perhaps the other has seen the same and left.
    named = (
        r"no step has ended for 4 s: .*process 1 of 2 \(host .*(at 5|last at step 5)"
    )
    assert re.search(named, errors[0]), errors[0]


def test_a_process_that_dies_ends_the_others_and_is_named(tmp_path):
    status, _, errors = two("dies", tmp_path)
    assert status[1] == -signal.SIGKILL
    assert status[0] == 1, errors
    assert "error: " in errors[0]
    assert "process 1 of 2 (host " in errors[0]
    assert re.search(r"last at step [0-5], does not answer: it hangs or", errors[0])
