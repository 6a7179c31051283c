"""Worker processes that turn rows into batches, in order, without JAX or PyTorch.

They are started anew (`spawn`), so nothing of this process's devices is theirs: no JAX
client is copied, and none is made. A worker that is killed is an error here, not a
wait; and when this process is killed, workers end by themselves.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from jlora._errors import DataError

# Of workers: no device is to be seen, and a process has one thread of tokenizers.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "OMP_NUM_THREADS": "1",
}
GRACE = 20.0  # seconds that a worker goes on after it was asked to end
_work: bytes = b""  # in a worker: what it does, pickled
_does: list[Callable[..., Any]] = []  # and unpickled, once


class Workers:
    """Processes that do one thing, with different arguments.

    Args:
      count: how many; with 0 it is done here, when its result is asked for.
      work: what they do; it can be pickled.
      patience: seconds to wait for a result.
    """

    def __init__(
        self, count: int, work: Callable[..., Any], patience: float = 1800
    ) -> None:
        self.work, self.patience = work, patience
        self._pool: ProcessPoolExecutor | None = None
        if count:
            self._pool = ProcessPoolExecutor(
                count,
                multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=(_pickled(work),),
            )

    def submit(self, *arguments: Any) -> Callable[[], Any]:
        """Begin; return a function that waits for the result.

        Raises:
          DataError: of that function, a worker that ended, or does not.
        """
        if self._pool is None:
            return lambda: self.work(*arguments)
        try:
            with _for_children():
                future = self._pool.submit(_do, *arguments)
        except BrokenProcessPool as error:
            raise _ended() from error
        return lambda: self._wait(future)

    def _wait(self, future: Future[Any]) -> Any:
        try:
            return future.result(self.patience)
        except BrokenProcessPool as error:
            self.close(at_once=True)
            raise _ended() from error
        except FutureTimeout as error:
            if future.done():
                raise  # the work's own
            self.close(at_once=True)
            raise DataError(
                f"a worker process has not made its batches in {self.patience:g} "
                "seconds.\nDoes `encode` wait for something? Pass workers=0 to see "
                "where."
            ) from error

    def close(self, *, at_once: bool = False) -> None:
        """End the processes; what they were at is lost."""
        if self._pool is None:
            return
        if at_once:
            for process in list((self._pool._processes or {}).values()):
                process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)


def _ended() -> DataError:
    return DataError(
        "a worker process that reads data ended without a word: it was killed, for "
        "want of memory perhaps, or could not begin.\nA script that uses workers "
        'starts below `if __name__ == "__main__":`, for each worker imports it. Pass '
        "workers=0 to read in this process."
    )


def _pickled(work: Any) -> bytes:
    try:
        return pickle.dumps(work)
    except Exception as error:
        raise DataError(
            f"worker processes cannot be told what to do: {error}.\n`encode` has to be "
            "a function at the top level of a file, or an object of a class there; or "
            "pass workers=0."
        ) from error


@contextlib.contextmanager
def _for_children() -> Iterator[None]:
    """What processes inherit that are started within.

    Ctrl-C reaches every process of a terminal; workers leave it to the one that saves.
    SIGTERM waits until a worker knows what to do about it.
    """
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    masks = hasattr(signal, "pthread_sigmask")
    if masks:
        old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        if masks:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _begin(work: bytes) -> None:
    """In a worker, once."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_later(number: int, frame: Any) -> None:
    """In a worker, on SIGTERM: a scheduler tells every process, and one has to save.

    To make the step after which it does so, it may need the next batch.
    """
    end = threading.Timer(GRACE, os._exit, (1,))
    end.daemon = True
    end.start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(*arguments: Any) -> Any:
    """In a worker, for each task."""
    if not _does:  # here, so that its errors are told
        _does.append(pickle.loads(_work))
    return _does[0](*arguments)
