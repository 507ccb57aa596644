"""Rules that pass, smooth, clip, round and disturb an error signal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import fbackprop as fb

X = jnp.array([-2.4, -0.3, 0.6, 1.7])


def named(x):
    return jnp.sum(checkpoint_name(2 * x, "h") ** 2)  # δ_h = 4x


@pytest.mark.parametrize("step", [jnp.round, jnp.sign])
def test_straight_through_a_step(step):
    def f(x):
        return jnp.sum(step(x) * jnp.arange(4.0))

    np.testing.assert_array_equal(fb.grad(f)(X), jnp.zeros(4))
    np.testing.assert_array_equal(
        fb.grad(f, rules=fb.credit.straight_through())(X), jnp.arange(4.0)
    )
    got = fb.grad(f, rules=fb.credit.straight_through(step.__name__, within=1))(X)
    np.testing.assert_array_equal(got, jnp.array([0.0, 1.0, 2.0, 0.0]))


def test_straight_through_a_function_of_ones_own():
    def quantise(x):
        return jnp.floor(x * 4) / 4

    got = fb.grad(lambda x: jnp.sum(quantise(x) ** 2), rules=fb.credit.straight_through("quantise"))
    np.testing.assert_allclose(got(X), 2 * quantise(X))


@jax.jit
def spike(v):
    return (v > 0).astype(v.dtype)


@pytest.mark.parametrize("kind", fb.credit.signals.SURROGATES)
def test_a_surrogate_is_the_derivative_of_a_smooth_step(kind):
    def run(v):
        h = fb.grad(lambda v: spike(v), rules=fb.credit.surrogate("spike", kind, slope=3.0))
        return h(v)

    peak = {"fast_sigmoid": 1, "sigmoid": 0.25, "triangle": 1, "gaussian": (2 * np.pi) ** -0.5}
    np.testing.assert_allclose(run(0.0), peak[kind], rtol=1e-6)
    # Densities of area 1 (2 for the fast sigmoid), made three times narrower by the slope.
    at = jnp.linspace(-400.0, 400.0, 400_001)
    area = jnp.trapezoid(jax.vmap(run)(at), at)
    np.testing.assert_allclose(area, (2 if kind == "fast_sigmoid" else 1) / 3, rtol=5e-3)
    with pytest.raises(ValueError, match="kind='step'"):
        fb.credit.surrogate("spike", "step")


def test_surrogates_train_a_spiking_neuron_through_time():
    """A leaky neuron whose weight gets a gradient through its spikes, in a loop."""

    def rate(w, current):
        def step(v, i):
            v = 0.9 * v + w * i
            s = spike(v - 1)
            return v - s, s

        return jnp.mean(lax.scan(step, 0.0, current)[1])

    current = jnp.full(40, 0.3)
    rules = fb.credit.surrogate("spike", slope=2.0)
    assert fb.grad(rate)(0.1, current) == 0

    @jax.jit
    def descend(w, _):
        g = fb.grad(lambda w: (rate(w, current) - 0.5) ** 2, rules=rules)(w)
        return w - 0.5 * g, None

    w, _ = lax.scan(descend, 0.1, None, length=300)
    assert rate(0.1, current) == 0 and abs(rate(w, current) - 0.5) < 0.06


def test_clipping_a_named_signal():
    full = fb.grad(named)(X)
    norm = jnp.linalg.norm(full / 2)
    got = fb.grad(named, rules=fb.credit.clipped("h", max_norm=1.0))(X)
    np.testing.assert_allclose(got, full / norm, rtol=1e-6)
    same = fb.grad(named, rules=fb.credit.clipped("h", max_norm=100.0))(X)
    np.testing.assert_array_equal(same, full)
    with pytest.raises(ValueError, match="max_norm=0"):
        fb.credit.clipped("h", max_norm=0)
    with pytest.raises(ValueError, match="one number"):
        fb.credit.clipped("h", max_norm=jnp.ones(3))


@pytest.mark.parametrize("size", [1e-30, 1e20, 1e38])
def test_signals_whose_squares_leave_the_range_are_clipped(size):
    def f(x, most):
        rules = fb.credit.clipped("h", max_norm=most)
        return fb.grad(lambda x: jnp.sum(checkpoint_name(x, "h") * size), rules=rules)(x)

    most = jnp.float32(min(size, 1.0))
    got = jax.jit(f)(jnp.ones(4), most)  # the norm may be traced
    np.testing.assert_allclose(got / most, jnp.full(4, 0.5), rtol=1e-5)


def test_signals_to_change_must_be_named():
    for make in (
        lambda: fb.credit.clipped(max_norm=1.0),
        lambda: fb.credit.noisy(key=jax.random.key(0), stddev=1.0),
    ):
        with pytest.raises(ValueError, match="changes nothing: give the names"):
            make()


def test_noise_on_a_named_signal():
    full = fb.grad(named)(X)

    @jax.jit
    @jax.vmap
    def sample(key):
        return fb.grad(named, rules=fb.credit.noisy("h", key=key, stddev=0.5))(X)

    got = sample(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_allclose(got.mean(0), full, atol=5 * 1.0 / 4000**0.5)
    np.testing.assert_allclose(got.std(0), jnp.ones(4), rtol=0.06)  # 2 · 0.5


def test_quantised_signals_are_right_in_the_mean_and_on_the_grid():
    @jax.jit
    @jax.vmap
    def sample(key):
        return fb.grad(named, rules=fb.credit.quantised("h", key=key, bits=4))(X)

    full = fb.grad(named)(X)
    got = sample(jax.random.split(jax.random.key(0), 4000))
    step = jnp.max(jnp.abs(full)) / 7
    np.testing.assert_allclose(got / step, jnp.round(got / step), atol=1e-4)
    np.testing.assert_allclose(got.mean(0), full, atol=5 * float(step) / 2 / 4000**0.5)
    assert jnp.all(jnp.abs(got - full[None]) <= step * 1.0001)
    zero = fb.grad(lambda x: 0 * named(x), rules=fb.credit.quantised("h", key=jax.random.key(0)))(X)
    np.testing.assert_array_equal(zero, jnp.zeros(4))
    with pytest.raises(ValueError, match="bits=1"):
        fb.credit.quantised(key=jax.random.key(0), bits=1)


@pytest.mark.parametrize(("dtype", "bits"), [(jnp.float16, 8), (jnp.bfloat16, 5)])
def test_narrow_signals_are_right_in_the_mean(dtype, bits):
    full = jnp.array([0.3, 0.7, -0.21, 0.013], dtype)

    def sample(key):
        rules = fb.credit.quantised("h", key=key, bits=bits)
        return fb.grad(lambda h: jnp.sum(checkpoint_name(h, "h") * full), rules=rules)(0 * full)

    got = jax.jit(jax.vmap(sample))(jax.random.split(jax.random.key(0), 10000))
    bias = jnp.abs(got.astype(jnp.float32).mean(0) - full.astype(jnp.float32))
    step = 0.7 / (2 ** (bits - 1) - 1)
    assert jnp.all(bias < 0.02 * step)  # 0.005 is the standard error


def test_products_round_independently_in_loops():
    """A key is folded with the signal, so iterations do not share their noise."""

    def f(w, x):
        h, _ = lax.scan(lambda h, _: (jnp.tanh(w @ h), None), x, None, length=5)
        return jnp.sum(h**2)

    w, x = jnp.eye(4) * 1.1, X
    rules = fb.credit.quantised(key=jax.random.key(3), bits=6)
    got, full = fb.grad(f, rules=rules)(w, x), fb.grad(f)(w, x)
    assert 0 < jnp.linalg.norm(got - full) / jnp.linalg.norm(full) < 0.2
