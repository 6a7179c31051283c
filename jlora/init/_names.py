"""Names of initialisers, as `lorafy(init=...)` and PEFT's configurations have them."""

from __future__ import annotations

import difflib
import re
from typing import Any

from jlora._errors import OptionError
from jlora._tree.initializers import INITIALIZERS, FromKernel, Initializer
from jlora.init._olora import OLoRA
from jlora.init._orthogonal import Orthogonal
from jlora.init._pissa import PiSSA
from jlora.init._zero_a import ZeroA

_NAMED: dict[str, Initializer | FromKernel] = {
    "olora": OLoRA(),
    "orthogonal": Orthogonal(),
    "pissa": PiSSA(),
    "zero_a": ZeroA(),
}
_WITH_DATA = {
    "corda": "corda(fn, tree, batches)",
    "eva": "eva(fn, tree, batches)",
    "lora_ga": "lora_ga(loss_fn, tree, batches)",
    "loftq": 'loftq(tree, "nf4")',
}


def named(name: Any) -> Initializer | FromKernel:
    """The initialiser of a name.

    Raises:
      OptionError: there is none of that name, or it needs more than a kernel.

    >>> named("pissa_niter_4")
    PiSSA(niter=4)
    """
    if isinstance(name, str):
        if name in _NAMED:
            return _NAMED[name]
        if found := re.fullmatch(r"pissa_niter_(\d+)", name):
            return PiSSA(niter=int(found[1]))
        if call := _WITH_DATA.get(name):
            raise OptionError(
                f"init={name!r} needs more than the kernels, and is a function of the "
                "tree that lorafy makes:\n  tree = jlora.lorafy(params, ...)\n"
                f"  tree = jlora.init.{call}"
            )
    known = sorted([*INITIALIZERS, *_NAMED, "pissa_niter_N"])
    near = difflib.get_close_matches(str(name), [*known, *_WITH_DATA], 2)
    meant = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise OptionError(
        f"init={name!r}: expected one of {', '.join(map(repr, known))}, an object of "
        "jlora.init, or a function (key, a_shape, b_shape, fan_in, dtype) -> (a, b)"
        f"{meant or '.'}"
    )
