"""The page of examples: the header of each, which says what it shows and how long."""

from __future__ import annotations

import ast
import pathlib
import re

EXAMPLES = pathlib.Path(__file__).parent.parent.parent / "examples"
OPTION = re.compile(r"`[^`]*`|(?<![\w-])(--[a-z][\w-]*)")  # code first: it stays


def pages() -> dict[str, str]:
    """A section for each; those that made what lies in examples/assets come last."""
    files = sorted(EXAMPLES.glob("*.py"), key=lambda f: (f.stem.startswith("make_"), f))
    return {"_generated/examples.md": "\n".join(map(_section, files))}


def _section(file: pathlib.Path) -> str:
    """A docstring is Markdown as it stands: what is indented in it is code."""
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    title, _, rest = text.partition("\n\n")
    # Options in the text: dashes would become one.
    rest = re.sub(r"(?m)^(?!    ).*$", lambda line: OPTION.sub(_code, line[0]), rest)
    name = f"[{file.name}](../examples/{file.name})"
    return f"## {title.rstrip('.')}\n\n{name}\n\n{rest}\n"


def _code(found: re.Match[str]) -> str:
    return f"`{found[1]}`" if found[1] else found[0]
