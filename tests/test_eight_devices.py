"""Every layout on eight devices: losses, what lies where, checkpoints between meshes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"


def done(*words):
    """What eight_devices.py says."""
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    env = {
        **os.environ,
        "XLA_FLAGS": FLAGS,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": paths,
    }
    command = [sys.executable, str(HERE / "eight_devices.py"), *map(str, words)]
    ended = subprocess.run(command, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("family", ["llama", "mixture", "t5", "gpt2"])
def test_losses_are_those_of_one_device(family):
    """Data, FSDP, tensor and sequence parallel; shard_map; pmap. In float32."""
    found = done("losses", family)
    want = found.pop("one device")
    assert len(found) == 6
    assert len({*want}) == 3, "nothing was trained"
    for layout, losses in found.items():
        np.testing.assert_allclose(losses, want, rtol=2e-6, err_msg=layout)


def test_no_device_ever_holds_a_kernel_whole(tmp_path):
    found = done("bytes", tmp_path)
    assert found.pop("same words")
    step = found.pop("step")
    for stage, own in found.items():
        assert own["largest"] == 8192 / 8, stage  # one part of eight of the widest
    for stage in ("load", "merge", "export"):
        # Norms are whole, all else is cut.
        assert found[stage]["device"] < 1.1 * found[stage]["all"] / 8, stage
    # One side of each adapter is whole along the other axis.
    assert found["train"]["device"] < found["train"]["all"] / 4
    # What is alive is what was asked for: parameters, the adapters before training.
    assert found["train"]["alive"] < 1.3 * found["train"]["device"]
    assert step["arguments"] < 1.05 * found["train"]["device"]


def test_a_state_goes_from_mesh_to_mesh_to_one_device_and_back(tmp_path):
    losses = done("checkpoints", tmp_path)
    assert len(losses) == 5
    np.testing.assert_allclose(losses, losses[0], rtol=2e-6)
