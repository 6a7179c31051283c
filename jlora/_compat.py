"""Everything that depends on the JAX release; the one file that knows.

JAX keeps no promise for the parameters of its higher-order primitives, so they are
read here, and only here, into small records the rules understand. Written for and
tested with JAX 0.10.2, 0.11 and 0.12.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax._src import dtypes, source_info_util
from jax.extend import core as jex
from jax.interpreters import ad, mlir
from jax.interpreters import batching as batching_rules

Eqn = Any
Jaxpr = Any  # a closed jaxpr; since 0.11 JAX has only one class for both

Literal = jex.Literal
Primitive = jex.Primitive

# The names under which releases have known one primitive.
REMAT = ("checkpoint", "remat", "remat2")
JIT = ("jit", "pjit")
PVARY = ("pvary", "pcast")
RESHARD = ("reshard", "mesh_cast")
CUSTOM_RULE = ("custom_jvp_call", "custom_vjp_call")

# A jitted function that is its operations where it is called. From 0.11 on, True says
# so for the lowered program alone, and a jaxpr holds the call.
INLINE: Any = jax.Inline.JAX_EARLY if hasattr(jax, "Inline") else True


def define(
    primitive: Any,
    impl: Callable[..., Any],
    aval: Callable[..., Any],
    *,
    batching: Callable[..., Any],
    lowered: Mapping[str, Callable[..., Any]] | None = None,
) -> None:
    """Say what a primitive of one result computes.

    Args:
      primitive: a new one.
      impl: its operation, in terms of JAX's.
      aval: the result's abstract value, of those of the operands.
      batching: `(operands, their axes) -> (result, its axis)` under `vmap`.
      lowered: other operations to lower to, by platform.
    """
    primitive.def_impl(impl)
    primitive.def_abstract_eval(aval)
    batching_rules.primitive_batchers[primitive] = batching
    for platform, f in [(None, impl), *(lowered or {}).items()]:
        lowering = mlir.lower_fun(f, multiple_results=False)
        mlir.register_lowering(primitive, lowering, platform)


def define_transposes(primitive: Any, *rules: Callable[..., Any]) -> None:
    """Declare a primitive linear in its operand, or in each of two.

    Args:
      primitive: from `define`.
      rules: for each operand, `(cotangent, *operands, **params) -> cotangent`, the
        operand itself given as an undefined primal.
    """
    if len(rules) == 2:
        ad.defbilinear(primitive, *rules)
    else:
        (rule,) = rules
        ad.deflinear2(primitive, lambda g, x, **params: (rule(g, x, **params),))


def refuse_operands(kind: type, refuse: Callable[[Any], Any]) -> None:
    """Have `refuse` raise where a primitive is given an object of that type.

    JAX's own error says nothing of the object but that it is no array.
    """
    register = getattr(dtypes, "register_canonicalize_value_handler", None)
    if register is not None:
        register(kind, refuse)


def compilations(jitted: Any) -> int:
    """How many programs a jitted function keeps."""
    return jitted._cache_size()


def open_jaxpr(jaxpr: Jaxpr) -> tuple[Any, Sequence[Any]]:
    """The bare jaxpr and the values of its `constvars`."""
    return getattr(jaxpr, "jaxpr", jaxpr), tuple(getattr(jaxpr, "consts", ()))


def function_of(jaxpr: Jaxpr, structure: Any) -> Callable[..., Any]:
    """A program as a function of its operands; its results are a tree."""
    run = jex.jaxpr_as_fun(jaxpr)
    return lambda *args: jax.tree.unflatten(structure, run(*args))


def rebind(eqn: Eqn, args: Sequence[Any]) -> list[Any]:
    """Run one equation as it stands on other operands."""
    params = eqn.primitive.get_bind_params(eqn.params)
    out = eqn.primitive.bind(*args, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def programs_in(eqn: Eqn) -> Iterator[Jaxpr]:
    """The programs inside of an equation."""
    return iter(jex.jaxprs_in_params(eqn.params))


def operation(eqn: Eqn) -> Any:
    """Primitive and parameters, for equations of one result that only compute it."""
    if eqn.primitive.multiple_results or eqn.effects:
        return None
    return eqn.primitive, tuple(eqn.params.items())


@functools.lru_cache(maxsize=1024)
def inlined(steps: Sequence[tuple[Any, Sequence[int]]], results: Sequence[int]) -> Any:
    """Operations as one jitted function that leaves no trace of being one.

    JAX keeps the derivative of a jitted function, and takes that of a bare primitive
    apart again each time it meets it; `jax.numpy` is jitted for the same reason.

    Args:
      steps: an `operation` each, and the numbers of its operands: those of the
        function count first, then what each step makes.
      results: the numbers of what is returned.
    """

    def run(*args: Any) -> list[Any]:
        values = list(args)
        for (primitive, params), operands in steps:
            own = (values[n] for n in operands)
            values.append(primitive.bind(*own, **dict(params)))
        return [values[n] for n in results]

    return jax.jit(run, inline=INLINE)


def same_context(eqn: Eqn, other: Eqn) -> bool:
    """Whether `eqn_context` is the same for both but for the user's line."""
    one, two = eqn.source_info.name_stack, other.source_info.name_stack
    return one == two and eqn.ctx == other.ctx


def source_of(eqn: Eqn) -> str:
    """The user's line behind an equation."""
    return source_info_util.summarize(eqn.source_info)


def eqn_context(eqn: Eqn) -> Any:
    """The context an equation was traced in (name scopes, compute_on, metadata)."""
    stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    return _Contexts(
        source_info_util.user_context(eqn.source_info.traceback, name_stack=stack),
        eqn.ctx.manager,
    )


class _Contexts:
    """Two context managers as one (an ExitStack is ten times slower to make)."""

    def __init__(self, *managers: Any) -> None:
        self._managers = managers

    def __enter__(self) -> None:
        for manager in self._managers:
            manager.__enter__()

    def __exit__(self, *exc: Any) -> None:
        for manager in reversed(self._managers):
            manager.__exit__(*exc)


@dataclasses.dataclass(frozen=True)
class Scan:
    """`lax.scan` taken apart; operands come as consts, carry, xs."""

    body: Jaxpr
    num_consts: int
    num_carry: int
    length: int
    reverse: bool
    unroll: Any


def scan_parts(eqn: Eqn) -> Scan:
    """Read a `scan` equation."""
    p = eqn.params
    if "num_carry" in p:  # until 0.10
        consts, carry = p["num_consts"], p["num_carry"]
    else:
        consts, carry = (len(part) for part in p["ft_in"].unpack()[:2])
    return Scan(p["jaxpr"], consts, carry, p["length"], p["reverse"], p["unroll"])


@dataclasses.dataclass(frozen=True)
class While:
    """`lax.while_loop` taken apart; operands: cond consts, body consts, carry."""

    cond: Jaxpr
    body: Jaxpr
    num_cond_consts: int
    num_body_consts: int


def while_parts(eqn: Eqn) -> While:
    """Read a `while` equation."""
    p = eqn.params
    return While(p["cond_jaxpr"], p["body_jaxpr"], p["cond_nconsts"], p["body_nconsts"])


def call_body(eqn: Eqn) -> Jaxpr:
    """The program of an equation that calls one and does nothing else."""
    p = eqn.params
    return p["call_jaxpr"] if "call_jaxpr" in p else p["jaxpr"]


def cond_branches(eqn: Eqn) -> tuple[Jaxpr, ...]:
    """The branches of a `cond` equation; operand 0 is the index."""
    return eqn.params["branches"]


def cond_platforms(eqn: Eqn) -> tuple[tuple[str, ...] | None, ...] | None:
    """The platforms of each branch, None for all others; None if an index chooses."""
    return eqn.params.get("branches_platforms")


@dataclasses.dataclass(frozen=True)
class Remat:
    """`jax.checkpoint` taken apart."""

    body: Jaxpr
    prevent_cse: bool
    policy: Any


def remat_parts(eqn: Eqn) -> Remat:
    """Read a `checkpoint` equation."""
    p = eqn.params
    return Remat(p["jaxpr"], p["prevent_cse"], p["policy"])


@dataclasses.dataclass(frozen=True)
class Jit:
    """`jax.jit` taken apart; a sharding is None where it was left open."""

    body: Jaxpr
    name: str
    in_shardings: tuple[Any, ...]
    out_shardings: tuple[Any, ...]


def jit_parts(eqn: Eqn) -> Jit:
    """Read a `jit` equation."""
    p = eqn.params

    def known(shardings: Sequence[Any]) -> tuple[Any, ...]:
        is_known = lambda s: isinstance(s, jax.sharding.Sharding)  # noqa: E731
        return tuple(s if is_known(s) else None for s in shardings)

    return Jit(
        p["jaxpr"], p["name"], known(p["in_shardings"]), known(p["out_shardings"])
    )


@dataclasses.dataclass(frozen=True)
class LinearCall:
    """`jax.custom_derivatives.linear_call` taken apart.

    Operands come as constants, residuals, what it is linear in. `transpose` gives the
    transpose's program and constants, of residuals and cotangents.
    """

    body: Jaxpr
    transpose: Callable[[], tuple[Jaxpr, Sequence[Any]]]
    num_consts: int
    num_residuals: int


def linear_call_parts(eqn: Eqn) -> LinearCall:
    """Read a `linear_call` equation."""
    p = eqn.params
    return LinearCall(
        p["callee"], p["transpose_thunk"], p["num_callee_consts"], p["num_res"]
    )


@dataclasses.dataclass(frozen=True)
class Solve:
    """`lax.custom_linear_solve` taken apart; operands: each program's constants, b."""

    programs: dict[str, Jaxpr | None]
    num_consts: dict[str, int]

    @property
    def symmetric(self) -> bool:
        """Whether it was said to be its own transpose."""
        return self.programs["vecmat"] is self.programs["matvec"]


def solve_parts(eqn: Eqn) -> Solve:
    """Read a `custom_linear_solve` equation."""
    p = eqn.params
    return Solve(p["jaxprs"]._asdict(), p["const_lengths"]._asdict())


@dataclasses.dataclass(frozen=True)
class CustomVmap:
    """`jax.custom_batching.custom_vmap` taken apart; the rule takes flat operands."""

    body: Jaxpr
    rule: Callable[[int, Sequence[bool], Sequence[Any]], Any]


def custom_vmap_parts(eqn: Eqn) -> CustomVmap:
    """Read a `custom_vmap_call` equation."""
    p = eqn.params

    def by_rule(size: int, batched: Sequence[bool], args: Sequence[Any]) -> Any:
        flags = list(jax.tree.unflatten(p["in_tree"], batched))
        return p["rule"](size, flags, *jax.tree.unflatten(p["in_tree"], args))

    return CustomVmap(p["call"], by_rule)


@dataclasses.dataclass(frozen=True)
class ShardMap:
    """`jax.shard_map` taken apart."""

    body: Jaxpr
    mesh: Any
    in_specs: tuple[Any, ...]
    out_specs: tuple[Any, ...]
    check_vma: bool
    axis_names: frozenset[Any]


def shard_map_parts(eqn: Eqn) -> ShardMap:
    """Read a `shard_map` equation."""
    p = eqn.params
    return ShardMap(
        p["jaxpr"],
        p["mesh"],
        tuple(p["in_specs"]),
        tuple(p["out_specs"]),
        p["check_vma"],
        frozenset(p["newly_manual_axes"]),
    )


def varying_axes(x: Any) -> frozenset[Any]:
    """The manual mesh axes over which x differs (empty outside shard_map)."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def varying(x: Any, axes: Iterable[Any]) -> Any:
    """X as a value that differs over those manual mesh axes too."""
    missing = tuple(axis for axis in axes if axis not in varying_axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def alike_varying(*xs: Any) -> tuple[Any, ...]:
    """All of xs as values that differ over every manual axis that one of them does."""
    axes = sorted({axis for x in xs for axis in varying_axes(x)}, key=str)
    return tuple(varying(x, axes) for x in xs)


def reshard(x: Any, sharding: Any) -> Any:
    """`jax.sharding.reshard`, by its name in this release."""
    return jax.sharding.reshard(x, sharding)


def explicit_specs(x: Any, labels: Sequence[Any]) -> dict[Any, Any]:
    """For each label, the explicit mesh axes that its axis of x is split over."""
    return dict(zip(labels, spec(x), strict=False))


def is_explicit(x: Any) -> bool:
    """Whether x lies on a mesh of which some axes are explicit."""
    return bool(jax.typeof(x).sharding.mesh.explicit_axes)


def spec(x: Any) -> tuple[Any, ...]:
    """For each axis of x, the explicit mesh axes that it is split over."""
    return tuple(jax.typeof(x).sharding.spec)


def on_mesh_of(x: Any, axes: Sequence[Any]) -> Any:
    """An `out_sharding` on x's mesh where that is explicit; None where it is not."""
    if not is_explicit(x):
        return None
    mesh = jax.typeof(x).sharding.mesh
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))


def default_precision() -> Any:
    """What `jax.default_matmul_precision` sets here."""
    return getattr(jax.config, "jax_default_matmul_precision", None)


def dot_aval(x: Any, y: Any, **params: Any) -> Any:
    """Shape, dtype, sharding and varying axes of `lax.dot_general`'s result."""
    aval, _ = jax.lax.dot_general_p.abstract_eval(x, y, out_sharding=None, **params)
    return aval


def take_rows(table: Any, indices: Any) -> Any:
    """Rows of a table, on every device where explicit sharding splits the table's."""
    if not hasattr(table, "aval") or not is_explicit(table):
        return table[indices]
    where = on_mesh_of(table, [None, *spec(table)[1:]])
    return table.at[indices].get(out_sharding=where)


def replace_rows(table: Any, indices: Any, rows: Any) -> Any:
    """A table with other rows in some places, sharded as it is."""
    if not is_explicit(table):
        return table.at[indices].set(rows)
    where = on_mesh_of(table, spec(table))
    return table.at[indices].set(rows, out_sharding=where)


def factor_like(factor: Any, x: Any) -> Any:
    """A factor that x is multiplied by, axis by axis, with x's explicit sharding."""
    if not is_explicit(x):
        return factor
    pairs = zip(spec(x), factor.shape, strict=True)
    axes = [names if size > 1 else None for names, size in pairs]
    return reshard(factor, on_mesh_of(x, axes))


def sharded_like(x: Any, like: Any) -> Any:
    """X with the explicit sharding of `like`, which JAX would not add to another."""
    want = jax.typeof(like).sharding
    if jax.typeof(x).sharding == want or want.mesh.empty:
        return x
    return reshard(x, want)


def without_explicit_axes(f: Callable[..., Any], like: int | None = None) -> Any:
    """F, computed where XLA chooses the shardings; to be called under `jax.jit`.

    Explicit sharding has no rule for decompositions, and wants to be told of reshapes.

    Args:
      f: a function of arrays; its keyword arguments are handed on as they are.
      like: the number of the operand whose sharding the results have; None leaves them
        whole on every device of the mesh.
    """

    @functools.wraps(f)
    def run(*args: Any, **static: Any) -> Any:
        x = next((x for x in jax.tree.leaves(args) if is_explicit(x)), None)
        if x is None:
            return f(*args, **static)
        where = on_mesh_of(x, () if like is None else spec(args[like]))
        own = functools.partial(f, **static)
        return jax.sharding.auto_axes(own, out_sharding=where)(*args)

    return run


def trace_settings() -> Any:
    """JAX's settings in this thread, as far as programs depend on them; comparable."""
    from jax._src import config

    return config.trace_context()


def coordination_client() -> Any:
    """The client of the service that `jax.distributed.initialize` starts, or None."""
    from jax._src import distributed

    return distributed.global_state.client


def preemption_is_shared() -> bool:
    """Whether `jax.distributed.initialize` listens for SIGTERM on behalf of all."""
    from jax._src import distributed

    return distributed.global_state.preemption_sync_manager is not None
