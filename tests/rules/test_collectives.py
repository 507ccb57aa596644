"""Gradients inside and outside of `shard_map`, on two devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_close, assert_same_vjp, two_devices
from jax import lax
from jax.sharding import PartitionSpec as P

import fbackprop as fb

W = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)
X = jnp.linspace(-1.0, 2.0, 24).reshape(8, 3)


def mapped(f, in_specs, out_specs, check_vma=True):
    mesh = two_devices()
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


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_saveable])
@pytest.mark.parametrize("check_vma", [True, False])
def test_checkpoints_of_what_varies_and_what_does_not(policy, check_vma):
    def f(w, x):
        return jax.checkpoint(lambda w, x: jnp.sin(x @ w), policy=policy)(w, x)

    def loss(w, x):
        return jnp.sum(mapped(f, (P(), P("i")), P("i"), check_vma)(w, x) ** 2)

    ours, theirs = (jax.jit(lib.grad(loss, (0, 1)))(W, X) for lib in (fb, jax))
    assert_close(ours, theirs, scale=10)


def test_second_order_outside():
    def penalty(lib):
        def loss(w):
            return jnp.sum(mapped(per_shard, (P(), P("i")), (P("i"), P()))(w, X)[1] ** 2)

        return jax.jit(lib.grad(lambda w: jnp.sum(lib.grad(loss)(w) ** 2)))(W)

    assert_close(penalty(fb), penalty(jax), scale=50)


SQUARE = jnp.sin(jnp.arange(32.0)).reshape(8, 4)
COLLECTIVES = {
    "psum": (lambda x: lax.psum(jnp.sin(x), "i") * x, P("i")),
    "psum, shared result": (lambda x: lax.psum(jnp.sin(x), "i"), P()),
    "pmean": (lambda x: (x - lax.pmean(x, "i")) ** 2, P("i")),
    "pmax of a constant": (lambda x: x * lax.pmax(lax.stop_gradient(x), "i"), P("i")),
    "all_gather": (lambda x: jnp.sin(lax.all_gather(x, "i", tiled=True)) * x[0, 0], P("i")),
    "all_gather, new axis": (lambda x: jnp.sin(lax.all_gather(x, "i", axis=1)).sum(1), P("i")),
    "psum_scatter": (
        lambda x: lax.psum_scatter(x**3, "i", scatter_dimension=1, tiled=True) * x[:, :2],
        P("i"),
    ),
    "ppermute": (lambda x: lax.ppermute(jnp.sin(x), "i", [(0, 1)]) * x, P("i")),
    "all_to_all": (lambda x: lax.all_to_all(jnp.sin(x), "i", 1, 0, tiled=True) ** 2, P("i")),
    "axis_index": (lambda x: x**2 * lax.axis_index("i"), P("i")),
    "in a scan": (
        lambda x: lax.scan(
            lambda c, _: (jnp.sin(lax.ppermute(c, "i", [(0, 1), (1, 0)])) + c, c.sum()),
            x,
            length=3,
        )[0],
        P("i"),
    ),
}


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", COLLECTIVES)
def test_collective(name, check_vma):
    f, spec = COLLECTIVES[name]
    assert_same_vjp(mapped(f, P("i"), spec, check_vma), SQUARE, scale=10)

    def inside(lib):
        gradient = lib.grad(lambda x: jnp.sum(f(x) ** 2))
        return jax.jit(mapped(gradient, P("i"), P("i"), check_vma))(SQUARE)

    assert_close(inside(fb), inside(jax), scale=10)


@pytest.mark.parametrize("name", [n for n in COLLECTIVES if n != "ppermute"])
def test_collective_under_vmap(name):
    f, _ = COLLECTIVES[name]
    stacked = SQUARE.reshape(2, 4, 4)
    assert_same_vjp(jax.vmap(f, axis_name="i"), stacked, scale=10, plainly=False)

    def inside(lib):
        gradient = lib.grad(lambda x: jnp.sum(f(x) ** 2))
        return jax.jit(jax.vmap(gradient, axis_name="i"))(stacked)

    assert_close(inside(fb), inside(jax), scale=10)


def test_gathered_once_for_all():
    """A gather whose result every device shares: each takes its piece of the cotangent."""
    gather = functools.partial(lax.all_gather, axis_name="i", tiled=True, to="invarying")
    f = mapped(lambda x: jnp.sin(gather(x)), P("i"), P())
    assert_same_vjp(f, SQUARE, scale=10)


def test_sharding_constraint():
    mesh = two_devices()
    rows = jax.sharding.NamedSharding(mesh, P("i"))

    def f(x):
        return jnp.sin(lax.with_sharding_constraint(x * 2, rows)) @ W.T

    assert_same_vjp(f, SQUARE)
    sharded = jax.device_put(SQUARE, rows)
    gradient = jax.jit(fb.grad(lambda x: jnp.sum(f(x) ** 2)))(sharded)
    np.testing.assert_allclose(gradient, jax.grad(lambda x: jnp.sum(f(x) ** 2))(SQUARE), rtol=1e-5)
    assert gradient.sharding.is_equivalent_to(rows, 2)


def test_shardings_of_a_call():
    """What a jit-ted function says of where its arguments lie holds in its forward half."""
    mesh = two_devices()
    rows = jax.sharding.NamedSharding(mesh, P("i"))
    whole = jax.sharding.NamedSharding(mesh, P())

    @functools.partial(jax.jit, in_shardings=(whole, rows), out_shardings=rows)
    def layer(w, x):
        return jnp.tanh(jnp.sin(x[:, :3]) @ w)

    def loss(w):
        return jnp.sum(layer(w, SQUARE) ** 2)

    assert_close(fb.grad(loss)(W), jax.grad(loss)(W), scale=5)
    jaxpr = jax.make_jaxpr(fb.grad(loss))(W)
    (forward,) = [e for e in jaxpr.jaxpr.eqns if e.params.get("name") == "layer"]
    assert forward.params["in_shardings"] == (whole, rows)
    assert forward.params["out_shardings"][0] == rows
