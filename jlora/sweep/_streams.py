"""Where the batches of each slot come from, and how they become one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._errors import DataError, OptionError
from jlora._paths import path_str
from jlora.sweep._jobs import Job
from jlora.train._batch import as_batch
from jlora.train._uses import IdCheck

Batch = Any
Shapes = tuple[Any, ...]

_EXPECTED = (
    "expected a list of batches, something with a method `stream(step)` such as "
    "jlora.data.Batches, or a function from a step's number to the batches from "
    "there on"
)


def stream_from(source: Any) -> Callable[[int], Iterator[Batch]]:
    """A function from a step's number to the batches from there on.

    A list is gone through again and again.

    Raises:
      OptionError: it is none of what can be gone through from any step on.
    """
    if callable(getattr(source, "stream", None)):
        return source.stream
    if isinstance(source, Sequence) and not isinstance(source, str | bytes):
        if not len(source):
            raise DataError("the list of batches is empty.")
        return lambda step: (source[n % len(source)] for n in itertools.count(step))
    if callable(source):
        return source
    raise OptionError(
        f"batches are a {type(source).__name__}: {_EXPECTED}. (An iterator cannot "
        "begin anew where a job does.)"
    )


class Source:
    """The streams of a sweep: one for all jobs, or one for each.

    Args:
      given: a stream for all; or a function of a job that makes one; or None, where
        each job's `data` is its stream.
    """

    def __init__(self, given: Any) -> None:
        self._given = given
        self.is_shared = given is not None and (
            hasattr(given, "stream") or not callable(given)
        )
        if self.is_shared:
            stream_from(given)  # an error of all jobs is said at once

    def __call__(self, job: Job, step: int) -> Iterator[Batch]:
        """A job's batches from a step on."""
        if self.is_shared:
            return iter(stream_from(self._given)(step))
        made = job.data if self._given is None else self._given(job)
        if made is None:
            raise OptionError(
                f"the job {job.name!r} has no data.\nPass `batches`, a stream or a "
                "function of a job, or give each job its `data`."
            )
        return iter(stream_from(made)(step))

    def all_of(self, job: Job) -> list[Batch]:
        """Every batch of what is gone over once: validation's."""
        given = self._given if self.is_shared else self._given(job)
        found = list(given)
        if not found:
            raise DataError(f"the job {job.name!r} has no batches to validate on.")
        return found


class Checks:
    """Looks at a job's batches before they meet those of others.

    Args:
      trace: makes the jaxpr of the loss for a batch, whose leaves are its last
        arguments: it says which of them are ids, and how many there are.
    """

    def __init__(self, trace: Callable[[Batch], Any]) -> None:
        self._trace = trace
        self._ids = IdCheck()

    def __call__(self, batch: Batch) -> Batch:
        """The batch, if a step can read it.

        Raises:
          DataError: it holds no arrays, or ids that do not exist.
        """
        batch = as_batch(batch)
        self._ids("loss", batch, lambda: self._trace(batch))
        return batch


def shapes_of(batch: Batch) -> Shapes:
    """What must be equal for batches to be stacked."""
    leaves, structure = jax.tree.flatten(batch)
    kinds = [(np.shape(x), str(jnp.result_type(x))) for x in leaves]
    return structure, tuple(kinds)


def stacked(batches: Sequence[Batch]) -> Batch:
    """Batches of one shape as one, `[K, ...]` each leaf."""
    return jax.tree.map(_stack, *batches)


def _stack(*xs: Any) -> Any:
    if any(isinstance(x, jax.Array) for x in xs):
        return jnp.stack([jnp.asarray(x) for x in xs])
    return np.stack([np.asarray(x) for x in xs])


class Filler:
    """Brings batches of unlike shapes to one, with items that count nothing.

    Args:
      fill: by the name of a leaf, what stands behind its own items: a label that the
        loss leaves out, 0 for a mask.
    """

    def __init__(self, fill: Mapping[str, Any] | None) -> None:
        if fill is not None and not isinstance(fill, Mapping):
            raise OptionError(
                f"fill={fill!r}: expected numbers by the names of leaves, "
                '{"input_ids": 0, "labels": -100}.'
            )
        self.fill = fill

    def fits(self, batch: Batch, like: Batch) -> bool:
        """Whether a batch can stand beside another."""
        one, two = shapes_of(batch), shapes_of(like)
        if self.fill is None or one == two:
            return one == two
        ranks = lambda kinds: [(len(shape), dtype) for shape, dtype in kinds]  # noqa: E731
        return one[0] == two[0] and ranks(one[1]) == ranks(two[1])

    def __call__(self, batches: Sequence[Batch]) -> list[Batch]:
        """The batches, of one shape.

        Raises:
          DataError: a leaf that `fill` does not name has unlike shapes.
        """
        if self.fill is None:
            return list(batches)

        def one(path: Any, *xs: Any) -> Any:
            most = np.max([np.shape(x) for x in xs], axis=0)
            if all(tuple(np.shape(x)) == tuple(most) for x in xs):
                return list(xs)
            name = path_str(path)
            value = self.fill.get(name, self.fill.get(name.rpartition("/")[2]))  # type: ignore[union-attr]
            if value is None:
                raise DataError(
                    f"the leaf {name!r} is of unlike shapes, "
                    f"{sorted({np.shape(x) for x in xs})}, and fill= does not name it."
                )
            return [_filled(np.asarray(x), most, value) for x in xs]

        columns = jax.tree_util.tree_map_with_path(one, *batches)
        structure: Any = jax.tree.structure(batches[0])
        rows = structure.flatten_up_to(columns)
        return [
            jax.tree.unflatten(structure, [column[i] for column in rows])
            for i in range(len(batches))
        ]


def _filled(x: np.ndarray, shape: Sequence[int], value: Any) -> np.ndarray:
    if tuple(x.shape) == tuple(shape):
        return x
    out = np.full(tuple(shape), value, x.dtype)
    out[tuple(map(slice, x.shape))] = x
    return out
