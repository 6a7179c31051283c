"""JAX's training steps, on one Flax model and one optimiser.

A contender is `(step, state)`: `step(state, batch)` returns the new state and the loss,
through `jax.jit`'s own path, as users call it. They differ in how the low-rank update
gets into the products.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jlora
import jlora.train
from benchmarks.cases import Case
from benchmarks.programs import work_of
from benchmarks.race import TARGETS
from benchmarks.work import Workload, by_path, kernels, path_name, workload

Tree = Any
Contender = tuple[Any, Any]
TX = optax.adamw(1e-4)


class Step:
    """A jitted step of a state `(moving, frozen)`; the first half is donated."""

    def __init__(self, pure: Callable[..., Any]) -> None:
        self.run = jax.jit(pure, donate_argnums=0)

    def __call__(self, state: Any, batch: Tree) -> Any:
        """Run one step."""
        moving, loss = self.run(*state, batch)
        return (moving, state[1]), loss

    def lower(self, state: Any, batch: Tree) -> Any:
        """Lower without running."""
        return self.run.lower(*state, batch)


def trained(loss: Callable[..., Any], trainable: Tree, frozen: Tree) -> Contender:
    """A step of `loss(trainable, frozen, batch)` that trains the first half."""

    def start(half: Tree) -> Any:
        return jax.tree.map(jnp.copy, half), TX.init(half)

    def step(moving: Any, frozen: Tree, batch: Tree) -> Any:
        half, opt_state = moving
        value, grads = jax.value_and_grad(loss)(half, frozen, batch)
        updates, opt_state = TX.update(grads, opt_state, half)
        return (optax.apply_updates(half, updates), opt_state), value

    return Step(step), (_made(start, trainable), frozen)


def _made(f: Callable[[Tree], Any], tree: Tree) -> Any:
    """`f` of arrays; of shapes its shapes."""
    abstract = isinstance(jax.tree.leaves(tree)[0], jax.ShapeDtypeStruct)
    return jax.eval_shape(f, tree) if abstract else f(tree)


# -- contenders ------------------------------------------------------------------------


def floor(work: Workload, params: Tree) -> Contender:
    """What no adapter can go below: forward, and backward to the first layers.

    The gradient goes to the outputs of the first adapted layers; nothing is adapted or
    updated.
    """
    first = [n for n in kernels(work.lorafied(work.shapes)) if work.is_first(n)]
    if not first:
        raise ValueError(
            f"the floor ends at the first layers, and {work.case.targets} adapt none "
            "of these.\nLeave the floor out with --contenders."
        )
    outputs: dict[str, Any] = {}

    def note(name: str, x: Any, y: Any) -> Any:
        if name in first:
            outputs[name] = (y.shape, y.dtype)
        return y

    jax.eval_shape(lambda *args: work.with_outputs(note, *args), params, work.batch)
    probes = {name: jnp.zeros(*output) for name, output in outputs.items()}

    def probed(probes: Tree, params: Tree, batch: Tree) -> Any:
        add = lambda name, x, y: y + probes[name] if name in probes else y  # noqa: E731
        return work.with_outputs(add, params, batch)

    def step(probes: Any, params: Tree, batch: Tree) -> Any:
        loss, grads = jax.value_and_grad(probed)(probes, params, batch)
        # Only a number of each: the floor's results cost nothing to store.
        return probes, (loss, jax.tree.map(lambda g: jnp.sum(g**2), grads))

    return Step(step), (probes, params)


def by_hand(work: Workload, params: Tree) -> Contender:
    """`x·W + s·(x·A)·B` written into the layers, as LoRA's authors write it."""
    nodes = kernels(work.lorafied(params))
    adapters = {name: list(node.adapters.values()) for name, node in nodes.items()}
    factors = {name: [(t.a, t.b) for t in ts] for name, ts in adapters.items()}
    starts = {name: [t.starts[-1] for t in ts] for name, ts in adapters.items()}

    def loss(factors: Tree, params: Tree, batch: Tree) -> Any:
        def layer(name: str, x: Any, y: Any) -> Any:
            for (a, b), start in zip(
                factors.get(name, ()), starts.get(name, ()), strict=True
            ):
                low = 2.0 * (x @ a.astype(y.dtype)) @ b.astype(y.dtype)  # alpha / r
                part = slice(start, start + low.shape[-1])
                y = y + low if low.shape == y.shape else y.at[..., part].add(low)
            return y

        return work.with_outputs(layer, params, batch)

    return trained(loss, factors, params)


def transformed(work: Workload, params: Tree) -> Contender:
    """Jlora's own training step."""
    step = jlora.train.make_train_step(
        lambda params, batch, key: work.totals(params, batch), TX
    )
    return step, jlora.train.TrainState.create(work.lorafied(params), TX)


def quantised(work: Workload, params: Tree) -> Contender:
    """Jlora's own training step on a base of 4 bits; the head is left as it is."""
    head = ["lm_head"] if "lm_head" in params else []
    block = 8 if work.case.quick else None  # which divides tiny kernels too
    params = jlora.quantize(params, "nf4", block=block, exclude=head)
    return transformed(work, params)


def full(work: Workload, params: Tree) -> Contender:
    """Full fine-tuning; parameters in float32 whatever the model computes in."""
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)  # noqa: E731
    loss = lambda params, _, batch: work.loss_of_logits(params, batch)  # noqa: E731
    return trained(loss, _made(wide, params), ())


def qwix(work: Workload, params: Tree) -> Contender:
    """Qwix intercepts the products inside Flax modules.

    Source: github.com/google/qwix, `qwix/_src/providers/lora.py`.
    """
    import qwix as library

    paths, rank = "|".join(kernels(work.lorafied(work.shapes))), work.case.rank
    provider = library.LoraProvider(module_path=paths, rank=rank, alpha=2 * rank)
    model = library.apply_lora_to_model(work.model, provider)
    inputs = work.inputs(work.batch)
    made = jax.jit(model.init)(jax.random.key(0), *inputs)["params"]
    own, treedef = by_path(made), jax.tree.structure(made)
    lora = {name: x for name, x in own.items() if "_lora_" in name}
    rest = {name: x for name, x in by_path(params).items() if name in own}
    if not lora:
        raise ValueError(f"qwix found nothing to adapt at {paths}")

    def loss(lora: Tree, rest: Tree, batch: Tree) -> Any:
        both = {**lora, **rest}
        tree = jax.tree.unflatten(treedef, [both[name] for name in own])
        return work.loss_of_logits(tree, batch, model)

    return trained(loss, lora, rest)


def quax(work: Workload, params: Tree) -> Contender:
    """Quax dispatches on an array type that stands for `W + A·B`; it has no alpha.

    Source: github.com/patrick-kidger/quax, `quax/examples/lora`.
    """
    import equinox as eqx
    import quax as library
    from quax.examples import lora

    adapted = {f"{module}/kernel" for module in kernels(work.lorafied(work.shapes))}

    def adapt(path: Any, x: Any) -> Any:
        if path_name(path) not in adapted:
            return x
        return lora.LoraArray(x, rank=work.case.rank, key=jax.random.key(0))

    def is_factor(path: Any, x: Any) -> bool:
        return jax.tree_util.keystr(path[-1:]) in (".a", ".b")

    def loss(params: Tree, batch: Tree) -> Any:
        """Without a derivative rule of its own, which quax does not know."""
        logits, labels = work.logits(params, batch), batch["labels"]
        each = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), jnp.maximum(labels, 0)
        )
        return jnp.sum(each * (labels >= 0)) / jnp.sum(labels >= 0)

    tree = jax.tree_util.tree_map_with_path(adapt, params)
    factors = jax.tree_util.tree_map_with_path(is_factor, tree)
    plain = library.quaxify(loss)
    return trained(
        lambda t, f, b: plain(eqx.combine(t, f), b), *eqx.partition(tree, factors)
    )


CONTENDERS: dict[str, Callable[[Workload, Tree], Contender]] = {
    "floor": floor,
    "by hand": by_hand,
    "jlora": transformed,
    "jlora, nf4": quantised,
    "full fine-tuning": full,
    "qwix": qwix,
    "quax": quax,
}


# -- what a worker builds --------------------------------------------------------------


def training(
    case: Mapping[str, Any], kind: str, account: bool = False, target: str | None = None
) -> Any:
    """A contender's step, on request with XLA's account of its memory.

    A target is a GPU that is described to XLA and need not be here; nothing runs then.
    XLA cannot time kernels there, and where it would choose by timing it takes its
    defaults: bytes hold, times there are none.

    Source: https://docs.jax.dev/en/latest/aot.html, and `jax.experimental.topologies`.
    """
    work = workload(Case(**case))
    run, state = CONTENDERS[kind](work, work.shapes if target else work.params)
    if target:
        on = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there)  # noqa: E731
        there = sharding_on(target)
        lowered = run.lower(*jax.tree.map(on, (state, work.batch)))
        compiled = lowered.compile()
        done = work_of(compiled.as_text())
        counts = {"kernels": done.kernels, "accessed_mib": done.bytes / 2**20}
        return lambda: None, _memory(compiled) | counts
    facts = _memory(run.lower(state, work.batch).compile()) if account else {}
    if kind != "floor":
        ours = isinstance(state, jlora.train.TrainState)
        half = state.trainable if ours else state[0][0]
        facts["trainable"] = sum(x.size for x in jax.tree.leaves(half))
        del half  # a step reuses its memory
    states = [state]
    del state

    def step() -> Any:
        # All that a program makes is there at once; jlora's state would make the trees
        # of its leaves for whoever asks for these.
        states[0], found = run(states[0], work.batch)
        return jax.block_until_ready(found)

    start = time.perf_counter()
    found = step()
    facts["first_step_s"] = time.perf_counter() - start
    named = isinstance(found, Mapping)
    facts["loss"] = float(found["loss"] if named else jax.tree.leaves(found)[0])
    return step, facts


def _memory(compiled: Any) -> dict[str, float]:
    a, flops = compiled.memory_analysis(), compiled.cost_analysis() or {}
    sizes = {
        "arguments": a.argument_size_in_bytes,
        "outputs": a.output_size_in_bytes,
        "aliased": a.alias_size_in_bytes,
        "temporary": a.temp_size_in_bytes,
    }
    sizes["peak"] = sum(sizes.values()) - 2 * sizes["aliased"]
    mib = {f"{name}_mib": size / 2**20 for name, size in sizes.items()}
    return {**mib, "xla_gflop": flops.get("flops", 0) / 1e9}


def sharding_on(target: str) -> Any:
    """Where arrays lie on a GPU that is not here."""
    from jax.experimental import topologies

    config = TARGETS[target].read_text()
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology="1x1x1", target_config=config
        )
    except NotImplementedError as error:
        raise ModuleNotFoundError(
            "JAX's CUDA plugin is not here: pip install 'jax[cuda12]', or name an "
            "interpreter that has it, --python jax=PATH"
        ) from error
    mesh = topologies.make_mesh(topology, (1,), ("device",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def matmul(case: Mapping[str, Any], size: int, times: int = 8) -> Any:
    """Square products, one after the other: the rate that the machine reaches at best.

    As many as take about as long as a step: what comes before a single one, a cold
    cache or another framework's threads that still spin, is a third of its time. The
    facts say too what operations the case needs.
    """
    work = workload(Case(**case))
    keys = jax.random.split(jax.random.key(0))
    x, y = (jax.random.normal(k, (size, size), work.case.dtype) for k in keys)
    x = x * size**-0.5  # products stay as large as y
    run = jax.jit(lambda x, y: jax.lax.fori_loop(0, times, lambda _, z: x @ z, y))
    gflop = {
        "gflop": times * 2 * size**3 / 1e9,
        "needed_gflop": work.needed_flops() / 1e9,
        "needed_gflop_full": work.needed_flops(full=True) / 1e9,
    }
    return lambda: jax.block_until_ready(run(x, y)), gflop
