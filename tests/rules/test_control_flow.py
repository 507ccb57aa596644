"""Calls, branches, loops and custom rules against `jax.vjp`, values and behaviour."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_close, assert_same_vjp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import fbackprop as fb

X = jnp.linspace(0.1, 1.0, 6).reshape(2, 3)
W = jnp.linspace(-0.6, 0.5, 9).reshape(3, 3)


@jax.jit
def called(x):
    return jnp.tanh(x) * jnp.sin(x), x


@jax.custom_vjp
def halves(x, y):
    return x * y, x + y


def _halves_bwd(residuals, cts):
    x, y = residuals
    return 3 * cts[0] * y + cts[1], 5 * cts[0] * x


halves.defvjp(lambda x, y: (halves(x, y), (x, y)), _halves_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def applied(f, x):
    return f(x)


applied.defvjp(lambda f, x: (f(x), x), lambda f, x, ct: (2 * ct * jnp.cos(x),))


@jax.custom_vjp
def tree_in_tree_out(tree):
    return {"sum": tree["a"] + tree["b"][0], "n": 3.0 * tree["a"]}


tree_in_tree_out.defvjp(
    lambda t: (tree_in_tree_out(t), None),
    lambda _, ct: ({"a": ct["sum"] + 3 * ct["n"], "b": (7 * ct["sum"], None)},),
)


@jax.custom_jvp
def softened(x, y):
    return jnp.maximum(x, y)


@softened.defjvp
def _softened_jvp(primals, tangents):
    x, y = primals
    weight = jax.nn.sigmoid(x - y)
    return softened(x, y), weight * tangents[0] + (1 - weight) * tangents[1]


def shifted(x, y):
    ratio = jnp.where(x > y, x - y, 1) / jnp.where(x > y, y, 1)
    return jnp.polyval(jnp.arange(1.0, 4.0), ratio) * y


def branched(x, y):
    return jnp.sum(lax.cond(x[0, 0] > -9, shifted, lambda x, y: x * y, x, y))


@jax.custom_jvp
def by_its_tangents(x, y):
    return branched(x, y)


# In the tangents' program one equation gives values and tangents: of a branch, and of calls in it.
by_its_tangents.defjvp(lambda primals, tangents: jax.jvp(branched, primals, tangents))


def symbolic_zeros(x):
    @jax.custom_vjp
    def f(x, y):
        return x * y, y

    def fwd(x, y):
        return (x.value * y.value, y.value), (x.value, y.value, y.perturbed)

    def bwd(residuals, cts):
        x, y, _ = residuals
        zero = isinstance(cts[1], jax.custom_derivatives.SymbolicZero)
        return cts[0] * y, cts[0] * x if zero else cts[0] * x + cts[1]

    f.defvjp(fwd, bwd, symbolic_zeros=True)
    return f(x, 2 * x)[0]


def rnn(x, reverse=False, unroll=1):
    def step(h, x):
        h = jnp.tanh(x + h @ W)
        return h, (jnp.sin(h), x)

    return lax.scan(step, x[0], x, reverse=reverse, unroll=unroll)


def mixed_carry(x):
    """Integer, inactive and active carries; a constant that is dear to compute in the body."""

    def step(carry, x):
        i, fixed, h = carry
        h = h @ jnp.sin(W) + x * fixed + i
        return (i + 1, fixed, h), (i, h * fixed)

    (_, _, h), (_, ys) = lax.scan(step, (0, jnp.ones(3), x[0]), x)
    return h, ys


def carry_becomes_active(x):
    def step(carry, x):
        a, b = carry
        return (b, jnp.sin(x) + a), None

    return lax.scan(step, (jnp.zeros(3), jnp.ones(3)), x)[0]


def learned_scan(w):
    """The loop constant is what is differentiated, through a cast that is the same every time."""

    def step(h, x):
        return jnp.tanh(h @ jnp.exp(w) + x), None

    return lax.scan(step, X[0], X)[0]


def dropout_like(x):
    def step(key, x):
        key, new = jax.random.split(key)
        return key, x * jax.random.bernoulli(new, 0.5, x.shape)

    return lax.scan(step, jax.random.key(0), x)[1]


POLICIES = jax.checkpoint_policies

FUNCTIONS = {
    "jit": lambda x: called(x)[0] + called(2 * x)[1],
    "jit of jit": lambda x: jax.jit(lambda y: called(y)[0] * jnp.cos(y))(x),
    "jit, one output unused": lambda x: called(x)[0],
    "remat": lambda x: jax.checkpoint(lambda y: jnp.sin(jnp.sin(y) @ W))(x),
    "remat, dots saved": lambda x: jax.checkpoint(
        lambda y: jnp.sin(jnp.sin(y) @ W) ** 2, policy=POLICIES.dots_saveable
    )(x),
    "remat, all saved": lambda x: jax.checkpoint(
        lambda y: jnp.sin(jnp.sin(y) @ W), policy=POLICIES.everything_saveable
    )(x),
    "remat, names saved": lambda x: jax.checkpoint(
        lambda y: jnp.sin(checkpoint_name(jnp.sin(y) @ W, "h")),
        policy=POLICIES.save_only_these_names("h"),
    )(x),
    "remat of scan": lambda x: jax.checkpoint(rnn)(x),
    "cond, taken": lambda x: lax.cond(x[0, 0] > 0, jnp.sin, lambda x: x * 2, x),
    "cond, not taken": lambda x: lax.cond(x[0, 0] < 0, jnp.sin, lambda x: x * 2, x),
    "cond, one constant branch": lambda x: lax.cond(x[0, 0] < 0, jnp.zeros_like, jnp.exp, x),
    "switch": lambda x: lax.switch(
        1, [jnp.sin, lambda x: jnp.exp(x) * jnp.tanh(x @ W), lambda x: 0 * x], x
    ),
    "cond, with masks and keys kept": lambda x: lax.cond(
        x[0, 0] > 0,
        lambda x: jnp.where(jnp.cumsum(x) > 1, jnp.exp(x).ravel(), 2.0),
        lambda x: jax.random.normal(jax.random.key(3), (6,)) * jax.nn.relu(jnp.sin(x).ravel()),
        x,
    ),
    "switch, clamped index": lambda x: lax.switch(7, [jnp.sin, jnp.cos], x),
    "scan": rnn,
    "scan, reverse": functools.partial(rnn, reverse=True),
    "scan, unrolled": functools.partial(rnn, unroll=2),
    "scan, mixed carry": mixed_carry,
    "scan, activity goes round": carry_becomes_active,
    "scan, constant": lambda x: learned_scan(jnp.tile(x[0], (3, 1))),
    "scan, no carry": lambda x: lax.scan(lambda _, y: (None, jnp.sin(y)), None, x)[1],
    "scan, length zero": lambda x: lax.scan(lambda c, y: (c + y, c * y), x[0], x[:0]),
    "scan, length zero, carry reset": lambda x: lax.scan(
        lambda c, _: (jnp.zeros_like(c), None), x, None, length=0
    )[0],
    "scan of scan": lambda x: lax.scan(lambda c, y: (rnn(x * c[0])[0] + y, None), x[0], x)[0],
    "scan with keys": dropout_like,
    "scan of cond": lambda x: lax.scan(
        lambda c, y: (lax.cond(y[0] > 0.5, jnp.sin, lambda c: c * c, c + y), c), x[0], x
    ),
    "fori_loop": lambda x: lax.fori_loop(0, 3, lambda i, c: jnp.sin(c) * x + i, x),
    "map": lambda x: lax.map(lambda row: jnp.outer(row, jnp.sin(row)), x),
    "associative_scan": lambda x: lax.associative_scan(jnp.multiply, x, axis=1),
    "while, nothing active": lambda x: x * lax.while_loop(lambda i: i < 5.0, lambda i: i * 2, 1.0),
    "custom_vjp": lambda x: halves(x, jnp.sin(x)),
    "custom_vjp, one output": lambda x: halves(x, jnp.sin(x))[0],
    "custom_vjp, function argument": lambda x: applied(jnp.exp, x),
    "custom_vjp, trees": lambda x: tree_in_tree_out({"a": x, "b": (x**2, 1)}),
    "custom_vjp, symbolic zeros": symbolic_zeros,
    "custom_jvp": lambda x: softened(x, jnp.cos(x)),
    "custom_jvp, one active": lambda x: softened(x, jnp.ones_like(x)),
    "custom_jvp in jit": lambda x: jax.jit(lambda y: jax.nn.relu(y - 0.5) * jax.nn.silu(y))(x),
    "custom_jvp in scan": lambda x: lax.scan(lambda c, y: (jax.nn.relu(c - y), c), x[0], x),
    "custom_jvp of a branch": lambda x: by_its_tangents(x, jnp.cos(x)),
    "custom_jvp in vmap": lambda x: jax.vmap(softened)(x, jnp.cos(x)),
    "logsumexp": lambda x: jax.nn.logsumexp(x, axis=1),
    "linear function": lambda x: jax.linearize(jnp.sin, x)[1](x),
    "inner gradient": lambda x: fb.grad(lambda y: jnp.sum(jnp.sin(y) ** 3))(x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_against_jax(name):
    assert_same_vjp(FUNCTIONS[name], X, scale=2)


SECOND_ORDER = [n for n in FUNCTIONS if n not in ("custom_vjp, symbolic zeros",)]


@pytest.mark.slow
@pytest.mark.parametrize("name", SECOND_ORDER)
def test_second_order(name):
    f = FUNCTIONS[name]

    def penalty(gradient):
        def total(x):
            return sum(
                jnp.sum(y**2) for y in jax.tree.leaves(f(x)) if jnp.issubdtype(y.dtype, jnp.inexact)
            )

        return lambda x: jnp.sum(jnp.sin(gradient(total)(x)))

    theirs = jax.jit(jax.grad(penalty(jax.grad)))(X)
    assert_close(jax.jit(fb.grad(penalty(fb.grad)))(X), theirs, scale=100)
    if "custom_vjp" not in name:
        ours, theirs = (
            jax.jit(lambda x, grad=grad: jax.jvp(penalty(grad), (x,), (x,)))(X)
            for grad in (fb.grad, jax.grad)
        )
        assert_close(ours, theirs, scale=100)


@pytest.mark.parametrize("name", ["scan", "cond, taken", "jit", "remat", "custom_jvp in scan"])
def test_under_vmap(name):
    f = FUNCTIONS[name]
    total = lambda x: sum(jnp.sum(y) for y in jax.tree.leaves(f(x)))  # noqa: E731
    batch = jnp.stack([X, 2 * X, -X])
    ours, theirs = (jax.jit(jax.vmap(grad(total)))(batch) for grad in (fb.grad, jax.grad))
    assert_close(ours, theirs, scale=5)


def cube_root(a):
    """By Newton's method, differentiated by the implicit function theorem."""

    def solve(f, y):
        return lax.fori_loop(0, 30, lambda _, y: y - f(y) / (3 * y**2), y)

    def tangent_solve(g, y):
        return y / g(jnp.ones(()))

    return lax.custom_root(lambda y: y**3 - a, jnp.ones(()), solve, tangent_solve)


# Newer releases of JAX make these of primitives that are classes with rules of their own.
CLASSES = {
    "custom_root": lambda x: jnp.sum(jax.vmap(cube_root)(x[0] + 1) ** 2),
    "ldexp": lambda x: jnp.sum(jnp.ldexp(jnp.sin(x), jnp.arange(3)[None]) ** 2),
    "frexp": lambda x: jnp.sum(jnp.frexp(x)[0] ** 3),
}


@pytest.mark.parametrize("name", CLASSES)
def test_primitives_that_are_classes(name):
    f = CLASSES[name]
    for jit in (lambda g: g, jax.jit):
        assert_close(jit(fb.grad(f, strict=True))(X), jit(jax.grad(f))(X), scale=5)

    def twice(lib):
        return lib.grad(lambda x: jnp.sum(lib.grad(f)(x) ** 2))(X)

    assert_close(twice(fb), twice(jax), scale=50)


def test_while_in_reverse_is_an_error():
    def f(x):
        return jnp.sum(lax.while_loop(lambda c: c[0, 0] < 3, lambda c: c * 2, x))

    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work") as info:
        fb.grad(f)(X)
    assert "test_control_flow.py" in str(info.value)
    # Where no derivative is asked for, it runs.
    assert float(fb.grad(lambda x: jnp.sum(x) + 0 * lax.stop_gradient(f(x)))(X)[0, 0]) == 1.0


def test_scan_keeps_what_is_dear_and_not_what_is_cheap():
    """An LSTM-like body keeps its nonlinearities' results, not the sums that lead to them."""
    from fbackprop.program import program_of
    from fbackprop.reverse import DEFAULT
    from fbackprop.rules.loops import _split

    def step(c, x):
        i, f = jax.nn.sigmoid(x), jax.nn.sigmoid(2 * x + c)
        c = f * c + i * jnp.tanh(x)
        return c, c

    closed = jax.make_jaxpr(lambda x: lax.scan(step, x[0], x))(X)
    scan = next(e for e in closed.jaxpr.eqns if e.primitive.name == "scan")
    split = _split(program_of(scan.params["jaxpr"]), DEFAULT, (True, True), 0, 1)
    # σ(x), σ(2x + c), tanh(x) and the carry: four arrays of a row; x is there anyway.
    assert len(split.extras) == 4


def test_effects_run_once():
    seen = []

    def f(x):
        jax.debug.callback(lambda v: seen.append(float(v)), x[0, 0])
        return jnp.sum(jnp.sin(x))

    for g in (f, jax.jit(f), jax.checkpoint(f)):
        seen.clear()
        fb.grad(g)(X)
        jax.effects_barrier()
        assert seen == [pytest.approx(0.1)], g


def test_dtypes_follow_primals():
    f = lambda x: jnp.sum(lax.scan(lambda c, y: (c * y, c), x[0], x)[1])  # noqa: E731
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        assert fb.grad(f)(X.astype(dtype)).dtype == dtype
    with jax.enable_x64(True):
        assert fb.grad(f)(np.asarray(X, np.float64)).dtype == jnp.float64


@pytest.mark.parametrize("loop", ["scan", "cond"])
def test_checkpoint_policy_reaches_into_loops_and_branches(loop):
    """Products that the policy saves run once, though a loop or a branch holds them."""

    def body(carry, _):
        return jnp.tanh(jnp.sin(carry @ W) @ W.T) + carry, None

    def f(x):
        if loop == "scan":
            return lax.scan(body, x, length=3)[0]
        return lax.cond(x[0, 0] > 0, lambda x: body(x, None)[0], lambda x: x, x)

    for policy, products in ((POLICIES.dots_saveable, 4), (POLICIES.nothing_saveable, 6)):
        loss = lambda x, p=policy: jnp.sum(jax.checkpoint(f, policy=p)(x))  # noqa: E731
        assert str(jax.make_jaxpr(fb.grad(loss))(X)).count("dot_general") == products
        assert_close(fb.grad(loss)(X), jax.grad(loss)(X), scale=5)


def test_checkpoint_policy_reaches_into_calls():
    """What a policy saves is saved, in the jit-ted `jnp.einsum` too: no product is run again."""

    def f(x):
        body = lambda y: jnp.sin(jnp.einsum("ij,jk->ik", jnp.sin(y), W))  # noqa: E731
        return jnp.sum(jax.checkpoint(body, policy=POLICIES.dots_saveable)(x))

    def products(gradient):
        return str(jax.make_jaxpr(gradient)(X)).count("dot_general")

    assert products(fb.grad(f)) == products(jax.grad(f))
    assert_close(fb.grad(f)(X), jax.grad(f)(X))
