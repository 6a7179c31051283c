"""Streaming: examples a second by worker processes, and what packing saves.

Reads `train.de` and `train.en` as JSON lines from disk, tokenises them (as pairs for an
encoder-decoder, and the English alone for a decoder) and counts what comes out. No
device takes part. `own_cpu` is the processor's time in the process that trains. The
last table is of memory: what a process grows by while it goes through a corpus once.
"""

from __future__ import annotations

import copy
import json
import pathlib
import resource
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.initialise import _device, _versions
from benchmarks.race import Contender, Row, Rows, race

COLUMNS = ("task", "workers", "batches", "examples_per_s", "tokens_per_s",
           "own_cpu_ms_a_batch", "shapes", "tokens_in_batches", "corpus_mib",
           "grown_mib", "to_corpus", "error")  # fmt: skip
LENGTHS = (64, 64)
ROW = (128, 128)
EXAMPLES = 8192  # that are timed
CORPORA = (8, 48)  # MiB of JSON lines
TIMES = ("examples_per_s", "tokens_per_s", "own_cpu_ms_a_batch")


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
                several = cut == "packed" and not options.counts
                most = options.workers if several else [0]
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
                    found = measured(stream, wanted, pairs)
                    if options.counts:
                        found = {k: v for k, v in found.items() if k not in TIMES}
                    rows.append({"task": f"{task}, {cut}", **found})
            yield rows, {"jlora": {"versions": _versions(), "device": _device(jax)}}
        yield _memory(options, path, pathlib.Path(place, "large.jsonl"))


def _memory(options: Any, path: pathlib.Path, large: pathlib.Path) -> Rows:
    """What processes grow by that read a corpus whole, or as a stream."""
    options = copy.copy(options)
    options.repeats, options.warmup = 1, 0
    rows, about = [], {}
    for size in (1 / 16,) if options.quick else CORPORA:
        text = path.read_bytes()
        with large.open("wb") as out:
            for _ in range(-(-int(size * 2**20) // len(text))):
                out.write(text)
        for how in ("read whole", "streamed in buckets", "streamed, packed"):
            arguments = {"path": str(large), "model": options.model, "how": how}
            one = Contender(how, "benchmarks.data:reading", arguments, group=how)
            result = race([one], options)
            about |= result.about
            rows.append({"task": f"memory, {how}", **_grown(result, how, large)})
    return rows, about


def _grown(result: Any, how: str, path: pathlib.Path) -> Row:
    corpus = path.stat().st_size / 2**20
    if how in result.errors:
        return {"corpus_mib": corpus, "error": result.errors[how]}
    grown = result.facts[how]["grown_mib"]
    return {"corpus_mib": corpus, "grown_mib": grown, "to_corpus": grown / corpus}


def reading(path: str, model: str, how: str) -> Any:
    """A step that goes through a corpus once; runs in a worker.

    Its memory is looked at before, with one window made, and at every batch.
    """
    import jax

    from jlora import data

    jax.devices()  # the worker says which
    facts: Row = {"grown_mib": 0.0}
    begun = _held()

    def look() -> None:
        facts["grown_mib"] = max(facts["grown_mib"], (_held() - begun) / 2**20)

    if how == "read whole":

        def whole() -> None:
            table = data.read_table(path)
            texts = [table.text(column) for column in table.columns]
            look()
            del texts

        return whole, facts

    tokenizer = data.load_tokenizer(model)
    encode = data.EncodeTexts(tokenizer, LENGTHS[0], "en")
    cut: Row = {"length": ROW[0]} if "packed" in how else {"shapes": [LENGTHS]}
    source = data.stream_files(path)
    stream = data.Streaming(source, encode, size=32, seed=0, window=32, **cut)
    begun = _held()  # with the tokenizer

    def once() -> None:
        batches = stream.stream()
        try:
            while not batches.position()["sources"][0]["epoch"]:
                next(batches)
                look()
        finally:
            batches.close()

    return once, facts


def _held() -> int:
    """Bytes of this process in memory; Linux says."""
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


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
