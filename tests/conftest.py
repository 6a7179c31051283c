"""Four fake CPU devices, and keys that differ from use to use."""

import itertools
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests compile thousands of tiny programs: LLVM's optimiser is half their time.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=4",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        os.environ.get("XLA_FLAGS", ""),
    ]
)

import jax
import pytest


@pytest.fixture
def getkey():
    """A function that returns a new PRNG key at each call."""
    counter = itertools.count(1)
    return lambda: jax.random.key(next(counter))
