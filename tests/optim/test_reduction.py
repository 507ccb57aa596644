"""Damping that follows the loss, and steps that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family import FAMILY, examples, normal, one_step, perceptron, perceptron_params
from jax.flatten_util import ravel_pytree

import fbackprop as fb


def test_levenberg_marquardt_refuses_a_step_that_raises_the_loss():
    def model(p, x):
        return jnp.sin(40 * p) * x

    batch = jnp.ones((2, 1)), jnp.full((2, 1), 0.9)
    optimizer = fb.optim.levenberg_marquardt(damping=1e-2)
    step = fb.optim.step(model, fb.losses.squared_error, optimizer)
    params = jnp.array([0.0385])
    state, losses = optimizer.init(params), []
    for _ in range(25):
        params, state, info = step(params, state, batch)
        losses.append(float(info["loss"]))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize(("name", "n"), [("kfac", 16), ("kfac", 64), ("ekfac", 16)])
def test_damping_is_not_adapted_below_a_part_of_the_mean_eigenvalue(name, n):
    optimizer = FAMILY[name](damping=1e-6, every=1)
    _, state, _ = one_step(
        optimizer, perceptron, fb.losses.squared_error, perceptron_params(), examples(n)
    )
    size = sum(x.size for x in jax.tree.leaves(perceptron_params()))
    mean = jnp.sum(ravel_pytree(state.factors.diagonal())[0]) / size
    assert mean > 1e-3
    np.testing.assert_allclose(state.damping, mean * (32 / n) ** 2, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    "make", [fb.optim.levenberg_marquardt, fb.optim.hessian_free], ids=["lm", "hf"]
)
def test_rounding_errors_of_a_fit_do_not_move_the_damping(make, double):
    """Else it would take as many steps to come back when the data change."""
    with jax.enable_x64(double):
        params = perceptron_params()
        x = jnp.asarray(normal(1, 20, 3))
        fitted = jax.vmap(lambda x: perceptron(jax.tree.map(lambda p: 0.7 * p + 0.2, params), x))(x)
        other = jnp.outer(jnp.sin(3 * x[:, 0]), jnp.array([-4.0, 4.0]))
        step = fb.optim.step(perceptron, fb.losses.squared_error, make())

        def losses(carry, y):
            def one(carry, _):
                *carry, info = step(*carry, (x, y))
                return tuple(carry), info["loss"]

            return jax.lax.scan(one, carry, length=150)

        carry, _ = losses((params, step.init(params, (x, fitted))), fitted)
        _, found = losses(carry, other)
        assert found[20] < 0.9 * found[0]


@pytest.mark.parametrize(
    "make", [fb.optim.levenberg_marquardt, fb.optim.hessian_free], ids=["lm", "hf"]
)
def test_damping_finds_its_size_where_curvature_is_small(make):
    """A damping that is far too large promises less than the loss's rounding error."""
    x, w = normal(1, 40, 3), jnp.array([1.0, 2.0, 3.0])
    step = fb.optim.step(lambda p, x: 1e-4 * x @ p, fb.losses.squared_error, make())
    batch = x, 1e-4 * x @ w

    def one(carry, _):
        return step(*carry, batch)[:2], None

    params = jnp.zeros(3)
    (found, _), _ = jax.lax.scan(one, (params, step.init(params, batch)), length=60)
    np.testing.assert_allclose(found, w, rtol=1e-3)
