"""The Gauss-Newton family, and the problems on which tests try its members."""

import jax
import jax.numpy as jnp
import pytest

import fbackprop as fb

FAMILY = {
    "gauss_newton": fb.optim.gauss_newton,
    "natural_gradient": fb.optim.natural_gradient,
    "levenberg_marquardt": fb.optim.levenberg_marquardt,
    "hessian_free": fb.optim.hessian_free,
    "kfac": fb.optim.kfac,
    "ekfac": fb.optim.ekfac,
    "diagonal_gauss_newton": fb.optim.diagonal_gauss_newton,
}
MEMBERS = pytest.mark.parametrize("name", FAMILY)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def linear(params, x):
    return x @ params


def perceptron(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]


def perceptron_params():
    return {"w": normal(1, 3, 4), "b": jnp.zeros(4), "v": normal(2, 4, 2) / 2}


def examples(n=16):
    x = normal(3, n, 3)
    return x, jnp.stack([jnp.sin(x[:, 0]), x[:, 1] * x[:, 2]], axis=1)


def one_step(optimizer, model, loss, params, batch, **options):
    step = fb.optim.step(model, loss, optimizer)
    return step(params, optimizer.init(params), batch, **options)
