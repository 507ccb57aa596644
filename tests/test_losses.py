"""Losses against their definitions in float64, at ordinary and at extreme values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbackprop import losses

HUGE = 1e4


def naive_squared_error(prediction, target):
    return (
        sum((t - o) ** 2 for o, t in zip(np.ravel(prediction), np.ravel(target), strict=True)) / 2
    )


def naive_softmax_cross_entropy(logits, distribution):
    classes, total = logits.shape[-1], 0.0
    for z, t in zip(logits.reshape(-1, classes), distribution.reshape(-1, classes), strict=True):
        total -= sum(t * np.log(np.exp(z) / np.exp(z).sum()))
    return total


def naive_sigmoid_binary_cross_entropy(logits, targets):
    p = 1 / (1 + np.exp(-logits))
    return -np.sum(targets * np.log(p) + (1 - targets) * np.log(1 - p))


def draw(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def draw_distribution(shape):
    return np.random.default_rng(1).dirichlet(np.ones(shape[-1]), size=shape[:-1])


PAIRS = [
    (losses.squared_error, naive_squared_error, draw),
    (losses.softmax_cross_entropy, naive_softmax_cross_entropy, draw_distribution),
    (
        losses.sigmoid_binary_cross_entropy,
        naive_sigmoid_binary_cross_entropy,
        draw_distribution,
    ),
]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("bfloat16", 2e-2), ("float32", 1e-6), ("float64", 1e-14)]
)
@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 2, 3)])
@pytest.mark.parametrize(("loss", "naive", "draw_target"), PAIRS)
def test_equals_its_definition(loss, naive, draw_target, shape, dtype, tolerance):
    with jax.enable_x64(True):
        prediction = jnp.asarray(draw(shape), dtype)
        target = jnp.asarray(draw_target(shape), dtype)
        value = loss(prediction, target)
        assert value.shape == ()
        assert value.dtype == dtype
        expected = naive(np.asarray(prediction, np.float64), np.asarray(target, np.float64))
        np.testing.assert_allclose(np.float64(value), expected, rtol=tolerance)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_labels_are_one_hot_distributions_summed_over_positions(shape):
    logits = draw((*shape, 5))
    labels = np.random.default_rng(2).integers(0, 5, size=shape)
    by_label = losses.softmax_cross_entropy(logits, labels)
    by_distribution = losses.softmax_cross_entropy(logits, np.eye(5)[labels])
    np.testing.assert_allclose(by_label, by_distribution, rtol=1e-6)


@pytest.mark.parametrize("label", [-1, 5])
def test_label_out_of_range_is_masked(label):
    logits = jnp.asarray(draw((2, 5)))
    labels = jnp.array([label, 2])
    loss, gradient = jax.value_and_grad(losses.softmax_cross_entropy)(logits, labels)
    np.testing.assert_allclose(loss, losses.softmax_cross_entropy(logits[1], 2), rtol=1e-6)
    np.testing.assert_array_equal(gradient[0], 0)


EXTREMES = [
    # loss, logits, target, value, gradient
    (losses.softmax_cross_entropy, [HUGE, 0.0], 0, 0.0, [0, 0]),
    (losses.softmax_cross_entropy, [HUGE, 0.0], 1, HUGE, [1, -1]),
    (losses.softmax_cross_entropy, [-HUGE, -HUGE], 0, np.log(2), [-0.5, 0.5]),
    (losses.softmax_cross_entropy, [-np.inf, 0.0], 1, 0.0, [0, 0]),
    (losses.softmax_cross_entropy, [0.0, HUGE], [0.5, 0.5], HUGE / 2, [-0.5, 0.5]),
    (losses.sigmoid_binary_cross_entropy, [HUGE, -HUGE], [1, 0], 0.0, [0, 0]),
    (losses.sigmoid_binary_cross_entropy, [HUGE, -HUGE], [0, 1], 2 * HUGE, [1, -1]),
    (losses.sigmoid_binary_cross_entropy, [30.0], [1], np.exp(-30), [-np.exp(-30)]),
    (losses.sigmoid_binary_cross_entropy, [0.0], [True], np.log(2), [-0.5]),
    (losses.squared_error, [HUGE, -HUGE], [0, 0], HUGE**2, [HUGE, -HUGE]),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("loss", "logits", "target", "value", "gradient"), EXTREMES)
def test_extreme_values(loss, logits, target, value, gradient, dtype):
    with jax.enable_x64(True):
        logits = jnp.asarray(logits, dtype)
        target = jnp.asarray(target)
        if jnp.issubdtype(target.dtype, jnp.floating):
            target = target.astype(dtype)
        found, slope = jax.value_and_grad(loss)(logits, target)
        tolerance = max(4 * float(jnp.finfo(dtype).eps), 1e-13)
        np.testing.assert_allclose(np.float64(found), value, rtol=tolerance)
        # σ(30) − 1 is a difference of numbers near 1: only its smallness can be asked for.
        np.testing.assert_allclose(np.float64(slope), gradient, rtol=tolerance, atol=1e-12)


def test_error_signals():
    logits, target = jnp.asarray(draw(4)), jnp.array([0.1, 0.2, 0.3, 0.4])
    rows = [
        (losses.squared_error, logits - target),
        (losses.softmax_cross_entropy, jax.nn.softmax(logits) - target),
        (losses.sigmoid_binary_cross_entropy, jax.nn.sigmoid(logits) - target),
    ]
    for loss, signal in rows:
        np.testing.assert_allclose(jax.grad(loss)(logits, target), signal, atol=1e-6)


def test_composes_with_vmap_and_jit():
    logits, labels = draw((6, 5)), np.arange(6) % 5
    each = jax.jit(jax.vmap(losses.softmax_cross_entropy))(logits, labels)
    assert each.shape == (6,)
    np.testing.assert_allclose(
        jnp.sum(each), losses.softmax_cross_entropy(logits, labels), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("loss", "prediction", "target", "message"),
    [
        (losses.squared_error, np.ones(3), np.ones((3, 1)), "squared_error.*same shape"),
        (losses.squared_error, np.ones(3), 1.0, "squared_error.*same shape"),
        (losses.sigmoid_binary_cross_entropy, np.ones(3), np.ones(4), "sigmoid.*same shape"),
        (losses.softmax_cross_entropy, np.ones((2, 3)), np.ones(2), "integer labels of shape"),
        (losses.softmax_cross_entropy, np.ones((2, 3)), 1, "integer labels of shape"),
        (losses.softmax_cross_entropy, np.ones(3), np.ones(3, int), "floating-point distrib"),
        (losses.softmax_cross_entropy, 1.0, 0, "no classes"),
        (losses.softmax_cross_entropy, np.ones((2, 0)), np.ones(2, int), "no classes"),
    ],
)
def test_refuses_what_does_not_fit(loss, prediction, target, message):
    with pytest.raises(ValueError, match=message) as error:
        loss(prediction, target)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("dtype", "label"), [("uint8", 0), ("int8", 43), ("int8", -1)])
def test_labels_of_narrow_types_are_what_they_say(dtype, label):
    logits = draw((300,))
    narrow, wide = (
        jax.value_and_grad(losses.softmax_cross_entropy)(logits, jnp.asarray(label, of))
        for of in (dtype, "int32")
    )
    assert narrow[0] == wide[0]
    np.testing.assert_array_equal(narrow[1], wide[1])


def test_a_masked_position_may_have_any_logits():
    logits = jnp.array([[1.0, jnp.nan], [0.0, 0.0], [jnp.inf, jnp.inf]])
    for target in (jnp.array([-1, 0, -1]), jnp.array([[0.0, 0], [1, 0], [0, 0]])):
        loss, gradient = jax.value_and_grad(losses.softmax_cross_entropy)(logits, target)
        assert loss == jnp.log(2.0)
        np.testing.assert_array_equal(gradient, [[0, 0], [-0.5, 0.5], [0, 0]])


def test_targets_that_are_not_real_are_refused():
    for name in ("squared_error", "sigmoid_binary_cross_entropy"):
        with pytest.raises(ValueError, match="the target is of dtype complex64"):
            getattr(losses, name)(jnp.ones(2), jnp.ones(2, "complex64"))


def test_infinite_logits_that_are_right_cost_nothing():
    logits, targets = jnp.array([-jnp.inf, jnp.inf, 1.0]), jnp.array([0, 1, 1])
    loss = losses.sigmoid_binary_cross_entropy
    np.testing.assert_allclose(loss(logits, targets), jnp.log1p(jnp.exp(-1.0)), rtol=1e-6)
    assert np.all(np.isfinite(jax.grad(loss)(logits, targets)))
    assert loss(logits, 1 - targets) == jnp.inf
    assert jnp.isnan(loss(logits.at[2].set(jnp.nan), targets))


@pytest.mark.parametrize("name", ["squared_error", "sigmoid_binary_cross_entropy"])
def test_predictions_that_are_not_real_are_refused(name):
    for prediction in (jnp.ones(2, complex), jnp.ones(2, bool)):
        with pytest.raises(ValueError, match="real floating point"):
            getattr(losses, name)(prediction, jnp.ones(2))
