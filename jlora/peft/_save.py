"""A lorafied tree as PEFT's tensors and configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from jlora._errors import StructureError
from jlora._kernel.nodes import Full, LowRank, Rows
from jlora._processes import on_host
from jlora.peft._config import saved_whole, targets_parameter
from jlora.peft._contents import PREFIX, TOKENS
from jlora.peft._factors import exported
from jlora.peft._fields import Config
from jlora.peft._layouts import (
    SUFFIXES,
    TABLE_SUFFIXES,
    Kind,
    Layout,
    Pair,
    kind_here,
    layout_of,
)
from jlora.peft._names import Param, Table, advice_to_part
from jlora.peft._parameters import targeted_parameters
from jlora.peft._whole import is_rowwise

Tensors = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Exported:
    """The adapter of one module, or of one parameter without its module."""

    param: Param
    pair: Pair
    scale: float
    layout: Layout
    is_parameter: bool


def adapters(
    nodes: Mapping[str, Any], table: Table, given: Config
) -> dict[str, Exported]:
    """Every adapter by the module or parameter that has it in PyTorch.

    Raises:
      StructureError: an adapter that PEFT's format cannot hold.
    """
    found: dict[str, Exported] = {}
    for path, node in nodes.items():
        if not isinstance(node, LowRank):
            continue
        users = table.of_leaf[path]
        first = next((p for p in users if not p.tied), users[0])
        layout = _layout(first, node)
        pair, scale = exported(node, layout)
        _check_holdable(path, pair, layout, users)
        for param in users:
            own, its = pair, layout
            if param.tied:
                own, its = pair.swapped(), layout_of(param, "linear")
            told = targets_parameter(given, param.key)
            x = Exported(param, own, scale, its, told or layout.kind == "experts")
            found[param.key if x.is_parameter else param.module] = x
    return found


def _layout(param: Param, node: LowRank) -> Layout:
    kind: Kind | None = "table" if param.tied else kind_here(param)
    if kind is None and len(param.shape) == 2:
        # An array called `weight`: adapted along its rows it is an embedding.
        inputs = {d for t in node.adapters.values() for d in t.in_axes}
        kind = "table" if inputs == {0} else "linear"
    if kind is None:
        raise StructureError(
            f"the kernel {param.path!r} {node.shape} is none that jlora.peft can name: "
            "it writes linear layers, embeddings, convolutions, experts [E, in, out] "
            "and Flax's attention.\nMerge it or take it out of targets."
        )
    return layout_of(param, kind)


def _check_holdable(path: str, pair: Pair, layout: Layout, users: list[Param]) -> None:
    tied = [p.module for p in users if p.tied]
    said = [n for n in ("magnitude", "bias") if getattr(pair, n) is not None]
    if said and tied:
        raise StructureError(
            f"the adapter of {path!r} {layout.shape} has a {said[0]}, and {tied[0]} is "
            "tied to it: in PEFT that head has one of its own, along its outputs.\n"
            f"Leave the table out of targets. {advice_to_part(users)}"
        )
    refused = {"table": ("bias",), "experts": ("magnitude", "bias")}
    for name in refused.get(layout.kind, ()):
        if name in said:
            raise StructureError(
                f"the adapter of {path!r} {layout.shape} has a {name}, which PEFT does "
                f"not know for {'embeddings' if name == 'bias' else 'experts'}.\nLeave "
                "it out of targets."
            )


def tensors(
    found: Mapping[str, Exported], saved: list[Param], nodes: Mapping[str, Any],
    config: Config, table: Table,
) -> Tensors:  # fmt: skip
    """Everything the file holds."""
    flat = bool(config.get("fan_in_fan_out"))
    inside = {
        param.key: module
        for module, param in targeted_parameters(config, table).items()
    }
    out: Tensors = {}
    for name, x in found.items():
        if not x.param.called and not config.get("ensure_weight_tying"):
            continue
        suffixes = TABLE_SUFFIXES if x.layout.kind == "table" else SUFFIXES
        for tensor, value in x.layout.write(x.pair).items():
            out[f"{PREFIX}{inside.get(name, name)}{suffixes[tensor]}"] = value
    out |= whole_tensors(found, saved, nodes, flat)
    for param, node in token_tables(nodes, table):
        out[f"{PREFIX}{param.module}{TOKENS}"] = on_host(node.rows)
    return out


def whole_tensors(
    found: Collection[str], saved: list[Param], nodes: Mapping[str, Any], flat: bool
) -> Tensors:
    """The parameters that stand in the file as they are.

    Args:
      found: the modules that have an adapter.
      saved: the parameters.
      nodes: their leaves by path.
      flat: PEFT's `fan_in_fan_out`.
    """
    out: Tensors = {}
    for param in saved:
        node = nodes[param.path]
        value = node.value if isinstance(node, Full) else node
        inner = ".base_layer" if param.module in found else ""
        key = f"{PREFIX}{param.module}{inner}.{param.name}"
        out[key] = param.as_torch(value, flat)
    return out


def token_tables(nodes: Mapping[str, Any], table: Table) -> list[tuple[Param, Rows]]:
    """The modules whose trained rows stand in the file.

    Of a table with a tied head PEFT stores them once, by the module that holds it, and
    ties the head where the model's configuration says `tie_word_embeddings`.

    Raises:
      StructureError: rows of what is no table, or without values.
    """
    found = []
    for path, node in nodes.items():
        if not isinstance(node, Rows):
            continue
        users = table.of_leaf[path]
        if not is_rowwise(users[0]):
            raise StructureError(
                f"rows of {path!r} {node.shape} are trained; its rows are not those of "
                "PyTorch's weight, which PEFT trains.\nTrain it whole: train=[...]."
            )
        if not isinstance(node.rows, jax.Array | np.ndarray):
            raise StructureError(
                f"the trained rows of {path!r} have no values.\nSave a tree of arrays, "
                "outside of jax.jit."
            )
        tied = any(p.tied for p in users)
        held = [table.home(path)] if tied else [p for p in users if p.called]
        found += [(param, node) for param in held]
    return found


def saved_params(
    config: Config, found: Collection[str], nodes: Mapping[str, Any], table: Table,
) -> list[Param]:  # fmt: skip
    """The parameters that stand in the file as they are.

    PEFT saves modules as wholes: of a module with one trained leaf, all are saved.

    Raises:
      StructureError: a trained leaf that the configuration does not mention, or an
        adapter inside a module that is saved.
    """
    bias = config.get("bias", "none")
    out = []
    for p in table.params.values():
        adapted = p.module in found
        is_bias = p.name == "bias"
        if not p.called and not saved_whole(config, p.module):
            continue
        if (not adapted and saved_whole(config, p.module)) or (
            is_bias and (bias == "all" or (bias == "lora_only" and adapted))
        ):
            out.append(p)
        elif isinstance(nodes[p.path], Full) and not _saved_by_tie(config, p, table):
            raise StructureError(
                f"the leaf {p.path!r} ({p.key}) is trained, and the configuration says "
                "so neither in modules_to_save nor in bias.\nLeave those keys to jlora."
            )
        elif isinstance(nodes[p.path], Full):
            out.append(p)
    return out


def check_conv1d(given: Config, saved: list[Param]) -> None:
    """Refuse to guess whether a layer that is saved whole is GPT-2's Conv1D.

    Raises:
      StructureError: such a layer is saved, and `fan_in_fan_out` is not given.
    """
    asked = [p for p in saved if p.may_be_conv1d]
    if asked and "fan_in_fan_out" not in given:
        raise StructureError(
            f"{asked[0].key} is saved as it is, and its name does not tell whether "
            "PyTorch stores it as [in, out], GPT-2's way, or as [out, in].\nPass "
            "fan_in_fan_out=True or False."
        )


def _saved_by_tie(config: Config, param: Param, table: Table) -> bool:
    """Whether PEFT saves a module because it is tied to one that is saved."""
    users = [p.module for p in table.of_leaf[param.path]]
    return bool(config.get("ensure_weight_tying")) and any(
        saved_whole(config, module) for module in users
    )
