"""A plan, and how it prints."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jlora._text import count, table
from jlora.planning._machines import Accelerator


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device, in a training step at its peak.

    Attributes:
      base: the frozen parameters.
      adapters: what is trained.
      optimiser: the optimiser's state.
      batch: the batch.
      gradients: of what is trained.
      activations: what is kept for the backward pass, and all that comes and goes.
      loss_head: what the loss alone needs, from the head's input on. It counts among
        the activations where the peak is there. None where the loss is the caller's.
      source: whose account of the temporaries it is.
    """

    base: int
    adapters: int
    optimiser: int
    batch: int
    gradients: int
    activations: int
    loss_head: int | None
    source: str

    @property
    def total(self) -> int:
        """All of it."""
        held = self.base + self.adapters + self.optimiser + self.batch
        return held + self.gradients + self.activations


@dataclasses.dataclass(frozen=True)
class Operations:
    """Operations of a step's products, multiplications and additions, on all devices.

    Attributes:
      forward: of the loss.
      backward: of the gradients, without any that frozen kernels would have.
      again: made a second time, as `remat` has it, or by several devices each.
    """

    forward: float
    backward: float
    again: float

    @property
    def useful(self) -> float:
        """What one device would compute that has memory enough."""
        return self.forward + self.backward

    @property
    def total(self) -> float:
        """What is computed."""
        return self.useful + self.again


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a device sends in a step, in collectives of one kind.

    Attributes:
      axes: the mesh axes that they go over.
      kind: `"all-reduce"` or `"all-gather"`.
      count: how many.
      result: bytes of their results.
      sent: bytes that a device sends for them.
      link: `"link"` within a machine, `"network"` between several.
      seconds: how long that takes at the link's full speed.
    """

    axes: tuple[str, ...]
    kind: str
    count: float
    result: float
    sent: float
    link: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of a step, at the speeds of the accelerator's data sheet.

    Products and what is sent are bounds. Memory is a count of what kernels read and
    write, which fewer and larger kernels than those counted, fused attention above
    all, may undercut.

    Attributes:
      compute: its products at the accelerator's peak.
      memory: what its kernels read and write at the memory's full speed.
      link: what it sends within its machine.
      network: what it sends to other machines.
    """

    compute: float
    memory: float
    link: float
    network: float

    @property
    def bound(self) -> float:
        """What no program can undercut: products, and what is sent."""
        return max(self.compute, self.link, self.network)

    @property
    def overlapped(self) -> float:
        """The step's time if all of these overlapped."""
        return max(self.bound, self.memory)

    @property
    def one_by_one(self) -> float:
        """The step's time if none did."""
        return max(self.compute, self.memory) + self.link + self.network


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A change, and what the plan would be with it.

    Attributes:
      change: in words.
      arguments: of `jlora.plan`.
      total: bytes of a device.
      overlapped: as of `Times`.
      fits: whether that is enough.
    """

    change: str
    arguments: Mapping[str, Any]
    total: int
    overlapped: float
    fits: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a training run takes; from `jlora.plan`.

    Attributes:
      model: what the model is called.
      trained: what is trained, in words.
      parameters: numbers of the model.
      trainable: numbers that are trained.
      batch: the batch, in words.
      tokens: of a batch; None where the batch is the caller's.
      mesh: the sizes of its axes; empty of one device.
      layout: where parameters lie.
      accelerator: each device.
      memory: bytes of a device.
      operations: of a step.
      times: of a step.
      traffic: of a step.
      largest: the largest things among the temporaries at the peak: what made them,
        their whole shapes, and a device's bytes of them.
      notes: what the plan could not tell.
      remedies: what would make it smaller, best first.
    """

    model: str
    trained: str
    parameters: int
    trainable: int
    batch: str
    tokens: int | None
    mesh: Mapping[str, int]
    layout: str
    accelerator: Accelerator
    memory: Memory
    operations: Operations
    times: Times
    traffic: tuple[Traffic, ...]
    largest: tuple[tuple[str, tuple[int, ...], int], ...]
    notes: tuple[str, ...] = ()
    remedies: tuple[Remedy, ...] = ()

    @property
    def devices(self) -> int:
        """How many devices there are."""
        return math.prod(self.mesh.values())

    @property
    def limit(self) -> int:
        """Bytes that a program gets of a device."""
        return int(self.accelerator.memory * self.accelerator.usable)

    @property
    def fits(self) -> bool:
        """Whether a device's memory is enough."""
        return self.memory.total <= self.limit

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON holds it."""
        made = dataclasses.asdict(self)
        made["accelerator"]["flops"] = dict(self.accelerator.flops)
        made["mesh"] = dict(self.mesh)
        more = {
            "devices": self.devices, "limit": self.limit, "fits": self.fits,
        }  # fmt: skip
        made["memory"]["total"] = self.memory.total
        made["operations"] |= {
            "useful": self.operations.useful, "total": self.operations.total,
        }  # fmt: skip
        made["times"] |= {
            "bound": self.times.bound, "overlapped": self.times.overlapped,
            "one_by_one": self.times.one_by_one,
        }  # fmt: skip
        return {**made, **more}

    def __str__(self) -> str:
        parts = [self._head(), self._memory(), self._work()]
        if self.traffic:
            parts.append(self._traffic())
        parts.append(self._verdict())
        return "\n\n".join(parts)

    def _head(self) -> str:
        axes = ", ".join(f"{name}={size}" for name, size in self.mesh.items())
        where = f"{count(self.devices, 'device')} ({self.accelerator.name})"
        where += f", mesh {axes}, layout {self.layout}" if axes else ""
        share = self.trainable / self.parameters if self.parameters else 0.0
        return (
            f"{self.model}: {self.parameters:,} parameters, {self.trained}\n"
            f"{self.trainable:,} numbers trained ({share:.2%}); batch {self.batch}\n"
            f"{where}"
        )

    def _memory(self) -> str:
        m = self.memory
        rows = [("a device's memory", "bytes", "")]
        for name in ("base", "adapters", "optimiser", "batch", "gradients",
                     "activations"):  # fmt: skip
            number = getattr(m, name)
            rows.append((name, size(number), f"{number / m.total:.1%}"))
        rows.append(("together", size(m.total), f"of {size(self.limit)} to be had"))
        text = table(rows)
        if m.loss_head is not None:
            text += f"\nThe loss head alone needs {size(m.loss_head)}."
        return f"{text}\n{m.source}."

    def _work(self) -> str:
        o, t = self.operations, self.times
        rows = [("a step", "operations", "of all")]
        parts = {"forward": o.forward, "backward": o.backward}
        parts |= {"computed again": o.again} if o.again else {}
        for name, number in parts.items():
            rows.append((name, amount(number), f"{number / o.total:.0%}"))
        text = table(rows)
        names = {"compute": "products", "memory": "memory", "link": "links",
                 "network": "network"}  # fmt: skip
        bounds = [
            f"{name} {duration(getattr(t, field))}"
            for field, name in names.items()
            if getattr(t, field)
        ]
        text += f"\nAt full speed: {', '.join(bounds)}.\n"
        text += f"By this count a step takes {duration(t.overlapped)}"
        if t.one_by_one > 1.02 * t.overlapped:
            text += f" ({duration(t.one_by_one)} if nothing is sent while it computes)"
        if self.tokens is not None and t.overlapped:
            text += f",\n{self.tokens / t.overlapped:,.0f} tokens a second"
        if t.memory > t.bound:
            text += (
                f"; never less than {duration(t.bound)}, but fused kernels read and "
                "write less"
            )
        return text + "."

    def _traffic(self) -> str:
        rows = [("a device sends, a step", "times", "bytes", "over", "at full speed")]
        for one in self.traffic:
            rows.append(
                (f"{one.kind} over {' and '.join(one.axes)}", f"{one.count:,.0f}",
                 size(one.sent), one.link, duration(one.seconds))
            )  # fmt: skip
        return table(rows)

    def _verdict(self) -> str:
        left = self.limit - self.memory.total
        if self.fits:
            lines = [f"It fits, with {size(left)} to spare on each device."]
        else:
            lines = [f"It does not fit: each device lacks {size(-left)}."]
        if self.largest and not self.fits:
            what, shape, part = self.largest[0]
            made = "what a scan keeps" if what == "scan" else f"what {what} makes"
            lines.append(f"The largest for a time is {made}: {size(part)} {[*shape]}.")
        if self.remedies:
            rows = [("change", "a device", "", "a step")]
            rows += [
                (r.change, size(r.total), "fits" if r.fits else "too large",
                 duration(r.overlapped))
                for r in self.remedies
            ]  # fmt: skip
            lines += ["", table(rows)]
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])


def size(number: float) -> str:
    """Bytes for a reader.

    >>> size(1536), size(80 * 2**30)
    ('1.5 KiB', '80.0 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(number) < 1024 or unit == "TiB":
            break
        number /= 1024
    return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"


def amount(number: float) -> str:
    """Operations for a reader.

    >>> amount(2.5e15)
    '2.50 P'
    """
    for unit in ("", "k", "M", "G", "T", "P"):
        if number < 1000 or unit == "P":
            break
        number /= 1000
    return f"{number:.2f} {unit}".strip()


def duration(seconds: float) -> str:
    """A time for a reader.

    >>> duration(0.0123), duration(2.0)
    ('12.3 ms', '2.00 s')
    """
    if seconds >= 1:
        return f"{seconds:.2f} s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds * 1e6:.1f} µs"
