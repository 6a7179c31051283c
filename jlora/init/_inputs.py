"""What a function feeds its adapted kernels: sums over batches, by probes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora._errors import NonFiniteError, OptionError, StructureError, TargetError
from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import Array
from jlora._kernel.nodes import Full, LowRank, Rows, is_node
from jlora._kernel.quantized import Quantized, is_abstract
from jlora._paths import leaves_by_path, map_with_path
from jlora._text import listed
from jlora._transform.lora import lora
from jlora.init._probe import probe_of

Tree = Any
Fn = Callable[[Tree, Any], Any]


class Sums(NamedTuple):
    """Of one kernel's inputs X, an entry for each matrix of its stack.

    Attributes:
      both: XᵀX with Xᵀ1 in the last column, `[*batch, *in, i + 1]`, float32.
      rows: how many rows X has, `[*batch]`.
    """

    both: Array
    rows: Array

    @property
    def second(self) -> Array:
        """XᵀX, `[n, i, i]`."""
        return self._flat()[:, :, :-1]

    @property
    def first(self) -> Array:
        """Xᵀ1, `[n, i]`."""
        return self._flat()[:, :, -1]

    @property
    def number(self) -> Array:
        """The number of rows, `[n]`."""
        return self.rows.reshape(-1)

    def _flat(self) -> Array:
        size = self.both.shape[-1]
        return self.both.reshape(-1, size - 1, size)


def fresh_nodes(name: str, tree: Tree, *, shifts: bool = False) -> dict[str, LowRank]:
    """The adapted kernels of a tree that computes what its base does.

    Args:
      name: of the caller, for messages.
      tree: fresh from lorafy.
      shifts: whether the kernels are to be changed, which quantised ones cannot be.

    Raises:
      StructureError: it holds no adapter, one that is trained already or of another
        form, no values, or codes that cannot be shifted.
    """
    leaves = leaves_by_path(tree, is_leaf=is_node)
    nodes = {path: x for path, x in leaves.items() if isinstance(x, LowRank)}
    if not nodes:
        raise StructureError(
            f"jlora.init.{name} takes a lorafied tree, whose adapters it starts anew, "
            "and this one has none.\nCall jlora.lorafy(params, ...) first."
        )
    for path, x in nodes.items():
        if is_abstract(x.base) or isinstance(x.base, jax.core.Tracer):
            raise StructureError(
                f"the kernel {path!r} {x.shape} has no values, and jlora.init.{name} "
                "decomposes what flows into it.\nCall it on a tree of arrays, outside "
                "of jax.jit."
            )
        if shifts and isinstance(x.base, Quantized):
            raise StructureError(
                f"jlora.init.{name} takes a product out of the kernel, and the codes "
                f"of {path!r} {x.shape}, {x.base.layout.form}, cannot hold the rest.\n"
                "Start from the dense parameters, then call jlora.quantize."
            )
        if any(t.parts is not None for t in x.adapters.values()):
            raise StructureError(
                f"the adapter of {path!r} {x.shape} is of another form than LoRA, and "
                f"jlora.init.{name} makes an A and a B.\nLorafy that kernel without "
                "variant=."
            )
    moved = jax.device_get({path: _moves(x) for path, x in nodes.items()})
    if begun := [path for path, moves in moved.items() if moves]:
        raise StructureError(
            f"jlora.init.{name} starts adapters anew, and these have begun already:\n  "
            f"{listed(begun)}\nPass the tree as jlora.lorafy(params, ...) makes it, "
            'with init="default".'
        )
    return nodes


@jax.jit
def _moves(x: LowRank) -> Array:
    """Whether an adapter changes its kernel, or its base was changed for one."""
    moves = [jnp.any(t.a != 0) & jnp.any(t.b != 0) for t in x.adapters.values()]
    return functools.reduce(jnp.logical_or, moves) | any(
        t.shifted for t in x.adapters.values()
    )


def plain(tree: Tree) -> Tree:
    """The tree without nodes: the parameters it was made of."""

    def one(path: str, x: Any) -> Any:
        if isinstance(x, LowRank):
            return x.base
        if isinstance(x, Full):
            return x.value
        return x.merged() if isinstance(x, Rows) else x

    return map_with_path(one, tree, is_node)


def batches_of(name: str, batches: Any) -> Iterator[Any]:
    """The batches, checked to be some.

    Raises:
      OptionError: there are none, or it is one batch.
    """
    if isinstance(batches, Mapping | str) or hasattr(batches, "dtype"):
        raise OptionError(
            f"jlora.init.{name}: batches is a {type(batches).__name__}.\nPass a list "
            "or another iterable of batches, [batch] for a single one."
        )
    if not isinstance(batches, Iterable):
        raise OptionError(
            f"jlora.init.{name}: batches={batches!r}: expected an iterable of batches, "
            "each of which `fn(params, batch)` takes."
        )
    number = 0
    for batch in batches:
        number += 1
        yield batch
    if not number:
        raise OptionError(
            f"jlora.init.{name}: there are no batches, and so nothing to start from.\n"
            "Pass at least one; an iterator gives its batches once."
        )


def input_sums(
    name: str, fn: Fn, tree: Tree, nodes: Mapping[str, LowRank], batches: Any
) -> Iterator[dict[str, Sums]]:
    """The sums over the batches so far, by kernel, after each batch.

    One compiled program a shape of batch. Beside the function's own memory they take
    `[i, i + 1]` in float32 a kernel, twice while a batch is added. What is yielded is
    gone once the next is asked for.

    Args:
      name: of the caller, for messages.
      fn: `fn(params, batch)`, of plain parameters; what it returns must depend on the
        kernels' inputs in a way that can be differentiated.
      tree: lorafied.
      nodes: its adapted kernels, from `fresh_nodes`.
      batches: an iterable.

    Raises:
      OptionError: no batches; a function that returns no float.
      TargetError: a kernel whose inputs cannot be seen.
    """
    probes = {path: probe_of(_first(x)) for path, x in nodes.items()}
    zeros = {path: Sums(t.a, t.scale) for path, t in probes.items()}
    params = plain(tree)

    @functools.partial(jax.jit, donate_argnums=0)
    def add(total: Any, params: Tree, batch: Any) -> Any:
        def watched(zeros: Any) -> Array:
            def put(path: str, base: Any) -> Any:
                if path not in probes:
                    return base
                both, rows = zeros[path]
                probe = dataclasses.replace(probes[path], a=both, scale=rows)
                return LowRank(base, {"inputs": probe}, path)

            tree = map_with_path(put, params, is_node)
            out = lora(fn, stop_frozen=False)(tree, batch)
            return _sum_of_floats(name, out)

        return jax.tree.map(jnp.add, total, jax.grad(watched)(zeros))

    total = jax.tree.map(jnp.copy, zeros)
    for number, batch in enumerate(batches_of(name, batches), 1):
        total = add(total, params, batch)
        if number == 1:
            _check_seen(name, total, nodes)
        yield total


def _first(x: LowRank) -> Adapter:
    return next(iter(x.adapters.values()))


def _sum_of_floats(name: str, out: Any) -> Array:
    floats = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating)]
    if not floats:
        raise OptionError(
            f"jlora.init.{name}: fn(params, batch) returns no array of floats, and the "
            "kernels' inputs are found by differentiating it.\nReturn the logits or "
            "the loss."
        )
    return sum((jnp.sum(x.astype(jnp.float32)) for x in floats), jnp.zeros(()))


def _check_seen(
    name: str, found: Mapping[str, Sums], nodes: Mapping[str, LowRank]
) -> None:
    rows = jax.device_get({path: s.rows for path, s in found.items()})
    if unseen := [path for path, n in rows.items() if not n.any()]:
        lines = [f"{path} {nodes[path].shape}" for path in unseen]
        raise TargetError(
            f"jlora.init.{name} saw no inputs of {len(unseen)} of {len(nodes)} kernels:"
            f"\n  {listed(lines)}\nIt sees those of matrix products that fn's result "
            "depends on: not of embeddings, convolutions and ragged products, and not "
            "behind stop_gradient or whole numbers. Leave those out of targets."
        )


def check_finite(name: str, found: Mapping[str, Sums], number: int) -> None:
    """Refuse sums that hold NaN or infinity.

    Raises:
      NonFiniteError: there are such; the kernels are named.
    """
    finite = jax.device_get({path: _finite(s) for path, s in found.items()})
    if broken := [path for path, ok in finite.items() if not ok]:
        raise NonFiniteError(
            f"jlora.init.{name}: NaN or infinity in what flows into {len(broken)} "
            f"kernels, within the first {number} batches:\n  {listed(broken)}\nCheck "
            "the batches and the checkpoint; a float16 network may overflow."
        )


@jax.jit
def _finite(s: Sums) -> Array:
    return jnp.all(jnp.isfinite(s.both))
