"""Attribution by changed rectifiers and by averages of gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fbackprop as fb


def conv(image, kernel):
    return lax.conv_general_dilated(image[None, None], kernel[None, None], (1, 1), "VALID")[0, 0]


IMAGE = jax.random.normal(jax.random.key(0), (6, 6))
A, B = jax.random.normal(jax.random.key(1), (2, 3, 3))


def network(image):
    return jnp.sum(jax.nn.relu(conv(jax.nn.relu(conv(image, A)), B)))


def spread_back(ct, kernel):
    """The transpose of `conv`, written out."""
    n = ct.shape[0] + 2
    out = np.zeros((n, n))
    for i in range(ct.shape[0]):
        for j in range(ct.shape[1]):
            out[i : i + 3, j : j + 3] += ct[i, j] * np.asarray(kernel)
    return out


@pytest.mark.parametrize("method", ["guided_backprop", "deconvnet"])
@pytest.mark.parametrize(
    "relu", [jax.nn.relu, lambda x: jnp.maximum(x, 0), lambda x: jnp.maximum(0.0, x)]
)
def test_rectifiers_pass_what_the_method_says(method, relu):
    def network(image):
        return jnp.sum(
            relu(conv(relu(conv(image, A)), B)) * jnp.arange(-8.0, 8).reshape(4, 4)[:2, :2]
        )

    def passes(ct, pre):
        return ct * (ct > 0) * ((pre > 0) | (method == "deconvnet"))

    first = conv(IMAGE, A)
    second = conv(jax.nn.relu(first), B)
    ct = passes(np.arange(-8.0, 8).reshape(4, 4)[:2, :2], np.asarray(second))
    ct = passes(spread_back(ct, B), np.asarray(first))
    got = fb.grad(network, rules=getattr(fb.credit, method)())(IMAGE)
    np.testing.assert_allclose(got, spread_back(ct, A), rtol=1e-4, atol=1e-5)


def test_rectifiers_that_saturate():
    x, ct = jnp.array([-1.0, 2.0, 3.0, 7.0]), jnp.array([1.0, -1.0, 1.0, 1.0])

    def f(x):
        return jax.nn.relu6(x) @ ct

    guided, deconv = fb.credit.guided_backprop(), fb.credit.deconvnet()
    np.testing.assert_array_equal(fb.grad(f, rules=guided)(x), [0, 0, 1, 0])
    np.testing.assert_array_equal(fb.grad(f, rules=deconv)(x), [1, 0, 1, 1])


def test_guided_backprop_finds_the_rectifiers_of_another_library():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(3, (3, 3))(x))
            x = nn.relu(nn.Dense(5)(x.ravel()))
            return nn.Dense(2)(x)

    net, image = Net(), IMAGE[..., None]
    params = net.init(jax.random.key(0), image)

    @jax.custom_vjp
    def guided(x):
        return jax.nn.relu(x)

    guided.defvjp(lambda x: (guided(x), x), lambda x, ct: (ct * (x > 0) * (ct > 0),))

    def by_hand(image):
        p = params["params"]
        x = lax.conv_general_dilated(
            image[None],
            p["Conv_0"]["kernel"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )[0]
        x = guided(x + p["Conv_0"]["bias"].reshape(1, 1, -1)).ravel()
        x = guided(x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"])
        return (x @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"])[1]

    got = fb.grad(lambda x: net.apply(params, x)[1], rules=fb.credit.guided_backprop())(image)
    np.testing.assert_allclose(got, jax.grad(by_hand)(image), rtol=1e-4, atol=1e-6)
    by_name = fb.grad(
        lambda x: net.apply(params, x)[1], rules={"relu": lambda ct, x: ct * (x > 0) * (ct > 0)}
    )
    np.testing.assert_allclose(by_name(image), got, rtol=1e-6)


def test_integrated_gradients_sum_to_the_difference():
    def f(x):
        return jnp.sum(jnp.tanh(x["a"]) * x["b"] ** 2)

    x = {"a": jnp.array([0.3, -1.0]), "b": jnp.array([2.0, 0.7])}
    base = jax.tree.map(lambda v: 0.1 * v, x)
    for baseline, start in ((None, 0.0), (base, f(base))):
        got = fb.credit.integrated_gradients(f, x, baseline, steps=20)
        total = sum(jnp.sum(v) for v in got.values())
        np.testing.assert_allclose(total, f(x) - start, rtol=1e-5)
    quadratic = fb.credit.integrated_gradients(lambda v: jnp.sum(v**2), x["a"], steps=1)
    np.testing.assert_allclose(quadratic, x["a"] ** 2, rtol=1e-6)
    with pytest.raises(ValueError, match="steps=0"):
        fb.credit.integrated_gradients(f, x, steps=0)


def test_smooth_gradients_are_means_over_noise():
    """Of Σx³ it is 3(x² + σ²)."""
    x = jnp.array([0.5, -1.0])
    got = fb.credit.smooth_gradient(
        lambda x: jnp.sum(x**3), x, jax.random.key(0), stddev=0.5, samples=4000
    )
    np.testing.assert_allclose(got, 3 * (x**2 + 0.25), atol=0.15)
    with pytest.raises(ValueError, match="samples=0"):
        fb.credit.smooth_gradient(jnp.sum, x, jax.random.key(0), stddev=1.0, samples=0)


def test_what_averages_cannot_be_of():
    def f(x):
        return jnp.sum(x * x)

    x, key = jnp.ones(2), jax.random.key(0)
    for make, error, words in (
        (lambda: fb.credit.integrated_gradients(f, x, steps=1.5), ValueError, "steps=1.5"),
        (lambda: fb.credit.integrated_gradients(f, x, jnp.ones(3)), ValueError, "baseline"),
        (lambda: fb.credit.smooth_gradient(f, 3, key, stddev=0.1), TypeError, "one is int32"),
        (lambda: fb.credit.smooth_gradient(f, x, key, stddev=1, samples=0), ValueError, "samples"),
    ):
        with pytest.raises(error, match=words):
            make()
    narrow = fb.credit.smooth_gradient(f, x.astype(jnp.bfloat16), key, stddev=np.float64(0.1))
    assert narrow.dtype == jnp.bfloat16


def test_averages_take_rules():
    rules = {"relu": lambda ct: ct}
    got = fb.credit.integrated_gradients(
        lambda x: jnp.sum(jax.nn.relu(x)), -jnp.ones(3), rules=rules
    )
    np.testing.assert_allclose(got, -jnp.ones(3), rtol=1e-6)


def test_rectifiers_are_found_where_a_function_looks_at_values():
    def f(x):
        return jnp.sum(jax.nn.relu(x) * jnp.array([1.0, -1.0])) * (2 if x[0] > 0 else 3)

    got = fb.grad(f, rules=fb.credit.guided_backprop())(jnp.array([1.0, 1.0]))
    np.testing.assert_array_equal(got, jnp.array([2.0, 0.0]))
