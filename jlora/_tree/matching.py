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


def nearest(name: str, paths: Iterable[str], n: int = 5) -> list[str]:
    """The paths most like a name that hit nothing, best first."""
    wanted = name.replace(".", "/").split("/")[-1].lower()
    scored = []
    for path in paths:
        likeness = max(
            difflib.SequenceMatcher(None, wanted, part.lower()).ratio()
            for part in path.split("/")
        )
        scored.append((-likeness, generalise(path), path))
    scored.sort()
    # One example of each repeated layer says enough.
    first = {general: path for _, general, path in reversed(scored)}
    order = dict.fromkeys(general for _, general, _ in scored)
    return [first[general] for general in list(order)[:n]]


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
