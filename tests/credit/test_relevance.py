"""Relevance: formulas of single layers, and conservation in whole networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fbackprop as fb

RULES = {
    "epsilon": fb.credit.epsilon,
    "gamma": fb.credit.gamma,
    "alpha-beta": fb.credit.alpha_beta,
}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


# --- one layer by its formula ---------------------------------------------------------------------

W, V, X = normal(0, 6, 4), normal(1, 4), normal(2, 6)


def deal(x, w, relevance, weigh):
    """``Rᵢ = Σⱼ weigh(xᵢwᵢⱼ, j)/Σᵢ weigh(xᵢwᵢⱼ, j) Rⱼ``"""
    contributions = x[:, None] * w
    weighed = weigh(contributions)
    return (weighed @ (relevance / weighed.sum(0))[:, None])[:, 0]


def test_epsilon_by_its_formula():
    z = W.T @ X
    found = fb.credit.relevance(lambda x: jnp.tanh(x @ W) @ V, X, fb.credit.epsilon(0.3))
    top = jnp.tanh(z) @ V
    share = jnp.tanh(z) * V * top / (top + 0.3 * jnp.sign(top))
    by_hand = X * (W @ (share / (z + 0.3 * jnp.sign(z))))
    np.testing.assert_allclose(found, by_hand, rtol=1e-4, atol=1e-6)


def test_gamma_by_its_formula():
    x = jnp.abs(X)  # for positive inputs it is the published one, where z is positive
    w = jnp.abs(W) - 0.3
    assert jnp.all(x @ w > 0)

    def weigh(c):
        return c + 0.5 * jnp.maximum(c, 0)

    v = jnp.abs(V)
    by_hand = deal(x, w, (x @ w) * v, weigh)
    np.testing.assert_allclose(
        fb.credit.relevance(lambda x: (x @ w) @ v, x, fb.credit.gamma(0.5)), by_hand, rtol=1e-4
    )


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 1.0), (1.0, 0.0)])
def test_alpha_beta_by_its_formula(alpha, beta):
    plus = deal(X, W, (X @ W) * V, lambda c: jnp.maximum(c, 0))
    minus = deal(X, W, (X @ W) * V, lambda c: jnp.minimum(c, 0))

    def f(x):
        return jnp.sum((x @ W) * V)

    found = fb.credit.relevance(f, X, fb.credit.alpha_beta(alpha, beta))
    np.testing.assert_allclose(found, alpha * plus - beta * minus, rtol=1e-4, atol=1e-5)


def test_without_changes_it_is_gradient_times_input_on_rectifiers():
    def f(x):
        return jax.nn.relu(x @ W) @ V

    got = fb.credit.relevance(f, X, fb.credit.epsilon(0.0))
    np.testing.assert_allclose(got, X * jax.grad(f)(X), rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fb.credit.epsilon(-1.0), "epsilon=-1"),
        (lambda: fb.credit.gamma(-1.0), "gamma=-1"),
        (lambda: fb.credit.alpha_beta(2.0, 2.0), "must be 1"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("step", [jnp.sign, jnp.round, jnp.floor, jnp.ceil, jnp.trunc])
def test_steps_hand_their_relevance_on(step):
    """They have no derivative, but an element of the result is still one of the operand's doing."""
    x, w = jnp.array([0.6, -1.4, 2.2]), jnp.array([1.0, 2.0, 3.0])
    for rules in (fb.credit.epsilon(), fb.credit.gamma(), fb.credit.alpha_beta()):
        found = fb.credit.relevance(lambda x: step(x) @ w, x, rules)
        np.testing.assert_allclose(jnp.sum(found), step(x) @ w, rtol=1e-5)
    found = fb.credit.relevance(lambda x: step(x) @ w, x)
    np.testing.assert_allclose(found, step(x) * w, rtol=1e-5, atol=1e-5)


ELEMENTWISE = {
    "logaddexp": lambda h: jnp.logaddexp(h, 0.0),
    "hypot": lambda h: jnp.hypot(h, 1.0),
    "arctan2": lambda h: jnp.arctan2(h, 2.0),
    "sinc": jnp.sinc,
    "jit": jax.jit(lambda h: jnp.sign(h) * jnp.log1p(jnp.abs(h))),
    "jit of two": lambda h: jax.jit(jnp.multiply)(jnp.tanh(h), h),
    "jit of one and a constant": lambda h: jax.jit(jnp.hypot)(h, jnp.ones_like(h)),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_functions_hand_all_of_it_on(name):
    def f(x):
        return jnp.sum(ELEMENTWISE[name](x @ W))

    np.testing.assert_allclose(jnp.sum(fb.credit.relevance(f, X)), f(X), rtol=1e-4)


# --- conservation ---------------------------------------------------------------------------------


def mlp(x):
    for seed, (i, o) in enumerate([(6, 20), (20, 20), (20, 3)]):
        x = x @ (normal(seed, i, o) / i**0.5) + 0.3 * normal(seed + 9, o)
        x = jax.nn.gelu(x) if o != 3 else x
    return x[1]


def conv(x, seed, features):
    kernel = normal(seed, 3, 3, x.shape[-1], features) / (3 * x.shape[-1] ** 0.5)
    out = lax.conv_general_dilated(
        x[None], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return out[0] + 0.2 * normal(seed + 20, 1, 1, features)


def pooled(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (2, 2, 1), (2, 2, 1), "VALID")


def convnet(x):
    x = pooled(jax.nn.relu(conv(x, 0, 4)))
    x = jax.nn.silu(conv(x, 1, 8))
    return jnp.mean(x, (0, 1)) @ normal(3, 8)


def normalised(x):
    centred = x - jnp.mean(x, (0, 1), keepdims=True)
    scale = lax.rsqrt(jnp.var(x, (0, 1), keepdims=True) + 1e-5)
    return centred * scale * (1 + 0.1 * normal(7, 1, 1, x.shape[-1])) + 0.1 * normal(
        8, 1, 1, x.shape[-1]
    )


def resnet(x):
    x = jax.nn.relu(conv(x, 0, 4))
    for seed in (1, 3):
        x = x + conv(jax.nn.relu(normalised(conv(x, seed, 4))), seed + 1, 4)
    return jnp.mean(x, (0, 1)) @ normal(5, 4)


def transformer(x):
    x = x.reshape(6, -1)
    d = x.shape[1]

    def layer(x, w):
        q, k, v = (x @ w[i] for i in range(3))
        x = x + jax.nn.softmax(q @ k.T / d**0.5) @ v
        mean, sd = jnp.mean(x, -1, keepdims=True), jnp.std(x, -1, keepdims=True)
        return (x - mean) / sd, None

    x, _ = lax.scan(layer, x, normal(4, 2, 3, d, d) / d**0.5)
    return jnp.mean(x, 0) @ normal(6, d)


NETWORKS = {
    "mlp": (mlp, normal(40, 6)),
    "convnet": (convnet, normal(41, 8, 8, 2)),
    "resnet": (resnet, normal(42, 8, 8, 2)),
    "transformer": (transformer, normal(43, 6, 8)),
}


@pytest.mark.slow
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", ["mlp", "convnet", "resnet", "transformer"])
def test_relevance_is_conserved(name, rules):
    f, x = NETWORKS[name]
    found = jax.jit(lambda x: fb.credit.relevance(f, x, RULES[rules]()))(x)
    assert jnp.all(jnp.isfinite(found))
    np.testing.assert_allclose(jnp.sum(found), f(x), rtol=1e-4)


@pytest.mark.slow
def test_relevance_of_a_batch_by_vmap():
    xs = normal(50, 3, 6)
    got = jax.vmap(lambda x: fb.credit.relevance(mlp, x))(xs)
    np.testing.assert_allclose(got.sum(1), jax.vmap(mlp)(xs), rtol=1e-4)
