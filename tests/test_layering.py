"""The layers of the code: imports go one way, and `import jlora` is light."""

import ast
import pathlib
import subprocess
import sys

import pytest

import jlora

PACKAGE = pathlib.Path(jlora.__file__).parent
# The rooms, lowest first: what is in one imports from its own room and from those below.
FLOORS = [
    ["_errors", "_compat", "_paths", "_text", "_files", "_processes"],
    ["_kernel"],
    ["_transform"],
    ["_tree"],
    ["init", "adapters", "quant", "optim", "sharding"],
    ["data", "models", "train", "sweep", "checkpoint", "peft"],
    ["cli", "__main__"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# Plain Flax and plain data: they know errors and words, and nothing of LoRA.
UNAWARE = {
    "models": {"_errors", "_text", "_files", "_processes"},
    "data": {"_errors", "_text", "_files", "_processes"},
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
            assert here in ("cli", "checkpoint"), f"{path} imports jlora.{room}"
            continue
        assert FLOOR[room] <= FLOOR[here], f"{path} imports {room}, a room above"
        allowed = UNAWARE.get(here)
        assert allowed is None or room in allowed, f"{path} imports {room}"
        if room == "models":
            assert FLOOR[here] == FLOOR["cli"], f"{path}: the library knows no models"


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
        "import sys, jlora; heavy = {'flax', 'optax', 'orbax', 'transformers', "
        "'datasets', 'torch', 'matplotlib', 'safetensors'} & set(sys.modules); "
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_module_says_what_it_is():
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path}: no docstring"


def test_public_names_are_documented():
    for name in dir(jlora):
        public = getattr(jlora, name)
        if not name.startswith("_") and callable(public):
            assert public.__doc__, f"jlora.{name} has no docstring"
