"""The steps of other JAX libraries, on the same Flax model and batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

import jlora
from benchmarks._contenders import Contender, halves
from benchmarks._workload import Workload

Tree = Any


def qwix(work: Workload) -> Contender:
    """Qwix intercepts the products inside Flax modules.

    Source: github.com/google/qwix, `qwix/_src/providers/lora.py`.
    """
    import qwix as library

    paths = "|".join(_adapted(work))
    provider = library.LoraProvider(
        module_path=f"({paths})", rank=work.case.rank, alpha=work.case.alpha
    )
    model = library.apply_lora_to_model(work.model, provider)
    inputs = work.inputs(work.batch)
    made = jax.jit(model.init)(jax.random.key(0), *inputs)["params"]
    params = _joined(made, work.params)
    flat = {jax.tree_util.keystr(p): x for p, x in _leaves(params)}
    lora = {name: x for name, x in flat.items() if "_lora_" in name}
    rest = {name: x for name, x in flat.items() if "_lora_" not in name}
    treedef, names = jax.tree.structure(params), list(flat)
    if not lora:
        raise ValueError(f"qwix found nothing to adapt at {paths}")

    def loss(lora: Tree, rest: Tree, batch: Tree) -> Any:
        both = {**lora, **rest}
        tree = jax.tree.unflatten(treedef, [both[name] for name in names])
        logits = model.apply({"params": tree}, *work.inputs(batch))
        total, count = jlora.train.cross_entropy(logits, batch["labels"])
        return total / count

    return halves(lora, rest, loss)


def quax(work: Workload) -> Contender:
    """Quax dispatches on an array type that stands for `W + A·B`; it has no alpha.

    Source: github.com/patrick-kidger/quax, `quax/examples/lora`.
    """
    import equinox as eqx
    import quax as library
    from quax.examples import lora

    kernels = {f"{path}/kernel" for path in _adapted(work)}

    def adapt(path: Any, x: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in kernels:
            return x
        return lora.LoraArray(x, rank=work.case.rank, key=jax.random.key(0))

    tree = jax.tree_util.tree_map_with_path(adapt, work.params)

    def is_factor(path: Any, x: Any) -> bool:
        return jax.tree_util.keystr(path[-1:]) in (".a", ".b")

    mask = jax.tree_util.tree_map_with_path(is_factor, tree)
    trainable, frozen = eqx.partition(tree, mask)
    plain = library.quaxify(lambda tree, batch: _plain_loss(work, tree, batch))
    return halves(trainable, frozen, lambda t, f, b: plain(eqx.combine(t, f), b))


def lorax(work: Workload) -> Contender:
    """Lorax interprets the program as jlora does; its last release is of 2024.

    It fails at its import on every JAX that jlora runs on. The error is in the tables.

    Source: github.com/davisyoshida/lorax.
    """
    import lorax as library

    raise NotImplementedError(f"{library.__name__} imports again: write its step here")


def _adapted(work: Workload) -> list[str]:
    nodes = jax.tree.leaves(work.lorafied(), is_leaf=jlora.is_node)
    return [x.path.rpartition("/")[0] for x in nodes if isinstance(x, jlora.LowRank)]


def _plain_loss(work: Workload, params: Tree, batch: Tree) -> Any:
    """The loss without a derivative rule of its own, which quax does not know."""
    logits = work.model.apply({"params": params}, *work.inputs(batch))
    labels = batch["labels"]
    each = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), jnp.maximum(labels, 0)
    )
    return jnp.sum(each * (labels >= 0)) / jnp.sum(labels >= 0)


def _leaves(tree: Tree) -> list[Any]:
    return jax.tree_util.tree_leaves_with_path(tree)


def _joined(made: Tree, params: Tree) -> Tree:
    """`made`, with the leaves it shares with `params` taken from there."""
    own = {jax.tree_util.keystr(p): x for p, x in _leaves(params)}
    pick = lambda p, x: own.get(jax.tree_util.keystr(p), x)  # noqa: E731
    return jax.tree_util.tree_map_with_path(pick, made)
