"""A deeper model of a checkpoint's layers: ranges of them, one after the other."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from jlora._errors import OptionError
from jlora.models._hf.families import Family
from jlora.models._hf.tensors import TensorFolder

Ranges = Sequence[Sequence[int]]
_DEPTHS = ("num_hidden_layers", "n_layer")


@dataclasses.dataclass(frozen=True)
class Copies:
    """Which layer each layer is a copy of.

    Attributes:
      stack: the path of the layers.
      order: for each layer its number in the checkpoint.
    """

    stack: tuple[str, ...] = ()
    order: tuple[int, ...] = ()

    def original(self, path: str) -> str:
        """The path of the first leaf that is read from the same tensors."""
        start = "/".join(self.stack) + "/"
        number, _, rest = path.removeprefix(start).partition("/")
        if not self.order or not path.startswith(start) or not number.isdigit():
            return path
        first = self.order.index(self.order[int(number)])
        return f"{start}{first}/{rest}"


def replicated(
    tensors: TensorFolder, family: Family, config: Any, ranges: Ranges | None
) -> tuple[Any, Copies]:
    """The deeper model's configuration; its tensors are found by their new numbers.

    Raises:
      OptionError: ranges that are no pairs of layers' numbers, or beyond the layers; a
        model whose layers are of two stacks, or depend on their numbers.

    Source: PEFT's `layer_replication`.
    """
    if ranges is None:
        return config, Copies()
    stacks = family.stacks(config)
    if len(stacks) > 1:
        names = " and ".join("/".join(path) for path in stacks)
        raise OptionError(
            f"layer_replication={ranges!r}: this model has the layers of {names}, and "
            "ranges are of one stack.\nRepeat them by jlora.replicate_layers, and make "
            "the deeper model's configuration yourself."
        )
    ((stack, length),) = stacks.items()
    order = _order(ranges, length)
    _check_alike(config, order)
    tensors.repeat_blocks(".".join(stack) + ".", order)
    changed: dict[str, Any] = {n: len(order) for n in _DEPTHS if hasattr(config, n)}
    if getattr(config, "layer_types", None) is not None:
        changed["layer_types"] = tuple(config.layer_types[n] for n in order)
    return dataclasses.replace(config, **changed), Copies(stack, order)


def _order(ranges: Any, length: int) -> tuple[int, ...]:
    try:
        pairs = [tuple(map(operator.index, pair)) for pair in ranges]
        fits = bool(pairs) and all(0 <= a < b <= length for a, b in pairs)
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise OptionError(
            f"layer_replication={ranges!r}: expected pairs [start, end], the end not "
            f"included, of this model's {length} layers: [[0, {length}], [0, 1]] say."
        )
    return tuple(n for a, b in pairs for n in range(a, b))


def _check_alike(config: Any, order: Sequence[int]) -> None:
    """Refuse layers that would compute something else under another number."""
    by_number = getattr(config, "scale_attn_by_inverse_layer_idx", False)
    sparse = getattr(config, "is_sparse", lambda n: True)
    reasons: Mapping[str, bool] = {
        "scale_attn_by_inverse_layer_idx divides by a layer's number": by_number,
        "a layer's number says whether it has experts": any(
            sparse(i) != sparse(n) for i, n in enumerate(order)
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise OptionError(
                f"layer_replication: {reason}, and copies would be other layers.\n"
                "Take ranges under which they are not, or a model without that."
            )
