"""What the tensors of a PEFT file are, by their keys."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import TypeVar

import numpy as np

from jlora._errors import CheckpointError
from jlora._text import listed
from jlora.peft._layouts import SUFFIXES, TABLE_SUFFIXES

T = TypeVar("T")

PREFIX = "base_model.model."
TOKENS = ".token_adapter.trainable_tokens_delta"


# A key of an adapter's tensor that holds the adapter's name, `default`.
_NAMED = re.compile(
    r"(?P<start>.*\.(?:lora_[AB]|lora_magnitude_vector|lora_embedding_[AB]"
    r"|token_adapter\.trainable_tokens_delta))"
    r"\.(?P<name>(?!weight$|bias$)[^.]+)(?P<end>\.weight|\.bias)?"
)


# How the keys of other forms end, after the module's name.
FORM_SUFFIXES = (
    "vera_lambda_b", "vera_lambda_d", "hada_w1_a", "hada_w1_b", "hada_w2_a",
    "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2",
    "lokr_w2_a", "lokr_w2_b", "lokr_t2",
)  # fmt: skip
PROJECTIONS = ("base_model.vera_A", "base_model.vera_B")


_OF_ADAPTERS = re.compile(r"\.(lora_|vera_lambda_|hada_|lokr_)")


@dataclasses.dataclass
class Stored:
    """One adapter's tensors: `a`, `b`, `magnitude`, `bias`, as far as they are there.

    Of another form of the update they are by PEFT's names. `table` says that the
    factors are an embedding's.
    """

    tensors: dict[str, np.ndarray]
    table: bool = False


@dataclasses.dataclass
class Contents:
    """The tensors of a file by what they are; modules by PyTorch's names.

    Attributes:
      where: the file, for messages.
      adapters: by module.
      tokens: trained rows of tables, by module.
      plain: parameters by name that stand beside the adapters.
      base: parameters by name of layers under an adapter.
      projections: VeRA's, by their whole keys.
    """

    where: str
    adapters: dict[str, Stored] = dataclasses.field(default_factory=dict)
    tokens: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    plain: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    base: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    projections: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def contents_of(tensors: Mapping[str, np.ndarray], where: str) -> Contents:
    """The file's tensors by what their keys say.

    PEFT leaves the adapter's name out of the keys. A state dict as the model has it, of
    `torch.save` or a trainer's own checkpoint, holds it: `lora_A.default.weight`.

    Raises:
      CheckpointError: an unknown prefix; keys of an adapter that are not understood, or
        of several adapters; a copy of a module that differs from it.
    """
    out = Contents(where)
    copies: dict[str, np.ndarray] = {}
    for key, value in without_names(tensors, where).items():
        if key in PROJECTIONS:
            out.projections[key] = value
            continue
        if not key.startswith(PREFIX):
            raise CheckpointError(
                f"{where}: {key} does not begin with {PREFIX!r}, as PEFT's keys do."
            )
        _add(out, copies, key.removeprefix(PREFIX), value)
    for key, value in copies.items():
        outer, _, rest = key.partition(".modules_to_save.")
        # The adapter's name stays in the key where the parameter is of an inner module.
        keys = [f"{outer}.{rest}", f"{outer}.{rest.partition('.')[2]}"]
        found = [out.plain[k] for k in keys if k in out.plain]
        if not found or not np.array_equal(found[0], value):
            raise CheckpointError(f"{where}: {key} has no equal of its plain name.")
    if unknown := [key for key in out.plain if _OF_ADAPTERS.search(f".{key}")]:
        raise CheckpointError(
            f"{where}: {len(unknown)} keys of adapters are not understood:\n  "
            f"{listed(unknown)}\nSave the adapter with PEFT's save_pretrained, whose "
            "keys end in lora_A.weight and the like."
        )
    return out


def without_names(tensors: Mapping[str, T], where: str) -> dict[str, T]:
    """What is told of tensors, by PEFT's keys where their own hold an adapter's name.

    Raises:
      CheckpointError: the keys hold several names.
    """
    found = {key: match for key in tensors if (match := _NAMED.fullmatch(key))}
    names = sorted({match["name"] for match in found.values()})
    if len(names) > 1:
        raise CheckpointError(
            f"{where} holds several adapters in one file, {', '.join(names)}, as "
            f"{next(iter(found))} shows.\nSave each with PEFT's save_pretrained."
        )
    out: dict[str, T] = {}
    for key, value in tensors.items():
        new = key
        if match := found.get(key):
            new = match["start"] + (match["end"] or "")
        elif names and f".modules_to_save.{names[0]}." in key:
            new = key.replace(f".modules_to_save.{names[0]}.", ".")
        if new.endswith(".lora_magnitude_vector.weight"):  # PEFT drops the last part
            new = new.removesuffix(".weight")
        if new in out:
            raise CheckpointError(
                f"{where} holds {new} and {key}, which are one tensor.\nSave the "
                "adapter with PEFT's save_pretrained."
            )
        out[new] = value
    return out


def _add(
    out: Contents, copies: dict[str, np.ndarray], key: str, value: np.ndarray
) -> None:
    for suffixes in (SUFFIXES, TABLE_SUFFIXES):
        for name, suffix in suffixes.items():
            if key.endswith(suffix):
                module = key.removesuffix(suffix)
                stored = out.adapters.setdefault(module, Stored({}))
                stored.tensors[name] = value
                stored.table |= suffix != SUFFIXES[name]
                return
    module, _, name = key.rpartition(".")
    if name in FORM_SUFFIXES:
        out.adapters.setdefault(module, Stored({})).tensors[name] = value
    elif key.endswith(TOKENS):
        out.tokens[key.removesuffix(TOKENS)] = value
    elif module.endswith(".base_layer"):
        while module.endswith((".base_layer", ".token_adapter")):
            module = module.rpartition(".")[0]
        out.base[f"{module}.{name}"] = value
    elif ".original_module." in key:
        pass  # with bias="all" PEFT adds the copy that its wrapper never uses
    elif ".modules_to_save." in key:  # and its own copy once more
        copies[key] = value
    else:
        out.plain[key] = value
