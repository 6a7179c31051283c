"""The workload: one training step of a T5 of FLAN-T5-small's size, five ways.

Every contender takes the same batch through the same Flax model and ends in the same
optimiser; they differ in how the low-rank update gets into the products.
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
import jlora.train
from jlora.models import T5, T5Config

Tree = Any
RANK, ALPHA = 8, 16


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and batch size: batch B, source S and target T tokens."""

    batch: int = 8
    source: int = 64
    target: int = 64
    config: T5Config = dataclasses.field(default_factory=lambda: flan_t5_small())


def flan_t5_small() -> T5Config:
    """FLAN-T5-small's published sizes."""
    return T5Config.from_dict(
        {
            "model_type": "t5", "d_model": 512, "d_ff": 1024, "d_kv": 64,
            "num_heads": 6, "num_layers": 8, "num_decoder_layers": 8,
            "vocab_size": 32128, "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False, "dropout_rate": 0.0,
        }
    )  # fmt: skip


def tiny() -> T5Config:
    """For trying the benchmarks out."""
    return dataclasses.replace(
        flan_t5_small(), d_model=64, d_ff=128, d_kv=16, num_heads=4, num_layers=2,
        num_decoder_layers=2, vocab_size=512,
    )  # fmt: skip


class Workload:
    """The model, its random parameters, a batch, and the steps of the contenders."""

    def __init__(self, size: Size, dtype: Any = jnp.float32) -> None:
        self.model = T5(size.config, dtype=dtype)
        keys = jax.random.split(jax.random.key(0), 3)
        shape = (size.batch, size.source), (size.batch, size.target)
        ids = [jax.random.randint(k, s, 2, size.config.vocab_size)
               for k, s in zip(keys, shape, strict=False)]  # fmt: skip
        self.batch = {"source": ids[0], "labels": ids[1]}
        init = lambda key: self.model.init(key, ids[0], None, ids[1])["params"]  # noqa: E731
        self.params = jax.jit(init)(keys[2])
        self.config = size.config

    def loss(self, params: Tree, batch: Tree) -> Any:
        """Mean cross entropy of the plain model."""
        decoder_ids = jlora.models.shift_right(batch["labels"], self.config)
        logits = self.model.apply(
            {"params": params}, batch["source"], None, decoder_ids
        )
        total, count = jlora.train.cross_entropy(logits, batch["labels"])
        return total / count

    def lorafied(self, targets: Any = ("query", "value")) -> Tree:
        """The parameters with adapters."""
        return jlora.lorafy(self.params, RANK, targets, alpha=ALPHA)

    # -- contenders: each gives (function, its changing arguments) ---------------------

    def adapter_step(self, use: Callable[..., Any], targets: Any) -> Any:
        """A step that trains adapters, which `use(tree, batch)` gets into the loss."""
        trainable, frozen = jlora.split(self.lorafied(targets))
        tx = optax.adamw(1e-4)

        def step(state: Any, frozen: Tree, batch: Tree) -> Any:
            half, opt_state = state
            loss, grads = jax.value_and_grad(
                lambda t: use(jlora.combine(t, frozen), batch)
            )(half)
            updates, opt_state = tx.update(grads, opt_state, half)
            return (optax.apply_updates(half, updates), opt_state), loss

        return step, (trainable, tx.init(trainable)), frozen

    def jlora(self, targets: Any = ("query", "value")) -> Any:
        """The function transform."""
        return self.adapter_step(jlora.lora(self.loss), targets)

    def naive(self, targets: Any = ("query", "value")) -> Any:
        """`W + s·A·B` formed, then the plain model."""
        use = lambda tree, batch: self.loss(dense(tree), batch)  # noqa: E731
        return self.adapter_step(use, targets)

    def by_hand(self, targets: Any = ("query", "value")) -> Any:
        """`x·W + s·(x·A)·B` written into the layers."""

        def use(tree: Tree, batch: Tree) -> Any:
            with nn.intercept_methods(hand_written(tree)):
                return self.loss(bases(tree), batch)

        return self.adapter_step(use, targets)

    def full(self) -> Any:
        """Full fine-tuning with the same optimiser."""
        tx = optax.adamw(1e-4)

        def step(state: Any, frozen: Tree, batch: Tree) -> Any:
            params, opt_state = state
            loss, grads = jax.value_and_grad(self.loss)(params, batch)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        return step, (self.params, tx.init(self.params)), ()

    def floor(self) -> Any:
        """What no adapter can go below: forward, and backward to the first layer.

        The gradient goes to the outputs of the first blocks' adapted layers, of
        encoder and decoder; nothing is adapted or updated.
        """
        inner = self.config.num_heads * self.config.d_kv
        shapes = {}
        for stack, ids in (("encoder", "source"), ("decoder", "labels")):
            for name in "qv":
                path = (stack, "block", "0", "layer", "0", "SelfAttention", name)
                shapes["/".join(path)] = (*self.batch[ids].shape, inner)
        probes = {path: jnp.zeros(shape) for path, shape in shapes.items()}

        def probed(probes: Tree, params: Tree, batch: Tree) -> Any:
            def add(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
                out = next_fun(*args, **kwargs)
                path = module_path(context.module)
                is_probed = path in probes and context.method_name == "__call__"
                return out + probes[path] if is_probed else out

            with nn.intercept_methods(add):
                return self.loss(params, batch)

        def step(probes: Any, params: Tree, batch: Tree) -> Any:
            loss, grads = jax.value_and_grad(probed)(probes, params, batch)
            # Only a number of each: the floor's results cost nothing to store.
            return probes, (loss, jax.tree.map(lambda g: jnp.sum(g**2), grads))

        return step, probes, self.params


def module_path(module: nn.Module) -> str:
    """A bound module's place in the parameter tree."""
    names = [p for p in module.path if not p.startswith("items")]
    return "/".join(names)


def bases(tree: Tree) -> Tree:
    """The frozen tree under the adapters."""
    base = lambda x: jax.lax.stop_gradient(x.base) if jlora.is_node(x) else x  # noqa: E731
    return jax.tree.map(base, tree, is_leaf=jlora.is_node)


def dense(tree: Tree) -> Tree:
    """Every kernel with its update, formed."""

    def one(x: Any) -> Any:
        if not jlora.is_node(x):
            return x
        t = x.adapters[""]
        return jax.lax.stop_gradient(x.base) + t.scale * (t.a @ t.b)

    return jax.tree.map(one, tree, is_leaf=jlora.is_node)


def hand_written(tree: Tree) -> Callable[..., Any]:
    """A Flax interceptor that computes adapted layers as LoRA's authors write them."""
    nodes = {
        x.path.rpartition("/")[0]: x.adapters[""]
        for x in jax.tree.leaves(tree, is_leaf=jlora.is_node)
        if jlora.is_node(x)
    }

    def layer(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y = next_fun(*args, **kwargs)
        t = nodes.get(module_path(context.module))
        if t is None or context.method_name != "__call__":
            return y
        a, b = (f.astype(y.dtype) for f in (t.a, t.b))
        return y + t.scale.astype(y.dtype) * (args[0] @ a) @ b

    return layer
