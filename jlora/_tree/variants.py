"""Other forms of the update, by word or with their settings: `lorafy(variant=...)`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, TypeGuard

import numpy as np

from jlora._errors import OptionError
from jlora._tree import options


@dataclasses.dataclass(frozen=True)
class VeRA:
    """Vectors on random projections that all adapters share.

        ΔW = A · diag(d) · B · diag(b)        d [r] and b [out] are trained

    A and B are cut from one random pair, as wide as the widest kernel; kernels of one
    size share the arrays. They are neither trained nor in the optimiser's state. Give
    a larger rank than LoRA's, 256 say.

    Attributes:
      d_initial: what d starts with; b starts at zero.
      seed: of the projections, which are PEFT's of that `projection_prng_key`, bit for
        bit.

    Source: Kopiczko et al. 2023, arXiv:2310.11454; PEFT's `VeraConfig`.
    """

    d_initial: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the settings."""
        _number("d_initial", self.d_initial)
        _whole("seed", self.seed, least=0)


@dataclasses.dataclass(frozen=True)
class LoHa:
    """The product, entry by entry, of two low-rank products: an update of rank r².

        ΔW = alpha/r · (A1·B1) ∘ (A2·B2)

    Source: Hyeon-Woo et al. 2021, arXiv:2108.06098 (FedPara); PEFT's `LoHaConfig`.
    """


@dataclasses.dataclass(frozen=True)
class LoKr:
    """Kronecker's product of a small matrix and a low-rank one.

        ΔW = alpha/r · W1 ⊗ (A2·B2)

    Inputs and outputs are two numbers' product each. As a low-rank product the update
    has the rank of W1 times r, and x·ΔW costs as much as with LoRA of that rank. So W1
    should be small, `factor=4` say, or of low rank too.

    Attributes:
      factor: W1's size, where it divides the kernel's; -1 halves the dimensions as
        evenly as can be (768 is 24 times 32), which makes the largest W1.
      decompose_both: W1 is A1·B1 of rank r too.

    Source: Yeh et al. 2023, arXiv:2309.14859 (LyCORIS); PEFT's `LoKrConfig`.
    """

    factor: int = -1
    decompose_both: bool = False

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.factor != -1:
            _whole("factor", self.factor, least=1)
        options.flags(decompose_both=self.decompose_both)


@dataclasses.dataclass(frozen=True)
class AdaLoRA:
    """A singular value for each rank, so that ranks can be taken away in training.

        ΔW = alpha/r · A · diag(e) · B        e [r] starts at zero

    `jlora.optim.adalora` takes them away, and `jlora.optim.prune` makes LoRA of what
    remains.

    Source: Zhang et al. 2023, arXiv:2303.10512; PEFT's `AdaLoraConfig`.
    """


Form = VeRA | LoHa | LoKr | AdaLoRA
Variant = Literal["lora", "vera", "loha", "lokr", "adalora"] | Form
_WORDS: dict[str, type[Form]] = {
    "vera": VeRA, "loha": LoHa, "lokr": LoKr, "adalora": AdaLoRA
}  # fmt: skip


def variant_of(given: Any) -> Variant:
    """A variant with its settings; `"lora"` has none.

    Raises:
      OptionError: it is no variant.
    """
    if given == "lora" or is_form(given):
        return given
    if isinstance(given, str) and given in _WORDS:
        return _WORDS[given]()
    words = ", ".join(map(repr, ("lora", *_WORDS)))
    raise OptionError(
        f"variant={given!r}: expected {words}, or settings such as jlora.VeRA(seed=1), "
        "jlora.LoHa() and jlora.LoKr(factor=4)."
    )


def is_form(variant: Any) -> TypeGuard[Form]:
    """Whether it is another form than LoRA, with its settings."""
    return isinstance(variant, Form)


def name_of(form: Form) -> str:
    """A variant's word."""
    return type(form).__name__.lower()


def _number(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or not math.isfinite(value) or not value:
        raise OptionError(f"{name}={value!r}: expected a finite number other than 0.")


def _whole(name: str, value: Any, least: int) -> None:
    is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_whole or value < least:
        raise OptionError(f"{name}={value!r}: expected a whole number from {least} on.")
