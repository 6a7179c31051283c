"""Several processes: one that hangs or dies ends the others, with its name."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from typing import Any

import jax

from jlora._errors import LoraError, ProcessError
from jlora._processes import tell, told
from jlora.train._loop import Callback, Interrupted, Loop

_TOPIC = "watchdog"


class Watchdog(Callback):
    """Ends a run of several processes in which nothing moves any more.

    A step waits for every process, and if one hangs the others wait for ever. Each
    tells the others now and then where it is; when no step has ended for `patience`
    seconds, each says which process is behind or silent, and ends with status 1. The
    states that were saved are as they were. With one process it does nothing.

    Args:
      patience: seconds; longer than the longest compilation, validation or save.
      period: seconds between looks.
    """

    def __init__(self, patience: float = 1800.0, period: float = 1.0) -> None:
        self.patience, self.period = patience, period
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def on_start(self, loop: Loop) -> None:
        """Begin to look."""
        if jax.process_count() > 1:
            self._ended.clear()
            self._thread = threading.Thread(
                target=self._run, args=(loop,), name="jlora-watchdog", daemon=True
            )
            self._thread.start()

    def on_end(self, loop: Loop) -> None:
        """Look no more; an error of a step that others have left says who has.

        Raises:
          ProcessError: a process is silent.
        """
        if self._thread is None:
            return
        self._ended.set()
        self._thread.join()
        error = sys.exception()
        # What a collective raises depends on what carries it: gloo's is a ValueError.
        if isinstance(error, Exception) and not isinstance(
            error, LoraError | Interrupted
        ):
            silent = self._silent()
            if silent:
                raise ProcessError(f"{_listed(silent)}: {_brief(error)}") from error

    def _run(self, loop: Loop) -> None:
        beat, seen, moved = 0, loop.begun, time.monotonic()
        while not self._ended.wait(self.period):
            beat += 1
            try:
                tell(_TOPIC, [beat, loop.begun, socket.gethostname()])
            except Exception as error:
                _leave(f"process 0, which the others meet at, is gone: {_brief(error)}")
            if loop.begun != seen:
                seen, moved = loop.begun, time.monotonic()
            elif time.monotonic() - moved > self.patience:
                _leave(self._verdict(seen))

    def _silent(self) -> dict[int, Any]:
        """The processes that have stopped telling where they are."""
        before = told(_TOPIC)
        time.sleep(3 * self.period)
        after = told(_TOPIC)
        own = jax.process_index()
        return {i: x for i, x in after.items() if i != own and before.get(i) == x}

    def _verdict(self, own: int) -> str:
        head = f"no step has ended for {self.patience:.0f} s"
        if silent := self._silent():
            return f"{head}: {_listed(silent)}"
        places = {i: x[1] for i, x in told(_TOPIC).items()} | {jax.process_index(): own}
        furthest = max(places.values())
        behind = {i: x for i, x in told(_TOPIC).items() if places[i] < furthest}
        if behind:
            named = ", ".join(f"{_named(i, x)} at {x[1]}" for i, x in behind.items())
            return f"{head}: the others are at step {furthest}, and {named}"
        return f"{head}: all are at step {furthest}; see to devices and network"


def _named(index: int, word: Any) -> str:
    return f"process {index} of {jax.process_count()} (host {word[2]})"


def _listed(silent: dict[int, Any]) -> str:
    named = ", ".join(f"{_named(i, x)}, last at step {x[1]}" for i, x in silent.items())
    return f"{named}, does not answer: it hangs or is dead"


def _brief(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _leave(why: str) -> None:
    """End the process: its main thread waits where no exception reaches it."""
    sys.stderr.write(f"\nerror: {why}.\nResume the run with all of its processes.\n")
    sys.stderr.flush()
    os._exit(1)
