"""KFAC's and EKFAC's states: what they keep out, and what they are made of."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
