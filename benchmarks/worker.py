"""A process that builds contenders and runs their steps, on command of JSON lines.

`python -m benchmarks.worker` reads `{"do": ..., "name": ..., ...}` from standard input
and answers `{"answer": ...}` or `{"error": ...}`. Frameworks print as they like: their
standard output goes to standard error.
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
from collections.abc import Callable, Mapping
from typing import Any

NAMED = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "peft", "loralib",
         "qwix", "quax")  # fmt: skip
LONGEST = 200  # characters of an error


class Worker:
    """Contenders by name: their steps, and what is known of them."""

    def __init__(self) -> None:
        self.built: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {}

    def answer(self, line: str) -> str:
        """Do what a request asks for; an exception becomes an error that names it."""
        try:
            request = json.loads(line)
            reply = {"answer": getattr(self, request.pop("do"))(**request)}
        except Exception as error:  # whatever a peer raises goes into the table
            traceback.print_exc()
            first = next(iter(str(error).strip().splitlines()), "")
            reply = {"error": f"{type(error).__name__}: {first}"[:LONGEST]}
        return json.dumps(reply)

    def build(self, name: str, build: str, arguments: Mapping[str, Any]) -> float:
        """Build a contender; answer with the seconds."""
        start = time.perf_counter()
        module, _, function = build.partition(":")
        make = getattr(importlib.import_module(module), function)
        self.built[name] = make(**arguments)
        return time.perf_counter() - start

    def step(self, name: str) -> dict[str, float]:
        """Run one step; answer with its milliseconds, and those of all its threads."""
        run, _ = self.built[name]
        start, before = time.perf_counter(), time.process_time()
        # What it returns goes when the clock has stopped: a large array's pages take
        # the system a while.
        _made = run()
        took, busy = time.perf_counter() - start, time.process_time() - before
        return {"ms": 1e3 * took, "cpu_ms": 1e3 * busy}

    def facts(self, name: str) -> Any:
        """Answer with what is known of a contender, and about this process."""
        loaded = [name for name in NAMED if name in sys.modules]
        about = {
            "versions": {name: importlib.metadata.version(name) for name in loaded},
            # Linux counts in KiB.
            "rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        return self.built[name][1], about | _device()


def _device() -> dict[str, Any]:
    """The device, and the most of its memory that was used, where it tells."""
    if torch := sys.modules.get("torch"):
        if not torch.cuda.is_available():
            return {"device": "cpu"}
        peak = torch.cuda.max_memory_allocated()
        return {"device": torch.cuda.get_device_name(), "device_bytes": peak}
    device = sys.modules["jax"].devices()[0]
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {"device": f"{device.platform}: {device.device_kind}", "device_bytes": peak}


def main() -> None:
    """Answer until standard input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        print(worker.answer(line), file=replies, flush=True)


if __name__ == "__main__":
    main()
