"""Several real processes read one stream: each example once, one batch of all."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import stream_rows

TESTS = pathlib.Path(__file__).parent


def run(folder, count):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    flags = "--xla_force_host_platform_device_count=2"
    words = [sys.executable, TESTS / "stream_processes.py"]
    running = [
        subprocess.Popen(
            [*words, str(i), str(count), str(port), folder],
            env={**os.environ, "PYTHONPATH": path, "XLA_FLAGS": flags},
        )
        for i in range(count)
    ]
    try:
        assert [process.wait(timeout=240) for process in running] == [0] * count
    finally:
        for process in running:
            process.kill()
    names = [folder / f"said-{i}-{count}.json" for i in range(count)]
    return [json.loads(name.read_text()) for name in names]


def test_two_processes_read_one_stream(tmp_path):
    (tmp_path / "rows.txt").write_text("\n".join(stream_rows.texts(40)))
    (whole,) = run(tmp_path, 1)
    one, two = run(tmp_path, 2)
    assert one["all"] == two["all"] == whole["all"]
    assert one["position"] == two["position"] == whole["position"]
    joined = [a + b for a, b in zip(one["own"], two["own"], strict=True)]
    assert joined == whole["own"]
