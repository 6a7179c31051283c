"""How adapters start: from nothing, from the kernel, or from data.

>>> params = {"query": {"kernel": jnp.ones((6, 4))}}
>>> tree = jlora.lorafy(params, 2, ["query"], init="pissa")
>>> tree = jlora.lorafy(params, 2, ["query"], init=jlora.init.PiSSA(niter=4))

`lorafy(init=...)` takes the names `"orthogonal"`, `"zero_a"`, `"olora"`, `"pissa"`,
`"pissa_niter_4"`, and the objects that stand for them: `Orthogonal`, `ZeroA`, `OLoRA`,
`PiSSA`. Your own, of a kernel's numbers, is a `FromKernel`.

What needs data is a function of the tree that lorafy makes: `eva` and `corda` read the
inputs of its kernels, `lora_ga` their gradients, `loftq` what quantising them loses.
`fn(params, batch)` takes plain parameters.

>>> tree = jlora.lorafy(params, 2, ["query"])
>>> apply = lambda p, x: x @ p["query"]["kernel"]
>>> tree = jlora.init.eva(apply, tree, [jnp.eye(6), jnp.ones((2, 6))], rho=1.0)

PiSSA, OLoRA, CorDA and LoRA-GA change the kernels so that the function starts as it
was; `unshift` turns what was trained into an adapter of the kernels as they were.
"""

from jlora._tree.initializers import FromKernel as FromKernel
from jlora.init._corda import corda as corda
from jlora.init._eva import eva as eva
from jlora.init._loftq import loftq as loftq
from jlora.init._lora_ga import lora_ga as lora_ga
from jlora.init._names import named as named
from jlora.init._olora import OLoRA as OLoRA
from jlora.init._orthogonal import Orthogonal as Orthogonal
from jlora.init._pissa import PiSSA as PiSSA
from jlora.init._unshift import unshift as unshift
from jlora.init._zero_a import ZeroA as ZeroA

__all__ = [name for name in dir() if not name.startswith("_")]


def __dir__() -> list[str]:
    return __all__
