"""Options from the words of a command line."""

from __future__ import annotations

import functools
import inspect
import sys
import typing
from collections.abc import Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from jlora._errors import LoraError
from jlora._files import check_local
from jlora._options._option import Option, UsageError, flag, options_of

if TYPE_CHECKING:
    from cyclopts import App, Parameter


def read_words(
    kind: type, words: Sequence[str], *, program: str = "", about: str = ""
) -> dict[str, Any]:
    """Return the options that a command line gives; `--help` prints, and exits.

    Args:
      kind: a dataclass of `option`s.
      words: the command line's.
      program: what comes before them; of a script nothing.
      about: the head of the help.

    Raises:
      UsageError: the words are wrong.
      SystemExit: after `--help`.
    """
    given = parse(app_of(kind, program, about), words, program)[1]
    asked = [word.partition("=")[0] for word in words]
    return dict(sorted(given.items(), key=lambda item: _place(item[0], asked)))


def _place(name: str, words: Sequence[str]) -> int:
    """Where an option is given first, so that messages speak in that order."""
    return words.index(flag(name)) if flag(name) in words else len(words)


def parse(
    app: App, words: Sequence[str], program: str = ""
) -> tuple[Any, dict[str, Any]]:
    """Return what a command line calls, and what it gives to that, by name.

    Raises:
      UsageError: the words are wrong.
      SystemExit: after help was printed.
    """
    from cyclopts import CycloptsError

    try:
        command, bound, _ = app.parse_args(
            list(words), exit_on_error=False, print_error=False
        )
    except CycloptsError as error:
        asked = f"{program} --help".strip()
        raise UsageError(f"{said(error)}\nSee {asked}.") from None
    if getattr(command, "__name__", "") in ("help_print", "version_print"):
        command(*bound.args, **bound.kwargs)
        raise SystemExit(0)
    given = {k: [*v] if isinstance(v, tuple) else v for k, v in bound.arguments.items()}
    return command, given


def said(error: Exception) -> str:
    """Return what is wrong with a command line, as the rest of the library says it."""
    from cyclopts import MissingArgumentError, UnusedCliTokensError

    text = str(error).rstrip(".")
    if isinstance(error, UnusedCliTokensError):
        text = f"nothing takes the word {' '.join(error.unused_tokens or [])!r}"
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        positional = error.argument.is_positional_only()
        text = f"{error.argument.name} is missing" if positional else text
    text = text[0].lower() + text[1:] if text[1:2].islower() else text
    return text if text.endswith("?") else f"{text}."


def app_of(kind: type, program: str = "", about: str = "", **more: Any) -> App:
    """Return cyclopts' parser of a dataclass of options.

    Args:
      kind: the dataclass.
      program: its name in the help.
      about: the head of the help.
      more: of `cyclopts.App`.
    """
    from cyclopts import App

    from jlora._options._help import Formatter, end_with_help

    positional = [
        own.shape for own in options_of(kind).values() if own.own["positional"]
    ]
    app = App(
        name=program or "script",
        help=about,
        usage=" ".join(
            [
                program or f"python {Path(sys.argv[0]).name}",
                *map(str, positional),
                "[OPTIONS]",
            ]
        ),
        help_format="plaintext",
        help_formatter=Formatter(),
        version_flags=(),
        **more,
    )
    app.default(call_of(kind))
    end_with_help(app)
    return app


def call_of(kind: type) -> Any:
    """Return a function whose parameters are the options; it returns what it is given.

    Its signature is what cyclopts reads.
    """
    from cyclopts import Group

    def call(**given: Any) -> dict[str, Any]:
        return given

    parameters, group = [], Group("options", sort_key=0)
    groups: dict[str, Group] = {}  # classes that are put together may name one alike
    for position, own in enumerate(options_of(kind).values()):
        if name := own.own["group"]:
            group = groups.setdefault(name, Group(name, sort_key=position + 1))
        parameters.append(_parameter(own, group))
    parameters.sort(key=lambda one: one.kind)
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {one.name: one.annotation for one in parameters}
    return call


def _parameter(own: Option, group: Any) -> inspect.Parameter:
    """Return one option as cyclopts takes it from a signature."""
    hint: Any = own.kind
    default = inspect.Parameter.empty if own.default is MISSING else own.default
    kind: Any = inspect.Parameter.KEYWORD_ONLY
    if own.own["positional"] and own.is_list:
        kind, default = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.empty
    elif own.own["positional"]:
        kind = inspect.Parameter.POSITIONAL_ONLY
    elif own.is_list:
        hint = list[hint]
    annotation = Annotated[hint, _facts(own, group)]
    return inspect.Parameter(own.name, kind, default=default, annotation=annotation)


def _facts(own: Option, group: Any) -> Parameter:
    from cyclopts import Parameter

    more: dict[str, Any] = {}
    if own.own["choices"]:
        more["choices"] = tuple(own.own["choices"])
    if own.kind in (int, float):
        more["converter"] = functools.partial(_numbers, own)
    if own.kind is Path:
        more["converter"] = _paths
    if own.is_list and not own.own["positional"]:
        more |= {"consume_multiple": own.counts, "negative": ()}
    return Parameter(
        name=own.shape if own.own["positional"] else flag(own.name),
        group=group,
        help=own.about,
        metavar=own.shape,
        show_default=False,
        show_choices=False,
        **more,
    )


def _numbers(own: Option, kind: Any, tokens: Sequence[Any]) -> Any:
    """Convert words; cyclopts alone takes 2.5 for a whole number, and NaN for any."""
    values = [own.number(token.value) for token in tokens]
    return values if typing.get_origin(kind) is list else values[0]


def _paths(kind: Any, tokens: Sequence[Any]) -> Any:
    """Convert words; the address of a bucket is no path."""
    for token in tokens:
        try:
            check_local(token.value)
        except LoraError as error:
            raise ValueError(" ".join(str(error).split()).rstrip(".")) from None
    values = [Path(token.value) for token in tokens]
    return values if typing.get_origin(kind) is list else values[0]
