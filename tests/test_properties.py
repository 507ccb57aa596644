"""Random programs, nested control flow and kinks included, against `jax.grad`; and linearity.

A program is a list of instructions over a growing list of (2, 3) arrays; instructions that call,
loop or branch hold programs of their own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import fbackprop as fb

SHAPE = (2, 3)
W = jnp.linspace(-0.5, 0.7, 9).reshape(3, 3)

UNARY = {
    "neg": jnp.negative,
    "sin": jnp.sin,
    "tanh": jnp.tanh,
    "exp": lambda x: jnp.exp(jnp.clip(x, -3.0, 3.0)),
    "log1p": lambda x: jnp.log1p(jnp.abs(x)),
    "sqrt": lambda x: jnp.sqrt(jnp.abs(x)),
    "abs": jnp.abs,
    "square": jnp.square,
    "cube": lambda x: x**3,
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "softmax": lambda x: jax.nn.softmax(x, axis=-1),
    "clip": lambda x: jnp.clip(x, -0.5, 1.0),
    "round": jnp.round,
    "stop": lax.stop_gradient,
    "sum": lambda x: jnp.broadcast_to(jnp.sum(x, axis=0, keepdims=True), SHAPE),
    "max": lambda x: x - jnp.max(x, axis=1, keepdims=True),
    "min": lambda x: jnp.min(x) + x,
    "prod": lambda x: x * jnp.prod(x, axis=0, keepdims=True),
    "cumsum": lambda x: jnp.cumsum(x, axis=1),
    "sort": lambda x: jnp.sort(x, axis=1),
    "flip": lambda x: x[:, ::-1],
    "roll": lambda x: jnp.roll(x, 1, axis=1),
    "transpose": lambda x: x.T.reshape(SHAPE),
    "gather": lambda x: x[jnp.array([1, 1])][:, jnp.array([0, 2, 0])],
    "scatter": lambda x: x.at[0, 1].set(x[1, 2]).at[:, 0].add(x[:, 1]),
    "matmul": lambda x: x @ W,
    "pad": lambda x: jnp.pad(x, ((1, 0), (0, 1)))[:2, 1:],
    "half": lambda x: x.astype(jnp.bfloat16).astype(x.dtype),
}
BINARY = {
    "add": jnp.add,
    "sub": jnp.subtract,
    "mul": jnp.multiply,
    "div": lambda a, b: a / (1.0 + b * b),
    "maximum": jnp.maximum,
    "minimum": jnp.minimum,
    "where": lambda a, b: jnp.where(a > b, a, 2 * b),
    "outer": lambda a, b: (a @ b.T) @ b,
    "atan2": lambda a, b: jnp.arctan2(a, 1.0 + b * b),
    "row": lambda a, b: a * b[:1],
}
NESTED = ("jit", "checkpoint", "scan", "reverse scan", "cond", "vmap", "fori")


def run_nested(kind, body, values):
    """Apply a sub-program, a function of one array, inside a construct of control flow."""
    x, y = values[-1], values[0]
    if kind == "jit":
        return jax.jit(body)(x)
    if kind == "checkpoint":
        return jax.checkpoint(body)(x)
    if kind in ("scan", "reverse scan"):
        last, ys = lax.scan(
            lambda c, row: (jnp.tanh(body(c) + row[None]), c * row[None]),
            x,
            y,
            reverse=kind != "scan",
        )
        return last + jnp.sum(ys, axis=0)
    if kind == "cond":
        return lax.cond(jnp.sum(x) > 0, body, lambda x: x * 0.5, x)
    if kind == "vmap":
        return jax.vmap(lambda row: body(jnp.stack([row, row]))[0])(x)
    return lax.fori_loop(0, 2, lambda i, c: jnp.sin(body(c)) + i, x)


def run(program, x):
    values = [x]
    for name, i, j, inner in program:
        a, b = values[i % len(values)], values[j % len(values)]
        if inner is not None:
            values.append(run_nested(name, lambda x, inner=inner: run(inner, x), [b, a]))
        else:
            values.append(UNARY[name](a) if name in UNARY else BINARY[name](a, b))
    return values[-1]


def instructions(depth):
    index = st.integers(0, 5)
    plain = st.tuples(st.sampled_from(sorted(UNARY) + 2 * sorted(BINARY)), index, index, st.none())
    if depth == 0:
        return st.lists(plain, min_size=1, max_size=4)
    nested = st.tuples(st.sampled_from(NESTED), index, index, instructions(depth - 1))
    return st.lists(st.one_of(plain, plain, nested), min_size=1, max_size=4)


# Ties, zeros and the places where clip and relu turn; and ordinary values.
NUMBERS = st.sampled_from([0.0, 1.0, -1.0, 0.5, -0.5, 0.3, -1.7, 2.0])
POINTS = st.lists(NUMBERS, min_size=6, max_size=6).map(
    lambda v: jnp.array(v, jnp.float32).reshape(SHAPE)
)


def agree(program, x):
    def loss(x):
        return jnp.sum(run(program, x) * jnp.linspace(0.5, 1.5, 6).reshape(SHAPE))

    value, gradient = fb.value_and_grad(loss, strict=True)(x)
    expected, theirs = jax.value_and_grad(loss)(x)
    assert_close(value, expected, scale=20)
    assert_close(gradient, theirs, scale=50)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(instructions(1), POINTS)
def test_random_programs(program, x):
    agree(program, x)


@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True)
@given(instructions(2), POINTS)
def test_random_nested_programs(program, x):
    agree(program, x)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(instructions(1), POINTS)
def test_pullback_is_linear(program, x):
    value, pullback = fb.vjp(lambda x: run(program, x), x)
    u, v = jnp.sin(value) + 1, jnp.cos(value)
    left = pullback(2 * u - 3 * v)[0]
    right = 2 * pullback(u)[0] - 3 * pullback(v)[0]
    if bool(jnp.all(jnp.isfinite(left))):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4 * float(jnp.max(abs(left))))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(instructions(1), POINTS, POINTS)
def test_pullback_is_the_transpose_of_the_pushforward(program, x, t):
    """⟨v, J t⟩ = ⟨Jᵀ v, t⟩, with J t from forward mode."""
    f = lambda x: run(program, x)  # noqa: E731
    value, pushed = jax.jvp(f, (x,), (t,))
    v = jnp.sin(value) + 0.5
    left, right = jnp.vdot(v, pushed), jnp.vdot(fb.vjp(f, x)[1](v)[0], t)
    if np.isfinite(float(left)):
        scale = float(jnp.sum(jnp.abs(v * pushed))) + 1.0
        assert abs(float(left) - float(right)) < 1e-4 * scale
