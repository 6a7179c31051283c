"""A Hugging Face model's folder, whether or not jlora defines the model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jlora._errors import CheckpointError
from jlora._files import read_json, tensor_headers
from jlora._text import first_line
from jlora.cli._inspect._report import Report
from jlora.models._hf.families import family_of
from jlora.models._hf.tensors import TensorFolder

# What comes of a config.json with values of wrong types: the families trust it.
MISREAD = (AttributeError, KeyError, OverflowError, TypeError, ValueError)
# The configurations' own words, in the order in which they are shown.
_SIZES = (
    "vocab_size", "hidden_size", "d_model", "n_embd", "num_hidden_layers", "num_layers",
    "num_decoder_layers", "n_layer", "num_attention_heads", "num_heads", "n_head",
    "num_key_value_heads", "head_dim", "d_kv", "intermediate_size", "d_ff", "n_inner",
    "num_experts", "num_local_experts", "max_position_embeddings", "n_positions",
    "num_labels",
)  # fmt: skip


def report(place: Path) -> Report:
    """What a model's configuration and the headers of its tensors say.

    Raises:
      CheckpointError: either is missing or damaged.
    """
    config = read_json(place / "config.json")
    tensors = TensorFolder(place)
    files = sorted({tensors.where(name) for name in tensors.names})
    found = {
        name: x for file in files for name, x in tensor_headers(Path(file)).items()
    }
    refused = _refused(config)
    numbers: Counter[str] = Counter()
    for header in found.values():
        numbers[header.dtype] += math.prod(header.shape)
    facts = {
        "family": config.get("model_type"),
        "architectures": config.get("architectures"),
        "loadable": refused is None,
        "not_loadable": refused,
        "sizes": {k: config[k] for k in _SIZES if isinstance(config.get(k), int)},
        "parameters": sum(numbers.values()),
        "dtypes": dict(numbers),
        "bytes": sum(x.nbytes for x in found.values()),
        "files": [Path(file).name for file in files],
    }
    rows = [
        {"tensor": n, "shape": [*x.shape], "dtype": x.dtype, "bytes": x.nbytes}
        for n, x in sorted(found.items())
    ]
    return Report("model", str(place), facts, "tensor", rows)


def _refused(config: Mapping[str, Any]) -> str | None:
    """Why `jlora.models` cannot load it, by its configuration; None if it can."""
    try:
        family_of(config.get("model_type"), "config.json").config.from_dict(config)
    except CheckpointError as error:
        return first_line(error)
    except MISREAD as error:
        return f"config.json holds a value of the wrong type: {error}"
    return None
