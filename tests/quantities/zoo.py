"""Models of one example, small, in every way in which parameters meet data."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from naive import compiled

import fbackprop as fb

N = 4


class Case(NamedTuple):
    """A model, its parameters and a batch of examples."""

    model: Any
    loss: Any
    params: Any
    batch: tuple


def users(model):
    """A model that broadcasts between ranks, as users' models do and the library does not."""

    def broadcasting(*args):
        with jax.numpy_rank_promotion("allow"):
            return model(*args)

    return broadcasting


def normal(key, *shape, scale=None):
    """Normal numbers, by NumPy: nothing is compiled for them."""
    scale = 1 / max(shape[0], 1) ** 0.5 if scale is None and shape else scale or 1.0
    draws = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    return jnp.asarray(draws.normal(size=shape, scale=scale))


def classes(n, c):
    return (jnp.arange(n) * 7 + 3) % c


def of_network(network, inputs, labels, key) -> Case:
    params = compiled(network.init)(key)
    return Case(network.apply, fb.losses.softmax_cross_entropy, params, (inputs, labels))


def regression(model, params, inputs, outputs, key) -> Case:
    return Case(model, fb.losses.squared_error, params, (inputs, normal(key, N, outputs)))


# --- feed-forward -------------------------------------------------------------------------------


def mlp(key):
    net = fb.networks.mlp((5, 6, 3), dtype=float)
    return of_network(net, normal(key, N, 5), classes(N, 3), key)


def deep_linear(key):
    keys = jax.random.split(key, 5)
    params = [normal(keys[0], 5, 4), normal(keys[1], 4, 3)]
    return regression(lambda p, x: x @ p[0] @ p[1], params, normal(keys[2], N, 5), 3, keys[3])


def tied_linear(key):
    """A linear network of one matrix, used twice: not linear in it."""
    keys = jax.random.split(key, 3)
    params = normal(keys[0], 4, 4)
    return regression(lambda p, x: (x @ p) @ p, params, normal(keys[1], N, 4), 4, keys[2])


def relu_net(key):
    keys = jax.random.split(key, 6)
    params = {"w": normal(keys[0], 6, 5), "b": normal(keys[1], 6), "v": normal(keys[2], 3, 6)}

    def model(p, x):
        return p["v"] @ jax.nn.relu(p["w"] @ x + p["b"])

    return Case(
        model, fb.losses.softmax_cross_entropy, params, (normal(keys[3], N, 5), classes(N, 3))
    )


def shapes(key):
    """Biases and scales of odd ranks, scalars, einsums that keep, contract and share axes."""
    keys = jax.random.split(key, 8)
    params = {
        "heads": normal(keys[0], 2, 5, 3),  # einsum over a shared axis of heads
        "flip": normal(keys[1], 3, 4),
        "temperature": jnp.array(1.3),
        "scale": normal(keys[2], 4),
        "table": normal(keys[3], 3, 4),
        "integers": jnp.arange(3),
        "unused": normal(keys[4], 2),
    }

    def model(p, x):  # (6, 2, 5)
        h = jnp.einsum("thd,hdk->htk", x, p["heads"])  # a batch axis: the heads
        h = jnp.einsum("kj,htk->jth", p["flip"], h)  # the weight on the left
        h = jnp.tanh(h / p["temperature"]) * p["scale"][:, None, None]
        h = h.sum(2).T[p["integers"]] * p["table"]
        return (h - lax.stop_gradient(p["scale"])).sum(0)

    return regression(model, params, normal(keys[5], N, 6, 2, 5), 4, keys[6])


def chosen_expert(key):
    """An expert chosen by the example: a matrix and a row, each taken by one index."""
    keys = jax.random.split(key, 5)
    params = {"experts": normal(keys[0], 3, 4, 4), "row": normal(keys[1], 3, 4)}

    def model(p, x):
        k = jnp.argmax(x[:3])
        return jnp.tanh(x @ p["experts"][k]) * p["row"][k]

    return regression(model, params, normal(keys[2], N, 4), 4, keys[3])


# --- convolutions -------------------------------------------------------------------------------


def convnet(key):
    """Strides, dilations, groups, depthwise, a transposed convolution, several layouts."""
    keys = jax.random.split(key, 9)
    params = {
        "first": normal(keys[0], 3, 3, 2, 4, scale=0.4),
        "groups": normal(keys[1], 4, 2, 2, 2, scale=0.4),  # out, in, h, w
        "depthwise": normal(keys[2], 3, 3, 1, 8, scale=0.4),
        "up": normal(keys[3], 2, 2, 8, 3, scale=0.4),
        "bias": normal(keys[4], 4),
        "head": normal(keys[5], 3, 3),
    }

    def model(p, x):  # (9, 8, 2)
        x = lax.conv_general_dilated(
            x[None], p["first"], (2, 1), ((1, 2), (0, 1)), rhs_dilation=(1, 2),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        x = jnp.tanh(x + p["bias"]).transpose(0, 3, 1, 2)
        x = lax.conv_general_dilated(
            x, p["groups"], (1, 1), ((1, 0), (0, 1)), feature_group_count=2, lhs_dilation=(1, 2),
            dimension_numbers=("NCHW", "OIHW", "NCHW"),
        )  # fmt: skip
        x = jnp.concatenate([x, jnp.sin(x)], axis=1)
        x = lax.conv_general_dilated(
            x, p["depthwise"], (2, 2), "VALID", feature_group_count=8,
            dimension_numbers=("NCHW", "HWIO", "NHWC"),
        )  # fmt: skip
        x = lax.conv_transpose(jnp.tanh(x), p["up"], (2, 2), "VALID")
        return x.mean((0, 1, 2)) @ p["head"]

    return Case(
        model,
        fb.losses.softmax_cross_entropy,
        params,
        (normal(keys[6], N, 9, 8, 2, scale=1.0), classes(N, 3)),
    )


def conv1d_scanned(key):
    """One kernel at every step of a loop, and a stack of kernels over a loop."""
    keys = jax.random.split(key, 5)
    params = (normal(keys[0], 3, 2, 2, scale=0.4), normal(keys[1], 3, 3, 2, 2, scale=0.4))

    def conv(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )

    def model(p, x):
        def step(h, kernel):
            return jnp.tanh(conv(conv(h, p[0]), kernel)), None

        h, _ = lax.scan(step, x[None], p[1])
        return h.mean((0, 1))

    return regression(model, params, normal(keys[2], N, 6, 2), 2, keys[3])


def resnet(key):
    net = fb.networks.resnet((8, 8, 1), 3, channels=(2, 4), groups=2, dtype=float)
    return of_network(net, normal(key, N, 8, 8, 1, scale=1.0), classes(N, 3), key)


# --- sequences ----------------------------------------------------------------------------------


def transformer(key):
    net = fb.networks.transformer(7, 7, length=4, width=4, heads=2, layers=1, dtype=float)
    tokens = jax.random.randint(key, (N, 4), 0, 7)
    return of_network(net, tokens, jnp.roll(tokens, -1, axis=1), key)


def _attention(x, qkv, out, heads=2):
    t, d = x.shape
    q, k, v = jnp.split(x @ qkv, 3, axis=-1)
    q, k, v = (a.reshape(t, heads, d // heads) for a in (q, k, v))
    scores = jnp.einsum("thd,shd->hts", q, k)
    return jnp.einsum("hts,shd->thd", jax.nn.softmax(scores), v).reshape(t, d) @ out


def _norm(x, scale):
    return scale * x * lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)


def scanned_transformer(key, wrap=lambda f: f):
    """Embeddings tied to the output, a stack of layers over which it scans."""
    keys = jax.random.split(key, 6)
    depth, d, vocabulary, length = 2, 4, 6, 3
    params = {
        "embedding": normal(keys[0], vocabulary, d),
        "position": normal(keys[1], length + 2, d),
        "layers": {
            "qkv": normal(keys[2], depth, d, 3 * d, scale=0.5),
            "out": normal(keys[3], depth, d, d, scale=0.5),
            "scale": jnp.ones((depth, d)),
        },
    }

    def model(p, tokens):
        x = p["embedding"][tokens] + p["position"][: len(tokens)]

        @wrap
        def layer(x, p):
            return x + _attention(_norm(x, p["scale"]), p["qkv"], p["out"]), None

        x, _ = lax.scan(layer, x, p["layers"])
        return x @ p["embedding"].T

    tokens = jax.random.randint(keys[4], (N, length), 0, vocabulary)
    return Case(
        model, fb.losses.softmax_cross_entropy, params, (tokens, jnp.roll(tokens, -1, axis=1))
    )


def remat_transformer(key):
    return scanned_transformer(key, wrap=jax.checkpoint)


def sliced_stack(key):
    """A stack unrolled by slices, one transposed; fused projections; an index out of range."""
    keys = jax.random.split(key, 6)
    params = {
        "layers": normal(keys[0], 3, 4, 4),
        "fused": normal(keys[1], 4, 8),
        "table": normal(keys[2], 5, 4),
    }

    def model(p, x):
        x = p["table"].at[x].get(mode="fill", fill_value=0)
        for i in range(3):
            x = jnp.tanh(x @ (p["layers"][i].T if i == 1 else p["layers"][i]))
        gate, value = x @ p["fused"][:, :4], x @ p["fused"][:, 4:]
        return (jax.nn.sigmoid(gate) * value).sum(0)

    indices = jnp.array([[0, 4, 0], [1, 1, 1], [2, 9, 3], [0, 3, 4]])
    return regression(model, params, indices, 4, keys[3])


def lstm(key):
    net = fb.networks.lstm(3, 4, 2, dtype=float)
    return of_network(net, normal(key, N, 5, 3, scale=1.0), classes(N, 2), key)


def rnn(key):
    """A hand-written recurrent network: transposed weights inside the loop, states as carry."""
    keys = jax.random.split(key, 6)
    params = {"w": normal(keys[0], 4, 3), "u": normal(keys[1], 4, 4), "b": normal(keys[2], 4)}

    def model(p, x):
        def step(carry, x):
            h, t = carry
            h = jnp.tanh(x @ p["w"].T + h @ p["u"].T + p["b"])
            return (h, t + 1), h

        (h, _), hs = lax.scan(step, (jnp.zeros(4), 0), x)
        return h + hs.sum(0)

    return regression(model, params, normal(keys[3], N, 5, 3), 4, keys[4])


def parameters_in_the_carry(key):
    """Parameters carried through a loop, one unchanged, one scaled; a layer taken by its number."""
    keys = jax.random.split(key, 6)
    params = {"w": normal(keys[0], 3, 3), "v": normal(keys[1], 3, 3), "s": normal(keys[2], 4, 3, 3)}

    def model(p, x):
        def step(i, carry):
            w, v, h = carry
            return w, 0.9 * v, jnp.tanh((h @ w) @ v + h @ p["s"][i])

        return lax.fori_loop(0, 4, step, (p["w"], p["v"], x))[2]

    return regression(model, params, normal(keys[3], N, 3), 3, keys[4])


# --- parameters that are computed --------------------------------------------------------------


def low_rank(key):
    keys = jax.random.split(key, 6)
    params = {"a": normal(keys[0], 5, 2), "b": normal(keys[1], 2, 4), "c": normal(keys[2], 2, 4)}
    frozen = normal(keys[3], 5, 4)

    def model(p, x):
        return jnp.tanh(x @ (frozen + p["a"] @ p["b"])) + (x @ p["a"]) @ p["c"]

    return regression(model, params, normal(keys[4], N, 5), 4, keys[5])


def weight_norm(key):
    keys = jax.random.split(key, 6)
    params = {"v": normal(keys[0], 5, 4), "g": normal(keys[1], 4), "m": normal(keys[2], 4, 4)}
    mask = jnp.arange(16).reshape(4, 4) % 3 > 0

    def model(p, x):
        w = p["g"] * p["v"] / jnp.linalg.norm(p["v"], axis=0)
        return jnp.tanh(x @ w) @ (p["m"] * mask)

    return regression(model, params, normal(keys[3], N, 5), 4, keys[4])


def stacked_in_python(key):
    keys = jax.random.split(key, 6)
    params = [normal(k, 3, 3) for k in keys[:3]]

    def model(p, x):
        h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, jnp.stack(p))
        return h

    return regression(model, params, normal(keys[3], N, 3), 3, keys[4])


# --- control flow and custom rules ------------------------------------------------------------


def bodies_of_parameters(key):
    """Bodies for parameters alone within a loop; indices computed beside a parameter."""
    keys = jax.random.split(key, 6)
    params = {
        "stack": normal(keys[0], 2, 3, 3),
        "values": normal(keys[1], 5),
        "places": jnp.array([[0, 1], [2, 2], [1, 0], [0, 0], [2, 1]]),
    }
    scaled = jax.jit(lambda a, times: times * a)
    turned = jax.jit(lambda places, values: (places[:, ::-1], values**2))

    def model(p, x):
        def step(h, a):
            half, _ = lax.scan(lambda c, _: (c / 2, None), a, None, length=1)
            solved = jnp.linalg.solve(jnp.eye(3) + half / 4, jnp.eye(3))
            return jnp.tanh(h @ scaled(solved, 2.0)), None

        h, _ = lax.scan(step, x, p["stack"])
        places, values = turned(p["places"], p["values"])
        return jnp.zeros(3).at[places[:, 0]].add(values * h[places[:, 1]])

    return regression(model, params, normal(keys[2], N, 3), 3, keys[3])


def masked_prediction(key):
    """A prediction that holds a mask and a choice, on which the loss depends."""
    keys = jax.random.split(key, 4)
    params = {"w": normal(keys[0], 3, 4)}

    def model(p, x):
        z = x @ p["w"]
        return {"best": jnp.argmax(z), "z": z, "positive": z > 0}

    def loss(prediction, y):
        z = jnp.where(prediction["positive"], prediction["z"], 2 * prediction["z"])
        return jnp.sum((z - y) ** 2) + z[prediction["best"]] ** 2

    return Case(model, loss, params, (normal(keys[1], N, 3), normal(keys[2], N, 4)))


@jax.custom_jvp
def _cube(w, x):
    return (w @ x) ** 3


@_cube.defjvp
def _cube_jvp(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    y = w @ x
    return y**3, 3 * y**2 * (dw @ x + w @ dx)


def control_flow(key):
    """Branches that depend on the example, calls, checkpoints, a custom rule around a weight."""
    keys = jax.random.split(key, 8)
    params = {
        "left": normal(keys[0], 3, 3),
        "right": normal(keys[1], 3, 3),
        "called": normal(keys[2], 3, 3),
        "saved": normal(keys[3], 3, 3),
        "custom": normal(keys[4], 3, 3),
    }

    @jax.jit
    def dense(w, x):
        return jnp.tanh(x @ w.T)

    def model(p, x):
        x = lax.cond(
            x[0] > 0,
            lambda x: jnp.sin(p["left"].T @ x),
            lambda x: jnp.cos(p["left"] @ x) + p["right"] @ x,
            x,
        )
        x = dense(p["called"], dense(p["called"], x))
        x = jax.checkpoint(lambda w, x: jnp.tanh((2 * w) @ x))(p["saved"], x)
        return x + _cube(p["custom"], x)

    return regression(model, params, normal(keys[5], N, 3), 3, keys[6])


def nested_vmap(key):
    """Heads mapped over by `vmap`, and an ensemble of experts mixed by a gate."""
    keys = jax.random.split(key, 6)
    params = {"heads": normal(keys[0], 2, 3, 4), "shared": normal(keys[1], 4, 3)}

    def model(p, x):  # (5, 3)
        each = jax.vmap(lambda w: jax.vmap(lambda row: jnp.tanh(row @ w))(x))(p["heads"])
        return jax.vmap(lambda h: (h @ p["shared"]).sum(0))(each).sum(0)

    return regression(model, params, normal(keys[2], N, 5, 3), 3, keys[3])


def several_outputs(key):
    """A prediction that is a pytree, in part of parameters alone; a loss of one's own."""
    keys = jax.random.split(key, 6)
    params = {
        "w": normal(keys[0], 3, 4),
        "v": normal(keys[1], 4, 2),
        "log_scale": normal(keys[2], 2),
    }

    def model(p, x):
        h = jnp.tanh(x @ p["w"])
        return {"mean": h @ p["v"], "log_scale": p["log_scale"]}

    def loss(z, y):
        return jnp.sum(((z["mean"] - y) * jnp.exp(-z["log_scale"])) ** 2 / 2 + z["log_scale"])

    return Case(model, loss, params, (normal(keys[3], N, 3), normal(keys[4], N, 2)))


def _case(make):
    def case(key):
        with jax.numpy_rank_promotion("allow"):
            made = make(key)
        return made._replace(model=users(made.model))

    return case


CASES = {
    make.__name__: _case(make)
    for make in (
        mlp, deep_linear, tied_linear, relu_net, shapes, chosen_expert, convnet, conv1d_scanned,
        resnet, transformer, scanned_transformer, remat_transformer, sliced_stack, lstm, rnn,
        parameters_in_the_carry,
        low_rank, weight_norm, stacked_in_python, control_flow, bodies_of_parameters,
        masked_prediction, nested_vmap, several_outputs,
    )
}  # fmt: skip
