"""Checkpoints that bitsandbytes quantised: which tensors make a weight, and how.

    X.weight [n/2, 1] uint8, X.weight.absmax, .quant_map, .nested_absmax,
        .nested_quant_map, .quant_state.bitsandbytes__nf4 (JSON in bytes)    4 bits
    X.weight [out, in] int8, X.SCB [out], X.weight_format                    LLM.int8

What becomes of them is `quantize`'s business, an argument of `load`: here they are
numbers in a file.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Sharding

from jlora._errors import CheckpointError, OptionError
from jlora.models._hf.sources import Source, Stacked, Tensor, names
from jlora.models._hf.tensors import TensorFolder

CONFIG = "quantization_config"
_STATE = ".quant_state.bitsandbytes__"
_FOUR_BITS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


@dataclasses.dataclass(frozen=True)
class Codes:
    """A quantised weight `[out, in]`, or a stack of such.

    Attributes:
      form: `"nf4"`, `"fp4"` or `"int8"`.
      shape: `(out, in)`, without the stack's.
      dtype: of the weight before it was quantised, by name.
      block: weights that share a scale, along the flattened weight; None of int8.
      arrays: `codes`, `absmax`, and of double quantisation `nested_absmax` and
        `offset`, flat as in the file; of int8 `codes` is `[out, in]`. Stacks lead.
      maps: the numbers that codes stand for, as the file has them: `quant_map` and
        `nested_quant_map`.
    """

    form: str
    shape: tuple[int, int]
    dtype: str
    block: int | None
    arrays: Mapping[str, np.ndarray]
    maps: Mapping[str, np.ndarray]


class Quantizer(Protocol):
    """What quantises while a checkpoint is loaded."""

    def plan(self, shapes: Any) -> Mapping[str, Callable[[jax.Array], Any]]:
        """What to do with leaves of the parameters, by path."""

    def from_codes(self, path: str, codes: Codes, sharding: Sharding | None) -> Any:
        """A leaf `[in, out]`, or a stack of them, that the file holds quantised."""


def check_quantizer(quantize: Any, raw: Mapping[str, Any]) -> bool:
    """Whether the checkpoint is quantised, by its `config.json`.

    Raises:
      OptionError: a `quantize` that is none.
      CheckpointError: another method than bitsandbytes', or nobody to take its codes.
    """
    if quantize is not None and not hasattr(quantize, "from_codes"):
        raise OptionError(
            f"quantize={quantize!r}: expected what says how, quantize=jlora.quantizer"
            f"({quantize!r}, ...) say."
            if isinstance(quantize, str)
            else f"quantize={quantize!r}: expected jlora.quantizer('nf4'), or None."
        )
    said = raw.get(CONFIG)
    if not said:
        return False
    method = said.get("quant_method") if isinstance(said, Mapping) else said
    if method != "bitsandbytes":
        raise CheckpointError(
            f"the checkpoint is quantised by {method!r}; jlora.models reads "
            "bitsandbytes' int8, nf4 and fp4.\nLoad its dense original."
        )
    if quantize is None:
        raise CheckpointError(
            "the checkpoint is quantised by bitsandbytes.\nTake its codes as they are: "
            "load(..., quantize=jlora.quantizer()), and use the parameters through "
            "jlora.lora; or load its dense original."
        )
    return True


class QuantisedWeights:
    """The quantised weights of a folder, by name; their parts are hidden in it.

    Args:
      tensors: the folder.
      raw: its `config.json`.
    """

    def __init__(self, tensors: TensorFolder, raw: Mapping[str, Any]):
        self._tensors = tensors
        self._dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float16")
        self._parts: dict[str, dict[str, str]] = {}
        for name in sorted(tensors.names):
            if _STATE in name:
                weight, form = name.split(_STATE)
                found = {p: f"{weight}.{p}" for p in _FOUR_BITS}
                own = {p: n for p, n in found.items() if n in tensors.names}
                self._parts[weight] = {**own, "state": name, "form": form}
            elif name.endswith(".SCB"):
                module = name.removesuffix(".SCB")
                found = {"absmax": name, "form": "int8"}
                if f"{module}.weight_format" in tensors.names:
                    found["format"] = f"{module}.weight_format"
                self._parts[f"{module}.weight"] = found
        parts = [p for found in self._parts.values() for p in found.values()]
        tensors.hide([p for p in parts if p in tensors.names])

    def holds(self, source: Source) -> bool:
        """Whether a leaf is quantised.

        Raises:
          CheckpointError: part of it is, or one that is put together of several.
        """
        found = [name in self._parts for name in names(source)]
        if not any(found):
            return False
        layers = source.parts if isinstance(source, Stacked) else (source,)
        if not all(found) or not all(isinstance(x, Tensor) for x in layers):
            raise CheckpointError(
                f"{names(source)[0]!r} is quantised, and the leaf that it belongs to "
                f"is made of {len(found)} tensors that are not, or lie side by side.\n"
                "Load its dense original, with quantize=jlora.quantizer('nf4')."
            )
        return True

    def dtype(self, source: Source) -> str:
        """The name of the dtype that a leaf had before it was quantised."""
        return self._one(names(source)[0]).dtype

    def read(self, path: str, source: Source, shape: tuple[int, ...]) -> Codes:
        """The codes of a leaf of that shape, `[in, out]` or a stack of them.

        Raises:
          CheckpointError: parts that are missing, damaged or of another shape.
        """
        layers = [self._one(name) for name in names(source)]
        first = layers[0]
        if any(c.shape != shape[:-3:-1] for c in layers):
            raise CheckpointError(
                f"{names(source)[0]} is {list(first.shape)}, but by config.json it is "
                f"{list(shape[:-3:-1])} ({path} {list(shape)}).\nCheck that weights "
                "and config.json are of the same model."
            )
        if not isinstance(source, Stacked):
            return first
        kinds = {(c.form, c.block, c.dtype, *sorted(c.arrays)) for c in layers}
        if len(kinds) > 1:
            raise CheckpointError(
                f"the layers of {path} are quantised in different ways, {kinds}.\n"
                "Load without scan_layers."
            )
        arrays = {n: np.stack([c.arrays[n] for c in layers]) for n in first.arrays}
        return dataclasses.replace(first, arrays=arrays)

    def _one(self, weight: str) -> Codes:
        parts = self._parts[weight]
        if parts["form"] == "int8":
            return self._int8(weight, parts)
        state = self._state(weight, parts["state"])
        own = {p: self._tensors.raw(n) for p, n in parts.items() if p in _FOUR_BITS}
        maps = {n: x for n, x in own.items() if n.endswith("map")}
        held = {n: x for n, x in own.items() if n not in maps}
        # Other storage dtypes than uint8 hold the same bytes.
        codes = self._tensors.raw(weight).reshape(-1).view(np.uint8)
        arrays: dict[str, Any] = {"codes": codes, **held}
        if "nested_absmax" in held:
            arrays["offset"] = np.float32(state["nested_offset"])
        out = Codes(
            parts["form"], tuple(state["shape"]), state["dtype"], state["blocksize"],
            arrays, maps,
        )  # fmt: skip
        count = math.prod(out.shape)
        blocks = -(-count // state["blocksize"])
        sizes = {"codes": -(-count // 2), "absmax": blocks}
        if "nested_absmax" in held:
            sizes["nested_absmax"] = -(-blocks // state["nested_blocksize"])
        self._check_sizes(weight, out, sizes)
        if state.get("nested_blocksize", 256) != 256:
            raise self._damaged(weight, "its nested_blocksize is not 256")
        return out

    def _int8(self, weight: str, parts: Mapping[str, str]) -> Codes:
        codes = self._tensors.raw(weight)
        absmax = self._tensors.raw(parts["absmax"])
        if codes.dtype != np.int8 or codes.ndim != 2:
            raise self._damaged(weight, f"it is {codes.dtype} {list(codes.shape)}")
        if "format" in parts and int(self._tensors.raw(parts["format"])) != 0:
            raise self._damaged(weight, "its weight_format is not 0, rows")
        arrays = {"codes": codes, "absmax": absmax.astype(np.float32).reshape(-1)}
        out, ins = codes.shape
        found = Codes("int8", (out, ins), self._dtype, None, arrays, {})
        self._check_sizes(weight, found, {"absmax": out})
        return found

    def _state(self, weight: str, name: str) -> dict[str, Any]:
        try:
            state = json.loads(self._tensors.raw(name).tobytes())
            good = (
                len(state["shape"]) == 2 and state["dtype"] and state["blocksize"] > 0
            )
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(weight, f"its quant_state says {error!r}") from error
        if not good:
            raise self._damaged(weight, f"its quant_state says {state}")
        return state

    def _check_sizes(self, weight: str, codes: Codes, sizes: Mapping[str, int]) -> None:
        for name, size in sizes.items():
            held = codes.arrays.get(name)
            if held is None or held.size != size:
                count = "none" if held is None else held.size
                raise self._damaged(weight, f"it has {count} of {size} {name}")

    def _damaged(self, weight: str, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._tensors.where(weight)}: the quantised {weight} cannot be read: "
            f"{what}.\nThe file is damaged, or of another form than bitsandbytes' "
            "int8, nf4 and fp4."
        )
