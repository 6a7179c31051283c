"""Loading a checkpoint: seconds, and the host's memory above the model's own bytes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _results, _workers
from jlora import models

# A child imports its library and warms it up on a tiny model first: what is measured
# is the load, and not the import. `ru_maxrss` is of the whole process; the peak of the
# load alone is what Linux counts after `clear_refs`.
CHILD = """
import json, pathlib, resource, sys, time
kind, dtype, tiny, folder = sys.argv[1:]
{load}

def status(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(key + ":"))

load(tiny)
clear = pathlib.Path("/proc/self/clear_refs")
before = None
if clear.exists():
    clear.write_text("5")
    before = status("VmRSS")
start = time.perf_counter()
model, held = load(folder)
seconds = time.perf_counter() - start
ru_maxrss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
peak = None if before is None else status("VmHWM") - before
print(json.dumps({"seconds": seconds, "peak": peak, "ru_maxrss": ru_maxrss,
                  "model": held}))
"""
JLORA = """
import jax
from jlora import models

def load(folder):
    model, params = models.load(folder, dtype)
    leaves = jax.block_until_ready(jax.tree.leaves(params))
    return (model, params), sum(x.nbytes for x in leaves)
"""
# The defaults, and the dtype that is asked for: `from_pretrained` maps the file, and
# copies or casts from there.
TORCH = """
import torch
from transformers import AutoModelForCausalLM

def load(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    # A mapped file is read when it is used: jlora's parameters are in memory already.
    touched = sum(float(p.detach().flatten()[::1024].float().sum())
                  for p in model.parameters())
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    return (model, touched), held
"""
CONTENDERS = {"jlora": JLORA, "transformers": TORCH}
COLUMNS = ("contender", "dtype", "file_mib", "median_s", "above_model_mib",
           "above_to_model", "error")  # fmt: skip
DTYPES = ("float32", "bfloat16")


def main(options: Any) -> list[_results.Row]:
    """Write a random checkpoint, load it in turns, print a table, save."""
    names = options.contenders or list(CONTENDERS)
    missing = {n: why for n in names if (why := _missing(n)) is not None}
    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as place:
        tiny, folder = pathlib.Path(place) / "tiny", pathlib.Path(place) / "model"
        write(tiny, quick=True)
        write(folder, quick=options.quick)
        size = (folder / "model.safetensors").stat().st_size
        for _ in range(options.repeats):
            for dtype in DTYPES:
                for name in [n for n in names if n not in missing]:
                    once = run(name, dtype, tiny, folder, options.env)
                    runs.setdefault(f"{name} {dtype}", []).append(once)
    rows = []
    for dtype in DTYPES:
        for name in names:
            once = runs.get(f"{name} {dtype}")
            figures = summarised(once) if once else {"error": missing[name]}
            rows.append(
                {"contender": name, "dtype": dtype, "file_mib": size / 2**20, **figures}
            )
    print(_results.table(rows, COLUMNS))
    _results.save(options, {"load": {"versions": versions()}}, rows)
    return rows


def write(folder: pathlib.Path, quick: bool) -> None:
    """A random Llama: about a gigabyte of float32, or next to nothing."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4}
    if not quick:
        sizes = {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816}
        heads = {"num_hidden_layers": 16, "num_attention_heads": 16}
    model = models.Llama(models.LlamaConfig(**sizes, **heads))
    ids = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: 0.02 * rng.standard_normal(x.shape, np.float32), shapes
    )
    models.save(model, params, folder)


def run(
    name: str, dtype: str, tiny: pathlib.Path, folder: pathlib.Path, env: str
) -> dict[str, Any]:
    """One load in a process of its own."""
    code = CHILD.replace("{load}", CONTENDERS[name])
    command = [sys.executable, "-c", code, name, dtype, str(tiny), str(folder)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, **_workers.ENVIRONMENTS[env]},
    )
    if done.returncode:
        raise RuntimeError(f"{name} {dtype}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def summarised(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians: seconds, MiB above the model, and that in units of the model."""
    above = [(run["peak"] or run["ru_maxrss"]) - run["model"] for run in runs]
    extra = statistics.median(above)
    return {
        "median_s": statistics.median(run["seconds"] for run in runs),
        "above_model_mib": extra / 2**20,
        "above_to_model": extra / runs[0]["model"],
        "all": runs,
    }


def _missing(name: str) -> str | None:
    needs = ("torch", "transformers") if name == "transformers" else ()
    absent = [each for each in needs if importlib.util.find_spec(each) is None]
    return f"needs {' and '.join(absent)}" if absent else None


def versions() -> dict[str, str]:
    """Of what took part."""
    found = {}
    for name in ("jax", "safetensors", "torch", "transformers"):
        if importlib.util.find_spec(name) is not None:
            found[name] = importlib.metadata.version(name)
    return found
