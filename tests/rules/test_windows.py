"""Pooling over windows side by side goes back elementwise: ties, remainders, NaNs as in JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fbackprop as fb


@pytest.mark.parametrize("window", [(2, 3), (1, 1), (3, 2), (9, 9)])
@pytest.mark.parametrize("extremum", [(lax.max, -jnp.inf), (lax.min, jnp.inf)], ids=["max", "min"])
def test_pooling_side_by_side(window, extremum):
    operation, start = extremum

    def pool(x):
        return lax.reduce_window(x, start, operation, window, window, "VALID")

    x = jax.random.randint(jax.random.key(0), (10, 11), 0, 3).astype(float)  # with many ties
    x = x.at[1, 2].set(jnp.nan).at[6, 6].set(-jnp.inf)
    ct = jnp.arange(1.0, 1 + pool(x).size).reshape(pool(x).shape)
    expected = jax.vjp(pool, x)[1](ct)[0]
    np.testing.assert_array_equal(fb.vjp(pool, x)[1](ct)[0], expected)
    columns = jax.vmap(lambda ct: fb.vjp(pool, x)[1](ct)[0])(jnp.stack([ct, 2 * ct]))
    np.testing.assert_array_equal(columns[1], 2 * expected)


def test_pooling_twice_differentiated():
    def f(x):
        return jnp.sum(lax.reduce_window(jnp.sin(x), -jnp.inf, lax.max, (2,), (2,), "VALID") ** 2)

    x = jnp.linspace(0.1, 1.3, 7)
    np.testing.assert_allclose(
        fb.grad(lambda x: jnp.sum(fb.grad(f)(x) ** 2))(x),
        jax.grad(lambda x: jnp.sum(jax.grad(f)(x) ** 2))(x),
        rtol=1e-5,
    )
