"""How the tests compare: our reverse mode against JAX's, values and NaN patterns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import fbackprop as fb

TOLERANCE = {
    jnp.dtype("float64"): 1e-12,
    jnp.dtype("complex128"): 1e-12,
    jnp.dtype("float32"): 2e-6,
    jnp.dtype("complex64"): 2e-6,
    jnp.dtype("bfloat16"): 2e-2,
    jnp.dtype("float16"): 2e-3,
}


def assert_close(ours, theirs, scale=1.0):
    """Same tree, shapes, dtypes, NaNs and infinities; finite values to the dtype's tolerance.

    The tolerance is relative to the largest finite magnitude of the leaf.
    """
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.shape == b.shape
        if b.dtype == jax.dtypes.float0 or not jnp.issubdtype(b.dtype, jnp.inexact):
            np.testing.assert_array_equal(a, b)
            continue
        rtol = TOLERANCE[b.dtype] * scale
        wide = np.complex128 if np.iscomplexobj(b) else np.float64
        a, b = a.astype(wide), b.astype(wide)
        finite = np.isfinite(b)
        np.testing.assert_array_equal(a[~finite], b[~finite])
        largest = np.max(np.abs(b), where=finite, initial=0.0)
        np.testing.assert_allclose(a[finite], b[finite], rtol=0, atol=rtol * max(largest, 1e-30))


def cotangent_like(value, seed=0):
    """A random cotangent for `value`, float0 for its integer leaves."""
    rng = np.random.default_rng(seed)

    def one(x):
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return np.zeros(x.shape, jax.dtypes.float0)
        ct = rng.standard_normal(x.shape)
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            ct = ct + 1j * rng.standard_normal(x.shape)
        return jnp.asarray(ct, x.dtype)

    return jax.tree.map(one, value)


def assert_same_vjp(f, *args, scale=1.0, strict=True, plainly=True):
    """`fb.vjp` and `jax.vjp` agree at `args` for a random cotangent, plainly and under jit."""

    def run(vjp, *args, **options):
        value, pullback = vjp(f, *args, **options)
        return value, pullback(cotangent_like(value))

    ours = functools.partial(run, fb.vjp, strict=strict)
    expected, theirs = jax.jit(functools.partial(run, jax.vjp))(*args)
    for compute in (ours, jax.jit(ours)) if plainly else (jax.jit(ours),):
        value, cotangents = compute(*args)
        assert_close(value, expected, scale)
        assert_close(cotangents, theirs, scale)


def two_devices(kind=AxisType.Auto):
    """A mesh of two, whose axis is called "i"."""
    if jax.device_count() < 2:
        pytest.skip("this machine has one accelerator, and the test is of two")
    return jax.make_mesh((2,), ("i",), axis_types=(kind,))


on_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="not defined or not implemented on accelerators"
)
