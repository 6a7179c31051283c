"""Tokens in batches of few shapes: encoding, length buckets, and an order to resume."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from _data import Pair

IGNORED = -100  # a label that the loss leaves out
CHUNK = 10_000  # sentences that go to the tokenizer at once
MULTIPLE = 4  # shapes are rounded up to it
EDGES = 32  # lengths a side at which a bucket may end


class Encoded(NamedTuple):
    """Token ids of the sources and the targets, each an int32 array."""

    sources: list[np.ndarray]
    targets: list[np.ndarray]


class Shape(NamedTuple):
    """The lengths that a bucket's batches are padded to."""

    source: int
    target: int


class Batch(NamedTuple):
    """Which examples go together, in which shape."""

    rows: np.ndarray
    shape: Shape


def encode(
    tokenizer: Any, pairs: Sequence[Pair], prompt: str, longest: Shape
) -> Encoded:
    """Tokenise pairs, cut at the longest lengths; the end token always stays."""

    def ids(texts: list[str], length: int) -> Iterator[np.ndarray]:
        for start in range(0, len(texts), CHUNK):
            chunk = texts[start : start + CHUNK]
            rows = tokenizer(chunk, truncation=True, max_length=length)["input_ids"]
            yield from (np.array(row, np.int32) for row in rows)

    return Encoded(
        list(ids([prompt + pair.source for pair in pairs], longest[0])),
        list(ids([pair.target for pair in pairs], longest[1])),
    )


def shapes_for(splits: Sequence[Encoded], buckets: int) -> list[Shape]:
    """Return at most so many shapes, of which each holds the one before.

    An example goes to the first shape that holds both its sides. Of all such rows of
    shapes this is the one that pads the examples to the fewest tokens, found by dynamic
    programming; the last holds everything.
    """
    sides = [
        np.array([len(x) for split in splits for x in split[side]]) for side in (0, 1)
    ]
    edges = [_edges(lengths) for lengths in sides]
    counts = np.zeros([len(e) for e in edges])
    np.add.at(counts, tuple(map(np.searchsorted, edges, sides)), 1)
    # Of every pair of edges: how many examples it holds, and its tokens.
    holds = counts.cumsum(0).cumsum(1).ravel()
    pairs = np.stack(np.meshgrid(*edges, indexing="ij"), -1).reshape(-1, 2)
    tokens = pairs.sum(1)
    fits = (pairs[:, None] <= pairs).all(-1)  # [smaller, larger]
    more = np.where(fits, (holds - holds[:, None]) * tokens, np.inf)
    padded, before = holds * tokens, []
    for _ in range(buckets - 1):
        # A pair after itself adds nothing, so fewer shapes are among the choices.
        after = padded[:, None] + more
        before.append(after.argmin(0))
        padded = after.min(0)
    chain = [len(pairs) - 1]
    for choice in reversed(before):
        chain.append(choice[chain[-1]])
    return [Shape(*pairs[i].tolist()) for i in dict.fromkeys(reversed(chain))]


def _edges(lengths: np.ndarray) -> np.ndarray:
    """Lengths at which a bucket may end: multiples of `MULTIPLE`, not too many.

    Of more than `EDGES` half are spread over the examples and half over the lengths,
    for the few long examples cost most.
    """
    edges = _round_up(lengths)
    if len(edges) <= EDGES:
        return edges
    spread = np.linspace(0, 1, EDGES // 2)
    by_count = np.quantile(lengths, spread, method="higher")
    return np.union1d(_round_up(by_count), np.quantile(edges, spread, method="higher"))


def _round_up(lengths: np.ndarray) -> np.ndarray:
    return np.unique(np.ceil(lengths / MULTIPLE).astype(int) * MULTIPLE)


@dataclasses.dataclass(frozen=True)
class Batches:
    """Batches of examples of about the same length.

    What does not fill a bucket's last batch moves to the next larger bucket, so every
    example is seen once an epoch, in as many shapes as there are buckets.

    Attributes:
      encoded: the examples.
      shapes: from `shapes_for`, over these examples and perhaps others.
      size: examples a batch.
      pad: the padding token.
      seed: orders the examples anew each epoch; None keeps their order.
    """

    encoded: Encoded
    shapes: Sequence[Shape]
    size: int
    pad: int
    seed: int | None = None

    def __len__(self) -> int:
        """Batches an epoch."""
        return math.ceil(len(self.encoded.sources) / self.size)

    @cached_property
    def bucket(self) -> np.ndarray:
        """The number of each example's bucket: the first that holds both sides."""
        sides = [np.array([len(x) for x in side]) for side in self.encoded]
        edges = np.array(self.shapes).T
        return np.maximum(*map(np.searchsorted, edges, sides))

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

    def arrays(self, batch: Batch) -> dict[str, np.ndarray]:
        """Return what the model takes; a short batch is filled up with unlabelled rows.

        Labels are `IGNORED` at padding, and all over in the rows that fill up.
        """
        fill = np.resize(batch.rows, self.size)
        ids = self._padded(self.encoded.sources, fill, batch.shape.source, self.pad)
        lengths = np.array([len(self.encoded.sources[i]) for i in fill])
        labels = self._padded(self.encoded.targets, fill, batch.shape.target, IGNORED)
        labels[len(batch.rows) :] = IGNORED
        mask = np.arange(batch.shape.source) < lengths[:, None]
        return {
            "input_ids": ids,
            "attention_mask": mask.astype(np.int32),
            "labels": labels,
        }

    def stream(self, step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Yield batches without end, from the one that stands at `step`."""
        epoch, done = divmod(step, len(self))
        while True:
            for batch in self.plan(epoch)[done:]:
                yield self.arrays(batch)
            epoch, done = epoch + 1, 0

    @staticmethod
    def _padded(
        rows: Sequence[np.ndarray], chosen: np.ndarray, length: int, pad: int
    ) -> np.ndarray:
        out = np.full((len(chosen), length), pad, np.int32)
        for i, row in enumerate(chosen):
            out[i, : len(rows[row])] = rows[row]
        return out
