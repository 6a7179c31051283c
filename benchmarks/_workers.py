"""Workers as the runner sees them: processes that are asked, or this process."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any, Protocol

from benchmarks import _worker

ROOT = pathlib.Path(__file__).parent.parent
# XLA's CPU runtime takes one large arena a step from malloc, which glibc maps and
# unmaps every time: 100,000 page faults a step. These keep it.
TUNED = {
    "MALLOC_TRIM_THRESHOLD_": "16000000000",
    "MALLOC_MMAP_THRESHOLD_": "8000000000",
    "MALLOC_ARENA_MAX": "1",
}
# Every array in pages of its own, given back when it goes: who does a thing once has
# none to reuse. By itself glibc keeps more or fewer of them from run to run.
FRESH = {"MALLOC_MMAP_THRESHOLD_": "65536"}
ENVIRONMENTS: Mapping[str, Mapping[str, str]] = {
    "default": {}, "tuned": TUNED, "fresh": FRESH,
}  # fmt: skip
# JAX takes most of a GPU at once; workers share it.
_ALWAYS = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
# GPUs that XLA can compile for without one. JAX's own arrays stay on the CPU, and
# kernels are not chosen by timing them.
TARGETS = {p.stem: p for p in (ROOT / "benchmarks" / "targets").glob("*.txtpb")}
_AHEAD = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_gpu_autotune_level=0"}
# Tiny programs are compiled, not run: LLVM's optimiser would be half the time.
_QUICK = {
    "XLA_FLAGS": "--xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
}


class WorkerError(Exception):
    """A worker could not do what it was asked; the message goes into the table."""


class Asked(Protocol):
    """A worker, wherever it lives."""

    def ask(self, **request: Any) -> Any:
        """Return its answer, or raise `WorkerError`."""

    def stop(self) -> None:
        """End it."""


class Here:
    """A worker in this process: for tests, and for a debugger."""

    def __init__(self) -> None:
        self.worker = _worker.Worker()

    def ask(self, **request: Any) -> Any:
        """Return the answer; what passes through is JSON, as in a process."""
        reply = _worker.answer(self.worker, json.loads(json.dumps(request)))
        return _unwrap(json.loads(json.dumps(reply)))

    def stop(self) -> None:
        """Let the runners go."""
        self.worker.runners.clear()


class Process:
    """A worker in a process with an environment of its own."""

    def __init__(self, environment: Mapping[str, str], python: str) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `stop`
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks._worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={
                **_ALWAYS,
                **os.environ,
                **environment,
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            },
        )

    def ask(self, **request: Any) -> Any:
        """Return the answer; a process that ended is an error with its last words."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            raise WorkerError(f"the worker ended with status {code}: {self._words()}")
        return _unwrap(json.loads(line))

    def stop(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended before
            self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.log.close()

    def _words(self) -> str:
        self.log.seek(0)
        lines = self.log.read().strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def start(options: Any, group: str) -> Asked:
    """Start a worker as the command line has it."""
    if options.in_process:
        return Here()
    environment = {**ENVIRONMENTS[options.env], **(_QUICK if options.quick else {})}
    if options.gpu and options.dry:
        environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    if getattr(options, "compile_for", None):
        environment |= _AHEAD
    pythons = dict(entry.split("=", 1) for entry in options.python)
    return Process(environment, pythons.get(group, sys.executable))


def _unwrap(reply: Mapping[str, Any]) -> Any:
    if "error" in reply:
        raise WorkerError(reply["error"])
    return reply["answer"]
