"""`quantize` and `dequantize`: frozen kernels of a tree in 8 or 4 bits, and back."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Never

import jax
from jax.sharding import NamedSharding

from jlora._errors import ShapeError, TargetError
from jlora._kernel.encode import encode
from jlora._kernel.nodes import Full, LowRank, Rows, is_array, is_node
from jlora._kernel.placement import sharding_of
from jlora._kernel.quantized import FORMS, Layout, Quantized, dense, is_abstract
from jlora._paths import Tree, leaves_by_path, map_with_path
from jlora._tree import conventions, options
from jlora._tree.targets import Targets, check_float, check_survey, kernels
from jlora.quant._layouts import axes_of, checked_block, layout_of

if TYPE_CHECKING:
    from jlora._transform.survey import Survey


def quantize(
    params: Tree,
    form: str,
    *,
    block: int | None = None,
    double: bool = True,
    targets: Targets = "all-linear",
    exclude: Sequence[str] = (),
    survey: Survey | None = None,
    **unknown: Never,
) -> Tree:
    """Put the chosen kernels into 8 or 4 bits; they are frozen, adapters train on them.

    Before `lorafy` or after it: the base of a low-rank node is quantised in its place.
    Use the tree through `jlora.lora`, as any with nodes. A kernel is dense for one
    operation at a time and again in its backward pass; a scanned stack is dense a layer
    at a time.

    Args:
      params: a tree of arrays, shapes or sharded arrays, plain or lorafied.
      form: `"int8"`, a scale for all weights of an output (LLM.int8); `"nf4"`, 4 bits
        with the quantiles of a normal distribution and a scale for each block (QLoRA);
        `"fp4"`, the same with a floating-point number of 4 bits; `"fp8"`, float8_e4m3fn
        with a scale for each output.
      block: how many weights of a row share a scale, of nf4 and fp4; None is 64.
      double: quantise the scales of blocks too, to 8 bits in blocks of 256. int8 and
        fp8 have few scales, and keep them.
      targets: which kernels, as of `lorafy`. `"all-linear"` are all kernels of matrix
        products by name, a head too that has a kernel of its own; tables of embeddings
        have to be named. Of a `Target` only the axes are read.
      exclude: entries of leaves to leave as they are, `["lm_head"]` say.
      survey: from `jlora.survey`; makes targets and axes exact.
      **unknown: there are no others.

    Returns:
      The tree, with a `Quantized` in the place of each chosen kernel or base. Codes and
      scales of a sharded kernel are sharded along.

    Raises:
      TargetError: an entry hits nothing, a leaf that is trained, or what is quantised
        already.
      ShapeError: a block that does not divide a kernel's rows, or a device's part of
        them; unknown axes.
      DtypeError: a kernel that is not of floating point.
      OptionError: a form that is unknown, or another argument that cannot be.

    Source: Dettmers et al. 2022, arXiv:2208.07339; 2023, arXiv:2305.14314. Codes and
    scales are those of bitsandbytes, to the bit but for the order in which the offset
    of double quantisation is summed.

    >>> params = {"q": {"kernel": jnp.ones((64, 6))}}
    >>> quantize(params, "nf4")["q"]["kernel"]
    Quantized('q/kernel', nf4 of float32[64, 6], block 64, double)
    """
    options.refuse_unknown("jlora.quantize", unknown, _ARGUMENTS)
    options.one_of("form", form, FORMS)
    options.flags(double=double)
    layouts = layouts_of(params, form, block, targets, exclude, survey)

    def one(path: str, node: Any) -> Any:
        if path not in layouts:
            return node
        q = quantized(path, _kernel_of(node), layouts[path], double)
        is_base = isinstance(node, LowRank | Rows)
        return dataclasses.replace(node, base=q) if is_base else q

    return map_with_path(one, params, is_leaf=is_node)


_ARGUMENTS = [n for n in inspect.signature(quantize).parameters if n != "unknown"]


def layouts_of(
    params: Tree, form: str, block: int | None, targets: Targets,
    exclude: Sequence[str], survey: Survey | None,
) -> dict[str, Layout]:  # fmt: skip
    """How the codes of each kernel to quantise lie, by path; as of `quantize`."""
    block = checked_block(form, block)
    nodes = leaves_by_path(params, is_leaf=is_node)
    leaves = {path: _kernel_of(x) for path, x in nodes.items()}
    check_survey(survey, leaves)
    arrays = {p: x for p, x in leaves.items() if is_array(x) or is_node(x)}
    stacked = conventions.stacked_leaves(arrays) if survey is None else set()
    layouts: dict[str, Layout] = {}
    for path, target in kernels(targets, leaves, exclude, survey, stacked).items():
        kernel = leaves[path]
        _check_frozen(path, nodes[path])
        check_float(path, kernel)
        axes = axes_of(path, nodes[path], leaves, target, survey, stacked)
        layouts[path] = layout_of(path, kernel.shape, kernel.dtype, axes, form, block)
    return layouts


def dequantize(tree: Tree) -> Tree:
    """The tree with dense kernels in the place of quantised ones, in their dtypes.

    Adapters stay where they are; `jlora.merge` folds them in.

    >>> params = quantize({"q": {"kernel": jnp.ones((64, 6))}}, "int8")
    >>> dequantize(params)["q"]["kernel"].shape
    (64, 6)
    """

    def one(x: Any) -> Any:
        if isinstance(x, LowRank | Rows) and isinstance(x.base, Quantized):
            return dataclasses.replace(x, base=_decoded(x.base))
        return _decoded(x) if isinstance(x, Quantized) else x

    return jax.tree.map(one, tree, is_leaf=is_node)


def _decoded(q: Quantized) -> Any:
    q = dataclasses.replace(q, path="")  # kernels of one shape share a program
    if not is_abstract(q):
        return _decode(sharding_of(q))(q)
    return jax.ShapeDtypeStruct(q.shape, q.dtype, sharding=_named(sharding_of(q)))


@functools.lru_cache(maxsize=64)
def _decode(sharding: Any) -> Any:
    return jax.jit(dense, out_shardings=_named(sharding))


def _named(sharding: Any) -> NamedSharding | None:
    return sharding if isinstance(sharding, NamedSharding) else None


# -- one kernel ------------------------------------------------------------------------


def _kernel_of(x: Any) -> Any:
    """What of a node may be quantised."""
    return x.base if isinstance(x, LowRank | Rows) else x


def _check_frozen(path: str, node: Any) -> None:
    if isinstance(node, Full):
        raise TargetError(
            f"the leaf {path!r} {node.shape} is trained as it is, and codes cannot be "
            "trained.\nLeave it out of targets, exclude=[...], or do not train it."
        )
    base = _kernel_of(node)
    if isinstance(base, Quantized):
        raise TargetError(
            f"the kernel {path!r} {base.shape} is {base.layout.form} already.\nLeave "
            "it out with exclude=[...], or begin with jlora.dequantize(params)."
        )


def quantized(path: str, kernel: Any, layout: Layout, double: bool) -> Quantized:
    """A kernel's codes, sharded as it is; of a shape, shapes.

    Raises:
      ShapeError: a device's part of the kernel holds no whole number of blocks.
    """
    make = _encoder(layout, double)
    abstract = jax.eval_shape(make, jax.ShapeDtypeStruct(kernel.shape, kernel.dtype))
    sharding = sharding_of(kernel)
    if isinstance(sharding, NamedSharding):
        mesh = sharding.mesh
        places = abstract.place_spec(sharding.spec, lambda s: NamedSharding(mesh, s))
        _check_cuts(path, abstract, places)
        if is_abstract(kernel):
            found = jax.tree.map(_on, abstract, places)
        else:
            found = jax.jit(make, out_shardings=places)(kernel)
    else:
        found = abstract if is_abstract(kernel) else make(kernel)
    return dataclasses.replace(found, path=path)


@functools.lru_cache(maxsize=256)
def _encoder(layout: Layout, double: bool) -> Callable[[Any], Quantized]:
    """One program for all kernels that are alike."""
    return jax.jit(lambda kernel: encode(kernel, layout, double=double))


def _on(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _check_cuts(path: str, q: Quantized, places: Quantized) -> None:
    for x, place in zip(jax.tree.leaves(q), jax.tree.leaves(places), strict=True):
        try:
            place.shard_shape(x.shape)
        except ValueError:
            raise ShapeError(
                f"the kernel {path!r} {q.shape} is sharded as {place.spec}, which does "
                f"not divide its {list(x.shape)} codes or scales of blocks of "
                f"{q.layout.block}.\nPass a smaller block=, or shard its outputs."
            ) from None
