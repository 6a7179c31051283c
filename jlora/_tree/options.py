"""The arguments of `lorafy`: what they may be, and PEFT's words for them."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._errors import DtypeError, OptionError, ShapeError, TargetError

# PEFT's names of what is called otherwise here.
_PEFT_WORDS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "target_parameters": "targets",
    "exclude_modules": "exclude",
    "modules_to_save": "train",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "init_lora_weights": "init",
    "trainable_token_indices": "trainable_tokens",
    "rank_pattern": "targets={pattern: jlora.Target(rank=...)}",
    "alpha_pattern": "targets={pattern: jlora.Target(alpha=...)}",
    "layers_to_transform": "targets, with the layers' numbers in its entries",
    "layers_pattern": "targets, with the layers' numbers in its entries",
    "seed": "key=jax.random.key(...)",
}


def refuse_unknown(function: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Refuse arguments of unknown names; those of PEFT's are told ours.

    Raises:
      OptionError: there is one.
    """
    lines = []
    for name in (name for name in given if name not in known):
        ours = _PEFT_WORDS.get(name)
        if ours is not None and ours.partition("=")[0].partition(",")[0] in known:
            lines.append(f"  {name} is {ours} here")
        elif near := difflib.get_close_matches(name, known, 1):
            lines.append(f"  {name}: did you mean {near[0]}?")
        else:
            lines.append(f"  {name}")
    if lines:
        told = "\n".join(lines)
        raise OptionError(
            f"{function} has no such argument:\n{told}\nIt takes {', '.join(known)}."
        )


def whole_rank(rank: Any) -> int:
    """A rank as a Python integer.

    Raises:
      ShapeError: it is no whole number. Which ones fit depends on the kernel.
    """
    try:
        if not isinstance(rank, bool | np.bool_):
            return operator.index(rank)
    except TypeError:
        pass
    raise ShapeError(
        f"rank={rank!r}: expected a whole number, 1 or more, of an integer type."
    )


def positive_alpha(alpha: Any) -> Any:
    """An alpha as a Python float; a traced one as it is.

    Raises:
      OptionError: it is no positive, finite number.
    """
    if isinstance(alpha, jax.core.Tracer):
        return alpha
    number = _number(alpha)
    if not (0 < number < math.inf):
        raise OptionError(
            f"alpha={alpha!r}: expected a finite number above 0, or None for the rank."
        )
    return number


def probability(dropout: Any) -> float:
    """A dropout rate as a Python float.

    Raises:
      OptionError: it is not within [0, 1).
    """
    number = _number(dropout)
    if not 0 <= number < 1:
        raise OptionError(f"dropout={dropout!r}: expected a probability, in [0, 1).")
    return number


def _number(x: Any) -> float:
    """A scalar as a float, NaN where it is none."""
    if isinstance(x, bool | np.bool_ | str) or np.ndim(x):
        return math.nan
    try:
        return float(x)
    except (TypeError, ValueError):
        return math.nan


def floating(dtype: Any) -> np.dtype | None:
    """A dtype of floating-point numbers, or None where it is none."""
    try:
        found = None if dtype is None else jnp.dtype(dtype)
    except TypeError:
        return None
    return found if found is not None and jnp.issubdtype(found, jnp.floating) else None


def factor_dtype(dtype: Any) -> np.dtype:
    """A dtype that factors can have.

    Raises:
      DtypeError: it is none of floating point, or not enabled in JAX.
    """
    found = floating(dtype)
    if found is None:
        raise DtypeError(
            f"dtype={dtype!r}: expected a floating-point dtype for the factors, "
            "jnp.float32 or jnp.bfloat16."
        )
    if jax.dtypes.canonicalize_dtype(found) != found:
        raise DtypeError(
            f"dtype={found}: JAX makes arrays of 64 bits only after "
            'jax.config.update("jax_enable_x64", True).'
        )
    return found


def single_key(key: Any) -> jax.Array:
    """A PRNG key, typed or raw; `None` is `jax.random.key(0)`.

    Raises:
      OptionError: it is no single key.
    """
    if key is None:
        return jax.random.key(0)
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    raw = not typed and dtype == np.uint32
    if not (typed and shape == ()) and not (raw and shape in ((2,), (4,))):
        kind = f"{dtype}{list(shape or ())}" if dtype is not None else repr(key)
        raise OptionError(
            f"key={kind}: expected one PRNG key, jax.random.key(0), or None."
        )
    return key


def one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Refuse a word that is not among those allowed.

    Raises:
      OptionError: it is not.
    """
    if not isinstance(value, str) or value not in allowed:
        words = ", ".join(map(repr, allowed[:-1]))
        raise OptionError(f"{name}={value!r}: expected {words} or {allowed[-1]!r}.")


def flags(**values: Any) -> None:
    """Refuse what is neither True nor False.

    Raises:
      OptionError: one is not.
    """
    for name, value in values.items():
        if not isinstance(value, bool | np.bool_):
            raise OptionError(f"{name}={value!r}: expected True or False.")


def axis_tuple(name: str, axes: Any) -> tuple[int, ...]:
    """Axes as a tuple; a single one may be given as a number.

    Raises:
      OptionError: they are no whole numbers.
    """
    try:
        alone = not isinstance(axes, Iterable)
        return tuple(map(operator.index, (axes,) if alone else axes))
    except TypeError:
        raise OptionError(
            f"{name}={axes!r}: expected a tuple of whole numbers, such as (0,)."
        ) from None


def entry_list(argument: str, entries: Any) -> list[str]:
    """A list of entries, of any collection of strings; `None` is empty.

    Raises:
      TargetError: it is a string, or holds something else.
    """
    if isinstance(entries, str):
        raise TargetError(f"{argument}={entries!r}: pass a list, [{entries!r}].")
    if entries is None:
        return []
    if not isinstance(entries, Iterable) or hasattr(entries, "dtype"):
        raise TargetError(f"{argument}={entries!r}: expected a list of strings.")
    # A set has no order, and the order of entries may decide.
    found = sorted(entries, key=str) if isinstance(entries, set) else list(entries)
    for entry in found:
        if not isinstance(entry, str) or not entry.strip("./ "):
            raise TargetError(
                f"{argument}: {entry!r} is no entry; expected names in the paths of "
                "leaves, such as 'query' or 'attention/out'."
            )
    return found


def token_lists(tokens: Any) -> dict[str, tuple[int, ...]]:
    """Rows to train, by entry; `None` is none.

    Raises:
      OptionError: it is no such mapping.
    """
    if tokens is None:
        return {}
    if isinstance(tokens, Mapping):
        entry_list("trainable_tokens", list(tokens))
        try:
            return {k: tuple(map(operator.index, rows)) for k, rows in tokens.items()}
        except TypeError:
            pass
    raise OptionError(
        f"trainable_tokens={tokens!r}: expected the rows of each table, "
        "{'embedding': [100, 101]}."
    )
