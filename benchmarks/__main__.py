"""One runner: `python -m benchmarks COMMAND [--quick] [--gpu] [--dry]`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks._cases import SHAPES
from benchmarks._workers import ENVIRONMENTS, TARGETS

BUSY = 0.4  # load a core, before a run

COMMANDS = {
    "step_time": "milliseconds of a training step, against the floor and the peers",
    "compile_time": "seconds to trace, lower and compile; the first step",
    "memory": "a step's memory: XLA's account, and the peak of a process or device",
    "load": "seconds and peak memory of reading a checkpoint, beside transformers",
    "generate": "generated tokens a second",
    "merge": "bytes a second of folding adapters in, against a copy",
    "files": "bytes of a saved adapter",
    "lorafy": "seconds to put adapters on the shapes of an 11-billion-parameter T5",
    "import_time": "seconds of `import jlora` beyond those of `import jax`",
    "text": "tokens of real text a second: length buckets against padding",
    "sweep": "step times over rank, depth, adapters, batch, length",
    "report": "write RESULTS.md and the plots from the result files",
}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    out = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = out.add_subparsers(dest="command", required=True)
    made = {name: commands.add_parser(name, help=h) for name, h in COMMANDS.items()}
    for name, one in made.items():
        if name == "report":
            one.add_argument("--results", metavar="DIR", help="read here, write beside")
            continue
        _add_run(one)
        if name not in ("import_time", "load", "lorafy", "text"):
            _add_case(one)
    for name in ("step_time", "text", "generate", "memory", "load", "merge", "sweep"):
        made[name].add_argument(
            "--contenders",
            nargs="+",
            metavar="NAME",
            help="of these alone; peers too (the command's own choice)",
        )
    step = made["step_time"]
    step.add_argument("--peers", nargs="*", help="PEFT compile loralib qwix quax lorax")
    made["memory"].add_argument("--peers", nargs="*", help="as for step_time")
    made["memory"].add_argument(
        "--compile-for",
        choices=sorted(TARGETS),
        help="XLA's account for a GPU that is not here; needs jax[cuda12]",
    )
    made["compile_time"].add_argument("--depths", nargs="+", type=int, metavar="N")
    made["generate"].add_argument("--beams", nargs="+", type=int, default=[1, 4])
    made["generate"].add_argument("--tokens", type=int, default=64, help="new ones")
    text = made["text"]
    text.add_argument(
        "--data", metavar="DIR", help="holds train.de[.gz], train.en[.gz]"
    )
    text.add_argument("--sentences", type=int, default=1024, help="a pass (1024)")
    text.add_argument("--batch", type=int, default=32)
    text.add_argument("--buckets", type=int, default=6)
    made["sweep"].add_argument(
        "--axes",
        nargs="+",
        default=["rank", "depth", "adapters", "batch", "length"],
        choices=["rank", "depth", "adapters", "batch", "length"],
    )
    return out


def _add_run(one: argparse.ArgumentParser) -> None:
    add = one.add_argument_group("run").add_argument
    add("--quick", action="store_true", help="tiny sizes; saves only with --results")
    add("--gpu", action="store_true", help="the sizes meant for a GPU")
    add("--dry", action="store_true", help="with --gpu: tiny, on the CPU")
    add("--repeats", type=int, default=10, help="rounds that count (10)")
    add("--warmup", type=int, default=2, help="rounds before (2)")
    add("--env", choices=list(ENVIRONMENTS), default="default", help="of all workers")
    add(
        "--python",
        nargs="*",
        default=[],
        metavar="GROUP=PATH",
        help="another interpreter for a worker, such as PEFT=/venv/bin/python",
    )
    add("--results", metavar="DIR", help="where to save (benchmarks/results)")
    add("--name", help="of the file (the command's)")
    add("--in-process", action="store_true", help="no worker processes: to debug")


def _add_case(one: argparse.ArgumentParser) -> None:
    add = one.add_argument_group("what is measured").add_argument
    add("--shape", nargs="+", choices=list(SHAPES), help="model and batch, or several")
    add("--rank", nargs="+", type=int, help="one or several (8)")
    add(
        "--targets",
        nargs="+",
        action="append",
        metavar="NAME",
        help="names of layers, or all-linear; repeat for several (query value)",
    )
    add("--batch", type=int)
    add("--length", type=int, help="tokens of the source")
    add("--target-length", type=int, help="tokens of the target, where there is one")
    add("--dtype", choices=["float32", "bfloat16"])
    add("--scan-layers", action="store_true", help="in our models")
    add("--remat", action="store_true", help="in our models")
    add(
        "--attn-implementation",
        choices=["einsum", "xla", "cudnn"],
        help="in our models (einsum; with --gpu and bfloat16 cudnn)",
    )


def main(argv: Sequence[str] | None = None) -> Any:
    """Parse the command line and run one benchmark; return its rows."""
    options = parser().parse_args(argv)
    options.quick = getattr(options, "quick", False) or getattr(options, "dry", False)
    options.load = os.getloadavg()[0]
    if options.load > BUSY * (os.cpu_count() or 1) and not options.quick:
        print(
            f"The machine is busy (load {options.load:.1f}). PyTorch's threads spin "
            "while they wait and lose several times what JAX's do: figures of this "
            "run compare nothing.",
            file=sys.stderr,
        )
    return importlib.import_module(f"benchmarks.{options.command}").main(options)


if __name__ == "__main__":
    main()
