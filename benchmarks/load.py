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

from benchmarks import _measure
from jlora import models

# A child imports its library and warms it up on a tiny model first: what is measured
# is the load, and not the import. The peak is Linux's VmHWM, begun anew before the
# load: `ru_maxrss` cannot be, and a child inherits that of its parent. Seconds of the
# processor tell what a busy machine hides.
CHILD = """
import json, pathlib, sys, time
kind, dtype, tiny, folder = sys.argv[1:]
{load}

def status(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(key + ":"))

load(tiny)
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
start, cpu = time.perf_counter(), time.process_time()
model, held = load(folder)
print(json.dumps({
    "seconds": time.perf_counter() - start,
    "cpu_seconds": time.process_time() - cpu,
    "peak": status("VmHWM") - before,
    "model": held,
}))
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
DTYPES = ("float32", "bfloat16")


def main(args: Any) -> None:
    """Write a random checkpoint, load it in turns, print a table, save."""
    missing = {n: why for n in CONTENDERS if (why := _missing(n)) is not None}
    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as place:
        tiny, folder = pathlib.Path(place) / "tiny", pathlib.Path(place) / "model"
        write(tiny, quick=True)
        write(folder, quick=args.quick)
        size = (folder / "model.safetensors").stat().st_size
        for _ in range(args.repeats):
            for dtype in DTYPES:
                for name in [n for n in CONTENDERS if n not in missing]:
                    once = run(name, dtype, tiny, folder)
                    runs.setdefault(f"{name} {dtype}", []).append(once)
    rows = []
    for dtype in DTYPES:
        for name in CONTENDERS:
            what = f"{name} {dtype}"
            rows.append([what, *summarised(runs[what])] if what in runs else
                        [what, missing[name], "", "", ""])  # fmt: skip
    header = ["loader", "s", "cpu s", "peak - model, MiB", "(peak - model) / model"]
    _measure.print_table(rows, header)
    if not args.quick:
        result: dict[str, Any] = {
            "file_bytes": size,
            "file_dtype": "float32",
            "versions": versions(),
        }
        result["load_average"] = os.getloadavg()
        result |= {"rows": rows, "columns": header, "runs": runs, "missing": missing}
        print(_measure.save("load", result))


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
    name: str, dtype: str, tiny: pathlib.Path, folder: pathlib.Path
) -> dict[str, Any]:
    """One load in a process of its own."""
    code = CHILD.replace("{load}", CONTENDERS[name])
    command = [sys.executable, "-c", code, name, dtype, str(tiny), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} {dtype}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def summarised(runs: list[dict[str, Any]]) -> list[float]:
    """Medians: seconds, the processor's, MiB above the model, and in units of it."""
    wall, cpu, peak = (
        statistics.median(run[key] for run in runs)
        for key in ("seconds", "cpu_seconds", "peak")
    )
    model = runs[0]["model"]
    return [wall, cpu, (peak - model) / 2**20, (peak - model) / model]


def _missing(name: str) -> str | None:
    needs = ("torch", "transformers") if name == "transformers" else ()
    absent = [each for each in needs if importlib.util.find_spec(each) is None]
    return f"needs {' and '.join(absent)}" if absent else None


def versions() -> dict[str, str]:
    """Of what took part."""
    found = {}
    for name in ("safetensors", "torch", "transformers"):
        if importlib.util.find_spec(name) is not None:
            found[name] = importlib.metadata.version(name)
    return found
