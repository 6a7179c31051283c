"""Heads that a checkpoint does not hold: chosen on loading, made anew, and reported."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jlora._errors import CheckpointError, JloraWarning
from jlora._text import listed
from jlora.models._hf.families import FAMILIES, Family
from jlora.models._hf.sources import Source, places
from jlora.models._hf.tensors import TensorFolder

Params = dict[str, Any]


def chosen(
    family: Family, raw: dict[str, Any], head: str | None, num_labels: int | None
) -> dict[str, Any]:
    """Return the parsed `config.json` as it would name the chosen head.

    Raises:
      CheckpointError: the family has one form only, or no such head.
    """
    if head is None and num_labels is None:
        return raw
    if family.with_head is None:
        able = [name for name, known in FAMILIES.items() if known.with_head]
        raise CheckpointError(
            f"head={head!r}, num_labels={num_labels!r}: {raw['model_type']} has one "
            f"form only.\nHeads are chosen for {', '.join(sorted(able))}; leave both "
            "out."
        )
    return family.with_head(raw, head, num_labels)


def hide_others(tensors: TensorFolder, family: Family, wanted: set[str]) -> None:
    """Hide the tensors of a head that the chosen one takes the place of."""
    others = tensors.names - wanted
    tensors.rename({name: None for name in others if family.is_head(_path(name, "."))})


def absent(
    tensors: TensorFolder,
    family: Family,
    sources: Mapping[str, Source],
    shapes: Mapping[str, tuple[int, ...]],
) -> set[str]:
    """Return the head's leaves that the files do not hold in the shape they need."""

    def held(path: str, source: Source) -> bool:
        return all(
            place.tensor.name in tensors.names
            and tensors.shape(place.tensor.name) == place.shape
            for place in places(source, shapes[path])
        )

    return {
        path
        for path, source in sources.items()
        if family.is_head(_path(path, "/")) and not held(path, source)
    }


def _path(name: str, separator: str) -> tuple[str, ...]:
    return tuple(name.split(separator))


def initial(
    family: Family, model: Any, paths: set[str], key: jax.Array | None
) -> dict[str, jax.Array]:
    """Return initial values of the leaves at `paths`; the others are not computed."""

    def make(key: jax.Array) -> dict[str, jax.Array]:
        params = model.init(key, *_zeros(family))["params"]
        leaves = jax.tree_util.tree_leaves_with_path(params)
        named = {
            jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves
        }
        return {path: named[path] for path in paths}

    return jax.jit(make)(jax.random.key(0) if key is None else key)


def _zeros(family: Family) -> list[Any]:
    """Return the smallest inputs."""
    return [
        x if x is None else jax.numpy.zeros(x.shape, x.dtype) for x in family.init_args
    ]


def report(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Warn of the leaves that were made anew."""
    lines = [f"{path} {list(shape)}" for path, shape in shapes.items()]
    warnings.warn(
        f"{folder} does not hold {len(lines)} leaves of the chosen head in the shape "
        f"it needs; they are newly initialised:\n  {listed(lines)}\nTrain them with "
        "the rest, jlora.lorafy(..., train=[...]), before the outputs mean anything.",
        JloraWarning,
        stacklevel=3,
    )
