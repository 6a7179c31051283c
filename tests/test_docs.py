"""The pages in docs/: their code runs, in order, in an empty folder; all are linked."""

import fnmatch
import pathlib
import re
import warnings
from contextlib import nullcontext

import pytest

import jlora

DOCS = pathlib.Path(__file__).parent.parent / "docs"


def name(page):
    """As Sphinx calls it: `guides/adapters`."""
    return page.relative_to(DOCS).with_suffix("").as_posix()


def is_written(page):
    """Whether a person wrote it: what a build makes lies under a name with `_`."""
    return not any(part.startswith("_") for part in page.relative_to(DOCS).parts)


PAGES = sorted(filter(is_written, DOCS.rglob("*.md")))


def python_blocks(text):
    """Those that are to run, with their labels: `setup` and `raises` say what they do."""
    found = re.findall(r"^```python\b *(\w*)\n(.*?)^```", text, re.M | re.S)
    return [(label, block) for label, block in found if label != "norun"]


ERRORS = DOCS / "reference" / "errors.md"  # has a test of its own


@pytest.mark.parametrize("page", [p for p in PAGES if p != ERRORS], ids=name)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for label, block in python_blocks(page.read_text()):
        raises = pytest.raises(jlora.LoraError) if label == "raises" else nullcontext()
        with raises:
            exec(compile(block, page.name, "exec"), names)


def test_the_page_of_errors_raises_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    raised: dict = {}
    with warnings.catch_warnings():
        for section in ERRORS.read_text().split("\n## "):
            title = section.split("\n")[0]
            for label, block in python_blocks(section):
                try:
                    exec(compile(block, title, "exec"), names)
                    assert label != "raises", block
                except (jlora.LoraError, jlora.JloraWarning) as error:
                    raised.setdefault(title, set()).add(type(error))
    kinds = [*jlora.LoraError.__subclasses__(), jlora.JloraWarning]
    assert raised == {kind.__name__: {kind} for kind in kinds}


def entries(page):
    """The pages that its tables of contents name."""
    folder = page.parent.relative_to(DOCS)
    for tree in re.findall(r"^```{toctree}\n(.*?)^```", page.read_text(), re.M | re.S):
        lines = [line.strip() for line in tree.splitlines()]
        for line in lines:
            if line and not line.startswith(":"):
                yield (folder / re.sub(r".*<(.*)>", r"\1", line)).as_posix()


def test_every_page_is_in_a_table_of_contents():
    names = [name(page) for page in PAGES if page.name != "README.md"]
    patterns = [entry for page in PAGES for entry in entries(page)]
    missed = [n for n in names if not any(fnmatch.fnmatch(n, p) for p in patterns)]
    assert missed == ["index"]


def test_the_page_for_github_has_every_folder():
    linked = re.findall(r"\]\((\w+)\)", (DOCS / "README.md").read_text())
    folders = {name(page).split("/")[0] for page in PAGES if page.parent != DOCS}
    assert folders <= set(linked)
