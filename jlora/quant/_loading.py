"""Quantising while a checkpoint is loaded, leaf by leaf."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding

from jlora._errors import CheckpointError, OptionError
from jlora._kernel import codebooks
from jlora._kernel.quantized import FORMS, PACKED, Layout, Quantized
from jlora._tree import options
from jlora._tree.targets import Targets
from jlora.quant._layouts import checked_block
from jlora.quant._quantize import layouts_of, quantized


def quantizer(
    form: str | None = None,
    *,
    block: int | None = None,
    double: bool = True,
    targets: Targets = "all-linear",
    exclude: Sequence[str] = (),
) -> Quantizer:
    """What `jlora.models.load` takes to quantise each kernel once it is read.

    Neither the host nor the device ever holds the dense model:

        model, params = jlora.models.load(
            "meta-llama/Llama-3.2-1B", quantize=jlora.quantizer("nf4")
        )

    Args:
      form: as of `jlora.quantize`, as all that follows. Without one a checkpoint that
        bitsandbytes quantised (int8, nf4, fp4) is taken as it is, code by code.
      block: how many weights of a row share a scale.
      double: quantise the scales of blocks too.
      targets: which kernels.
      exclude: entries of leaves to leave as they are.

    Raises:
      OptionError: a form, a block or another argument that cannot be.
    """
    if form is not None:
        options.one_of("form", form, FORMS)
        checked_block(form, block)
    options.flags(double=double)
    return Quantizer(form, block, double, targets, tuple(exclude))


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """How to quantise what is loaded; from `jlora.quantizer`.

    Attributes:
      form, block, double, targets, exclude: as of `jlora.quantize`.
    """

    form: str | None
    block: int | None
    double: bool
    targets: Targets
    exclude: tuple[str, ...]

    def plan(self, shapes: Any) -> dict[str, Callable[[jax.Array], Quantized]]:
        """What to do with leaves of the parameters, by path.

        Args:
          shapes: the parameters' tree of shapes.

        Raises:
          OptionError: no form, which is for quantised checkpoints alone.
          TargetError: an entry hits nothing.
          ShapeError: a block that does not divide a kernel's rows.
        """
        if self.form is None:
            raise OptionError(
                "the checkpoint is not quantised, and jlora.quantizer() says no form."
                "\nSay one: jlora.quantizer('nf4')."
            )
        layouts = layouts_of(
            shapes, self.form, self.block, self.targets, self.exclude, None
        )
        return {
            path: functools.partial(self._quantized, path, layout)
            for path, layout in layouts.items()
        }

    def _quantized(self, path: str, layout: Layout, kernel: jax.Array) -> Quantized:
        layout = dataclasses.replace(layout, dtype=jnp.dtype(kernel.dtype))
        return quantized(path, kernel, layout, self.double)

    def from_codes(self, path: str, codes: Any, sharding: Sharding | None) -> Quantized:
        """A kernel `[in, out]`, or a stack of them, from a file's codes.

        Args:
          path: where it stands.
          codes: what `jlora.models` read.
          sharding: the dense kernel's.

        Raises:
          OptionError: a form, though there are codes already.
          CheckpointError: codes that stand for other numbers than bitsandbytes'.
        """
        if self.form is not None:
            raise OptionError(
                f"the checkpoint holds {path!r} as {codes.form} already, and "
                f"jlora.quantizer({self.form!r}) would quantise it again.\nPass "
                "quantize=jlora.quantizer() to take it as it is."
            )
        _check_maps(path, codes)
        out, ins = codes.shape
        arrays, dtype = dict(codes.arrays), jnp.dtype(codes.dtype)
        lead = arrays["codes"].shape[: -2 if codes.form == "int8" else -1]
        in_rows = codes.block is None or (ins % codes.block == 0 and not ins % 2)
        if in_rows:
            arrays["codes"] = arrays["codes"].reshape(*lead, out, -1)
            layout = Layout(codes.form, dtype, codes.block, (-1,), (-2,), (0,))
            if codes.block is not None:
                arrays["absmax"] = arrays["absmax"].reshape(*lead, out, -1)
        else:  # blocks that run from one row into the next
            layout = Layout(codes.form, dtype, codes.block, (), (-1, -2), (out, ins))
        nested, offset = arrays.get("nested_absmax"), arrays.get("offset")
        q = Quantized(arrays["codes"], arrays["absmax"], nested, offset, layout, path)
        if not isinstance(sharding, NamedSharding):
            return q.map(lambda x: jax.device_put(x, sharding))
        mesh = sharding.mesh
        places = q.place_spec(sharding.spec, lambda spec: NamedSharding(mesh, spec))
        return jax.tree.map(jax.device_put, q, places)


def _check_maps(path: str, codes: Any) -> None:
    known: Mapping[str, Any] = {"nested_quant_map": codebooks.dynamic_map()}
    if codes.form in PACKED:
        known = {**known, "quant_map": codebooks.four_bits(codes.form)}
    for name, numbers in codes.maps.items():
        # Machines differ in the last bit of what torch.linspace returns.
        held = np.asarray(numbers, np.float32).reshape(-1)
        same = held.shape == known[name].shape
        if not same or not np.allclose(held, known[name], rtol=1e-6, atol=0):
            raise CheckpointError(
                f"{path!r}: the file's {name} is not that of bitsandbytes' "
                f"{codes.form}.\nLoad the dense original of the checkpoint."
            )
