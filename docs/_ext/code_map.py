"""The map of the code: every package and module, by the first line of its docstring.

The floors are those of tests/test_layering.py, which holds the imports to them.
"""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parent.parent.parent
PACKAGE = ROOT / "jlora"


def pages() -> dict[str, str]:
    """The map, from the highest floor down."""
    lines: list[str] = []
    for number, rooms in reversed(list(enumerate(_floors()))):
        here = [place for room in rooms if (place := _place(room)) is not None]
        lines += [f"### Floor {number}", ""]
        for place in here:
            lines += [*_room(place), ""]
    return {"_generated/code_map.md": "\n".join(lines)}


def _floors() -> list[list[str]]:
    tree = ast.parse((ROOT / "tests" / "test_layering.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS":
            return ast.literal_eval(node.value)
    raise ValueError("tests/test_layering.py has no FLOORS")


def _place(room: str) -> pathlib.Path | None:
    """A room's folder or file; some are planned and not there."""
    for place in (PACKAGE / room, PACKAGE / f"{room}.py"):
        if place.exists():
            return place
    return None


def _room(place: pathlib.Path) -> Iterator[str]:
    """A room's own line, and its files, which the reader may unfold."""
    if place.is_file():
        yield f"**`{place.name}`** {_first_line(place)}"
        return
    yield f"**`{place.name}/`** {_first_line(place / '__init__.py')}"
    files = _files(place)
    yield f"\n<details><summary>{len(files)} files</summary>\n"
    for file in files:
        yield f"- `{file.relative_to(place)}`: {_first_line(file)}"
    yield "\n</details>"


def _files(place: pathlib.Path) -> list[pathlib.Path]:
    return sorted(file for file in place.rglob("*.py") if file.name != "__init__.py")


def _first_line(file: pathlib.Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    return text.split("\n\n")[0].replace("\n", " ")
