"""How a kernel's codes lie: which of its axes are rows, and what a block is."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from jlora._errors import OptionError, ShapeError
from jlora._kernel.nodes import LowRank
from jlora._kernel.quantized import PACKED, Layout
from jlora._paths import name_of
from jlora._tree.conventions import EMBEDDING_NAMES
from jlora._tree.kernel_axes import KernelAxes, kernel_axes
from jlora._tree.targets import Target

if TYPE_CHECKING:
    from jlora._transform.survey import Survey

BLOCK = 64  # bitsandbytes' default


def checked_block(form: str, block: Any) -> int | None:
    """The block of a form; None for those with a statistic a row.

    Raises:
      OptionError: a block that cannot be, or that the form has none of.
    """
    if form not in PACKED:
        if block is not None:
            raise OptionError(
                f"block={block!r} with {form!r}: there a row of the kernel, all that "
                "makes one output, has one scale.\nLeave it out; nf4 and fp4 have "
                "blocks."
            )
        return None
    if block is None:
        return BLOCK
    whole = isinstance(block, int) and not isinstance(block, bool)
    if not whole or block < 2 or block % 2:
        raise OptionError(
            f"block={block!r}: expected an even number of weights, 64 say (the "
            "default), or None."
        )
    return block


def axes_of(
    path: str, node: Any, leaves: Mapping[str, Any], target: Target,
    survey: Survey | None, stacked: Collection[str],
) -> KernelAxes:  # fmt: skip
    """A kernel's axes: those that its adapter was factored for, or as `lorafy` would.

    Raises:
      ShapeError: axes that do not fit the kernel, that nothing tells, or of which a
        stack's do not lead.
    """
    terms = list(node.adapters.values()) if isinstance(node, LowRank) else []
    if terms and target.in_axes is None:
        t, is_table = terms[0], name_of(path) in EMBEDDING_NAMES
        axes = KernelAxes(t.in_axes, t.out_axes, t.batch_axes, is_table)
    else:
        axes = kernel_axes(path, leaves, target, survey, stacked)
    if sorted(axes.batch) != list(range(len(axes.batch))):
        raise ShapeError(
            f"the kernel {path!r} {tuple(leaves[path].shape)} is a stack along its "
            f"axes {axes.batch}, and codes are sliced along the first.\nMove the "
            "stack's axis to the front, or leave the kernel out with exclude=[...]."
        )
    return axes


def layout_of(
    path: str, shape: Sequence[int], dtype: Any, axes: KernelAxes, form: str,
    block: int | None,
) -> Layout:  # fmt: skip
    """The layout of a kernel's codes.

    A row is what PyTorch's weight has in one: all inputs of an output, and of a table
    of embeddings a token's.

    Raises:
      ShapeError: the block does not divide a row.
    """
    row_axes, col_axes = axes.outs, axes.ins
    if axes.is_embedding:
        row_axes, col_axes = col_axes, row_axes
    rows, cols = (tuple(d - len(shape) for d in dims) for dims in (row_axes, col_axes))
    width = math.prod(shape[d] for d in cols)
    if block is not None and width % block:
        fits = max((2**n for n in range(1, 13) if width % 2**n == 0), default=None)
        remedy = f"block={min(fits, BLOCK)} fits it" if fits else "no even block fits"
        raise ShapeError(
            f"the kernel {path!r} {tuple(shape)} has rows of {width} weights, which "
            f"blocks of {block} do not divide.\nFor this one {remedy}; or leave it "
            "out with exclude=[...], or take 'int8', which has no blocks."
        )
    sizes = (0, *(shape[d] for d in cols[1:]))
    return Layout(form, jnp.dtype(dtype), block, rows, cols, sizes)
