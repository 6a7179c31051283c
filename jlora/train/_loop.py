"""The loop over a run's steps, and the hooks that everything else hangs on."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import jax

from jlora._errors import DataError, NonFiniteError
from jlora._processes import asked_to_stop, stop_together
from jlora.train._batch import shapes_of
from jlora.train._prefetch import Placed, batches_from
from jlora.train._state import TrainState
from jlora.train._step import TrainStep

Batch = Any
Numbers = dict[str, float]


class Interrupted(Exception):  # noqa: N818 - not an error
    """A run was asked to stop, and did; the message says where.

    Attributes:
      signal: what asked for it, `signal.SIGINT` or `signal.SIGTERM`.
      saved: whether the run can be gone on with.
    """

    def __init__(
        self, message: str, signal: int = signal.SIGINT, *, saved: bool = True
    ) -> None:
        super().__init__(message)
        self.signal, self.saved = signal, saved

    @property
    def status(self) -> int:
        """The exit status of a script: 0 if a preempted run was saved, else 128 + n.

        >>> Interrupted("step 3 of 9").status
        130
        """
        is_done = self.saved and self.signal == signal.SIGTERM
        return 0 if is_done else 128 + self.signal

    def saying(self, message: str) -> Interrupted:
        """Return the same with another message."""
        return Interrupted(message, self.signal, saved=self.saved)


class Unfinished(Exception):  # noqa: N818 - not an error
    """What a callback raises that gives way to a signal to stop.

    The loop calls its `on_interval` again when the run goes on.
    """


class Callback:
    """What a loop calls while it runs; a subclass overrides what it needs.

    Attributes:
      every: `on_interval` is called after each so many steps, and after the last;
        None never calls it.
    """

    every: int | None = None

    def on_start(self, loop: Loop) -> None:
        """Before the first step of this process; `loop.position` is where it stands."""

    def on_wait(self, loop: Loop, what: str) -> None:
        """Before something that takes longer than a step, `"compiling"` for one."""

    def on_step(self, loop: Loop, step: int, metrics: Numbers) -> None:
        """After each step, in their order; the next one may be under way already."""

    def on_interval(self, loop: Loop) -> None:
        """After every so many steps; `loop.state` is that of `loop.position`."""

    def on_stop(self, loop: Loop) -> None:
        """After a signal to stop, before `Interrupted` is raised."""

    def on_end(self, loop: Loop) -> None:
        """When the loop is left, however that comes about."""

    def saved(self) -> dict[str, Any]:
        """What resuming needs of this callback, as JSON."""
        return {}

    def restore(self, saved: dict[str, Any]) -> None:
        """Take back what `saved` returned."""


class Loop:
    """A run's steps, from the first or from where it stopped.

    A step is dispatched while the one before it runs, and its metrics are read when
    that is done: the device never waits, and a progress bar tells the truth.

    Attributes:
      state: the training state.
      position: updates made, and with it the place in the order of the data.
      steps: how many updates the run makes.
      seconds: time since the loop began, in this process and those before.
      step_seconds: the part of it that steps took, without validation and saving.
      begun: the step that was begun last; on some devices it is under way in there.
      skipped: steps whose loss or gradient was not finite.
      stopped: signals to stop that have come.
      data_position: where the next batch is, as JSON; None where the step's number says
        it.
      data_waits: steps of this process for which a batch was not there in time.
      data_wait: seconds that this process has waited for batches.
    """

    def __init__(
        self,
        step: TrainStep,
        state: TrainState,
        batches: Callable[..., Iterator[Batch]],
        *,
        steps: int,
        callbacks: Sequence[Callback] = (),
        count: Callable[[Batch], int] | None = None,
        patience: int | None = 1,
        prefetch: int = 0,
        place: Callable[[Batch], Any] | None = None,
        on_new_shape: Callable[[Batch], None] | None = None,
    ) -> None:
        """Prepare a loop.

        Args:
          step: from `make_train_step`.
          state: from `TrainState.create`.
          batches: a function from a step's number to the batches from there on, such
            as `jlora.data.Batches.stream`. Where its iterators have a `position()`, as
            those of `jlora.data.Streaming` have, what that returns is kept beside the
            state, and a run that goes on calls `batches(step, position)`.
          steps: how many updates to make.
          callbacks: called in this order.
          count: how many tokens, or what else is to be counted, a batch holds; its
            metrics have it as `count`.
          patience: at how many steps in a row whose loss or gradient is not finite to
            stop; None never does. More than 1 is for steps that skip such an update.
          prefetch: batches that are made ahead, by a thread; 0 makes them in between.
          place: from a batch to one on devices, called in that thread. None leaves it
            to the step.
          on_new_shape: called before the first step of each shape of batches, with the
            batch as it was read.
        """
        self.step, self.state, self.batches = step, state, batches
        self.steps, self.callbacks, self.count = steps, callbacks, count
        self.patience, self.prefetch, self.place = patience, prefetch, place
        self.on_new_shape = on_new_shape
        self.position = self.begun = int(state.step)
        self.seconds = self.step_seconds = 0.0
        self.skipped, self._in_a_row = 0, 0
        self.stopped: list[int] = []
        self._unfinished: list[Callback] = []
        self._together = False
        self.data_position: Any = None
        self.data_waits, self.data_wait = 0, 0.0
        self._waiting: list[tuple[int, int, Any]] = []
        self._shapes: set[Any] = set()

    def saved(self) -> dict[str, Any]:
        """Return what resuming needs beside the state, as JSON."""
        names = {type(callback).__name__: callback for callback in self.callbacks}
        kept = {name: callback.saved() for name, callback in names.items()}
        return {
            "seconds": self.seconds,
            "step_seconds": self.step_seconds,
            "skipped": [self.skipped, self._in_a_row],
            "data": self.data_position,
            "unfinished": [type(callback).__name__ for callback in self._unfinished],
            "callbacks": {name: values for name, values in kept.items() if values},
        }

    def restore(self, state: TrainState, saved: dict[str, Any]) -> None:
        """Go back to a saved state and what `saved` returned beside it."""
        self.state, self.position = state, int(state.step)
        self.begun = self.position
        self.seconds = saved["seconds"]
        self.step_seconds = saved["step_seconds"]
        self.skipped, self._in_a_row = saved["skipped"]
        self.data_position = saved.get("data")
        for callback in self.callbacks:
            callback.restore(saved["callbacks"].get(type(callback).__name__, {}))
        names = saved["unfinished"]
        self._unfinished = [c for c in self.callbacks if type(c).__name__ in names]

    def run(self) -> TrainState:
        """Make the steps that are left.

        Returns:
          The last state.

        Raises:
          Interrupted: SIGINT or SIGTERM came; the callbacks have saved.
          NonFiniteError: the loss or the gradient is not finite.
          DataError: a batch that cannot be read, or none where there are to be more.
        """
        self._together = stop_together()
        with stop_signals(self._together) as self.stopped, self._ended():
            self._clock = time.perf_counter()
            self._start()
            for batch in self._read_batches(max(0, self.steps - self.position)):
                self._dispatch(batch)
                due = [c for c in self.callbacks if c.every and self._is_due(c.every)]
                self._read(0 if due or self.position == self.steps else 1)
                if self.stopped:
                    self._read(0)
                self._tick(steps=True)
                if self._together and asked_to_stop(self.position):
                    self.stopped.append(signal.SIGTERM)
                self._on_interval(due)
                self._stop_if_asked()
        return self.state

    def _read_batches(self, most: int) -> Iterator[Batch]:
        """Yield so many batches from where the run is, and note where the next is."""
        if not most:
            return
        at: list[Any] = [self.position]
        if self.data_position is not None:
            at.append(self.data_position)
        source = iter(self.batches(*at))
        batches = batches_from(source, self.place, self.prefetch, most)
        with contextlib.closing(batches):
            try:
                for batch in islice(batches, most):
                    self.data_position = batches.position
                    self.data_waits, self.data_wait = batches.waits, batches.seconds
                    yield batch
            except DataError:
                # A signal may have ended the processes that read, too.
                self._read(0)
                self._stop_if_asked()
                raise
        if self.position < self.steps:
            self._read(0)
            raise DataError(
                f"the training batches ended after step {self.position} of "
                f"{self.steps}.\nA stream has no end: begin again after the last "
                "batch, or ask for fewer steps."
            )

    def _start(self) -> None:
        """Call what begins, and what a stop has left undone."""
        for callback in self.callbacks:
            with contextlib.suppress(Unfinished):  # it begins again with the run
                callback.on_start(self)
        self._tick()
        due, self._unfinished = self._unfinished, []
        self._on_interval(due)
        self._stop_if_asked()

    def _on_interval(self, due: Sequence[Callback]) -> None:
        for callback in due:
            try:
                callback.on_interval(self)
            except Unfinished:
                self._unfinished.append(callback)
            self._tick()

    def _stop_if_asked(self) -> None:
        if not self.stopped:
            return
        for callback in self.callbacks:
            callback.on_stop(self)
        raise Interrupted(f"step {self.position} of {self.steps}", self.stopped[0])

    def until_stopped(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yield items, of something that takes long, while nothing asks to stop.

        If something does, an exception ends it, which a callback lets pass.
        """
        for item in items:
            if self.stopped:
                raise Unfinished
            yield item

    def announce(self, what: str) -> None:
        """Tell the callbacks what is to be waited for."""
        for callback in self.callbacks:
            callback.on_wait(self, what)

    def _is_due(self, every: int) -> bool:
        return self.position % every == 0 or self.position == self.steps

    @contextlib.contextmanager
    def _ended(self) -> Iterator[None]:
        try:
            yield
        finally:
            with contextlib.ExitStack() as ends:  # one may fail; all are called
                for callback in reversed(self.callbacks):
                    ends.callback(callback.on_end, self)

    def _tick(self, steps: bool = False) -> None:
        now = time.perf_counter()
        self.seconds += now - self._clock
        self.step_seconds += now - self._clock if steps else 0.0
        self._clock = now

    def _dispatch(self, batch: Batch) -> None:
        host = batch.host if isinstance(batch, Placed) else batch
        shapes = shapes_of(host)
        if shapes not in self._shapes:
            self._shapes.add(shapes)
            self.announce("compiling")
            if self.on_new_shape is not None:
                self.on_new_shape(host)
        count = self.count(host) if self.count else 0
        self.begun = self.position + 1
        self.state, metrics = self.step(self.state, batch)
        self.position += 1
        self._waiting.append((self.position, int(count), metrics))

    def _read(self, left: int) -> None:
        """Wait for the steps that were dispatched, but for the last `left`."""
        while len(self._waiting) > left:
            step, count, metrics = self._waiting.pop(0)
            numbers = {
                k: float(v) for k, v in metrics.items() if jax.numpy.ndim(v) == 0
            }
            self._count_skipped(step, numbers)
            for callback in self.callbacks:
                callback.on_step(self, step, {**numbers, "count": count})

    def _count_skipped(self, step: int, numbers: Numbers) -> None:
        if not numbers["nonfinite"]:
            self._in_a_row = 0
            return
        self.skipped += 1
        self._in_a_row += 1
        if self.patience is None or self._in_a_row < self.patience:
            return
        many = self.patience > 1
        again = f", after {self.patience} such steps in a row" if many else ""
        raise NonFiniteError(
            f"step {step}: the loss is {numbers['loss']}, the gradient's norm "
            f"{numbers['grad_norm']}{again}.\nTry a lower learning rate, or float32. "
            "In the first steps, look at the data too: NaN in it, or ids that "
            "the loss computes and that are beyond the model's tables."
        )


@contextlib.contextmanager
def stop_signals(together: bool = False) -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM; a second SIGINT interrupts at once.

    A second SIGTERM does not: schedulers repeat theirs, and the run is saving.

    Args:
      together: several processes stop after the same step. SIGTERM is left to JAX,
        which tells the others, and Ctrl-C in one of them becomes that.
    """
    received: list[int] = []
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        if (received or asked) and number == signal.SIGINT:
            raise KeyboardInterrupt
        if together:
            asked.append(number)
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            received.append(number)

    before = {}
    with contextlib.suppress(ValueError):  # not the main thread: signals go elsewhere
        for name in (signal.SIGINT, *(() if together else (signal.SIGTERM,))):
            before[name] = signal.signal(name, note)
    try:
        yield received
    finally:
        for name, handler in before.items():
            signal.signal(name, handler or signal.SIG_DFL)
