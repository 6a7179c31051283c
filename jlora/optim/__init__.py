"""Optimiser pieces that know what factors are, for optax: they take the trainable half.

    lora_plus      B's learning rate a multiple of A's
    lora_fa        A stays as it started, and B's gradient is projected for that
    riemannian     each factor's gradient in the geometry of the other
    adalora        ranks go to the kernels where they matter most
    prune          LoRA of the ranks that AdaLoRA has left
    orthogonality  how far AdaLoRA's factors are from orthonormal
    decay_mask     which leaves weight decay is for

Each is an `optax.GradientTransformation`, or makes one of another:

>>> import optax
>>> tx = optax.chain(optax.adamw(1e-4, mask=decay_mask), lora_plus(ratio=16))
>>> tx = optax.chain(riemannian(), optax.adamw(1e-3))
"""

from jlora.optim._adalora import AdaLoraState as AdaLoraState
from jlora.optim._adalora import adalora as adalora
from jlora.optim._adalora import orthogonality as orthogonality
from jlora.optim._adalora import prune as prune
from jlora.optim._groups import decay_mask as decay_mask
from jlora.optim._groups import lora_plus as lora_plus
from jlora.optim._precondition import lora_fa as lora_fa
from jlora.optim._precondition import riemannian as riemannian

__all__ = [name for name in dir() if not name.startswith("_")]


def __dir__() -> list[str]:
    return __all__
