"""The cross-check: what its report says, and that it finds wrong gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fbackprop as fb


@jax.custom_vjp
def wrong(x):
    return jnp.sin(x)


# Both reverse modes must believe a user's rule, so only differences can find the mistake.
wrong.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (ct * jnp.cos(x) * 1.1,))


def loss(params, x, n):
    return jnp.sum(jnp.tanh(x @ params["w"]) ** n) + params["b"]


ARGS = ({"b": jnp.float32(0.5), "w": jnp.linspace(-1, 1, 6).reshape(3, 2)}, jnp.ones((2, 3)), 2)


def test_report_has_a_row_per_floating_leaf():
    report = fb.check_grads(loss, *ARGS)
    assert [r.path for r in report.rows] == ["[0]['b']", "[0]['w']", "[1]"]
    assert [r.shape for r in report.rows] == [(), (3, 2), (2, 3)]
    assert report.ok and all(r.max_rel_error <= 1e-5 and r.fd_rel_error < 1e-3 for r in report.rows)
    lines = str(report).splitlines()
    assert len(lines) == 4 and "[0]['w']" in lines[2] and lines[2].endswith("ok")
    fb.assert_grads_match(loss, *ARGS)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_dtypes(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        report = fb.check_grads(lambda x: jnp.sum(jnp.exp(x) * x), jnp.arange(3).astype(dtype))
    assert report.ok and report.rows[0].dtype == jnp.dtype(dtype).name


def test_several_outputs_and_complex_arguments():
    z = jnp.array([1.0 + 2.0j, -0.5 + 1.0j])
    assert fb.check_grads(lambda z: {"a": z * z, "b": jnp.abs(z)}, z).ok


def test_finds_a_wrong_rule():
    report = fb.check_grads(lambda x: jnp.sum(wrong(x)), jnp.ones(3))
    assert not report.ok and report.rows[0].max_abs_error == 0.0
    assert report.rows[0].fd_rel_error == pytest.approx(0.1 / 1.1, rel=1e-2)
    with pytest.raises(AssertionError, match="DIFFERS"):
        fb.assert_grads_match(lambda x: jnp.sum(wrong(x)), jnp.ones(3))


def test_nothing_to_check():
    with pytest.raises(ValueError, match="floating-point argument"):
        fb.check_grads(lambda n: n, 3)
    for samples in (-1, 2.5, 0):
        with pytest.raises(ValueError, match="whole number of coordinates"):
            fb.check_grads(jnp.sin, 3.0, samples=samples)


def test_differences_are_left_out_where_the_function_is_another():
    """Random numbers of the default dtype, and computations in less than double precision."""
    key, w = jax.random.key(0), jnp.sin(jnp.arange(12.0)).reshape(3, 4)

    def dropout(w):
        h = jnp.tanh(w)
        return jnp.sum(jnp.where(jax.random.bernoulli(key, 0.5, h.shape), h, 0.0) ** 2)

    def cast(w):
        return jnp.sum(jnp.tanh(w).astype(jnp.float32) ** 2)

    def inside(w):
        return lax.scan(lambda c, x: (jnp.tanh(c + x.astype(jnp.bfloat16)), None), w[0], w)[0].sum()

    for f in (dropout, cast, inside):
        (row,) = fb.check_grads(f, w).rows
        assert row.ok and np.isnan(row.fd_rel_error)
    (row,) = fb.check_grads(lambda w: jnp.sum(jnp.tanh(w @ jnp.tanh(w.T))), w).rows
    assert row.ok and row.fd_rel_error < 1e-3


def test_functions_that_look_at_values():
    assert fb.check_grads(lambda x: x**2 if x > 0 else -x, 3.0).ok
    assert fb.check_grads(lambda x, i: [2 * x, x**2][i], 3.0, np.array(1)).ok
    assert fb.check_grads(lambda x, i: x * np.asarray(i), 3.0, jnp.array(2)).ok
    assert not fb.check_grads(wrong_where_positive, 3.0).ok
    x = jnp.array([0.3, 1.2, -0.4])
    assert fb.check_grads(lambda x: jnp.sum(x[x > 0] ** 2), x).ok
    assert fb.check_grads(lambda x: x**2 if f"{lax.stop_gradient(x[0]):.1f}" else 0 * x, x).ok
    assert fb.check_grads(squared, x).ok
    with pytest.raises(TypeError, match="incompatible shapes"):  # what is wrong either way
        fb.check_grads(lambda x: x + jnp.ones(2), x)


@jax.custom_vjp
def squared(x):
    """Of its halves the backward one alone looks at values."""
    return x**2


squared.defvjp(lambda x: (x**2, x), lambda x, ct: (2 * x * ct if x[0] > -9 else ct,))


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda _, ct: (3 * ct,))


def wrong_where_positive(x):
    return doubled(x) if x > 0 else x
