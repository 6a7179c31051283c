"""The parts of one kernel's adapter of another form: their shapes, and how they start.

`_kernel.forms` makes factors of them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._errors import OptionError, ShapeError
from jlora._kernel.adapter import PARTS, Adapter, adapter_of_parts
from jlora._kernel.axes import RANK, Dims
from jlora._kernel.forms import (
    INNER_IN,
    INNER_OUT,
    OUTER_IN,
    OUTER_OUT,
    halves,
    rank_of,
)
from jlora._kernel.placement import placed_adapter
from jlora._paths import name_of as last_of
from jlora._tree.kernel_axes import KernelAxes
from jlora._tree.variants import AdaLoRA, Form, LoHa, LoKr, VeRA, name_of

Parts = dict[str, jax.ShapeDtypeStruct]
AllDims = dict[str, Dims]


def variant_adapter(
    path: str, leaf: Any, axes: KernelAxes, shape: Sequence[int], form: Form,
    rank: Any, alpha: float | None, key: Any, dtype: Any, projections: Projections,
    any_rank: bool = False, **layout: Any,
) -> Adapter:  # fmt: skip
    """An adapter of another form on a kernel; abstract on an abstract one.

    Args:
      path: the kernel's.
      leaf: the kernel.
      axes: its axes.
      shape: of the adapter's window of it.
      form: the variant.
      rank: r.
      alpha: the scale is alpha/r.
      key: for what starts at random.
      dtype: of the parts.
      projections: VeRA's, which have room for this kernel.
      any_rank: take ranks that cost more than a dense update too, a file's.
      **layout: the window's starts, the dropout, the role.

    Raises:
      ShapeError: as `parts_of`.
    """
    window = window_of(path, axes)
    parts, dims = parts_of(form, path, axes, shape, rank, dtype, window, any_rank)
    batch = tuple(shape[d] for d in axes.batch)
    adapter = adapter_of_parts(
        name_of(form), parts, dims, jax.ShapeDtypeStruct(batch, jnp.float32),
        batch=axes.batch, ins=axes.ins, outs=axes.outs, **layout,
    )  # fmt: skip
    abstract = placed_adapter(adapter, leaf)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return abstract
    places = abstract.parts or {}
    free = {n: x for n, x in places.items() if PARTS[n] != "frozen"}
    kept = {}
    if isinstance(form, VeRA):
        given = [(n, x) for n, x in places.items() if n not in free]
        kept = {n: projections.cut(form, rank, n, x) for n, x in given}
    scale = 1.0 if alpha is None else alpha / rank

    def make(key: Any) -> tuple[Any, Any]:
        return start(form, key, free, axes), jnp.full(batch, scale, jnp.float32)

    shardings = {n: x.sharding for n, x in free.items()}, abstract.scale.sharding
    if abstract.scale.sharding is not None:
        make = jax.jit(make, out_shardings=shardings)
    own, scales = make(key)
    return dataclasses.replace(adapter, parts={**kept, **own}, scale=scales)


def check_settings(
    path: str, form: Form, init: Any, alpha: float | None, **switches: bool
) -> None:
    """Refuse settings that are of LoRA alone.

    Raises:
      OptionError: there is one.
    """
    told = [f"{name}=True" for name, on in switches.items() if on]
    told += [f"init={init!r}"] if init != "default" else []
    if isinstance(form, VeRA) and alpha is not None:
        told.append(f"alpha={alpha}")
    if told:
        raise OptionError(
            f"{told[0]} for {path!r}, whose variant is {type(form).__name__}: that is "
            "a setting of LoRA, which this form of the update does not have.\nLeave "
            "one of the two out."
        )


def window_of(path: str, axes: KernelAxes) -> Dims:
    """The input axes of a convolution that are its window, and not its channels.

    Flax, Haiku and jax.numpy hold kernels `[*window, in, out]`, PyTorch and Equinox
    `[out, in, *window]`, as `weight`.
    """
    if not axes.is_convolution and len(axes.ins) < 3:
        return ()
    last = sorted(axes.ins)
    return tuple(last[1:] if last_of(path) == "weight" else last[:-1])


def parts_of(
    form: Form, path: str, axes: KernelAxes, shape: Sequence[int], rank: int,
    dtype: Any, window: Dims = (), any_rank: bool = False,
) -> tuple[Parts, AllDims]:  # fmt: skip
    """The shapes of a variant's parts, and the dimensions that they lie along.

    Args:
      form: the variant.
      path: the kernel's, for messages.
      axes: the kernel's axes.
      shape: of the kernel, or of the adapter's window of it.
      rank: r.
      dtype: of the parts.
      window: the input axes that are a convolution's window.
      any_rank: as of `variant_adapter`.

    Raises:
      ShapeError: a kernel or a rank that the variant has no low-rank form for.
    """
    sizes = {**dict(enumerate(shape)), RANK: rank}
    a, b = (*axes.batch, *axes.ins, RANK), (*axes.batch, RANK, *axes.outs)
    if isinstance(form, VeRA):
        _refuse_table(path, axes, shape)
        dims = {
            "proj_a": (*axes.ins, RANK), "proj_b": (RANK, *axes.outs),
            "lambda_d": (*axes.batch, RANK), "lambda_b": (*axes.batch, *axes.outs),
        }  # fmt: skip
    elif isinstance(form, LoHa):
        dims = {"a1": a, "b1": b, "a2": a, "b2": b}
    elif isinstance(form, AdaLoRA):
        dims = {"a": a, "e": (*axes.batch, RANK), "b": b}
    else:
        sizes |= _divided(form, axes, shape, window)
        dims = _lokr_dims(form, axes, rank, sizes, window)
    parts = {
        n: jax.ShapeDtypeStruct(tuple(sizes[d] for d in ds), dtype)
        for n, ds in dims.items()
    }
    whole = rank_of(name_of(form), parts, dims)
    _check_rank(form, path, axes, shape, rank, sizes, whole, any_rank)
    return parts, dims


def _refuse_table(path: str, axes: KernelAxes, shape: Sequence[int]) -> None:
    if axes.is_embedding:
        raise ShapeError(
            f"the table {path!r} {tuple(shape)} is looked up, and VeRA's projections "
            "would be as long as the vocabulary.\nGive it a form of its own: "
            "targets={pattern: jlora.Target(variant='lora')}."
        )


def _divided(
    form: LoKr, axes: KernelAxes, shape: Sequence[int], window: Dims
) -> dict[int, int]:
    """The sizes of LoKr's axes: all inputs but a convolution's window are divided."""
    ins = math.prod(shape[d] for d in axes.ins if d not in window)
    outs = math.prod(shape[d] for d in axes.outs)
    outer_in, inner_in = halves(ins, form.factor)
    outer_out, inner_out = halves(outs, form.factor)
    return {
        OUTER_IN: outer_in, INNER_IN: inner_in, OUTER_OUT: outer_out,
        INNER_OUT: inner_out,
    }  # fmt: skip


def _lokr_dims(
    form: LoKr, axes: KernelAxes, rank: int, sizes: Mapping[int, int], window: Dims
) -> AllDims:
    dims = {
        "a2": (*axes.batch, *window, INNER_IN, RANK),
        "b2": (*axes.batch, RANK, INNER_OUT),
    }
    if form.decompose_both and rank < max(sizes[OUTER_IN], sizes[OUTER_OUT]) / 2:
        dims["a1"] = (*axes.batch, OUTER_IN, RANK)
        dims["b1"] = (*axes.batch, RANK, OUTER_OUT)
    else:  # as PEFT does
        dims["w1"] = (*axes.batch, OUTER_IN, OUTER_OUT)
    return dims


def _check_rank(
    form: Form, path: str, axes: KernelAxes, shape: Sequence[int], rank: int,
    sizes: Mapping[int, int], whole: int, any_rank: bool,
) -> None:  # fmt: skip
    """Refuse what is no low-rank update."""
    ins, outs = (math.prod(shape[d] for d in dims) for dims in (axes.ins, axes.outs))
    most = min(ins, outs)
    too_high = whole > most and not any_rank
    kernel = f"the kernel {path!r}, which maps {ins} inputs to {outs} outputs"
    if rank < 1:
        raise ShapeError(f"rank={rank} for {kernel}.\nPass a whole number from 1 on.")
    if isinstance(form, AdaLoRA) and rank > most:
        raise ShapeError(f"rank={rank} for {kernel}.\nPass one from 1 to {most}.")
    if isinstance(form, LoHa) and too_high:
        raise ShapeError(
            f"rank={rank} for {kernel}: LoHa's update has rank {rank}² = {whole} "
            f"there.\nPass a rank from 1 to {math.isqrt(most)}."
        )
    if not isinstance(form, LoKr):
        return
    inner = max(sizes[INNER_IN], sizes[INNER_OUT])
    if 2 * rank >= inner or too_high:
        outer = whole // rank
        raise ShapeError(
            f"rank={rank} for {kernel}: as LoKr of {sizes[OUTER_IN]}x"
            f"{sizes[OUTER_OUT]} and {sizes[INNER_IN]}x{sizes[INNER_OUT]} its update "
            f"has rank {outer}·{rank} = {whole}, and no form that is smaller than the "
            f"kernel.\nPass a rank below {min((inner + 1) // 2, most // outer + 1)}, "
            "or a smaller first matrix: jlora.LoKr(factor=2), "
            "jlora.LoKr(decompose_both=True)."
        )


# -- how parts start -------------------------------------------------------------------


def start(
    form: Form, key: Any, parts: Mapping[str, Any], axes: KernelAxes
) -> dict[str, Any]:
    """The trained parts' first values; the update is zero.

    Source: PEFT's `reset_adapter_parameters` of each, whose uniform distributions have
    the bound 1/sqrt(fan_in) of the matrices that PEFT holds, [out, r] and [r, in].
    """
    if isinstance(form, VeRA):
        d, b = parts["lambda_d"], parts["lambda_b"]
        return {
            "lambda_d": jnp.full(d.shape, form.d_initial, d.dtype),
            "lambda_b": jnp.zeros(b.shape, b.dtype),
        }
    if isinstance(form, AdaLoRA):
        return {
            n: 0.02 * jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
            if n != "e"
            else jnp.zeros(x.shape, x.dtype)
            for i, (n, x) in enumerate(sorted(parts.items()))
        }
    zero = "a2" if isinstance(form, LoHa) else "w1" if "w1" in parts else "b1"
    out = {}
    for number, (name, x) in enumerate(sorted(parts.items())):
        if name == zero:
            out[name] = jnp.zeros(x.shape, x.dtype)
            continue
        own = x.shape[len(axes.batch) :]
        bound = 1 / math.sqrt(math.prod(own[:-1]) if name[0] == "a" else own[0])
        own_key = jax.random.fold_in(key, number)
        out[name] = jax.random.uniform(own_key, x.shape, x.dtype, -bound, bound)
    return out


class Projections:
    """VeRA's random pairs of one `lorafy` call, one for each seed and rank.

    Each kernel has the first rows of A and columns of B; those of one size are one
    array.
    """

    def __init__(self) -> None:
        self._widest: dict[tuple[int, int], tuple[int, int]] = {}
        self._cuts: dict[Any, Any] = {}

    def widen(
        self, form: VeRA, rank: Any, axes: KernelAxes, shape: Sequence[int]
    ) -> None:
        """Make room for a kernel of that shape."""
        ins = math.prod(shape[d] for d in axes.ins)
        outs = math.prod(shape[d] for d in axes.outs)
        most = self._widest.get((form.seed, rank), (0, 0))
        self._widest[form.seed, rank] = max(ins, most[0]), max(outs, most[1])

    def cut(self, form: VeRA, rank: int, name: str, like: Any) -> jax.Array:
        """What a kernel has of one projection, of the shape and sharding of `like`."""
        place = (form.seed, rank, name, like.shape, like.dtype, like.sharding)
        if place not in self._cuts:
            whole = projections(form.seed, rank, *self._widest[form.seed, rank])
            values = cut(whole, name, like.shape).astype(like.dtype)
            self._cuts[place] = put(values, like.sharding)
        return self._cuts[place]


def cut(
    whole: tuple[np.ndarray, np.ndarray], name: str, shape: Sequence[int]
) -> np.ndarray:
    """The part of a pair that a kernel has: `[*in, r]` of A, `[r, *out]` of B."""
    a, b = whole
    if name == "proj_a":
        return a[: math.prod(shape[:-1])].reshape(shape)
    return b[:, : math.prod(shape[1:])].reshape(shape)


def put(values: np.ndarray, sharding: Any) -> jax.Array:
    """Values as an array, on a mesh if that is where the sharding is."""
    values = np.ascontiguousarray(values)
    return jnp.asarray(values) if sharding is None else jax.device_put(values, sharding)


@functools.lru_cache(maxsize=2)
def projections(
    seed: int, rank: int, ins: int, outs: int
) -> tuple[np.ndarray, np.ndarray]:
    """A `[ins, r]` and B `[r, outs]` as PEFT makes them of a `projection_prng_key`.

    Both uniform, A within ±sqrt(6/ins) and B within ±sqrt(6/r). PyTorch's generator is
    the Mersenne twister, of whose numbers it takes the last 24 bits.

    Source: PEFT's `VeraModel._init_vera_A_vera_B`; PyTorch's
    `uniform_real_distribution`.
    """
    twister = np.random.RandomState(seed % 2**32)

    def uniform(shape: tuple[int, int], fan_in: int) -> np.ndarray:
        bound = math.sqrt(3) * (math.sqrt(2) / math.sqrt(fan_in))
        low, high = np.float32(-bound), np.float32(bound)
        raw = np.frombuffer(twister.bytes(4 * math.prod(shape)), "<u4") & 0xFFFFFF
        unit = raw.astype(np.float32) * np.float32(2.0**-24)
        # PyTorch rounds once.
        values = unit.astype(np.float64) * (high - low) + low
        return values.astype(np.float32).reshape(shape)

    a, b = uniform((rank, ins), ins), uniform((outs, rank), rank)
    return np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
