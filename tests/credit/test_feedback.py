"""Feedback other than by the transposed weights, against formulas written out."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.ad_checkpoint import checkpoint_name

import fbackprop as fb

SIZES = (6, 5, 4, 3)


def draw(key):
    keys = jax.random.split(jax.random.key(key), len(SIZES) - 1)
    return [
        {"w": jax.random.normal(k, (o, i)) / i**0.5, "b": 0.1 * jax.random.normal(k, (o,))}
        for k, i, o in zip(keys, SIZES, SIZES[1:], strict=False)
    ]


def model(params, x):
    for layer in params[:-1]:
        x = jnp.tanh(layer["w"] @ x + layer["b"])
    return checkpoint_name(params[-1]["w"] @ x + params[-1]["b"], "output")


def loss(params, x, y):
    return 0.5 * jnp.sum((model(params, x) - y) ** 2)


W, B = draw(0), draw(1)
x = jax.random.normal(jax.random.key(2), (6,))
y = jnp.array([1.0, -1.0, 0.5])


def by_hand(send):
    """Gradients when layer l + 1 sends its error δ back as ``send(l + 1, δ, error)``."""
    inputs, h = [], x
    for layer in W[:-1]:
        inputs.append(h)
        h = jnp.tanh(layer["w"] @ h + layer["b"])
    inputs.append(h)
    delta = error = W[-1]["w"] @ h + W[-1]["b"] - y
    found = []
    for k in reversed(range(len(W))):
        found.append({"w": jnp.outer(delta, inputs[k]), "b": delta})
        if k:
            delta = send(k, delta, error) * (1 - inputs[k] ** 2)
    return found[::-1]


@pytest.mark.parametrize(
    ("rules", "send"),
    [
        (lambda: fb.credit.feedback_alignment(B), lambda k, d, e: B[k]["w"].T @ d),
        (
            lambda: fb.credit.sign_symmetric(B),
            lambda k, d, e: (jnp.sign(W[k]["w"]) * jnp.abs(B[k]["w"])).T @ d,
        ),
        (fb.credit.sign_concordant, lambda k, d, e: jnp.sign(W[k]["w"]).T @ d),
        (
            lambda: fb.credit.direct_feedback_alignment(
                {"tanh": [jnp.ones((5, 3)), 2 * jnp.ones((4, 3))]}, "output"
            ),
            lambda k, d, e: k * jnp.ones((SIZES[k], 3)) @ e,
        ),
    ],
    ids=["feedback", "sign-symmetric", "sign-concordant", "direct"],
)
def test_gradients_are_those_of_the_formula(rules, send):
    got = jax.jit(fb.grad(loss, rules=rules()))(W, x, y)
    chex.assert_trees_all_close(got, by_hand(send), rtol=1e-5, atol=1e-6)
    each = jax.vmap(lambda s: fb.grad(loss, rules=rules())(W, s * x, y))(jnp.array([1.0, 2.0]))
    chex.assert_trees_all_close(jax.tree.map(lambda g: g[0], each), got, rtol=1e-5, atol=1e-6)


def test_its_own_weights_are_backpropagation_to_the_bit():
    got = fb.grad(loss, rules=fb.credit.feedback_alignment(W))(W, x, y)
    chex.assert_trees_all_equal(got, fb.grad(loss)(W, x, y))


def test_twins_go_through_what_the_function_does_with_parameters():
    """Transposed, cast, cut from a stack, scanned over: so are the twins."""

    def deep(p, x):
        def layer(h, w):
            return jnp.tanh(h @ w.T), None

        h, _ = jax.lax.scan(jax.checkpoint(layer), x, p["layers"])
        return jnp.sum(h @ (2 * p["out"]).astype(jnp.float32))

    p = {"layers": jax.random.normal(jax.random.key(0), (3, 4, 4)), "out": jnp.ones((4, 2))}
    twin = jax.tree.map(lambda w: -w, p)
    h = jnp.arange(4.0)
    got = fb.grad(deep, rules=fb.credit.feedback_alignment(twin))(p, h)
    true = fb.grad(deep)(p, h)
    np.testing.assert_allclose(got["out"], true["out"], rtol=1e-6)
    signs = jnp.array([-1.0, 1.0, -1.0])[:, None, None]
    np.testing.assert_allclose(got["layers"], signs * true["layers"], rtol=1e-6)


def test_convolutions_send_back_through_their_twin():
    def f(p, image):
        for k in ("a", "b"):
            image = jax.lax.conv_general_dilated(image, p[k], (1, 1), "SAME")
        return jnp.sum(image**2)

    p = {k: jax.random.normal(jax.random.key(i), (2, 2, 3, 3)) for i, k in enumerate("ab")}
    image = jax.random.normal(jax.random.key(5), (1, 2, 6, 6))
    twin = {"a": p["a"], "b": 3 * p["b"]}
    got = fb.grad(f, rules=fb.credit.feedback_alignment(twin))(p, image)
    true = fb.grad(f)(p, image)
    np.testing.assert_allclose(got["a"], 3 * true["a"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got["b"], true["b"], rtol=1e-6)


@pytest.mark.parametrize("kind", ["feedback_alignment", "sign_symmetric"])
def test_convolutions_in_a_sweep(kind):
    def draw(seed, *shape):
        return jax.random.normal(jax.random.key(seed), shape)

    def model(p, image):
        for kernel in (p["a"], p["b"]):
            image = jnp.tanh(jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME"))
        return image

    p, twin = ({"a": draw(s, 2, 1, 3, 3), "b": draw(s + 1, 1, 2, 3, 3)} for s in (0, 2))
    rules = getattr(fb.credit, kind)(twin)
    batch = draw(4, 3, 1, 1, 4, 4), draw(5, 3, 1, 1, 4, 4)

    def loss(p, x, y):
        return fb.losses.squared_error(model(p, x), y)

    sweep = fb.sweep(model, fb.losses.squared_error, rules=rules, g=fb.Gradient())
    each = jax.jit(jax.vmap(fb.grad(loss, rules=rules), (None, 0, 0)))(p, *batch)
    mean = jax.tree.map(lambda g: g.mean(0), each)
    chex.assert_trees_all_close(jax.jit(sweep)(p, batch)["g"], mean, rtol=1e-4, atol=1e-5)


def test_kolen_pollack_brings_feedback_and_weights_together():
    optimizer = optax.sgd(0.05)

    @jax.jit
    def step(w, b, state):
        g = fb.grad(loss, rules=fb.credit.feedback_alignment(b))(w, x, y)
        updates, state = optimizer.update(g, state)
        return *fb.credit.kolen_pollack(w, b, updates, decay=jnp.float32(0.05)), state

    w, b, state = W, B, optimizer.init(W)
    for _ in range(100):
        w, b, state = step(w, b, state)
    far, near = W[-1]["w"] - B[-1]["w"], w[-1]["w"] - b[-1]["w"]
    np.testing.assert_allclose(near, 0.95**100 * far, rtol=1e-2, atol=1e-6)
    with pytest.raises(ValueError, match="decay=1"):
        fb.credit.kolen_pollack(w, b, w, decay=1)


def test_direct_feedback_says_what_does_not_fit():
    direct = fb.credit.direct_feedback_alignment
    with pytest.raises(ValueError, match="is of shape"):
        fb.grad(loss, rules=direct({"tanh": [jnp.ones((5, 2))] * 2}, "output"))(W, x, y)
    with pytest.raises(ValueError, match="feedback for 1 results of 'tanh'"):
        fb.grad(loss, rules=direct({"tanh": jnp.ones((5, 3))}, "output"))(W, x, y)


def test_targets_go_back_through_the_inverse():
    """With an exact inverse the layer's input is asked to be what gives the target."""

    @jax.jit
    def layer(x, w):
        return jnp.sinh(w * x)

    def f(w, x):
        return 0.1 * jnp.sum(layer(jnp.tanh(x), w))

    w = jnp.array([0.5, 2.0])
    inverse = jax.tree_util.Partial(lambda w, h: jnp.arcsinh(h) / w, w)
    rules = fb.credit.target_propagation(inverse, "layer")
    at = jnp.array([0.3, -0.2])
    got_w, got_x = fb.grad(f, (0, 1), rules=rules)(w, at)
    target = jnp.arcsinh(jnp.sinh(w * jnp.tanh(at)) - 0.1) / w
    np.testing.assert_allclose(got_x, (jnp.tanh(at) - target) * (1 - jnp.tanh(at) ** 2), rtol=1e-5)
    np.testing.assert_allclose(got_w, fb.grad(f)(w, at), rtol=1e-6)
