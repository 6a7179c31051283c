"""The errors jlora raises: each is a `LoraError` and the builtin it stands for."""

from __future__ import annotations


class LoraError(Exception):
    """Base of every error that jlora raises on purpose."""


class TargetError(LoraError, ValueError):
    """A target that hits nothing, a non-kernel, or only some of the repeated layers."""


class ShapeError(LoraError, ValueError):
    """Shapes, ranks or axes that do not fit each other."""


class OptionError(LoraError, ValueError, TypeError):
    """An argument with a value, or of a name, that the function does not know."""


class UnsupportedOpError(LoraError, NotImplementedError):
    """A primitive without a low-rank rule met an adapted kernel."""


class UnmergedError(LoraError, RuntimeError):
    """An adapted kernel reached ordinary JAX code without `jlora.lora`.

    It is no TypeError: those of an operand's conversion JAX replaces by its own.
    """


class DtypeError(LoraError, TypeError):
    """A leaf of a dtype that cannot carry an adapter."""


class NonFiniteError(LoraError, ValueError):
    """NaN or infinity where a finite number is needed."""


class StructureError(LoraError, ValueError):
    """Trees, files or halves that do not belong together."""


class CheckpointError(LoraError, ValueError):
    """A checkpoint that is cut off, of another base, or incomplete."""


class ProcessError(LoraError, RuntimeError):
    """Another process of a run is dead, or hangs."""


class DataError(LoraError, ValueError):
    """Training data that cannot be read as asked."""


class JloraWarning(UserWarning):
    """Something jlora did that its user should know of."""
