"""A PEFT adapter's folder, whether or not jlora can honour what it says."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from jlora._errors import CheckpointError
from jlora._files import TensorHeader as Header
from jlora._files import tensor_headers
from jlora._text import first_line
from jlora.cli._inspect._report import Report
from jlora.peft._config import alpha_of, rank_of, scale_of
from jlora.peft._contents import PREFIX, without_names
from jlora.peft._fields import DEFAULTS, Config, check_config
from jlora.peft._files import CONFIG, PICKLE, WEIGHTS, read_json

T = TypeVar("T")

# What rank, alpha and scale are made of.
_SCALING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
# What belongs to a module that is adapted; all else is saved whole.
_PART = re.compile(
    r"(?P<module>.*?)\."
    r"(?P<part>lora_.*|token_adapter\..*|base_layer\.(?:weight|bias))"
)
_SHORT = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "magnitude",
}
_FEATURES = {
    "lora_magnitude_vector": "DoRA",
    "lora_B.bias": "bias of B",
    "lora_embedding_": "embedding",
    "token_adapter.": "trained tokens",
    "base_layer.": "saved with its base",
}


def report(place: Path) -> Report:
    """What an adapter's configuration and header say.

    Raises:
      CheckpointError: either is missing or damaged.
    """
    config = read_json(place)
    kind = str(config.get("peft_type"))
    if kind == "LORA":
        where = str(place / CONFIG)
        scaling = {key: config[key] for key in _SCALING if key in config}
        check_config({"peft_type": kind, "target_modules": [], **scaling}, where)
    pickled = not (place / WEIGHTS).exists() and (place / PICKLE).exists()
    file = place / WEIGHTS
    tensors = {} if pickled else without_names(tensor_headers(file), str(file))
    rows = [_row(m, parts, config) for m, parts in by_module(tensors).items()]
    refused = _refused(config, place)
    facts = {
        "base_model": config.get("base_model_name_or_path"),
        "type": kind,
        "task": config.get("task_type"),
        "loadable": refused is None,
        "not_loadable": refused,
        "not_read": f"{PICKLE} is a pickle, which can run code" if pickled else None,
        "modules_adapted": sum(row["rank"] is not None for row in rows),
        "parameters": sum(math.prod(x.shape) for x in tensors.values()),
        "bytes": sum(x.nbytes for x in tensors.values()),
        "settings": _said(config),
    }
    return Report(
        "peft_adapter", str(place), facts, "module", rows, {"config": dict(config)}
    )


def _said(config: Config) -> dict[str, Any]:
    """What the configuration says beyond PEFT's defaults; lists have no order."""
    shown = {"base_model_name_or_path", "peft_type", "task_type", "peft_version"}
    said: dict[str, Any] = {}
    for key, value in sorted(config.items()):
        if key not in shown and value and value != DEFAULTS.get(key):
            is_list = isinstance(value, list)
            said[key] = sorted(map(str, value)) if is_list else value
    return said


def _refused(config: Config, place: Path) -> str | None:
    """Why jlora cannot load it, by its configuration; None if it can."""
    try:
        check_config(config, CONFIG)
    except CheckpointError as error:
        return first_line(error)
    if not (place / WEIGHTS).exists():
        return f"there is no {WEIGHTS}"
    return None


def by_module(tensors: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """The tensors by module, and in it by their own names."""
    found: dict[str, dict[str, T]] = {}
    for key, tensor in tensors.items():
        key = key.removeprefix(PREFIX)
        if match := _PART.fullmatch(key):
            module, part = match["module"], match["part"]
        else:
            module, _, part = key.rpartition(".")
        found.setdefault(module, {})[part] = tensor
    return found


def _row(module: str, parts: Mapping[str, Header], config: Config) -> dict[str, Any]:
    down = parts.get("lora_A.weight") or parts.get("lora_embedding_A")
    rank = alpha = scale = None
    if down is not None and config.get("peft_type") == "LORA":
        # A of experts holds one of each expert.
        experts = config.get("target_parameters")
        rank = rank_of(config, module) if experts else down.shape[0]
        alpha = alpha_of(config, module)
        scale = float(scale_of(config, module)) if rank_of(config, module) > 0 else None
    return {
        "module": module,
        "rank": rank,
        "alpha": alpha,
        "scale": scale,
        "tensors": {_SHORT.get(part, part): [*x.shape] for part, x in parts.items()},
        "dtype": "/".join(sorted({x.dtype for x in parts.values()})),
        "features": _features(parts, adapted=down is not None),
        "bytes": sum(x.nbytes for x in parts.values()),
    }


def _features(parts: Mapping[str, Header], *, adapted: bool) -> list[str]:
    found = [
        feature
        for mark, feature in _FEATURES.items()
        if any(part.startswith(mark) for part in parts)
    ]
    return found or ([] if adapted else ["saved whole"])
