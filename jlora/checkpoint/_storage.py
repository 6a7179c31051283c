"""One checkpoint folder: arrays by Orbax, a checked description, whole or not at all.

    path/arrays    the arrays, an Orbax item (OCDBT)
    path/config    JSON: what it is, the digest of every array, a digest of itself

A folder is written beside its place and renamed into it. What was there before is
moved aside first and deleted last; a reader finds one of the two at any moment.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora._errors import CheckpointError
from jlora.checkpoint._fingerprint import LeafPrint, leaf_print

try:
    import orbax.checkpoint as ocp
except ImportError as error:
    raise ImportError(
        "jlora.checkpoint needs orbax-checkpoint, which is not installed: "
        'pip install "jlora[train]"'
    ) from error

Tree = Any
Config = dict[str, Any]
T = TypeVar("T")
PathLike = str | os.PathLike[str]

VERSION = 1
LOADERS = {
    "adapter": "jlora.checkpoint.load_adapter",
    "state": "jlora.checkpoint.restore_state",
    "merged": "jlora.checkpoint.load_merged",
}


def absolute(path: PathLike) -> Path:
    """The path in full, as Orbax asks for."""
    return Path(os.path.abspath(os.path.expanduser(path)))


# -- writing ---------------------------------------------------------------------------


def items(kind: str, arrays: Tree, config: Config) -> Any:
    """The Orbax arguments that save a checkpoint."""
    arrays = _as_arrays(arrays)
    described = describe(kind, arrays, config)
    encoded = jax.tree.map(_encode, _without_empty(arrays))
    return ocp.args.Composite(
        arrays=ocp.args.StandardSave(encoded), config=ocp.args.JsonSave(described)
    )


def describe(kind: str, arrays: Tree, config: Config) -> Config:
    """The config, with the digests of the arrays and of itself.

    Raises:
      CheckpointError: JSON cannot hold it.
    """
    described = {
        **config,
        "kind": kind,
        "version": VERSION,
        "jlora": jlora.__version__,
        "arrays": {name: _entry(x) for name, x in named(arrays).items()},
    }
    try:
        text = json.dumps(described)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"metadata, metrics and data_position are saved as JSON: {error}.\nPass "
            "numbers, strings, lists and dicts; int(x) and float(x) of arrays."
        ) from error
    described = json.loads(text)  # keys are strings from here on
    return {**described, "checksum": _checksum(described)}


def write(path: Path, kind: str, arrays: Tree, config: Config) -> None:
    """Write a checkpoint; what was at `path` stays until the new one is in place."""
    recover(path)
    args = items(kind, arrays, config)
    new = path.with_name(f".{path.name}.new")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(new, ignore_errors=True)
    try:
        with _checkpointer() as checkpointer:
            checkpointer.save(new, args=args)
        if jax.process_index() == 0:
            replace(path, new)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint {str(path)!r} could not be written: {brief(error)}.\n"
            "What was there before is as it was. See to space and permissions."
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def replace(path: Path, new: Path) -> None:
    """Put `new` in the place of `path`, which is deleted last."""
    if not path.exists():
        os.rename(new, path)
        return
    previous = aside(path)
    shutil.rmtree(previous, ignore_errors=True)
    os.rename(path, previous)
    os.rename(new, path)
    shutil.rmtree(previous)


def aside(path: Path) -> Path:
    """Where a folder waits while it is being replaced."""
    return path.with_name(f".{path.name}.previous")


def recover(path: Path) -> None:
    """Undo a replacement that was interrupted between its two renames."""
    if not path.exists() and aside(path).exists():
        os.rename(aside(path), path)


def check_place(path: Path, overwrite: bool) -> None:
    """Refuse to replace what is there, unless told to, or what is no checkpoint.

    Raises:
      CheckpointError: so.
    """
    recover(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / "config").is_dir() and not (path / "arrays").is_dir():
        raise CheckpointError(
            f"{str(path)!r} exists and is not a checkpoint of jlora; it is left alone."
            "\nPass another path."
        )
    if not overwrite:
        raise CheckpointError(
            f"{str(path)!r} holds a checkpoint already.\nPass another path, or "
            "overwrite=True to replace it."
        )


# -- reading ---------------------------------------------------------------------------


def read_config(path: Path, kind: str | None) -> Config:
    """A checkpoint's description; with None, of whatever kind it is.

    Raises:
      CheckpointError: there is none, it is damaged, or of another kind.
    """
    found = path if path.exists() else aside(path)
    if not found.exists():
        raise CheckpointError(
            f"there is no checkpoint at {str(path)!r}.{_neighbours(path)}"
        )
    if not (found / "config").is_dir():
        raise CheckpointError(
            f"{str(path)!r} is not a checkpoint of jlora: it has no `config`.\nPass "
            "the folder that jlora.checkpoint wrote, not one above or inside it."
        )
    config = _read(found, config=ocp.args.JsonRestore())["config"]
    if not isinstance(config, dict):
        raise CheckpointError(_damaged(path, "its description is empty"))
    stated = config.pop("checksum", None)
    if stated != _checksum(config):
        raise CheckpointError(_damaged(path, "its description fails its checksum"))
    if config["version"] > VERSION:
        raise CheckpointError(
            f"{str(path)!r} was written by jlora {config['jlora']}, in a newer format "
            f"than jlora {jlora.__version__} reads.\nUpgrade jlora."
        )
    if kind is not None and config["kind"] != kind:
        raise CheckpointError(
            f"{str(path)!r} is a checkpoint of kind {config['kind']!r}, not {kind!r}."
            f"\nLoad it with {LOADERS.get(config['kind'], 'what wrote it')}."
        )
    return config


def read_arrays(path: Path, config: Config, template: Tree = None) -> Tree:
    """A checkpoint's arrays, each checked against its digest.

    Args:
      path: the checkpoint.
      config: from `read_config`.
      template: a tree of arrays or shapes to restore into, with their shardings; None
        restores nested dicts and lists onto the default device.

    Raises:
      CheckpointError: leaves are missing, of another shape or dtype, or damaged.
    """
    found = path if path.exists() else aside(path)
    saved = {name: LeafPrint.from_json(x) for name, x in config["arrays"].items()}
    if template is None:
        tree = _read(found, arrays=ocp.args.StandardRestore())["arrays"]
    else:
        template = _as_arrays(template)
        _check_leaves(path, saved, template)
        wanted = jax.tree.map(_abstract, _without_empty(template))
        some = _read(found, arrays=ocp.args.StandardRestore(wanted))["arrays"]
        tree = _refill(template, some, config["arrays"])
    for name, x in named(tree).items():
        if name not in saved or leaf_print(x).digest != saved[name].digest:
            raise CheckpointError(_damaged(path, f"the array {name!r} has other values"
                                                 " than were saved"))  # fmt: skip
    return tree


def _read(path: Path, **args: Any) -> Any:
    try:
        with _checkpointer() as checkpointer:
            return checkpointer.restore(path, args=ocp.args.Composite(**args))
    except Exception as error:
        raise CheckpointError(_damaged(path, brief(error))) from error


def _check_leaves(path: Path, saved: Mapping[str, LeafPrint], template: Tree) -> None:
    wanted = {name: leaf_print(x, read=False) for name, x in named(template).items()}
    missing = [name for name in wanted if name not in saved]
    extra = [name for name in saved if name not in wanted]
    other = [
        f"{name!r} is {saved[name].kind} there and {x.kind} here"
        for name, x in wanted.items()
        if name in saved and saved[name].kind != x.kind
    ]
    if not (missing or extra or other):
        return
    lines = [f"the checkpoint {str(path)!r} does not fit what it is restored into."]
    lines += _listing("not in the checkpoint", [repr(x) for x in missing])
    lines += _listing("only in the checkpoint", [repr(x) for x in extra])
    lines += _listing("different", other)
    lines.append(
        "Restore into what was saved: the same model, targets and ranks, the same "
        "optimiser."
    )
    raise CheckpointError("\n".join(lines))


def _listing(title: str, entries: list[str], most: int = 5) -> list[str]:
    if not entries:
        return []
    more = f", and {len(entries) - most} more" if len(entries) > most else ""
    return [f"  {title} ({len(entries)}): " + "; ".join(entries[:most]) + more]


# -- arrays ----------------------------------------------------------------------------


def named(tree: Tree) -> dict[str, Any]:
    """A tree's leaves by their paths in full."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in leaves]
    if len(set(names)) < len(names):
        twice = sorted({n for n in names if names.count(n) > 1})
        raise CheckpointError(
            f"several leaves have the path {twice[0]!r}, so a file cannot tell them "
            "apart.\nRename all but one."
        )
    return dict(zip(names, (x for _, x in leaves), strict=True))


def _as_arrays(tree: Tree) -> Tree:
    """Numbers and NumPy arrays as JAX takes them, so that they come back the same."""
    ready = jax.Array | jax.ShapeDtypeStruct
    return jax.tree.map(lambda x: x if isinstance(x, ready) else jnp.asarray(x), tree)


def _is_key(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _encode(x: Any) -> Any:
    return jax.random.key_data(x) if _is_key(x) else x


def _is_empty(x: Any) -> bool:
    return 0 in getattr(x, "shape", ())


def _without_empty(tree: Tree) -> Tree:
    """Orbax saves no array of size 0; its shape says all there is."""
    return jax.tree.map(lambda x: None if _is_empty(x) else x, tree)


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    """What to ask Orbax for: always with a sharding, keys as their data."""
    sharding = getattr(x, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if _is_key(x):
        data = jax.eval_shape(jax.random.key_data, x)
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _refill(template: Tree, restored: Tree, entries: Mapping[str, Any]) -> Tree:
    """The restored leaves in the template's structure, as its leaves were."""
    feed = iter(jax.tree.leaves(restored))
    leaves = [
        jnp.zeros(x.shape, x.dtype)
        if _is_empty(x)
        else _like(next(feed), x, entries[name].get("impl"))
        for name, x in named(template).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _like(data: jax.Array, x: Any, impl: str | None) -> Any:
    if not getattr(x, "committed", getattr(x, "sharding", None) is not None):
        # Orbax commits to a device; a state that was free stays free to go anywhere.
        data = jnp.asarray(np.asarray(data))
    return data if impl is None else jax.random.wrap_key_data(data, impl=impl)


def _entry(x: Any) -> dict[str, Any]:
    """What is noted of an array; of PRNG keys also how they generate."""
    impl = {"impl": str(jax.random.key_impl(x))} if _is_key(x) else {}
    return {**leaf_print(x).to_json(), **impl}


# -- words -----------------------------------------------------------------------------


def _checkpointer() -> Any:
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())


def _checksum(config: Mapping[str, Any]) -> str:
    text = json.dumps(config, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def _damaged(path: Path, what: str) -> str:
    return (
        f"the checkpoint {str(path)!r} cannot be read: {what}.\nIt was cut off or "
        "changed since it was written. Restore another one."
    )


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f" There is no folder {str(path.parent)!r} either."
    names = sorted(p.name for p in path.parent.iterdir() if not p.name.startswith("."))
    return f" Beside it are: {', '.join(names[:8])}." if names else ""


def brief(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(".: ")[:300]
