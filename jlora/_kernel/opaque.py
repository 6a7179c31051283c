"""What all nodes have in common: a note of where they stood, and being no array.

A node that reaches code which knows nothing of adapters must fail there, whatever that
code does first: read an attribute, call a method, compute, index, iterate, compare.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import numpy as np

from jlora import _compat
from jlora._errors import UnmergedError


class Note:
    """Text in a tree's structure that tells no two structures apart.

    A path in the structure would make equal nodes differ: a block that is called for
    every layer would be compiled for each, and trees under other roots would not map.
    So what a note says is for people. Behind `jax.jit` it is that of the tree which was
    traced first; no result may depend on it.
    """

    __slots__ = ("text",)

    def __init__(self, text: Any) -> None:
        self.text = text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Note)

    def __hash__(self) -> int:
        return hash(Note)

    def __repr__(self) -> str:
        return repr(self.text)


class Origin(str):
    """A node's path in the tree in which it was made, and what else stood there.

    Attributes:
      leaves: the paths of the leaves that are neither trained nor adapted.
    """

    leaves: frozenset[str]

    def __new__(cls, path: str, leaves: frozenset[str] = frozenset()) -> Origin:
        """A path that remembers."""
        made = super().__new__(cls, path)
        made.leaves = leaves
        return made


class Several:
    """Base of what holds several trees of parameters and is none itself.

    Its leaves are arrays, so that all functions of trees would take it, and each would
    make another kind of nonsense of it.
    """

    def no_parameters(self) -> str:
        """The message of the error: what it is, and which tree to pass."""
        raise NotImplementedError


class UnmergedAttributeError(UnmergedError, AttributeError):
    """An attribute that arrays have; `hasattr` and `getattr` ask without harm."""


class Opaque:
    """Base of the nodes: refuses to be taken for an array.

    Attributes:
      path: where the node stood, for messages.
    """

    path: str
    kind = "adapted kernel"

    def __init_subclass__(cls) -> None:
        _compat.refuse_operands(cls, lambda x: x.__jax_array__())

    def unmerged(self, used: str = "") -> str:
        """The message of an `UnmergedError`.

        Args:
          used: what was asked of the node.
        """
        name = f" {self.path!r}" if self.path else ""
        return (
            f"the {self.kind}{name} reached code that does not know adapters"
            f"{f' ({used})' if used else ''}.\nWrap the function that takes the "
            "parameters: `jlora.lora(model.apply)(params, x)`; or make the tree plain "
            "first: `jlora.merge(params)`."
        )

    def __jax_array__(self) -> NoReturn:
        """Called by JAX when the node meets ordinary code: never a quiet merge."""
        raise UnmergedError(self.unmerged())

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """NumPy's way in, refused for the same reason."""
        raise UnmergedError(self.unmerged())

    def __iter__(self) -> Iterator[Any]:
        """Refused, as all that follows."""
        raise UnmergedError(self.unmerged("iteration"))

    def __eq__(self, other: object) -> bool:
        """Identity, as for any object; an array would be compared number by number."""
        if isinstance(
            other, jax.Array | np.ndarray | np.generic | complex | float | int
        ):
            raise UnmergedError(self.unmerged("=="))
        return self is other

    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        if name in _OF_ARRAYS:
            raise UnmergedAttributeError(self.unmerged(f".{name}"))
        raise AttributeError(
            f"{type(self).__name__!r} object has no attribute {name!r}"
        )


def _refuse(name: str) -> Any:
    def refuse(self: Opaque, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnmergedError(self.unmerged(name))

    return refuse


_OF_ARRAYS = frozenset(name for name in dir(jax.Array) if not name.startswith("_"))
_BINARY = (
    "add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "divmod", "pow",
    "lshift", "rshift", "and", "or", "xor",
)  # fmt: skip
_OTHER = (
    "neg", "pos", "abs", "invert", "round", "bool", "int", "float", "complex", "index",
    "len", "contains", "getitem", "setitem", "lt", "le", "gt", "ge",
)  # fmt: skip
for _name in (*_BINARY, *(f"r{n}" for n in _BINARY), *_OTHER):
    setattr(Opaque, f"__{_name}__", _refuse(_name))
