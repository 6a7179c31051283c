"""What commands share before anything heavy is imported."""

from __future__ import annotations

import os

HEADS = ("base", "classification", "masked_lm")


def stay_on_host() -> None:
    """Leave accelerators alone, which may be training what is looked at."""
    if "JAX_PLATFORMS" not in os.environ:
        import jax

        jax.config.update("jax_platforms", "cpu")
