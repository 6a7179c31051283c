"""A GPU that is there for minutes: steps, kernels by kind, memory, merge, generation.

Stages run in the order of their worth, each in processes of its own, and what one gives
is printed and saved before the next begins; ratios to a later one are in the file. When
the budget is spent, the stage that runs is ended, and it and those behind it stand in
the table with that as their error. With `--dry` all of it runs at tiny sizes on a CPU.

Kernels are told apart by their names, as the profiler has them; a step's time by the
clock, less that of its kernels, is what the device waited for.
"""

from __future__ import annotations

import collections
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from benchmarks.cases import Case
from benchmarks.race import RATIOS, Contender, Race, Row, Rows, race
from benchmarks.step_time import roofline

LLAMA, T5 = "llama-1b-2x2048", "t5-base-32x512"
ALL = {"rank": 16, "targets": "all-linear"}
SCANNED = {**ALL, "scan_layers": True}
STEP, GENERATE = "gpu:training", "generate:generation"
TOKENS = {"beams": 1, "tokens": 64}


class Stage(NamedTuple):
    """What is measured together.

    Attributes:
      shape: of the case.
      fields: of the case, where they are not the shape's.
      contenders: by name, the process, the build and its arguments beside the case.
    """

    shape: str
    fields: Mapping[str, Any]
    contenders: Mapping[str, tuple[str, str, Row]]


def _steps(*names: str) -> dict[str, tuple[str, str, Row]]:
    return {name: ("jax", STEP, {"kind": name}) for name in names}


def _peft(name: str) -> dict[str, tuple[str, str, Row]]:
    return {name: ("PEFT", "torch_steps:training", {"kind": name})}


STAGES = (
    Stage(LLAMA, ALL, _steps("jlora", "floor")),
    Stage(LLAMA, ALL, _peft("PEFT, torch.compile")),
    Stage(LLAMA, SCANNED, _steps("jlora")),
    Stage(T5, {}, _steps("jlora", "floor")),
    Stage(LLAMA, ALL, _steps("jlora, nf4")),
    Stage(
        LLAMA,
        {"targets": "all-linear"},
        {
            "merge": ("jax", "merge:merge", {"donate": False}),
            "merge, donated": ("jax", "merge:merge", {"donate": True}),
            "copy of the kernels": ("jax", "merge:copy_kernels", {}),
        },
    ),
    Stage(
        T5,
        {},
        {
            "generation": ("jax", GENERATE, {"merged": False, **TOKENS}),
            "generation, merged": ("jax", GENERATE, {"merged": True, **TOKENS}),
        },
    ),
    Stage(T5, {}, _peft("PEFT, torch.compile")),
    Stage(LLAMA, ALL, _steps("full fine-tuning")),
)
CONTENDERS = list(dict.fromkeys(name for s in STAGES for name in s.contenders))
COLUMNS = (
    "case", "contender", "median_ms", "min_ms", "to_floor", "to_compile",
    "first_step_s", "to_roofline", "share_of_peak", "device_gb", "gbytes_per_s",
    "tokens_per_s", "kind", "ms", "kernels", "error",
)  # fmt: skip
MATMUL = "matmul"


def run(options: Any) -> Iterator[Rows]:
    """Yield the rows of each stage, those of its kernels after them."""
    end = time.monotonic() + options.budget_s
    steps: list[Row] = []
    for stage in STAGES:
        names = [n for n in stage.contenders if n in (options.contenders or CONTENDERS)]
        if not names:
            continue
        fused = "einsum" if options.quick else "cudnn"
        sizes = {"quick": options.quick, "attn_implementation": fused}
        case = Case(stage.shape, **sizes, **stage.fields)
        head = {"case": case.title}
        if time.monotonic() >= end:
            error = f"not begun: the {options.budget_s:g} s of the budget were spent"
            yield [{**head, "contender": n, "error": error} for n in names], {}
            continue
        result = race(_entries(stage, names, case), options, end)
        profiles = {n: f.pop("profile", ()) for n, f in result.facts.items()}
        rows = [_whole(row, case, result) for row in result.rows(head, names)]
        steps += [row for row in rows if "first_step_s" in row]
        _compare(steps)
        yield rows, result.about
        kinds = [{**head, "contender": n, **k} for n, f in profiles.items() for k in f]
        if kinds:
            yield kinds, result.about


def _entries(stage: Stage, names: list[str], case: Case) -> list[Contender]:
    """A stage's contenders; beside steps the product that gives the device's rate."""
    out = [
        Contender(name, f"benchmarks.{build}", {"case": case.json, **more}, group)
        for name in names
        for group, build, more in [stage.contenders[name]]
    ]
    if stage.contenders[names[0]][1] == STEP:
        product = {"case": case.json, "size": 64 if case.quick else 8192}
        out.append(Contender(MATMUL, "benchmarks.jax_steps:matmul", product))
    return out


def _whole(row: Row, case: Case, result: Race) -> Row:
    """A row with what its median says: rates, and the memory of its process."""
    if "median_ms" not in row:
        return row
    used = [worker.get("device_bytes") or 0 for worker in result.about.values()]
    out = {**row, **roofline(result, row), "device_gb": max(used) / 1e9 or None}
    out |= dict.fromkeys(("to_floor", "to_compile"))
    seconds = row["median_ms"] / 1e3
    if "bytes_moved" in row:
        out["gbytes_per_s"] = row["bytes_moved"] / 1e9 / seconds
    if row["contender"].startswith("generation"):
        out["tokens_per_s"] = case.batch * TOKENS["tokens"] / seconds
    return out


def _compare(steps: list[Row]) -> None:
    """Fill in the ratios of steps of one case, whichever stages they are of."""
    for column in ("to_floor", "to_compile"):
        others = {r["case"]: r for r in steps if r["contender"] == RATIOS[column]}
        for row in steps:
            if other := others.get(row["case"]):
                row[column] = row["median_ms"] / other["median_ms"]


# -- what a worker builds --------------------------------------------------------------


def training(case: Mapping[str, Any], kind: str) -> Any:
    """A contender's step, and of what kernels it is made."""
    from benchmarks import jax_steps

    step, facts = jax_steps.training(case, kind)
    facts["profile"] = profile(step)
    return step, facts


def profile(step: Callable[[], Any], times: int = 3) -> list[Row]:
    """Milliseconds and number of kernels a step, by kind, the longest first."""
    import jax

    step()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(times):
                step()
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    spent, count = collections.Counter[str](), collections.Counter[str]()
    for name, nanoseconds in _kernels(data):
        kind = kind_of(name)
        spent[kind] += nanoseconds / 1e6 / times
        count[kind] += 1
    rows = [
        {"kind": kind, "ms": ms, "kernels": round(count[kind] / times)}
        for kind, ms in spent.most_common()
    ]
    total = {"kind": "all kernels", "ms": sum(spent.values())}
    return [*rows, {**total, "kernels": round(sum(count.values()) / times)}]


def _kernels(data: Any) -> Iterator[tuple[str, float]]:
    """Each kernel of a GPU; without one each operation of XLA's CPU threads."""
    planes = list(data.planes)
    gpu = [p for p in planes if p.name.startswith("/device:GPU")]
    for plane in gpu or [p for p in planes if p.name == "/host:CPU"]:
        for line in plane.lines:
            if gpu and not line.name.startswith("Stream"):
                continue  # derived: modules, steps, the operations of the source
            for event in line.events:
                if gpu or any(key == "hlo_op" for key, _ in event.stats):
                    yield event.name, event.duration_ns


# The first that is found in a kernel's name; XLA names its own after their operations.
KINDS = (
    ("attention", r"cudnn|fmha|flash|attention"),
    ("Triton's products", r"gemm_fusion|triton_gemm|nested_gemm"),
    ("a library's products", r"nvjet|cublas|cutlass|gemm|gemv|^dot|splitK"),
    ("copies", r"memcpy|memset|copy|transpose"),
    ("reductions", r"reduc"),
    ("looking up", r"gather|scatter|dynamic"),
)


def kind_of(name: str) -> str:
    """What a kernel does, by its name.

    >>> [kind_of(n) for n in ("gemm_fusion_dot_12", "nvjet_tst_128x256", "loop_add")]
    ["Triton's products", "a library's products", 'elementwise']
    """
    for kind, pattern in KINDS:
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "elementwise"
