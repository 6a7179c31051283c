"""Loading a checkpoint: seconds, and the host's memory above the model's own bytes.

A worker imports its library and warms it up on a tiny model first, so that the load is
measured and not the import. Each load is the first of its process, for memory that an
earlier one gave back would be used again.
"""

from __future__ import annotations

import pathlib
import statistics
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.cases import Case
from benchmarks.race import Race, Row, Rows, chosen, race

CONTENDERS: dict[str, tuple[str, str, Row]] = {
    "jlora": ("jlora", "load:jlora", {}),
    "transformers": ("transformers", "load:transformers", {}),
}
COLUMNS = ("contender", "dtype", "file_mib", "median_s", "above_model_mib",
           "above_to_model", "error")  # fmt: skip


def run(options: Any) -> Iterator[Rows]:
    """Write a random checkpoint, load it in turns; yield each dtype's rows."""
    names, repeats = options.contenders or [*CONTENDERS], options.repeats
    options.repeats, options.warmup = 1, 0
    with tempfile.TemporaryDirectory() as place:
        tiny, folder = f"{place}/tiny", f"{place}/model"
        write(tiny, quick=True)
        write(folder, quick=options.quick)
        size = pathlib.Path(folder, "model.safetensors").stat().st_size / 2**20
        for dtype in ("float32", "bfloat16"):
            arguments = {"tiny": tiny, "folder": folder, "dtype": dtype}
            entries = chosen(CONTENDERS, names, **arguments)
            results = [race(entries, options) for _ in range(repeats)]
            head = {"dtype": dtype, "file_mib": size}
            rows = [{"contender": n, **head, **_summary(n, results)} for n in names]
            yield rows, results[0].about


def _summary(name: str, results: list[Race]) -> Row:
    """Medians: seconds, MiB above the model, and that in units of the model."""
    errors = [result.errors[name] for result in results if name in result.errors]
    if errors:
        return {"error": errors[0]}
    facts = [result.facts[name] for result in results]
    above = statistics.median(x["peak"] - x["model"] for x in facts)
    return {
        "median_s": statistics.median(r.times[name][0] / 1e3 for r in results),
        "above_model_mib": above / 2**20,
        "above_to_model": above / facts[0]["model"],
    }


def write(folder: str, quick: bool) -> None:
    """Write a random Llama: about a gigabyte of float32, or next to nothing."""
    from benchmarks.work import Workload
    from jlora import models

    work = Workload(Case("llama-270m-1x8", quick=quick))
    models.save(work.model, work.params, folder)


# -- what a worker builds --------------------------------------------------------------


def jlora(tiny: str, folder: str, dtype: str) -> Any:
    """Loads by `jlora.models.load`."""
    import jax

    from jlora import models

    def load(path: str) -> tuple[Any, int]:
        made = models.load(path, dtype)
        leaves = jax.block_until_ready(jax.tree.leaves(made[1]))
        return made, sum(x.nbytes for x in leaves)

    return _loading(load, tiny, folder)


def transformers(tiny: str, folder: str, dtype: str) -> Any:
    """Loads by `from_pretrained`: it maps the file, and copies or casts from there."""
    import torch
    from transformers import AutoModelForCausalLM

    def load(path: str) -> tuple[Any, int]:
        made = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        leaves = list(made.parameters())
        # A mapped file is read at its use: jlora's parameters are in memory already.
        sum(float(x.detach().flatten()[::1024].float().sum()) for x in leaves)
        return made, sum(x.nbytes for x in leaves)

    return _loading(load, tiny, folder)


def _loading(load: Callable[[str], tuple[Any, int]], tiny: str, folder: str) -> Any:
    """One load, and the most memory it took: Linux counts anew after `clear_refs`."""
    load(tiny)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before, facts = _status("VmRSS"), {}

    def step() -> Any:
        made, facts["model"] = load(folder)
        facts["peak"] = _status("VmHWM") - before
        return made

    return step, facts


def _status(key: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(f"{key}:"))
