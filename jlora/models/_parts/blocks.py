"""The blocks of a model, one after the other: each by its number, or one scanned.

    numbered    layers/0/mlp/up_proj/kernel [i, o], layers/1/...
    scanned     layers/mlp/up_proj/kernel [L, i, o]

A scanned model is traced and compiled once for a block, however many there are. What a
block alone has (its kind, its place in the cache) is then an input with an axis of
blocks: the first one, or in the cache, whose first axis is the batch, the second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from jlora._errors import StructureError
from jlora.models._parts.attention import EINSUM, Masking, check_form
from jlora.models._parts.explicit import by_example
from jlora.models._parts.layers import Numbered, mask_bias

# Takes a block, what goes through (`x`, most often an array), the block's past keys and
# values, and what else is its own; returns `x`, and the keys and values to keep.
Step = Callable[[Any, Any, Any, Any], tuple[Any, Any]]


# The fields of `Configured`, which a part takes from its whole.
_SHARED = (
    "config",
    "dtype",
    "param_dtype",
    "scan_layers",
    "remat",
    "attn_implementation",
)


class Configured(nn.Module):
    """What the parts of every model share.

    Attributes:
      config: sizes and choices.
      dtype: what it computes in.
      param_dtype: what `init` makes parameters in.
      scan_layers: whether blocks are scanned, and their parameters stacked.
      remat: whether a block's activations are computed again in the backward pass
        rather than kept.
      attn_implementation: how whole sequences attend: `"einsum"` forms the scores;
        `"cudnn"` and `"xla"` are those of `jax.nn.dot_product_attention`. With a cache,
        in generation, all attend by einsum: the keys are more than the queries.
    """

    config: Any
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: bool = False
    attn_implementation: str = EINSUM

    def __post_init__(self) -> None:
        """Refuse a form of attention that is not known."""
        check_form(self.attn_implementation)
        super().__post_init__()

    def part(self, kind: Callable[..., Any], **fields: Any) -> Any:
        """Return a maker of `kind` with the same settings."""
        same = {name: getattr(self, name) for name in _SHARED}
        return partial(kind, **same, **fields)

    @property
    def fuses(self) -> bool:
        """Whether whole sequences attend by a fused kernel.

        `init` needs none: parameters do not depend on it, and it runs anywhere.
        """
        return self.attn_implementation != EINSUM and not self.is_initializing()

    def masking(self, **fields: Any) -> Masking:
        """Return what a fused kernel is told."""
        return Masking(implementation=self.attn_implementation, **fields)

    def masking_of(self, seen: Array | None) -> Array | Masking | None:
        """Return what hides all keys but those `seen`, `[B, 1 or T, S]`.

        By einsum it is added to the scores, `[B, 1, 1 or T, S]`.
        """
        if not self.fuses:
            return None if seen is None else mask_bias(seen)
        return self.masking(mask=seen)

    def dropping(self, drop: nn.Dropout, deterministic: bool) -> Callable[..., Any]:
        """Return the dropout of attention's probabilities.

        Raises:
          StructureError: it drops, and the probabilities are never formed.
        """
        if self.fuses and drop.rate and not deterministic:
            raise StructureError(
                f"attn_implementation={self.attn_implementation!r}: dropout of "
                f"attention's probabilities, here {drop.rate}, needs them formed.\n"
                "Set that rate to 0 in the configuration, call with "
                f"deterministic=True, or set attn_implementation={EINSUM!r}."
            )
        return partial(drop, deterministic=deterministic)

    def blocks(self, make: Sequence[Callable[..., nn.Module]]) -> nn.Module:
        """Return the blocks that are made so, or the one that is scanned."""
        return make[0]() if self.scan_layers else Numbered(tuple(make))

    def empty(self, length: int, shape: tuple[int, ...]) -> Any:
        """Return a cache of zeros: two of `shape` `[B, ...]` for each block."""
        if self.scan_layers:
            zeros = jnp.zeros((shape[0], length, *shape[1:]), self.dtype)
            return zeros, zeros
        zeros = jnp.zeros(shape, self.dtype)
        return [(zeros, zeros)] * length

    def run_blocks(
        self,
        blocks: Any,
        step: Step,
        x: Any,
        *,
        length: int,
        past: Any = None,
        own: Any = None,
    ) -> tuple[Any, Any]:
        """Return `x` after all blocks, and what they keep.

        Args:
          blocks: what `blocks` returned, or a list of parts of them.
          step: what is done with each.
          x: what goes through, an array or several.
          length: L, the number of blocks.
          past: a cache, of each block: a list, or leaves `[B, L, ...]`.
          own: what else is each block's own: a list, or leaves `[L, ...]`.

        Returns:
          `x`, and the cache with what the blocks kept. A scan without `past` keeps
          nothing.
        """
        step = _by_example(step)
        if self.remat:
            step = _remat(step, self.scan_layers)
        if self.scan_layers:
            return _scanned(blocks, step, x, length, past, own)
        kept = []
        for i, block in enumerate(_listed(blocks)):
            each = (None if every is None else every[i] for every in (past, own))
            x, new = step(block, x, *each)
            kept.append(new)
        return x, kept

    def of_each(self, blocks: Any, f: Callable[[Any], Any], *, length: int) -> Any:
        """Return `f` of every block: a list, or with leaves `[L, ...]`."""
        if not self.scan_layers:
            return [f(block) for block in _listed(blocks)]

        def body(block: Any, carry: None, _: None) -> tuple[None, Any]:
            return carry, f(block)

        return _scan(body, length)(blocks, None, None)[1]


def _by_example(step: Step) -> Step:
    """Return `step` with what comes in and goes out cut by examples, on a mesh."""

    def run(block: Any, x: Any, past: Any, own: Any) -> tuple[Any, Any]:
        x, kept = step(block, by_example(x), past, own)
        return by_example(x), kept

    return run


def _remat(step: Step, scan: bool) -> Step:
    """Return `step` with its activations computed again in the backward pass."""

    def again(block: Any, x: Any, past: Any, own: Any) -> tuple[Any, Any]:
        # What is a block's own may be no array, so it is closed over.
        inner = lambda block, x, past: step(block, x, past, own)  # noqa: E731
        # A scan's body is compiled apart: nothing can undo what `remat` does.
        return nn.remat(inner, prevent_cse=not scan)(block, x, past)

    return again


def _listed(blocks: Any) -> Sequence[nn.Module]:
    return blocks.items if isinstance(blocks, Numbered) else blocks


def _scanned(
    block: nn.Module, step: Step, x: Any, length: int, past: Any, own: Any
) -> tuple[Any, Any]:
    def body(block: Any, x: Any, past: Any, own: Any) -> tuple[Any, Any]:
        x, kept = step(block, x, past, own)
        return x, None if past is None else kept

    return _scan(body, length, in_axes=(1, 0), out_axes=1)(block, x, past, own)


def _scan(body: Callable[..., Any], length: int, **axes: Any) -> Any:
    return nn.scan(
        body,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        length=length,
        **axes,
    )


def of_kind(
    values: Mapping[str, Any], kinds: Sequence[str], scan: bool
) -> tuple[Any, Callable[[Any], Any]]:
    """Return what tells each block its kind, and what finds a kind's value.

    Args:
      values: by kind, trees of the same structure and shapes.
      kinds: of each block.
      scan: whether blocks are scanned.
    """
    if not scan:
        return kinds, lambda kind: values[kind]
    names = sorted(values)
    if len(names) == 1:
        return None, lambda _: values[names[0]]
    numbers = jnp.array([names.index(kind) for kind in kinds], jnp.int32)
    trees = [values[name] for name in names]

    def find(number: Array) -> Any:
        return jax.tree.map(lambda *xs: lax.select_n(number, *xs), *trees)

    return numbers, find
