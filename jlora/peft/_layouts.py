"""PEFT's tensors of one adapter as plain matrices, and back.

    kind    A                          B                     magnitude       bias
    linear  [r, in]                    [out, r]              [out]           [out]
    table   [r, V]                     [d, r]                [d]
    conv    [r, in, *window]           [out, r, 1, ...]      [1, out, 1...]  [out]
    experts [E·r, in] expert by        [out, r·E] rank by
            expert                     rank, in it by expert

Source: PEFT 0.21.2, `tuners/lora/layer.py` and `dora.py`. Of experts, `in` is what
their product sums over, whether the PyTorch model stores [E, out, in], as most do in
transformers 5, or [E, in, out], where a model says `is_transposed`: only ΔW is
transposed, never A or B.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import numpy as np

from jlora._errors import ShapeError
from jlora._kernel.axes import Dims
from jlora.peft._names import Param

Kind = Literal["linear", "table", "conv", "experts"]

# How the keys of an adapter's tensors end, after the module's name.
SUFFIXES = {
    "a": ".lora_A.weight",
    "b": ".lora_B.weight",
    "magnitude": ".lora_magnitude_vector",
    "bias": ".lora_B.bias",
}
TABLE_SUFFIXES = {**SUFFIXES, "a": ".lora_embedding_A", "b": ".lora_embedding_B"}


@dataclasses.dataclass(frozen=True)
class Pair:
    """The matrices of one adapter; with `[E]` in front, of one adapter an expert.

    Attributes:
      a: `[r, in]`; of a table `[r, V]`. Several input axes are in the kernel's order.
      b: `[out, r]`; of a table `[d, r]`.
      magnitude: DoRA's, `[out]`, or None.
      bias: of `b`'s product, `[out]`, or None.
    """

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None = None
    bias: np.ndarray | None = None

    @property
    def rank(self) -> int:
        """The inner dimension r."""
        return self.b.shape[-1]

    def swapped(self) -> Pair:
        """The matrices of the transposed use: a tied head's, from its table's."""
        return Pair(np.ascontiguousarray(self.b.T), np.ascontiguousarray(self.a.T))

    def equals(self, other: Pair) -> bool:
        """Whether all values are the same."""
        names = [f.name for f in dataclasses.fields(self)]
        return all(np.array_equal(getattr(self, n), getattr(other, n)) for n in names)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a kernel's axes are in the file.

    Attributes:
      kind: how the file lays the adapter out.
      shape: the kernel's shape here.
      ins: the kernel's input dimensions, in the file's order.
      outs, batch: its output dimensions and those with an adapter at each index.
    """

    kind: Kind
    shape: tuple[int, ...]
    ins: Dims
    outs: Dims
    batch: Dims = ()

    def sizes(self, dims: Dims) -> tuple[int, ...]:
        """The kernel's sizes along some dimensions."""
        return tuple(self.shape[d] for d in dims)

    @property
    def experts(self) -> int:
        """How many adapters there are: 1, or one an expert."""
        return math.prod(self.sizes(self.batch))

    def file_shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors of an adapter of a rank."""
        ins, out = self.sizes(self.ins), math.prod(self.sizes(self.outs))
        many = rank * self.experts
        if self.kind != "conv":
            ins = (math.prod(ins),)
        ones = (1,) * (len(ins) - 1)
        magnitude = (1, out, *ones) if self.kind == "conv" else (out,)
        return {"a": (many, *ins), "b": (out, many, *ones), "magnitude": magnitude,
                "bias": (out,)}  # fmt: skip

    def read(self, stored: Mapping[str, np.ndarray]) -> Pair:
        """The matrices of tensors that have the shapes of `file_shapes`."""
        a, b = stored["a"], stored["b"]
        flat = {n: stored[n].reshape(-1) for n in ("magnitude", "bias") if n in stored}
        if self.kind == "experts":
            a = a.reshape(self.experts, -1, a.shape[-1])
            b = np.moveaxis(b.reshape(b.shape[0], -1, self.experts), -1, 0)
        else:
            order = [0, *(1 + self.ins.index(d) for d in sorted(self.ins))]
            a = a.transpose(order) if self.kind == "conv" else a
            a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
        return Pair(a, b, **flat)

    def write(self, pair: Pair) -> dict[str, np.ndarray]:
        """Inverse of `read`."""
        a, b = pair.a, pair.b
        if self.kind == "experts":
            a, b = a.reshape(-1, a.shape[-1]), np.moveaxis(b, 0, -1)
        elif self.kind == "conv":
            a = a.reshape(-1, *self.sizes(tuple(sorted(self.ins))))
            a = a.transpose([0, *(1 + sorted(self.ins).index(d) for d in self.ins)])
        shapes = self.file_shapes(pair.rank)
        found = {"a": a, "b": b, "magnitude": pair.magnitude, "bias": pair.bias}
        return {
            name: np.ascontiguousarray(x.reshape(shapes[name]))
            for name, x in found.items()
            if x is not None
        }


def layout_of(param: Param, kind: Kind) -> Layout:
    """How the file lays out an adapter of a parameter.

    Raises:
      ShapeError: the parameter is of another kind.
    """
    shape, ndim = param.shape, len(param.shape)
    axes, conv = param.axes(), param.conv()
    if kind == "table" and ndim == 2:
        return Layout(kind, shape, (0,), (1,))
    if kind == "experts" and ndim == 3:
        return Layout(kind, shape, (1,), (2,), (0,))
    if kind == "conv" and conv is not None:
        return Layout(kind, shape, conv[1:], conv[:1])
    if kind == "linear" and (param.tied or (ndim == 2 and param.last == "weight")):
        return Layout(kind, shape, (1,), (0,))
    if kind == "linear" and axes is not None:
        return Layout(kind, shape, tuple(range(axes[0])), tuple(range(axes[0], ndim)))
    raise ShapeError(f"{param.path!r} {shape} is no {kind} kernel.")


def kind_here(param: Param) -> Kind | None:
    """What a kernel is by its name and shape; None if it may be several things."""
    if param.tied or param.axes() is not None:
        return "linear"
    if param.is_table:
        return "table" if len(param.shape) == 2 else None
    if param.is_experts:
        return "experts"
    return "conv" if param.conv() is not None else None
