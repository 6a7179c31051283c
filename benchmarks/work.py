"""A case in JAX: the model, random parameters, a batch, the loss, what it needs."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import jlora
import jlora.train
from benchmarks.cases import Case
from jlora import models

Tree = Any

MODELS: dict[str, tuple[Any, Any]] = {
    "t5": (models.T5, models.T5Config),
    "gpt2": (models.GPT2, models.GPT2Config),
    "llama": (models.Llama, models.LlamaConfig),
}
# Of all kernels: with saturated logits a benchmark times denormals.
STD = 0.02


class Workload:
    """What all contenders of a case share: the model, its parameters, a batch."""

    def __init__(self, case: Case) -> None:
        make, config = MODELS[case.model_type]
        self.case, dtype = case, jnp.dtype(case.dtype).type
        self.config = config.from_dict(case.config)
        self.model = make(
            self.config, dtype=dtype, param_dtype=dtype, **case.model_fields
        )
        self.batch = {k: jnp.asarray(v) for k, v in case.arrays().items()}

    @functools.cached_property
    def shapes(self) -> Tree:
        """The parameters' shapes."""
        inputs = self.inputs(self.batch)
        return jax.eval_shape(self.model.init, jax.random.key(0), *inputs)["params"]

    @functools.cached_property
    def params(self) -> Tree:
        """Random kernels, vectors of ones.

        Drawn leaf by leaf, for the program of a whole model's initialisation takes
        longer to compile than a step.
        """
        leaves, treedef = jax.tree.flatten(self.shapes)
        keys = jax.random.split(jax.random.key(0), len(leaves))
        drawn = map(_drawn, keys, [x.shape for x in leaves], [x.dtype for x in leaves])
        return jax.tree.unflatten(treedef, list(drawn))

    def inputs(self, batch: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return what the model takes after its parameters."""
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        if not self.case.target:
            return ids, mask
        return ids, mask, models.shift_right(batch["labels"], self.config)

    def logits(self, params: Tree, batch: Mapping[str, Any], model: Any = None) -> Any:
        """The plain model's logits, or another's."""
        return (model or self.model).apply({"params": params}, *self.inputs(batch))

    def totals(self, params: Tree, batch: Mapping[str, Any]) -> tuple[Any, Any]:
        """Summed cross entropy of the plain model, and the number of labels."""
        hidden, kernel = self.model.apply(
            {"params": params}, *self.inputs(batch), method="features"
        )
        return jlora.train.linear_cross_entropy(hidden, kernel, batch["labels"])

    def loss(self, params: Tree, batch: Mapping[str, Any]) -> Any:
        """Mean cross entropy of the plain model."""
        total, count = self.totals(params, batch)
        return total / count

    def loss_of_logits(self, params: Tree, batch: Tree, model: Any = None) -> Any:
        """The same loss, better where the head is trained: the logits are kept."""
        logits = self.logits(params, batch, model)
        total, count = jlora.train.cross_entropy(logits, batch["labels"])
        return total / count

    def lorafied(self, params: Tree) -> Tree:
        """Parameters, or shapes, with adapters."""
        case = self.case
        head = case.targets == "all-linear" and "lm_head" in params
        exclude = ["lm_head"] if head else []
        return jlora.lorafy(
            params, case.rank, case.names, alpha=2 * case.rank, exclude=exclude
        )

    def is_first(self, module: str) -> bool:
        """Whether a layer's input depends on nothing trained."""
        return re.fullmatch(self.case.family["first"], module) is not None

    def with_outputs(
        self, change: Callable[..., Any], params: Tree, batch: Tree
    ) -> Any:
        """The loss, with every layer's output through `change(module, x, y)`."""

        def layer(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
            y = next_fun(*args, **kwargs)
            if context.method_name != "__call__":
                return y
            path = context.module.path
            module = "/".join(n for n in path if not n.startswith("items"))
            return change(module, args[0] if args else None, y)

        with nn.intercept_methods(layer):
            return self.loss(params, batch)

    def needed_flops(self, *, full: bool = False) -> float:
        """The operations of a step that trains adapters, or with `full` all.

        Products only, so that the time these take at the rate of a large matmul is a
        bound no implementation reaches. One costs 2·tokens·i·o forward, the same for
        the gradient of its input, and the same for that of its kernel; attention's two
        products have two gradients each.
        """
        total = 3 * self._attention()
        adapted = kernels(self.lorafied(self.shapes))
        for leaf in jlora.survey(self.logits, self.shapes, self.batch).leaves.values():
            flops = sum(use.flops for use in leaf.uses if use.kind == "matmul")
            module = leaf.path.rpartition("/")[0]
            first = self.is_first(module)
            # Full fine-tuning trains the embedding, which is below the first layers.
            total += flops * (3 if full else 1 if first else 2)
            if module in adapted and not full:
                node = adapted[module]
                for t in node.adapters.values():
                    down, up = (flops * x.size / node.base.size for x in (t.a, t.b))
                    total += 3 * up + (2 if first else 3) * down
        return total

    def _attention(self) -> float:
        """The operations of attention's two products, forward."""
        case, c = self.case, self.case.config
        inner = math.prod(c[key] for key in case.family["inner"])
        layers, *decoders = (c[key] for key in case.family["depth"])
        pairs = layers * case.source**2
        for more in decoders:
            pairs += more * case.target * (case.target + case.source)
        return 4.0 * case.batch * inner * pairs


@functools.partial(jax.jit, static_argnums=(1, 2))
def _drawn(key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    if len(shape) < 2:
        return jnp.ones(shape, dtype)
    return STD * jax.random.normal(key, shape, dtype)


@functools.lru_cache(1)
def workload(case: Case) -> Workload:
    """Return a case's workload; the last one is kept for all that share a process."""
    return Workload(case)


def kernels(tree: Tree) -> dict[str, jlora.LowRank]:
    """Return the kernels that have adapters, by the layer they are of."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=jlora.is_node)
    return {path_name(p[:-1]): x for p, x in leaves if isinstance(x, jlora.LowRank)}


def by_path(tree: Tree) -> dict[str, Any]:
    """Return the leaves by their paths."""
    return {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def path_name(path: Any) -> str:
    """Return a path's names with slashes between them."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
