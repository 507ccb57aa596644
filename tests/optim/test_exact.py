"""Exact Gauss-Newton steps, against what theory says of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family import examples, linear, normal, one_step, perceptron, perceptron_params
from jax.flatten_util import ravel_pytree

import fbackprop as fb


@pytest.mark.parametrize("space", ["primal", "dual"])
def test_gauss_newton_solves_linear_least_squares_in_one_step(space):
    with jax.enable_x64(True):
        x, w = normal(0, 8, 5), normal(1, 5, 2)
        optimizer = fb.optim.gauss_newton(damping=0.0, space=space)
        batch = x, x @ w
        found, _, _ = one_step(optimizer, linear, fb.losses.squared_error, jnp.zeros((5, 2)), batch)
        np.testing.assert_allclose(found, w, atol=1e-8)


@pytest.mark.slow
def test_the_loss_sets_the_damping_of_gauss_newton():
    """A fifth of it, so that a factor on the loss changes nothing."""
    params, batch = perceptron_params(), examples()
    step = lambda optimizer, factor: one_step(  # noqa: E731
        optimizer, perceptron, lambda z, y: factor * fb.losses.squared_error(z, y), params, batch
    )
    found, _, info = step(fb.optim.gauss_newton(), 1.0)
    given = step(fb.optim.gauss_newton(damping=info["loss"] / 5), 1.0)[0]
    scaled = step(fb.optim.gauss_newton(), 64.0)[0]
    for other in (given, scaled):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), found, other)


def test_gauss_newton_fits_a_batch_to_the_last_bits():
    """The damping fades as the loss does: convergence is quadratic."""
    params, batch = perceptron_params(), examples(6)
    optimizer = fb.optim.gauss_newton()
    step = fb.optim.step(perceptron, fb.losses.squared_error, optimizer)
    state = optimizer.init(params)
    for _ in range(30):
        params, state, info = step(params, state, batch)
    assert info["loss"] < 1e-11


@pytest.mark.slow
def test_gauss_newton_is_newtons_method_for_softmax_regression():
    with jax.enable_x64(True):
        params, batch = normal(0, 4, 3), (normal(1, 9, 4), jnp.arange(9) % 3)
        problem = fb.Objective(linear, fb.losses.softmax_cross_entropy, params, batch)
        flat, unravel = ravel_pytree(params)
        value = lambda p: problem.value(unravel(p))  # noqa: E731
        newton = jnp.linalg.solve(
            jax.hessian(value)(flat) + 1e-3 * jnp.eye(12), jax.grad(value)(flat)
        )
        found, _, info = one_step(
            fb.optim.gauss_newton(damping=1e-3), linear, problem.loss, params, batch
        )
        np.testing.assert_allclose(params - found, unravel(newton), atol=1e-8)
        np.testing.assert_allclose(info["loss"], value(flat))


def test_primal_and_dual_solutions_agree():
    with jax.enable_x64(True):
        params, batch = jax.tree.map(lambda x: x.astype(float), perceptron_params()), examples()
        found = [
            one_step(
                fb.optim.gauss_newton(damping=1e-4, space=space),
                perceptron, fb.losses.squared_error, params, batch,
            )[0]
            for space in ("primal", "dual")
        ]  # fmt: skip
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-8), *found)
