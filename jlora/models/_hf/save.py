"""Flax parameters back to a Hugging Face folder, written beside and then renamed."""

from __future__ import annotations

import contextlib
import math
import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jlora import _files
from jlora._errors import CheckpointError, StructureError
from jlora._files import PathLike, local_path
from jlora._processes import agree, on_first, on_host
from jlora._text import listed
from jlora.models._hf.families import family_of
from jlora.models._hf.load import GENERATION, TOKENIZER_FILES, Params, sources_of
from jlora.models._hf.sources import TensorPlace, places
from jlora.models._hf.tensors import INDEX, WEIGHTS

SHARD_BYTES = 50 * 10**9  # the largest file that Hugging Face's hub takes

_COPIED = (*TOKENIZER_FILES, GENERATION)

_WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")

Tensors = list[tuple[TensorPlace, jax.Array]]  # a tensor, and the leaf that it is of


def save(
    model: Any,
    params: Params,
    path: PathLike,
    *,
    tokenizer_from: PathLike | None = None,
    max_shard_bytes: int | None = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint folder that `load` and `transformers` read.

    Everything is written to a folder beside `path` first, which then takes its name:
    a full disk or an interruption leaves what was there. One tensor at a time is in the
    host's memory, of parameters on a mesh as well. Of several processes the first one
    writes, and every one calls this.

    Args:
      model: a model of `jlora.models`; its configuration becomes `config.json`, and
        `generation_config.json` where it has such settings.
      params: its parameters, dense.
      path: the folder to write.
      tokenizer_from: a folder whose tokenizer files are copied (and
        `generation_config.json`, if the model has no settings of its own).
      max_shard_bytes: begins a new file where one would grow beyond it: 50 GB, as in
        `transformers` 5; `None` writes one file.
      overwrite: replaces configuration and weights in `path`; other files there,
        the tokenizer's among them, stay unless they are written anew.

    Raises:
      CheckpointError: `path` is not empty and `overwrite` is off, or is no local path;
        `tokenizer_from` holds no tokenizer; the folder cannot be written.
      StructureError: `params` are not the model's.
    """
    target = local_path(path)
    tensors = _tensors(model, params)
    copied = _tokenizer_files(tokenizer_from)
    what = f"saving the model {str(target)!r}"
    on_first(what, lambda: _check_place(target, overwrite))
    error: Exception | None = None
    try:
        with _staged(target) as folder:
            if folder is not None:
                for file in copied:
                    shutil.copyfile(file, folder / file.name)
            _write(folder, what, model, tensors, max_shard_bytes)
    except Exception as raised:
        error = raised
    agree(what, error)


def _staged(target: Path) -> contextlib.AbstractContextManager[Path | None]:
    """The folder to write into; None on all processes but the first."""
    if jax.process_index() > 0:
        return contextlib.nullcontext()
    return _files.staged(
        target, "the model", mark="config.json",
        stale=lambda name: _WEIGHT_FILE.fullmatch(name) is not None,
    )  # fmt: skip


def _tensors(model: Any, params: Params) -> Tensors:
    """Return the file's tensors in order, after checking that all leaves are there."""
    family = family_of(model.config.to_dict()["model_type"], repr(type(model)))
    wanted = _shapes(family.abstract_params(model))
    held = _shapes(params)
    if wanted != held:
        wrong = {k for k in wanted.keys() | held if wanted.get(k) != held.get(k)}
        lines = [f"{k}: {held.get(k)}, wanted {wanted.get(k)}" for k in wrong]
        raise StructureError(
            f"The parameters are not those of this {type(model).__name__}:\n  "
            f"{listed(lines)}\nIf the tree carries adapters or codes, merge them "
            "first: jlora.merge(params)."
        )
    sources = sources_of(family, model.config, params)
    leaves = zip(sources.values(), jax.tree.leaves(params), strict=True)
    found = [(p, leaf) for source, leaf in leaves for p in places(source, leaf.shape)]
    # By name, so that files do not depend on which tensors make up a leaf.
    return sorted(found, key=lambda item: _in_order(item[0].tensor.name))


def _in_order(name: str) -> list[tuple[int, str]]:
    """Return what sorts names with their numbers as numbers."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")]


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
    }


def _tokenizer_files(folder: PathLike | None) -> list[Path]:
    if folder is None:
        return []
    here = local_path(folder)
    found = [here / name for name in _COPIED if (here / name).exists()]
    if not any(file.name in TOKENIZER_FILES for file in found):
        raise CheckpointError(
            f"{str(here)!r} holds no tokenizer files.\nPass the folder that the model "
            "was loaded from, or leave tokenizer_from out."
        )
    return found


def _check_place(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{str(target)!r} is a file; pass the path of a folder.")
    if any(target.iterdir()) and not overwrite:
        raise CheckpointError(
            f"{str(target)!r} is not empty.\nPass overwrite=True to replace the "
            "checkpoint in it, or another path."
        )


def _write(
    folder: Path | None, what: str, model: Any, tensors: Tensors, most: int | None
) -> None:
    """Write configuration, shards and, where there are several, their index."""
    shards = list(_shards(tensors, most))
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = WEIGHTS
        if len(shards) > 1:
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder and folder / file, what, shard)
        weight_map.update((place.tensor.name, file) for place, _ in shard)
    if folder is None:
        return
    dtypes = {str(leaf.dtype) for _, leaf in tensors}
    config = {k: v for k, v in model.config.to_dict().items() if k != "torch_dtype"}
    config["dtype"] = dtypes.pop() if len(dtypes) == 1 else "float32"
    _files.write_json(folder / "config.json", config)
    if generation := getattr(model.config, "generation", None):
        _files.write_json(folder / GENERATION, dict(generation))
    if len(shards) > 1:
        size = sum(_bytes(*each) for each in tensors)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        _files.write_json(folder / INDEX, index)


def _write_shard(file: Path | None, what: str, shard: Tensors) -> None:
    """Write a file tensor by tensor; `file` is None on all processes but the first."""
    held = {place.tensor.name: (place, leaf) for place, leaf in shard}
    specs = {n: (np.dtype(leaf.dtype), p.shape) for n, (p, leaf) in held.items()}
    written = _files.TensorFile(specs)
    on_first(what, partial(_begin, file, written))
    for name in written.order:
        # All processes gather it, and it is gone before the next one.
        on_first(what, partial(_append, file, _layout(*held[name])))


def _begin(file: Path | None, written: _files.TensorFile) -> None:
    assert file is not None  # on the first process
    written.begin(file)


def _append(file: Path | None, value: np.ndarray) -> None:
    assert file is not None
    _files.TensorFile.append(file, value)


def _layout(place: TensorPlace, leaf: jax.Array | np.ndarray) -> np.ndarray:
    """A tensor as the file has it, which may be a view of its leaf."""
    value = on_host(leaf, place.box)[(0,) * place.depth]
    return value.swapaxes(-1, -2) if place.tensor.transposed else value


def _bytes(place: TensorPlace, leaf: jax.Array) -> int:
    return math.prod(place.shape) * leaf.dtype.itemsize


def _shards(tensors: Tensors, most: int | None) -> Iterator[Tensors]:
    shard: Tensors = []
    size = 0
    for place, leaf in tensors:
        nbytes = _bytes(place, leaf)
        if shard and most is not None and size + nbytes > most:
            yield shard
            shard, size = [], 0
        shard.append((place, leaf))
        size += nbytes
    yield shard
