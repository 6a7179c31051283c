"""Blocks that begin with "```python raises" get the message of their error below them.

The page's blocks run in order, in an empty folder, when the page is read.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import tempfile
import warnings
from typing import Any

BLOCK = re.compile(r"^```python *(\w*)\n(.*?)^```\n", re.M | re.S)
MESSAGE = """
```{{code-block}} text
:class: message

{kind}: {message}
```
"""


def add_messages(app: Any, name: str, source: list[str]) -> None:
    """Put each message under the block that raises it."""
    if "```python raises\n" not in source[0]:
        return
    names: dict[str, Any] = {}
    with _empty_folder(), warnings.catch_warnings():
        source[0] = BLOCK.sub(lambda found: _shown(found, names), source[0])


def _shown(found: re.Match[str], names: dict[str, Any]) -> str:
    label, block = found.groups()
    if label == "norun":
        return found[0]
    try:
        exec(compile(block, "page", "exec"), names)
    except Exception as error:
        if label != "raises":
            raise
        message = str(error).replace(f"{pathlib.Path.cwd()}/", "/home/me/")
        return found[0] + MESSAGE.format(kind=type(error).__name__, message=message)
    assert label != "raises", f"this raised nothing:\n{block}"
    return found[0]


@contextlib.contextmanager
def _empty_folder() -> Any:
    before = pathlib.Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("source-read", add_messages)
    return {"parallel_read_safe": False}
