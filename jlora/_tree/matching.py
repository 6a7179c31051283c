"""The one matcher: entries, regular expressions and roles against paths; coverage."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence

from jlora._errors import TargetError
from jlora._paths import generalise, module_of
from jlora._tree.conventions import ROLES


@dataclasses.dataclass(frozen=True)
class Hit:
    """One entry's hit on one leaf.

    Attributes:
      path: the leaf.
      role: the role name by which it was found, or None for a literal match.
      part: `(k, n)` where only the k-th of n output slices is meant, or None.
      whole: True if the entry named the leaf itself rather than a module above it.
    """

    path: str
    role: str | None = None
    part: tuple[int, int] | None = None
    whole: bool = False


def match_entry(entry: str, path: str) -> Hit | None:
    """Match a list entry: a run of whole path segments, or a role.

    The run may be written with dots or slashes and stand anywhere in the path.

    >>> match_entry("attention.query", "enc/attention/query/kernel").path
    'enc/attention/query/kernel'
    >>> match_entry("query", "encoder/block/0/SelfAttention/q/kernel").role
    'query'
    >>> match_entry("quer", "enc/attention/query/kernel") is None
    True
    """
    parts = entry.replace(".", "/").strip("/")
    if f"/{parts}/" in f"/{path}/":
        return Hit(path, whole=f"/{path}".endswith(f"/{parts}"))
    module = module_of(path)
    for spelling in ROLES.get(entry, ()):
        suffix, _, part = spelling.partition("#")
        if module == suffix or module.endswith("/" + suffix):
            number, _, count = part.partition("/")
            return Hit(path, entry, (int(number), int(count)) if part else None)
    return None


def match_regex(pattern: str, path: str) -> Hit | None:
    """Match a regular expression against the whole path of a leaf or its module.

    The path may be written with slashes or with dots, as in PEFT.
    """
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise TargetError(
            f"targets={pattern!r} is not a regular expression: {error}.\nPass a list, "
            f"targets=[{pattern!r}], to match path segments by name."
        ) from None
    module = module_of(path)
    if any(regex.fullmatch(p) for p in (path, path.replace("/", "."))):
        return Hit(path, whole=True)
    if module and any(regex.fullmatch(p) for p in (module, module.replace("/", "."))):
        return Hit(path)
    return None


def match_pattern(pattern: str, path: str) -> Hit | None:
    """Match a dict's key: as a list entry, or as a regular expression if it is one."""
    hit = match_entry(pattern, path)
    if hit is None and re.search(r"[*+?\[\]()|\\^$]", pattern):
        hit = match_regex(pattern, path)
    return hit


def likely_names(entry: str, paths: Iterable[str]) -> list[str]:
    """Names in the paths, and roles that hit some, which an entry may be meant for.

    >>> likely_names("valeu", ["encoder/block/0/SelfAttention/v/kernel"])
    ['value']
    """
    paths = list(paths)
    names = {part for path in paths for part in path.split("/")}
    names |= {role for role in ROLES if any(match_entry(role, p) for p in paths)}
    wanted = [part for part in _segments(entry) if part not in names]
    alike = {
        name: max((_likeness(w, name) for w in wanted), default=0) for name in names
    }
    # What is a good deal less alike than the best was hardly meant.
    least = max(0.6, max(alike.values(), default=0) - 0.1)
    close = sorted((-value, name) for name, value in alike.items() if value >= least)
    return [name for _, name in close[:3]]


def nearest(entry: str, paths: Iterable[str], n: int = 5) -> list[str]:
    """The paths most like an entry that hit nothing, best first.

    Those that a likely name hits come first, then those whose names are most alike.
    """
    paths = list(paths)
    likely, wanted = likely_names(entry, paths), _segments(entry)

    def rank(path: str) -> tuple[bool, float, str]:
        parts = path.split("/")
        alike = [max(_likeness(each, part) for part in parts) for each in wanted]
        is_likely = any(match_entry(name, path) for name in likely)
        return not is_likely, -sum(alike), generalise(path)

    # One example of each repeated layer says enough.
    first: dict[str, str] = {}
    for path in sorted(paths, key=rank):
        first.setdefault(generalise(path), path)
    return list(first.values())[:n]


def _segments(entry: str) -> list[str]:
    """The names in an entry, which may be a regular expression."""
    return re.findall(r"[\w-]+", entry) or [entry]


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one.lower(), other.lower()).ratio()


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What an entry hit in one family of repeated blocks, and what it missed."""

    entry: str
    block: str  # e.g. `encoder/block/*`
    hit: tuple[str, ...]
    missed: tuple[str, ...]

    def __str__(self) -> str:
        total = len(self.hit) + len(self.missed)
        return (
            f"{self.entry!r} hits {len(self.hit)} of the {total} blocks of "
            f"{self.block!r} and misses {_few(self.missed)}"
        )


def coverage(entry: str, hits: Sequence[str], paths: Sequence[str]) -> list[Coverage]:
    """The families of repeated blocks that an entry covers only in part.

    Families are taken at the outermost number of a path. An entry that itself holds
    a number means what it says and is not reported.
    """
    if re.search(r"\d", entry):
        return []
    hit_blocks = {block for path in hits if (block := _block(path))}
    families = {generalise(block) for block in hit_blocks}
    found = []
    for family in sorted(families):
        blocks = {b for p in paths if (b := _block(p)) and generalise(b) == family}
        missed = sorted(blocks - hit_blocks, key=_natural)
        if missed:
            hit = sorted(blocks & hit_blocks, key=_natural)
            found.append(Coverage(entry, family, tuple(hit), tuple(missed)))
    return found


def _block(path: str) -> str | None:
    """The path up to its first numbered part, or None."""
    parts = path.split("/")
    for i, part in enumerate(parts):
        if re.search(r"(^|_)\d+$", part):
            return "/".join(parts[: i + 1])
    return None


def _natural(text: str) -> list[int | str]:
    return [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", text)]


def _few(items: Sequence[str], n: int = 4) -> str:
    shown = ", ".join(items[:n])
    return shown if len(items) <= n else f"{shown} and {len(items) - n} more"
