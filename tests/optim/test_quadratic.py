"""The step that minimises the quadratic model, where its two directions are one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbackprop as fb
from fbackprop.optim.quadratic import _solved


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_of_parallel_directions_the_least_combination_is_taken(dtype):
    with jax.enable_x64(True):
        matrix = jnp.array([[1.0, 2.0], [2.0, 4.0]], dtype)
        found = _solved(matrix, jnp.array([1.0, 2.0], dtype))
        np.testing.assert_allclose(matrix @ found, [1.0, 2.0], rtol=1e-4)
        np.testing.assert_allclose(found * jnp.sqrt(jnp.diag(matrix)), [0.5, 0.5], rtol=1e-4)
        alone = _solved(jnp.diag(jnp.array([2.0, 0.0], dtype)), jnp.array([1.0, 0.0], dtype))
        np.testing.assert_allclose(alone, [0.5, 0.0], rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
def test_data_of_rank_one_are_fitted(rows):
    """Where every update lies along the one before."""
    x = jnp.outer(jnp.linspace(0.5, 1.5, 20), jnp.array([1.0, 2.0, -1.0])[:rows])
    optimizer = fb.optim.kfac()
    step = fb.optim.step(jnp.dot, fb.losses.squared_error, optimizer)
    params = jnp.zeros(rows)
    state, losses = optimizer.init(params), []
    for _ in range(12):
        params, state, info = step(params, state, (x, 3 * x[:, 0]))
        losses.append(float(info["loss"]))
    assert losses[-1] < 1e-3 * losses[0] and np.all(np.diff(losses) < 0)
