"""The help of the console and of each command, as `jlora --help` prints it."""

from __future__ import annotations

import contextlib
import io
import os
import re

from jlora import cli


def pages() -> dict[str, str]:
    """A section for each command."""
    whole = _help([])
    parts = [f"```text\n{whole}```\n"]
    for command in _commands(whole):
        parts.append(f"## jlora {command}\n\n```text\n{_help([command])}```\n")
    return {"_generated/console.md": "\n".join(parts)}


def _help(words: list[str]) -> str:
    out = io.StringIO()
    os.environ["COLUMNS"] = "88"  # the width of the help
    with contextlib.redirect_stdout(out):
        status = cli.main([*words, "--help"])
    assert status == 0, f"jlora {' '.join(words)} --help ended with {status}"
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    return "\n".join(line.rstrip() for line in plain.strip("\n").split("\n")) + "\n"


def _commands(text: str) -> list[str]:
    """The first word of each line below the title that names commands."""
    _, _, below = re.split(r"(?im)^(commands.*)$", text, maxsplit=1)
    section = below.strip("\n").split("\n\n")[0]
    lines = re.findall(r"^ {2,4}([a-z][a-z-]*)(?: {2,}|$)", section, re.M)
    assert lines, f"no commands in:\n{text}"
    return lines
