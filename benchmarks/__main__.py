"""One runner: `python -m benchmarks COMMAND [--quick] [--gpu] [--dry]`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import results, sweep
from benchmarks.cases import SHAPES
from benchmarks.race import ENVIRONMENTS, TARGETS, Row

BUSY = 0.4  # load a core, before a run
COMMANDS = ("step_time", "compile_time", "memory", "head", "merge", "generate",
            "text", "load", "sweep", "many", "mixed_batches", "initialise", "qlora",
            "optimisers", "glue", "e2e", "data", "plan", "gpu", "dispatch")  # fmt: skip
# They load a checkpoint, and train on text.
TRAINING = ("initialise", "qlora", "optimisers")
WITHOUT_CASE = ("load", "text", "glue", "e2e", "data", "plan", "gpu", "dispatch")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    out = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = out.add_subparsers(dest="command", required=True)
    for name in (*COMMANDS, "report"):
        words = (_module(name).__doc__ or "").splitlines()[0]
        one = commands.add_parser(name, help=words, allow_abbrev=False)
        add = one.add_argument
        add("--results", metavar="DIR", help="of result files (benchmarks/results)")
        if name != "report":
            _add_run(one.add_argument_group("run").add_argument)
        if name == "gpu":
            add("--budget-s", type=float, default=360.0, help="seconds for all (360)")
        if name not in (*WITHOUT_CASE, *TRAINING, "report"):
            _add_case(one.add_argument_group("what is measured").add_argument)
        if name in ("memory", "head"):
            words = "XLA's account for a GPU that is not here; needs jax[cuda12]"
            add("--compile-for", choices=sorted(TARGETS), help=words)
        if name == "compile_time":
            add("--depths", nargs="+", type=int, metavar="N")
        elif name not in ("data", "plan", "report"):
            words = "peers too (the command's own)"
            add("--contenders", nargs="+", metavar="NAME", help=words)
        if name == "generate":
            add("--beams", nargs="+", type=int, default=[1, 4])
            add("--tokens", type=int, default=64, help="new ones")
        if name == "mixed_batches":
            add("--adapters", nargs="+", type=int, default=[2, 8], metavar="N")
        if name == "text":
            add("--data", metavar="DIR", required=True, help="holds train.{de,en}[.gz]")
            add("--sentences", type=int, default=1024, help="a pass (1024)")
            add("--batch", type=int, default=32)
            add("--buckets", type=int, default=6)
        if name in TRAINING:
            add("--model", metavar="DIR", required=True, help="a T5 with its tokenizer")
            add("--data", metavar="DIR", required=True, help="holds train.{de,en}[.gz]")
            add(
                "--layers",
                nargs="+",
                default=["query", "value"],
                metavar="NAME",
                help="to adapt, or all-linear",
            )
            add("--rank", type=int, default=8)
            add("--steps", type=int, default=150)
            add("--batch", type=int, default=32)
            add("--rates", nargs="+", type=float, default=[1e-3, 3e-3])
        if name == "glue":
            add("--model", metavar="DIR", required=True, help="a BERT or RoBERTa")
            add("--data", metavar="DIR", required=True, help="holds sst2/train.tsv ...")
            add("--tasks", nargs="+", default=["sst2", "cola", "stsb"], metavar="TASK")
            add("--sentences", type=int, help="to train on (all)")
            add("--epochs", type=float, default=3.0)
            add("--seeds", type=int, default=3)
            add("--rank", type=int, default=8)
            add("--batch", type=int, default=32)
            add("--length", type=int, help="tokens; longer texts are cut (128)")
            words = "peak rates: of LoRA, of every weight, of the head alone"
            add("--rates", nargs=3, type=float, default=[2e-3, 1e-4, 5e-3], help=words)
        if name == "e2e":
            add("--model", metavar="DIR", required=True, help="the base; made if new")
            add("--tokenizer", metavar="DIR", help="of a new base, GPT-2's say")
            add("--data", metavar="DIR", required=True, help="the challenge's files")
            add("--base-epochs", type=float, default=4.0, help="of a new base (4)")
            add("--epochs", type=float, default=3.0)
            add("--seeds", type=int, default=1)
            add("--rank", type=int, default=8)
            add("--batch", type=int, default=32)
            words = "peak rates: of LoRA, of every weight"
            add("--rates", nargs=2, type=float, default=[5e-3, 1e-3], help=words)
        if name == "data":
            add("--model", metavar="DIR", required=True, help="with a tokenizer")
            add("--data", metavar="DIR", required=True, help="holds train.{de,en}[.gz]")
            add("--workers", nargs="+", type=int, default=[0, 1, 2], metavar="N")
            words = "no times: shapes, shares and memory, of a machine that is busy"
            add("--counts", action="store_true", help=words)
        if name == "dispatch":
            add("--kernels", nargs="+", type=int, metavar="N", help="adapted (448)")
        if name == "many":
            add("--steps", type=int, default=20, help="of each run (20)")
        if name == "sweep":
            add("--axes", nargs="+", default=sweep.AXES, choices=sweep.AXES)
    return out


def _module(command: str) -> Any:
    return importlib.import_module(f"benchmarks.{command}")


def _add_run(add: Any) -> None:
    add("--quick", action="store_true", help="tiny sizes; saves only with --results")
    add("--gpu", action="store_true", help="the sizes meant for a GPU")
    add("--dry", action="store_true", help="with --gpu: tiny, on the CPU")
    add("--repeats", type=int, default=10, help="rounds that count (10)")
    add("--warmup", type=int, default=2, help="rounds before (2)")
    add("--env", choices=[*ENVIRONMENTS], default="default", help="of all workers")
    words = "another interpreter for a worker, such as PEFT=/venv/bin/python"
    add("--python", nargs="*", default=[], metavar="GROUP=PATH", help=words)
    add("--name", help="of the file (the command's)")
    add("--in-process", action="store_true", help="no worker processes: to debug")


def _add_case(add: Any) -> None:
    add("--shape", nargs="+", choices=[*SHAPES], help="model and batch, or several")
    add("--rank", nargs="+", type=int, help="one or several (8)")
    words = "names of layers, or all-linear; repeat for several (query value)"
    add("--targets", nargs="+", action="append", metavar="NAME", help=words)
    add("--batch", type=int)
    add("--length", dest="source", type=int, help="tokens of the source")
    add("--target-length", dest="target", type=int, help="of the target, if any")
    add("--dtype", choices=["float32", "bfloat16"])
    add("--depth", type=int, help="layers (the model's)")
    add("--scan-layers", action="store_true", help="in our models")
    add("--remat", action="store_true", help="in our models")
    words = "in our models (einsum; with --gpu and bfloat16 cudnn)"
    add("--attn-implementation", choices=["einsum", "xla", "cudnn"], help=words)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run one benchmark; print and save what each case gives; return all rows."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(arguments)
    if options.command == "report":
        print(f"wrote {_module('report').report(options.results)}")
        return []
    options.quick = options.quick or options.dry
    if BUSY * (os.cpu_count() or 1) < results.LOAD and not options.quick:
        print(
            f"The machine is busy (load {results.LOAD:.1f}). PyTorch's threads spin "
            "while they wait and lose several times what JAX's do: figures of this "
            "run compare nothing.",
            file=sys.stderr,
        )
    command = _module(options.command)
    for name in getattr(options, "contenders", None) or ():
        if name not in command.CONTENDERS:
            known = ", ".join(command.CONTENDERS)
            raise SystemExit(f"no contender {name}; there are {known}")
    rows: list[Row] = []
    about: dict[str, Any] = {}
    for found, workers in command.run(options):
        rows, about = rows + found, about | workers
        print(results.table(found, command.COLUMNS), end="\n\n", flush=True)
        results.save(options, arguments[1:], about, rows)
    return rows


if __name__ == "__main__":
    main()
