"""Averages of `diagonal_gauss_newton`: corrected for what they are of."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fbackprop as fb

W = jax.random.normal(jax.random.key(1), (3, 3))
X = jax.random.normal(jax.random.key(2), (40, 3))
Y = jnp.arange(40) % 3


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("every", [1, 100])
def test_batches_that_are_left_out_leave_the_averages_as_they_are(every, momentum):
    optimizer = fb.optim.diagonal_gauss_newton(
        1.0, 1e-6, momentum=momentum, every=every, clip=None, curvature=fb.GGNDiagonal()
    )
    step = fb.optim.step(lambda w, x: x @ w, fb.losses.softmax_cross_entropy, optimizer)
    state = optimizer.init(W)
    for _ in range(2):
        params, state, _ = step(W, state, (X.at[0, 0].set(jnp.nan), Y))
        assert np.array_equal(params, W)
    after, _, info = step(W, state, (X, Y))
    expected, _, _ = step(W, optimizer.init(W), (X, Y))
    np.testing.assert_allclose(after - W, expected - W, rtol=1e-4)
    assert info["skipped"] == 2


@pytest.mark.parametrize(
    ("damping", "dtype"), [(lambda t: t * jnp.nan, "float32"), (lambda t: -0.5 - t, "float32"),
                           (1e-7, "float16")],
    ids=["nan", "negative", "overflow"],
)  # fmt: skip
def test_its_own_step_that_is_of_no_use_is_left_out_and_counted(damping, dtype):
    """A slope of 30 by no curvature is more than float16 holds."""
    optimizer = fb.optim.diagonal_gauss_newton(
        0.1, damping, clip=None, every=1, curvature=fb.GGNDiagonal()
    )
    loss = {"float32": fb.losses.squared_error, "float16": lambda z, y: z * y}[dtype]
    params = jnp.full(2, 0.5, dtype)
    batch = jnp.array([[1.0, 0.0]], dtype), jnp.full(1, 30.0, dtype)
    problem = fb.Objective(jnp.dot, loss, params, batch)
    _, gradient = problem.value_and_gradient()
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for skipped in (1, 2):
        updates, state = update(gradient, state, params, objective=problem)
        assert not np.any(updates)
        assert optax.tree.get(state, "skipped") == skipped
