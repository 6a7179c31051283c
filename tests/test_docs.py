"""The code blocks of each page in docs/ run, in order, in an empty folder."""

import pathlib
import re

import pytest

DOCS = pathlib.Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def python_blocks(page):
    found = re.findall(r"^```python\b *(\w*)\n(.*?)^```", page.read_text(), re.M | re.S)
    return [block for label, block in found if label != "norun"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in python_blocks(page):
        exec(compile(block, page.name, "exec"), names)


def test_the_index_has_every_page():
    index = (DOCS / "README.md").read_text()
    linked = set(re.findall(r"\]\((\w+\.md)\)", index))
    assert linked == {page.name for page in PAGES} - {"README.md"}
