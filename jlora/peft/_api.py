"""Whole adapters: a folder onto a tree, a tree into a folder."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from jlora._errors import CheckpointError, StructureError, TargetError
from jlora._files import PathLike
from jlora._kernel.bank import refuse_banks
from jlora._kernel.nodes import is_node, is_trained, with_origin
from jlora._paths import leaves_by_path, map_with_path
from jlora._tree.conventions import stacked_leaves
from jlora._tree.partition import check_trained
from jlora.peft import _config_for, _load, _save, _whole
from jlora.peft._contents import contents_of
from jlora.peft._depth import check_depth
from jlora.peft._fields import as_lora, check_config
from jlora.peft._files import (
    CONFIG,
    WEIGHTS,
    adapter_folder,
    adapters_in,
    check_free,
    read_json,
    read_tensors,
    write,
)
from jlora.peft._form_load import form_adapters
from jlora.peft._form_save import form_content, is_of_forms
from jlora.peft._names import Model, Names, Table, advice_to_part
from jlora.peft._serving import warn_of_servers
from jlora.peft._start import on_its_base, start_of

Tree = Any


def load(
    folder: PathLike,
    params: Tree,
    *,
    model: Model | None = None,
    names: Names = None,
    adapter: str | None = None,
    shifted_base: bool = False,
) -> Tree:
    """Put a PEFT adapter onto its base.

    Args:
      folder: what PEFT's `save_pretrained` wrote.
      params: the plain parameters of its base. Adapters of sharded kernels are sharded
        like them; a tree of shapes gives real adapters on an abstract base.
      model: a model with a method `torch_names()` that returns what `names` would
        contain, as the models of `jlora.models` have.
      names: what modules are called in PyTorch, if not like their paths with dots for
        slashes: a dict from modules (or leaves) of the tree, or a function of a
        module's path. A table that several modules use has all their names: a tied
        head's ends in `".T"`, and that of a module which holds the table but is never
        called is in parentheses. `{"wte": ("transformer.wte", "lm_head.T")}`; T5's is
        `{"shared": ("(shared)", "encoder.embed_tokens", "decoder.embed_tokens",
        "lm_head.T")}`. List the leaves of one module in the order of the PyTorch
        model's parameters.
      adapter: the name of an adapter that PEFT keeps in a subfolder.
      shifted_base: whether `params` is the base as changed by PiSSA, CorDA and so on,
        saved with the adapter. If not, the changed base of PiSSA (exact) and OLoRA is
        made again from the original, as PEFT does; for the others this is impossible.

    Returns:
      The lorafied tree. Factors keep the file's dtype, `modules_to_save` and biases
      become fully trained leaves in the base's.

    Raises:
      CheckpointError: files that are missing or damaged; a feature that jlora cannot
        honour; tensors that match nothing, do not fit this base, or disagree with the
        configuration; adapters that are missing.
      StructureError: layers that are stacked for a scan.
      TargetError: `names` that do not fit the tree.

    Source: PEFT's `utils/save_and_load.py` and `tuners/tuners_utils.py`.
    """
    place = adapter_folder(folder, adapter)
    leaves = leaves_by_path(params, is_leaf=is_node)
    adapted = [path for path, x in leaves.items() if is_trained(x)]
    if adapted:
        raise CheckpointError(
            f"jlora.peft.load takes the plain base, but {adapted[0]!r} is adapted or "
            "trained already.\nPass the parameters as they were, or "
            "jlora.merge(params)."
        )
    config = read_config(place)
    contents = contents_of(read_tensors(place), str(place / WEIGHTS))
    table = _table(leaves, model, names)
    nodes: dict[str, Any] = {}
    check_depth(config, table, str(place / CONFIG))
    view = as_lora(config)
    if view is config:
        start = start_of(config, str(place / CONFIG), shifted_base)
        adapters = functools.partial(_load.adapters, config=config, start=start)
    else:
        adapters = functools.partial(form_adapters, config=config)
    leaves = _whole.with_added_rows(contents, view, table, leaves)
    fulls = functools.partial(_whole.fulls, config=view)
    rows = functools.partial(_whole.rows, config=view)
    for part in (adapters, fulls, rows):
        found = part(contents, table=table, leaves=leaves)
        if both := sorted(found.keys() & nodes.keys()):
            raise CheckpointError(
                f"{contents.where} holds two of an adapter, a whole weight and trained "
                f"rows for {both[0]!r}, whose users share one leaf here.\n"
                f"{advice_to_part(table.of_leaf[both[0]])}"
            )
        nodes.update(found)
    if not nodes:
        raise CheckpointError(f"{contents.where} holds no tensors.")
    return with_origin(map_with_path(nodes.get, params, is_leaf=is_node))


def load_all(
    folder: PathLike,
    params: Tree,
    *,
    model: Model | None = None,
    names: Names = None,
    adapters: Sequence[str] | None = None,
) -> dict[str, Tree]:
    """Every adapter of a folder, by name, each on the same base.

        trees = jlora.peft.load_all("folder", params)
        logits = apply(trees["german"], ids)    # PEFT's set_adapter("german")
        for name, tree in trees.items():        # PEFT's save_pretrained
            jlora.peft.save("copy", tree, adapter=name)

    The trees share the base's arrays. Each holds one adapter with whatever whole
    modules, biases and tokens belong to it, so one tree's is active at a time, as in
    PEFT.

    Args:
      folder: what PEFT's `save_pretrained` wrote; its own adapter is `"default"`, the
        others are in subfolders by their names.
      params: as for `load`.
      model: as for `load`.
      names: as for `load`.
      adapters: the names to load; None is all that are there.

    Raises:
      CheckpointError: no adapter is there, or as for `load`.
      TargetError: as for `load`.
    """
    wanted = adapters_in(folder) if adapters is None else list(adapters)
    return {
        name: load(folder, params, model=model, names=names, adapter=name)
        for name in wanted
    }


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
    model: Model | None = None,
    names: Names = None,
    adapter: str | None = None,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
    fan_in_fan_out: bool | None = None,
    config: Mapping[str, Any] | None = None,
    initial: Tree | None = None,
    shifted_base: bool = False,
    overwrite: bool = False,
) -> None:
    """Write adapters and fully trained leaves as PEFT does.

    The configuration is the smallest that describes the tree. If a leaf of a module is
    trained whole and is not a bias, all leaves of that module are saved, since PEFT
    saves whole modules. Adapters on slices of a fused kernel become one, whose rank is
    the sum of theirs. A warning says where vLLM and TGI would serve a decoder's adapter
    differently from PEFT.

    Args:
      folder: the folder to write; other files in it stay.
      params: a lorafied tree.
      model: as for `load`.
      names: as for `load`.
      adapter: write into a subfolder of that name, as PEFT does for several adapters.
      base_model_name_or_path: where PEFT finds the base.
      task_type: PEFT's, `"CAUSAL_LM"`, `"SEQ_2_SEQ_LM"`, ... For classifiers and
        question answering the head is saved too, as PEFT does, trained or not.
      fan_in_fan_out: True for GPT-2, whose layers store their weights as [in, out].
        The factors are the same either way; layers that are trained whole are not.
      config: keys to write unchanged, for example from `read_config` of what you
        loaded.
      initial: for adapters whose bases were shifted (PiSSA, OLoRA): the tree as lorafy
        made it, or its trainable half. The file then holds the difference of the two,
        with twice the rank, and loads onto the original base. See
        `jlora.init.unshift`.
      shifted_base: write such adapters as they are. They work only with the tree's
        shifted bases, so save those too.
      overwrite: replace an existing adapter.

    Raises:
      CheckpointError: `folder` has an adapter already, or it cannot be written.
      StructureError: nothing is trained; an adapter that PEFT's format cannot hold, or
        of a shifted base without `initial` or `shifted_base`; layers that are stacked
        for a scan; a `config` that disagrees with the tree. Nothing is written.
      TargetError: `names` that do not fit the tree.
    """
    check_trained(params)
    refuse_banks(params, "jlora.peft.save")
    place = adapter_folder(folder, adapter)
    check_free(place, overwrite)
    params = on_its_base(params, initial, shifted_base)
    nodes = leaves_by_path(params, is_leaf=is_node)
    table = _table(nodes, model, names)
    keywords = {
        "base_model_name_or_path": base_model_name_or_path,
        "task_type": task_type,
        "fan_in_fan_out": fan_in_fan_out,
    }
    given = {
        **(config or {}),
        **{key: value for key, value in keywords.items() if value is not None},
    }
    if is_of_forms(nodes):
        write(place, *form_content(nodes, table, given))
        return
    found = _save.adapters(nodes, table, given)
    merged = {**_config_for.config_for(found, nodes, table, given), **given}
    _config_for.check_says(merged, found, nodes, table)
    saved = _save.saved_params(merged, found, nodes, table)
    _save.check_conv1d(given, saved)
    write(place, merged, _save.tensors(found, saved, nodes, merged, table))
    modules = [n for n, x in found.items() if x.param.called and not x.is_parameter]
    warn_of_servers(merged, {*modules}, table.modules())


def _table(leaves: Mapping[str, Any], model: Model | None, names: Names) -> Table:
    if stacked := sorted(stacked_leaves(leaves)):
        shape = _shapes(leaves)[stacked[0]]
        raise StructureError(
            f"the leaf {stacked[0]!r} {shape} holds several layers, for a scan, and "
            "PyTorch has a module for each.\nUnstack them first, "
            "jlora.unstack_layers(tree, at=[...]); what was loaded is stacked again by "
            "jlora.stack_layers."
        )
    return Table(_shapes(leaves), _names(model, names))


def _names(model: Model | None, names: Names) -> Names:
    if names is not None and not (callable(names) or isinstance(names, Mapping)):
        raise TargetError(
            f"names= is a {type(names).__name__}.\nPass {{module here: module in "
            "PyTorch}, or a function of a module's path."
        )
    if model is None:
        return names
    if names is not None:
        raise TargetError("pass model= or names=, not both: each says all names.")
    if not hasattr(model, "torch_names"):
        raise TargetError(
            f"model= is a {type(model).__name__}, which has no torch_names().\nPass a "
            "model of jlora.models, or names={module here: module in PyTorch}."
        )
    return model.torch_names()


def _shapes(leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {path: tuple(getattr(x, "shape", ())) for path, x in leaves.items()}
