"""Gradients inside and outside of `shard_map`, on two devices."""

import jax
import jax.numpy as jnp
import pytest
from agreement import assert_close
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import fbackprop as fb

W = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)
X = jnp.linspace(-1.0, 2.0, 24).reshape(8, 3)


def mapped(f, in_specs, out_specs, check_vma=True):
    mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,))
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)


def per_shard(w, x):
    return jnp.tanh(x @ w) ** 2, lax.psum(jnp.sum(jnp.sin(x @ w), 0), "i")


def looped(w, x):
    start = lax.pcast(jnp.zeros(4), "i", to="varying")
    last, ys = lax.scan(lambda c, row: (jnp.tanh(row @ w + c), c), start, x)
    return ys, lax.pmean(jax.nn.relu(last), "i")


@pytest.mark.parametrize(
    ("f", "check_vma"), [(per_shard, True), (per_shard, False), (looped, True)]
)
def test_outside(f, check_vma):
    def loss(w, x):
        ys, total = mapped(f, (P(), P("i")), (P("i"), P()), check_vma)(w, x)
        return jnp.sum(ys * jnp.arange(4.0)[None]) + jnp.sum(total**2)

    for argnums in (0, (0, 1)):
        ours, theirs = (jax.jit(lib.grad(loss, argnums))(W, X) for lib in (fb, jax))
        assert_close(ours, theirs, scale=10)


def test_inside():
    def step(grad):
        def inner(w, x):
            return grad(lambda w: jnp.sum(looped(w, x)[1]))(w)

        return jax.jit(mapped(inner, (P(), P("i")), P()))(W, X)

    assert_close(step(fb.grad), step(jax.grad), scale=10)


def test_second_order_outside():
    def penalty(lib):
        def loss(w):
            return jnp.sum(mapped(per_shard, (P(), P("i")), (P("i"), P()))(w, X)[1] ** 2)

        return jax.jit(lib.grad(lambda w: jnp.sum(lib.grad(loss)(w) ** 2)))(W)

    assert_close(penalty(fb), penalty(jax), scale=50)
