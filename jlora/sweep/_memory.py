"""What a bank's step needs in memory, and how many slots fit."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jlora._errors import OptionError
from jlora._kernel.nodes import is_array
from jlora.sweep._bank import Bank, Kept
from jlora.sweep._step import SweepStep

Tree = Any

_FEWEST = 4  # slots that are measured, and twice as many


@dataclasses.dataclass(frozen=True)
class Account:
    """Bytes of a step of K slots, of which `group` are computed at a time.

    `base + fixed + K * (adapter + optimiser + batch) + group * activations`, and what
    XLA needs of the adapters a second time where they are cut into groups.

    Attributes:
      base: the frozen base; a batch that all share.
      fixed: temporaries that do not grow with the slots.
      adapter: of a slot: trainable leaves, scales, numbers.
      optimiser: of a slot.
      batch: of a slot; 0 where it is shared.
      activations: of a slot: temporaries.
    """

    base: int
    fixed: int
    adapter: int
    optimiser: int
    batch: int
    activations: int

    def peak(self, slots: int, group: int | None = None) -> int:
        """The bytes of a step."""
        together = slots if group is None else min(group, slots)
        moving = self.adapter + self.optimiser
        copies = 0 if together == slots else slots * moving
        held = self.base + self.fixed + slots * (moving + self.batch)
        return held + together * self.activations + copies

    def group(self, slots: int, limit: int) -> int | None:
        """The most slots at a time that fit; None if all do.

        Raises:
          OptionError: not even one at a time fits.
        """
        if self.peak(slots) <= limit:
            return None
        divisors = [g for g in range(slots - 1, 0, -1) if slots % g == 0]
        for group in divisors:
            if self.peak(slots, group) <= limit:
                return group
        raise OptionError(
            f"memory_limit={limit:,}: {slots} slots need {self.peak(slots, 1):,} bytes "
            f"even one at a time, {self.base:,} of them for the base.\nTake fewer "
            "slots, or a smaller batch."
        )


def account(
    step: SweepStep, bank: Bank, batch: Any, *, shared: bool = False
) -> Account:
    """Measure what a step needs, by compiling it for two numbers of slots.

    These are the bank's own number and half of it, but at least eight and four. What
    lies between and beyond is taken from the line through the two. Far above it may be
    wrong: on a CPU, XLA divides large loops among threads, and then needs up to twice
    the memory for each slot. So give it a bank of about as many slots as you mean.

    Args:
      step: from `sweep_step`.
      bank: a bank of about that many slots; only its shapes count.
      batch: as the step takes it.
      shared: as there.
    """
    least = max(_FEWEST, bank.slots // 2)
    most = max(2 * _FEWEST, bank.slots)
    few, more = (_temporary(step, bank, batch, shared, n) for n in (least, most))
    activations = max(0, (more - few) // (most - least))
    fixed = few - least * activations
    if fixed < 0:  # the larger is of the costlier kind, and right at its own number
        activations, fixed = more // most, 0
    kept = bank.frozen
    batch_bytes = _bytes(batch)
    own = (bank.trainable, kept.own, kept.hyper, kept.sizes, bank.step)
    return Account(
        base=_bytes(kept.shared) + (batch_bytes if shared else 0),
        fixed=fixed,
        adapter=_bytes(own) // bank.slots,
        optimiser=_bytes(bank.opt_state) // bank.slots,
        batch=0 if shared else batch_bytes // bank.slots,
        activations=activations,
    )


def peak_of(compiled: Any) -> int:
    """XLA's own account of a compiled program: what is alive at its peak, in bytes."""
    a = compiled.memory_analysis()
    held = a.argument_size_in_bytes + a.output_size_in_bytes - a.alias_size_in_bytes
    return held + a.temp_size_in_bytes


def _temporary(
    step: SweepStep, bank: Bank, batch: Any, shared: bool, slots: int
) -> int:
    shapes = resized(bank, slots)
    given = batch if shared else sized(batch, slots)
    compiled: Any = step.lower(shapes, given, shared=shared).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def resized(bank: Bank, slots: int) -> Bank:
    """The shapes of a bank of another number of slots."""
    kept = bank.frozen
    shared = jax.tree.map(_shape, kept.shared)
    own, hyper, sizes = (sized(x, slots) for x in kept[1:])
    moving = (bank.step, bank.trainable, bank.opt_state, bank.key)
    step, trainable, opt_state, key = (sized(x, slots) for x in moving)
    return Bank(step, trainable, opt_state, Kept(shared, own, hyper, sizes), key)


def sized(tree: Tree, slots: int) -> Tree:
    """The shapes of arrays with a slot axis, for another number of slots."""
    one = lambda x: jax.ShapeDtypeStruct((slots, *x.shape[1:]), x.dtype)  # noqa: E731
    return jax.tree.map(one, tree)


def _shape(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if is_array(x) else x


def _bytes(tree: Tree) -> int:
    arrays = [x for x in jax.tree.leaves(tree) if is_array(x)]
    return sum(int(x.size) * jnp.dtype(x.dtype).itemsize for x in arrays)
