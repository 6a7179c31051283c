"""The Vietnamese tutorial is the English one: the same commands, code and output."""

import importlib.util
import pathlib
import re

import pytest

DOCS = pathlib.Path(__file__).parent.parent / "docs"
PAGES = sorted((DOCS / "vi").glob("*.md"))


def blocks(page, *labels):
    """The blocks of code of a page that have one of the labels."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*[^\n]*)\n(.*?)^```", text, re.M | re.S)
    return [(label, code) for label, code in found if label.split()[0] in labels]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_is_that_of_the_english_page(page):
    code = blocks(page, "python", "bash")
    assert len(code) > 5
    assert code == blocks(DOCS / "start" / page.name, "python", "bash")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_has_the_sections_of_the_english_one(page):
    sections = [
        re.findall(r"^## (\d*)", p.read_text(encoding="utf-8"), re.M)
        for p in (page, DOCS / "start" / page.name)
    ]
    assert sections[0] == sections[1]


@pytest.mark.parametrize(
    ("page", "language"),
    [("vi/tutorial", "vi"), ("start/tutorial", "en"), ("vi", "vi")],
)
def test_a_page_says_its_language(page, language):
    where = DOCS / "_ext" / "languages.py"
    spec = importlib.util.spec_from_file_location("languages", where)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    context = {"language": "en"}
    module.set_language(None, page, "page.html", context, None)
    assert context["language"] == language
