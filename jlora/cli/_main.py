"""The console: `jlora COMMAND ...`, or `python -m jlora COMMAND ...`.

A command is a line of the table `COMMANDS` and a module of `jlora.cli._commands`.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jlora
from jlora._errors import LoraError
from jlora._options import UsageError

if TYPE_CHECKING:
    from cyclopts import App

_DONE, _FAILED, _MISUSED, _INTERRUPTED = 0, 1, 2, 130


@dataclasses.dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
      name: the word on the command line, and the module.
      summary: what it does, in a line.
      examples: command lines, shown by its help.
    """

    name: str
    summary: str
    examples: str

    @property
    def module(self) -> Any:
        """Its `Options`, and `run`, which prints to stdout and raises what is wrong."""
        return importlib.import_module(f"jlora.cli._commands.{self.name}")

    @property
    def program(self) -> str:
        """The words before its own."""
        return f"jlora {self.name}"

    def app(self, program: str = "") -> App:
        """Its parser, under its own name, or the whole of what stands before."""
        from jlora._options import app_of

        about = f"{self.summary[0].upper()}{self.summary[1:]}."
        more = {"help_epilogue": f"examples:\n{self.examples}"}
        return app_of(self.module.Options, program or self.name, about, **more)

    def read(self, words: Sequence[str]) -> Any:
        """Return its options from the words of a command line.

        Raises:
          UsageError: they are wrong.
          SystemExit: after help was printed.
        """
        from jlora._options import parse

        app, module = self.app(self.program), self.module
        if hasattr(module, "read"):  # a command that leaves words to another parser
            return module.read(words, app, self.program)
        return module.Options(**parse(app, words, self.program)[1])


COMMANDS = (
    Command(
        "inspect",
        "say what the folder of an adapter, a checkpoint, a model or a run holds",
        "  jlora inspect someones/adapter\n"
        "  jlora inspect runs/translate-1\n"
        "  jlora inspect runs/translate-1/adapter --values --plot norms.png\n"
        "  jlora inspect runs/adapter --json | jq '.[0].kernels'",
    ),
    Command(
        "convert",
        "write a PEFT adapter as a checkpoint of jlora, or a checkpoint for PEFT",
        "  jlora convert someones/adapter out/checkpoint\n"
        "  jlora convert runs/adapter out/peft --base google/flan-t5-small \\\n"
        "      --task-type SEQ_2_SEQ_LM",
    ),
    Command(
        "train",
        "train from a file of settings, or resume a run",
        "  jlora train --template translate > my.toml\n"
        "  jlora train my.toml\n"
        "  jlora train my.toml --rank 16 --steps 900 --log-to tensorboard\n"
        "  jlora train --resume runs/translate-1 --steps 2000",
    ),
    Command(
        "sweep",
        "train a run for each combination in a table of settings",
        "  jlora sweep grid.toml\n"
        "  jlora sweep grid.toml --steps 100 --output runs/grid --json\n"
        "  jlora sweep --resume runs/grid",
    ),
    Command(
        "plan",
        "say what a run takes: memory per device, operations, traffic, time",
        "  jlora plan DIR --rank 16 --targets all-linear --batch-size 8 --length 1024\n"
        "  jlora plan DIR/config.json --quantize nf4 --precision bfloat16 --remat \\\n"
        "      --mesh data=4,fsdp=8,tensor=2 --devices h100\n"
        "  jlora plan my.toml --devices l4 --json | jq .memory",
    ),
    Command(
        "merge",
        "fold an adapter into its model, and say what rounding cost",
        "  jlora merge someones/adapter out/merged\n"
        "  jlora merge runs/translate-1 out/merged --base google/flan-t5-small \\\n"
        "      --dtype bfloat16",
    ),
    Command(
        "quantize",
        "write a model with its kernels in 8 or 4 bits, and say what that lost",
        "  jlora quantize meta-llama/Llama-3.2-1B out/llama-nf4\n"
        "  jlora quantize google/flan-t5-small out/t5-int8 --form int8",
    ),
    Command(
        "generate",
        "answer or continue texts with a run, a model, or an adapter on one",
        "  jlora generate runs/translate-1 'Der Wind ist kalt.' 'Die See ist ruhig.'\n"
        "  jlora generate google/flan-t5-small --adapter someones/adapter \\\n"
        "      --file questions.txt --num-beams 4 --json > answers.jsonl\n"
        "  jlora generate meta-llama/Llama-3.2-1B 'Once upon a time' --sample --seed 1",
    ),
    Command(
        "chat",
        "talk with a model, by its chat template if it has one",
        "  jlora chat Qwen/Qwen3-0.6B --sample --temperature 0.7\n"
        "  jlora chat Qwen/Qwen3-0.6B --adapter someones/adapter --system 'Be brief.'",
    ),
    Command(
        "evaluate",
        "measure a model: loss, BLEU of its answers, a classifier's accuracy",
        "  jlora evaluate runs/translate-1\n"
        "  jlora evaluate runs/classify-1 --data new.tsv --text review\n"
        "  jlora evaluate DIR --adapter someones/adapter --data test.de test.en \\\n"
        "      --direction de-en --num-beams 4\n"
        "  jlora evaluate openai-community/gpt2 --data book.txt --json",
    ),
    Command(
        "completion",
        "print a script that lets a shell complete jlora's command lines",
        "  jlora completion bash > ~/.local/share/bash-completion/completions/jlora\n"
        "  jlora completion zsh > ~/.zfunc/_jlora\n"
        "  jlora completion fish > ~/.config/fish/completions/jlora.fish",
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
      argv: the words after `jlora`; None takes the process's.

    Returns:
      The exit status: 0, also for a run that SIGTERM has stopped and that is saved; 1
      for what could not be done, 2 for a misused command line, 3 of a plan that does
      not fit, 130 after Ctrl-C. All but 0 and 3 are explained on stderr.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            status = _run(words)
            sys.stdout.flush()
            return status
        except SystemExit as stop:  # after --help or --version
            return int(stop.code or 0)
        except UsageError as error:
            return _complain(_with_help(str(error), words), _MISUSED)
        except BrokenPipeError:
            return _nobody_listens()
        except (LoraError, ImportError, OSError) as error:
            _complain(str(error), _FAILED)
            _leave_others(error)
            return _FAILED
        except KeyboardInterrupt as stop:
            return _complain(str(stop) or "interrupted.", _INTERRUPTED)


def _run(words: list[str]) -> int:
    """Run a command; return its exit status."""
    known = {command.name: command for command in COMMANDS}
    try:
        import cyclopts  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'the console needs cyclopts, which is missing: pip install "jlora[cli]"'
        ) from error
    if not words or words[0] not in known:
        from jlora._options import parse

        parse(app(), words or ["--help"], "jlora")
        return _DONE
    command = known[words[0]]
    return command.module.run(command.read(words[1:])) or _DONE


def app(*, whole: bool = False) -> App:
    """Return the parser of everything, for its help and for completion.

    Args:
      whole: with the options of each command, which takes longer.
    """
    from cyclopts import App, Group

    from jlora._options._help import Formatter, end_with_help

    root = App(
        name="jlora",
        help="LoRA for JAX.",
        usage="jlora COMMAND ...",
        version=f"jlora {jlora.__version__}",
        version_flags=("--version",),
        help_format="plaintext",
        help_formatter=Formatter(),
        help_epilogue=_EPILOGUE,
        group_commands=Group("commands", sort_key=0),
    )
    for position, command in enumerate(COMMANDS):
        own = command.app() if whole else App(command.name, help=command.summary)
        own.sort_key = position
        root.command(own)
    end_with_help(root)
    return root


_EPILOGUE = """\
exit status:
  0    done, or stopped by SIGTERM with the run saved
  1    it could not be done; stderr says why
  2    the command line is wrong
  3    the plan does not fit (jlora plan)
  130  interrupted by Ctrl-C; 143 by SIGTERM, with nothing saved

`jlora COMMAND --help` says what a command takes."""


def _with_help(message: str, words: Sequence[str]) -> str:
    """Say where help is, where the message does not."""
    if "--help" in message:
        return message
    return f"{message}\nSee jlora {words[0]} --help."


def _complain(message: str, status: int) -> int:
    print(f"jlora: {message}", file=sys.stderr)
    return status


def _leave_others(error: Exception) -> None:
    """End at once where other processes of the run would be waited for."""
    if "jax" in sys.modules:
        from jlora._processes import leave_others

        leave_others(error, _FAILED)


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    print(f"jlora: warning: {message}", file=sys.stderr)


def _nobody_listens() -> int:
    """The reader of a pipe has left; the interpreter must not try to flush into it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return _FAILED
