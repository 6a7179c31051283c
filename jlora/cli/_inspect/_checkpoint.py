"""A checkpoint of jlora: an adapter, a training state or merged parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora._errors import CheckpointError
from jlora.checkpoint import _storage
from jlora.cli._inspect._report import Report, Row

Config = dict[str, Any]

_FEATURES = {"magnitude": "DoRA", "bias": "bias of B"}
_FORMS = {"vera": "VeRA", "loha": "LoHa", "lokr": "LoKr"}
_WHOLE = {"full": "fully trained", "rows": "trained tokens"}


def report(place: Path) -> Report:
    """What a checkpoint's description says; of an adapter, its scales are read too.

    Raises:
      CheckpointError: it is damaged, or no checkpoint.
    """
    config = _storage.read_config(_storage.local_path(place), None)
    kinds = {"adapter": _adapter, "state": _state, "merged": _merged}
    if config["kind"] not in kinds:
        raise CheckpointError(
            f"{str(place)!r} is a checkpoint of kind {config['kind']!r}, which this "
            "jlora does not know.\nUpgrade jlora."
        )
    return kinds[config["kind"]](place, config)


def _adapter(place: Path, config: Config) -> Report:
    # A few kilobytes, and each array is checked against its digest.
    arrays = _storage.read_arrays(_storage.local_path(place), config)
    rows = _adapter_rows(config, "", lambda entry: _scale_in(arrays, entry))
    rows += _whole_rows(config["arrays"], "")
    facts = {
        "written_by": f"jlora {config['jlora']}",
        **_base(config),
        "parameters": _count(config["arrays"]),
        "bytes": sum(map(_bytes, config["arrays"].values())),
    }
    data = {"metadata": config["metadata"]}
    return Report("adapter", str(place), facts, "kernel", rows, data)


def _state(place: Path, config: Config) -> Report:
    arrays = config["arrays"]
    rows = _adapter_rows(config, "trainable/", _scale_noted)
    rows += _whole_rows(arrays, "trainable/")
    sizes = {
        part: sum(_bytes(x) for n, x in arrays.items() if n.startswith(f"{part}/"))
        for part in ("trainable", "opt_state", "frozen")
    }
    facts = {
        "written_by": f"jlora {config['jlora']}",
        "step": config["step"],
        "data_position": config["data_position"],
        **_base(config),
        "holds_the_base": config["with_base"],
        "bytes_trainable": sizes["trainable"],
        "bytes_optimiser": sizes["opt_state"],
        "bytes_base": sizes["frozen"],
    }
    return Report("state", str(place), facts, "kernel", rows, {"run": config["run"]})


def _merged(place: Path, config: Config) -> Report:
    arrays = config["arrays"]
    rows = [
        {"tensor": name, "shape": x["shape"], "dtype": x["dtype"], "bytes": _bytes(x)}
        for name, x in arrays.items()
    ]
    facts = {
        "written_by": f"jlora {config['jlora']}",
        "parameters": _count(arrays),
        "bytes": sum(map(_bytes, arrays.values())),
    }
    data = {"metadata": config["metadata"]}
    return Report("merged", str(place), facts, "tensor", rows, data)


def _base(config: Config) -> dict[str, Any]:
    leaves = config["base"]["leaves"]
    return {
        "base_fingerprint": config["base"]["digest"],
        "base_leaves": len(leaves),
        "base_parameters": _count(leaves),
    }


def _adapter_rows(config: Config, prefix: str, scale_of: Any) -> list[Row]:
    rows: list[Row] = []
    for entry in config["adapters"]:
        if "factors" not in entry:  # a table's trained rows, which have none
            continue
        own = "/".join(filter(None, (entry["path"], entry["name"])))
        found = {
            factor: config["arrays"][f"{prefix}{own}/{factor}"]
            for factor in entry["factors"]
            if f"{prefix}{own}/{factor}" in config["arrays"]
        }
        shapes = {factor: x["shape"] for factor, x in found.items() if x["shape"]}
        features = [name for factor, name in _FEATURES.items() if factor in found]
        features += ["rsLoRA"] if entry["rslora"] else []
        features += [_FORMS[form]] if (form := entry.get("form")) else []
        features += [f"dropout {entry['dropout']:g}"] if entry["dropout"] else []
        rows.append(
            {
                "kernel": own,
                "rank": entry["rank"],
                "scale": scale_of(entry),
                "factors": shapes,
                "dtype": next((found[n]["dtype"] for n in found if n != "scale"), None),
                "features": features,
                "bytes": sum(map(_bytes, found.values())),
            }
        )
    return rows


def _whole_rows(arrays: Mapping[str, Any], prefix: str) -> list[Row]:
    """What is trained as it is: whole leaves, and rows of tables."""
    rows: list[Row] = []
    for name, array in arrays.items():
        path, _, last = name.removeprefix(prefix).rpartition("/")
        if name.startswith(prefix) and last in _WHOLE:
            rows.append(
                {
                    "kernel": path,
                    "rank": None,
                    "scale": None,
                    "factors": {last: array["shape"]},
                    "dtype": array["dtype"],
                    "features": [_WHOLE[last]],
                    "bytes": _bytes(array),
                }
            )
    return rows


def _scale_in(arrays: Mapping[str, Any], entry: Mapping[str, Any]) -> Any:
    """The scale of an adapter; of a stack's, one for each layer where they differ."""
    name = "/".join(filter(None, (entry["path"], entry["name"], "scale")))
    scales = np.unique(np.asarray(arrays[name]))
    return float(scales[0]) if scales.size == 1 else [float(x) for x in scales]


def _scale_noted(entry: Mapping[str, Any]) -> float | None:
    """The scale in a state's description, which of a stack's has only the digest."""
    return entry["scale"] if isinstance(entry["scale"], float) else None


def _count(arrays: Mapping[str, Any]) -> int:
    return sum(math.prod(x["shape"]) for x in arrays.values())


def _bytes(array: Mapping[str, Any]) -> int:
    if array["dtype"].startswith("key<"):
        return 0  # a PRNG key's size is its implementation's
    return math.prod(array["shape"]) * jnp.dtype(array["dtype"]).itemsize
