"""A PEFT file's adapters as nodes, checked against its configuration and our tree."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora._errors import CheckpointError, StructureError
from jlora._kernel.adapter import Adapter
from jlora._kernel.nodes import LowRank
from jlora._paths import BIAS_NAMES, module_of
from jlora._text import listed
from jlora.peft._config import disagreements, scale_of, variant_disagreements
from jlora.peft._contents import Contents, Stored
from jlora.peft._factors import new_adapter
from jlora.peft._fields import Config
from jlora.peft._layouts import Kind, Layout, Pair, kind_here, layout_of
from jlora.peft._names import Param, Table, advice_to_part
from jlora.peft._parameters import targeted_parameters
from jlora.peft._start import Start
from jlora.peft._vocabulary import resize_advice

_KINDS = {
    "linear": "a linear layer",
    "table": "an embedding",
    "conv": "a convolution",
    "experts": "a parameter of its own, stacked by expert",
}


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where an adapter of the file goes.

    Attributes:
      name: the module, or the parameter that is adapted without its module.
      param: the kernel.
      stored: the file's tensors.
      layout: how they are laid out.
    """

    name: str
    param: Param
    stored: Stored
    layout: Layout

    @property
    def rank(self) -> int:
        """The adapter's rank."""
        return self.stored.tensors["b"].shape[1] // self.layout.experts


def adapters(
    contents: Contents, config: Config, table: Table, leaves: Mapping[str, Any],
    start: Start,
) -> dict[str, LowRank]:  # fmt: skip
    """The low-rank nodes by path.

    Raises:
      CheckpointError: factors that match no module, do not fit it, or disagree with
        the configuration; A without B; modules left without.
      TargetError: parameters of one module whose order in PyTorch is not known.
    """
    where = contents.where
    config = _said_by_file(config)
    slots = _slots(contents, config, table)
    ranks = {name: slot.rank for name, slot in slots.items()}
    modules = {m: [p.module for p in table.sharing(m)] for m in table.kernels()}
    lines = disagreements(config, ranks, modules, table.params)
    held = {name: slot.stored.tensors for name, slot in slots.items()}
    if lines := lines or variant_disagreements(config, held):
        raise CheckpointError(
            f"{where} and its configuration disagree:\n  {listed(lines)}\nThey belong "
            "to different adapters, or the base is another model."
        )
    if wrong := [line for slot in slots.values() if (line := _misfit(slot))]:
        raise CheckpointError(
            f"{where} is of another base; {len(wrong)} adapters do not fit:\n  "
            f"{listed(wrong)}\nPass the parameters of the model it was trained on."
            f"{resize_advice(contents, table)}"
        )
    found: dict[str, LowRank] = {}
    for path in dict.fromkeys(slot.param.path for slot in slots.values()):
        users = table.of_leaf[path]
        name, layout, pair = _of_leaf(where, users, slots, config)
        t = _adapter(where, path, name, layout, pair, config, leaves)
        base, shifted = start.base(path, users, layout, leaves[path], t)
        tokens = tuple(config.get("alora_invocation_tokens") or ())
        t = dataclasses.replace(t, shifted=shifted, invocation=tokens or None)
        found[path] = LowRank(base, {"": t}, path)
    return found


def _said_by_file(config: Config) -> Config:
    """The configuration, where it does not say which modules have an adapter.

    With `target_modules: null` PEFT takes those that it knows for the model's type. The
    file's tensors are of the modules that it took.
    """
    if config.get("target_modules") is None and not config.get("target_parameters"):
        return {**config, "target_modules": "all-linear"}
    return config


def _adapter(
    where: str, path: str, name: str, layout: Layout, pair: Pair, config: Config,
    leaves: Mapping[str, Any],
) -> Adapter:  # fmt: skip
    biases = [f"{module_of(path)}/{last}".lstrip("/") for last in BIAS_NAMES]
    layer = {p: leaves[p] for p in (path, *biases) if p in leaves}
    try:
        return new_adapter(
            path, layer, layout, pair, scale_of(config, name),
            dropout=float(config.get("lora_dropout", 0.0)),
            rslora=bool(config.get("use_rslora")),
        )  # fmt: skip
    except StructureError as error:
        raise CheckpointError(f"{where}: {error}") from None


# -- which tensors go where ------------------------------------------------------------


def _slots(contents: Contents, config: Config, table: Table) -> dict[str, Slot]:
    """The file's adapters by the module or parameter that has them."""
    params = targeted_parameters(config, table)
    found: dict[str, tuple[str, Param]] = {}
    unknown = []
    for module in contents.adapters:
        param = params.get(module, table.weight(module))
        if param is None:
            unknown.append(module)
        else:
            found[module] = (param.key if module in params else param.module, param)
    if unknown:
        raise CheckpointError(
            f"{contents.where}: {len(unknown)} of {len(contents.adapters)} adapted "
            f"modules are not in this tree:\n  {listed(unknown)}\n{_hint(table)}"
        )
    return {
        name: _slot(contents, module, name, param)
        for module, (name, param) in found.items()
    }


def _slot(contents: Contents, module: str, name: str, param: Param) -> Slot:
    stored = contents.adapters[module]
    held = [f"lora_{x.upper()}" for x in "ab" if x in stored.tensors]
    if len(held) != 2:
        other = {"lora_A": "lora_B", "lora_B": "lora_A"}
        without = f"{held[0]} without {other[held[0]]}" if held else "no lora_A, lora_B"
        raise CheckpointError(
            f"{contents.where}: {module} has {without}.\nThe file is incomplete; save "
            "or copy it again."
        )
    layout = layout_of(param, _kind(contents.where, name, stored, param))
    a, b = stored.tensors["a"], stored.tensors["b"]
    matrices = a.ndim > 1 and b.ndim > 1
    if not matrices or a.shape[0] != b.shape[1] or b.shape[1] < layout.experts:
        raise CheckpointError(
            f"{contents.where}: {name} has A {list(a.shape)} and B {list(b.shape)}, "
            f"which disagree on r.{_grouped(layout, a, b)}"
        )
    return Slot(name, param, stored, layout)


def _kind(where: str, name: str, stored: Stored, param: Param) -> Kind:
    """What the file's tensors are of, checked to be what the leaf is."""
    there: Kind = "table" if stored.table else "linear"
    if not stored.table and stored.tensors["a"].ndim > 2:
        there = "conv"
    elif not stored.table and param.is_experts:
        there = "experts"
    here = kind_here(param)
    flat = here is None and len(param.shape) == 2  # an array called `weight`
    if there == here or (flat and there in ("linear", "table")):
        return there
    raise CheckpointError(
        f"{where}: {name} is {_KINDS[there]} there and "
        f"{_KINDS[here] if here else 'something else'} here ({param.path!r} "
        f"{list(param.shape)}).\nPass the base it was trained on, or names={{...}} that"
        ' says what it is called; a name that ends in ".T" is a tied head\'s.'
    )


def _grouped(layout: Layout, a: np.ndarray, b: np.ndarray) -> str:
    if layout.kind != "conv" or b.ndim < 2 or a.shape[0] % max(b.shape[1], 1):
        return ""
    return (
        " B [out, r/groups, 1, ...] is of a grouped convolution, whose A reads the "
        "channels of all groups: no change of its kernel does the same."
    )


def _misfit(slot: Slot) -> str | None:
    """What does not fit the kernel, in a line."""
    shapes = slot.layout.file_shapes(slot.rank)
    tensors = slot.stored.tensors
    if all(x.shape == shapes[name] for name, x in tensors.items()):
        return None
    words = {"a": "A", "b": "B", "magnitude": "magnitude", "bias": "bias"}
    there = ", ".join(f"{words[n]} {list(x.shape)}" for n, x in tensors.items())
    here = ", ".join(f"{words[n]} {list(shapes[n])}" for n in tensors)
    leaf = f"{slot.param.path} {list(slot.param.shape)}"
    return f"{slot.name}: {there}, but here {here} ({leaf})"


# -- one leaf, several modules ---------------------------------------------------------


def _of_leaf(
    where: str, users: list[Param], slots: Mapping[str, Slot], config: Config
) -> tuple[str, Layout, Pair]:
    """A leaf's one adapter, from all modules that use it, and one of their names."""
    alone = slots.get(users[0].key)
    if alone is not None:
        return alone.name, alone.layout, alone.layout.read(alone.stored.tensors)
    held = [p for p in users if p.module in slots]
    missing = [p.module for p in users if p.called and p.module not in slots]
    if missing:
        raise CheckpointError(
            f"{where} adapts {held[0].module} and not {missing[0]}; here both are the "
            f"one leaf {held[0].path!r}, with one adapter.\n{_advice(held, users)}"
        )
    first, *others = [slots[p.module] for p in held]
    pair, scale = _as_used(where, first), scale_of(config, first.name)
    for slot in others:
        same = pair.equals(_as_used(where, slot))
        if not same or scale_of(config, slot.name) != scale:
            raise CheckpointError(
                f"{where}: the adapters of {first.name} and {slot.name} differ; here "
                f"both are the one leaf {first.param.path!r}, with one adapter.\n"
                f"{advice_to_part(users)}"
            )
    tied = first.param.tied
    return first.name, layout_of(first.param, "table") if tied else first.layout, pair


def _as_used(where: str, slot: Slot) -> Pair:
    """An adapter's matrices; a tied head's as the table's."""
    pair = slot.layout.read(slot.stored.tensors)
    if not slot.param.tied:
        return pair
    if pair.magnitude is not None or pair.bias is not None:
        raise CheckpointError(
            f"{where}: {slot.name} is tied to the leaf {slot.param.path!r} here, and "
            "its magnitude or bias is of the head's outputs, not of the table's: one "
            f"adapter cannot be both.\n{advice_to_part([slot.param])}"
        )
    return pair.swapped()


def _advice(held: list[Param], users: list[Param]) -> str:
    if not any(p.called for p in held):
        return (
            f"Hugging Face's models never call the module `{held[0].module}`, so its "
            "adapter does nothing in PEFT either; train `embed_tokens`."
        )
    return (
        f"{advice_to_part(users)} For one adapter of both, target both in PEFT, tied "
        "(ensure_weight_tying)."
    )


def _hint(table: Table) -> str:
    some = ", ".join([*table.kernels(), *table.experts()][:3])
    named = f"What can be adapted here is called {some}, ...\n" if some else ""
    return (
        f"{named}Pass the base it was trained on, or names={{module here: module "
        "there}."
    )
