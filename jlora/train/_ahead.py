"""Programs of a run compiled beside each other, in threads, before they are called.

A call compiles what nobody has compiled yet, so a run would compile one program after
another: the validation's for each shape of batches, then the step's. JAX keeps what
`jit(f).lower(...).compile()` made in a thread, and the call finds it.

XLA compiles without Python's lock; tracing holds it. What goes wrong in a thread is let
pass: the call does the same over again, and raises it.
"""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from jlora import _compat
from jlora.train._batch import shapes_of

Batch = Any
Tree = Any

MOST_THREADS = 4


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Ahead:
    """Compiles programs in threads; who needs one waits for it.

    On a GPU who needs one waits for all: XLA chooses kernels by timing them there, and
    nothing else should run meanwhile.
    """

    def __init__(self) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(
            min(MOST_THREADS, max(2, cores() // 2)), "jlora-compile"
        )
        self._made: dict[Any, concurrent.futures.Future[None]] = {}
        self._settings = _compat.trace_settings()
        self._at_once = jax.default_backend() != "cpu"

    def add(
        self, what: str, batches: Iterable[Batch], lower: Callable[[Batch], Any]
    ) -> None:
        """Begin to compile a program for each batch.

        Args:
          what: the program's name.
          batches: one of each shape.
          lower: from a batch to the lowered program.
        """
        for batch in batches:
            known = what, shapes_of(batch)
            self._made[known] = self._pool.submit(self._compile, lower, batch)

    def _compile(self, lower: Callable[[Batch], Any], batch: Batch) -> None:
        # Settings of a `with` block are a thread's own. Under others than the call's
        # the program would be another one.
        if _compat.trace_settings() == self._settings:
            lower(batch).compile()

    def wait(self, what: str, batch: Batch) -> None:
        """Wait for the program of a batch of this shape, if one was begun."""
        mine = self._made.pop((what, shapes_of(batch)), None)
        if mine is not None:
            concurrent.futures.wait(
                [mine, *self._made.values()] if self._at_once else [mine]
            )

    def before(self, what: str, batches: Iterable[Batch]) -> Iterable[Batch]:
        """Return the same batches, each after its program is there."""
        return _Awaited(self, what, batches)

    def close(self) -> None:
        """Begin nothing more; what is being compiled ends by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._made.clear()


class _Awaited:
    """Batches that can be gone over again and again, as those they are made of."""

    def __init__(self, ahead: Ahead, what: str, batches: Iterable[Batch]) -> None:
        self._ahead, self._what, self._batches = ahead, what, batches

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            self._ahead.wait(self._what, batch)
            yield batch


def specimens(batches: Any, most: int | None = None) -> list[Batch]:
    """One of each shape of the first so many batches, as `jlora.data.Batches` tell."""
    tell = getattr(batches, "specimens", None)
    return [] if tell is None else tell(most)


def abstract(tree: Tree) -> Tree:
    """A tree's shapes where its arrays are, and what is none as it is."""

    def shape(x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return x
        where = x.sharding if x.committed else None
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=where, weak_type=x.aval.weak_type
        )

    return jax.tree.map(shape, tree)
