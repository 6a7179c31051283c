"""A lorafied tree as PEFT's tensors and configuration."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jlora._errors import StructureError
from jlora._lowrank import Full, LowRank, Rows
from jlora._peft_config import (
    alpha_for,
    disagreements,
    names,
    pattern_for,
    saved_whole,
    scale_of,
    short_names,
    target_modules_for,
    targets_parameter,
    tokens_of,
)
from jlora._peft_contents import PREFIX, TOKENS
from jlora._peft_factors import exported
from jlora._peft_fields import DEFAULTS, Config, check_config
from jlora._peft_files import listed
from jlora._peft_layouts import (
    SUFFIXES,
    TABLE_SUFFIXES,
    Kind,
    Layout,
    Pair,
    kind_here,
    layout_of,
)
from jlora._peft_names import Param, Table
from jlora._peft_parameters import wrapped
from jlora._peft_whole import is_rowwise

Tensors = dict[str, np.ndarray]
# PEFT trains and saves these modules whatever `modules_to_save` says.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


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
        inputs = {d for t in node.adapters.values() for d in t.a_only}
        kind = "table" if inputs == {0} else "linear"
    if kind is None:
        raise StructureError(
            f"the kernel {param.path!r} {node.shape} is none that jlora.peft can name: "
            "it writes linear layers, embeddings, convolutions, experts [E, in, out] "
            "and Flax's attention.\nMerge it or take it out of targets."
        )
    return layout_of(param, kind)


def _check_holdable(
    path: str, pair: Pair, layout: Layout, users: list[Param]
) -> None:
    tied = [p.module for p in users if p.tied]
    said = [n for n in ("magnitude", "bias") if getattr(pair, n) is not None]
    if said and tied:
        raise StructureError(
            f"the adapter of {path!r} {layout.shape} has a {said[0]}, and {tied[0]} is "
            "tied to it: in PEFT that head has one of its own, along its outputs.\n"
            "Leave the table out of targets, or hold the two apart."
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
    inside = {param.key: module for module, param in wrapped(config, table).items()}
    out: Tensors = {}
    for name, x in found.items():
        if not x.param.called and not config.get("ensure_weight_tying"):
            continue
        suffixes = TABLE_SUFFIXES if x.layout.kind == "table" else SUFFIXES
        for tensor, value in x.layout.write(x.pair).items():
            out[f"{PREFIX}{inside.get(name, name)}{suffixes[tensor]}"] = value
    for param in saved:
        node = nodes[param.path]
        value = node.value if isinstance(node, Full) else node
        inner = ".base_layer" if param.module in found else ""
        key = f"{PREFIX}{param.module}{inner}.{param.name}"
        out[key] = param.as_torch(value, flat)
    for param, node in token_tables(nodes, table):
        out[f"{PREFIX}{param.module}{TOKENS}"] = np.asarray(node.rows)
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
    config["use_dora"] = any(x.pair.magnitude is not None for x in found.values())
    config["lora_bias"] = any(x.pair.bias is not None for x in found.values())
    config["lora_dropout"] = _dropout(terms, given)
    shown = {n: x for n, x in found.items() if x.param.called}
    ranks = {n: x.pair.rank for n, x in shown.items()}
    alphas = {n: alpha_for(x.scale, ranks[n], rslora=rslora) for n, x in shown.items()}
    if shown:
        config["r"], config["rank_pattern"] = pattern_for(ranks)
        config["lora_alpha"], config["alpha_pattern"] = pattern_for(alphas)
    modules = [n for n, x in shown.items() if not x.is_parameter]
    config["target_modules"] = target_modules_for(modules, table.modules())
    config["target_parameters"] = _target_parameters(
        [n for n, x in shown.items() if x.is_parameter], table
    )
    config["trainable_token_indices"] = _token_indices(nodes, table)
    config["ensure_weight_tying"] = _is_tied(nodes, table)
    config["bias"], whole = _bias_and_whole(found, nodes, table)
    heads = _heads(given, table)
    whole = [m for m in whole if not saved_whole({"modules_to_save": heads}, m)]
    config["modules_to_save"] = [*_modules_to_save(whole, table), *heads] or None
    return config


def _dropout(terms: list[Any], given: Config) -> float:
    dropouts = sorted({t.dropout for t in terms})
    if len(dropouts) > 1 and "lora_dropout" not in given:
        raise StructureError(
            f"the adapters have dropouts {dropouts}; PEFT has one for all.\nSay which: "
            f"config={{'lora_dropout': {dropouts[-1]}}}."
        )
    return float(dropouts[0]) if dropouts else 0.0


def _target_parameters(parameters: list[str], table: Table) -> list[str] | None:
    if not parameters:
        return None
    short = short_names(parameters, table.params, names)
    if short is None:
        raise StructureError(
            f"target_parameters: no name for {listed(parameters)} that does not end "
            "other parameters' names too.\nAdapt those as well, or leave it out."
        )
    return sorted(short)


def _token_indices(
    nodes: Mapping[str, Any], table: Table
) -> dict[str, list[int]] | None:
    found = {p.module: list(n.indices) for p, n in token_tables(nodes, table)}
    out: dict[str, list[int]] = {}
    for module, indices in found.items():
        ends = short_names([module], table.modules(), lambda end, m: m.endswith(end))
        if ends is None:
            raise StructureError(
                f"trainable_token_indices: no name for {module} that does not end other "
                "modules' names too.\nTrain the table whole: train=[...]."
            )
        out[ends[0]] = indices
    return out or None


def _is_tied(nodes: Mapping[str, Any], table: Table) -> bool:
    """Whether PEFT is to tie the adapters of a table and its head.

    It knows how to where one embedding and linear heads share a table. Of T5's three
    embeddings it would make linear layers; they are loaded equal instead.
    """
    kept = [
        table.of_leaf[path]
        for path, x in nodes.items()
        if isinstance(x, LowRank | Full) and any(p.tied for p in table.of_leaf[path])
    ]
    return bool(kept) and all(sum(not p.tied for p in users) == 1 for users in kept)


def _bias_and_whole(
    found: Mapping[str, Exported], nodes: Mapping[str, Any], table: Table
) -> tuple[str, list[str]]:
    """PEFT's `bias`, and the modules that are trained besides, as wholes."""
    full = [
        p for p in table.params.values() if isinstance(nodes[p.path], Full) and p.called
    ]
    whole = {p.module for p in full if p.name != "bias"}
    every = {p.module for p in table.params.values() if p.name == "bias"} - whole
    biases = {p.module for p in full if p.name == "bias"} - whole
    if not biases:
        return "none", sorted(whole)
    if biases == every and biases - set(found):
        return "all", sorted(whole)
    inside = biases & set(found)
    return ("lora_only" if inside else "none"), sorted(whole | (biases - inside))


def _heads(given: Config, table: Table) -> list[str]:
    """What PEFT adds to `modules_to_save` for a task, trained or not."""
    task = given.get("task_type")
    ends = _HEADS.get(task or "", ())
    if ends and not any(m.endswith(ends) for m in table.modules()):
        raise StructureError(
            f"task_type={task!r}: PEFT saves and loads the head with the adapter, and "
            f"this tree has no module called {' or '.join(ends)}.\nPass the parameters "
            "with the head, or no task_type."
        )
    return list(ends)


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


def _saved_by_tie(config: Config, param: Param, table: Table) -> bool:
    """Whether PEFT saves a module because it is tied to one that is saved."""
    users = [p.module for p in table.of_leaf[param.path]]
    return bool(config.get("ensure_weight_tying")) and any(
        saved_whole(config, module) for module in users
    )


def check_says(
    config: Config, found: Mapping[str, Exported], nodes: Mapping[str, Any],
    table: Table,
) -> None:  # fmt: skip
    """Refuse a configuration that does not say what the tree is.

    Raises:
      StructureError: so, with the modules.
      CheckpointError: the configuration is none that jlora could read again.
    """
    check_config(config, "config")
    shown = {n: x for n, x in found.items() if x.param.called}
    ranks = {n: x.pair.rank for n, x in shown.items()}
    modules = {m: [p.module for p in table.sharing(m)] for m in table.kernels()}
    lines = disagreements(config, ranks, modules, table.params)
    lines += _variant_lines(config, found)
    lines += [
        f"{p.module} trains the rows {list(n.indices)}, but is to train "
        f"{tokens_of(config, p.module)}"
        for p, n in token_tables(nodes, table)
        if list(n.indices) != tokens_of(config, p.module)
    ]
    if not lines:
        lines = [
            f"{n} has scale {x.scale:g}, but is to have {scale_of(config, n):g}"
            for n, x in shown.items()
            if scale_of(config, n) != np.float32(x.scale)
        ]
    if lines:
        raise StructureError(
            f"the configuration does not say what this tree is:\n  {listed(lines)}\n"
            "Leave those keys to jlora."
        )


def _variant_lines(config: Config, found: Mapping[str, Exported]) -> list[str]:
    """Where DoRA and biases of adapters are not what the configuration says of all."""
    return [
        f"{name} has {'no' if said else 'a'} {tensor}, but {key} is {str(said).lower()}"
        for key, tensor in (("use_dora", "magnitude"), ("lora_bias", "bias"))
        for name, x in found.items()
        if (getattr(x.pair, tensor) is not None) != (said := bool(config.get(key)))
    ]
