"""Compiled programs, kept from run to run: the second run of a script starts at once.

JAX's own persistent cache does it. Here it gets a folder, a size that it keeps, and a
place on the command line.

Source: https://docs.jax.dev/en/latest/persistent_compilation_cache.html
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import jax

from jlora._errors import OptionError
from jlora._options import option

OFF = "off"
_WRITTEN = 60.0  # seconds, after which nobody is writing an entry still
# JAX's settings, their defaults, and what they are here.
_SETTINGS = (
    # Two gigabytes, hundreds of runs; what was not used for longest goes. With a limit
    # entries are written under a lock, so that several runs may share the folder.
    ("jax_compilation_cache_max_size", -1, 2 * 2**30),
    # Most programs of a small model compile in less than JAX's second.
    ("jax_persistent_cache_min_compile_time_secs", 1.0, 0.1),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramOptions:
    """Where compiled programs are kept."""

    compilation_cache: str | None = option(
        None,
        "where to keep compiled programs for the next run (~/.cache/jlora); or off",
        metavar="DIR|off",
        extends=True,
        group="programs",
    )

    def keep_programs(self) -> Path | None:
        """Have JAX keep programs, as the option says; return the folder, if any."""
        return keep_programs(self.compilation_cache)


def keep_programs(where: str | Path | None = None) -> Path | None:
    """Have JAX keep what it compiles from now on, and read what is there already.

    Args:
      where: a folder; `"off"` keeps nothing. None is what JAX was told by its own
        settings (`JAX_COMPILATION_CACHE_DIR`, `JAX_ENABLE_COMPILATION_CACHE`), and
        without any of them `jlora/programs` in the user's folder of caches,
        `$XDG_CACHE_HOME` or `~/.cache`. One that cannot be made is passed over.

    Returns:
      The folder; None where nothing is kept.

    Raises:
      OptionError: a folder that was asked for cannot be written.
    """
    if where == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
    if not _told("jax_enable_compilation_cache"):
        return None
    if where is None and (told := kept_in()):
        return told
    folder = _users_folder() if where is None else Path(where).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "no permission to write", str(folder))
    except OSError as error:
        if where is None:
            return None
        raise OptionError(
            f"--compilation-cache {folder}: {error.strerror} ({error.filename}).\n"
            "Choose another folder, or off."
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    for name, jaxs_own, ours in _SETTINGS:
        if _told(name) == jaxs_own:  # nobody has said anything else
            jax.config.update(name, ours)
    _remove_halves(folder)
    return folder


def kept_in() -> Path | None:
    """Where JAX keeps what it compiles; None where it keeps nothing."""
    told = _told("jax_compilation_cache_dir")
    return Path(told) if told and _told("jax_enable_compilation_cache") else None


def _remove_halves(folder: Path) -> None:
    """Delete entries that a process which was killed has left half written.

    JAX writes an entry, then when it was used. It reads a half at every start, with a
    warning, never replaces it, and keeps nothing new beside one that lacks its time.
    """
    for entry in folder.glob("*-cache"):
        time_of = entry.with_name(entry.name.removesuffix("-cache") + "-atime")
        with contextlib.suppress(OSError):  # another process deletes them, too
            is_old = time.time() - entry.stat().st_mtime > _WRITTEN
            if is_old and (not time_of.exists() or time_of.stat().st_size != 8):
                entry.unlink()
                time_of.unlink(missing_ok=True)


def _told(name: str) -> Any:
    return getattr(jax.config, name)  # JAX declares its settings as it runs


def _users_folder() -> Path:
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "jlora" / "programs"
