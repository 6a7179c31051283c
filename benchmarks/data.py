"""Streaming: examples a second by worker processes, and what packing saves.

Reads `train.de` and `train.en` as JSON lines from disk, tokenises them (as pairs for an
encoder-decoder, and the English alone for a decoder) and counts what comes out. No
device takes part. `own_cpu` is the processor's time in the process that trains.
"""

from __future__ import annotations

import json
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.initialise import _device, _versions
from benchmarks.race import Row, Rows

COLUMNS = ("task", "workers", "batches", "examples_per_s", "tokens_per_s",
           "own_cpu_ms_a_batch", "shapes", "tokens_in_batches", "error")  # fmt: skip
LENGTHS = (64, 64)
ROW = (128, 128)
EXAMPLES = 8192  # that are timed


def run(options: Any) -> Iterator[Rows]:
    """Stream a corpus by buckets and packed; yield a table for each task."""
    import jax

    from jlora import data

    tokenizer = data.load_tokenizer(options.model)
    with tempfile.TemporaryDirectory() as place:
        path = pathlib.Path(place, "train.jsonl")
        write(pathlib.Path(options.data), path, 96 if options.quick else None)
        source = data.stream_files(path)
        encodes = {
            "pairs": data.EncodePairs(tokenizer, "de-en", LENGTHS, empty="skip"),
            "texts": data.EncodeTexts(tokenizer, LENGTHS[0], "en"),
        }
        for task, encode in encodes.items():
            pairs = task == "pairs"
            cuts: dict[str, Row] = {
                "padded to the longest": {"shapes": [LENGTHS]},
                "4 buckets": {"shapes": data.sample_shapes(source, encode, LENGTHS, 4)},
                "packed": {"length": ROW if pairs else ROW[0]},
            }
            rows = []
            for cut, how in cuts.items():
                most = options.workers if cut == "packed" else [0]
                for workers in most:
                    stream = data.Streaming(
                        source,
                        encode,
                        size=32,
                        seed=0,
                        workers=workers,
                        window=32,
                        **how,
                    )
                    wanted = 64 if options.quick else EXAMPLES
                    rows.append(
                        {"task": f"{task}, {cut}", **measured(stream, wanted, pairs)}
                    )
            yield rows, {"jlora": {"versions": _versions(), "device": _device(jax)}}


def write(folder: pathlib.Path, path: pathlib.Path, most: int | None) -> None:
    """Write the two files of lines as one of JSON lines."""
    from jlora import data

    files = [
        next(p for p in folder.iterdir() if p.name.startswith(f"train.{code}"))
        for code in ("de", "en")
    ]
    sides = (data.read_lines(file)[:most] for file in files)
    with path.open("w") as out:
        for de, en in zip(*sides, strict=True):
            out.write(json.dumps({"de": de, "en": en}) + "\n")


def measured(stream: Any, wanted: int, pairs: bool) -> Row:
    """Time whole windows of a stream, but for the first, and count what they hold."""
    reading = stream.stream()
    try:
        while reading.position()["window"] == 0:  # processes begin, and import
            next(reading)
        seen, tokens, room, shapes, batches = 0, 0, 0, set(), 0
        began, cpu = time.perf_counter(), time.process_time()
        while seen < wanted or reading.position()["batch"]:
            batch = next(reading)
            seen += examples_in(batch)
            full, part = room_of(batch, pairs)
            tokens, room, batches = tokens + part, room + full, batches + 1
            shapes.add(tuple(x.shape for x in batch.values()))
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    finally:
        reading.close()
    return {
        "workers": stream.workers,
        "batches": batches,
        "examples_per_s": seen / seconds,
        "tokens_per_s": tokens / seconds,
        "own_cpu_ms_a_batch": 1e3 * cpu / batches,
        "shapes": len(shapes),
        "tokens_in_batches": tokens / room,
    }


def examples_in(batch: dict[str, np.ndarray]) -> int:
    """How many examples a batch holds; copies that fill it up are none."""
    rows = (batch["labels"] >= 0).any(1)
    segments = batch.get("segment_ids")
    return int(rows.sum() if segments is None else segments[rows].max(1).sum())


def room_of(batch: dict[str, np.ndarray], pairs: bool) -> tuple[int, int]:
    """The places of a batch, and how many hold tokens of examples."""
    rows = (batch["labels"] >= 0).any(1)[:, None]
    sides = [rows & (batch["attention_mask"] != 0)]
    sides += [batch["labels"] >= 0] if pairs else []
    return sum(x.size for x in sides), int(sum(x.sum() for x in sides))
