"""Options from a TOML file, and such a file with every default."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from jlora._options._option import Option, UsageError, options_of

_KEY = re.compile(r"\[(\w+)\]")  # as cyclopts writes a key


def read_toml(path: Path) -> dict[str, Any]:
    """Return what a TOML file holds.

    Raises:
      UsageError: it cannot be read, or is no TOML.
    """
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no TOML: {error}.") from None


def read_file(kind: type, values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the options that a file gives, checked as a command line's are.

    Args:
      kind: a dataclass of `option`s.
      values: what the file holds, by the options' names; `-` stands for `_` too.
      source: the file's name, for messages.

    Raises:
      UsageError: a key that is no option, which names the nearest; a value that its
        option does not take.
    """
    from cyclopts import App, CycloptsError
    from cyclopts.config import Dict

    from jlora._options._words import call_of, said

    options = options_of(kind)
    values = {key.replace("-", "_"): value for key, value in values.items()}
    _check_keys(values, options, source)
    config = Dict(values, use_commands_as_keys=False, source=source)
    app = App(config=config, version_flags=(), help_flags=())
    app.default(call_of(kind))
    try:
        _, bound, _ = app.parse_args([], exit_on_error=False, print_error=False)
    except CycloptsError as error:
        text = _KEY.sub(r"\1", said(error).replace(f" from {source}", ""))
        raise UsageError(f"{source}: {text}") from None
    given = dict(bound.arguments)
    for name, value in given.items():
        if options[name].is_list:
            _check_count(name, value, options[name], source)
    return given


def template(
    kind: type, head: str = "", leave_out: frozenset[str] = frozenset()
) -> str:
    """Return a TOML file with every option, its default and what it means.

    Args:
      kind: a dataclass of `option`s.
      head: lines before them.
      leave_out: options that are no settings.
    """
    lines = [head] if head else []
    for own in options_of(kind).values():
        if own.own["group"]:
            lines.append(f"\n# {own.own['group']}")
        if own.name in leave_out:
            continue
        choices = ", ".join(own.own["choices"])
        about = own.own["about"] + (f"; one of {choices}" if choices else "")
        lines.append(f"{_line(own)}  # {about}")
    return "\n".join(lines).strip() + "\n"


def _line(own: Option) -> str:
    if own.default is None or own.default is MISSING:
        return f"# {own.name} = {_sample(own)}"
    return f"{own.name} = {json.dumps(own.default)}"  # of these, JSON's form is TOML's


def _sample(own: Option) -> str:
    """A value of the kind that an option without a default takes."""
    bound = own.own["least"] or 1
    word = json.dumps(next(iter(own.own["choices"]), "..."))
    one = {int: str(bound), float: "1.0", bool: "true"}.get(own.kind, word)
    return f"[{one}]" if own.is_list else one


def _check_count(name: str, values: Any, own: Option, source: str) -> None:
    least, most = own.counts
    if not least <= len(values) <= (most or len(values)):
        number = f"{least}" if least == most else f"at least {least}"
        raise UsageError(f"{source}: {name} takes {number} values, not {len(values)}.")


def _check_keys(
    values: Mapping[str, Any], known: Mapping[str, Option], source: str
) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping):
            raise UsageError(f"{source}: {key!r} is a table; settings stand in none.")
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"Did you mean {near[0]!r}?" if near else "Remove it."
            raise UsageError(f"{source}: {key!r} is no setting.\n{hint}")
