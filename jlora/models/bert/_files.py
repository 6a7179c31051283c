"""How checkpoints spell a BERT or RoBERTa: prefixes, old names, what is not read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from jlora.models.bert._config import BertConfig

_ENCODER = ("embeddings", "encoder")
_OLD = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_TABLE = "embeddings.word_embeddings.weight"
_BUFFER = re.compile(r"embeddings\.(position_ids|token_type_ids)")
# Pretraining leaves them in files whose model reads them no more.
_LEFT_OVER = re.compile(r"(pooler|cls|lm_head)\..*")


def names_here(config: BertConfig, names: set[str]) -> dict[str, str | None]:
    """Return what each of a file's names is called here; `None` is not read.

    Encoders stand in files with and without their family's prefix, whatever the head
    is; the first releases called a norm's parameters gamma and beta.

    >>> config = BertConfig(head="classification")
    >>> names = {"encoder.layer.0.output.LayerNorm.gamma", "cls.predictions.bias"}
    >>> for name, here in sorted(names_here(config, names).items()):
    ...     print(name, here)
    cls.predictions.bias None
    encoder.layer.0.output.LayerNorm.gamma bert.encoder.layer.0.output.LayerNorm.weight
    """
    return {name: _spelled(name, config, names) for name in names}


def _spelled(name: str, config: BertConfig, names: set[str]) -> str | None:
    prefix = config.prefix + "."
    bare = name.removeprefix(prefix)
    for old, new in _OLD.items():
        if bare.endswith(old):
            bare = bare.removesuffix(old) + new
    if _BUFFER.fullmatch(bare):
        return None
    head = _masked_lm_names(config)
    if bare == head["decoder.bias"] and head["bias"] not in names:
        bare = head["bias"]
    if bare == head["decoder.weight"] and not _has_table(names):
        bare = _TABLE
    if _LEFT_OVER.fullmatch(bare) and not _is_read(bare, config):
        return None
    if bare.split(".")[0] not in (*_ENCODER, "pooler"):
        return name if name.startswith(prefix) else bare
    return bare if config.head == "base" else prefix + bare


def _has_table(names: set[str]) -> bool:
    """Whether the file holds the embedding by its own name, not the decoder's alone."""
    return any(name.endswith(_TABLE) for name in names)


def _is_read(bare: str, config: BertConfig) -> bool:
    """Whether a model with this head reads a tensor that another head may leave."""
    if bare.startswith("pooler."):
        return bool(config.pooler)
    if config.head != "masked_lm":
        return False
    return bare.startswith("lm_head." if config.roberta else "cls.predictions.")


def _masked_lm_names(config: BertConfig) -> dict[str, str]:
    head = "lm_head" if config.roberta else "cls.predictions"
    ends = ("bias", "decoder.bias", "decoder.weight")
    return {end: f"{head}.{end}" for end in ends}


def aliases(config: BertConfig) -> dict[str, str]:
    """Return the names under which files may repeat a masked-LM head's tensors."""
    if config.head != "masked_lm":
        return {}
    head = _masked_lm_names(config)
    table = f"{config.prefix}.embeddings.word_embeddings.weight"
    return {head["decoder.weight"]: table, head["decoder.bias"]: head["bias"]}


def stacks(config: BertConfig) -> dict[tuple[str, ...], int]:
    """Return the path of the blocks, and how many there are."""
    prefix = () if config.head == "base" else (config.prefix,)
    return {(*prefix, "encoder", "layer"): config.num_hidden_layers}


def config_of_file(
    config: BertConfig,
    raw: Mapping[str, Any],
    names: set[str],
    same: Callable[[str, str], bool],
) -> BertConfig:
    """Do without a pooler where a base model's file holds none."""
    if config.head != "base" or any(name.startswith("pooler.") for name in names):
        return config
    return dataclasses.replace(config, pooler=False)


def is_head(path: tuple[str, ...]) -> bool:
    """Whether a path leads to what a head may bring anew: all but the encoder.

    >>> is_head(("bert", "pooler", "dense", "bias")), is_head(("bert", "encoder", "x"))
    (True, False)
    """
    return not set(path[:2]) & set(_ENCODER)
