"""The fields of PEFT's `adapter_config.json`: which jlora honours, and their types."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from jlora._errors import CheckpointError, JloraWarning

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

# Those of other forms of the update, by PEFT's name of each, key by key likewise.
_OF_ALL: dict[str, Any] = {
    n: DEFAULTS[n]
    for n in (
        "auto_mapping", "base_model_name_or_path", "inference_mode", "layers_pattern",
        "layers_to_transform", "modules_to_save", "peft_version", "r", "revision",
        "target_modules", "task_type",
    )
} | {"init_weights": True}  # fmt: skip
_LYCORIS: dict[str, Any] = _OF_ALL | {
    "alpha": 8, "alpha_pattern": {}, "exclude_modules": None, "module_dropout": 0.0,
    "rank_dropout": 0.0, "rank_pattern": {}, "use_effective_conv2d": False,
}  # fmt: skip
FORMS: dict[str, dict[str, Any]] = {
    "VERA": _OF_ALL | {
        "bias": "none", "d_initial": 0.1, "fan_in_fan_out": False, "peft_type": "VERA",
        "projection_prng_key": 0, "r": 256, "save_projection": True,
        "vera_dropout": 0.0,
    },
    "LOHA": _LYCORIS | {"peft_type": "LOHA"},
    "LOKR": _LYCORIS | {
        "decompose_both": False, "decompose_factor": -1, "peft_type": "LOKR",
        "rank_dropout_scale": False,
    },
}  # fmt: skip
_OF_FORMS = {
    "alpha", "decompose_both", "decompose_factor", "projection_prng_key",
    "save_projection", "vera_dropout",
}  # fmt: skip
# How they start, and what dropout that is off would do.
_NEUTRAL_OF_FORMS = {"d_initial", "init_weights", "rank_dropout_scale"}

# Keys that the code below acts on.
HONOURED = {
    "alora_invocation_tokens", "layer_replication",
    "alpha_pattern", "bias", "exclude_modules", "fan_in_fan_out", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules",
    "ensure_weight_tying", "lora_bias", "target_parameters", "trainable_token_indices",
    "use_dora", "use_rslora",
}  # fmt: skip
# Keys that change nothing about what a finished adapter computes.
NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config",
    "inference_mode", "loftq_config", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
# An unknown key with one of these words in its name is taken to change the numbers.
_NUMERIC = re.compile(
    r"(^|_)(alphas?|scales?|scaling|factors?|gain|multiplier|magnitude|norms?|normali[sz]e"
    r"|ranks?|ratio|shift|bias|temperature)(_|$)"
)
# Initialisations that leave the base as it is; the others change it, and their factors
# belong to the changed base.
KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")

_TYPES: dict[str, tuple[type, ...]] = {
    "r": (int,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "use_rslora": (bool,),
    "fan_in_fan_out": (bool,),
    "ensure_weight_tying": (bool,),
    "lora_bias": (bool,),
    "use_dora": (bool,),
    "bias": (str,),
    "rank_pattern": (dict, type(None)),
    "alpha_pattern": (dict, type(None)),
    "target_modules": (list, str, type(None)),
    "target_parameters": (list, type(None)),
    "trainable_token_indices": (list, dict, type(None)),
    "exclude_modules": (list, str, type(None)),
    "modules_to_save": (list, type(None)),
    "layers_to_transform": (list, int, type(None)),
    "layers_pattern": (list, str, type(None)),
    "alora_invocation_tokens": (list, type(None)),
}
# What the lists hold, and the values of the dicts.
_ITEMS: dict[str, tuple[type, ...]] = {
    "rank_pattern": (int,),
    "alpha_pattern": (int, float),
    "target_modules": (str,),
    "target_parameters": (str,),
    "exclude_modules": (str,),
    "modules_to_save": (str,),
    "layers_to_transform": (int,),
    "layers_pattern": (str,),
    "alora_invocation_tokens": (int,),
}


def check_config(config: Config, where: str) -> None:
    """Refuse what jlora cannot honour; nothing a file says is dropped in silence.

    An unknown key is passed over, with a warning, where it cannot matter.

    Raises:
      CheckpointError: an unknown kind of adapter, a feature that is not supported,
        or a value of the wrong type; the key is named.
    """
    kind = config.get("peft_type")
    if not isinstance(kind, str) or (kind != "LORA" and kind not in FORMS):
        raise CheckpointError(
            f"{where}: peft_type is {kind!r}; jlora reads 'LORA', "
            f"{', '.join(map(repr, FORMS))}.\nMerge the adapter into its base with "
            "PEFT, and load the merged model."
        )
    known = DEFAULTS if kind == "LORA" else FORMS[kind]
    passed = HONOURED | NEUTRAL
    if kind != "LORA":
        passed = (passed | _OF_FORMS | _NEUTRAL_OF_FORMS) & {*known}
    ignored: dict[str, Any] = {}
    for key, value in config.items():
        if key in passed:
            continue
        if key in known:
            refused = value not in (None, False, known[key])
        else:
            refused = bool(value) and _may_matter(key, value)
            ignored |= {key: value} if value and not refused else {}
        if refused:
            raise CheckpointError(
                f"{where}: {key} is {value!r}, which jlora cannot honour, and without "
                "it the adapter would be another one.\nMerge the adapter into its base "
                "with PEFT, and load the merged model."
            )
    if ignored:
        said = ", ".join(f"{key} {value!r}" for key, value in ignored.items())
        warnings.warn(
            f"{where} says {said}, which this jlora does not know and passes over; "
            "it looks like the setting of something that is not switched on.",
            JloraWarning,
            stacklevel=3,
        )
    _check_types(as_lora(config), where)


def as_lora(config: Config) -> Config:
    """A configuration in LoRA's words, whatever form it is of."""
    if config.get("peft_type") == "LORA":
        return config
    words = {"alpha": "lora_alpha", "vera_dropout": "lora_dropout"}
    out = {words.get(key, key): value for key, value in config.items()}
    if out.get("bias") == "vera_only":
        out["bias"] = "lora_only"
    for key, kind in _FORM_TYPES.items():
        if not isinstance(out.get(key, kind()), kind) or (
            kind is int and isinstance(out.get(key), bool)
        ):
            raise CheckpointError(f"{key} is {out[key]!r}, of the wrong type.")
    return {**out, "r": out.get("r", FORMS[config["peft_type"]]["r"])}


_FORM_TYPES: dict[str, type] = {
    "decompose_both": bool, "decompose_factor": int, "projection_prng_key": int,
    "save_projection": bool,
}  # fmt: skip


def _may_matter(key: str, value: Any) -> bool:
    """Whether an unknown key may change what an adapter computes.

    PEFT's features are switched on by a flag (True, or 1) or a configuration of their
    own, and bring tensors that match nothing here. Beside them a release adds settings,
    numbers and words with a default, that say nothing while the feature is off.
    """
    is_setting = isinstance(value, int | float | str) and value is not True
    return not is_setting or value == 1 or _NUMERIC.search(key) is not None


def _check_types(config: Config, where: str) -> None:
    for key, types in _TYPES.items():
        value = config.get(key, DEFAULTS[key])
        is_bool = isinstance(value, bool) and bool not in types
        if not isinstance(value, types) or is_bool:
            raise CheckpointError(f"{where}: {key} is {value!r}, of the wrong type.")
        item = _ITEMS.get(key)
        inner = value.values() if isinstance(value, dict) else value
        if item and isinstance(inner, Iterable) and not isinstance(value, str):
            _check_items(where, key, inner, item)
    tokens = config.get("trainable_token_indices") or []
    for rows in tokens.values() if isinstance(tokens, dict) else [tokens]:
        if not isinstance(rows, list):
            raise CheckpointError(
                f"{where}: trainable_token_indices holds {rows!r}, of the wrong type."
            )
        _check_items(where, "trainable_token_indices", rows, (int,))
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise CheckpointError(
            f"{where}: bias is {config['bias']!r}; jlora knows 'none', 'all' and "
            "'lora_only'."
        )
    if config.get("use_dora") and config.get("lora_bias"):
        raise CheckpointError(
            f"{where}: use_dora and lora_bias are both true, which PEFT refuses too."
        )
    _check_patterns(config, where)


def _check_items(
    where: str, key: str, items: Iterable[Any], types: tuple[type, ...]
) -> None:
    wrong = [x for x in items if not isinstance(x, types) or isinstance(x, bool)]
    if wrong:
        raise CheckpointError(f"{where}: {key} holds {wrong[0]!r}, of the wrong type.")


def _check_patterns(config: Config, where: str) -> None:
    # These become part of an expression, where flags such as (?i) have no place.
    used = {
        pattern: f"(x)({pattern})"
        for key in ("rank_pattern", "alpha_pattern", "modules_to_save")
        for pattern in config.get(key) or ()
    }
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), str):
            used.setdefault(config[key], config[key])
    for pattern, expression in used.items():
        try:
            re.compile(expression)
        except (re.error, TypeError) as error:
            raise CheckpointError(
                f"{where}: {pattern!r} is not a regular expression: {error}."
            ) from None
