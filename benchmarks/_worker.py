"""A process that opens runners and steps them, on command of JSON lines.

`python -m benchmarks._worker` reads `{"do": ..., ...}` from standard input and answers
`{"answer": ...}` or `{"error": ...}`. Frameworks print as they like: their standard
output goes to standard error.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any

NAMED = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "peft", "loralib",
         "qwix", "quax", "orbax-checkpoint")  # fmt: skip
LONGEST = 200  # characters of an error


class Worker:
    """Runners by name, each made by a `module:function`."""

    def __init__(self) -> None:
        self.runners: dict[str, Any] = {}

    def handle(self, request: Mapping[str, Any]) -> Any:
        """Do what a request asks for."""
        arguments = dict(request)
        return getattr(self, f"do_{arguments.pop('do')}")(**arguments)

    def do_open(self, name: str, maker: str, arguments: Mapping[str, Any]) -> Any:
        """Make a runner; answer with what it found out."""
        self.runners[name] = _find(maker)(**arguments)
        return self.runners[name].facts

    def do_step(self, name: str) -> dict[str, float]:
        """Run one step; answer with its milliseconds, and those of all its threads."""
        start, before = time.perf_counter(), time.process_time()
        # What it returns goes when the clock has stopped: a large array's pages take
        # the system a while.
        _made = self.runners[name].step()
        took, busy = time.perf_counter() - start, time.process_time() - before
        return {"ms": 1e3 * took, "cpu_ms": 1e3 * busy}

    def do_facts(self, name: str) -> Any:
        """Answer with what a runner has found out by now."""
        return self.runners[name].facts

    def do_call(self, function: str, arguments: Mapping[str, Any]) -> Any:
        """Call a function; answer with what it returns."""
        return _find(function)(**arguments)

    def do_about(self) -> dict[str, Any]:
        """Answer with the device, the versions of what is loaded, and the memory."""
        loaded = [n for n in NAMED if n.partition("-")[0] in sys.modules]
        out: dict[str, Any] = {
            "versions": {n: importlib.metadata.version(n) for n in loaded},
            # Linux counts in KiB.
            "rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        return {**out, **_device()}


def _device() -> dict[str, Any]:
    if "torch" in sys.modules:
        import torch

        if not torch.cuda.is_available():
            return {"device": "cpu"}
        peak = torch.cuda.max_memory_allocated()
        return {"device": torch.cuda.get_device_name(), "device_bytes": peak}
    if "jax" not in sys.modules:
        return {}
    import jax

    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    peak = {"device_bytes": stats["peak_bytes_in_use"]} if stats else {}
    return {"device": f"{device.platform}: {device.device_kind}", **peak}


def _find(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def answer(worker: Worker, request: Mapping[str, Any]) -> dict[str, Any]:
    """Handle a request; an exception becomes an error that names it."""
    try:
        return {"answer": worker.handle(request)}
    except Exception as error:  # whatever a peer raises goes into the table
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        return {"error": f"{type(error).__name__}: {lines[0]}"[:LONGEST]}


def main() -> None:
    """Answer until standard input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        print(json.dumps(answer(worker, json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
