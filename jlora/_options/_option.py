"""An option: a field of a dataclass, with what its values may be."""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jlora._errors import OptionError


class UsageError(OptionError):
    """A command line, or a file of settings, that is wrong."""


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
    positional: bool = False,
) -> Any:
    """Return a dataclass field that is an option of the command line.

    Args:
      default: its value where it is not given; None where the script decides. Without
        one it must be given.
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
      positional: its value stands on the command line without a name; a list takes all
        that are left.
    """
    own = {k: v for k, v in locals().items() if k != "default"}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=own)
    return dataclasses.field(default=default, metadata=own)


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a dataclass.

    Attributes:
      name: the field's.
      kind: the type of a value.
      is_list: whether it takes several.
      default: its value where it is not given; `dataclasses.MISSING` without one.
      own: what `option` was told.
    """

    name: str
    kind: type
    is_list: bool
    default: Any
    own: Mapping[str, Any]

    @property
    def shape(self) -> str | None:
        """What the help calls its value; None of a switch, which has none."""
        if self.kind is bool:
            return None
        name = self.own["metavar"]
        if name is None and not self.own["choices"]:
            kinds = {int: "N", float: "N", Path: "PATH"}
            name = kinds.get(self.kind, self.name.replace("_", "-").upper())
        if isinstance(name, tuple):
            return " ".join(name)
        if name is None:
            name = "|".join(self.own["choices"]) if self._choices_are_short else "WORD"
        return f"{name}..." if self.is_list else name

    @property
    def _choices_are_short(self) -> bool:
        return len("|".join(self.own["choices"])) <= 20

    @property
    def about(self) -> str:
        """The line of the help, with the choices where they are no shape."""
        about: str = self.own["about"]
        if self.own["choices"] and (self.own["metavar"] or not self._choices_are_short):
            about += f"; one of {', '.join(self.own['choices'])}"
        return about

    @property
    def counts(self) -> tuple[int, int | None]:
        """The least and the most values of a list."""
        count = self.own["count"]
        return (count, count) if isinstance(count, int) else (1, None)

    def number(self, text: str) -> Any:
        """Return the number that a text is; raise `ValueError` if it may not be."""
        bounds = [("at least", self.own["least"], lambda x, y: x >= y),
                  ("above", self.own["above"], lambda x, y: x > y),
                  ("below", self.own["below"], lambda x, y: x < y)]  # fmt: skip
        bounds = [bound for bound in bounds if bound[1] is not None]
        try:
            value = self.kind(text)
        except ValueError:
            value = math.nan
        if math.isfinite(value) and all(meets(value, y) for _, y, meets in bounds):
            return value
        name = "a whole number" if self.kind is int else "a number"
        said = " and ".join(f"{words} {bound:g}" for words, bound, _ in bounds)
        raise ValueError(f"{text!r} is not {name} {said}".strip())

    def resolved(self, value: Any) -> Any:
        """Return a path that exists in full, and anything else as it is."""
        if not self.own["path"]:
            return value
        if isinstance(value, list):
            return [self.resolved(one) for one in value]
        path = Path(value).expanduser()
        return type(value)(path.resolve()) if path.exists() else value


def options_of(kind: type) -> dict[str, Option]:
    """Return the options of a dataclass by name, in the order of its help.

    Those of its ancestors that it inherits come last, in the order of inheritance.
    """
    hints = typing.get_type_hints(kind)
    fields = [field for field in dataclasses.fields(kind) if field.metadata]
    found = {}
    for field in sorted(fields, key=lambda field: _depth(kind, field.name)):
        plain, is_list = _plain(hints[field.name])
        found[field.name] = Option(
            field.name, plain, is_list, _default(field), field.metadata
        )
    return found


def flag(name: str) -> str:
    """Return an option's word on the command line."""
    return f"--{name.replace('_', '-')}"


def _depth(kind: type, name: str) -> int:
    """How far up in a class's ancestry a field is first declared.

    One that a class declares again, with another default, stays in its group.
    """
    return max(
        depth
        for depth, cls in enumerate(kind.__mro__)
        if name in inspect.get_annotations(cls)
    )


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _plain(hint: Any) -> tuple[type, bool]:
    """Return the type of an option's values, and whether it takes several."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(x for x in typing.get_args(hint) if x is not type(None))
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0], True
    return hint, False
