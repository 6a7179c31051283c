"""A lorafied tree as PEFT's tensors and configuration."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora._errors import StructureError
from jlora._lowrank import Full, LowRank
from jlora._peft_config import (
    DEFAULTS,
    Config,
    alpha_for,
    check_config,
    disagreements,
    pattern_for,
    saved_whole,
    scale_of,
    short_names,
    target_modules_for,
)
from jlora._peft_factors import Pair, exported
from jlora._peft_files import listed
from jlora._peft_load import PREFIX
from jlora._peft_names import Param, Table

Tensors = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Exported:
    """One module's adapter."""

    pair: Pair
    scale: float
    table: bool


def adapters(nodes: Mapping[str, Any], table: Table) -> dict[str, Exported]:
    """Every adapter by the module that has it in PyTorch.

    Raises:
      StructureError: an adapter that PEFT's format cannot hold.
    """
    found: dict[str, Exported] = {}
    for path, node in nodes.items():
        if not isinstance(node, LowRank):
            continue
        first = table.of_leaf[path][0]
        linear = first.axes() is not None
        if not (linear or len(node.shape) == 2):
            raise StructureError(
                f"the kernel {path!r} {node.shape} is none that jlora.peft can name: "
                "it writes linear layers, embeddings and Flax's attention.\nMerge it "
                "or take it out of targets."
            )
        inputs = {d for t in node.adapters.values() for d in t.a_only}
        # By its name, or because an array called `weight` is adapted along its rows.
        is_table = first.is_table or (not linear and inputs == {0})
        pair, scale = exported(node, table=is_table)
        for param in table.of_leaf[path]:
            own = pair.swapped() if param.tied else pair
            found[param.module] = Exported(own, scale, is_table and not param.tied)
    return found


def tensors(
    found: Mapping[str, Exported], saved: list[Param], nodes: Mapping[str, Any],
    config: Config,
) -> Tensors:  # fmt: skip
    """Everything the file holds."""
    flat = bool(config.get("fan_in_fan_out"))
    out: Tensors = {}
    for module, x in found.items():
        a, b = ("A", "B") if not x.table else ("embedding_A", "embedding_B")
        end = "" if x.table else ".weight"
        out[f"{PREFIX}{module}.lora_{a}{end}"] = x.pair.a
        out[f"{PREFIX}{module}.lora_{b}{end}"] = x.pair.b
    for param in saved:
        node = nodes[param.path]
        value = node.value if isinstance(node, Full) else node
        inner = ".base_layer" if param.module in found else ""
        key = f"{PREFIX}{param.module}{inner}.{param.name}"
        out[key] = param.as_torch(value, flat)
    return out


# -- configuration ---------------------------------------------------------------------


def derived(
    found: Mapping[str, Exported], nodes: Mapping[str, Any], table: Table,
    given: Config,
) -> dict[str, Any]:  # fmt: skip
    """The smallest configuration that says what the tree is."""
    config = copy.deepcopy(DEFAULTS)
    terms = [
        t for x in nodes.values() if isinstance(x, LowRank) for t in x.adapters.values()
    ]
    config["use_rslora"] = rslora = bool(terms) and all(t.rslora for t in terms)
    dropouts = sorted({t.dropout for t in terms})
    if len(dropouts) > 1 and "lora_dropout" not in given:
        raise StructureError(
            f"the adapters have dropouts {dropouts}; PEFT has one for all.\nSay which: "
            f"config={{'lora_dropout': {dropouts[-1]}}}."
        )
    config["lora_dropout"] = float(dropouts[0]) if dropouts else 0.0
    ranks = {m: x.pair.rank for m, x in found.items()}
    alphas = {m: alpha_for(x.scale, ranks[m], rslora=rslora) for m, x in found.items()}
    if found:
        config["r"], config["rank_pattern"] = pattern_for(ranks)
        config["lora_alpha"], config["alpha_pattern"] = pattern_for(alphas)
    config["target_modules"] = target_modules_for(found, table.modules())
    config["bias"], whole = _bias_and_whole(found, nodes, table)
    if whole:
        config["modules_to_save"] = _modules_to_save(whole, table)
    return config


def _bias_and_whole(
    found: Mapping[str, Exported], nodes: Mapping[str, Any], table: Table
) -> tuple[str, list[str]]:
    """PEFT's `bias`, and the modules that are trained besides, as wholes."""
    full = [p for p in table.params.values() if isinstance(nodes[p.path], Full)]
    whole = {p.module for p in full if p.name != "bias"}
    every = {p.module for p in table.params.values() if p.name == "bias"} - whole
    biases = {p.module for p in full if p.name == "bias"} - whole
    if not biases:
        return "none", sorted(whole)
    if biases == every and biases - set(found):
        return "all", sorted(whole)
    inside = biases & set(found)
    return ("lora_only" if inside else "none"), sorted(whole | (biases - inside))


def _modules_to_save(whole: list[str], table: Table) -> list[str]:
    # PEFT takes any module whose name ends so, be it within a word.
    ends = short_names(whole, table.modules(), lambda end, m: m.endswith(end))
    if ends is None:
        raise StructureError(
            f"modules_to_save: no name for {listed(whole)} that does not end other "
            "modules' names too.\nTrain those as well, or do not train this one."
        )
    return sorted(ends)


def saved_params(
    config: Config, found: Mapping[str, Exported], nodes: Mapping[str, Any],
    table: Table,
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
        if (not adapted and saved_whole(config, p.module)) or (
            is_bias and (bias == "all" or (bias == "lora_only" and adapted))
        ):
            out.append(p)
        elif isinstance(nodes[p.path], Full):
            raise StructureError(
                f"the leaf {p.path!r} ({p.key}) is trained, and the configuration says "
                "so neither in modules_to_save nor in bias.\nLeave those keys to jlora."
            )
    return out


def check_says(config: Config, found: Mapping[str, Exported], table: Table) -> None:
    """Refuse a configuration that does not say what the tree is.

    Raises:
      StructureError: so, with the modules.
      CheckpointError: the configuration is none that jlora could read again.
    """
    check_config(config, "config")
    ranks = {m: x.pair.rank for m, x in found.items()}
    lines = disagreements(config, ranks, table.kernels())
    if not lines:
        lines = [
            f"{m} has scale {x.scale:g}, but is to have {scale_of(config, m):g}"
            for m, x in found.items()
            if scale_of(config, m) != np.float32(x.scale)
        ]
    if lines:
        raise StructureError(
            f"the configuration does not say what this tree is:\n  {listed(lines)}\n"
            "Leave those keys to jlora."
        )
