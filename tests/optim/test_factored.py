"""KFAC and EKFAC: their steps by theory, what their states are made of and keep out."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family import examples, linear, normal, one_step, perceptron, perceptron_params
from jax.flatten_util import ravel_pytree

import fbackprop as fb

W = jax.random.normal(jax.random.key(1), (3, 3))
X = jax.random.normal(jax.random.key(2), (40, 3))
Y = jnp.arange(40) % 3


def run(optimizer, batches):
    step = fb.optim.step(lambda w, x: x @ w, fb.losses.softmax_cross_entropy, optimizer)
    params, state, info = W, optimizer.init(W), {}
    for batch in batches:
        params, state, info = step(params, state, batch)
    return params, state, info


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("options", [{}, {"learning_rate": 0.1, "damping": 0.1, "adaptive": False}])
def test_a_batch_whose_squares_overflow_is_left_out(options, bad):
    """Its factors are infinite, and the inverses of these are finite: zero."""
    batches = [(X, Y)] * 6
    batches[bad] = X.at[0, 0].set(1e20), Y
    optimizer = fb.optim.kfac(**options)
    params, state, info = run(optimizer, batches)
    assert state.skipped == 1 and jnp.isfinite(info["damping"])
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(state))
    assert np.max(np.abs(params - W)) > 0.01


def test_a_schedule_below_zero_is_refused_or_counted():
    with pytest.raises(ValueError, match="kfac: damping=-0.5 must be"):
        run(fb.optim.kfac(0.1, lambda step: -0.5, adaptive=False), [(X, Y)])
    traced = fb.optim.kfac(0.1, lambda step: -0.5 * (step + 1), adaptive=False)
    params, state, _ = run(traced, [(X, Y)] * 2)
    assert state.skipped == 2 and np.array_equal(params, W)


@pytest.mark.parametrize("make", [fb.optim.kfac, fb.optim.ekfac])
def test_states_pickle_before_the_first_step_too(make):
    optimizer = make()
    start = pickle.loads(pickle.dumps(optimizer.init(W)))
    assert jax.tree.structure(start) == jax.tree.structure(optimizer.init(W))
    step = fb.optim.step(lambda w, x: x @ w, fb.losses.softmax_cross_entropy, optimizer)
    _, state, _ = step(W, start, (X, Y))
    again = pickle.loads(pickle.dumps(state))
    assert step(W, again, (X, Y))[2]["skipped"] == 0 and step.compilations == 1


@pytest.mark.parametrize("make", [fb.optim.kfac, fb.optim.ekfac])
@pytest.mark.parametrize("bad", [1, 6])
def test_batches_left_out_at_the_start_are_not_averaged(make, bad):
    """Neither as zeros, nor in place of the factors of the first usable one."""
    exact = fb.Kronecker()
    optimizer = make(1.0, 1e-6, every=20, adaptive=False, momentum=0.0, curvature=exact)
    step = fb.optim.step(lambda w, x: x @ w, fb.losses.squared_error, optimizer)
    batch = X, X @ jnp.ones((3, 3))
    params, state = W, optimizer.init(W)
    for _ in range(bad):
        params, state, _ = step(params, state, (X.at[0, 0].set(jnp.nan), batch[1]))
    params, state, info = step(params, state, batch)
    assert info["skipped"] == bad and state.measured == 1
    assert jnp.max(jnp.abs(params - 1)) < 0.01  # the curvature of linear least squares is exact
    alone = step(W, optimizer.init(W), batch)[1]
    assert jnp.allclose(state.factors.trace(), alone.factors.trace(), rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"learning_rate": 0.1, "adaptive": False}])
def test_examples_of_weight_zero_are_none(options):
    """Neither do the averages take them for examples, nor the bound of the damping."""
    optimizer = fb.optim.kfac(curvature=fb.Kronecker(), every=2, **options)
    step = fb.optim.step(lambda w, x: x @ w, fb.losses.softmax_cross_entropy, optimizer)
    padded = jnp.pad(X, ((0, 300), (0, 0)), constant_values=2), jnp.pad(Y, (0, 300))
    weights = jnp.arange(340) < 40
    mine, its = (W, optimizer.init(W)), (W, optimizer.init(W))
    for _ in range(8):
        *mine, _ = step(*mine, (X, Y), weights=weights[:40])
        *its, _ = step(*its, padded, weights=weights)
    assert jnp.allclose(mine[0], its[0], atol=1e-4)
    assert jnp.allclose(mine[1].damping, its[1].damping, rtol=1e-4)


@pytest.mark.parametrize("make", [fb.optim.kfac, fb.optim.ekfac])
def test_kfac_is_the_natural_gradient_of_a_linear_layer(make):
    """With squared error its block is exactly A ⊗ I; damping that is tiny beside it."""
    with jax.enable_x64(True):
        params, batch = normal(0, 4, 2), (normal(1, 10, 4), normal(2, 10, 2))
        optimizer = make(1.0, 1e-14, curvature=fb.Kronecker(), adaptive=False)
        found, _, _ = one_step(optimizer, linear, fb.losses.squared_error, params, batch)
        exact = fb.optim.gauss_newton(damping=0.0)
        expected, _, _ = one_step(exact, linear, fb.losses.squared_error, params, batch)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_kfac_is_the_natural_gradient_of_a_linear_layer_with_a_bias():
    with jax.enable_x64(True):
        params = {"w": np.ones((3, 2)), "b": np.zeros(2)}
        rng = np.random.default_rng(0)
        batch = rng.normal(size=(16, 3)), rng.normal(size=(16, 2))

        def model(params, x):
            return x @ params["w"] + params["b"]

        exact = fb.Kronecker(vectors="joint")
        kfac = fb.optim.kfac(1.0, damping=1e-16, momentum=0.0, adaptive=False, curvature=exact)
        after, _, _ = one_step(kfac, model, fb.losses.squared_error, params, batch)
        inputs = np.concatenate([batch[0], np.ones((16, 1))], axis=1)
        best = np.linalg.lstsq(inputs, batch[1])[0]
        np.testing.assert_allclose(np.concatenate([after["w"], after["b"][None]]), best, atol=1e-6)


@pytest.mark.slow
def test_kfac_averages_over_a_number_of_examples():
    n = 1280
    batch = normal(3, n, 3), normal(4, n, 2)

    def factors(**options):
        optimizer = fb.optim.kfac(1e-2, every=1, **options)
        step = fb.optim.step(perceptron, fb.losses.squared_error, optimizer)
        params = perceptron_params()
        state = optimizer.init(params)
        for _ in range(4):
            params, state, _ = step(params, state, batch)
        return ravel_pytree(state.factors)[0]

    np.testing.assert_array_equal(factors(), factors(decay=0.5))  # 1 − 1280 / 2560
    assert not np.allclose(factors(), factors(decay=0.9), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("make", [fb.optim.kfac, fb.optim.ekfac])
def test_sequences_of_several_lengths(make):
    """Of a table of positions a prefix is used; of a matrix that would be another operator."""

    def model(params, x):
        return jnp.tanh(x @ params["w"] + params["positions"][: len(x)]).sum(0) @ params["out"]

    params = {"w": normal(0, 3, 4), "positions": jnp.zeros((8, 4)), "out": normal(1, 4, 2)}
    step = fb.optim.step(model, fb.losses.squared_error, make())
    state = step.optimizer.init(params)
    for length in (8, 5, 8, 5):
        batch = normal(length, 16, length, 3), jnp.zeros((16, 2))
        params, state, info = step(params, state, batch)
    assert step.compilations == 2 and info["loss"] < 5 and jnp.any(params["positions"][6:] != 0)

    step = fb.optim.step(lambda w, x: x @ w[: x.size], fb.losses.squared_error, make())
    state = step.init(jnp.ones((5, 2)), (jnp.ones((4, 3)), jnp.ones((4, 2))))
    with pytest.raises(
        ValueError, match="meets other elements of params than the first did: index"
    ):
        step(jnp.ones((5, 2)), state, (jnp.ones((4, 2)), jnp.ones((4, 2))))


@pytest.mark.slow
def test_factors_are_renewed_in_the_first_five_steps_and_then_now_and_then():
    optimizer = fb.optim.kfac(every=8)
    step = fb.optim.step(perceptron, fb.losses.squared_error, optimizer)
    params, batch = perceptron_params(), examples()
    state, renewed = step.init(params, batch), []
    for k in range(10):
        before = ravel_pytree((state.factors, state.solver))[0]
        params, state, _ = step(params, state, batch)
        if jnp.any(before != ravel_pytree((state.factors, state.solver))[0]):
            renewed.append(k)
    assert renewed == [0, 1, 2, 3, 4, 8]
