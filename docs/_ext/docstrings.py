"""Makes docstrings, which are written for `help()`, into pages of a reference.

Words between backquotes are code, and links where they name something public, in
docstrings and in the Markdown pages; a name of jlora that does not exist is a warning.
Indented lines before the first section (`Args:`) are code or tables. Signatures show
types as the code writes them.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Iterable
from typing import Any

import api
from docutils import nodes
from sphinx import addnodes
from sphinx.domains.python import PyObject
from sphinx.transforms import SphinxTransform
from sphinx.util import logging
from sphinx.util.inspect import stringify_signature

SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Source|Sources):")
NAME = re.compile(r"^(jlora(?:\.\w+)+|\w+(?:\.\w+)*)(\(.*\))?$", re.S)
log = logging.getLogger(__name__)


# -- text ------------------------------------------------------------------------------


def as_rst(app: Any, what: str, name: str, obj: Any, *rest: Any) -> None:
    """Mend in place what reStructuredText, or napoleon, would read otherwise."""
    lines = rest[-1]
    if what in ("attribute", "data", "property"):
        lines.insert(0, "\\ ")  # or the text before a colon would be the type
    start = len(lines)
    if what != "module":
        start = next((i for i, x in enumerate(lines) if SECTION.match(x)), start)
    text = "\n".join([*_literal_blocks(lines[:start]), *_returns(lines[start:])])
    # "`option`s": code ends before a letter.
    text = re.sub(r"(``.+?``|`[^`]+`)([a-z]?)", _apart, text)
    lines[:] = text.split("\n")


def _apart(found: re.Match[str]) -> str:
    return f"{found[1]}\\ {found[2]}" if found[2] else found[1]


def _literal_blocks(lines: list[str]) -> list[str]:
    made: list[str] = []
    for line in lines:
        begins = line.startswith("    ") and made and not made[-1].strip()
        if begins and not any(x.startswith(" ") for x in _paragraph(made)):
            made += ["::", ""]
        made.append(line)
    return made


def _returns(lines: list[str]) -> list[str]:
    """`Returns:` as a field: napoleon takes what stands before a colon for a type."""
    made = []
    for line in lines:
        if line in ("Returns:", "Yields:"):
            made.append(f":{line.lower()}")
        elif several := re.match(r"^  (\w+(?:, \w+)+):", line):  # "a, b: factors"
            names = several[1]
            made.append(line.replace(names, names.replace(", ", ","), 1))
        elif made and made[-1] in (":returns:", ":yields:"):
            made[-1] += f" {line.strip()}"
        else:
            made.append(line)
    return made


def _paragraph(lines: list[str]) -> Iterable[str]:
    """The lines of the last paragraph."""
    before = list(lines)
    while before and not before[-1].strip():
        before.pop()
    while before and before[-1].strip():
        yield before.pop()


# -- signatures ------------------------------------------------------------------------


def signature_as_written(
    app: Any, what: str, name: str, obj: Any, options: Any, args: Any, returns: Any
) -> tuple[str, str] | None:
    """Annotations as the code has them, not what they are evaluated to."""
    if args is None:
        return None
    try:
        signature = inspect.signature(obj)
    except (TypeError, ValueError):
        return None
    parameters = list(signature.parameters.values())
    if what == "method" and not inspect.ismethod(obj):
        parameters = parameters[1:]
    if what == "class" and hasattr(obj, "__flax_module__"):
        parameters = [p for p in parameters if p.name not in ("parent", "name")]
    if getattr(obj, "_is_protocol", False):
        return "", ""
    if what == "class":
        signature = signature.replace(return_annotation=signature.empty)
    text = stringify_signature(signature.replace(parameters=parameters))
    args, _, returns = text.partition(" -> ")
    return args, returns


# -- links -----------------------------------------------------------------------------


def name_role(
    role: str, raw: str, text: str, line: int, inliner: Any, *_: Any
) -> tuple[list[nodes.Node], list[nodes.Node]]:
    """The default role of docstrings: code, and a link where it is a public name."""
    env = inliner.document.settings.env
    return [_code(text, env.ref_context.get("py:module", "jlora"), line)], []


class LinkNames(SphinxTransform):
    """The same for the code in lines of Markdown pages."""

    default_priority = 300

    def apply(self, **kwargs: Any) -> None:
        """Replace each."""
        if self.env.doc2path(self.env.docname).suffix != ".md":
            return
        for node in list(self.document.findall(nodes.literal)):
            if isinstance(node.parent, nodes.reference | addnodes.pending_xref):
                continue
            node.replace_self(_code(node.astext(), "", node))


def _code(text: str, module: str, place: Any) -> nodes.Node:
    match = NAME.match(text)
    target = match and names(module).get(match[1])
    literal = nodes.literal(text, text, classes=["xref", "py"] if target else [])
    if target:
        link = addnodes.pending_xref("", literal, refdomain="py", reftype="obj")
        link["reftarget"] = target
        return link
    if match and match[1].startswith("jlora.") and not exists(match[1]):
        log.warning("there is no %s", match[1], location=place)
    return literal


@functools.cache
def names(module: str) -> dict[str, str]:
    """What public names are called in a module's docstrings, and their full names."""
    found = {name: name for name in [*api.public(), *api.packages()]}
    if module:
        found |= {name.removeprefix("jlora."): name for name in api.public()}
        local = [n for n in api.public() if n.rpartition(".")[0] == module]
        found |= {name.rpartition(".")[2]: name for name in local}
    return found


def exists(name: str) -> bool:
    """Whether there is such an object, public or not."""
    parts = name.split(".")
    found: Any = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], 2):
        try:
            found = getattr(found, part)
        except AttributeError:
            try:
                found = importlib.import_module(".".join(parts[:i]))
            except ImportError:
                return False
    return True


def public_type(app: Any, env: Any, node: Any, content: Any) -> nodes.Node | None:
    """Resolve what signatures and `Raises:` name, `TrainState`, to its entry."""
    target = node.get("reftarget", "")
    name = names(node.get("py:module") or "jlora").get(target.rpartition(".")[2])
    if node.get("refdomain") != "py" or name is None or name == target:
        return None
    domain, page = env.get_domain("py"), node.get("refdoc")
    return domain.resolve_xref(env, page, app.builder, "obj", name, node, content)


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls this."""
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    app.connect("autodoc-process-docstring", as_rst, priority=100)
    app.connect("autodoc-process-signature", signature_as_written)
    app.connect("missing-reference", public_type)
    app.add_role("name", name_role)
    app.add_transform(LinkNames)
    return {"parallel_read_safe": True}
