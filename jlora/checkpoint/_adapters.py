"""Adapters and merged parameters: saved, and loaded onto their base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jlora._errors import CheckpointError
from jlora._kernel.adapter import Adapter
from jlora._kernel.nodes import Full, LowRank, Rows, is_node, with_origin
from jlora._kernel.placement import placed_adapter
from jlora._paths import leaves_by_path, map_with_path
from jlora._tree.merge import merge
from jlora._tree.merge_report import MergeReport
from jlora._tree.partition import check_trained
from jlora._tree.rows import abstract_rows
from jlora.checkpoint import _storage
from jlora.checkpoint._arrays import check_has_values
from jlora.checkpoint._entries import (
    Check,
    adapter_arrays,
    adapter_entries,
    as_json,
    base_of,
    borrowed,
    check_base,
    check_is_plain,
    make_adapter,
    named_factors,
    nodes,
    sharded,
)
from jlora.checkpoint._fingerprint import Fingerprint, fingerprint
from jlora.checkpoint._storage import PathLike

Tree = Any


# -- adapters --------------------------------------------------------------------------


def save_adapter(
    path: PathLike,
    params: Tree,
    *,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    base: Fingerprint | None = None,
) -> None:
    """Save the adapters and fully trained leaves, not the base.

    With them go each adapter's configuration and the base's fingerprint. Of several
    processes every one calls this.

    Args:
      path: the folder to write.
      params: a lorafied tree.
      metadata: what else to keep, as JSON; `load_metadata` returns it.
      overwrite: replace a checkpoint that is there already.
      base: `fingerprint(params)`, where many adapters of one base are saved and it is
        known; None reads the base.

    Raises:
      CheckpointError: something is at `path` already, it is no local path, or it cannot
        be written.
      StructureError: `params` holds nothing that is trained.
    """
    check_trained(params)
    arrays = adapter_arrays(params)
    check_has_values(arrays)
    place = _storage.local_path(path)
    _storage.check_free(place, overwrite)
    config = {
        "adapters": adapter_entries(params),
        "full": [name for name, x in nodes(params) if isinstance(x, Full)],
        "rows": {p: list(x.indices) for p, x in nodes(params) if isinstance(x, Rows)},
        "base": (fingerprint(params) if base is None else base).to_json(),
        "metadata": as_json("metadata", metadata),
    }
    _storage.write(place, "adapter", arrays, config)


def load_adapter(path: PathLike, base_params: Tree, *, check: Check = "values") -> Tree:
    """Put saved adapters onto their base.

    Args:
      path: what `save_adapter` wrote.
      base_params: the plain parameters it was trained on. Adapters of sharded kernels
        are sharded along; a tree of shapes gives real adapters on an abstract base.
      check: `"values"` compares the base byte for byte (where it has values);
        `"shapes"` compares paths and shapes only, for a base in another dtype, say.

    Returns:
      The lorafied tree.

    Raises:
      CheckpointError: another base, or a checkpoint that is damaged or of another kind.
    """
    place = _storage.local_path(path)
    check_is_plain(base_params)
    config = _storage.read_config(place, "adapter")
    check_base(place, config, base_of(base_params, config), check)
    shapes = {
        name: jax.ShapeDtypeStruct(x["shape"], x["dtype"])
        for name, x in config["arrays"].items()
    }
    bases = leaves_by_path(base_params, is_leaf=is_node)
    template: dict[str, Any] = {}
    for entry in config["adapters"]:
        shape = make_adapter(place, entry, shapes)
        adapter = placed_adapter(shape, bases.get(entry["path"]))
        template.update(named_factors(entry["path"], entry["name"], adapter))
        for name in borrowed(entry):
            del template[name]
    for name in config["full"]:
        own = shapes[f"{name}/full"]
        sharding = getattr(bases[name], "sharding", None)
        template[f"{name}/full"] = sharded(own, sharding)
    for name in config.get("rows", {}):
        own = shapes[f"{name}/rows"]
        template[f"{name}/rows"] = abstract_rows(bases[name], own.shape[0], own.dtype)
    arrays = _storage.read_arrays(place, config, template)
    return _lorafied(place, config, arrays, base_params)


def load_metadata(path: PathLike) -> dict[str, Any]:
    """The metadata given to `save_adapter` or `save_merged`.

    Args:
      path: what one of them wrote.

    Raises:
      CheckpointError: a checkpoint that is damaged or of another kind.
    """
    place = _storage.local_path(path)
    config = _storage.read_config(place, None)
    if "metadata" not in config:
        raise CheckpointError(
            f"{str(place)!r} is a checkpoint of kind {config['kind']!r}, which has no "
            "metadata.\nA training state has its data_position, see restore_state."
        )
    return config["metadata"]


def _lorafied(place: Path, config: Any, arrays: Mapping[str, Any], base: Tree) -> Tree:
    adapters: dict[str, dict[str, Adapter]] = {}
    for entry in config["adapters"]:
        own = adapters.setdefault(entry["path"], {})
        own[entry["name"]] = make_adapter(place, entry, arrays)

    def one(name: str, leaf: Any) -> Any:
        if name in adapters:
            return LowRank(leaf, adapters[name], name)
        if name in config.get("rows", {}):
            return Rows(leaf, arrays[f"{name}/rows"], tuple(config["rows"][name]), name)
        full = arrays.get(f"{name}/full")
        return leaf if full is None else Full(full)

    return with_origin(map_with_path(one, base, is_leaf=is_node))


# -- merged parameters -----------------------------------------------------------------


def save_merged(
    path: PathLike,
    params: Tree,
    *,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> MergeReport:
    """Fold the adapters in and save plain parameters.

    `path/arrays` is an ordinary Orbax item: `StandardCheckpointer().restore` reads it.

    Args:
      path: the folder to write.
      params: a lorafied tree.
      metadata: what else to keep, as JSON.
      overwrite: replace a checkpoint that is there already.

    Returns:
      What merging lost to rounding, see `jlora.merge`.

    Raises:
      CheckpointError: something is at `path` already, it is no local path, or it cannot
        be written.
      NonFiniteError: an adapter or a kernel holds NaN or infinity.
    """
    place = _storage.local_path(path)
    _storage.check_free(place, overwrite)
    config = {"metadata": as_json("metadata", metadata)}
    check_has_values(params)
    merged, report = merge(params, report=True)
    _storage.write(place, "merged", merged, config)
    return report


def load_merged(path: PathLike, like: Tree | None = None) -> Tree:
    """Load plain parameters.

    Args:
      path: what `save_merged` wrote.
      like: a tree of arrays or shapes that gives structure and shardings; None gives
        nested dicts and lists on the default device.

    Raises:
      CheckpointError: a checkpoint that does not fit, is damaged or of another kind.
    """
    place = _storage.local_path(path)
    config = _storage.read_config(place, "merged")
    return _storage.read_arrays(place, config, like)
