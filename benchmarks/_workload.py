"""A case in JAX: the model, random parameters, a batch, the loss."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import jlora
import jlora.train
from benchmarks._batch import HEAD_STD, batch_of
from benchmarks._cases import Case
from jlora import models

Tree = Any

MODELS: dict[str, tuple[Any, Any]] = {
    "t5": (models.T5, models.T5Config),
    "gpt2": (models.GPT2, models.GPT2Config),
    "llama": (models.Llama, models.LlamaConfig),
}
# The adapted layers whose inputs depend on nothing trained: where backward may end.
FIRST = {
    "t5": r"(en|de)coder/block/0/layer/0/SelfAttention/[qkv]",
    "gpt2": r"transformer/h/0/attn/c_attn",
    "llama": r"model/layers/0/self_attn/[qkv]_proj",
}


class Workload:
    """What all contenders of a case share.

    Attributes:
      case: what is measured.
      model: the Flax module.
      params: random parameters in the case's dtype; with `abstract` their shapes.
      batch: arrays by name.
    """

    def __init__(self, case: Case, *, abstract: bool = False) -> None:
        make, config = MODELS[case.family]
        self.case, dtype = case, jnp.dtype(case.dtype).type
        self.config = config.from_dict(case.config)
        self.model = make(
            self.config, dtype=dtype, param_dtype=dtype, **case.model_fields
        )
        self.batch = {k: jnp.asarray(v) for k, v in batch_of(case).items()}
        make_params = functools.partial(jax.eval_shape, self.init)
        if not abstract:
            make_params = jax.jit(self.init)
        self.params = make_params(jax.random.key(0))

    def init(self, key: Any) -> Tree:
        """Return random parameters; the head, where it is its own, at `HEAD_STD`."""
        params = self.model.init(key, *self.inputs(self.batch))["params"]
        if "lm_head" in params:
            kernel = params["lm_head"]["kernel"]
            draw = HEAD_STD * jax.random.normal(key, kernel.shape, kernel.dtype)
            params = {**params, "lm_head": {"kernel": draw}}
        return params

    def inputs(self, batch: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return what the model takes after its parameters."""
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        if not self.case.target:
            return ids, mask
        return ids, mask, models.shift_right(batch["labels"], self.config)

    def totals(self, params: Tree, batch: Mapping[str, Any]) -> tuple[Any, Any]:
        """Summed cross entropy of the plain model, and the number of labels."""
        hidden, kernel = self.model.apply(
            {"params": params}, *self.inputs(batch), method="features"
        )
        return jlora.train.linear_cross_entropy(hidden, kernel, batch["labels"])

    def loss_of_logits(self, params: Tree, batch: Mapping[str, Any]) -> Any:
        """The same loss, better where the head is trained: the logits are kept."""
        logits = self.model.apply({"params": params}, *self.inputs(batch))
        total, count = jlora.train.cross_entropy(logits, batch["labels"])
        return total / count

    def loss(self, params: Tree, batch: Mapping[str, Any]) -> Any:
        """Mean cross entropy of the plain model."""
        total, count = self.totals(params, batch)
        return total / count

    def lorafied(self) -> Tree:
        """The parameters with adapters."""
        case = self.case
        head = ["lm_head"] if "lm_head" in self.params else []
        return jlora.lorafy(
            self.params,
            case.rank,
            case.targets,
            alpha=case.alpha,
            exclude=head if case.targets == "all-linear" else [],
        )

    def first_layers(self) -> list[str]:
        """Return the module paths of the first adapted layers."""
        adapted = [x.path.rpartition("/")[0] for x in adapted_kernels(self.lorafied())]
        pattern = FIRST[self.case.family]
        first = [path for path in adapted if re.fullmatch(pattern, path)]
        if not first:
            raise ValueError(
                f"the floor ends at {pattern}, and {self.case.targets} adapt none of "
                "these.\nLeave the floor out with --contenders."
            )
        return first

    def with_outputs(self, change: Callable[[str, Any], Any], *args: Any) -> Any:
        """The loss, with every layer's output passed through `change(path, y)`."""

        def layer(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
            out = next_fun(*args, **kwargs)
            is_call = context.method_name == "__call__"
            return change(module_path(context.module), out) if is_call else out

        with nn.intercept_methods(layer):
            return self.loss(*args)


def adapted_kernels(tree: Tree) -> list[jlora.LowRank]:
    """Return the kernels of a tree that have adapters."""
    nodes = jax.tree.leaves(tree, is_leaf=jlora.is_node)
    return [x for x in nodes if isinstance(x, jlora.LowRank)]


_KNOWN: dict[str, Workload] = {}


def workload(case: Mapping[str, Any]) -> Workload:
    """Return the workload of `dataclasses.asdict(case)`; the last one is kept."""
    key = json.dumps(case, sort_keys=True)
    if key not in _KNOWN:
        _KNOWN.clear()
        _KNOWN[key] = Workload(Case(**case))
    return _KNOWN[key]


def module_path(module: nn.Module) -> str:
    """A bound module's place in the parameter tree."""
    names = [p for p in module.path if not p.startswith("items")]
    return "/".join(names)
