"""PEFT's `adapter_config.json`: what it means for a module, and what it may say.

Names here are PyTorch's module names, `encoder.block.0.layer.0.SelfAttention.q`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from jlora._errors import CheckpointError

Config = Mapping[str, Any]

# The file as PEFT writes it for a plain LoRA, key by key.
DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}

# Keys that the code below acts on.
_HONOURED = {
    "alpha_pattern", "bias", "exclude_modules", "fan_in_fan_out", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules", "use_rslora",
}  # fmt: skip
# Keys that change nothing about what a finished adapter computes.
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config",
    "inference_mode", "loftq_config", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
# Initialisations that leave the base as it is; the others change it, and their factors
# belong to the changed base.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")

_TYPES: dict[str, tuple[type, ...]] = {
    "r": (int,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "use_rslora": (bool,),
    "fan_in_fan_out": (bool,),
    "bias": (str,),
    "rank_pattern": (dict, type(None)),
    "alpha_pattern": (dict, type(None)),
    "target_modules": (list, str),
    "exclude_modules": (list, str, type(None)),
    "modules_to_save": (list, type(None)),
    "layers_to_transform": (list, int, type(None)),
    "layers_pattern": (list, str, type(None)),
}
# What the lists hold, and the values of the dicts.
_ITEMS: dict[str, tuple[type, ...]] = {
    "rank_pattern": (int,),
    "alpha_pattern": (int, float),
    "target_modules": (str,),
    "exclude_modules": (str,),
    "modules_to_save": (str,),
    "layers_to_transform": (int,),
    "layers_pattern": (str,),
}


def check_config(config: Config, where: str) -> None:
    """Refuse what jlora cannot honour; nothing a file says is dropped in silence.

    Raises:
      CheckpointError: an unknown kind of adapter, a feature that is not supported,
        or a value of the wrong type; the key is named.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{where}: peft_type is {kind!r}; jlora reads 'LORA' adapters.\nMerge the "
            "adapter into its base with PEFT, and load the merged model."
        )
    for key, value in config.items():
        if key in _HONOURED or key in _NEUTRAL or not value:
            continue
        if key not in DEFAULTS or value != DEFAULTS[key]:
            raise CheckpointError(
                f"{where}: {key} is {value!r}, which jlora cannot honour, and without "
                "it the adapter would be another one.\nMerge the adapter into its base "
                "with PEFT, and load the merged model."
            )
    if config.get("init_lora_weights") not in _INITS:
        raise CheckpointError(
            f"{where}: init_lora_weights is {config['init_lora_weights']!r}, so the "
            "adapter belongs to a base that PEFT changed when it made it.\nLet PEFT "
            "convert it to a plain LoRA: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)."
        )
    _check_types(config, where)


def _check_types(config: Config, where: str) -> None:
    for key, types in _TYPES.items():
        value = config.get(key, DEFAULTS[key])
        is_bool = isinstance(value, bool) and bool not in types
        if not isinstance(value, types) or is_bool:
            raise CheckpointError(f"{where}: {key} is {value!r}, of the wrong type.")
        item = _ITEMS.get(key)
        inner = value.values() if isinstance(value, dict) else value
        if item and isinstance(inner, Iterable) and not isinstance(value, str):
            wrong = [x for x in inner if not isinstance(x, item) or x is True]
            if wrong:
                raise CheckpointError(
                    f"{where}: {key} holds {wrong[0]!r}, of the wrong type."
                )
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise CheckpointError(
            f"{where}: bias is {config['bias']!r}; jlora knows 'none', 'all' and "
            "'lora_only'."
        )
    patterns = [*_pattern(config, "rank_pattern"), *_pattern(config, "alpha_pattern")]
    patterns += config.get("modules_to_save") or []
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), str):
            patterns.append(config[key])
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise CheckpointError(
                f"{where}: {pattern!r} is not a regular expression: {error}."
            ) from None


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
    return sorted(short) if short else "|".join(re.escape(m) for m in modules)


def disagreements(
    config: Config, ranks: Mapping[str, int], modules: Iterable[str]
) -> list[str]:
    """How a configuration and the modules that have adapters disagree, a line each.

    Args:
      config: the configuration.
      ranks: the modules that have adapters, and the adapters' ranks.
      modules: those that may have one.
    """
    lines = []
    for module, rank in ranks.items():
        if not targets(config, module):
            lines.append(f"{module} has an adapter, but is not targeted")
        elif (said := rank_of(config, module)) != rank:
            lines.append(f"{module} has rank {rank}, but is to have {said}")
    # Which modules "all-linear" means only the PyTorch model knows.
    if not is_all_linear(config):
        lines += [
            f"{module} is targeted, but has no adapter"
            for module in modules
            if module not in ranks and targets(config, module)
        ]
    return lines
