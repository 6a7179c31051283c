"""A tree of VeRA, LoHa or LoKr adapters as PEFT's tensors and configuration."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jlora._errors import ShapeError, StructureError
from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import RANK
from jlora._kernel.forms import OUTER_IN, OUTER_OUT
from jlora._kernel.nodes import LowRank, Rows
from jlora._processes import on_host
from jlora._text import listed
from jlora._tree.kernel_axes import KernelAxes
from jlora._tree.variant_parts import parts_of, projections, window_of
from jlora._tree.variants import LoKr
from jlora.peft import _config_for, _save
from jlora.peft._config import (
    alpha_for,
    disagreements,
    pattern_for,
    rank_of,
    scale_of,
    target_modules_for,
)
from jlora.peft._contents import PREFIX, PROJECTIONS
from jlora.peft._fields import FORMS, Config, as_lora, check_config
from jlora.peft._form_tensors import NAMES, to_file
from jlora.peft._layouts import Layout, kind_here, layout_of
from jlora.peft._names import Param, Table

Content = tuple[dict[str, Any], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class FormExported:
    """The adapter of one module."""

    param: Param
    layout: Layout
    adapter: Adapter

    @property
    def rank(self) -> int:
        """R."""
        return self.adapter.rank

    @property
    def scale(self) -> float:
        """Alpha/r."""
        return float(on_host(self.adapter.scale))


def is_of_forms(nodes: Mapping[str, Any]) -> bool:
    """Whether a tree holds other adapters than LoRA's."""
    return any(t.form for t in _terms(nodes))


def _terms(nodes: Mapping[str, Any]) -> list[Adapter]:
    kernels = [x for x in nodes.values() if isinstance(x, LowRank)]
    return [t for x in kernels for t in x.adapters.values()]


def form_content(nodes: Mapping[str, Any], table: Table, given: Config) -> Content:
    """The configuration and the tensors of a tree.

    Raises:
      StructureError: what PEFT's format cannot hold; a configuration that does not say
        what the tree is.
    """
    forms = {t.form for t in _terms(nodes)}
    if len(forms) > 1:
        names = ", ".join(sorted(name or "lora" for name in forms))
        raise StructureError(
            f"the tree has adapters of several forms, {names}, and a PEFT folder is of "
            "one.\nSave each on a tree of its own."
        )
    (form,) = forms
    if form is None or form not in NAMES:
        raise StructureError(
            f"the tree's adapters are of form {form}, which jlora.peft does not write."
            "\nAdaLoRA's become LoRA's: jlora.optim.prune(tree)."
        )
    tables = [path for path, x in nodes.items() if isinstance(x, Rows)]
    if tables:
        raise StructureError(
            f"rows of {tables[0]!r} are trained, and PEFT's {form.upper()} knows no "
            "trainable tokens.\nTrain the table whole: train=[...]."
        )
    found = {
        x.param.module: x
        for path, node in nodes.items()
        if isinstance(node, LowRank)
        for x in [_exported(path, node, form, table)]
    }
    config = {**_config(form, found, nodes, table, given), **given}
    check_config(config, "config")
    view = as_lora(config)
    _check_says(form, view, found, table)
    saved = _save.saved_params(view, found, nodes, table)
    _save.check_conv1d(given, saved)
    flat = bool(config.get("fan_in_fan_out"))
    tensors = _save.whole_tensors(found, saved, nodes, flat)
    for module, x in found.items():
        parts = {n: on_host(v) for n, v in (x.adapter.parts or {}).items()}
        for name, value in to_file(form, x.layout, parts).items():
            tensors[f"{PREFIX}{module}.{name}"] = value
    if form == "vera":
        pair = _widest(found)
        if config["save_projection"]:
            tensors |= dict(zip(PROJECTIONS, pair, strict=True))
        else:
            _check_key(config, pair)
    return config, tensors


def _exported(path: str, node: LowRank, form: str, table: Table) -> FormExported:
    users, kind = table.of_leaf[path], kind_here(table.of_leaf[path][0])
    if kind is None and len(node.shape) == 2:
        kind = "linear"
    kinds = ("linear",) if form == "vera" else ("linear", "conv")
    whole = len(node.adapters) == 1 and all(
        t.covers(node.shape) for t in node.adapters.values()
    )
    if kind is None or len(users) > 1 or kind not in kinds or not whole:
        raise StructureError(
            f"the adapter of {path!r} {node.shape} is of form {form}, which PEFT knows "
            f"for {' and '.join(f'{k} layers' for k in kinds)}, each with a weight of "
            "its own, and not for slices of them.\nLeave it out of targets, or give it "
            "Target(variant='lora')."
        )
    (t,) = node.adapters.values()
    layout = layout_of(users[0], kind)
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in (t.parts or {}).values()):
        raise StructureError(
            f"the adapter of {path!r} has no values.\nSave a tree of arrays."
        )
    if t.batch_axes or {*t.in_axes} != {*layout.ins} or {*t.out_axes} != {*layout.outs}:
        raise ShapeError(
            f"the adapter of {path!r} {node.shape} has inputs {t.in_axes} and outputs "
            f"{t.out_axes}; in PyTorch this {kind} kernel has inputs {layout.ins} and "
            f"outputs {layout.outs}."
        )
    return FormExported(users[0], layout, t)


# -- the configuration -----------------------------------------------------------------


def _config(
    form: str, found: Mapping[str, FormExported], nodes: Mapping[str, Any],
    table: Table, given: Config,
) -> dict[str, Any]:  # fmt: skip
    """The smallest configuration that says what the tree is."""
    config = copy.deepcopy(FORMS[form.upper()])
    ranks = {module: x.rank for module, x in found.items()}
    config["r"], pattern = pattern_for(ranks)
    if form == "vera":
        _check_one_rank(ranks)
        config["vera_dropout"] = _config_for.dropout_of(_terms(nodes), given)
    else:
        config["rank_pattern"] = pattern
        alphas = {m: alpha_for(x.scale, x.rank, rslora=False) for m, x in found.items()}
        config["alpha"], config["alpha_pattern"] = pattern_for(alphas)
        _refuse_dropout(form, found)
    if form == "lokr":
        config["decompose_factor"], config["decompose_both"] = _division(found)
    config["target_modules"] = target_modules_for(list(found), table.modules())
    bias, whole = _config_for.bias_and_whole(found, nodes, table)
    if form == "vera":
        config["bias"] = "vera_only" if bias == "lora_only" else bias
    elif bias != "none":
        raise StructureError(
            f"biases are trained, and PEFT's {form.upper()} knows none.\nLeave out "
            "bias, or train whole modules: train=[...]."
        )
    config["modules_to_save"] = _config_for.modules_to_save(whole, table, given)
    return config


def _check_one_rank(ranks: Mapping[str, int]) -> None:
    if len(set(ranks.values())) > 1:
        raise StructureError(
            f"VeRA's adapters have ranks {sorted(set(ranks.values()))}; PEFT has one "
            "for all.\nGive all kernels the same."
        )


def _refuse_dropout(form: str, found: Mapping[str, FormExported]) -> None:
    dropped = [m for m, x in found.items() if x.adapter.dropout]
    if dropped:
        raise StructureError(
            f"the adapter of {dropped[0]} drops inputs, which PEFT's {form.upper()} "
            "does not.\nMake it without dropout."
        )


def _division(found: Mapping[str, FormExported]) -> tuple[int, bool]:
    """LoKr's `decompose_factor` and `decompose_both` that give all shapes."""
    sizes = {n for x in found.values() for n in _outer(x)}
    for factor in (-1, *sorted(sizes)):
        for both in (False, True):
            if not _misfits(LoKr(factor, both), found):
                return factor, both
    raise StructureError(
        "the LoKr adapters divide their kernels differently, and PEFT has one "
        "decompose_factor for all.\nMake them with one jlora.LoKr(factor=...)."
    )


def _outer(x: FormExported) -> list[int]:
    dims = dict(x.adapter.p_dims)
    return [
        array.shape[dims[n].index(d)]
        for n, array in (x.adapter.parts or {}).items()
        for d in (OUTER_IN, OUTER_OUT)
        if d in dims[n]
    ]


def _misfits(form: LoKr, found: Mapping[str, FormExported]) -> list[str]:
    """The modules whose parts are not those of a form's settings."""
    return [module for module, x in found.items() if not _is_of(form, x)]


def _is_of(form: LoKr, x: FormExported) -> bool:
    axes = KernelAxes(
        tuple(sorted(x.layout.ins)), x.layout.outs,
        is_convolution=x.layout.kind == "conv",
    )  # fmt: skip
    path, window = x.param.path, window_of(x.param.path, axes)
    try:
        wanted, _ = parts_of(
            form, path, axes, x.layout.shape, x.rank, np.float32, window, any_rank=True
        )
    except ShapeError:
        return False
    parts = x.adapter.parts or {}
    return {n: v.shape for n, v in wanted.items()} == {
        n: tuple(v.shape) for n, v in parts.items()
    }


def _check_says(
    form: str, view: Config, found: Mapping[str, FormExported], table: Table
) -> None:
    """Refuse a configuration that does not say what the tree is."""
    ranks = {module: x.rank for module, x in found.items()}
    lines = disagreements(view, ranks, {m: [m] for m in table.kernels()}, ())
    for module, x in found.items():
        said = 1.0 if form == "vera" else scale_of(view, module)
        if np.float32(x.scale) != np.float32(said):
            lines.append(f"{module} has scale {x.scale:g}, but is to have {said:g}")
        if rank_of(view, module) != x.rank:
            lines.append(f"{module} has rank {x.rank}, but is to have another")
    if form == "lokr":
        settings = LoKr(view["decompose_factor"], view["decompose_both"])
        lines += [f"{m} is divided otherwise" for m in _misfits(settings, found)]
    if lines:
        raise StructureError(
            f"the configuration does not say what this tree is:\n  {listed(lines)}\n"
            "Leave those keys to jlora."
        )


# -- VeRA's projections ----------------------------------------------------------------


def _widest(found: Mapping[str, FormExported]) -> tuple[np.ndarray, np.ndarray]:
    """The pair, PEFT's way, of which every kernel has the beginning.

    Raises:
      StructureError: the kernels' projections are not of one pair.
    """
    out = []
    for name in ("proj_a", "proj_b"):
        held = {module: _rows_of(x, name) for module, x in found.items()}
        whole = max(held.values(), key=len)
        strange = [m for m, x in held.items() if not np.array_equal(x, whole[: len(x)])]
        if strange:
            raise StructureError(
                f"the projections of {strange[0]} are not cut from those of the widest "
                "kernel, and PEFT has one pair for all.\nMake all adapters in one call "
                "of jlora.lorafy."
            )
        out.append(whole)
    return np.ascontiguousarray(out[0].T), np.ascontiguousarray(out[1])


def _rows_of(x: FormExported, name: str) -> np.ndarray:
    """A projection as `[in, r]` or `[out, r]`."""
    value = on_host((x.adapter.parts or {})[name])
    rank = dict(x.adapter.p_dims)[name].index(RANK)
    return np.moveaxis(value, rank, -1).reshape(-1, value.shape[rank])


def _check_key(config: Config, pair: tuple[np.ndarray, np.ndarray]) -> None:
    """Refuse to leave projections out that are not those of the key."""
    (rank, ins), outs = pair[0].shape, len(pair[1])
    a, b = projections(config["projection_prng_key"], rank, ins, outs)
    if not (np.array_equal(a.T, pair[0]) and np.array_equal(b.T, pair[1])):
        raise StructureError(
            "save_projection=False, and the tree's projections are not those of "
            f"projection_prng_key {config['projection_prng_key']}.\nPass VeRA's seed "
            "as projection_prng_key, or leave save_projection to jlora."
        )
