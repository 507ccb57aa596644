"""Settings for all tests: two CPU devices, and strictness that the library itself never sets."""

import os

# Two devices for the tests of collectives; must be set before JAX starts.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest


@pytest.fixture(autouse=True)
def _strict_rank_promotion():
    """Silent broadcasting between ranks is an error in our own code."""
    with jax.numpy_rank_promotion("raise"):
        yield
