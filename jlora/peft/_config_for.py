"""The configuration that says what a tree is, and whether a given one does."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from jlora._errors import StructureError
from jlora._kernel.nodes import Full, LowRank
from jlora._text import listed
from jlora.peft._config import (
    alpha_for,
    disagreements,
    names,
    pattern_for,
    saved_whole,
    scale_of,
    short_names,
    target_modules_for,
    tokens_of,
    variant_disagreements,
)
from jlora.peft._fields import DEFAULTS, KEEPS_BASE, Config, check_config
from jlora.peft._names import Table
from jlora.peft._save import Exported, token_tables

# PEFT trains and saves these modules whatever `modules_to_save` says.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def config_for(
    found: Mapping[str, Exported], nodes: Mapping[str, Any], table: Table,
    given: Config,
) -> dict[str, Any]:  # fmt: skip
    """The smallest configuration that says what the tree is."""
    config = copy.deepcopy(DEFAULTS)
    terms = _terms(nodes)
    config["use_rslora"] = rslora = bool(terms) and all(t.rslora for t in terms)
    config["use_dora"] = any(x.pair.magnitude is not None for x in found.values())
    config["lora_bias"] = any(x.pair.bias is not None for x in found.values())
    config["lora_dropout"] = dropout_of(terms, given)
    config["alora_invocation_tokens"] = _invocation(terms)
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
    config["bias"], whole = bias_and_whole(found, nodes, table)
    config["modules_to_save"] = modules_to_save(whole, table, given)
    return config


def modules_to_save(whole: list[str], table: Table, given: Config) -> list[str] | None:
    """PEFT's `modules_to_save`: what is trained whole, and the heads of a task."""
    heads = _heads(given, table)
    whole = [m for m in whole if not saved_whole({"modules_to_save": heads}, m)]
    return [*_ends_of(whole, table), *heads] or None


def dropout_of(terms: list[Any], given: Config) -> float:
    dropouts = sorted({t.dropout for t in terms})
    if len(dropouts) > 1 and "lora_dropout" not in given:
        raise StructureError(
            f"the adapters have dropouts {dropouts}; PEFT has one for all.\nSay which: "
            f"config={{'lora_dropout': {dropouts[-1]}}}."
        )
    return float(dropouts[0]) if dropouts else 0.0


def _terms(nodes: Mapping[str, Any]) -> list[Any]:
    kernels = (x for x in nodes.values() if isinstance(x, LowRank))
    return [t for x in kernels for t in x.adapters.values()]


def _invocation(terms: list[Any]) -> list[int] | None:
    found = {t.invocation for t in terms}
    if len(found) > 1:
        raise StructureError(
            f"the adapters act from different tokens on, {listed(map(str, found))}; "
            "PEFT has one invocation for all.\nSay it: jlora.activated(tree, tokens)."
        )
    tokens = found.pop() if found else None
    return list(tokens) if tokens else None


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
                f"trainable_token_indices: no name for {module} that does not end "
                "other modules' names too.\nTrain the table whole: train=[...]."
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


def bias_and_whole(
    found: Collection[str], nodes: Mapping[str, Any], table: Table
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


def _ends_of(whole: list[str], table: Table) -> list[str]:
    # PEFT takes any module whose name ends so, be it within a word.
    ends = short_names(whole, table.modules(), lambda end, m: m.endswith(end))
    if ends is None:
        raise StructureError(
            f"modules_to_save: no name for {listed(whole)} that does not end other "
            "modules' names too.\nTrain those as well, or do not train this one."
        )
    return sorted(ends)


def _held(x: Exported) -> list[str]:
    return [n for n in ("magnitude", "bias") if getattr(x.pair, n) is not None]


def _check_loadable(config: Config, found: Mapping[str, Exported]) -> None:
    """Refuse what PEFT refuses to load."""
    if not found:
        raise StructureError(
            "this tree has no adapter, and PEFT loads none without.\nSave its leaves "
            "with jlora.checkpoint, or merge it and save the model."
        )
    parameters = [n for n, x in found.items() if x.is_parameter]
    for key in ("lora_dropout", "fan_in_fan_out"):
        if parameters and config.get(key):
            raise StructureError(
                f"{key} is {config[key]}, and {parameters[0]} is a parameter that is "
                f"adapted without its module: PEFT refuses the two together.\nPass "
                f"config={{{key!r}: {type(config[key])()}}}."
            )


def check_says(
    config: Config, found: Mapping[str, Exported], nodes: Mapping[str, Any],
    table: Table,
) -> None:  # fmt: skip
    """Refuse a configuration that does not say what the tree is.

    Raises:
      StructureError: it says something else; the modules are listed.
      CheckpointError: the configuration is none that jlora could read again.
    """
    check_config(config, "config")
    if (init := config.get("init_lora_weights")) not in KEEPS_BASE:
        raise StructureError(
            f"init_lora_weights is {init!r}, and PEFT would shift the base when it "
            "loads the adapter.\nLeave that key to jlora."
        )
    _check_loadable(config, found)
    shown = {n: x for n, x in found.items() if x.param.called}
    ranks = {n: x.pair.rank for n, x in shown.items()}
    modules = {m: [p.module for p in table.sharing(m)] for m in table.kernels()}
    lines = disagreements(config, ranks, modules, table.params)
    lines += variant_disagreements(config, {n: _held(x) for n, x in found.items()})
    lines += [
        f"{p.module} trains the rows {list(n.indices)}, but is to train "
        f"{tokens_of(config, p.module)}"
        for p, n in token_tables(nodes, table)
        if list(n.indices) != tokens_of(config, p.module)
    ]
    own = _invocation(_terms(nodes))
    if (said := config.get("alora_invocation_tokens") or None) != own:
        lines.append(f"alora_invocation_tokens {said}, and the tree's are {own}")
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
