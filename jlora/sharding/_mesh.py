"""Meshes by name: `data=2,fsdp=2,tensor=2`."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from jlora._errors import OptionError

#: The axes that the layouts know, and what each of them cuts.
AXES = {
    "data": "the batch",
    "fsdp": "the batch, and each kernel along one side",
    "tensor": "heads, hidden units and the vocabulary",
    "sequence": "the tokens of each text",
    "expert": "the experts of a mixture",
}
DATA_AXES = ("data", "fsdp")  # those that cut the batch


def make_mesh(
    sizes: str | Mapping[str, int],
    *,
    devices: Sequence[jax.Device] | None = None,
    names: Sequence[str] = (),
    explicit: bool = False,
) -> Mesh:
    """A mesh of devices, by the names and sizes of its axes.

    JAX chooses which device stands where (`jax.make_mesh`): neighbours along the last
    axis have the fastest links, so `tensor` belongs there.

    Args:
      sizes: `"data=2,fsdp=4"`, or the same as a mapping. One size may be -1: all
        devices that the others leave. The axes are `data`, `fsdp`, `tensor`,
        `sequence` and `expert`.
      devices: the devices; None is `jax.devices()`, of all processes. Fewer than these
        are asked for by `devices=jax.devices()[:4]`.
      names: further axes, which rules of your own speak of.
      explicit: whether shardings are part of the arrays' types, as `jax.make_mesh` has
        it; otherwise XLA chooses those of what lies between parameters and batch.

    Raises:
      OptionError: sizes that are none, an axis that is unknown or stands twice, or
        another number of devices.

    >>> make_mesh("data=-1,tensor=1").axis_names
    ('data', 'tensor')
    """
    axes = parsed(sizes)
    for name in axes:
        check_name(name, [*AXES, *names])
    devices = list(jax.devices() if devices is None else devices)
    shape = _filled(axes, len(devices))
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return jax.make_mesh(
        tuple(shape.values()),
        tuple(shape),
        axis_types=(kind,) * len(shape),
        devices=devices,
    )


def describe(mesh: Mesh) -> str:
    """A mesh as `make_mesh` reads it.

    >>> describe(make_mesh("data=1,fsdp=-1", devices=jax.devices()[:1]))
    'data=1,fsdp=1'
    """
    return ",".join(f"{name}={size}" for name, size in mesh.shape.items())


def parsed(sizes: Any) -> dict[str, int]:
    """The sizes of axes by name; -1 stays as it is."""
    if isinstance(sizes, Mapping):
        pairs = list(sizes.items())
    elif isinstance(sizes, str):
        parts = (part.partition("=") for part in sizes.split(",") if part.strip())
        pairs = [(name.strip(), _number(size, sizes)) for name, _, size in parts]
    else:
        pairs = []
    axes, said = dict(pairs), [name for name, _ in pairs]
    if twice := next((name for name in said if said.count(name) > 1), None):
        raise OptionError(
            f"mesh {sizes!r}: the axis {twice!r} stands there twice.\nGive each axis "
            "one size."
        )
    if not axes:
        raise OptionError(
            f"mesh {sizes!r}: no axis.\nWrite names and sizes, 'data=2,fsdp=4' say."
        )
    for name, size in axes.items():
        whole = isinstance(size, int) and not isinstance(size, bool)
        if not whole or (size < 1 and size != -1):
            raise OptionError(
                f"mesh {sizes!r}: the axis {name!r} has the size {size!r}.\nA size is "
                "a number from 1 on; -1, for one axis, is all devices that are left."
            )
    return axes


def _number(text: str, sizes: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise OptionError(
            f"mesh {sizes!r}: {text.strip()!r} is no size.\nWrite names and sizes, "
            "'data=2,fsdp=4' say."
        ) from None


def check_name(name: str, known: Sequence[str]) -> None:
    """Refuse the name of an axis that nobody knows."""
    if name in known:
        return
    near = difflib.get_close_matches(name, known, 1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise OptionError(
        f"mesh: there is no axis {name!r}; there are {', '.join(known)}.\n{hint}An "
        f"axis that rules of your own speak of is named too: names=[{name!r}]."
    )


def _filled(axes: Mapping[str, int], count: int) -> dict[str, int]:
    """The sizes with -1 replaced; their product is the number of devices."""
    open_axes = [name for name, size in axes.items() if size == -1]
    product = math.prod(size for size in axes.values() if size != -1)
    said = ", ".join(f"{name}={size}" for name, size in axes.items())
    if len(open_axes) > 1:
        raise OptionError(
            f"mesh {said}: {' and '.join(open_axes)} are both -1.\nOne axis may take "
            "the devices that are left."
        )
    if open_axes and count % product == 0:
        return {name: count // product if n == -1 else n for name, n in axes.items()}
    if not open_axes and product == count:
        return dict(axes)
    what = "asks for a multiple of" if open_axes else "asks for"
    remedy = (
        f"Take fewer of them, devices=jax.devices()[:{product}], or give one axis "
        "the size -1."
        if product < count and not open_axes
        else "On a CPU more are faked by XLA_FLAGS=--xla_force_host_platform_device_"
        f"count={product}."
    )
    raise OptionError(
        f"mesh {said}: it {what} {product} device{'s' * (product != 1)}, and there "
        f"{'is' if count == 1 else 'are'} {count}.\n{remedy}"
    )
