"""PEFT's adapter folders, read and written: `adapter_config.json` and its tensors.

    params = jlora.peft.load("someones/adapter", params)    # trained in PyTorch
    jlora.peft.save("ours", params, task_type="SEQ_2_SEQ_LM")   # for PEFT, vLLM, TGI

The tree is matched to PyTorch's modules by name: `encoder/block/0/layer/0/
SelfAttention/q/kernel` is the weight of `encoder.block.0.layer.0.SelfAttention.q`.
LoRA and rsLoRA on linear layers and embeddings, ranks and alphas by pattern, whole
modules and biases. What a file says and jlora cannot honour is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from jlora import _peft_load, _peft_save
from jlora._errors import CheckpointError
from jlora._lowrank import is_node
from jlora._partition import trainable_mask
from jlora._paths import path_str
from jlora._peft_config import check_config
from jlora._peft_files import (
    CONFIG,
    WEIGHTS,
    PathLike,
    adapter_folder,
    check_place,
    read_json,
    read_tensors,
    write,
)
from jlora._peft_names import Names, Table

Tree = Any


def load(
    folder: PathLike,
    params: Tree,
    *,
    names: Names = None,
    adapter: str | None = None,
) -> Tree:
    """Put a PEFT adapter onto its base.

    Args:
      folder: what PEFT's `save_pretrained` wrote.
      params: the plain parameters of its base. Adapters of sharded kernels are sharded
        along; a tree of shapes gives real adapters on an abstract base.
      names: what modules are called in PyTorch, where dots for slashes is not it: a
        dict from modules (or leaves) of the tree, or a function of a module's path.
        A table that several modules use has all their names, a tied head's with
        `".T"`: `{"wte": ("transformer.wte", "lm_head.T")}`.
      adapter: an adapter that PEFT keeps in the subfolder of that name.

    Returns:
      The lorafied tree. Factors keep the file's dtype, `modules_to_save` and biases
      become fully trained leaves in the base's.

    Raises:
      CheckpointError: files that are missing or damaged; a feature that jlora cannot
        honour; tensors that match nothing, do not fit this base, or disagree with the
        configuration; adapters that are missing.
      TargetError: `names` that do not fit the tree.

    Source: PEFT's `utils/save_and_load.py` and `tuners/tuners_utils.py`.
    """
    place = adapter_folder(folder, adapter)
    leaves = _leaves(params)
    adapted = [path for path, x in leaves.items() if is_node(x)]
    if adapted:
        raise CheckpointError(
            f"jlora.peft.load takes the plain base, but {adapted[0]!r} is adapted or "
            "trained already.\nPass the parameters as they were, or "
            "jlora.merge(params)."
        )
    config = read_config(place)
    contents = _peft_load.sorted_out(read_tensors(place), str(place / WEIGHTS))
    table = Table(_shapes(leaves), names)
    nodes: dict[str, Any] = {
        **_peft_load.adapters(contents, config, table, leaves),
        **_peft_load.fulls(contents, config, table, leaves),
    }
    if not nodes:
        raise CheckpointError(f"{contents.where} holds no tensors.")
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: nodes.get(path_str(path), leaf), params
    )


def read_config(folder: PathLike, *, adapter: str | None = None) -> dict[str, Any]:
    """An adapter's configuration, checked to be one that jlora honours.

    Args:
      folder: what PEFT's `save_pretrained` wrote.
      adapter: as for `load`.

    Raises:
      CheckpointError: there is none, it is damaged, or it says what jlora cannot do.
    """
    place = adapter_folder(folder, adapter)
    config = read_json(place)
    check_config(config, str(place / CONFIG))
    return config


def save(
    folder: PathLike,
    params: Tree,
    *,
    names: Names = None,
    adapter: str | None = None,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
    fan_in_fan_out: bool | None = None,
    config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write adapters and fully trained leaves as PEFT does.

    The configuration is the smallest that says what the tree is. Of a module with a
    trained leaf that is no bias every leaf is saved, for PEFT knows whole modules.
    Adapters on slices of a fused kernel become one of the sum of their ranks.

    Args:
      folder: the folder to write; other files in it stay.
      params: a lorafied tree.
      names: as for `load`.
      adapter: write the subfolder of that name, as PEFT does for several adapters.
      base_model_name_or_path: where PEFT finds the base.
      task_type: PEFT's, `"CAUSAL_LM"`, `"SEQ_2_SEQ_LM"`, ...
      fan_in_fan_out: True for GPT-2, whose layers store their weights as [in, out].
        The factors are the same.
      config: keys to write as they are, e.g. from `read_config` of what was loaded.
      overwrite: replace an adapter that is there already.

    Raises:
      CheckpointError: an adapter is at `folder` already, or it cannot be written.
      StructureError: nothing is trained; an adapter that PEFT's format cannot hold; a
        `config` that does not say what the tree is. Nothing is written.
      TargetError: `names` that do not fit the tree.
    """
    trainable_mask(params)  # nothing to save is an error
    place = adapter_folder(folder, adapter)
    check_place(place, overwrite)
    nodes = _leaves(params)
    table = Table(_shapes(nodes), names)
    found = _peft_save.adapters(nodes, table)
    given = {
        "base_model_name_or_path": base_model_name_or_path,
        "task_type": task_type,
        "fan_in_fan_out": fan_in_fan_out,
    }
    merged = {
        **_peft_save.derived(found, nodes, table, config or {}),
        **(config or {}),
        **{key: value for key, value in given.items() if value is not None},
    }
    _peft_save.check_says(merged, found, table)
    saved = _peft_save.saved_params(merged, found, nodes, table)
    write(place, merged, _peft_save.tensors(found, saved, nodes, merged))


def _leaves(params: Tree) -> dict[str, Any]:
    pairs = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_node)
    leaves = {path_str(path): x for path, x in pairs}
    if len(leaves) != len(pairs):
        raise CheckpointError(
            "two leaves of this tree have one path, so a file cannot tell them apart.\n"
            "Rename one of them."
        )
    return leaves


def _shapes(leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {path: tuple(getattr(x, "shape", ())) for path, x in leaves.items()}
