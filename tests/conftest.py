"""Settings for all tests: two CPU devices, and strictness that the library itself never sets."""

import os

import jaxlib

# Two devices for the tests of collectives; must be set before JAX starts. Small programs compile in
# less time in one part, and by the older of XLA's two emitters of kernels, which releases from 0.11
# on no longer have.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=2"
    + " --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false" * (jaxlib.version.__version_info__ < (0, 11))
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
# Most tests compile much and run little. What a user's program compiles to is tested with 0 here,
# as .ci/run does with some of them on the newest JAX.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest


@pytest.fixture
def optimized():
    """Programs are compiled as a user's are: for what is compared to the last bits.

    All tests that share a compiled function must ask for it.
    """
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True)
def _strict_rank_promotion():
    """Silent broadcasting between ranks is an error in our own code."""
    with jax.numpy_rank_promotion("raise"):
        yield
