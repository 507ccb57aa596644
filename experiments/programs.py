"""The programs that the benchmark differentiates: a loss of parameters and data each.

Every program is built from scratch by a function of a random key, to parameters, data and a loss.
Programs with an inner gradient take it from the library under test, so that the comparison is of
one reverse mode throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fbackprop import losses, networks


class Program(NamedTuple):
    """A differentiable program at the size that the benchmark runs it.

    Attributes:
      loss: ``loss(params, data, grad) -> scalar``; `grad` is the library's, for inner gradients.
      params: what is differentiated, a pytree.
      data: what is not.
    """

    loss: Callable[[Any, Any, Callable], jax.Array]
    params: Any
    data: Any


PROGRAMS: dict[str, Callable[[jax.Array], Program]] = {}


def program(build: Callable[[jax.Array], Program]) -> Callable[[jax.Array], Program]:
    """Enter a program into the suite under its name."""
    PROGRAMS[build.__name__.strip("_").replace("_", "-")] = build
    return build


def supervised(network, key, inputs, labels) -> Program:
    """Mean softmax cross-entropy of a network over a batch."""

    def loss(params, data, grad):
        per_example = jax.vmap(
            lambda x, y: losses.softmax_cross_entropy(network.apply(params, x), y)
        )
        return jnp.mean(per_example(*data))

    return Program(loss, network.init(key), (inputs, labels))


def labels_of(n: int, classes: int = 10) -> jax.Array:
    return jnp.arange(n) % classes


def dense(key, *shape):
    return jax.random.normal(key, shape) / jnp.sqrt(shape[-2])


# --- networks -------------------------------------------------------------------------------------


@program
def mlp(key):
    """784-512-512-512-10, tanh, batch 128."""
    net = networks.mlp((784, 512, 512, 512, 10))
    return supervised(net, key, jax.random.normal(key, (128, 784)), labels_of(128))


@program
def convnet(key):
    """Two convolutions with pooling on 28x28 images, batch 64."""
    net = networks.convnet((28, 28), 10)
    return supervised(net, key, jax.random.normal(key, (64, 28, 28)), labels_of(64))


@program
def resnet(key):
    """Residual blocks with group normalisation on 28x28 images, batch 16."""
    net = networks.resnet((28, 28), 10)
    return supervised(net, key, jax.random.normal(key, (16, 28, 28)), labels_of(16))


@program
def unet(key):
    """Down by strided and up by transposed convolutions, with skips; batch 8 of 32x32."""
    keys = jax.random.split(key, 5)
    widths = [(1, 16), (16, 32), (32, 16), (32, 16), (16, 1)]
    params = [
        0.1 * jax.random.normal(k, (3, 3, a, b)) for k, (a, b) in zip(keys, widths, strict=True)
    ]
    dims = ("NHWC", "HWIO", "NHWC")

    def loss(params, x, grad):
        def conv(x, w, stride=1):
            return lax.conv_general_dilated(x, w, (stride,) * 2, "SAME", dimension_numbers=dims)

        def up(x, w):
            return lax.conv_transpose(x, w, (2, 2), "SAME", dimension_numbers=dims)

        a = jax.nn.gelu(conv(x, params[0]))
        b = jax.nn.gelu(conv(a, params[1], 2))
        c = jax.nn.gelu(up(b, params[2]))
        d = jax.nn.gelu(conv(jnp.concatenate([a, c], -1), params[3]))
        return jnp.mean((conv(d, params[4]) - x) ** 2)

    return Program(loss, params, jax.random.normal(key, (8, 32, 32, 1)))


@program
def transformer(key):
    """Four unrolled pre-norm layers of width 64 on 16 sequences of 32 tokens."""
    net = networks.transformer(64, 64, length=32, width=64, layers=4)
    tokens = jax.random.randint(key, (16, 32), 0, 64)
    return supervised(net, key, tokens, jnp.roll(tokens, -1, axis=1))


def scanned_transformer(key, remat: bool) -> Program:
    """Eight layers as one scan over stacked parameters."""
    layers, width, heads = 8, 64, 4
    keys = jax.random.split(key, 4)
    params = {
        "qkv": dense(keys[0], layers, width, 3 * width),
        "out": dense(keys[1], layers, width, width),
        "up": dense(keys[2], layers, width, 4 * width),
        "down": dense(keys[3], layers, 4 * width, width),
    }

    def norm(x):
        x = x - jnp.mean(x, -1, keepdims=True)
        return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)

    def layer(x, p):
        n, t, _ = x.shape
        q, k, v = jnp.split(norm(x) @ p["qkv"], 3, axis=-1)
        q, k, v = (h.reshape(n, t, heads, -1) for h in (q, k, v))
        x = x + jax.nn.dot_product_attention(q, k, v).reshape(n, t, width) @ p["out"]
        return x + jax.nn.gelu(norm(x) @ p["up"]) @ p["down"], None

    body = jax.checkpoint(layer) if remat else layer

    def loss(params, x, grad):
        return jnp.mean(lax.scan(body, x, params)[0] ** 2)

    return Program(loss, params, jax.random.normal(key, (8, 32, width)))


@program
def transformer_scanned(key):
    """Eight layers as a scan."""
    return scanned_transformer(key, remat=False)


@program
def transformer_remat(key):
    """Eight layers as a scan of checkpointed layers."""
    return scanned_transformer(key, remat=True)


# --- recurrence ---------------------------------------------------------------------------------


@program
def lstm(key):
    """128 units over 64 steps, batch 32."""
    net = networks.lstm(32, 128, 10)
    return supervised(net, key, jax.random.normal(key, (32, 64, 32)), labels_of(32))


@program
def gru(key):
    """A gated recurrent unit of 128 over 64 steps, batch 32."""
    keys = jax.random.split(key, 3)
    width = 128
    params = {
        "input": dense(keys[0], 32, 3 * width),
        "gates": dense(keys[1], width, 2 * width),
        "candidate": dense(keys[2], width, width),
    }

    def loss(params, xs, grad):
        def step(h, x):
            r, z, n = jnp.split(x @ params["input"], 3, axis=-1)
            hr, hz = jnp.split(h @ params["gates"], 2, axis=-1)
            r, z = jax.nn.sigmoid(r + hr), jax.nn.sigmoid(z + hz)
            n = jnp.tanh(n + (r * h) @ params["candidate"])
            h = (1 - z) * n + z * h
            return h, h

        _, hs = lax.scan(step, jnp.zeros((32, width)), xs)
        return jnp.mean(hs**2)

    return Program(loss, params, jax.random.normal(key, (64, 32, 32)))


@program
def linear_rnn(key):
    """A diagonal linear recurrence by associative scan, 256 steps of 64 channels, batch 8."""
    keys = jax.random.split(key, 2)
    params = {"decay": jax.random.normal(keys[0], (64,)), "in": dense(keys[1], 64, 64)}

    def loss(params, x, grad):
        a = jnp.broadcast_to(jax.nn.sigmoid(params["decay"]), x.shape)

        def combine(left, right):
            return left[0] * right[0], left[1] * right[0] + right[1]

        _, h = lax.associative_scan(combine, (a, x @ params["in"]), axis=1)
        return jnp.mean(jnp.tanh(h) ** 2)

    return Program(loss, params, jax.random.normal(key, (8, 256, 64)))


@program
def neural_ode(key):
    """Runge-Kutta of fourth order, 20 steps of a two-layer vector field, batch 64."""
    keys = jax.random.split(key, 2)
    params = [dense(keys[0], 32, 64), dense(keys[1], 64, 32)]

    def loss(params, x, grad):
        def field(x):
            return jnp.tanh(x @ params[0]) @ params[1]

        def step(x, _):
            h = 0.05
            k1 = field(x)
            k2 = field(x + h / 2 * k1)
            k3 = field(x + h / 2 * k2)
            k4 = field(x + h * k3)
            return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

        return jnp.mean(lax.scan(step, x, None, length=20)[0] ** 2)

    return Program(loss, params, jax.random.normal(key, (64, 32)))


# --- structured and scientific programs ---------------------------------------------------------


@program
def gnn(key):
    """Three rounds of message passing by segment sums, 512 nodes and 4096 edges."""
    keys = jax.random.split(key, 5)
    params = [(dense(k, 64, 64), dense(jax.random.fold_in(k, 1), 64, 64)) for k in keys[:3]]
    edges = jax.random.randint(keys[3], (2, 4096), 0, 512)

    def loss(params, data, grad):
        x, (sources, targets) = data
        for w_message, w_self in params:
            messages = jax.nn.relu(x[sources] @ w_message)
            x = jnp.tanh(x @ w_self + jax.ops.segment_sum(messages, targets, num_segments=512))
        return jnp.mean(x**2)

    return Program(loss, params, (jax.random.normal(keys[4], (512, 64)), edges))


@program
def gp_marginal_likelihood(key):
    """Negative log marginal likelihood of a Gaussian process on 128 points."""
    x = jax.random.uniform(key, (128, 4))
    y = jnp.sin(3 * x.sum(1))
    params = {"log_scale": jnp.zeros(4), "log_noise": jnp.array(-2.0), "log_gain": jnp.array(0.0)}

    def loss(params, data, grad):
        x, y = data
        x = x / jnp.exp(params["log_scale"])
        distance = jnp.sum((x[:, None] - x[None]) ** 2, -1)
        kernel = jnp.exp(params["log_gain"] - distance / 2)
        kernel = kernel + jnp.exp(params["log_noise"]) * jnp.eye(len(y))
        factor = jnp.linalg.cholesky(kernel)
        white = jax.scipy.linalg.solve_triangular(factor, y, lower=True)
        return white @ white / 2 + jnp.sum(jnp.log(jnp.diagonal(factor)))

    return Program(loss, params, (x, y))


@program
def normalising_flow(key):
    """Eight affine coupling layers on 256 points in 16 dimensions."""
    keys = jax.random.split(key, 8)
    params = [(dense(k, 8, 64), 0.1 * dense(jax.random.fold_in(k, 1), 64, 16)) for k in keys]

    def loss(params, x, grad):
        log_det = jnp.zeros(x.shape[0])
        for w_in, w_out in params:
            a, b = jnp.split(x, 2, axis=-1)
            shift, log_scale = jnp.split(jnp.tanh(a @ w_in) @ w_out, 2, axis=-1)
            log_scale = jnp.tanh(log_scale)
            x = jnp.concatenate([b * jnp.exp(log_scale) + shift, a], axis=-1)
            log_det = log_det + jnp.sum(log_scale, -1)
        return jnp.mean(jnp.sum(x**2, -1) / 2 - log_det)

    return Program(loss, params, jax.random.normal(key, (256, 16)))


@program
def sinkhorn(key):
    """Entropic transport between two clouds of 128 points, 30 iterations in the log domain."""
    x, y = jax.random.normal(key, (2, 128, 8))

    def loss(x, y, grad):
        cost = jnp.sum((x[:, None] - y[None]) ** 2, -1)

        def step(potentials, _):
            f, g = potentials
            f = -jax.nn.logsumexp((g[None] - cost), axis=1)
            g = -jax.nn.logsumexp((f[:, None] - cost), axis=0)
            return (f, g), None

        (f, g), _ = lax.scan(step, (jnp.zeros(128), jnp.zeros(128)), None, length=30)
        plan = jnp.exp(f[:, None] + g[None] - cost)
        return jnp.sum(plan * cost)

    return Program(loss, x, y)


@program
def pinn(key):
    """The residual of Burgers' equation, with inner first and second derivatives, 256 points."""
    net = networks.mlp((2, 32, 32, 1))

    def loss(params, points, grad):
        def u(t, x):
            return net.apply(params, jnp.stack([t, x]))[0]

        def residual(t, x):
            u_x = grad(u, 1)
            u_xx = grad(lambda t, x: u_x(t, x), 1)(t, x)
            return grad(u, 0)(t, x) + u(t, x) * u_x(t, x) - 0.01 * u_xx

        return jnp.mean(jax.vmap(residual)(*points) ** 2)

    return Program(loss, net.init(key), jax.random.uniform(key, (2, 256)))


@program
def maml(key):
    """The loss after three inner gradient steps, on 16 regression tasks."""
    net = networks.mlp((1, 32, 32, 1))

    def mean_error(params, x, y):
        return jnp.mean((jax.vmap(net.apply, (None, 0))(params, x) - y) ** 2)

    def loss(params, tasks, grad):
        def adapted(x, y):
            inner = params
            for _ in range(3):
                slope = grad(mean_error)(inner, x[:8], y[:8])
                inner = jax.tree.map(lambda p, g: p - 0.1 * g, inner, slope)
            return mean_error(inner, x[8:], y[8:])

        return jnp.mean(jax.vmap(adapted)(*tasks))

    x = jax.random.uniform(key, (16, 16, 1))
    return Program(loss, net.init(key), (x, jnp.sin(6 * x)))


def build(name: str, seed: int = 0) -> Program:
    """The program called `name`, its parameters and data drawn from `seed`."""
    return PROGRAMS[name](jax.random.key(seed))
