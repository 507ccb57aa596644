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
