"""A model's folder with its kernels in 8 or 4 bits, in bitsandbytes' format.

That is the format that `transformers` loads, with bitsandbytes, and that
`jlora.models.load(folder, quantize=jlora.quantizer())` takes code by code. A kernel
that several tensors make up, fused projections and experts, stays as it is.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora import _files
from jlora._errors import OptionError
from jlora._kernel import codebooks
from jlora._kernel.quantized import NESTED_BLOCK, PACKED, Quantized, dense
from jlora._paths import leaves_by_path
from jlora.models._hf.families import family_of
from jlora.models._hf.load import GENERATION, TOKENIZER_FILES, _folder, load, sources_of
from jlora.models._hf.save import _layout
from jlora.models._hf.sources import Tensor, places
from jlora.models._hf.tensors import WEIGHTS

Arrays = dict[str, np.ndarray]


class Row(NamedTuple):
    """What quantising did to one kernel.

    Attributes:
      kernel: its path.
      bytes_before, bytes_after: its size.
      relative_error: norm of what was lost over the kernel's.
      max_error: the largest error of a weight.
    """

    kernel: str
    bytes_before: int
    bytes_after: int
    relative_error: float
    max_error: float


class Report(NamedTuple):
    """What quantising did to a model.

    Attributes:
      rows: one for each kernel.
      bytes_before, bytes_after: the whole model's.
      left: kernels that could have been quantised, and why they were not.
    """

    rows: list[Row]
    bytes_before: int
    bytes_after: int
    left: dict[str, str]


def quantise(
    source: str,
    target: Path,
    form: str,
    *,
    block: int | None,
    double: bool,
    exclude: list[str] | None,
    dtype: str | None,
) -> Report:
    """Write a folder with a model's kernels quantised, and say what that lost.

    No more than one kernel is dense at a time.

    Raises:
      CheckpointError: the model cannot be read, or the folder not be written.
      OptionError: there is nothing to quantise.
      ShapeError: a block that does not divide a kernel's rows.
    """
    watch = _Watch(form, block, double, exclude)
    model, params = load(source, dtype, quantize=watch)
    family = family_of(model.config.to_dict()["model_type"], source)
    leaves = leaves_by_path(params, is_leaf=lambda x: isinstance(x, Quantized))
    shapes = family.abstract_params(model)
    tensors: Arrays = {}
    skipped, left = [], dict.fromkeys(watch.left, "made up of several tensors")
    for path, place in sources_of(family, model.config, shapes).items():
        leaf = leaves[path]
        if isinstance(leaf, Quantized) and isinstance(place, Tensor):
            tensors |= codes_of(place.name, leaf)
            continue
        for one in places(place, leaf.shape):
            tensors[one.tensor.name] = _layout(one, leaf)
        if path.endswith("/kernel") and isinstance(place, Tensor):
            skipped.append(place.name.removesuffix(".weight"))
    config = model.config.to_dict() | {
        "dtype": str(watch.dtype),
        "quantization_config": _config(form, double, skipped),
    }
    _write(target, _folder(source), tensors, config, model)
    before = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves.values())
    after = sum(x.nbytes for x in tensors.values())
    return Report(watch.rows, before, after, left)


class _Watch:
    """A quantizer that notes what it does to each kernel."""

    def __init__(
        self, form: str, block: int | None, double: bool, exclude: list[str] | None
    ) -> None:
        self.given: dict[str, Any] = {"form": form, "block": block, "double": double}
        self.exclude = exclude
        self.rows, self.left = list[Row](), list[str]()
        self.dtype: Any = None

    def plan(self, shapes: Any) -> Mapping[str, Callable[[jax.Array], Any]]:
        """The quantizer's plan, without kernels that several tensors make up."""
        exclude = self.exclude
        if exclude is None:  # as bitsandbytes does, where the head is its own
            exclude = ["lm_head"] if "lm_head" in shapes else []
        plan = jlora.quantizer(**self.given, exclude=exclude).plan(shapes)
        stacked = {path for path in plan if _rank(shapes, path) != 2}
        self.left = sorted(stacked)
        return {
            path: self._noting(path, make)
            for path, make in plan.items()
            if path not in stacked
        }

    def from_codes(self, path: str, codes: Any, sharding: Any) -> Any:
        """Refuse what is quantised already."""
        raise OptionError(
            f"the model is quantised already, {path!r} as {codes.form}.\nPass its "
            "dense original."
        )

    def _noting(self, path: str, make: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def quantised(kernel: jax.Array) -> Quantized:
            made: Quantized = make(kernel)
            self.dtype = kernel.dtype
            exact = kernel.astype(jnp.float32)
            error = dense(made).astype(jnp.float32) - exact
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(made))
            relative = jnp.linalg.norm(error) / jnp.linalg.norm(exact)
            largest = jnp.max(jnp.abs(error))
            self.rows.append(
                Row(path, kernel.nbytes, size, float(relative), float(largest))
            )
            return made

        return quantised


def _rank(shapes: Any, path: str) -> int:
    return len(leaves_by_path(shapes)[path].shape)


def codes_of(name: str, kernel: Quantized) -> Arrays:
    """Return a kernel's arrays by the names that bitsandbytes gives them.

    Args:
      name: of the weight, `X.weight`.
      kernel: `[in, out]`, quantised in rows of outputs.
    """
    form, ins, out = kernel.layout.form, *kernel.shape
    codes, absmax = np.asarray(kernel.codes), np.asarray(kernel.absmax)
    if form not in PACKED:
        module = name.removesuffix("weight")
        return {
            name: codes.reshape(out, ins),
            f"{module}SCB": absmax.reshape(out),
            f"{module}weight_format": np.asarray(0, np.uint8),
        }
    state: dict[str, Any] = {
        "quant_type": form,
        "blocksize": kernel.layout.block,
        "dtype": str(kernel.dtype),
        "shape": [out, ins],
    }
    arrays = {
        name: codes.reshape(-1, 1),
        f"{name}.absmax": absmax.reshape(-1),
        f"{name}.quant_map": codebooks.four_bits(form),
    }
    if kernel.nested_absmax is not None and kernel.offset is not None:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        state["nested_offset"] = float(kernel.offset)
        arrays[f"{name}.nested_absmax"] = np.asarray(kernel.nested_absmax).reshape(-1)
        arrays[f"{name}.nested_quant_map"] = codebooks.dynamic_map()
    packed = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return {**arrays, f"{name}.quant_state.bitsandbytes__{form}": packed}


def _config(form: str, double: bool, skipped: list[str]) -> dict[str, Any]:
    """What `transformers` is to know, by its names."""
    said: dict[str, Any] = {"quant_method": "bitsandbytes"}
    if form in PACKED:
        said |= {"load_in_4bit": True, "bnb_4bit_quant_type": form}
        said["bnb_4bit_use_double_quant"] = double
    else:
        said["load_in_8bit"] = True
    return said | {"llm_int8_skip_modules": sorted(skipped) or None}


def _write(
    target: Path,
    source: Path,
    tensors: Arrays,
    config: Mapping[str, Any],
    model: Any,
) -> None:
    """Write the folder; a failure leaves what was there."""
    with _files.staged(
        target, "the model", mark="config.json",
        stale=lambda name: name.startswith("model") and "safetensors" in name,
    ) as folder:  # fmt: skip
        for name in TOKENIZER_FILES:
            if (source / name).exists():
                shutil.copyfile(source / name, folder / name)
        _files.write_tensors(folder / WEIGHTS, tensors)
        _files.write_json(folder / "config.json", config)
        if generation := getattr(model.config, "generation", None):
            _files.write_json(folder / GENERATION, dict(generation))


def as_json(report: Report) -> dict[str, Any]:
    """The report for programs."""
    return {
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "left": report.left,
        "kernels": [row._asdict() for row in report.rows],
    }
