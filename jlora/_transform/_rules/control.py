"""Higher-order primitives: jit, scan, while, cond, checkpoint, shard_map.

Each re-enters JAX's public function with a body that replays the inner jaxpr, so that
batching, differentiation and lowering are JAX's own, and low-rank operands travel as
the pytrees they are.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jlora import _compat
from jlora._compat import Eqn, Jaxpr
from jlora._errors import UnsupportedOpError
from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import Array
from jlora._kernel.nodes import LowRank, is_node, same_structure
from jlora._kernel.placement import place_spec
from jlora._kernel.stacked import rebuild, take_apart
from jlora._transform._rules._table import Run, rule
from jlora._transform._rules.hadamard import Hadamard, is_adapted
from jlora._transform._rules.quantised import for_shards
from jlora._transform.masks import fold, has_masks, restore


@rule(*_compat.JIT)
def jit(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """An inner `jax.jit`; the same inner function is traced and compiled once."""
    parts, args = _compat.jit_parts(eqn), run.enter(args)
    in_shardings = tuple(
        _operand_sharding(arg, s)
        for arg, s in zip(args, parts.in_shardings, strict=True)
    )
    return _jitted(run, parts, in_shardings)(*args)


# What was made of an inner jaxpr, for as long as that is alive. JAX hands out the same
# object for the same inner function and shapes, so a block that is called for every
# layer is traced once, and an eager caller of a jitted function does not compile at
# every call. Nothing here may hold the jaxpr, nor the arrays that it closed over.
_JITTED: weakref.WeakKeyDictionary[Jaxpr, dict[Any, Any]] = weakref.WeakKeyDictionary()


def _jitted(
    run: Run, parts: _compat.Jit, in_shardings: tuple[Any, ...]
) -> Callable[..., list[Any]]:
    """One jitted function for each inner jaxpr."""
    made = _JITTED.setdefault(parts.body, {})
    leaves, structure = jax.tree.flatten((in_shardings, parts.out_shardings))
    marks = run.marks_of(parts.body)
    key = run, parts.name, structure, tuple(leaves), marks
    if key not in made:
        body = weakref.ref(parts.body)
        f = _named(functools.partial(_replay, run, body, marks), parts.name)
        shardings: dict[str, Any] = {}
        if leaves:
            shardings["in_shardings"] = in_shardings
            shardings["out_shardings"] = list(parts.out_shardings)
        made[key] = jax.jit(f, **shardings)
    return made[key]


def _replay(run: Run, body: weakref.ref[Jaxpr], marks: Any, *args: Any) -> list[Any]:
    return run.replay(body(), args, marks)


def _named(f: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Keep the inner function's name in profiles and HLO."""
    f.__name__ = name
    return f


def _operand_sharding(arg: Any, sharding: Any) -> Any:
    if isinstance(arg, LowRank) and isinstance(sharding, NamedSharding):
        return place_spec(
            arg, sharding.spec, lambda spec: NamedSharding(sharding.mesh, spec)
        )
    return sharding


@rule(*_compat.REMAT)
def remat(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """`jax.checkpoint` with its policy."""
    parts = _compat.remat_parts(eqn)
    f = jax.checkpoint(
        lambda *xs: run.replay(parts.body, xs),
        prevent_cse=parts.prevent_cse,
        policy=parts.policy,
    )
    return f(*run.enter(args))


@rule("closed_call", "core_call", "call")
def call(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """A plain call is inlined."""
    return run.replay(_compat.call_body(eqn), run.enter(args))


@rule("cond")
def cond(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """`lax.cond` and `lax.switch`; branches may return different kernels."""
    index, *operands = run.enter(args)

    def branch(body: Jaxpr) -> Callable[..., list[Any]]:
        return lambda *xs: run.replay(body, xs)

    branches = [branch(body) for body in _compat.cond_branches(eqn)]
    try:
        return _one_of(eqn, index, _checked(branches), operands)
    except _FormsDifferError:
        # Only now is a branch traced twice: to see what each returns, and to convert.
        results = [jax.eval_shape(f, *operands) for f in branches]
    columns = list(zip(*results, strict=True))
    if not all(map(_joinable, columns)):
        return NotImplemented

    def joined(number: int) -> Callable[..., list[Any]]:
        def run_branch(*xs: Any) -> list[Any]:
            out = branches[number](*xs)
            return [_joined(x, c, number) for x, c in zip(out, columns, strict=True)]

        return run_branch

    return _one_of(eqn, index, [joined(n) for n in range(len(branches))], operands)


def _one_of(
    eqn: Eqn, index: Any, branches: Sequence[Callable[..., Any]], operands: list[Any]
) -> list[Any]:
    """What one branch returns: that of the index, or of the platform lowered for."""
    platforms = _compat.cond_platforms(eqn)
    if platforms is None:
        return lax.switch(index, branches, *operands)
    named = {
        name: f
        for names, f in zip(platforms, branches, strict=True)
        for name in names or ("default",)
    }
    return lax.platform_dependent(*operands, **named)


class _FormsDifferError(Exception):
    """Branches return kernels whose arrays do not correspond."""


def _checked(branches: Sequence[Callable[..., list[Any]]]) -> list[Any]:
    """The branches, of which one that returns another form than the first raises."""
    forms: list[Any] = []

    def check(f: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        def run_branch(*xs: Any) -> list[Any]:
            out = f(*xs)
            forms.append([_form(x) for x in out])
            if forms[0] != forms[-1]:
                raise _FormsDifferError
            return out

        return run_branch

    return [check(f) for f in branches]


def _form(x: Any) -> Any:
    """What two branches must agree in where one returns a kernel; None for arrays."""
    if not is_adapted(x):
        return None
    leaves, structure = jax.tree.flatten(x)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _joinable(column: Sequence[Any]) -> bool:
    """Whether the results of all branches can be one kernel."""
    if not any(map(is_adapted, column)):
        return True
    if any(isinstance(x, Hadamard) for x in column):
        return False
    terms = [t for x in column for t in _terms_of(x)]
    return all(t.key is None for t in terms)


def _joined(x: Any, column: Sequence[Any], number: int) -> Any:
    """A branch's result with the terms of all branches, the others' nought.

    Args:
      x: the result of a branch, an array or a kernel.
      column: the shapes of all branches' results in that place.
      number: the branch.
    """
    if not any(map(is_adapted, column)):
        return x
    path = " + ".join(dict.fromkeys(w.path for w in column if isinstance(w, LowRank)))
    own = iter(_terms_of(x))
    terms = [
        next(own) if branch == number else _nought(t)
        for branch, w in enumerate(column)
        for t in _terms_of(w)
    ]
    base = x.base if isinstance(x, LowRank) else x
    return LowRank(base, {str(n): t for n, t in enumerate(terms)}, path)


def _terms_of(x: Any) -> list[Adapter]:
    return list(x.adapters.values()) if isinstance(x, LowRank) else []


def _nought(t: Adapter) -> Adapter:
    """A term of that shape that adds nothing, with a gain of one if any."""
    t = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), t)
    return t if t.gain is None else dataclasses.replace(t, gain=jnp.ones_like(t.gain))


@rule("while")
def while_loop(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """`lax.while_loop` and `fori_loop`; kernels are usually constants of the body."""
    parts = _compat.while_parts(eqn)
    split = parts.num_cond_consts, parts.num_cond_consts + parts.num_body_consts
    cond_consts, body_consts = args[: split[0]], args[split[0] : split[1]]
    init = args[split[1] :]
    # Masks differ from iteration to iteration, so where there are any, one counts.
    counted = any(map(has_masks, args))
    if counted:
        cond_consts, body_consts = run.enter(cond_consts), run.enter(body_consts)
        init = [*run.enter(init), jnp.int32(0)]

    def operands(consts: list[Any], carry: list[Any]) -> list[Any]:
        if not counted:
            return [*consts, *carry]
        return [fold(x, carry[-1]) for x in (*consts, *carry[:-1])]

    def test(carry: list[Any]) -> Array:
        return run.replay(parts.cond, operands(cond_consts, carry))[0]

    def step(carry: list[Any]) -> list[Any]:
        out = run.replay(parts.body, operands(body_consts, carry))
        if counted:
            out = [*map(restore, out, carry[:-1]), carry[-1] + 1]
        _check_carry(init, out, "while_loop")
        return out

    out = lax.while_loop(test, step, init)
    return out[:-1] if counted else out


@rule("scan")
def scan(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """`lax.scan`: stacked kernels among the xs, shared ones among the constants."""
    parts = _compat.scan_parts(eqn)
    split = parts.num_consts, parts.num_consts + parts.num_carry
    args = run.enter(args, stacks=args[split[1] :])
    consts, init, xs = args[: split[0]], args[split[0] : split[1]], args[split[1] :]
    counted = any(map(has_masks, args))
    stacked = [StackedKernel.of(x) if isinstance(x, LowRank) else None for x in xs]
    if any(s is not None and not s.whole for s in stacked):
        return NotImplemented

    def step(carry: list[Any], slices: Any) -> tuple[list[Any], list[Any]]:
        slices, number = slices if counted else (slices, None)
        operands = [
            one if s is None else s.rebuild(one)
            for s, one in zip(stacked, slices, strict=True)
        ]
        shared = [*consts, *carry]
        if counted:  # those of a stack have keys of their own already
            shared = [fold(x, number) for x in shared]
            operands = [
                x if s is None or s.own_keys else fold(x, number)
                for s, x in zip(stacked, operands, strict=True)
            ]
        out = run.replay(parts.body, [*shared, *operands])
        carry_out, ys = out[: parts.num_carry], out[parts.num_carry :]
        carry_out = [
            restore(x, before) for x, before in zip(carry_out, carry, strict=True)
        ]
        _check_carry(init, carry_out, "scan")
        _check_carry(ys, [None] * len(ys), "scan")
        return carry_out, ys

    arrays = [x if s is None else s.arrays for s, x in zip(stacked, xs, strict=True)]
    carry, ys = lax.scan(
        step, init, (arrays, jnp.arange(parts.length)) if counted else arrays,
        length=parts.length, reverse=parts.reverse, unroll=parts.unroll,
    )  # fmt: skip
    return [*carry, *ys]


def _check_carry(init: Sequence[Any], out: Sequence[Any], name: str) -> None:
    """A kernel that a loop changes from step to step has no low-rank form."""
    for before, after in zip(init, out, strict=True):
        node = next((x for x in (before, after) if isinstance(x, LowRank)), None)
        if node is not None and not same_structure(before, after):
            raise UnsupportedOpError(
                f"the adapted kernel {node.path!r} {node.shape} changes its form "
                f"inside a `{name}` (it is returned by the body other than it came "
                "in).\nClose over the kernel instead of carrying it, leave the leaf "
                "out of the targets, or pass lora(fn, on_missing='materialize')."
            )


@dataclasses.dataclass(frozen=True)
class StackedKernel:
    """A kernel taken apart for a scan over its first dimension.

    Attributes:
      node: the kernel.
      arrays: the base, of codes perhaps, and of every adapter what spans the dimension.
      whole: whether every term spans all of it (a window cannot be scanned).
    """

    node: LowRank
    arrays: tuple[Any, list[list[Array]]]
    whole: bool

    @property
    def own_keys(self) -> bool:
        """Whether every step's slice has dropout keys of its own."""
        return all(0 in t.s_dims for t in self.node.adapters.values())

    @classmethod
    def of(cls, w: LowRank) -> StackedKernel:
        """Take w apart."""
        terms = list(w.adapters.values())
        whole = all(t.full(0, w.shape[0]) for t in terms)
        return cls(w, (w.base, list(map(take_apart, terms))), whole)

    def rebuild(self, slices: tuple[Any, list[list[Array]]]) -> LowRank:
        """The kernel of one step; factors that do not span the stack are shared."""
        base, each = slices
        feed = iter(each)
        return self.node.map(base, lambda t: rebuild(t, next(feed)))


@rule("shard_map")
def shard_map(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """`jax.shard_map`: each factor is split as the kernel's spec says of its axes."""
    parts = _compat.shard_map_parts(eqn)
    if any(not _shardable(a, s) for a, s in zip(args, parts.in_specs, strict=True)):
        return NotImplemented
    args = [for_shards(a, s) for a, s in zip(args, parts.in_specs, strict=True)]
    in_specs = tuple(
        place_spec(arg, spec) if isinstance(arg, LowRank) else spec
        for arg, spec in zip(args, parts.in_specs, strict=True)
    )

    def body(*xs: Any) -> list[Any]:
        out = run.replay(parts.body, xs)
        if any(is_node(x) for x in out):
            raise UnsupportedOpError(
                "an adapted kernel is returned from inside a `shard_map`.\nReturn the "
                "kernel from outside of it."
            )
        return out

    f = jax.shard_map(
        body, mesh=parts.mesh, in_specs=in_specs, out_specs=list(parts.out_specs),
        check_vma=parts.check_vma, axis_names=parts.axis_names,
    )  # fmt: skip
    return f(*run.enter(args))


def _shardable(arg: Any, spec: PartitionSpec) -> bool:
    """A window of a partitioned dimension is not the same window on each device."""
    if not isinstance(arg, LowRank):
        return True
    split = [d for d, names in enumerate(tuple(spec)) if names is not None]
    return all(t.full(d, arg.shape[d]) for t in arg.adapters.values() for d in split)
