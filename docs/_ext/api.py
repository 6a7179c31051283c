"""The reference's pages: one for each public package, and some for `jlora` itself.

A page is the package's docstring, a table of its names, and every name's docstring.
Names are those of `__all__`; nothing is listed by hand but the order of the rooms.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any

from sphinx.pycode import ModuleAnalyzer

import jlora

# The rooms of `jlora`'s own names, by the package that defines them.
ROOMS = {
    "_transform": ("functions", "Functions"),
    "_tree": ("trees", "Trees of parameters"),
    "_kernel": ("nodes", "Nodes of a tree"),
    "adapters": ("adapters", "Several adapters"),
    "quant": ("quantised", "Quantised kernels"),
    "planning": ("planning", "Plans"),
    "_errors": ("errors", "Errors"),
}
HIDDEN = ("tree_flatten", "tree_flatten_with_keys", "tree_unflatten", "setup")


@functools.cache
def public() -> Mapping[str, Any]:
    """Every public object by its full name, `jlora.train.fit`."""
    found = {f"jlora.{name}": getattr(jlora, name) for name in jlora.__all__}
    for package in packages():
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            if not inspect.ismodule(value):
                found[f"{package}.{name}"] = value
    return found


def packages() -> list[str]:
    """The public packages with a page: all but the console, which has its own."""
    return [f"jlora.{name}" for name in sorted(jlora._SUBMODULES) if name != "cli"]


def pages() -> dict[str, str]:
    """The pages, as reStructuredText."""
    made = {"reference/api/index.rst": _index()}
    for room, (slug, title) in ROOMS.items():
        names = [name for name in _top() if _room(name) == room]
        made[f"reference/api/{slug}.rst"] = _page(title, names, "jlora")
    for package in packages():
        names = [name for name in public() if name.startswith(f"{package}.")]
        head = f".. automodule:: {package}\n   :no-members:\n"
        made[f"reference/api/{package}.rst"] = _page(package, names, package, head)
    return made


def _top() -> list[str]:
    return [f"jlora.{name}" for name in jlora.__all__]


def _room(name: str) -> str:
    return jlora._MODULE_OF[name.removeprefix("jlora.")].split(".")[0]


def _index() -> str:
    unknown = {_room(name) for name in _top()} - {*ROOMS}
    assert not unknown, f"docs/_ext/api.py has no page for {unknown}"
    slugs = [slug for slug, _ in ROOMS.values()]
    rows = "".join(_page_row(*item) for item in [*ROOMS.items()])
    rows += "".join(
        f"   * - :doc:`{name}`\n     - {_about(name)}\n" for name in packages()
    )
    return f"""{_title("API")}
.. automodule:: jlora
   :no-members:

.. list-table::
   :class: names

{rows}
.. toctree::
   :hidden:

{_indented([*slugs, *packages()])}
"""


def _page_row(room: str, page: tuple[str, str]) -> str:
    """A page of `jlora` itself, and its names."""
    names = [f":py:obj:`~{name}`" for name in _top() if _room(name) == room]
    slug, title = page
    return f"   * - :doc:`{title} <{slug}>`\n     - {' '.join(names)}\n"


def _about(package: str) -> str:
    return _sentence(inspect.getdoc(importlib.import_module(package)) or "")


def _page(title: str, names: list[str], module: str, head: str = "") -> str:
    names = sorted(names, key=lambda name: (inspect.isclass(public()[name]), name))
    rows = "".join(map(_row, names))
    return f"""{_title(title)}
{head}
.. py:currentmodule:: {module}

.. list-table::
   :class: names

{rows}
{"".join(map(_entry, names))}"""


def _row(name: str) -> str:
    value = public()[name]
    text = _data(name)[1] if _is_data(value) else inspect.getdoc(value) or ""
    short = name.rpartition(".")[2]
    return f"   * - :py:obj:`{short} <{name}>`\n     - {_sentence(text)}\n"


def _sentence(text: str) -> str:
    first = text.split("\n\n")[0].replace("\n", " ")
    return first.split(". ")[0].rstrip(".") + "." if first else ""


def _entry(name: str) -> str:
    value = public()[name]
    if inspect.isclass(value):
        return _class(name, value)
    if inspect.isroutine(value):
        return f".. autofunction:: {name}\n\n"
    code, text = _data(name)
    lines = [f":value: {code}"] if len(code) < 80 else []
    lines += ["", *text.splitlines()]
    return f".. py:data:: {name.rpartition('.')[2]}\n{_indented(lines)}\n\n"


def _is_data(value: Any) -> bool:
    return not (inspect.isclass(value) or inspect.isroutine(value))


def _data(name: str) -> tuple[str, str]:
    """The value of a constant or an alias as its code has it, and its `#:` comment."""
    package, _, short = name.rpartition(".")
    path = importlib.import_module(package).__path__
    for module in pkgutil.walk_packages(path, f"{package}."):
        analyzer = ModuleAnalyzer.for_module(module.name)
        code = _code(analyzer.code, short)
        if code is not None:
            analyzer.analyze()
            return code, "\n".join(analyzer.attr_docs.get(("", short), []))
    raise ValueError(f"no module of {package} assigns {short}")


def _code(source: str, name: str) -> str | None:
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if name in [ast.unparse(target) for target in targets]:
                return ast.unparse(node.value)
    return None


def _class(name: str, cls: type) -> str:
    options = [":members:", f":exclude-members: {', '.join(HIDDEN)}"]
    if "__call__" in vars(cls):
        options.append(":special-members: __call__")
    return f".. autoclass:: {name}\n{_indented(options)}\n\n"


def _title(text: str) -> str:
    return f"{text}\n{'=' * len(text)}\n"


def _indented(lines: Any) -> str:
    return "\n".join(f"   {line}" for line in lines)
