"""Scanned layers, told by their leaves: which axes of a kernel are its own.

Flax's naming leaves open whether `[3, 64, 64]` are three layers' kernels or one of
three axes. The layers around it do not: a norm of one layer is a vector, so where a
norm is a matrix, and all its neighbours have as many rows, they are stacks of layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jlora._paths import module_of

if TYPE_CHECKING:
    from jlora._tree.targets import Target

# Names that frameworks give to kernels, biases and embeddings: Flax, Haiku, Equinox.
EMBEDDING_NAMES = ("embedding", "embeddings")
KERNEL_NAMES = ("kernel", "weight", "w", *EMBEDDING_NAMES)
_NORM_NAMES = ("scale", "weight")  # as Flax and PyTorch call a norm's parameter

# A role's spellings, as suffixes of a module's path. `NAME#k/n` is the k-th of n equal
# slices of a fused kernel's outputs.
ROLES: dict[str, tuple[str, ...]] = {
    "query": ("query", "q", "q_proj", "c_attn#0/3", "qkv#0/3", "query_key_value#0/3"),
    "key": ("key", "k", "k_proj", "c_attn#1/3", "qkv#1/3", "query_key_value#1/3"),
    "value": ("value", "v", "v_proj", "c_attn#2/3", "qkv#2/3", "query_key_value#2/3"),
    "out": ("out", "o", "o_proj", "out_proj", "attn/c_proj", "attention/output/dense"),
    "gate": ("gate", "gate_proj", "wi_0"),
    "up": ("up", "up_proj", "wi_1", "wi", "mlp/c_fc", "fc1", "intermediate/dense"),
    "down": ("down", "down_proj", "DenseReluDense/wo", "mlp/c_proj", "fc2"),
}


def is_experts(path: str, ndim: int) -> bool:
    """Whether it is a stack of experts' kernels `[..., E, in, out]`, by its name.

    >>> is_experts("layers/0/mlp/experts/gate_up_proj", 3)
    True
    """
    return ndim > 2 and module_of(path).rpartition("/")[2] == "experts"


def stacked_leaves(leaves: Mapping[str, Any]) -> set[str]:
    """Return the paths of the leaves with a leading axis of layers.

    >>> norm = {"weight": jnp.ones((3, 5))}
    >>> tree = {"layers": {"up": {"kernel": jnp.ones((3, 5, 7))}, "norm": norm}}
    >>> paths = {"layers/up/kernel": tree["layers"]["up"]["kernel"]}
    >>> sorted(stacked_leaves({**paths, "layers/norm/weight": norm["weight"]}))
    ['layers/norm/weight', 'layers/up/kernel']
    """
    under: dict[str, dict[str, Any]] = {}
    for path, leaf in leaves.items():
        parts = path.split("/")
        for depth in range(1, len(parts)):
            # What is under a number beside a stack is one layer's own.
            if not parts[depth].isdigit() or depth == len(parts) - 1:
                under.setdefault("/".join(parts[:depth]), {})[path] = leaf
    found: set[str] = set()
    for inner in under.values():
        if not found.issuperset(inner) and _is_stack(inner):
            found.update(inner)
    return found


def _is_stack(leaves: Mapping[str, Any]) -> bool:
    shapes = {path: tuple(getattr(leaf, "shape", ())) for path, leaf in leaves.items()}
    names = {path: path.rpartition("/")[2] for path in leaves}
    kernels = [len(s) for path, s in shapes.items() if names[path] == "kernel"]
    norms = [len(s) for path, s in shapes.items() if names[path] in _NORM_NAMES]
    return (
        bool(kernels and norms)
        and min(kernels) > 2
        and set(norms) == {2}
        and all(shapes.values())
        and len({shape[0] for shape in shapes.values()}) == 1
    )


def with_axes(target: Target, leaf: Any) -> Target:
    """Return the target with the axes of a stack of kernels `[L, in, out]`.

    What the target says itself stays, and so do kernels with more axes.
    """
    if target.in_axes is not None or len(leaf.shape) != 3:
        return target
    return dataclasses.replace(target, in_axes=(1,), out_axes=(2,), batch_axes=(0,))
