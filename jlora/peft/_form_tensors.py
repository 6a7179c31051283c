"""PEFT's tensors of VeRA, LoHa and LoKr as the parts that jlora holds, and back.

    PEFT               of a linear layer     of a convolution       here
    vera_lambda_b, _d  [out], [r]                                   lambda_b, lambda_d
    vera_A, vera_B     [r, in], [out, r] of the widest layers       proj_a, proj_b
    hada_w1_a, _w1_b   [out, r], [r, in]     [r, in · window]       b1, a1
    hada_w2_a, _w2_b                                                b2, a2
    lokr_w1            [o1, i1]                                     w1
    lokr_w1_a, _w1_b   [o1, r], [r, i1]                             b1, a1
    lokr_w2_a, _w2_b   [o2, r], [r, i2]      [r, i2 · window]       b2, a2

All of them are transposed here, and the inputs are in the kernel's order.

Source: PEFT 0.21.2, `tuners/{vera,loha,lokr}/layer.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from jlora.peft._layouts import Layout

Tensors = dict[str, np.ndarray]

# PEFT's names of the parts; VeRA's projections stand in the file once.
NAMES: dict[str, dict[str, str]] = {
    "vera": {"lambda_b": "vera_lambda_b", "lambda_d": "vera_lambda_d"},
    "loha": {
        "a1": "hada_w1_b", "b1": "hada_w1_a", "a2": "hada_w2_b", "b2": "hada_w2_a",
    },
    "lokr": {
        "w1": "lokr_w1", "a1": "lokr_w1_b", "b1": "lokr_w1_a", "a2": "lokr_w2_b",
        "b2": "lokr_w2_a",
    },
}  # fmt: skip


def to_file(form: str, layout: Layout, parts: Mapping[str, np.ndarray]) -> Tensors:
    """The tensors of one adapter by PEFT's names."""
    out = {}
    for name, theirs in NAMES[form].items():
        if name in parts:
            value = _as_matrix(form, name, layout, np.asarray(parts[name]))
            out[theirs] = np.ascontiguousarray(value)
    return out


def _as_matrix(form: str, name: str, layout: Layout, x: np.ndarray) -> np.ndarray:
    if form == "vera":
        return x.reshape(-1)
    if name[0] == "a" and (order := _axes_in_file(form, name, layout)):
        x = x.transpose(*order, x.ndim - 1)
    if name[0] == "b":
        return x.reshape(x.shape[0], -1).T
    return x.reshape(-1, x.shape[-1]).T


def from_file(
    form: str, layout: Layout, tensors: Tensors, shapes: Mapping[str, tuple[int, ...]]
) -> Tensors:
    """The parts of one adapter, of the shapes given, from tensors that fit them."""
    out = {}
    for name, shape in shapes.items():
        x = tensors[NAMES[form][name]]
        if form != "vera":
            x = x.T
        if name[0] == "a" and (order := _axes_in_file(form, name, layout)):
            x = x.reshape(*(shape[d] for d in order), shape[-1])
            back = np.argsort(order)
            x = x.transpose(*back, x.ndim - 1)
        out[name] = x.reshape(shape)
    return out


def _axes_in_file(form: str, name: str, layout: Layout) -> list[int]:
    """The axes of a part along a convolution's inputs, in the file's order."""
    if layout.kind != "conv":
        return []
    if form == "loha":
        return [sorted(layout.ins).index(d) for d in layout.ins]
    # LoKr's second matrix lies along the window, which is first here.
    window = len(layout.ins) - 1
    return [window, *range(window)] if name == "a2" else []


def sizes_of(layout: Layout) -> tuple[int, int]:
    """A kernel's inputs and outputs, as VeRA's projections count them."""
    return math.prod(layout.sizes(layout.ins)), math.prod(layout.sizes(layout.outs))
