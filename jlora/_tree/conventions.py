"""What frameworks name their leaves, and what leaves say of their neighbours.

Flax's naming leaves open whether `[3, 64, 64]` are three layers' kernels or one of
three axes. The leaves around it may tell: a norm of one layer is a vector, so where a
norm is a matrix, and all its neighbours have as many rows, they are stacks of layers.
Where they do not, nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from jlora._paths import module_of, name_of

Shape = tuple[int, ...]

# Names that frameworks give to kernels, biases and embeddings: Flax, Haiku, Equinox.
EMBEDDING_NAMES = ("embedding", "embeddings")
KERNEL_NAMES = ("kernel", "weight", "w", *EMBEDDING_NAMES)
_NORM_NAMES = ("scale", "weight")  # as Flax and PyTorch call a norm's parameter
# Flax's attention: what splits its inputs into heads, and what joins them again.
_SPLITTING, _JOINING = ("query", "key", "value"), "out"

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
    return ndim > 2 and name_of(module_of(path)) == "experts"


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
    shapes = {path: _shape(leaf) for path, leaf in leaves.items()}
    names = {path: name_of(path) for path in leaves}
    kernels = [len(s) for path, s in shapes.items() if names[path] == "kernel"]
    norms = [len(s) for path, s in shapes.items() if names[path] in _NORM_NAMES]
    return (
        bool(kernels and norms)
        and min(kernels) > 2
        and set(norms) == {2}
        and all(shapes.values())
        and len({shape[0] for shape in shapes.values()}) == 1
    )


def attention_form(
    path: str, leaves: Mapping[str, Any]
) -> Literal["heads", "stack"] | None:
    """What the leaves around say of a kernel of three axes in an attention module.

    `query`, `key` and `value` are `[in, heads, width]` and `out` is `[heads, width,
    out]` in Flax's attention; the same names with three axes may as well be a stack of
    layers `[L, in, out]`. Biases differ, and so does how `out` follows `value`. Where
    these fit both, as with as many layers as inputs, a norm beside the module decides.

    Returns:
      The only form that is possible, or `None` where none is, or both are.

    >>> query = {"kernel": jnp.ones((3, 5, 7)), "bias": jnp.ones((5, 7))}
    >>> attention_form("query/kernel", {f"query/{k}": v for k, v in query.items()})
    'heads'
    """
    module = module_of(path)
    if name_of(path) != "kernel" or name_of(module) not in (*_SPLITTING, _JOINING):
        return None
    kernels: dict[str, Shape] = {}
    possible: list[tuple[bool, bool]] = []  # by each neighbour: as heads, as a stack
    for name in (*_SPLITTING, _JOINING):
        beside = "/".join(filter(None, (module_of(module), name)))
        kernel = _shape(leaves.get(f"{beside}/kernel"))
        bias = _shape(leaves.get(f"{beside}/bias"))
        if kernel:
            kernels[name] = kernel
        if len(kernel) == 3 and bias:
            of_heads = kernel[2:] if name == _JOINING else kernel[1:]
            possible.append((bias == of_heads, bias == (kernel[0], kernel[2])))
    query, value = (kernels.get(name, ()) for name in ("query", "value"))
    out, query, value = kernels.get(_JOINING, ()), query or value, value or query
    if len(query) == len(value) == len(out) == 3:
        heads = out[:2] == (query[1], value[2])  # value may have fewer of them
        possible.append((heads, out[:2] == (value[0], value[2])))
    if not possible:
        return None
    heads, stack = (all(form) for form in zip(*possible, strict=True))
    if heads and stack and _norm_beside(module_of(module), leaves):
        stack = False
    if heads == stack:
        return None
    return "heads" if heads else "stack"


def _norm_beside(module: str, leaves: Mapping[str, Any]) -> bool:
    """Whether there is a norm of one layer beside a module."""
    block = module_of(module)
    return any(
        len(_shape(leaf)) == 1
        and name_of(path) in _NORM_NAMES
        and module_of(module_of(path)) == block
        for path, leaf in leaves.items()
    )


def _shape(leaf: Any) -> Shape:
    return tuple(getattr(leaf, "shape", ()))
