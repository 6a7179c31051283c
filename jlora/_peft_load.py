"""What a PEFT file's tensors are, checked against its configuration and our tree."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jlora._errors import CheckpointError
from jlora._lowrank import Full, LowRank
from jlora._peft_config import (
    Config,
    disagreements,
    saved_whole,
    scale_of,
)
from jlora._peft_factors import Pair, filled, put, sizes, template
from jlora._peft_files import listed
from jlora._peft_names import Param, Table

PREFIX = "base_model.model."
_FACTORS = {
    ".lora_A.weight": ("A", False),
    ".lora_B.weight": ("B", False),
    ".lora_embedding_A": ("A", True),
    ".lora_embedding_B": ("B", True),
}
_FEATURES = {
    ".lora_magnitude_vector": "use_dora",
    ".lora_B.bias": "lora_bias",
    ".token_adapter.": "trainable_token_indices",
}


@dataclasses.dataclass
class Contents:
    """The tensors of a file by what they are; modules by PyTorch's names.

    Attributes:
      where: the file, for messages.
      factors: by module, A and B as far as they are there.
      tables: the modules whose factors are an embedding's.
      plain: parameters by name that stand beside the adapters.
      base: parameters by name of layers under an adapter.
    """

    where: str
    factors: dict[str, dict[str, np.ndarray]]
    tables: set[str]
    plain: dict[str, np.ndarray]
    base: dict[str, np.ndarray]


def sorted_out(tensors: Mapping[str, np.ndarray], where: str) -> Contents:
    """The file's tensors by what their keys say.

    Raises:
      CheckpointError: a key of a feature that is not supported, or an unknown prefix.
    """
    out = Contents(where, {}, set(), {}, {})
    copies: dict[str, np.ndarray] = {}
    for key, value in tensors.items():
        for mark, feature in _FEATURES.items():
            if mark in key:
                raise CheckpointError(
                    f"{where}: {key} is of {feature}, which jlora cannot honour.\n"
                    "Merge the adapter into its base with PEFT."
                )
        if not key.startswith(PREFIX):
            raise CheckpointError(
                f"{where}: {key} does not begin with {PREFIX!r}, as PEFT's keys do."
            )
        _sort_one(out, copies, key.removeprefix(PREFIX), value)
    for key, value in copies.items():
        outer, _, rest = key.partition(".modules_to_save.")
        # The adapter's name stays in the key where the parameter is of an inner module.
        keys = [f"{outer}.{rest}", f"{outer}.{rest.partition('.')[2]}"]
        found = [out.plain[k] for k in keys if k in out.plain]
        if not found or not np.array_equal(found[0], value):
            raise CheckpointError(f"{where}: {key} has no equal of its plain name.")
    return out


def _sort_one(
    out: Contents, copies: dict[str, np.ndarray], key: str, value: np.ndarray
) -> None:
    for suffix, (factor, is_table) in _FACTORS.items():
        if key.endswith(suffix):
            module = key.removesuffix(suffix)
            out.factors.setdefault(module, {})[factor] = value
            if is_table:
                out.tables.add(module)
            return
    module, _, name = key.rpartition(".")
    if module.endswith(".base_layer") or module == "base_layer":
        out.base[f"{module.removesuffix('base_layer')}{name}"] = value
    elif ".original_module." in key:
        pass  # with bias="all" PEFT adds the copy that its wrapper never uses
    elif ".modules_to_save." in key:  # and its own copy once more
        copies[key] = value
    else:
        out.plain[key] = value


# -- adapters --------------------------------------------------------------------------


def adapters(
    contents: Contents, config: Config, table: Table, leaves: Mapping[str, Any]
) -> dict[str, LowRank]:
    """The low-rank nodes by path.

    Raises:
      CheckpointError: factors that match no module, do not fit it, or disagree with
        the configuration; A without B; modules left without.
    """
    where = contents.where
    unknown = [m for m in contents.factors if table.weight(m) is None]
    if unknown:
        raise CheckpointError(
            f"{where}: {len(unknown)} of {len(contents.factors)} adapted modules are "
            f"not in this tree:\n  {listed(unknown)}\n{_hint(unknown, table)}"
        )
    pairs = {m: _pair(contents, m) for m in contents.factors}
    ranks = {m: pair.rank for m, pair in pairs.items()}
    if lines := disagreements(config, ranks, table.kernels()):
        raise CheckpointError(
            f"{where} and its configuration disagree:\n  {listed(lines)}\nThey belong "
            "to different adapters, or the base is another model."
        )
    found: dict[str, LowRank] = {}
    wrong: list[str] = []
    for path in dict.fromkeys(table.params[f"{m}.weight"].path for m in pairs):
        pair, module, is_table = _of_leaf(contents, table.of_leaf[path], pairs, config)
        shapes = template(
            path, leaves[path], table=is_table,
            dropout=float(config.get("lora_dropout", 0.0)),
            rslora=bool(config.get("use_rslora")),
        )  # fmt: skip
        ins, outs = sizes(shapes)
        if pair.a.shape[1] != ins or pair.b.shape[0] != outs:
            wrong.append(
                f"{module}: A {list(pair.a.shape)}, B {list(pair.b.shape)}, but here "
                f"it maps {ins} to {outs} ({path} {list(leaves[path].shape)})"
            )
            continue
        adapter = filled(shapes, pair, scale_of(config, module))
        found[path] = LowRank(leaves[path], {"": adapter}, path)
    if wrong:
        raise CheckpointError(
            f"{where} is of another base; {len(wrong)} adapters do not fit:\n  "
            f"{listed(wrong)}\nPass the parameters of the model it was trained on."
        )
    return found


def _pair(contents: Contents, module: str) -> Pair:
    factors = contents.factors[module]
    if set(factors) != {"A", "B"}:
        (held,) = factors
        missing = {"A": "B", "B": "A"}[held]
        raise CheckpointError(
            f"{contents.where}: {module} has lora_{held} without lora_{missing}.\nThe "
            "file is incomplete; save or copy it again."
        )
    a, b = factors["A"], factors["B"]
    if a.ndim != 2 or b.ndim != 2:
        raise CheckpointError(
            f"{contents.where}: {module} has A {list(a.shape)} and B {list(b.shape)}; "
            "jlora.peft reads linear layers and embeddings, not convolutions."
        )
    if a.shape[0] != b.shape[1] or not a.shape[0]:
        raise CheckpointError(
            f"{contents.where}: {module} has A [r, in] = {list(a.shape)} and B [out, r]"
            f" = {list(b.shape)}, which disagree on r."
        )
    return Pair(a, b)


def _of_leaf(
    contents: Contents, users: list[Param], pairs: Mapping[str, Pair], config: Config
) -> tuple[Pair, str, bool]:
    """The one adapter of a leaf, from all modules that use it."""
    found: list[tuple[str, Pair]] = []
    for param in users:
        if param.module not in pairs:
            have = [p.module for p in users if p.module in pairs]
            raise CheckpointError(
                f"{contents.where} adapts {have[0]} and not {param.module}; here both "
                f"are the one leaf {param.path!r}, with one adapter.\nIn PEFT target "
                "both, tied; or pass a tree that holds them apart."
            )
        _check_kind(contents, param)
        pair = pairs[param.module]
        found.append((param.module, pair.swapped() if param.tied else pair))
    first, pair = found[0]
    for module, other in found[1:]:
        if not pair.equals(other) or scale_of(config, module) != scale_of(
            config, first
        ):
            raise CheckpointError(
                f"{contents.where}: the adapters of {first} and {module} differ; here "
                f"both are the one leaf {users[0].path!r}, with one adapter.\nPass a "
                "tree that holds them apart."
            )
    return pair, first, any(m in contents.tables for m, _ in found)


def _check_kind(contents: Contents, param: Param) -> None:
    """Refuse an embedding's factors on a linear layer, and the other way round."""
    is_table = param.module in contents.tables
    linear = param.axes() is not None
    if len(param.shape) > 2 and not linear:
        raise CheckpointError(
            f"{contents.where}: {param.module} is {param.path!r} {list(param.shape)} "
            "here; jlora.peft knows linear layers, embeddings and Flax's attention."
        )
    if is_table if param.tied or linear else (param.is_table and not is_table):
        kind = "an embedding" if is_table else "a linear layer"
        raise CheckpointError(
            f"{contents.where}: {param.module} is {kind} there and not here "
            f"({param.path!r} {list(param.shape)}).\nPass names={{...}} that says what "
            'it is called; a name that ends in ".T" is a tied head\'s.'
        )


def _hint(unknown: list[str], table: Table) -> str:
    if any(m == "shared" or m.endswith(".shared") for m in unknown):
        return (
            "Hugging Face's models never call the module `shared`, so its adapter does "
            "nothing in PEFT either; train `embed_tokens`."
        )
    some = ", ".join(table.kernels()[:3])
    return (
        f"Modules here are called {some}, ...\nPass the base it was trained on, or "
        "names={module here: module there}."
    )


# -- leaves that are trained as they are -----------------------------------------------


def fulls(
    contents: Contents, config: Config, table: Table, leaves: Mapping[str, Any]
) -> dict[str, Full]:
    """The fully trained leaves by path: `modules_to_save`, and biases.

    Raises:
      CheckpointError: keys that match nothing, are in no list of the configuration, or
        are missing; another base.
    """
    where = contents.where
    stored = {**contents.plain, **contents.base}
    unknown = [key for key in stored if key not in table.params]
    if unknown:
        raise CheckpointError(
            f"{where}: {len(unknown)} tensors match nothing in this tree:\n  "
            f"{listed(unknown)}\nPass the base it was trained on, or names={{module "
            "here: module there}."
        )
    wanted = {key for key, p in table.params.items() if _is_full(p, contents, config)}
    paths = {table.params[key].path for key in wanted}
    wanted |= {p.key for path in paths for p in table.of_leaf[path]}
    if missing := sorted(wanted - set(stored)):
        raise CheckpointError(
            f"{where} lacks {len(missing)} tensors that its configuration names in "
            f"modules_to_save or bias:\n  {listed(missing)}\nThe file is incomplete, "
            "or the base is another model."
        )
    flat = bool(config.get("fan_in_fan_out"))
    laid = {
        key: _conv1d(where, table.params[key], x, flat) for key, x in stored.items()
    }
    _check_shapes(where, stored, table, laid)
    for key in stored:
        if key not in wanted:
            _check_same(where, key, stored[key], table.params[key], leaves, laid[key])
    return {
        path: _full(where, table.of_leaf[path], stored, leaves[path], laid)
        for path in leaves
        if path in paths
    }


def _is_full(param: Param, contents: Contents, config: Config) -> bool:
    bias = config.get("bias", "none")
    adapted = param.module in contents.factors
    if param.name == "bias" and (bias == "all" or (bias == "lora_only" and adapted)):
        return True
    return not adapted and saved_whole(config, param.module)


def _conv1d(where: str, param: Param, value: np.ndarray, told: bool) -> bool:
    """Whether a weight is laid out as GPT-2's, [in, out].

    PEFT's `fan_in_fan_out` is of the adapted layers; of others the shape tells.
    """
    if told or not param.may_be_conv1d:
        return told
    ins, outs = param.torch_shape(True)
    if ins == outs:
        raise CheckpointError(
            f"{where}: {param.key} {list(value.shape)} may be laid out as [in, out], "
            "GPT-2's way, or as [out, in], and nothing tells which.\nAdapt it, or "
            "merge it into the base with PEFT."
        )
    return value.shape == (ins, outs)


def _check_shapes(
    where: str,
    stored: Mapping[str, np.ndarray],
    table: Table,
    laid: Mapping[str, bool],
) -> None:
    own = {key: table.params[key].torch_shape(laid[key]) for key in stored}
    wrong = [
        f"{key} {list(x.shape)}, here {list(own[key])}"
        for key, x in stored.items()
        if x.shape != own[key]
    ]
    if wrong:
        raise CheckpointError(
            f"{where} is of another base; {len(wrong)} tensors do not fit:\n  "
            f"{listed(wrong)}\nPass the parameters of the model it was trained on."
        )


def _check_same(
    where: str, key: str, value: np.ndarray, param: Param,
    leaves: Mapping[str, Any], flat: bool,
) -> None:  # fmt: skip
    """A tensor of the base that PEFT saved along must be that of this base."""
    leaf = leaves[param.path]
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return
    if not np.array_equal(param.as_torch(leaf, flat), value.astype(leaf.dtype)):
        raise CheckpointError(
            f"{where}: {key} is of the base, neither adapted nor in modules_to_save, "
            f"and its values are not those of {param.path!r} here.\nPass the base it "
            "was trained on."
        )


def _full(
    where: str, users: list[Param], stored: Mapping[str, np.ndarray], leaf: Any,
    laid: Mapping[str, bool],
) -> Full:  # fmt: skip
    """A leaf in its own dtype and sharding, with the file's values."""
    first, *others = users
    value = stored[first.key]
    for other in others:
        if not np.array_equal(value, stored[other.key]):
            raise CheckpointError(
                f"{where}: {first.key} and {other.key} differ; here both are the one "
                f"leaf {first.path!r}.\nPass a tree that holds them apart."
            )
    value = first.from_torch(value, laid[first.key]).astype(leaf.dtype)
    return Full(put(value, getattr(leaf, "sharding", None)))
