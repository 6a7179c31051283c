"""The layers of the code: imports go one way, and `import jlora` is light."""

import ast
import pathlib
import subprocess
import sys

import pytest

import jlora

PACKAGE = pathlib.Path(jlora.__file__).parent
# A module may import from its own line and from those above it.
LAYERS = [
    ["_errors", "_compat", "_product"],
    ["_paths", "_labels", "_adapter", "_dora", "_lowrank"],
    ["_init", "_rules"],
    ["_program", "_interpret", "_partition", "_resolve"],
    ["_merge_kernels", "_merge", "_scanned", "_stack", "_targets", "_tokens", "_lorafy",
     "_transform", "_summary", "_survey"],
    ["optim", "sharding", "quant"],
    ["train", "checkpoint", "peft", "sweep"],
    ["_inspect", "_convert", "cli", "__main__"],
]  # fmt: skip
LEVEL = {name: i for i, names in enumerate(LAYERS) for name in names}
# Private halves of a public module stand on its layer.
FILES = sorted(
    p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py" or p.parent != PACKAGE
)


def level_of(module):
    """The layer of `jlora.<module>`; a private helper belongs to layer 6.

    The models stand above it: only the console uses them.
    """
    return LEVEL.get(module, LEVEL["cli"] if module == "models" else 6)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "jlora":
                yield from (f"jlora.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    here = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "jlora" or len(parts) == 1:
            continue
        if here == "models":
            # Models are plain Flax: they know errors and each other.
            assert parts[1] in ("models", "_errors"), f"{path} imports {name}"
        elif parts[1] == "models" and level_of(here) < LEVEL["cli"]:
            pytest.fail(f"{path} imports {name}: the library does not know its models")
        else:
            assert level_of(parts[1]) <= level_of(here), f"{path} imports {name}"


def test_only_compat_imports_jax_internals():
    for path in FILES:
        for name in imports(path):
            internal = name.startswith(("jax._src", "jax.extend"))
            assert not internal or path.name == "_compat.py", f"{path} imports {name}"


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
