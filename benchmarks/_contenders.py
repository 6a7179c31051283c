"""The steps that are timed against each other in JAX.

Each contender is `(step, state, frozen)`: `step(state, frozen, batch)` returns the new
state and the loss. All go through one Flax model and one optimiser; they differ in how
the low-rank update gets into the products.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import jlora
from benchmarks._workload import Workload, adapted_kernels, module_path

Tree = Any
Contender = tuple[Callable[..., Any], Tree, Tree]


def adamw() -> optax.GradientTransformation:
    """The optimiser of every contender."""
    return optax.adamw(1e-4)


def adapter_step(work: Workload, use: Callable[[Tree, Tree], Any]) -> Contender:
    """A step that trains adapters, which `use(tree, batch)` gets into the loss."""
    trainable, frozen = jlora.split(work.lorafied())
    return halves(trainable, frozen, lambda t, f, b: use(jlora.combine(t, f), b))


def halves(trainable: Tree, frozen: Tree, loss: Callable[..., Any]) -> Contender:
    """A step of `loss(trainable, frozen, batch)` that trains the first half."""
    tx = adamw()

    def step(state: Any, frozen: Tree, batch: Tree) -> Any:
        half, opt_state = state
        value, grads = jax.value_and_grad(loss)(half, frozen, batch)
        updates, opt_state = tx.update(grads, opt_state, half)
        return (optax.apply_updates(half, updates), opt_state), value

    return step, (trainable, tx.init(trainable)), frozen


def transformed(work: Workload) -> Contender:
    """Jlora's function transform."""
    return adapter_step(work, jlora.lora(work.loss))


def naive(work: Workload) -> Contender:
    """`W + s·A·B` formed, then the plain model."""

    def merged(x: Any) -> Any:
        if not jlora.is_node(x):
            return x
        base = jax.lax.stop_gradient(x.base)
        return dataclasses.replace(x, base=base).merged()

    def use(tree: Tree, batch: Tree) -> Any:
        return work.loss(jax.tree.map(merged, tree, is_leaf=jlora.is_node), batch)

    return adapter_step(work, use)


def by_hand(work: Workload) -> Contender:
    """`x·W + s·(x·A)·B` written into the layers."""

    def use(tree: Tree, batch: Tree) -> Any:
        with nn.intercept_methods(_hand_written(tree)):
            return work.loss(bases(tree), batch)

    return adapter_step(work, use)


def full(work: Workload) -> Contender:
    """Full fine-tuning; parameters in float32 whatever the model computes in."""
    params = jax.tree.map(lambda x: x.astype(jnp.float32), work.params)
    return halves(
        params, (), lambda params, _, batch: work.loss_of_logits(params, batch)
    )


def floor(work: Workload) -> Contender:
    """What no adapter can go below: forward, and backward to the first layers.

    The gradient goes to the outputs of the first adapted layers; nothing is adapted or
    updated.
    """
    first, shapes = work.first_layers(), {}

    def note(path: str, y: Any) -> Any:
        if path in first:
            shapes[path] = (y.shape, y.dtype)
        return y

    jax.eval_shape(lambda p, b: work.with_outputs(note, p, b), work.params, work.batch)
    probes = {path: jnp.zeros(*shape) for path, shape in shapes.items()}

    def probed(probes: Tree, params: Tree, batch: Tree) -> Any:
        add = lambda path, y: y + probes[path] if path in probes else y  # noqa: E731
        return work.with_outputs(add, params, batch)

    def step(probes: Any, params: Tree, batch: Tree) -> Any:
        loss, grads = jax.value_and_grad(probed)(probes, params, batch)
        # Only a number of each: the floor's results cost nothing to store.
        sums = jax.tree.map(lambda g: jnp.sum(g**2), grads)
        return probes, (loss, sums)

    return step, probes, work.params


def masked(work: Workload, *, clip: bool = False) -> Contender:
    """Train the whole tree through `optax.masked`, as optax's users know it."""
    tree, tx = work.lorafied(), adamw()
    if clip:
        tx = optax.chain(optax.clip_by_global_norm(1.0), tx)
    tx = optax.masked(tx, jlora.trainable_mask(tree))
    loss = jlora.lora(work.loss)

    def step(state: Any, frozen: Tree, batch: Tree) -> Any:
        params, opt_state = state
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    return step, (tree, tx.init(tree)), ()


def clipped(work: Workload) -> Contender:
    """`optax.masked` around a clip by the global norm."""
    return masked(work, clip=True)


def bases(tree: Tree) -> Tree:
    """The frozen tree under the adapters."""
    base = lambda x: jax.lax.stop_gradient(x.base) if jlora.is_node(x) else x  # noqa: E731
    return jax.tree.map(base, tree, is_leaf=jlora.is_node)


def _hand_written(tree: Tree) -> Callable[..., Any]:
    """A Flax interceptor that computes adapted layers as LoRA's authors write them."""
    nodes = {x.path.rpartition("/")[0]: x for x in adapted_kernels(tree)}

    def layer(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y = next_fun(*args, **kwargs)
        node = nodes.get(module_path(context.module))
        if node is None or context.method_name != "__call__":
            return y
        for t in node.adapters.values():
            a, b = (f.astype(y.dtype) for f in (t.a, t.b))
            low = t.scale.astype(y.dtype) * (args[0] @ a) @ b
            start, width = t.starts[-1], low.shape[-1]
            whole = width == y.shape[-1]
            y = y + low if whole else y.at[..., start : start + width].add(low)
        return y

    return layer
