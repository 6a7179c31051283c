"""The console: `jlora COMMAND ...`, or `python -m jlora COMMAND ...`.

A command is a `Command` in the table at the end: what it takes, and a function of that.
The function imports what it needs when it is called, so that `jlora --help` is quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jlora
from jlora._files import check_local

Args = argparse.Namespace
_DONE, _FAILED, _MISUSED, _INTERRUPTED = 0, 1, 2, 130


class UsageError(Exception):
    """Options that do not go together."""


@dataclasses.dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
      name: the word on the command line.
      summary: what it does, in a line.
      add_options: declares what it takes.
      run: does it; it prints to stdout, and raises what goes wrong.
      examples: command lines, shown by its help.
    """

    name: str
    summary: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Args], None]
    examples: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
      argv: the words after `jlora`; None takes the process's.

    Returns:
      The exit status: 0, 1 for what could not be done, 2 for a misused command line,
      130 after an interruption. All but the first are explained on stderr.
    """
    parser = _parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # after --help, --version, or a complaint
        return int(stop.code or 0)
    if args.command is None:
        parser.print_help()
        return _DONE
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            args.run(args)
            sys.stdout.flush()
        except UsageError as error:
            return _complain(f"{error}\nSee jlora {args.command} --help.", _MISUSED)
        except (jlora.LoraError, ImportError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                return _nobody_listens()
            return _complain(str(error), _FAILED)
        except KeyboardInterrupt:
            return _complain("interrupted.", _INTERRUPTED)
    return _DONE


# -- commands --------------------------------------------------------------------------


def _inspect_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("folder", type=_folder, metavar="FOLDER", help="what to look at")
    p.add_argument("--json", action="store_true", help="for programs: nothing is cut")


def _inspect(args: Args) -> None:
    _stay_on_host()
    from jlora.cli._inspect import inspect

    reports = inspect(args.folder)
    if args.json:
        print(json.dumps([report.to_json() for report in reports], indent=2))
    else:
        print("\n\n".join(map(str, reports)))


def _convert_options(p: argparse.ArgumentParser) -> None:
    add = p.add_argument
    add("source", type=_folder, metavar="SOURCE", help="a PEFT adapter or a checkpoint")
    add("target", type=_folder, metavar="TARGET", help="the folder to write")
    add(
        "--base",
        metavar="DIR|NAME",
        help="the model it was trained on, a folder or a hub's name (what SOURCE says)",
    )
    add(
        "--head",
        choices=["base", "classification", "masked_lm"],
        help="of BERT and RoBERTa, if not the one the model was saved with",
    )
    add("--num-labels", type=_count, metavar="N", help="of the classification head")
    add("--adapter", metavar="NAME", help="the PEFT adapter in the folder of that name")
    add("--overwrite", action="store_true", help="replace the adapter in TARGET")
    add = p.add_argument_group("to PEFT's format").add_argument
    add("--task-type", metavar="TYPE", help="PEFT's, such as SEQ_2_SEQ_LM, CAUSAL_LM")
    add("--base-name", metavar="NAME", help="where PEFT is to find the model (--base)")
    add(
        "--check",
        choices=["values", "shapes"],
        help="compare the model's values with those it was trained on (the default), "
        "or shapes only, for a model in another dtype",
    )


def _convert(args: Args) -> None:
    _stay_on_host()
    from jlora.cli import _convert
    from jlora.cli._inspect import kind_of

    common = ("base", "head", "num_labels", "adapter", "overwrite")
    options: dict[str, Any] = {name: getattr(args, name) for name in common}
    only = {name: getattr(args, name) for name in ("task_type", "base_name", "check")}
    only = {name: value for name, value in only.items() if value is not None}
    kind = kind_of(args.source)
    if kind == "model":
        raise jlora.CheckpointError(
            f"{str(args.source)!r} is a model, and what is converted are adapters."
        )
    if kind == "peft" and only:
        given = ", ".join(f"--{name.replace('_', '-')}" for name in only)
        raise UsageError(f"{given}: for a SOURCE that is a checkpoint of jlora.")
    to_peft = kind == "checkpoint"
    write = _convert.to_peft if to_peft else _convert.to_checkpoint
    base = write(args.source, args.target, **options, **only)
    what = "PEFT adapter" if to_peft else "adapter checkpoint"
    print(f"{args.target}: {what}, on {base}")


def _folder(text: str) -> Path:
    """A path; the address of a bucket is none."""
    try:
        check_local(text)
    except jlora.CheckpointError as error:
        said = " ".join(str(error).split()).rstrip(".")
        raise argparse.ArgumentTypeError(said) from error
    return Path(text)


def _count(text: str) -> int:
    """A number of things, at least one."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _stay_on_host() -> None:
    """Leave accelerators alone, which may be training what is looked at."""
    if "JAX_PLATFORMS" not in os.environ:
        import jax

        jax.config.update("jax_platforms", "cpu")


COMMANDS = (
    Command(
        "inspect",
        "say what an adapter, a checkpoint, a model or a whole run's folder holds",
        _inspect_options,
        _inspect,
        "  jlora inspect someones/adapter\n"
        "  jlora inspect runs/translate-1\n"
        "  jlora inspect runs/adapter --json | jq '.[0].kernels'",
    ),
    Command(
        "convert",
        "write a PEFT adapter as a checkpoint of jlora, or a checkpoint for PEFT",
        _convert_options,
        _convert,
        "  jlora convert someones/adapter out/checkpoint\n"
        "  jlora convert runs/adapter out/peft --base google/flan-t5-small \\\n"
        "      --task-type SEQ_2_SEQ_LM",
    ),
)


# -- the command line ------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """A parser whose complaint is one message, not the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(_MISUSED, f"{self.prog}: {message}.\nSee {self.prog} --help.\n")


def _parser() -> argparse.ArgumentParser:
    names = "\n".join(f"  {c.name:10}{c.summary}" for c in COMMANDS)
    p = _Parser(
        prog="jlora",
        usage="%(prog)s [--help] [--version] COMMAND ...",
        description=f"LoRA for JAX.\n\ncommands:\n{names}",
        epilog="examples:\n" + "\n".join(c.examples for c in COMMANDS)
        + "\n\nexit status:\n  0  done\n  1  it could not be done; stderr says why"
        "\n  2  the command line is wrong\n  130  interrupted"
        "\n\n`jlora COMMAND --help` says what a command takes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    p.add_argument("--version", action="version", version=f"jlora {jlora.__version__}")
    commands = p.add_subparsers(
        dest="command",
        prog="jlora",
        metavar="COMMAND",
        help=argparse.SUPPRESS,
    )
    for command in COMMANDS:
        own = commands.add_parser(
            command.name,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            epilog=f"examples:\n{command.examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_options(own)
        own.set_defaults(run=command.run)
    return p


def _complain(message: str, status: int) -> int:
    print(f"jlora: {message}", file=sys.stderr)
    return status


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    print(f"jlora: warning: {message}", file=sys.stderr)


def _nobody_listens() -> int:
    """The reader of a pipe has left; the interpreter must not try to flush into it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return _FAILED
