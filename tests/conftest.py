"""Four fake CPU devices, and keys that differ from use to use."""

import itertools
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "force_host_platform_device_count" not in flags:
    count = "--xla_force_host_platform_device_count=4"
    os.environ["XLA_FLAGS"] = f"{flags} {count}".strip()

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture
def getkey():
    """A function that returns a new PRNG key at each call."""
    counter = itertools.count(1)
    return lambda: jax.random.key(next(counter))
