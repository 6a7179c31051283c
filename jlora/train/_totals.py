"""What a loss or metric function returns, as totals and counts that add up exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jlora._errors import StructureError
from jlora._transform.lora import lora
from jlora._transform.replay import OnMissing

Tree = Any
Metrics = dict[str, Array]
# A metric is `total / count`; both are summed over microbatches, devices and batches.
Totals = dict[str, tuple[Array, Array]]

RESERVED = ("loss", "grad_norm", "nonfinite")


def totals_fn(fn: Callable[..., Any], on_missing: OnMissing) -> Callable[..., Totals]:
    """A user's loss function, over lorafied parameters, as named totals."""

    def totals(params: Tree, batch: Any, key: Array) -> Totals:
        return _read_loss(fn(params, batch, key))

    return lora(totals, on_missing=on_missing)


def _read_loss(out: Any) -> Totals:
    with_metrics = isinstance(out, tuple) and len(out) == 2
    with_metrics = with_metrics and isinstance(out[1], Mapping)
    loss, metrics = out if with_metrics else (out, {})
    weight = metrics.get("weight", 1.0)
    if isinstance(loss, tuple) and "weight" in metrics:
        raise StructureError(
            'the loss function returns a pair (total, count) and metrics["weight"].\n'
            "One of the two says what the loss is a mean over: leave the other out."
        )
    totals = {"loss": pair("loss", loss, weight)}
    weight = totals["loss"][1]
    for name, value in metrics.items():
        if name in RESERVED:
            raise StructureError(
                f"the loss function returns a metric named {name!r}, which the step "
                "itself reports.\nGive it another name."
            )
        if name != "weight":
            totals[name] = pair(name, value, weight)
    return totals


def pair(name: str, value: Any, weight: Any) -> tuple[Array, Array]:
    """`(total, count)` in float32 at least, of a pair or of a mean and its weight."""
    is_pair = isinstance(value, tuple) and len(value) == 2
    one, two = value if is_pair else (value, weight)
    try:
        one, two = (_number(x) for x in (one, two))
    except (TypeError, ValueError) as error:
        raise StructureError(_no_metric(name, value)) from error
    if one.shape or two.shape:
        raise StructureError(_no_metric(name, value))
    two = lax.stop_gradient(two).astype(one.dtype)
    return (one if is_pair else one * two), two


def _number(x: Any) -> Array:
    return jnp.asarray(x, accumulation_dtype(getattr(x, "dtype", jnp.float32)))


def accumulation_dtype(dtype: Any) -> Any:
    """What values of a dtype are summed in: float32, or wider where they are."""
    # Not by promotion, which users may have made strict.
    dtype = jnp.dtype(dtype)
    is_wide = jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize >= 4
    return dtype if is_wide else jnp.dtype(jnp.float32)


def _no_metric(name: str, value: Any) -> str:
    kind = jax.tree.map(lambda x: str(getattr(x, "shape", type(x).__name__)), value)
    return (
        f"the loss function's {name!r} is {kind}; it is a scalar (a mean over the "
        "batch) or a pair of scalars (total, count).\nReturn loss or (loss, metrics), "
        "metrics a dict."
    )


def means(totals: Totals) -> Metrics:
    """Each total over its count."""
    return {name: total / nonzero(count) for name, (total, count) in totals.items()}


def nonzero(count: Array) -> Array:
    """Nothing counted is a mean of 0 and a gradient of 0, not a NaN in the weights."""
    return jnp.where(count == 0, jnp.ones_like(count), count)
