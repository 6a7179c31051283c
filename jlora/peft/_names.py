"""PyTorch's names for the leaves of a parameter tree."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jlora._errors import ShapeError, TargetError
from jlora._kernel.quantized import dense
from jlora._paths import BIAS_NAMES, module_of
from jlora._processes import on_host
from jlora._tree import conventions, matching
from jlora.peft._config import around

Modules = str | Sequence[str]
Names = Mapping[str, Modules] | Callable[[str], Modules] | None


class Model(Protocol):
    """A model that tells what its modules are called in PyTorch."""

    def torch_names(self) -> Mapping[str, Modules]:
        """Return what `names=` takes, where dots for slashes is not it."""


_PARAMS = {"kernel": "weight", "w": "weight", "scale": "weight", "b": "bias"}
_PARAMS |= dict.fromkeys(conventions.EMBEDDING_NAMES, "weight")
# GPT-2's layers that store their weight as [in, out], where `fan_in_fan_out` says so.
_CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")
# How PyTorch's models declare the parameters of one module; a tree sorts its keys.
_ORDER = ("gate_up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Param:
    """One parameter of the PyTorch model, and the leaf that holds it.

    Attributes:
      path: the leaf.
      shape: the leaf's shape.
      module: the module's name there, `encoder.block.0.layer.0.SelfAttention.q`.
      name: the parameter's name there, `weight`.
      tied: whether the module is a linear layer that uses an embedding's table.
      called: False for a module that holds a table for others and is never called.
    """

    path: str
    shape: tuple[int, ...]
    module: str
    name: str
    tied: bool = False
    called: bool = True

    @property
    def key(self) -> str:
        """The parameter's full name."""
        return f"{self.module}.{self.name}" if self.module else self.name

    @property
    def last(self) -> str:
        """The last part of the leaf's path."""
        return last_of(self.path)

    @property
    def is_kernel(self) -> bool:
        """Whether a module's adapter may lie on it."""
        return self.last in conventions.KERNEL_NAMES and len(self.shape) > 1

    @property
    def is_table(self) -> bool:
        """Whether it is an embedding, by its name."""
        return self.last in conventions.EMBEDDING_NAMES

    @property
    def is_experts(self) -> bool:
        """Whether it is a parameter of its own, stacked by expert, [E, in, out]."""
        told = conventions.KERNEL_NAMES + BIAS_NAMES
        return len(self.shape) == 3 and self.last not in told

    def axes(self) -> tuple[int, int] | None:
        """How many axes of a linear kernel are inputs and outputs; None if neither.

        Kernels of three axes that are named as Flax's attention names them are linear;
        others are convolutions.
        """
        owner = module_of(self.path).rpartition("/")[2]
        if self.last not in ("kernel", "w"):
            return None
        if len(self.shape) == 2:
            return 1, 1
        if len(self.shape) == 3 and owner in ("query", "key", "value"):
            return 1, 2
        return (2, 1) if len(self.shape) == 3 and owner == "out" else None

    def conv(self) -> tuple[int, ...] | None:
        """A convolution's dimensions in PyTorch's order, (out, in, *window); or None.

        Flax and Haiku store `[*window, in, out]` as `kernel` or `w`, Equinox as PyTorch
        does, as `weight`.
        """
        ndim = len(self.shape)
        if self.axes() is not None or not 3 <= ndim <= 5:
            return None
        if self.last in ("kernel", "w"):
            return (ndim - 1, ndim - 2, *range(ndim - 2))
        return tuple(range(ndim)) if self.last == "weight" else None

    def as_torch(self, value: Any, fan_in_fan_out: bool) -> np.ndarray:
        """The leaf's value as PyTorch lays it out."""
        value = on_host(dense(value))
        if self.name == "bias":
            return np.ascontiguousarray(value.reshape(-1))
        if (order := self.conv()) is not None:
            return np.ascontiguousarray(value.transpose(order))
        if (axes := self._linear()) is None:
            return np.ascontiguousarray(value)
        ins = math.prod(self.shape[: axes[0]])
        value = value.reshape(ins, -1)
        return np.ascontiguousarray(value if self._as_is(fan_in_fan_out) else value.T)

    def from_torch(self, value: np.ndarray, fan_in_fan_out: bool) -> np.ndarray:
        """Inverse of `as_torch`."""
        if (order := self.conv()) is not None and self.name != "bias":
            value = value.transpose(np.argsort(order))
        elif self._linear() is not None and not self._as_is(fan_in_fan_out):
            value = value.T
        return np.ascontiguousarray(value).reshape(self.shape)

    def torch_shape(self, fan_in_fan_out: bool) -> tuple[int, ...]:
        """The shape that PyTorch's parameter has."""
        if self.name == "bias":
            return (math.prod(self.shape),)
        if (order := self.conv()) is not None:
            return tuple(self.shape[d] for d in order)
        if (axes := self._linear()) is None:
            return self.shape
        ins, outs = (math.prod(self.shape[s]) for s in
                     (slice(axes[0]), slice(axes[0], None)))  # fmt: skip
        return (ins, outs) if self._as_is(fan_in_fan_out) else (outs, ins)

    @property
    def may_be_conv1d(self) -> bool:
        """Whether PyTorch may store it as [in, out]."""
        named = self.module.rpartition(".")[2] in _CONV1D
        return named and self.name == "weight" and self.axes() is not None

    def _as_is(self, fan_in_fan_out: bool) -> bool:
        return fan_in_fan_out and self.may_be_conv1d

    def _linear(self) -> tuple[int, int] | None:
        axes = self.axes()
        if (axes is None and self.last in ("kernel", "w")) or self.last in _ORDER:
            raise ShapeError(
                f"the kernel {self.path!r} {self.shape} has {len(self.shape)} axes, "
                "and jlora.peft knows how PyTorch lays out whole linear layers, "
                "embeddings, convolutions and Flax's attention.\nTake it out of "
                "train=[...] and adapt it, or reshape it."
            )
        return axes


class Table:
    """All parameters of a tree by PyTorch's names.

    Args:
      shapes: the leaves' shapes by path.
      names: see `jlora.peft.load`.

    Raises:
      TargetError: two leaves get one name, or `names` names what is not there.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], names: Names = None):
        self.params: dict[str, Param] = {}
        self.of_leaf: dict[str, list[Param]] = {}
        self._told = list(names) if isinstance(names, Mapping) else []
        for path, modules in _named(shapes, names):
            for module in modules:
                self._add(_param(path, tuple(shapes[path]), module))

    def _add(self, param: Param) -> None:
        if param.key in self.params and param.last == "scale":
            # A `scale` beside a `kernel` is no weight.
            param = dataclasses.replace(param, name=param.last)
        other = self.params.setdefault(param.key, param)
        if other is not param:
            raise TargetError(
                f"the leaves {other.path!r} and {param.path!r} would both be "
                f"{param.key!r} in PyTorch.\nPass names={{module: name there}} that "
                "tells them apart."
            )
        self.of_leaf.setdefault(param.path, []).append(param)

    def weight(self, module: str) -> Param | None:
        """The module's kernel or table, if it has one."""
        param = self.params.get(f"{module}.weight")
        return param if param is not None and param.is_kernel else None

    def kernels(self) -> list[str]:
        """The modules that an adapter may lie on, and that are called."""
        return [p.module for p in self.params.values() if p.is_kernel and p.called]

    def modules(self) -> list[str]:
        """Every module, those that only hold others included."""
        found = (outer for p in self.params.values() for outer in around(p.module))
        return [m for m in dict.fromkeys(found) if m]

    def experts(self) -> list[str]:
        """The parameters that an adapter may lie on without their module."""
        return [key for key, p in self.params.items() if p.is_experts]

    def sharing(self, module: str) -> list[Param]:
        """All users of a module's weight, itself among them."""
        return self.of_leaf[self.params[f"{module}.weight"].path]

    def home(self, path: str) -> Param:
        """The module that holds a table, where several use it."""
        users = self.of_leaf[path]
        return next((p for p in users if not p.called), users[0])

    def in_order(self, params: Iterable[Param]) -> list[Param]:
        """Some parameters of one module, as the PyTorch model declares them.

        Raises:
          TargetError: that is not known.
        """
        params = list(params)
        if len(params) < 2:
            return params
        if all(p.path in self._told for p in params):
            return sorted(params, key=lambda p: self._told.index(p.path))
        if all(p.name in _ORDER for p in params):
            return sorted(params, key=lambda p: _ORDER.index(p.name))
        listed = ", ".join(p.path for p in params)
        raise TargetError(
            f"PEFT numbers the adapters on {listed} in the order in which the PyTorch "
            "model declares these parameters, and a tree does not tell it.\nPass "
            "names={leaf: module, ...} that lists them in that order."
        )


def _param(path: str, shape: tuple[int, ...], module: str) -> Param:
    last = last_of(path)
    uncalled = module.startswith("(") and module.endswith(")")
    module = module[1:-1] if uncalled else module
    tied, module = module.endswith(".T"), module.removesuffix(".T")
    return Param(path, shape, module, _PARAMS.get(last, last), tied, not uncalled)


def _named(
    shapes: Mapping[str, Any], names: Names
) -> Iterable[tuple[str, tuple[str, ...]]]:
    """Each leaf's path with the names of the modules that use it."""
    unused = set(names) if isinstance(names, Mapping) else set()
    for path in shapes:
        owner = module_of(path)
        modules: Modules = owner.replace("/", ".")
        if isinstance(names, Mapping) and (path in names or owner in names):
            found = path if path in names else owner
            unused.discard(found)
            modules = names[found]
        elif callable(names):
            modules = names(owner)
        elif last_of(path) in conventions.EMBEDDING_NAMES:
            modules = _users(owner, shapes)
        yield path, (modules,) if isinstance(modules, str) else tuple(modules)
    if unused:
        near = ", ".join(matching.nearest(min(unused), shapes))
        raise TargetError(
            f"names: {min(unused)!r} is no leaf or module of this tree.\nThe nearest "
            f"leaves are {near}."
        )


def _users(owner: str, shapes: Mapping[str, Any]) -> tuple[str, ...]:
    """The modules that use a table, in Hugging Face's models.

    A tree without `lm_head` beside the model proper has a head that uses the table.
    T5's module `shared` is itself never called: an adapter of that name does nothing.
    """
    tops = {path.partition("/")[0] for path in shapes}
    if owner == "shared" and tops & {"encoder", "decoder"}:
        called = [f"{t}.embed_tokens" for t in ("encoder", "decoder") if t in tops]
        users = ["(shared)", *called]
        headless = "decoder" in tops and "lm_head" not in tops
    else:
        users = [owner.replace("/", ".")]
        tables = {"transformer/wte": {"transformer"}, "model/embed_tokens": {"model"}}
        headless = tables.get(owner) == tops
    return (*users, "lm_head.T") if headless else tuple(users)


def advice_to_part(users: Iterable[Param]) -> str:
    """How to hold apart what is one leaf here and several in a file."""
    if any(p.tied for p in users):
        return (
            "Give the head a kernel of its own: model, params = "
            "jlora.models.untie(model, params), or jlora.models.load(..., untie=True)."
        )
    return "Pass a tree that holds them apart."


def last_of(path: str) -> str:
    """The last part of a path."""
    return path.rpartition("/")[2]
