"""A report in Markdown and HTML, and what a run was made on."""

from __future__ import annotations

import base64
import html
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from jlora._text import table as text_table

_PACKAGES = ("jlora", "jax", "flax", "optax", "orbax-checkpoint", "transformers")


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; }}
th, td {{ text-align: left; vertical-align: top; padding: .3rem .7rem;
  border-bottom: 1px solid #8884; }}
pre {{ background: #8882; padding: .7rem; overflow-x: auto; }}
img {{ max-width: 100%; background: white; }}
</style></head><body>
{body}</body></html>
"""


class Report:
    """A Markdown document, put together part by part.

    >>> report = Report("A run").section("Results").table(["test", "BLEU"], [["a", 1]])
    >>> print(report)
    # A run
    <BLANKLINE>
    ## Results
    <BLANKLINE>
    | test | BLEU |
    | --- | --- |
    | a | 1 |
    """

    def __init__(self, title: str) -> None:
        self.parts = [f"# {title}"]

    def section(self, heading: str) -> Report:
        """Begin a section."""
        return self.text(f"## {heading}")

    def text(self, text: str) -> Report:
        """Add a paragraph."""
        self.parts.append(text)
        return self

    def code(self, text: str, language: str = "") -> Report:
        """Add a block of code or other text as it is."""
        return self.text(f"```{language}\n{text}\n```")

    def image(self, path: Path, title: str) -> Report:
        """Add a picture that lies beside the report."""
        return self.text(f"![{title}]({path.name})")

    def items(self, lines: Iterable[str]) -> Report:
        """Add a list, if there is anything to list."""
        listed = "\n".join(f"- {line}" for line in lines)
        return self.text(listed) if listed else self

    def table(self, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Report:
        """Add a table; bars within its cells are escaped."""
        cells = [head, ["---"] * len(head), *rows]
        lines = (
            " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row)
            for row in cells
        )
        return self.text("\n".join(f"| {line} |" for line in lines))

    def write(self, path: Path) -> None:
        """Write the document, and beside it one in HTML that holds its pictures.

        Args:
          path: the file in Markdown, `report.md`; the other is `report.html`.
        """
        path.write_text(f"{self}\n", encoding="utf-8")
        page = self.html(path.parent)
        path.with_suffix(".html").write_text(page, encoding="utf-8")

    def html(self, folder: Path) -> str:
        """Return the document as one page of HTML.

        Args:
          folder: where its pictures lie.
        """
        from markdown_it import MarkdownIt

        body = (
            MarkdownIt("commonmark", {"html": False}).enable("table").render(str(self))
        )

        def embedded(found: re.Match[str]) -> str:
            file = folder / found[1]
            if not file.is_file():
                return found[0]
            code = base64.b64encode(file.read_bytes()).decode()
            return f'src="data:image/png;base64,{code}"'

        body = re.sub(r'src="([^":]+\.png)"', embedded, body)
        title = html.escape(self.parts[0].removeprefix("# "))
        return _PAGE.format(title=title, body=body)

    def __str__(self) -> str:
        """The document."""
        return "\n\n".join(self.parts)


def machine() -> dict[str, str]:
    """Return when, by what command, with what and on what this process ran."""
    versions = [f"Python {platform.python_version()}"]
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    devices = jax.devices()
    kinds = f"{len(devices)} x {devices[0].device_kind}"
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "device": f"{kinds} ({devices[0].platform})",
        "machine": f"{os.cpu_count()} x {_processor()}, {platform.system()}",
        "versions": ", ".join(versions),
        "peak memory": ", ".join(_peaks(jax.local_devices())),
    }


def _peaks(devices: Sequence[jax.Device]) -> list[str]:
    """Return the most memory that was in use, of the process and of its devices."""
    try:
        import resource
    except ImportError:  # not on Windows
        found = []
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        found = [f"{human_bytes(host)} on the host"]
    peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in devices]
    known = [peak for peak in peaks if peak]
    return [*found, *([f"{human_bytes(max(known))} a device"] if known else [])]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def table(rows: Sequence[Sequence[Any]]) -> str:
    """Return rows, the first of them a head, as an aligned table for the console."""
    return text_table([tuple(map(str, row)) for row in rows])


def file_sizes(folder: Path) -> list[tuple[str, str]]:
    """Return what lies in a folder, and how large it is, for a table."""
    paths = sorted(p for p in folder.iterdir() if p.name[0] != "." and size_of(p))
    return [(f"`{path.name}`", human_bytes(size_of(path))) for path in paths]


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def human_bytes(count: int) -> str:
    """Return a size to read.

    >>> human_bytes(2_350_000)
    '2.35 MB'
    """
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} B"
