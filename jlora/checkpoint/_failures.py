"""What goes wrong while Orbax writes, in words, and without its log of tracebacks."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# TensorStore's messages end with what the operating system said.
_CODE = re.compile(r"os_error_code='(\d+)'")
_KNOWN = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file would be larger than a limit allows",
    errno.EROFS: "the file system can only be read",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
}


def brief(error: BaseException) -> str:
    """An error in one line; what the operating system refused, in plain words.

    >>> brief(OSError(28, "No space left on device", "/runs/1"))
    "the disk is full ('/runs/1')"
    """
    code = _os_code(error)
    if code is not None:
        said = _KNOWN.get(code, os.strerror(code))
        file = getattr(error, "filename", None)
        return f"{said} ({str(file)!r})" if file else said
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(".: ")[:300]


def _os_code(error: BaseException) -> int | None:
    """The number that the operating system gave, of an error or of its cause."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if found := _CODE.search(str(error)):
        return int(found[1])
    return None if error.__cause__ is None else _os_code(error.__cause__)


def failure(work: Callable[[], Any]) -> Exception | None:
    """What went wrong, or None."""
    try:
        work()
    except Exception as error:
        return error
    return None


class _Quiet(logging.Filter):
    """Drops what Orbax logs of errors that it raises too."""

    def filter(self, record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Orbax's tracebacks from the screen: errors are raised, and said once.

    When a write fails, Orbax leaves the others to end by themselves, and TensorStore
    prints of each that nobody waits for it.
    """
    log, own, before = logging.getLogger("absl"), _Quiet(), sys.excepthook

    def hook(kind: Any, error: Any, trace: Any) -> None:
        if not (kind is RuntimeError and str(error) == "Event loop is closed"):
            before(kind, error, trace)

    log.addFilter(own)
    sys.excepthook = hook
    try:
        yield
    finally:
        log.removeFilter(own)
        if sys.excepthook is hook:
            sys.excepthook = before


def clear(folder: Path, pattern: str) -> None:
    """Delete what a save that failed has left, which may be what fills the disk.

    The writes that were under way end some moments later, and make their folders anew.
    """
    clean = 0
    for _ in range(40):
        left = list(folder.glob(pattern))
        for place in left:
            shutil.rmtree(place, ignore_errors=True)
        clean = 0 if left else clean + 1
        if clean == 3:
            return
        time.sleep(0.05)
