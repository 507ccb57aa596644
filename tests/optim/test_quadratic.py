"""The quadratic model, its part of a batch, and the step that minimises it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from family import examples, linear, normal, one_step, perceptron, perceptron_params

import fbackprop as fb
from fbackprop.optim.quadratic import QuadraticModel, _solved, part_of


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


@pytest.mark.slow
def test_the_quadratic_models_step_is_its_minimum():
    """With exact curvature of a quadratic loss no multiple of the step does better."""
    params, batch = normal(0, 4, 2), (normal(1, 10, 4), normal(2, 10, 2))
    optimizer = fb.optim.kfac(damping=1e-6, adaptive=False)
    found, _, _ = one_step(optimizer, linear, fb.losses.squared_error, params, batch)
    problem = fb.Objective(linear, fb.losses.squared_error, params, batch)
    values = [problem.value(params + k * (found - params)) for k in (0.95, 1.0, 1.05)]
    assert values[1] <= min(values[0], values[2])


@pytest.mark.slow
@pytest.mark.parametrize(("n", "size"), [(200, 200), (256, 128), (400, 134), (1024, 128)])
def test_the_quadratic_model_is_of_a_part_of_a_large_batch(n, size):
    """What its slope and its curvature are is seen on a batch whose parts are all the same."""
    batch = jax.tree.map(lambda x: jnp.repeat(x, n // size, axis=0), examples(size))
    whole = fb.Objective(perceptron, fb.losses.squared_error, perceptron_params(), batch)
    part = part_of(whole)
    assert part.n_examples == part_of(replace(whole, batch=examples(n))).n_examples == size
    assert part_of(replace(whole, weights=jnp.ones(len(batch[0])))).n_examples == len(batch[0])
    directions = [jax.tree.map(lambda x, k=k: normal(k, *x.shape), whole.params) for k in (5, 6)]
    w = jnp.array([0.5, -2.0])

    @jax.jit
    def run(whole):
        model = QuadraticModel.of(part_of(whole), directions, 0.1)
        value, gradient = whole.value_and_gradient()
        change = jax.tree.map(lambda x, y: w[0] * x + w[1] * y, *directions)
        quadratic = fb.GaussNewton.of(whole).quadratic(change)
        quadratic += 0.1 * optax.tree.vdot(change, change)
        expected = -optax.tree.vdot(gradient, change) - quadratic / 2
        return (model.promised(w), model.value), (expected, value)

    np.testing.assert_allclose(*run(whole), rtol=1e-5)


@pytest.mark.slow
def test_the_length_of_a_step_is_of_what_the_gradient_has_become():
    """Weight decay counts in the model's slope, whether the gradient is passed or not."""
    decay, damping = 0.5, 0.1
    optimizer = optax.chain(
        optax.add_decayed_weights(decay), fb.optim.kfac(damping=damping, adaptive=False)
    )
    params, batch = perceptron_params(), examples()
    problem = fb.Objective(perceptron, fb.losses.squared_error, params, batch)
    _, gradient = problem.value_and_gradient()
    change, _ = one_step(optimizer, problem.model, problem.loss, params, batch)[:2]
    change = optax.tree.sub(change, params)
    state = optimizer.init(params)
    alone, _ = optimizer.update(gradient, state, params, objective=problem)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6), change, alone)
    slope = optax.tree.vdot(optax.tree.add_scale(gradient, decay, params), change)
    quadratic = fb.GaussNewton.of(problem).quadratic(change)
    quadratic += damping * optax.tree.vdot(change, change)
    np.testing.assert_allclose(-slope, quadratic, rtol=1e-4)  # the minimum along the change
