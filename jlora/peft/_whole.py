"""What stands in a PEFT file as it is: whole modules, biases, rows of tables."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from jlora._errors import CheckpointError
from jlora._kernel.nodes import Full, Rows
from jlora._kernel.quantized import Quantized
from jlora._text import listed
from jlora._tree.rows import abstract_rows
from jlora.peft._config import saved_whole, tokens_of
from jlora.peft._contents import Contents
from jlora.peft._factors import put
from jlora.peft._fields import Config
from jlora.peft._layouts import kind_here
from jlora.peft._names import Param, Table, advice_to_part
from jlora.peft._vocabulary import added_rows, resize_advice, warn_of_added

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
    wanted |= {p.key for path in paths for p in table.of_leaf[path] if p.called}
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
    _check_shapes(contents, stored, table, laid)
    added = _added(contents, wanted, table, leaves, laid)
    if added:
        warn_of_added(where, added, trained=True)
    return {
        path: _full(where, table.of_leaf[path], stored, leaves[path], laid)
        for path in leaves
        if path in paths or path in added
    }


def _added(
    contents: Contents, wanted: Collection[str], table: Table,
    leaves: Mapping[str, Any], laid: Mapping[str, bool],
) -> dict[str, int]:  # fmt: skip
    """The tables by path that the file carries with rows of its own.

    Raises:
      CheckpointError: a tensor of the base that is not that of this base.
    """
    found = {}
    for key, value in {**contents.plain, **contents.base}.items():
        param = table.params[key]
        if key in wanted:
            continue
        rows = _check_same(contents.where, key, value, param, table, leaves, laid[key])
        if rows and param.module not in contents.adapters:
            found[param.path] = rows
    return found


def with_added_rows(
    contents: Contents, config: Config, table: Table, leaves: Mapping[str, Any]
) -> dict[str, Any]:
    """The leaves, where tokens were added to a table with an adapter the file's table.

    Raises:
      CheckpointError: a tensor of the base that is not that of this base.
    """
    out, added = dict(leaves), {}
    flat = bool(config.get("fan_in_fan_out"))
    for key, value in contents.base.items():
        param = table.params.get(key)
        if param is None or _is_full(param, contents, config):
            continue
        if value.shape != param.torch_shape(flat):
            continue  # said by `fulls`
        if rows := _check_same(contents.where, key, value, param, table, leaves, flat):
            values = param.from_torch(value, flat).astype(leaves[param.path].dtype)
            sharding = getattr(leaves[param.path], "sharding", None)
            out[param.path], added[param.path] = put(values, sharding), rows
    if added:
        warn_of_added(contents.where, added, trained=False)
    return out


def _is_full(param: Param, contents: Contents, config: Config) -> bool:
    bias = config.get("bias", "none")
    adapted = param.module in contents.adapters
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
    contents: Contents,
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
            f"{contents.where} is of another base; {len(wrong)} tensors do not fit:\n  "
            f"{listed(wrong)}\nPass the parameters of the model it was trained on."
            f"{resize_advice(contents, table)}"
        )


def _same_values(ours: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """Where a file's tensor and ours are equal, in the coarser dtype of the two.

    What was saved while the base was bfloat16 is a float32 base rounded, and the other
    way round.
    """
    return (ours.astype(stored.dtype) == stored) | (ours == stored.astype(ours.dtype))


def _check_same(
    where: str, key: str, value: np.ndarray, param: Param, table: Table,
    leaves: Mapping[str, Any], flat: bool,
) -> int:  # fmt: skip
    """A tensor of the base that PEFT saved along must be that of this base.

    Returns:
      How many rows at the end are not, because they are of tokens that were added.
    """
    leaf = leaves[param.path]
    if isinstance(leaf, jax.ShapeDtypeStruct | Quantized):
        return 0  # there is nothing that could be the same
    ours = param.as_torch(leaf, flat)
    same = _same_values(ours, value)
    if np.all(same):
        return 0
    rows = added_rows(param, same, table)
    if not rows:
        other = ""
        if ours.dtype != value.dtype:
            other = f" It is {value.dtype} there and {ours.dtype} here."
        raise CheckpointError(
            f"{where}: {key} is of the base, neither adapted nor in modules_to_save, "
            f"and its values are not those of {param.path!r} here.{other}\nPass the "
            "base it was trained on, in the dtype it had then."
        )
    return rows


def _full(
    where: str, users: list[Param], stored: Mapping[str, np.ndarray], leaf: Any,
    laid: Mapping[str, bool],
) -> Full:  # fmt: skip
    """A leaf in its own dtype and sharding, with the file's values."""
    first, *others = [p for p in users if p.key in stored]
    value = stored[first.key]
    for other in others:
        if not np.array_equal(value, stored[other.key]):
            raise CheckpointError(
                f"{where}: {first.key} and {other.key} differ; here both are the one "
                f"leaf {first.path!r}.\n{advice_to_part(users)}"
            )
    value = first.from_torch(value, laid[first.key]).astype(leaf.dtype)
    return Full(put(value, getattr(leaf, "sharding", None)))


# -- trained rows ----------------------------------------------------------------------


def rows(
    contents: Contents, config: Config, table: Table, leaves: Mapping[str, Any]
) -> dict[str, Rows]:
    """The tables with trained rows by path.

    Raises:
      CheckpointError: rows of what is no table, that the table or the configuration
        does not have, or that are missing.
    """
    where = contents.where
    said = config.get("trainable_token_indices")
    names = list(said) if isinstance(said, dict) else [None] if said else []
    unmet = [n for n in names if n is None and len(contents.tokens) != 1]
    unmet += [
        n for n in names
        if n is not None and not any(_names(n, m, table) for m in contents.tokens)
    ]  # fmt: skip
    if unmet:
        named = unmet[0] or "the input embedding"
        raise CheckpointError(
            f"{where}: trainable_token_indices names {named}, and the trained rows in "
            f"the file are of {sorted(contents.tokens)}.\nThe file is incomplete, or "
            "the base is another model."
        )
    found: dict[str, Rows] = {}
    for module, values in contents.tokens.items():
        param = table.weight(module)
        if param is None or not is_rowwise(param):
            raise CheckpointError(
                f"{where}: {module} has trained rows, and is no table of this tree.\n"
                "Pass the base it was trained on, or names={module here: module there}."
            )
        indices = _checked(where, param, tokens_of(config, module), values)
        node = _rows(param, leaves[param.path], values, indices)
        _check_shared(where, contents, param, table, found.get(param.path), node)
        found[param.path] = node
    return found


def is_rowwise(param: Param) -> bool:
    """Whether the leaf's rows are those of PyTorch's weight."""
    return len(param.shape) == 2 and (param.tied or kind_here(param) != "linear")


def _names(end: str, module: str, table: Table) -> bool:
    """Whether an entry names a module, or one that is tied to it."""
    param = table.weight(module)
    users = [module] if param is None else [p.module for p in table.sharing(module)]
    return any(m.endswith(end) for m in users)


def _checked(
    where: str, param: Param, indices: list[int] | None, values: np.ndarray
) -> tuple[int, ...]:
    count, width = param.shape
    wanted = (len(indices or ()), width)
    if indices is None or values.shape != wanted:
        raise CheckpointError(
            f"{where}: {param.module} has trained rows {list(values.shape)}; by "
            f"trainable_token_indices and the table {param.path!r} {list(param.shape)} "
            f"it has {list(wanted)}.\nThe file and its configuration are of different "
            "adapters, or the base is another model."
        )
    wrong = [i for i in indices if not 0 <= i < count]
    if wrong or len(set(indices)) < len(indices):
        raise CheckpointError(
            f"{where}: trainable_token_indices of {param.module} are {indices[:8]}; of "
            f"the table {param.path!r} {list(param.shape)} they are rows 0 to "
            f"{count - 1}, each once.\nFor tokens that were added to the base make "
            "room first: jlora.models.resize_vocabulary."
        )
    return tuple(indices)


def _rows(
    param: Param, leaf: Any, values: np.ndarray, indices: tuple[int, ...]
) -> Rows:
    sharding = abstract_rows(leaf, len(indices), values.dtype).sharding
    return Rows(leaf, put(values, sharding), indices, param.path)


def _check_shared(
    where: str, contents: Contents, param: Param, table: Table, other: Rows | None,
    node: Rows,
) -> None:  # fmt: skip
    """Refuse rows that are of only some of a leaf's users, or differ among them."""
    users = table.of_leaf[param.path]
    if other is not None and (
        other.indices != node.indices or not np.array_equal(other.rows, node.rows)
    ):
        raise CheckpointError(
            f"{where}: the trained rows of {' and '.join(p.module for p in users)} "
            f"differ; here all are the one leaf {param.path!r}.\n"
            f"{advice_to_part(users)}"
        )
    # With a tied head PEFT stores rows once, of the module that holds the table.
    once = any(p.tied for p in users) and param == table.home(param.path)
    missing = [p.module for p in users if p.called and p.module not in contents.tokens]
    if missing and not once:
        raise CheckpointError(
            f"{where} trains rows of {param.module} and not of {missing[0]}; here both "
            f"are the one leaf {param.path!r}.\n{advice_to_part(users)}"
        )
