"""A PEFT file of VeRA, LoHa or LoKr as nodes, checked against its configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jlora._errors import CheckpointError, OptionError, ShapeError
from jlora._kernel.adapter import PARTS, Adapter
from jlora._kernel.nodes import LowRank
from jlora._text import listed
from jlora._tree.kernel_axes import KernelAxes
from jlora._tree.variant_parts import Projections, cut, projections, variant_adapter
from jlora._tree.variants import Form, LoHa, LoKr, VeRA, name_of
from jlora.peft._config import disagreements, rank_of, scale_of
from jlora.peft._contents import PROJECTIONS, Contents
from jlora.peft._factors import abstract, put
from jlora.peft._fields import Config, as_lora
from jlora.peft._form_tensors import from_file, sizes_of, to_file
from jlora.peft._layouts import Layout, kind_here, layout_of
from jlora.peft._names import Param, Table, advice_to_part

Pair = tuple[np.ndarray, np.ndarray]


def form_of(config: Config) -> Form:
    """The variant that a configuration is of."""
    kind = config["peft_type"]
    if kind == "VERA":
        return VeRA(seed=config.get("projection_prng_key", 0))
    if kind == "LOHA":
        return LoHa()
    factor = config.get("decompose_factor", -1)
    try:
        return LoKr(factor, config.get("decompose_both", False))
    except OptionError:
        raise CheckpointError(
            f"decompose_factor is {factor}; jlora knows -1 and numbers from 1 on."
        ) from None


def form_adapters(
    contents: Contents, config: Config, table: Table, leaves: Mapping[str, Any]
) -> dict[str, LowRank]:
    """The low-rank nodes by path.

    Raises:
      CheckpointError: tensors that match no module, do not fit it, or disagree with the
        configuration; modules left without; a matrix that is not of low rank.
    """
    where, form, view = contents.where, form_of(config), as_lora(config)
    if view.get("target_modules") is None:
        view = {**view, "target_modules": "all-linear"}
    params = {m: _param(where, form, m, table) for m in contents.adapters}
    layouts = {m: _layout(where, form, p) for m, p in params.items()}
    ranks = {m: rank_of(view, m) for m in params}
    modules: dict[str, list[str]] = {m: [m] for m in table.kernels()}
    if lines := disagreements(view, ranks, modules, ()):
        raise CheckpointError(
            f"{where} and its configuration disagree:\n  {listed(lines)}\nThey belong "
            "to different adapters, or the base is another model."
        )
    shared = _Shared(_pair(contents, form, config, ranks, layouts), {})
    found = {}
    for module, param in params.items():
        scale = 1.0 if isinstance(form, VeRA) else scale_of(view, module)
        t = _abstract(where, form, param, layouts[module], ranks[module], leaves, view)
        t = _filled(where, form, t, param, layouts[module], contents, shared)
        scales = put(np.full(t.scale.shape, scale, np.float32), t.scale.sharding)
        t = dataclasses.replace(t, scale=scales)
        found[param.path] = LowRank(leaves[param.path], {"": t}, param.path)
    return found


def _param(where: str, form: Form, module: str, table: Table) -> Param:
    param = table.weight(module)
    if param is None:
        raise CheckpointError(
            f"{where}: the adapted module {module} is not in this tree.\nPass the base "
            "it was trained on, or names={module here: module there}."
        )
    users = table.of_leaf[param.path]
    if len(users) > 1:
        raise CheckpointError(
            f"{where} adapts {module}, which is the one leaf {param.path!r} with "
            f"{', '.join(p.module for p in users if p is not param)}, by "
            f"{type(form).__name__}: jlora reads that for layers of their own.\n"
            f"{advice_to_part(users)}"
        )
    return param


def _layout(where: str, form: Form, param: Param) -> Layout:
    kind = kind_here(param)
    if kind is None and len(param.shape) == 2:
        kind = "linear"  # an array called `weight`; PEFT adapts no embedding so
    if kind is None or kind not in (
        ("linear",) if isinstance(form, VeRA) else ("linear", "conv")
    ):
        raise CheckpointError(
            f"{where} adapts {param.module} by {type(form).__name__}, and here it is "
            f"{kind or 'something else'} ({param.path!r} {list(param.shape)}).\nPass "
            "the base it was trained on, or names={...} that says what it is called."
        )
    return layout_of(param, kind)


def _abstract(
    where: str, form: Form, param: Param, layout: Layout, rank: int,
    leaves: Mapping[str, Any], view: Config,
) -> Adapter:  # fmt: skip
    """The adapter's shapes, sharded along with its kernel."""
    axes = KernelAxes(
        tuple(sorted(layout.ins)), layout.outs, is_convolution=layout.kind == "conv"
    )
    dropout = float(view.get("lora_dropout", 0.0))
    try:
        return variant_adapter(
            param.path, abstract(leaves[param.path]), axes, layout.shape, form, rank,
            None, None, np.dtype(np.float32), Projections(), any_rank=True,
            dropout=dropout,
        )  # fmt: skip
    except ShapeError as error:
        raise CheckpointError(
            f"{where}: {error}\nOr merge the adapter into its base with PEFT, and load "
            "the merged model."
        ) from None


@dataclasses.dataclass
class _Shared:
    """VeRA's projections of a file, and what kernels have of them already."""

    pair: Pair | None
    cuts: dict[Any, jax.Array]

    def cut(self, name: str, like: Any, dtype: Any) -> jax.Array:
        """A kernel's part of one, the same array for kernels of one size."""
        place = name, like.shape, like.sharding
        if place not in self.cuts:
            assert self.pair is not None
            self.cuts[place] = put(cut(self.pair, name, like.shape), like.sharding)
        return self.cuts[place]


def _filled(
    where: str, form: Form, t: Adapter, param: Param, layout: Layout,
    contents: Contents, shared: _Shared,
) -> Adapter:  # fmt: skip
    """The adapter with the file's values."""
    name, tensors = name_of(form), contents.adapters[param.module].tensors
    parts = t.parts or {}
    shapes = {n: tuple(x.shape) for n, x in parts.items() if PARTS[n] != "frozen"}
    wanted = to_file(name, layout, {n: np.empty(s) for n, s in shapes.items()})
    there = {n: x.shape for n, x in tensors.items()}
    if there != {n: x.shape for n, x in wanted.items()}:
        here = ", ".join(f"{n} {list(x.shape)}" for n, x in wanted.items())
        told = ", ".join(f"{n} {list(s)}" for n, s in there.items())
        raise CheckpointError(
            f"{where}: {param.module} has {told}; by the configuration it has {here} "
            f"on {param.path!r} {list(param.shape)}.\nThe file and its configuration "
            "are of different adapters, or the base is another model."
        )
    values = from_file(name, layout, tensors, shapes)
    dtype = next(iter(values.values())).dtype
    filled = {
        n: put(values[n], x.sharding) if n in values else shared.cut(n, x, dtype)
        for n, x in parts.items()
    }
    return dataclasses.replace(t, parts=filled)


def _pair(
    contents: Contents, form: Form, config: Config, ranks: Mapping[str, int],
    layouts: Mapping[str, Layout],
) -> Pair | None:  # fmt: skip
    """VeRA's projections `[in, r]` and `[r, out]`: the file's, or made of the key.

    Raises:
      CheckpointError: they are to be there and are not, or not as wide as the layers.
    """
    where = contents.where
    if not isinstance(form, VeRA):
        if contents.projections:
            raise CheckpointError(f"{where} holds {PROJECTIONS[0]}, and is no VeRA's.")
        return None
    rank = next(iter(ranks.values()))
    widths = [sizes_of(layout) for layout in layouts.values()]
    ins, outs = (max(sizes) for sizes in zip(*widths, strict=True))
    if not config.get("save_projection", True):
        return projections(form.seed, rank, ins, outs)
    held = [contents.projections.get(key) for key in PROJECTIONS]
    wanted = [(rank, ins), (outs, rank)]
    shapes = [None if x is None else x.shape for x in held]
    if held[0] is None or held[1] is None or shapes != wanted:
        raise CheckpointError(
            f"{where}: save_projection says that it holds vera_A {list(wanted[0])} and "
            f"vera_B {list(wanted[1])}, and it holds {shapes[0]} and {shapes[1]}.\nThe "
            "file is incomplete, or the base is another model."
        )
    return held[0].T, held[1].T
