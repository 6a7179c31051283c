"""Which axes of a kernel are inputs, outputs and stacks: as told, surveyed or named."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from jlora._errors import ShapeError
from jlora._kernel.axes import Dims
from jlora._paths import module_of, name_of
from jlora._tree import conventions

if TYPE_CHECKING:
    from jlora._transform.survey import Survey
    from jlora._tree.targets import Target


@dataclasses.dataclass(frozen=True)
class KernelAxes:
    """A kernel's axes by what they do.

    Attributes:
      ins: those that are contracted with the input, or looked up.
      outs: those of the result.
      batch: those with a kernel for each index, layers or experts.
      is_embedding: whether it is a table that is looked up.
      is_convolution: whether it is known to be convolved with an input.
    """

    ins: Dims
    outs: Dims
    batch: Dims = ()
    is_embedding: bool = False
    is_convolution: bool = False


def kernel_axes(
    path: str, leaves: Mapping[str, Any], target: Target, survey: Survey | None,
    stacked: Collection[str],
) -> KernelAxes:  # fmt: skip
    """The axes of one kernel of a tree.

    Args:
      path: the kernel's.
      leaves: all leaves by path; those beside the kernel may tell its axes.
      target: the axes it gives come first, then those of the survey.
      survey: of the function, or None.
      stacked: the paths of leaves that are known to be stacks of layers.

    Raises:
      ShapeError: axes that do not fit the kernel, or that nothing tells.
    """
    leaf = leaves[path]
    if target.in_axes is not None:
        return _told(path, leaf, target)
    if survey is not None:
        return KernelAxes(*survey.axes(path))
    found = _named(path, leaves, stacked)
    if found is None:
        raise ShapeError(_unknown_axes(path, tuple(leaf.shape)))
    return found


def _named(
    path: str, leaves: Mapping[str, Any], stacked: Collection[str]
) -> KernelAxes | None:
    """The axes by the frameworks' names and by the leaves around the kernel."""
    ndim, name = len(leaves[path].shape), name_of(path)
    if ndim == 2:
        if name in conventions.EMBEDDING_NAMES:
            return KernelAxes((0,), (1,), is_embedding=True)
        # PyTorch and Equinox hold weights [out, in].
        return KernelAxes((1,), (0,)) if name == "weight" else KernelAxes((0,), (1,))
    if conventions.is_experts(path, ndim):
        return KernelAxes((ndim - 2,), (ndim - 1,), tuple(range(ndim - 2)))
    if ndim != 3:
        return None
    form = "stack" if path in stacked else conventions.attention_form(path, leaves)
    if form == "stack":
        return KernelAxes((1,), (2,), (0,))
    if form == "heads":
        is_out = name_of(module_of(path)) == "out"
        return KernelAxes((0, 1), (2,)) if is_out else KernelAxes((0,), (1, 2))
    return None


def _told(path: str, leaf: Any, target: Target) -> KernelAxes:
    """The axes that a target gives; axes named nowhere are outputs."""
    ndim = len(leaf.shape)
    given = (target.in_axes or (), target.out_axes or (), target.batch_axes)
    fits = all(-ndim <= d < ndim for dims in given for d in dims)
    ins, outs, batch = (tuple(d % ndim for d in dims) for dims in given)
    if target.out_axes is None:
        outs = tuple(d for d in range(ndim) if d not in (*ins, *batch))
    each_once = sorted((*ins, *outs, *batch)) == list(range(ndim))
    if not (fits and each_once and ins and outs):
        raise ShapeError(
            f"Target for {path!r} {tuple(leaf.shape)}: in_axes={target.in_axes}, "
            f"out_axes={target.out_axes}, batch_axes={target.batch_axes} do not name "
            f"each of the {ndim} axes once, with at least one input and one output."
        )
    return KernelAxes(ins, outs, batch)


# What kernels of three and four axes may be, and the targets that say so.
_FORMS = {
    3: {
        "layers [L, in, out]": "in_axes=(1,), out_axes=(2,), batch_axes=(0,)",
        "heads [in, heads, width]": "in_axes=(0,), out_axes=(1, 2)",
        "heads [heads, width, out]": "in_axes=(0, 1), out_axes=(2,)",
    },
    4: {
        "a convolution [height, width, in, out]": "in_axes=(0, 1, 2), out_axes=(3,)",
        "layers [L, in, heads, width]": (
            "in_axes=(1,), out_axes=(2, 3), batch_axes=(0,)"
        ),
    },
}
_ANY_FORM = {"any kernel": "in_axes=(...), out_axes=(...), batch_axes=(...)"}


def _unknown_axes(path: str, shape: tuple[int, ...]) -> str:
    lines = "\n".join(
        f"  targets={{{path!r}: jlora.Target({axes})}}  # {form}"
        for form, axes in _FORMS.get(len(shape), _ANY_FORM).items()
    )
    return (
        f"the kernel {path!r} {shape} has {len(shape)} axes, and neither its name nor "
        "the leaves beside it tell which are inputs.\nLet jlora read that off your "
        "function, for all kernels at once:\n"
        "  survey = jlora.survey(fn, params, *inputs)\n"
        "  params = jlora.lorafy(params, ..., survey=survey)\n"
        f"or say what it is:\n{lines}"
    )
