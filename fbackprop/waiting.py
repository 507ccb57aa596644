"""Work that XLA's CPU backend is to do one piece after the other, not side by side."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax


def once_known(x, y):
    """x; on CPUs not before y is known. (A barrier is gone when the compiler orders products.)"""
    if not y.size:
        return x

    def wait(x, y):
        return jnp.where(jnp.ravel(y)[0].real > jnp.inf, 0, x)

    return lax.platform_dependent(x, y, cpu=wait, default=lambda x, y: x)
