"""What PEFT's configuration means for a module or a parameter, and one for given ones.

Names here are PyTorch's: of modules, `encoder.block.0.layer.0.SelfAttention.q`, and of
parameters adapted without their module, `model.layers.0.mlp.experts.down_proj`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np

from jlora.peft._fields import DEFAULTS, Config

# -- what a configuration says of one module -------------------------------------------


def targets(config: Config, module: str) -> bool:
    """Whether the configuration puts an adapter on a module, by PEFT's rules.

    >>> targets({"target_modules": ["q", "layer.1"]}, "encoder.layer.1")
    True
    >>> targets({"target_modules": ["q"]}, "encoder.seq")
    False
    """
    exclude = config.get("exclude_modules")
    if isinstance(exclude, str):
        if exclude and re.fullmatch(exclude, module):
            return False
    elif exclude and any(names(entry, module) for entry in exclude):
        return False
    saved = config.get("modules_to_save") or ()
    if any(re.match(rf"(^|.*\.){m}($|\..*)", module) for m in saved):
        return False
    wanted = config.get("target_modules") or []
    if isinstance(wanted, str):
        return is_all_linear(config) or bool(re.fullmatch(wanted, module))
    # A whole name counts whatever `layers_to_transform` says.
    return module in wanted or (
        any(names(entry, module) for entry in wanted) and _in_layers(config, module)
    )


def targets_parameter(config: Config, parameter: str) -> bool:
    """Whether the configuration puts an adapter on a parameter itself."""
    wanted = config.get("target_parameters") or ()
    return any(names(entry, parameter) for entry in wanted)


def is_all_linear(config: Config) -> bool:
    """Whether the configuration leaves it to the PyTorch model what is targeted."""
    wanted = config.get("target_modules")
    return isinstance(wanted, str) and wanted.lower() == "all-linear"


def names(entry: str, module: str) -> bool:
    """Whether an entry of a list names a module: all of its name, or the end of it."""
    return module == entry or module.endswith(f".{entry}")


def _in_layers(config: Config, module: str) -> bool:
    """Whether a module lies in one of `layers_to_transform`."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or []
    if isinstance(patterns, str):
        patterns = [patterns]
    regexes = [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in patterns]
    for regex in regexes or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
        if found := re.match(regex, module):
            index = int(found["idx"])
            return index == layers if isinstance(layers, int) else index in layers
    return False


def rank_of(config: Config, module: str) -> int:
    """The rank of a module's adapter."""
    return _of(config, "rank_pattern", "r", module)


def alpha_of(config: Config, module: str) -> float:
    """The alpha of a module's adapter."""
    return _of(config, "alpha_pattern", "lora_alpha", module)


def _of(config: Config, pattern: str, default: str, module: str) -> Any:
    """What the first key that matches says, or the default; PEFT's rule."""
    for key, value in _pattern(config, pattern).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return config.get(default, DEFAULTS[default])


def _pattern(config: Config, name: str) -> dict[str, Any]:
    return config.get(name) or {}


def scale_of(config: Config, module: str) -> np.float32:
    """The factor before `B A`: alpha/r, or alpha/sqrt(r) with rsLoRA.

    Source: Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732.
    """
    rank = rank_of(config, module)
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return np.float32(alpha_of(config, module) / divisor)


def tokens_of(config: Config, module: str) -> list[int] | None:
    """The trained rows of a table; a dict says them by the end of its name."""
    said = config.get("trainable_token_indices")
    if not isinstance(said, dict):
        return said or None
    return next((rows for end, rows in said.items() if module.endswith(end)), None)


def saved_whole(config: Config, module: str) -> bool:
    """Whether a module, or one around it, is in `modules_to_save`."""
    entries = config.get("modules_to_save") or ()
    return any(outer.endswith(e) for outer in around(module) for e in entries)


def around(module: str) -> list[str]:
    """A module's name and those of the modules around it."""
    parts = module.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


# -- a configuration for given modules -------------------------------------------------


def alpha_for(scale: float, rank: int, *, rslora: bool) -> float:
    """The roundest alpha that gives a scale, to the last bit of float32.

    >>> alpha_for(float(np.float32(16 / 3)), 3, rslora=False)
    16
    """
    divisor = math.sqrt(rank) if rslora else rank
    exact = float(scale) * divisor
    for digits in range(17):
        alpha = round(exact, digits)
        if np.float32(alpha / divisor) == np.float32(scale):
            return int(alpha) if alpha == int(alpha) else alpha
    return exact


def short_names(
    modules: Iterable[str],
    others: Iterable[str],
    hits: Callable[[str, str], bool] = names,
) -> list[str] | None:
    """The shortest ends of names that hit all of `modules` and none of `others`.

    Args:
      modules: what to name.
      others: what not to.
      hits: whether an end of a name hits a module.

    Returns:
      The names, or None where even a whole name hits another module.

    >>> short_names(["enc.0.q", "enc.1.q"], ["enc.0.k"])
    ['q']
    """
    modules = list(modules)
    others = set(others) - set(modules)
    found: dict[str, None] = {}
    for module in modules:
        if any(hits(entry, module) for entry in found):
            continue
        parts = module.split(".")
        for n in range(1, len(parts) + 1):
            end = ".".join(parts[-n:])
            if not any(hits(end, other) for other in others):
                found[end] = None
                break
        else:
            return None
    return list(found)


def pattern_for(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The commonest value, and a pattern for the modules that have another."""
    counts: dict[Any, int] = {}
    for value in values.values():
        counts[value] = counts.get(value, 0) + 1
    default = max(counts, key=lambda v: counts[v])
    pattern: dict[str, Any] = {}
    for value in counts:
        if value == default:
            continue
        own = [m for m in values if values[m] == value]
        ends = short_names(own, values)
        # Anchored, a key matches the whole name and no longer one that ends so.
        keys = (
            [re.escape(e) for e in ends] if ends else [f"^{re.escape(m)}" for m in own]
        )
        pattern.update(dict.fromkeys(keys, value))
    return default, pattern


def target_modules_for(modules: Iterable[str], others: Iterable[str]) -> Any:
    """`target_modules` that hits exactly these modules: a list, else an expression."""
    modules = list(modules)
    short = short_names(modules, others)
    if short is not None:
        return sorted(short)
    return "|".join(re.escape(m) for m in modules)


def disagreements(
    config: Config,
    ranks: Mapping[str, int],
    modules: Mapping[str, Iterable[str]],
    parameters: Iterable[str],
) -> list[str]:
    """How a configuration and what has adapters disagree, a line each.

    Args:
      config: the configuration.
      ranks: the modules and parameters that have adapters, and the adapters' ranks.
      modules: the modules that may have one, each with those that share its weight.
      parameters: the parameters that may have one.
    """
    parameters = set(parameters)
    tie = bool(config.get("ensure_weight_tying"))

    def wanted(name: str) -> bool:
        if name in parameters:
            return targets_parameter(config, name)
        shared = modules.get(name, ()) if tie else ()
        return any(targets(config, m) for m in (name, *shared))

    lines = []
    for name, rank in ranks.items():
        if not wanted(name):
            lines.append(f"{name} has an adapter, but is not targeted")
        elif (said := rank_of(config, name)) != rank:
            lines.append(f"{name} has rank {rank}, but is to have {said}")
    # Which modules "all-linear" means only the PyTorch model knows.
    candidates = [*(() if is_all_linear(config) else modules), *sorted(parameters)]
    lines += [
        f"{name} is targeted, but has no adapter"
        for name in candidates
        if name not in ranks and wanted(name)
    ]
    return lines


def variant_disagreements(
    config: Config, held: Mapping[str, Collection[str]]
) -> list[str]:
    """Where the configuration's switches and what adapters hold disagree.

    Args:
      config: the configuration.
      held: of each adapter which of `magnitude` and `bias` it has.
    """
    return [
        f"{key} is {str(said).lower()}, but {name} has {'no' if said else 'a'} {tensor}"
        for key, tensor in (("use_dora", "magnitude"), ("lora_bias", "bias"))
        for name, tensors in held.items()
        if (tensor in tensors) != (said := bool(config.get(key)))
    ]
