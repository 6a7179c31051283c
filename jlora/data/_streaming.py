"""Streaming: batches of corpora that do not fit in memory, from an exact place on.

    sources -> rows, drawn by weight -> windows -> batches of a window -> batches

Rows are read one after the other, shards in a shuffled order; a window of them is
tokenised, shuffled, and cut into buckets or packed as a whole. A window depends on
nothing but its rows and its number. So workers make windows, and the batches are the
same for any number of workers; and the place of a batch is where its window begins in
the sources, and its number in the window: a few numbers, however much is read ahead. A
run that goes on reads at most one window again.

Libraries were tried. `grain` (0.2.18) shuffles and mixes what has random access, which
compressed files and the hub have not; what it yields behind workers depends on how many
they are, it takes the state of one number for another in silence, and it loads JAX.
`datasets` (5.2) refills its shuffle buffer when a state is loaded, so rows are lost (21
of 200 in a trial), and leaves workers to PyTorch. So `datasets` reads the hub here,
`pyarrow` Parquet, and the standard library's executor runs the workers.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jlora._errors import DataError, JloraWarning
from jlora.data._batches import (
    Arrays,
    Batches,
    Column,
    Shape,
    check_shard,
    is_ragged,
)
from jlora.data._packing import pack
from jlora.data._shards import Row
from jlora.data._sources import Mixture, Source
from jlora.data._workers import Workers

Encode = Callable[[list[Row]], Mapping[str, Column]]
Position = Mapping[str, Any]

PACKED = 4  # times as many examples a window, if they are packed
EMPTY = 64  # windows of which nothing is left, after which something is wrong


@dataclasses.dataclass(frozen=True)
class Window:
    """What is done with a window of rows, in a worker or here.

    The attributes are those of `Streaming`.
    """

    encode: Encode | None
    size: int
    pad: int
    shapes: Sequence[Shape] | None
    length: int | tuple[int, int] | None
    causal: bool
    seed: int | None
    shard: tuple[int, int]

    def __call__(self, number: int, rows: list[Row], first: str) -> list[Arrays]:
        """Return the batches of a window.

        Args:
          number: the window's.
          rows: its rows.
          first: where they begin, for messages.

        Raises:
          DataError: an example that is in no shape, or what `encode` raises.
        """
        try:
            columns = self.columns(rows)
        except Exception as error:
            what = "" if isinstance(error, DataError) else f"{type(error).__name__}: "
            raise DataError(
                f"the rows from {first} on cannot be encoded: {what}{error}"
            ) from error
        if not len(next(iter(columns.values()))):
            return []
        if self.length is not None:
            packed = pack(columns, self.length, causal=self.causal)  # type: ignore[arg-type]
            columns, shapes = dict(packed.columns), [packed.shape]
        else:
            shapes = list(self.shapes or ())
            _check_fits(columns, shapes, first)
        batches = Batches(
            columns, shapes, self.size, self.pad, self.seed, shard=self.shard
        )
        return [batches.arrays(batch) for batch in batches.plan(number)]

    def columns(self, rows: list[Row]) -> dict[str, Column]:
        """Return rows as columns, encoded."""
        if self.encode is not None:
            return dict(self.encode(rows))
        return {name: _column([row[name] for row in rows]) for name in rows[0]}


def _column(values: list[Any]) -> Column:
    if all(np.ndim(value) == 0 for value in values):
        return np.array(values)
    return [np.asarray(value, np.int32) for value in values]


def _check_fits(
    columns: Mapping[str, Column], shapes: Sequence[Shape], first: str
) -> None:
    most = shapes[-1]
    ragged = {name: c for name, c in columns.items() if is_ragged(c)}
    if len(ragged) != len(most):
        raise DataError(
            f"the shapes {list(shapes)} give {len(most)} lengths, but the examples "
            f"have {len(ragged)} columns of sequences: {', '.join(ragged)}."
        )
    for (name, column), room in zip(ragged.items(), most, strict=True):
        longest = max(map(len, column))
        if longest > room:
            raise DataError(
                f"among the rows from {first} on is one of {longest} tokens in {name}, "
                f"and no shape holds more than {room}.\nCut them in `encode`, or add a "
                "larger shape."
            )


@dataclasses.dataclass(frozen=True)
class Streaming:
    """Batches of rows that are read, encoded and cut up while training goes on.

    `jlora.train.fit` takes it as it takes `Batches`, and keeps its position in the
    checkpoint. Batches are alike: see there.

    Attributes:
      sources: one or several, by `stream_files`, `stream_dataset` or `in_memory`.
      encode: from a list of rows (dicts) to columns as `Batches` has them, such as
        `EncodePairs`. It may leave rows out. None takes rows that are encoded.
      size: examples a batch, or packed rows a batch.
      pad: the padding token.
      shapes: of buckets, as in `Batches`; the last holds every example.
      length: packs instead, into rows of so many tokens; pairs into two.
      weights: the shares in which sources are drawn; None draws all alike.
      seed: of the orders of shards and of examples in a window, and of what is drawn;
        None keeps the sources' order.
      window: batches a window: within so many examples order is random, and examples
        of like lengths are found. A window is held in memory for each worker and two.
        To be packed it has four times as many examples, for several go into a row and
        a window's last batch is seldom full.
      workers: processes that make windows; 0 makes them here. The batches are the same.
      causal: as in `pack`.
      shard: `(index, count)`: of several processes that read together each takes its
        part of the rows of every batch, so each example is seen once by one of them,
        and all have batches of one shape. Each reads all rows.
      patience: seconds to wait for a worker.

    >>> from jlora import data
    >>> source = data.in_memory({"input_ids": [[1, 2], [3], [4, 5, 6]]})
    >>> stream = data.Streaming(source, size=2, shapes=[(4,)], window=1)
    >>> [batch["input_ids"].shape for batch in stream]
    [(2, 4), (2, 4)]
    """

    sources: Source | Sequence[Source]
    encode: Encode | None = None
    _: dataclasses.KW_ONLY
    size: int
    pad: int = 0
    shapes: Sequence[Shape] | None = None
    length: int | tuple[int, int] | None = None
    weights: Sequence[float] | None = None
    seed: int | None = None
    window: int = 64
    workers: int = 0
    causal: bool = True
    shard: tuple[int, int] = (0, 1)
    patience: float = 1800

    def __post_init__(self) -> None:
        if (self.shapes is None) == (self.length is None):
            raise DataError(
                "say either shapes, of buckets, or length, of the rows to pack into."
            )
        counts = {"size": self.size, "window": self.window, "workers": self.workers + 1}
        for name, value in counts.items():
            if value < 1:
                raise DataError(
                    f"{name}={getattr(self, name)} is not enough; expected "
                    f"{'0' if name == 'workers' else '1'} or more."
                )
        check_shard(self.shard, self.size)
        weights = [1.0] * len(self._sources) if self.weights is None else self.weights
        fine = len(weights) == len(self._sources) and all(
            np.isfinite(w) and w > 0 for w in weights
        )
        if not self._sources or not fine:
            raise DataError(
                f"weights={list(weights)} of {len(self._sources)} sources; each source "
                "has one, a number above 0. Leave a source out to draw nothing from it."
            )

    @property
    def _sources(self) -> Sequence[Source]:
        return [self.sources] if isinstance(self.sources, Source) else self.sources

    @property
    def examples(self) -> int:
        """Rows a window."""
        return self.size * self.window * (1 if self.length is None else PACKED)

    def __iter__(self) -> Iterator[Arrays]:
        """Yield the batches of every source, each read once, one after the other."""
        reading = Reading(self, self._mixture(None, endless=False))
        try:
            yield from reading
        finally:
            reading.close()

    def stream(self, step: int = 0, position: Position | None = None) -> Reading:
        """Return the batches from a step on, without end.

        Args:
          step: the first batch's number.
          position: where it is, from `Reading.position`. Without one, all before it is
            read and made again, which a warning says.

        Raises:
          DataError: the position is of another stream.
        """
        if position is None:
            return self._skipped(step)
        self._check_is_same(position["of"])
        mixture = self._mixture(position["sources"])
        for reader in mixture.readers:
            if reader.rereads is not None:
                _warn(
                    f"{reader.rereads.name} cannot be sought: to go on where the run "
                    "was, what is before it there is read once more."
                )
        return Reading(self, mixture, position["window"], position["batch"])

    def _skipped(self, step: int) -> Reading:
        reading = Reading(self, self._mixture(None))
        if step:
            _warn(
                f"the stream is to go on at batch {step:,}, and was not told where "
                "that is: all before it is read once more.\nKeep what the iterator's "
                "position() returns, as `fit` does."
            )
            for _ in range(step):
                next(reading)
        return reading

    def _mixture(self, states: Any, *, endless: bool = True) -> Mixture:
        weights = self.weights or [1.0] * len(self._sources)
        return Mixture(self._sources, weights, self.seed, states, endless=endless)

    @property
    def _work(self) -> Window:
        names = [field.name for field in dataclasses.fields(Window)]
        return Window(**{name: getattr(self, name) for name in names})

    @cached_property
    def _print(self) -> dict[str, Any]:
        """What has to be as it was for a position to mean the same, as JSON."""
        cut = self.shapes if self.length is None else self.length
        shards = [
            [Path(shard.name).name, shard.print]
            for source in self._sources
            for shard in source.shards
        ]
        digest = hashlib.blake2b(json.dumps(shards).encode(), digest_size=8)
        made = {
            "size": self.size,
            "window": self.window,
            "seed": self.seed,
            "shapes or length": cut,
            "weights": self.weights,
            "shards, by name and size": [len(shards), digest.hexdigest()],
        }
        return json.loads(json.dumps(made))

    def _check_is_same(self, saved: Mapping[str, Any]) -> None:
        own = self._print
        unlike = [name for name in own if saved.get(name) != own[name]]
        if unlike:
            said = "; ".join(f"{n} {saved.get(n)}, now {own[n]}" for n in unlike)
            raise DataError(
                f"the position is of a stream that differs in {said}.\nGo on with the "
                "same files and settings, or begin anew. (The numbers of workers and "
                "of processes may change.)"
            )


class _Job(NamedTuple):
    """A window that is made.

    Attributes:
      number: the window's.
      before: where its rows begin in the sources.
      after: where they end.
      result: waits for its batches.
    """

    number: int
    before: Any
    after: Any
    result: Callable[[], list[Arrays]]


class Reading:
    """Batches of a `Streaming`, in order, and where the next one is.

    Close it, or let it go, to end its workers.
    """

    def __init__(
        self, stream: Streaming, mixture: Mixture, window: int = 0, batch: int = 0
    ) -> None:
        self._stream, self._mixture = stream, mixture
        self._workers = Workers(stream.workers, stream._work, stream.patience)
        self._jobs: collections.deque[_Job] = collections.deque()
        self._next, self._ended, self._empty = window, False, 0
        self._made: list[Any] = []
        self._done, self._skip = 0, batch
        self._after = (window, mixture.states())

    def position(self) -> dict[str, Any]:
        """Return where the next batch is, as JSON, for `Streaming.stream`."""
        at_end = self._done == len(self._made)
        window, sources = self._after if at_end else self._before
        batch = self._skip if at_end else self._done
        return {
            "window": window,
            "batch": batch,
            "sources": sources,
            "of": self._stream._print,
        }

    def __iter__(self) -> Reading:
        return self

    def __next__(self) -> Arrays:
        while self._done >= len(self._made):
            self._take_window()
        batch, self._made[self._done] = self._made[self._done], None
        self._done += 1
        return batch

    def _take_window(self) -> None:
        self._read_ahead(self._stream.workers + 1)
        if not self._jobs:
            self.close()
            raise StopIteration
        job = self._jobs.popleft()
        self._read_ahead(self._stream.workers)
        self._made = job.result()
        self._before, self._after = (
            (job.number, job.before),
            (job.number + 1, job.after),
        )
        self._done, self._skip = self._skip, 0
        self._empty = 0 if self._made else self._empty + 1
        if self._empty == EMPTY:
            raise DataError(
                f"`encode` left out every row of {EMPTY} windows of "
                f"{self._stream.examples} rows.\nIs it given the columns that it reads?"
            )

    def _read_ahead(self, count: int) -> None:
        """Read rows, and let windows be made of them, until so many are under way."""
        while len(self._jobs) < count and not self._ended:
            number, before = self._next, self._mixture.states()
            try:
                rows = self._mixture.take(self._stream.examples, number)
                if not rows:
                    self._ended = True
                    return
                first = _described(self._mixture, before)
                result = self._workers.submit(number, rows, first)
            except DataError as error:  # it is of this window, not of those before
                self._ended, result = True, partial(_raise, error)
            self._jobs.append(_Job(number, before, self._mixture.states(), result))
            self._next += 1

    def close(self) -> None:
        """End the workers."""
        self._ended = True
        self._jobs.clear()
        self._workers.close()

    def __del__(self) -> None:
        if hasattr(self, "_jobs"):
            self.close()


def _raise(error: Exception) -> Any:
    raise error


def _described(mixture: Mixture, states: Sequence[Mapping[str, Any]]) -> str:
    """Name the place where a window begins."""
    reader, state = mixture.readers[0], states[0]
    more = f" (and {len(states) - 1} other sources)" if len(states) > 1 else ""
    where = f"row {state['rows'] + 1} of epoch {state['epoch'] + 1}"
    return f"{where} of {reader.source.name}{more}"


def _warn(text: str) -> None:
    warnings.warn(text, JloraWarning, stacklevel=4)
