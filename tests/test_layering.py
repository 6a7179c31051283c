"""The layers of the code: imports go one way, and `import jlora` is light."""

import ast
import importlib
import inspect
import pathlib
import pydoc
import re
import subprocess
import sys

import pytest

import jlora

PACKAGE = pathlib.Path(jlora.__file__).parent
# The rooms, lowest first: what is in one imports from its own room and from those below.
FLOORS = [
    [
        "_errors",
        "_compat",
        "_paths",
        "_text",
        "_files",
        "_processes",
        "_options",
        "_programs",
    ],
    ["_kernel"],
    ["_transform"],
    ["_tree"],
    ["init", "adapters", "quant", "optim", "sharding"],
    ["data", "metrics", "models", "train", "sweep", "checkpoint", "peft"],
    ["tasks"],
    ["planning"],
    ["cli", "__main__"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# Plain Flax and plain data: they know errors and words, and nothing of LoRA.
UNAWARE = {
    "models": {"_errors", "_text", "_files", "_processes"},
    "data": {"_errors", "_text", "_files", "_processes"},
    "metrics": {"_errors", "_text"},
}
FILES = sorted(
    p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py" or p.parent != PACKAGE
)


def room_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path, typing=True):
    """The names a file imports; those for annotations alone only with `typing`."""
    tree = ast.parse(path.read_text())
    if not typing:
        tree.body = [node for node in tree.body if not is_for_typing(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "jlora":
                yield from (f"jlora.{alias.name}" for alias in node.names)


def is_for_typing(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def rooms_imported(path, typing=True):
    for name in imports(path, typing):
        parts = name.split(".")
        if parts[0] == "jlora" and len(parts) > 1 and parts[1] != room_of(path):
            yield parts[1]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    here = room_of(path)
    for room in rooms_imported(path):
        if room not in FLOOR:  # a name of `jlora` itself, such as its version
            assert here in ("cli", "checkpoint", "tasks"), (
                f"{path} imports jlora.{room}"
            )
            continue
        assert FLOOR[room] <= FLOOR[here], f"{path} imports {room}, a room above"
        allowed = UNAWARE.get(here)
        assert allowed is None or room in allowed, f"{path} imports {room}"
        if room == "models":
            assert FLOOR[here] >= FLOOR["tasks"], f"{path}: the library knows no models"


def test_rooms_of_one_floor_do_not_need_each_other():
    needs = {room: set() for room in FLOOR}
    for path in FILES:
        needs[room_of(path)].update(rooms_imported(path, typing=False))
    order = []
    while len(order) < len(needs):
        free = sorted(r for r in needs if r not in order and not needs[r] - {*order})
        assert free, f"a cycle among {sorted(needs.keys() - {*order})}"
        order += free


def test_only_compat_imports_jax_internals():
    for path in FILES:
        for name in imports(path):
            internal = name.startswith(("jax._src", "jax.extend", "jax.interpreters"))
            assert not internal or path.name == "_compat.py", f"{path} imports {name}"
        if path.name != "_compat.py":
            assert "._cache_size" not in path.read_text(), f"{path}: JAX's internals"


def test_import_needs_jax_alone():
    code = (
        "import sys; from jlora import *; heavy = {'flax', 'optax', 'orbax', 'transformers', "
        "'datasets', 'torch', 'matplotlib', 'safetensors'} & set(sys.modules); "
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_type_checkers_are_told_of_the_names_that_are_there():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    told = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if node.module.startswith("jlora")
    }
    rooms = {name for name, module in told.items() if module == "jlora"}
    assert rooms == set(ROOMS_FOR_USERS)
    assert told.keys() - rooms == set(jlora.__all__)
    for name in jlora.__all__:
        module = importlib.import_module(told[name])
        assert getattr(jlora, name) is getattr(module, name)


def test_every_module_says_what_it_is():
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path}: no docstring"


ROOMS_FOR_USERS = [
    "checkpoint",
    "cli",
    "data",
    "init",
    "metrics",
    "models",
    "optim",
    "peft",
    "sharding",
    "sweep",
    "tasks",
    "train",
]
NAMESPACES = ["jlora", *(f"jlora.{room}" for room in ROOMS_FOR_USERS)]


@pytest.mark.parametrize("name", NAMESPACES)
def test_public_names_are_documented(name):
    module = importlib.import_module(name)
    for public in dir(module):
        value = getattr(module, public)
        if inspect.isclass(value) or inspect.isroutine(value):
            assert value.__doc__, f"{name}.{public} has no docstring"


@pytest.mark.parametrize("name", NAMESPACES)
def test_a_namespace_holds_its_own_names_alone(name):
    module = importlib.import_module(name)
    own = {n for n in dir(module) if n != "__version__"}
    assert not [n for n in own if n.startswith("_")]
    strangers = [
        n for n in own
        if inspect.ismodule(value := getattr(module, n))
        and not value.__name__.startswith("jlora.")
    ]  # fmt: skip
    assert not strangers, f"{name} holds {strangers}"
    given = ast.parse(pathlib.Path(module.__file__).read_text()).body
    imported = {
        alias.asname for node in given if isinstance(node, ast.ImportFrom)
        for alias in node.names if alias.asname
    }  # fmt: skip
    assert {n for n in imported if not n.startswith("_")} <= own
    assert own <= {*module.__all__, *ROOMS_FOR_USERS}


def test_help_begins_with_a_map():
    text = pydoc.plain(pydoc.render_doc(jlora))
    top = text.partition("PACKAGE CONTENTS")[0]
    functions = [n for n in jlora.__all__ if inspect.isfunction(getattr(jlora, n))]
    for name in [*functions, *(f"jlora.{room}" for room in ROOMS_FOR_USERS)]:
        assert re.search(rf"\b{name}\b", top), f"help(jlora) does not tell of {name}"
    assert "lorafy(params" in text.partition("FUNCTIONS")[2]
    trained = pydoc.plain(pydoc.render_doc(jlora.train)).partition("FUNCTIONS")[2]
    assert "make_train_step(" in trained
