"""A training script's command line, from a dataclass of its settings."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import types
import typing
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from jlora._errors import LoraError, OptionError
from jlora.train._loop import Interrupted
from jlora.train._run import RunFolder, saved_settings

S = TypeVar("S", bound="RunSettings")


def option(
    default: Any = dataclasses.MISSING,
    about: str = "",
    *,
    group: str | None = None,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
    metavar: Any = None,
    count: int | str | None = None,
    path: bool = False,
    replaces: str | None = None,
    extends: bool = False,
) -> Any:
    """Return a dataclass field that is an option of the command line.

    Args:
      default: its value where it is not given; None where the script decides.
      about: a line of the help.
      group: the heading of the help that it and those after it stand under.
      least: the smallest number allowed.
      above: a bound that a number is above.
      below: a bound that a number is below.
      choices: the words allowed.
      metavar: what the help calls its value.
      count: of a list, how many values: a number, or `"+"` for any.
      path: it names a file or folder, or else something on the hub; what exists is
        kept as an absolute path, so that a run can be resumed from any folder.
      replaces: another option, which it excludes.
      extends: it may be changed when a run is resumed.
    """
    own = {k: v for k, v in locals().items() if k != "default"}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=own)
    return dataclasses.field(default=default, metadata=own)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The settings of every script: where it writes, and what of an earlier run."""

    output: str | None = option(
        None, "where to write (the first free runs/NAME-N)", group="run", metavar="DIR"
    )
    resume: bool = option(False, "continue the run in --output")
    overwrite: bool = option(False, "replace the run in --output")

    def check(self) -> None:
        """Refuse settings that do not go together; raise `OptionError`."""

    def claim(self, name: str) -> RunFolder:
        """Claim the folder to write into, or resume the run in it."""
        kept = dataclasses.asdict(self)
        for own in ("output", "resume", "overwrite"):
            del kept[own]
        if self.resume:
            return RunFolder.resume(self.output or "", kept)
        return RunFolder.claim(self.output, kept, name=name, overwrite=self.overwrite)


class _Parser(argparse.ArgumentParser):
    """A parser that raises what the rest raises."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise OptionError(f"{message}.\nSee --help.")


def read_settings(kind: type[S], argv: Sequence[str], description: str = "") -> S:
    """Read a command line; with --resume, what is not given is taken from the run.

    Args:
      kind: a dataclass of `option`s.
      argv: the words.
      description: the head of the help.

    Raises:
      OptionError: options that are wrong, exclude each other, or differ from those of
        the run that is resumed.
    """
    fields = {field.name: field for field in dataclasses.fields(kind) if field.metadata}
    given = vars(_parser(kind, description).parse_args(argv))
    given = {name: _resolved(fields[name], value) for name, value in given.items()}
    for name in given:
        other = fields[name].metadata["replaces"]
        if other in given:
            raise OptionError(f"{_words(name)} and {_words(other)} exclude each other.")
    values = {**_resumed(kind, fields, given), **given}
    for name in given:
        values |= {o: None for o in [fields[name].metadata["replaces"]] if o}
    settings = kind(**values)
    settings.check()
    return settings


def _words(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _parser(kind: type, description: str) -> _Parser:
    parser = _Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    hints = typing.get_type_hints(kind)
    fields = [field for field in dataclasses.fields(kind) if field.metadata]
    group: Any = parser
    for field in sorted(fields, key=lambda f: f.name in RunSettings.__annotations__):
        own = field.metadata
        if own["group"]:
            group = parser.add_argument_group(own["group"])
        plain, is_list = _plain_type(hints[field.name])
        if plain is bool:
            more: dict[str, Any] = {"action": "store_true"}
        else:
            more = {"type": _reader(plain, own)}
            more |= {"nargs": own["count"] or "+"} if is_list else {}
            more |= {k: own[k] for k in ("choices", "metavar") if own[k]}
            if plain is not str:
                more.setdefault("metavar", "N")
        group.add_argument(_words(field.name), help=own["about"], **more)
    return parser


def _plain_type(hint: Any) -> tuple[type, bool]:
    """Return the type of an option's values, and whether it takes several."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(x for x in typing.get_args(hint) if x is not type(None))
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0], True
    return hint, False


def _reader(kind: type, own: Any) -> Callable[[str], Any]:
    """Return a parser of an option's values."""
    if kind is str:
        return str
    bounds = [("at least", own["least"], lambda x, y: x >= y),
              ("above", own["above"], lambda x, y: x > y),
              ("below", own["below"], lambda x, y: x < y)]  # fmt: skip
    set_bounds = [bound for bound in bounds if bound[1] is not None]
    name = "a whole number" if kind is int else "a number"
    said = " and ".join(f"{words} {least:g}" for words, least, _ in set_bounds)

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not all(f(value, y) for _, y, f in set_bounds):
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} {said}".strip())
        return value

    return parse


def _resolved(field: Any, value: Any) -> Any:
    if not field.metadata["path"]:
        return value
    if isinstance(value, list):
        return [_resolved(field, one) for one in value]
    path = Path(value).expanduser()
    return str(path.resolve()) if path.exists() else value


def _resumed(kind: type, fields: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the run that is to be continued, if any."""
    if not given.get("resume"):
        return {}
    if "output" not in given or given.get("overwrite"):
        raise OptionError("--resume needs --output DIR, and excludes --overwrite.")
    folder = Path(given["output"]).expanduser()
    saved = saved_settings(folder)
    if not saved.keys() <= fields.keys():
        unknown = ", ".join(sorted(saved.keys() - fields.keys()))
        raise OptionError(f"the run in {folder} has settings unknown here: {unknown}.")
    for name, value in given.items():
        if name not in saved or fields[name].metadata["extends"]:
            continue
        if value != saved[name]:
            raise OptionError(
                f"the run in {folder} has {_words(name)} {_shown(saved[name])}, not "
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
      The exit status: 0; 2 for an error, which stderr explains; 130 for a run that was
      stopped, with the command that continues it.
    """
    settings = None
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            words = sys.argv[1:] if argv is None else argv
            settings = read_settings(kind, words, description)
            run(settings)
        except SystemExit as stop:  # after --help
            return int(stop.code or 0)
        except (LoraError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except Interrupted as place:
            print(f"Stopped and saved after {place}")
            return 130
        except KeyboardInterrupt:
            print("\nStopped outside of training.", file=sys.stderr)
            return 130
    return 0


def _show_warning(message: Any, category: Any, *rest: Any, **more: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)
