"""Several processes on one file system: one of them writes, all know how it went.

A save is called by every process, as training steps are. With a single process nothing
here costs anything.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from jlora._compat import coordination_client, preemption_is_shared
from jlora._errors import CheckpointError

Box = tuple[slice, ...]  # starts and stops along each axis

# How long to wait for the others, in seconds: one may gather and write a whole model.
_PATIENCE = 4 * 3600
# And after a failure here: the others may wait for this process elsewhere.
_PATIENCE_FAILED = 60
# Without the first process JAX aborts the others: they are let say the same before.
_LAST_WORDS = 5
_KNOWN = "_known_to_all_processes"  # on errors that need not be told once more
_calls = itertools.count()
_said: list[str] = []  # the keys of this process's last word, until all have read it


def on_first(what: str, work: Callable[[], Any]) -> Any:
    """Do something on the first process alone, while the others wait.

    Args:
      what: what is done, for messages: `"writing the adapter 'out'"`.
      work: does it. Its result is JSON.

    Returns:
      The result, on every process.

    Raises:
      CheckpointError: the work failed on the first process, where its own error is
        raised.
    """
    if jax.process_count() == 1:
        return work()
    result, error = None, None
    if jax.process_index() == 0:
        try:
            result = work()
        except Exception as raised:
            error = raised
    return agree(what, error, result)[0]


def agree(what: str, error: Exception | None, result: Any = None) -> list[Any]:
    """Wait until every process has come here, and fail on all if one has failed.

    Args:
      what: what was done, for messages.
      error: what went wrong on this process.
      result: what this process tells the others, as JSON.

    Returns:
      What each process told.

    Raises:
      CheckpointError: something went wrong on another process, or one did not come.
      Exception: `error`, on the process where it was raised.
    """
    if jax.process_count() == 1:
        if error is not None:
            raise error
        return [result]
    if error is not None and _is_known(error):
        raise error
    word = {"error": _in_a_line(error), "result": result}
    try:
        told = _exchange(what, word, _PATIENCE_FAILED if error else _PATIENCE)
    except CheckpointError:
        if error is not None:
            raise error from None
        raise
    failed = [(i, x["error"]) for i, x in enumerate(told) if x["error"] is not None]
    if not failed:
        return [x["result"] for x in told]
    if error is None:
        error = CheckpointError(
            f"{what} failed on process {failed[0][0]} of {len(told)}: {failed[0][1]}"
        )
    setattr(error, _KNOWN, True)
    raise error


def _exchange(what: str, word: dict[str, Any], patience: int) -> list[dict[str, Any]]:
    """Every process's word, in order.

    The coordination service carries it, and no collective of the devices, which give
    up on a process that takes minutes.
    """
    client, count = coordination_client(), jax.process_count()
    if client is None:
        raise CheckpointError(
            f"{what} needs the coordination service of JAX's {count} processes.\nCall "
            "jax.distributed.initialize() before anything else."
        )
    folder = f"jlora/{next(_calls)}"
    own = f"{folder}/{jax.process_index()}"
    client.key_value_set(own, json.dumps(word))
    try:
        client.wait_at_barrier(f"{folder}/all", patience * 1000)
    except Exception as error:
        raise CheckpointError(
            f"{what}: not all of {count} processes came: {_in_a_line(error)}.\nEvery "
            "process has to make this call, not the first alone."
        ) from error
    told = [
        json.loads(client.blocking_key_value_get(f"{folder}/{i}", 60_000))
        for i in range(count)
    ]
    # Whoever is here has read what was said before.
    for key in _said:
        client.key_value_delete(key)
    _said[:] = [own]
    return told


def is_first() -> bool:
    """Whether this process writes and speaks for all; a single one does."""
    return jax.process_index() == 0


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Let the first process alone print what is for people; errors are everyone's."""
    with contextlib.ExitStack() as stack:
        if not is_first():
            nowhere = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        yield


def leave_others(error: BaseException, status: int) -> None:
    """End this process now, if an error is its own and others wait for it.

    JAX would wait at the end until all are there. Those that are left notice that this
    one is gone. Where all know of the error, or there is one process, nothing is done.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return
    if not _is_known(error):
        if is_first():
            time.sleep(_LAST_WORDS)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def tell(topic: str, word: Any) -> None:
    """Let the others know something, as JSON; it replaces what was told before."""
    own = f"jlora/{topic}/{jax.process_index()}"
    client = coordination_client()
    client.key_value_set(own, json.dumps(word), allow_overwrite=True)


def told(topic: str) -> dict[int, Any]:
    """What each process has told last, by its number."""
    found = coordination_client().key_value_dir_get(f"jlora/{topic}/")
    return {int(key.rpartition("/")[2]): json.loads(word) for key, word in found}


def stop_together() -> bool:
    """Whether processes agree after which step to stop when one is asked to.

    JAX's own handler of SIGTERM tells the others then, so nothing else may take it.
    """
    return jax.process_count() > 1 and preemption_is_shared()


def asked_to_stop(step: int) -> bool:
    """Whether to stop after this step; every process asks after every step."""
    from jax.experimental import multihost_utils

    return bool(multihost_utils.reached_preemption_sync_point(step))


def _is_known(error: BaseException | None) -> bool:
    """Whether an error, or the one it was made of, has been told to all."""
    return error is not None and (
        getattr(error, _KNOWN, False) or _is_known(error.__cause__)
    )


def _in_a_line(error: Exception | None) -> str | None:
    if error is None:
        return None
    return f"{type(error).__name__}: {error}"


def put(x: Any, where: Sharding) -> jax.Array:
    """An array where it is to lie, also on devices of several processes.

    Each of these has the same values. `jax.device_put` would compare them at a cost,
    takes no keys there, and makes of a local array one whose shards cannot be read.
    """
    if where.is_fully_addressable or not getattr(x, "is_fully_addressable", True):
        return jax.device_put(x, where)
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = put(jax.random.key_data(x), where)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    values = np.asarray(x)
    return jax.make_array_from_callback(x.shape, where, lambda index: values[index])


def on_host(x: Any, box: Box | None = None) -> np.ndarray:
    """An array's values in this process's memory; every process calls it alike.

    What NumPy itself reads of a JAX array stays in memory as long as the array does,
    for a saved model a second one. This reads without.

    Args:
      x: an array.
      box: read this part alone: starts and stops along each axis.
    """
    if not isinstance(x, jax.Array):
        return np.asarray(x) if box is None else np.asarray(x)[box]
    if box is None:
        box = tuple(slice(0, size) for size in x.shape)
    if x.is_fully_replicated:
        return read_shard(x.addressable_data(0), box)
    if not x.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(_part(x, box), tiled=True))
    out = np.empty([s.stop - s.start for s in box], x.dtype)
    for shard in x.addressable_shards:
        within, there = _meeting(box, shard.index, x.shape)
        if shard.replica_id == 0 and all(s.start < s.stop for s in within):
            out[there] = read_shard(shard.data, within)
    return out


def read_shard(x: Any, box: Box | None = None) -> np.ndarray:
    """The values of an array on one device, or a part; of a CPU's it is no copy."""
    whole = box is None or all(
        s == slice(0, n) for s, n in zip(box, x.shape, strict=True)
    )
    if isinstance(x, jax.Array) and next(iter(x.devices())).platform != "cpu":
        # A copy keeps what is read of it, and goes with it.
        return np.asarray(x.copy() if whole or box is None else _part(x, box))
    return np.asarray(x) if box is None else np.asarray(x)[box]


def _meeting(box: Box, index: Box, shape: tuple[int, ...]) -> tuple[Box, Box]:
    """Where a part of an array lies in a shard of it, and where that lies in the part.

    Starts that are no less than stops say that the two do not meet.
    """
    within, there = [], []
    for asked, held, size in zip(box, index, shape, strict=True):
        first, last, _ = held.indices(size)
        start, stop = max(asked.start, first), min(asked.stop, last)
        within.append(slice(start - first, stop - first))
        there.append(slice(start - asked.start, stop - asked.start))
    return tuple(within), tuple(there)


def _part(x: jax.Array, box: Box) -> jax.Array:
    """A part of an array on its devices, one program for all parts of its shape."""
    sizes = tuple(s.stop - s.start for s in box)
    if sizes == x.shape:
        return x
    starts = np.array([s.start for s in box], np.int32)
    return _sliced(x, starts, sizes)


@functools.partial(jax.jit, static_argnums=2)
def _sliced(x: jax.Array, starts: np.ndarray, sizes: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_slice(x, [*starts], sizes)
