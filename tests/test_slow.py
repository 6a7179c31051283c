"""The list of slow tests names tests that are there."""

import ast
import pathlib

import conftest

HERE = pathlib.Path(__file__).parent


def test_each_line_is_of_a_test():
    unknown = []
    for line in conftest.LINES:
        file, name = line.rstrip("*").split("::")
        tree = ast.parse((HERE / file).read_text())
        found = [x.name for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)]
        function = name.split("[")[0]
        whole = "[" in name or line[-1] != "*"
        if not any(
            f == function if whole else f.startswith(function or "test_") for f in found
        ):
            unknown.append(line)
    assert not unknown
    assert sorted({*conftest.LINES}) == conftest.LINES
