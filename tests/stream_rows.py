"""Rows that tests stream, and how they are encoded: worker processes import this."""

import os
import sys
import time

import numpy as np


def encode(rows):
    """Columns of rows `{"text": "12 3"}`: 3 tokens, the number's digits, for 12 ..."""
    ids = [
        np.array([int(x) + 2 for x in row["text"].split()], np.int32) for row in rows
    ]
    return {"input_ids": ids, "labels": [x.copy() for x in ids]}


def encode_and_tell(rows):
    """Labels that say whether this process has JAX's devices or PyTorch."""
    jax = sys.modules.get("jax")
    has_devices = jax is not None and bool(jax._src.xla_bridge._backends)
    told = [has_devices, "torch" in sys.modules, os.getpid() % 30_000]
    return {
        "input_ids": [np.array([1, 2], np.int32)] * len(rows),
        "told": [told] * len(rows),
    }


def die(rows):
    os._exit(3)


def sleep(rows):
    time.sleep(60)


def fail(rows):
    raise KeyError("no such column")


def drop(rows):
    return {"input_ids": [], "labels": []}


def texts(count, seed=0, first=0):
    """Lines of 1 to 7 numbers, the first of which is the line's own."""
    rng = np.random.default_rng(seed)
    more = lambda: rng.integers(0, 9, rng.integers(0, 7)).tolist()
    return [" ".join(map(str, [first + i, *more()])) for i in range(count)]


def number(row):
    """The number of the line a row of tokens came from."""
    return int(row[0]) - 2
