"""A model's two pure functions, which generation is made of."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from jax import Array

from jlora._errors import StructureError

Encode = Callable[..., tuple[Array, Any]]
Decode = Callable[[Any, Array, Any], tuple[Array, Any]]


@lru_cache(maxsize=64)
def functions_of(model: Any) -> tuple[Encode, Decode]:
    """Return a model's two functions, the same objects at every call.

    They are its methods `prefill` and `decode_step`.
    """
    if not hasattr(model, "prefill"):
        raise StructureError(
            f"{type(model).__name__} is an encoder and generates no tokens.\nCall it "
            "with model.apply."
        )

    def encode(
        params: Any, input_ids: Array, attention_mask: Array, **how: Any
    ) -> tuple[Array, Any]:
        """Read the inputs; answer with the first tokens `[B*K]` and the cache."""
        variables = {"params": params}
        read: Any = model.apply(
            variables, input_ids, attention_mask, method="prefill", **how
        )
        return read

    def decode(params: Any, tokens: Array, cache: Any) -> tuple[Array, Any]:
        """Feed one token `[B*K]` each; return the logits `[B*K, V]` and the cache."""
        variables = {"params": params}
        logits, cache = model.apply(
            variables, tokens[:, None], cache, method="decode_step"
        )
        return logits[:, 0], cache

    return encode, decode
