"""A training script's command line, from a dataclass of its settings."""

from __future__ import annotations

import dataclasses
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jlora._errors import LoraError, OptionError
from jlora._options import UsageError, flag, options_of, read_file, read_words
from jlora._options import option as option
from jlora._options._option import Option
from jlora._processes import leave_others, one_voice
from jlora._programs import ProgramOptions
from jlora.train._distributed import DistributedOptions
from jlora.train._loop import Interrupted
from jlora.train._run import TASK, RunFolder, saved_settings

S = TypeVar("S", bound="RunSettings")

_OF_A_PROCESS = ("compilation_cache", "distributed")  # how it is run, not what


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings(ProgramOptions, DistributedOptions):
    """The settings of every script: where it writes, and what of an earlier run."""

    output: str | None = option(
        None, "where to write (the first free runs/NAME-N)", group="run", metavar="DIR"
    )
    resume: bool = option(False, "continue the run in --output")
    overwrite: bool = option(False, "replace the run in --output")
    log_to: list[str] | None = option(
        None,
        "also send the log there",
        choices=("tensorboard", "wandb"),
        extends=True,
    )

    def check(self) -> None:
        """Refuse settings that do not go together; raise `OptionError`."""

    def claim(self, name: str, task: str | None = None, **beside: Any) -> RunFolder:
        """Claim the folder to write into, or resume the run in it.

        Args:
          name: what a folder is named by.
          task: what the run's settings say that it is of; None is the name, too.
          **beside: what else they are to hold, as JSON.
        """
        kept = self.kept(task or name, **beside)
        if self.resume:
            return RunFolder.resume(self.output or "", kept)
        return RunFolder.claim(self.output, kept, name=name, overwrite=self.overwrite)

    def kept(self, task: str, **beside: Any) -> dict[str, Any]:
        """Return what a run's folder keeps of its settings.

        Args:
          task: that the run is of.
          **beside: what else to keep.
        """
        kept = {TASK: task, **dataclasses.asdict(self), **beside}
        for own in (
            "output",
            "resume",
            "overwrite",
            "compilation_cache",
            "distributed",
        ):
            del kept[own]
        return kept


def read_settings(
    kind: type[S],
    argv: Sequence[str],
    description: str = "",
    *,
    program: str = "",
    file: Mapping[str, Any] | None = None,
    source: str = "",
    beside: Sequence[str] = (),
) -> S:
    """Read a command line; with `--resume`, what is not given is taken from the run.

    Args:
      kind: a dataclass of `option`s.
      argv: the words.
      description: the head of the help.
      program: what comes before the words, for the help; of a script nothing.
      file: settings of a file, which the words override.
      source: the file's name.
      beside: what a run that is resumed has kept besides settings.

    Raises:
      OptionError: options that are wrong, exclude each other, or differ from those of
        the run that is resumed.
    """
    options = options_of(kind)
    given = read_words(kind, argv, program=program, about=description)
    _check_excluded(options, given)
    if file is not None:
        filed = read_file(kind, file, source)
        _check_excluded(options, filed)
        overridden = {options[name].own["replaces"] for name in given}
        kept = {k: v for k, v in filed.items() if k not in overridden}
        given = {**kept, **given}
    given = {name: options[name].resolved(value) for name, value in given.items()}
    values = {**_resumed(options, given, beside), **given}
    for name in given:
        values |= {o: None for o in [options[name].own["replaces"]] if o}
    settings = kind(**values)
    settings.meet()  # before a mesh is looked at
    settings.check()
    return settings


def _check_excluded(options: Mapping[str, Option], given: Mapping[str, Any]) -> None:
    for name in given:
        other = options[name].own["replaces"]
        if other in given:
            raise UsageError(f"{flag(name)} and {flag(other)} exclude each other.")


def _resumed(
    options: Mapping[str, Option], given: Mapping[str, Any], beside: Sequence[str]
) -> dict[str, Any]:
    """Return the settings of the run that is to be continued, if any."""
    if not given.get("resume"):
        return {}
    if "output" not in given or given.get("overwrite"):
        raise UsageError("--resume needs --output DIR, and excludes --overwrite.")
    folder = Path(given["output"]).expanduser()
    saved = saved_settings(folder)
    saved = {k: v for k, v in saved.items() if k not in (TASK, *beside)}
    if not saved.keys() <= options.keys():
        unknown = ", ".join(sorted(saved.keys() - options.keys()))
        raise OptionError(f"the run in {folder} has settings unknown here: {unknown}.")
    for name, value in given.items():
        if name not in saved or options[name].own["extends"]:
            continue
        if value != saved[name]:
            raise OptionError(
                f"the run in {folder} has {flag(name)} {_shown(saved[name])}, not "
                f"{_shown(value)}.\nResume without it, or start a new run in another "
                "folder."
            )
    return saved


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "as it is by default" if value is None else str(value)


def command_line(
    kind: type[S],
    run: Callable[[S], None],
    argv: Sequence[str] | None = None,
    description: str = "",
) -> int:
    """Run a script: read its settings, call `run`, say what went wrong.

    Args:
      kind: the dataclass of its settings.
      run: does it.
      argv: the words of the command line; None takes the process's.
      description: the head of the help.

    Returns:
      The exit status: 0; 2 for an error, which stderr explains. For a run that was
      stopped and saved it is 130 after Ctrl-C and 0 after SIGTERM, by which schedulers
      take a machine back; stdout then has the command that continues it.
    """
    settings = None
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            words = sys.argv[1:] if argv is None else argv
            settings = read_settings(kind, words, description)
            settings.keep_programs()
            with one_voice():
                run(settings)
        except SystemExit as stop:  # after --help
            return int(stop.code or 0)
        except (LoraError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            leave_others(error, 2)
            return 2
        except Interrupted as place:
            with one_voice():
                print(stopped(place))
            return place.status
        except KeyboardInterrupt:
            print("\nStopped outside of training.", file=sys.stderr)
            return 130
    return 0


def stopped(place: Interrupted) -> str:
    """Say what became of a run that was asked to stop."""
    by = " by SIGTERM" if place.signal == signal.SIGTERM else ""
    saved = " and saved" if place.saved else ""
    return f"Stopped{by}{saved} after {place}"


def _show_warning(message: Any, category: Any, *rest: Any, **more: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)
