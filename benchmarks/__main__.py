"""One runner: `python -m benchmarks step_time|compile_time|memory|load [--quick]`."""

from __future__ import annotations

import argparse
import importlib


def main() -> None:
    """Parse the command line and run one benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, saves nothing"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step_time", help="milliseconds a step, ratios")
    step.add_argument("--batch", type=int, default=8)
    step.add_argument("--source", type=int, default=64)
    step.add_argument("--target", type=int, default=64)
    step.add_argument("--dtype", default="float32")
    step.add_argument("--targets", nargs="+", default=["query", "value"])
    step.add_argument("--repeats", type=int, default=10)
    step.add_argument("--name", default="t5_small", help="of the file in results/")
    compile_time = commands.add_parser("compile_time", help="trace, lower, compile")
    compile_time.add_argument("--repeats", type=int, default=3)
    commands.add_parser("memory", help="XLA's memory analysis of a step")
    load = commands.add_parser("load", help="seconds and peak memory of a load")
    load.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    importlib.import_module(f"benchmarks.{args.command}").main(args)


if __name__ == "__main__":
    main()
