"""What a program's text says of its values, whatever its inputs hold."""

from __future__ import annotations

from typing import Any

import numpy as np

from jlora import _compat

_ENTRYWISE = frozenset(
    [
        "add", "sub", "mul", "div", "neg", "max", "min", "abs", "sign", "square",
        "integer_pow", "sqrt", "rsqrt", "exp", "log", "tanh", "logistic", "select_n",
        "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "stop_gradient", "copy",
        "convert_element_type",
    ]
)  # fmt: skip


class Facts:
    """Which axes a value is constant along, and whether it is zero.

    Both answers err on the safe side: what cannot be told is no and not.
    """

    def __init__(self, bare: Any, inputs: Any = None) -> None:
        self._made_by = {
            v: (eqn, n) for eqn in bare.eqns for n, v in enumerate(eqn.outvars)
        }
        self._constant: dict[Any, frozenset[int]] = dict(inputs or {})

    def constant_axes(self, atom: Any) -> frozenset[int]:
        """The axes along which a value does not change, those of size one among them.

        Args:
          atom: a variable of the program, or a literal.
        """
        if isinstance(atom, _compat.Literal):
            return (
                frozenset(range(np.ndim(atom.val))) if np.size(atom.val) == 1 else _no
            )
        if atom not in self._constant:
            narrow = {d for d, size in enumerate(atom.aval.shape) if size == 1}
            self._constant[atom] = frozenset(narrow) | self._found(atom)
        return self._constant[atom]

    def is_zero(self, atom: Any) -> bool:
        """Whether a value is a zero, or zeros, that the program itself holds."""
        if isinstance(atom, _compat.Literal):
            return not np.any(atom.val)
        eqn, _ = self._made_by.get(atom, (None, 0))
        return eqn is not None and (
            eqn.primitive.name in _ZERO_OF_ZERO and self.is_zero(eqn.invars[0])
        )

    def _found(self, var: Any) -> frozenset[int]:
        eqn, number = self._made_by.get(var, (None, 0))
        if eqn is None:
            return _no
        name, p = eqn.primitive.name, eqn.params
        axes = frozenset(range(len(var.aval.shape)))
        if name == "iota":
            return axes - {p["dimension"]}
        if name == "broadcast_in_dim":
            inner = self.constant_axes(eqn.invars[0])
            places = p["broadcast_dimensions"]
            return axes - {to for d, to in enumerate(places) if d not in inner}
        if name == "transpose":
            inner = self.constant_axes(eqn.invars[0])
            return frozenset(d for d in axes if p["permutation"][d] in inner)
        if name in _ENTRYWISE:
            each = [v for v in eqn.invars if v.aval.shape]
            return axes.intersection(*map(self.constant_axes, each))
        if name in _compat.JIT:
            body, _ = _compat.open_jaxpr(_compat.jit_parts(eqn).body)
            known = map(self.constant_axes, eqn.invars)
            inside = Facts(body, zip(body.invars, known, strict=True))
            return inside.constant_axes(body.outvars[number])
        return _no


_no: frozenset[int] = frozenset()
_ZERO_OF_ZERO = (
    "broadcast_in_dim", "convert_element_type", "copy", "reshape", "neg", "square",
)  # fmt: skip
