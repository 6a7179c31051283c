"""What is computed for each of many like leaves, computed once for a stack of them.

An optimiser does the same to each of a model's hundreds of factors. On a GPU that is
hundreds of kernels, which take longer to launch than to run. Written for leaves, it is
traced here; equations that all leaves of a stack have alike, on operands that they have
alike, become one equation of the stack, mapped over its lanes. The rest (a norm over
all leaves, say, or a rule for one of them) runs as it stands on what is cut from the
stacks, so that the results are those of the function, whatever it does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora import _compat
from jlora._compat import Eqn


class Lane(NamedTuple):
    """Where an argument lies: number `lane` of the `size` arrays in a stack.

    Stacks of one `group` hold what belongs together in the same lanes: a factor, its
    gradient, its moments.
    """

    group: int
    stack: int
    lane: int
    size: int


@dataclasses.dataclass(eq=False)
class _Value:
    """A value of the program.

    Attributes:
      key: equal for the same thing of other lanes, and of no other.
      lane: whose it is; None of what belongs to no lane.
      step: what computes it, and which of its results it is; None of arguments.
    """

    key: int
    lane: Lane | None
    step: _Step | None = None
    number: int = 0

    @property
    def is_stacked(self) -> bool:
        """Whether it is known of all lanes together."""
        return self.lane is not None and (self.step is None or self.step.is_whole)


@dataclasses.dataclass(eq=False)
class _Step:
    """An equation on its operands; `like` are those of other lanes, by lane."""

    eqn: Eqn
    operands: list[_Value]
    lane: Lane | None
    like: dict[int, _Step]
    results: list[_Value] = dataclasses.field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Whether every lane has it."""
        return self.lane is not None and len(self.like) == self.lane.size


class Joined:
    """A program of many like arguments, to be run on stacks of them."""

    def __init__(self, jaxpr: Any, lanes: Sequence[Lane | None]) -> None:
        """Find what the lanes have alike.

        Args:
          jaxpr: of a function of flat arguments, closed.
          lanes: where each argument lies; None of one that comes as it is.
        """
        self.steps: list[_Step] = []
        self.known: dict[int, Any] = {}  # constants and literals, by key
        self._numbers: dict[Hashable, int] = {}
        self._like: dict[int, dict[int, _Step]] = {}
        self._made: dict[Hashable, _Step] = {}
        bare, consts = _compat.open_jaxpr(jaxpr)
        self.arguments = [
            _Value(self._number(("stack", x.stack) if x else ("argument", i)), x)
            for i, x in enumerate(lanes)
        ]
        self.results = self._walk(bare, consts, self.arguments)

    def alike(self, positions: Sequence[int]) -> list[Hashable]:
        """What each of these results is, of lanes 0, 1, ...; equal ones can be joined.

        They are computed by the same equations on the same operands of their lanes.
        """
        found: list[Hashable] = []
        for lane, position in enumerate(positions):
            value = self.results[position]
            own = value.lane is None or value.lane.lane == lane
            found.append((value.lane is None, value.key) if own else position)
        return found

    def run(
        self,
        arguments: Sequence[Any],
        stacks: Sequence[Any],
        wanted: Sequence[Sequence[int]],
    ) -> tuple[list[Any], list[Any]]:
        """Run the program.

        Args:
          arguments: those that come as they are; of the others nothing is read.
          stacks: by their number.
          wanted: results that are to be stacked, their positions by lane.

        Returns:
          The results, None in the places of those that are stacked; and the stacks.
        """
        return _Run(self, arguments, stacks).results(wanted)

    # -- finding what there is ---------------------------------------------------------

    def _number(self, key: Hashable) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def _const(self, x: Any) -> _Value:
        number = self._number(("const", id(x)))
        self.known[number] = x
        return _Value(number, None)

    def _literal(self, atom: Any) -> _Value:
        value, aval = np.asarray(atom.val), atom.aval
        kind = (aval.dtype, aval.weak_type, value.shape)
        number = self._number(("literal", kind, value.tobytes()))
        self.known[number] = atom.val
        return _Value(number, None)

    def _walk(
        self, bare: Any, consts: Sequence[Any], args: Sequence[_Value]
    ) -> list[_Value]:
        env = dict(zip(bare.constvars, map(self._const, consts), strict=True))
        env.update(zip(bare.invars, args, strict=True))

        def read(atom: Any) -> _Value:
            is_literal = isinstance(atom, _compat.Literal)
            return self._literal(atom) if is_literal else env[atom]

        for eqn in bare.eqns:
            results = self._follow(eqn, list(map(read, eqn.invars)))
            env.update(zip(eqn.outvars, results, strict=True))
        return list(map(read, bare.outvars))

    def _follow(self, eqn: Eqn, operands: list[_Value]) -> list[_Value]:
        lanes = [x.lane for x in operands if x.lane is not None]
        if lanes and eqn.primitive.name in _compat.JIT:
            body, consts = _compat.open_jaxpr(_compat.jit_parts(eqn).body)
            return self._walk(body, consts, operands)
        one = len({(x.group, x.lane) for x in lanes}) == 1
        lane = lanes[0] if one else None
        what = (eqn.primitive, _params(eqn), tuple(x.key for x in operands))
        # Of one lane the keys say all; of several, which ones they are does too.
        numbers = () if one else tuple(x.lane and x.lane[::2] for x in operands)
        made = (what, lane.lane if lane else numbers)
        if made not in self._made:
            self._made[made] = self._step(eqn, operands, lane, self._number(made[:1]))
        return self._made[made].results

    def _step(
        self, eqn: Eqn, operands: list[_Value], lane: Lane | None, key: int
    ) -> _Step:
        """A step that there was not yet, one of those of its key if it has a lane."""
        like = {} if lane is None else self._like.setdefault(key, {})
        step = _Step(eqn, operands, lane, like)
        own = key if lane else ("step", len(self.steps))
        step.results += [
            _Value(self._number((own, i)), lane, step, i)
            for i in range(len(eqn.outvars))
        ]
        if lane is not None:
            like[lane.lane] = step
        self.steps.append(step)
        return step


def _params(eqn: Eqn) -> Hashable:
    """An equation's parameters, to be compared; where they cannot be, its own."""
    params = tuple(sorted(eqn.params.items()))
    try:
        hash(params)
    except TypeError:
        return id(eqn)
    return id(eqn) if eqn.effects else params


class _Run:
    """One run of a program: what is known of its values."""

    def __init__(
        self, program: Joined, arguments: Sequence[Any], stacks: Sequence[Any]
    ) -> None:
        self._program, self._stacks = program, stacks
        self._plain = dict(program.known)
        for value, x in zip(program.arguments, arguments, strict=True):
            if value.lane is None:
                self._plain[value.key] = x
        self._all: dict[int, Any] = {}  # of all lanes, by key
        self._cut: dict[tuple[int, int], Any] = {}  # of one lane, by key and number
        for step in program.steps:
            self._do(step)

    def results(self, wanted: Sequence[Sequence[int]]) -> tuple[list[Any], list[Any]]:
        """What `Joined.run` returns."""
        out = self._program.results
        stacked = {position for positions in wanted for position in positions}
        plain = [None if i in stacked else self._one(v) for i, v in enumerate(out)]
        return plain, [self._together([out[i] for i in own]) for own in wanted]

    def _do(self, step: _Step) -> None:
        if not step.is_whole:
            found = _compat.rebind(step.eqn, [self._one(x) for x in step.operands])
            for value, x in zip(step.results, found, strict=True):
                if value.lane is None:
                    self._plain[value.key] = x
                else:
                    self._cut[value.key, value.lane.lane] = x
            return
        if step is not next(iter(step.like.values())):
            return  # done with the first of them
        mapped = [x.lane is not None for x in step.operands]
        values = [
            self._whole(x) if own else self._one(x)
            for x, own in zip(step.operands, mapped, strict=True)
        ]
        run = jax.vmap(
            lambda *xs: _compat.rebind(step.eqn, xs),
            in_axes=tuple(0 if own else None for own in mapped),
        )
        keys = [v.key for v in step.results]
        self._all.update(zip(keys, run(*values), strict=True))

    def _whole(self, value: _Value) -> Any:
        """A value of all lanes."""
        if value.step is None and value.lane is not None:
            return self._stacks[value.lane.stack]
        return self._all[value.key]

    def _one(self, value: _Value) -> Any:
        """A value of one lane, or of none."""
        if value.lane is None:
            return self._plain[value.key]
        place = (value.key, value.lane.lane)
        if place not in self._cut:
            whole, lane = self._whole(value), value.lane.lane
            self._cut[place] = lax.index_in_dim(whole, lane, keepdims=False)
        return self._cut[place]

    def _together(self, values: Sequence[_Value]) -> Any:
        first = values[0]
        if first.lane is None and len({v.key for v in values}) == 1:
            one = self._one(first)
            return jnp.broadcast_to(one, (len(values), *jnp.shape(one)))
        is_whole = first.is_stacked and all(
            v.key == first.key and v.lane is not None and v.lane.lane == i
            for i, v in enumerate(values)
        )
        return self._whole(first) if is_whole else jnp.stack([*map(self._one, values)])
