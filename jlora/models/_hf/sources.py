"""Where a leaf is found in a checkpoint: one tensor, or several put together.

    Tensor("lm_head.weight", transposed=True)          a linear layer's kernel
    Stacked((Tensor("h.0.w"), Tensor("h.1.w")))        a new leading axis: [2, ...]
    Joined((Tensor("w1"), Tensor("w3")), axis=-1)      halves of one axis

They nest: the experts of a scanned model are a `Stacked` of layers, each a `Stacked` of
experts, each a `Joined` of two projections. `places` flattens that into the one thing
that reading, writing and checking need: every tensor, and its box in the leaf.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

Box = tuple[slice, ...]  # starts and stops along each axis of a leaf


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file.

    Attributes:
      name: the tensor's name in the file.
      transposed: whether the file holds the last two axes the other way round.
    """

    name: str
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class Stacked:
    """Parts of one shape along a new leading axis: layers, or experts."""

    parts: tuple[Source, ...]


@dataclasses.dataclass(frozen=True)
class Joined:
    """Equal parts side by side along one axis of the leaf (of a `Stacked`'s part)."""

    parts: tuple[Source, ...]
    axis: int


Source = Tensor | Stacked | Joined


class TensorPlace(NamedTuple):
    """A tensor's place in a leaf.

    Attributes:
      tensor: what stands there.
      box: where. The first `depth` slices, of the axes that stacking added, are of
        size 1, and the tensor does not have them.
      depth: how many axes were added.
    """

    tensor: Tensor
    box: Box
    depth: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape in the file."""
        shape = [s.stop - s.start for s in self.box[self.depth :]]
        if self.tensor.transposed:
            shape[-2:] = shape[:-3:-1]
        return tuple(shape)


def names(source: Source) -> list[str]:
    """Return the names of all tensors of a leaf.

    >>> names(Stacked((Tensor("h.0.w"), Tensor("h.1.w"))))
    ['h.0.w', 'h.1.w']
    """
    if isinstance(source, Tensor):
        return [source.name]
    return [name for part in source.parts for name in names(part)]


def places(source: Source, shape: tuple[int, ...]) -> list[TensorPlace]:
    """Return the place of each tensor in a leaf of that shape.

    >>> halves = Joined((Tensor("w1"), Tensor("w3", transposed=True)), axis=-1)
    >>> for place in places(Stacked((halves,)), (1, 5, 6)):
    ...     print(place.tensor.name, place.box[2], place.shape)
    w1 slice(0, 3, None) (5, 3)
    w3 slice(3, 6, None) (3, 5)
    """
    return list(_places(source, tuple(slice(0, n) for n in shape), 0))


def _places(source: Source, box: Box, depth: int) -> Iterator[TensorPlace]:
    if isinstance(source, Tensor):
        yield TensorPlace(source, box, depth)
        return
    if isinstance(source, Stacked):
        axis, inner = depth, depth + 1
    else:
        axis, inner = source.axis + (len(box) if source.axis < 0 else depth), depth
    start, stop = box[axis].start, box[axis].stop
    each, rest = divmod(stop - start, len(source.parts))
    # Shapes come from the model and sources from its family: they agree.
    assert rest == 0, (source, box)
    assert each == 1 or inner == depth, (source, box)
    for i, part in enumerate(source.parts):
        own = slice(start + i * each, start + (i + 1) * each)
        yield from _places(part, (*box[:axis], own, *box[axis + 1 :]), inner)
