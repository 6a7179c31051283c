"""Accelerators: what a device computes, holds and sends, as its maker says."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any

from jlora._errors import OptionError

GB = 10**9
GiB = 2**30
_T = 10**12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accelerator:
    """A kind of device, in numbers of its data sheet.

    Attributes:
      name: what it is called.
      memory: bytes.
      bandwidth: of that memory, bytes a second.
      flops: operations a second of dense products, by the operands' dtype: `"float32"`
        (as JAX multiplies them by default, which on NVIDIA's is TF32), `"bfloat16"`.
      link: bytes a second that a device sends to its neighbours of one machine, or of
        one slice of a TPU.
      network: the same between machines, a device's share.
      together: how many devices a machine, or the largest slice, has.
      usable: the part of the memory that a program gets. What is left is the driver's,
        the libraries' and lost between buffers.
    """

    name: str
    memory: float
    bandwidth: float
    flops: Mapping[str, float]
    link: float
    network: float
    together: int
    usable: float = 0.92

    def __post_init__(self) -> None:
        for field in ("memory", "bandwidth", "link", "network", "together", "usable"):
            number = getattr(self, field)
            if not isinstance(number, int | float) or not number > 0:
                raise OptionError(
                    f"Accelerator {self.name!r}: {field} is {number!r}; it must be a "
                    "number above 0."
                )
        if not self.flops or "bfloat16" not in self.flops:
            raise OptionError(
                f"Accelerator {self.name!r}: flops needs at least 'bfloat16'."
            )

    def rate(self, dtype: str) -> float:
        """Operations a second of products of that dtype; an unknown one is as slow."""
        if dtype in ("float16", "bfloat16"):
            return self.flops["bfloat16"]
        return self.flops.get(dtype, min(self.flops.values()))

    def speed(
        self, axes: tuple[str, ...], mesh: Mapping[str, int]
    ) -> tuple[str, float]:
        """The link that a collective over some axes of a mesh goes over, and its speed.

        Neighbours along the last axes are in one machine: an axis is within it if it
        and those behind it have no more devices than that.
        """
        names = list(mesh)
        first = min(names.index(axis) for axis in axes)
        span = math.prod([mesh[name] for name in names[first:]])
        within = span <= self.together
        return ("link", self.link) if within else ("network", self.network)


def _gpu(name: str, memory: float, bandwidth: float, tf32: float, bf16: float,
         link: float, network: float, together: int = 8) -> Accelerator:  # fmt: skip
    return Accelerator(
        name=name, memory=memory, bandwidth=bandwidth * _T,
        flops={"float32": tf32 * _T, "bfloat16": bf16 * _T},
        link=link * GB, network=network * GB, together=together,
    )  # fmt: skip


def _tpu(name: str, memory: float, bandwidth: float, bf16: float, ici: float,
         gigabits: float, slice_size: int) -> Accelerator:  # fmt: skip
    # Products of float32 are by default one pass in bfloat16.
    return Accelerator(
        name=name, memory=memory * GiB, bandwidth=bandwidth * GB,
        flops={"float32": bf16 * _T, "bfloat16": bf16 * _T},
        link=ici * GB, network=gigabits / 8 * GB, together=slice_size, usable=0.95,
    )  # fmt: skip


#: The accelerators that a plan knows by name; see `jlora.plan` for where the numbers
#: come from.
ACCELERATORS: Mapping[str, Accelerator] = {
    each.name: each
    for each in (
        _gpu("a100-40", 40 * GiB, 1.555, 156, 312, 300, 25),
        _gpu("a100-80", 80 * GiB, 2.039, 156, 312, 300, 25),
        _gpu("h100", 80 * GiB, 3.35, 494.7, 989.4, 450, 50),
        _gpu("h200", 141 * GB, 4.8, 494.7, 989.4, 450, 50),
        _gpu("b200", 180 * GB, 7.7, 1125, 2250, 900, 50),
        _gpu("l4", 24 * GB, 0.3, 60, 121, 32, 12.5),
        _tpu("v5e", 16, 819, 197, 200, 25, 256),
        _tpu("v5p", 95, 2765, 459, 600, 50, 8960),
        _tpu("v6e", 32, 1640, 918, 400, 100, 256),
    )
}
_ALSO = {"a100": "a100-80", "h100-sxm": "h100", "v6": "v6e"}


def accelerator(given: Any) -> Accelerator:
    """Return an accelerator by its name, or the one that is given.

    >>> accelerator("H100").memory / 2**30
    80.0
    """
    if isinstance(given, Accelerator):
        return given
    name = str(given).lower().removeprefix("tpu-").removeprefix("tpu")
    name = _ALSO.get(name, name)
    if name in ACCELERATORS:
        return ACCELERATORS[name]
    near = difflib.get_close_matches(name, ACCELERATORS, 1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise OptionError(
        f"devices={given!r}: no such accelerator; there are {', '.join(ACCELERATORS)}."
        f"\n{hint}Another one is a jlora.Accelerator of its data sheet's numbers."
    )
