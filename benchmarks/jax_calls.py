"""The calls that `dispatch` times: one step, given its arrays in several forms.

The loss is of one kernel alone: all are updated, and none takes long to compile.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
import jlora.train

IN, OUT, RANK = 3, 5, 2
TX = optax.adamw(1e-3)
Call = tuple[Callable[[], Any], int]


def calling(kind: str, kernels: int) -> Any:
    """The call of a contender's step, and how many arrays it takes."""
    keys = [f"layer{i}" for i in range(kernels)]
    rng = np.random.default_rng(0)
    drawn = jnp.asarray(rng.normal(0, 0.1, (kernels, IN, OUT)), jnp.float32)
    tree = jlora.lorafy(dict(zip(keys, drawn, strict=True)), RANK, keys)

    def loss(params: Any, batch: Any, key: Any = None) -> Any:
        return jnp.mean(batch @ params[keys[0]])

    batch = jnp.ones((1, IN))
    build: Any = {"jlora": ours, "flat lists": flat, "trees of nodes": trees}[kind]
    call, arrays = build(loss, tree, batch)
    last: list[Any] = [None]

    def step() -> None:
        jax.block_until_ready(last[0])
        last[0] = call()

    begun = time.perf_counter()
    step()
    jax.block_until_ready(last[0])
    return step, {"first_step_s": time.perf_counter() - begun, "arrays": arrays}


def ours(loss: Any, tree: Any, batch: Any) -> Call:
    """Jlora's own training step."""
    step = jlora.train.make_train_step(loss, TX)
    states = [jlora.train.TrainState.create(tree, TX)]
    arrays = len(step.trace(states[0], batch).jaxpr.in_avals)

    def call() -> Any:
        states[0], metrics = step(states[0], batch)
        return metrics

    return call, arrays


def flat(loss: Any, tree: Any, batch: Any) -> Call:
    """A step of one's own, of lists: each array by itself, and no other trees."""
    halves = jlora.split(tree)
    structures = list(map(jax.tree.structure, halves))

    def of_lists(half: Any, frozen: Any, batch: Any) -> Any:
        both = map(jax.tree.unflatten, structures, (half, frozen))
        return jlora.lora(loss)(jlora.combine(*both), batch)

    half, frozen = map(jax.tree.leaves, halves)
    return _jitted(of_lists, half, frozen, batch)


def trees(loss: Any, tree: Any, batch: Any) -> Call:
    """A step of one's own, of the halves as `jlora.split` gives them."""

    def of_halves(half: Any, frozen: Any, batch: Any) -> Any:
        return jlora.lora(loss)(jlora.combine(half, frozen), batch)

    return _jitted(of_halves, *jlora.split(tree), batch)


def _jitted(loss: Any, half: Any, frozen: Any, batch: Any) -> Call:
    """The step that jlora makes, as a jitted function of what it is given."""

    def step(half: Any, opt_state: Any, frozen: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(half, frozen, batch)
        updates, opt_state = TX.update(grads, opt_state, half)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(grads)}
        return (optax.apply_updates(half, updates), opt_state), metrics

    half = jax.tree.map(jnp.copy, half)
    moving = [(half, TX.init(half))]
    run = jax.jit(step, donate_argnums=(0, 1))

    def call() -> Any:
        moving[0], metrics = run(*moving[0], frozen, batch)
        return metrics

    return call, len(jax.tree.leaves((moving[0], frozen, batch)))
