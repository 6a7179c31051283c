"""Batches of few shapes: length buckets, padding, and an order that can be resumed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jlora._errors import DataError

#: A label that losses leave out.
IGNORED = -100
MULTIPLE = 4  # lengths are rounded up to it
CHOICES = 1024  # of shapes, among which those of the buckets are chosen

# Of each example a sequence of tokens, or (an array) one number.
Column = Sequence[np.ndarray] | np.ndarray
Shape = tuple[int, ...]
Arrays = dict[str, np.ndarray]
T = TypeVar("T")


class Batch(NamedTuple):
    """Which examples go together, in which shape."""

    rows: np.ndarray
    shape: Shape


def shapes_for(splits: Sequence[Mapping[str, Column]], buckets: int) -> list[Shape]:
    """Return at most so many shapes, of which each holds the one before.

    A shape gives a length for each column of sequences. An example goes to the first
    that holds all its sequences. Of all such rows of shapes this is the one that pads
    the examples to the fewest tokens, found by dynamic programming; the last holds
    everything.

    Args:
      splits: columns of examples, as `Batches` takes them, of one or several splits.
      buckets: the most shapes.
    """
    columns = [
        np.concatenate(sides) for sides in zip(*map(_lengths, splits), strict=True)
    ]
    # Columns that are always equally long, such as ids and their labels, are one side.
    unique: list[np.ndarray] = []
    side_of = []
    for lengths in columns:
        same = (i for i, x in enumerate(unique) if np.array_equal(x, lengths))
        side = next(same, len(unique))
        unique += [lengths] if side == len(unique) else []
        side_of.append(side)
    found = _shapes(unique, buckets)
    return list(dict.fromkeys(tuple(shape[i] for i in side_of) for shape in found))


def _shapes(sides: list[np.ndarray], buckets: int) -> list[Shape]:
    most = max(2, int(CHOICES ** (1 / len(sides)) + 1e-6))
    edges = [_edges(lengths, most) for lengths in sides]
    counts = np.zeros([len(e) for e in edges])
    np.add.at(counts, tuple(map(np.searchsorted, edges, sides)), 1)
    # Of every choice of edges: how many examples it holds, and its tokens.
    for axis in range(counts.ndim):
        counts = counts.cumsum(axis)
    holds = counts.ravel()
    choices = np.stack(np.meshgrid(*edges, indexing="ij"), -1).reshape(-1, len(edges))
    tokens = choices.sum(1)
    fits = (choices[:, None] <= choices).all(-1)  # [smaller, larger]
    more = np.where(fits, (holds - holds[:, None]) * tokens, np.inf)
    padded, before = holds * tokens, []
    for _ in range(buckets - 1):
        # A choice after itself adds nothing, so fewer shapes are among the choices.
        after = padded[:, None] + more
        before.append(after.argmin(0))
        padded = after.min(0)
    chain = [len(choices) - 1]
    for choice in reversed(before):
        chain.append(choice[chain[-1]])
    return [tuple(choices[i].tolist()) for i in dict.fromkeys(reversed(chain))]


def _lengths(columns: Mapping[str, Column]) -> list[np.ndarray]:
    return [np.array([len(x) for x in c]) for c in columns.values() if is_ragged(c)]


def is_ragged(column: Column) -> bool:
    """Return whether a column holds sequences, not one number an example."""
    return not isinstance(column, np.ndarray)


def _edges(lengths: np.ndarray, most: int) -> np.ndarray:
    """Lengths at which a bucket may end: multiples of `MULTIPLE`, not too many.

    Of more than `most` half are spread over the examples and half over the lengths,
    for the few long examples cost most.
    """
    edges = _round_up(lengths)
    if len(edges) <= most:
        return edges
    steps = np.linspace(0, 1, most // 2)
    by_count = np.quantile(lengths, steps, method="higher")
    return np.union1d(_round_up(by_count), np.quantile(edges, steps, method="higher"))


def _round_up(lengths: np.ndarray) -> np.ndarray:
    return np.unique(np.ceil(lengths / MULTIPLE).astype(int) * MULTIPLE)


@dataclasses.dataclass(frozen=True)
class Batches:
    """Batches of examples of about the same length.

    What does not fill a bucket's last batch moves to the next larger bucket, so every
    example is seen once an epoch, in as many shapes as there are buckets.

    A batch is a dict of arrays, one for each column: `[size, length]` of sequences,
    `[size]` of numbers. `input_ids` bring an `attention_mask`. A batch that is not full
    is filled up with copies whose `labels` are `IGNORED`. Of examples with several
    texts, `chosen_input_ids` bring a `chosen_attention_mask`, `chosen_labels` are
    labels, and so on.

    Attributes:
      columns: the examples: by name, a list of int32 arrays or an array of numbers.
      shapes: from `shapes_for`, over these examples and perhaps others.
      size: examples a batch.
      pad: the padding token; labels are padded with `IGNORED`, other columns with 0.
      seed: orders the examples anew each epoch; None keeps their order.
      shard: `(index, count)`: of several processes that read together each takes its
        part of every batch, `size / count` rows, so that each example is seen by one of
        them and all have batches of one shape. `jlora.sharding` and
        `jax.make_array_from_process_local_data` make one array of the parts.

    >>> rows = [np.ones(n, np.int32) for n in (3, 7, 2)]
    >>> columns = {"input_ids": rows, "labels": np.array([0, 1, 1])}
    >>> batches = Batches(columns, shapes=[(8,)], size=2, pad=0)
    >>> [batch["input_ids"].shape for batch in batches]
    [(2, 8), (2, 8)]
    """

    columns: Mapping[str, Column]
    shapes: Sequence[Shape]
    size: int
    pad: int
    seed: int | None = None
    shard: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        check_shard(self.shard, self.size)
        counts = {name: len(column) for name, column in self.columns.items()}
        if len(set(counts.values())) != 1 or 0 in counts.values():
            raise DataError(
                f"columns of {counts} examples.\nBatches need columns of equal "
                "length, of at least one example."
            )

    @property
    def examples(self) -> int:
        """How many examples there are."""
        return len(next(iter(self.columns.values())))

    def __len__(self) -> int:
        """Return the number of batches an epoch."""
        return math.ceil(self.examples / self.size)

    def __iter__(self) -> Iterator[Arrays]:
        """Yield the batches of the first epoch."""
        return map(self.arrays, self.plan())

    @cached_property
    def bucket(self) -> np.ndarray:
        """The number of each example's bucket: the first that holds it."""
        edges = np.array(self.shapes).T
        sides = map(np.searchsorted, edges, _lengths(self.columns))
        return np.max(list(sides), axis=0)

    def plan(self, epoch: int = 0) -> list[Batch]:
        """Return an epoch's batches; the same for the same seed and epoch."""
        shuffled = self.seed is not None
        rng = np.random.default_rng([self.seed or 0, epoch])
        batches, rest = [], np.array([], int)
        for number, shape in enumerate(self.shapes):
            members = np.flatnonzero(self.bucket == number)
            members = rng.permutation(members) if shuffled else members
            rows = np.concatenate([rest, members])
            whole = len(rows) // self.size * self.size
            parts = rows[:whole].reshape(-1, self.size)
            batches += [Batch(part, shape) for part in parts]
            rest = rows[whole:]
        if len(rest):
            shape = self.shapes[int(self.bucket[rest].max())]
            batches.append(Batch(rest, shape))
        order = rng.permutation(len(batches)) if shuffled else range(len(batches))
        return [batches[i] for i in order]

    def specimens(self, most: int | None = None) -> list[Arrays]:
        """Return the first batch of each shape, of the first epoch's first so many."""
        first: dict[Shape, Batch] = {}
        for batch in self.plan()[:most]:
            first.setdefault(batch.shape, batch)
        return list(map(self.arrays, first.values()))

    def arrays(self, batch: Batch) -> Arrays:
        """Return a batch's arrays."""
        fill = np.resize(batch.rows, self.size)[self._part]
        own = len(batch.rows[self._part])
        lengths = iter(batch.shape)
        out: Arrays = {}
        for name, column in self.columns.items():
            if is_ragged(column):
                rows = [column[i] for i in fill]
                length = next(lengths)
                out[name] = _padded(rows, length, self._fill(name))
                if _is(name, "input_ids"):
                    real = np.arange(length) < np.array([[len(row)] for row in rows])
                    mask = name.removesuffix("input_ids") + "attention_mask"
                    out[mask] = real.astype(np.int32)
            else:
                out[name] = np.asarray(column)[fill]
            if _is(name, "labels"):
                out[name][own:] = IGNORED
        return out

    @property
    def _part(self) -> slice:
        """The rows of a batch that this process takes."""
        index, count = self.shard
        own = self.size // count
        return slice(index * own, (index + 1) * own)

    def _fill(self, name: str) -> int:
        fills = {"labels": IGNORED, "input_ids": self.pad}
        return next((x for kind, x in fills.items() if _is(name, kind)), 0)

    def stream(self, step: int = 0) -> Iterator[Arrays]:
        """Yield batches without end, from the one that stands at `step`."""
        epoch, done = divmod(step, len(self))
        while True:
            for batch in self.plan(epoch)[done:]:
                yield self.arrays(batch)
            epoch, done = epoch + 1, 0

    def collect(
        self, function: Callable[[Arrays], Sequence[T]], title: str | None = None
    ) -> list[T]:
        """Call a function of each batch; return its results in the examples' order.

        Of several processes each knows those of its part, and None of the others.

        Args:
          function: from a batch's arrays to one result a row.
          title: of a progress bar; None shows none.
        """
        batches: Any = self.plan()
        if title is not None:
            from tqdm import tqdm

            batches = tqdm(batches, desc=title, unit="batch", leave=False)
        seen: set[Shape] = set()
        out: list[Any] = [None] * self.examples
        for batch in batches:
            if title is not None and batch.shape not in seen:
                batches.set_postfix_str("a new shape: compiling")
            results = function(self.arrays(batch))
            if title is not None and batch.shape not in seen:
                batches.set_postfix_str("")
            seen.add(batch.shape)
            for row, result in zip(batch.rows[self._part], results, strict=False):
                out[row] = result
        return out


def check_shard(shard: tuple[int, int], size: int) -> None:
    """Refuse a part of batches that there is not.

    Raises:
      DataError: an index beyond the count, or a count that does not divide the size.
    """
    index, count = shard
    if not 0 <= index < count or size % count:
        raise DataError(
            f"shard={shard} of batches of {size}: expected (index, count), an index "
            "below the count and a count that divides the size."
        )


def _is(name: str, kind: str) -> bool:
    """Whether a column is of a kind: `labels`, or `chosen_labels`."""
    return name == kind or name.endswith(f"_{kind}")


def _padded(rows: Sequence[np.ndarray], length: int, fill: int) -> np.ndarray:
    out = np.full((len(rows), length), fill, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
