"""Bases that PEFT's initialisations shift: which base a file's adapter belongs to."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jlora._errors import CheckpointError, StructureError
from jlora._kernel.adapter import Adapter
from jlora._kernel.quantized import Quantized, is_abstract
from jlora._text import listed
from jlora._tree.from_kernel import start_from_kernel
from jlora._tree.initializers import FromKernel
from jlora.init import named
from jlora.init._unshift import differences, shifted_kernels
from jlora.peft._fields import KEEPS_BASE, Config
from jlora.peft._layouts import Layout
from jlora.peft._names import Param

Tree = Any

# What PEFT makes of the original base alone, and makes again when it loads.
_MADE_AGAIN = ("pissa", "olora")


@dataclasses.dataclass(frozen=True)
class Start:
    """How a file's adapters started.

    Attributes:
      shifted: whether they belong to another base than the original.
      init: what makes that base of the original; None where it is the one given.
    """

    shifted: bool
    init: FromKernel | None = None

    def base(
        self, path: str, users: list[Param], layout: Layout, leaf: Any, t: Adapter
    ) -> tuple[Any, bool]:
        """The base that an adapter belongs to, and whether it is a shifted one.

        Raises:
          CheckpointError: PEFT shifts only linear layers, each with its own weight.
        """
        if self.init is None:
            return leaf, self.shifted
        if layout.kind == "table" and not any(p.tied for p in users):
            return leaf, False
        if layout.kind != "linear" or len(users) > 1:
            raise CheckpointError(
                f"init_lora_weights is {self.init!r}, and PEFT starts so only linear "
                f"layers that share their weight with no other: not {users[0].module}."
            )
        if is_abstract(leaf):
            return leaf, True
        if isinstance(leaf, Quantized):
            raise CheckpointError(
                f"init_lora_weights is {self.init!r}, which takes a product out of "
                f"{path!r}, and quantised codes cannot hold the rest.\nLoad the "
                "adapter onto the dense parameters, then call jlora.quantize."
            )
        plain = dataclasses.replace(t, magnitude=None, bias=None)
        # In float32, for PEFT rounds the base alone, and not the factors.
        kernel, key = leaf.astype(jnp.float32), jax.random.key(0)
        _, base = start_from_kernel(self.init, key, kernel, plain, path)
        return base.astype(leaf.dtype), True


def start_of(config: Config, where: str, shifted_base: bool) -> Start:
    """How the configuration says that the file's adapters started.

    Args:
      config: the configuration.
      where: its file, for messages.
      shifted_base: whether the base at hand is the one that PEFT had left.

    Raises:
      CheckpointError: the base that the adapter belongs to is not known.
    """
    init = config.get("init_lora_weights")
    if shifted_base:
        return Start(shifted=True)
    if init in KEEPS_BASE:
        return Start(shifted=False)
    if init in _MADE_AGAIN:
        made = named(init)
        assert isinstance(made, FromKernel)
        return Start(shifted=True, init=made)
    raise CheckpointError(
        f"{where}: init_lora_weights is {init!r}, so the adapter belongs to a base "
        "that PEFT changed when it made it, by what the file does not hold.\nPass the "
        "base that was saved with it, and load(..., shifted_base=True); or let PEFT "
        "convert the adapter to a plain one: save_pretrained(..., "
        "path_initial_model_for_weight_conversion=...)."
    )


def on_its_base(params: Tree, initial: Tree | None, shifted_base: bool) -> Tree:
    """The tree whose adapters are to be saved.

    Raises:
      StructureError: an adapter of a shifted base, and no word of which one; or an
        initial tree of adapters that need none.
    """
    shifted = shifted_kernels(params)
    if initial is not None and (shifted_base or not shifted):
        raise StructureError(
            "initial= turns adapters of shifted bases into those of the original, and "
            + ("shifted_base=True keeps them." if shifted_base else "here are none.")
            + "\nLeave one of the two out."
        )
    if initial is not None:
        return differences(params, initial)
    if shifted and not shifted_base:
        raise StructureError(
            "these adapters belong to bases that were changed when they were made "
            "(PiSSA, OLoRA and their like), and on the original they would be wrong:\n"
            f"  {listed(shifted)}\nPass the tree as it was made, or its trainable "
            "half, to write adapters of the original: save(..., initial=tree0). Or "
            "save the changed base too, and say so: shifted_base=True."
        )
    return params
