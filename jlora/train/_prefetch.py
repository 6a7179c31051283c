"""Batches made and placed on the device in the background, while a step runs."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from jlora.train._batch import as_batch

Batch = Any
Place = Callable[[Batch], Any]

PAUSE = 0.1  # seconds between looks at whether anybody still waits


@dataclasses.dataclass(frozen=True)
class Placed:
    """A batch as it was read, for what looks into it, and where the step takes it.

    Attributes:
      host: NumPy arrays: a step checks the ids in them without waiting for the device.
      device: JAX arrays.
    """

    host: Batch
    device: Batch


@dataclasses.dataclass(frozen=True)
class _Item:
    batch: Any = None
    position: Any = None
    error: BaseException | None = None


class Batches:
    """Batches in order, and where the one after the last that was taken is.

    Attributes:
      position: of that, as JSON, where the iterator tells one; else None.
      waits: for how many batches the step had to wait, the first left out.
      seconds: how long it waited, for the first too.
    """

    def __init__(self, source: Iterator[Batch], place: Place | None) -> None:
        """Prepare.

        Args:
          source: an iterator, perhaps with a method `position()`.
          place: from a batch to one on devices; None leaves it to the step.
        """
        self._source, self._place = source, place
        self.position: Any = None
        self.waits, self.seconds = 0, 0.0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            began = time.perf_counter()
            item = self._taken()
            self.seconds += time.perf_counter() - began
            if item.error is not None:
                raise item.error
            if item.batch is None:
                return
            self.position = item.position
            yield item.batch

    def close(self) -> None:
        """End what makes batches: its worker processes, say."""
        end = getattr(self._source, "close", None)
        if end is not None:
            end()

    def _taken(self) -> _Item:
        return self._made()

    def _made(self) -> _Item:
        try:
            batch = next(self._source)
            if self._place is not None:
                batch = as_batch(batch)
                batch = Placed(batch, self._place(batch))
            tell = getattr(self._source, "position", None)
            return _Item(batch, tell() if callable(tell) else None)
        except StopIteration:
            return _Item()
        except BaseException as error:
            return _Item(error=error)


class Prefetched(Batches):
    """The same, made by a thread that is so many batches ahead.

    What goes wrong there is raised here, at the batch it is of.
    """

    def __init__(
        self, source: Iterator[Batch], place: Place | None, ahead: int, most: int
    ) -> None:
        """Begin to make batches.

        Args:
          source: as in `Batches`; it is used in the thread alone.
          place: as there.
          ahead: batches that wait at most.
          most: how many there are to be.
        """
        super().__init__(source, place)
        self._queue: queue.Queue[_Item] = queue.Queue(ahead)
        self._closed = threading.Event()
        self._left, self._first = most, True
        self._thread = threading.Thread(
            target=self._run, name="jlora-prefetch", daemon=True
        )
        self._thread.start()

    def _run(self) -> None:
        try:
            while self._left > 0 and not self._closed.is_set():
                item = self._made()
                self._left -= 1
                if not self._handed(item) or item.batch is None:
                    return
            self._handed(_Item())
        finally:
            with contextlib.suppress(Exception):
                super().close()

    def _handed(self, item: _Item) -> bool:
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=PAUSE)
                return True
        return False

    def _taken(self) -> _Item:
        self.waits += self._queue.empty() and not self._first
        self._first = False
        return self._queue.get()

    def close(self) -> None:
        """Let the thread end, and with it what makes batches.

        A source that is waiting for something ends when it has got it, or with this
        process.
        """
        self._closed.set()
        self._thread.join(timeout=10)


def batches_from(
    source: Iterator[Batch], place: Place | None, ahead: int, most: int
) -> Batches:
    """Return the batches of a source, made in the background if any are to be ahead."""
    if ahead:
        return Prefetched(source, place, ahead, most)
    return Batches(source, place)
