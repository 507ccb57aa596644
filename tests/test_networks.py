"""Reference networks: shapes, parameters, meaning and refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbackprop import networks

KEY = jax.random.key(0)


def dense(inputs, outputs):
    return inputs * outputs + outputs


def conv(size, inputs, outputs):
    return size * size * inputs * outputs + outputs


def norm(width):
    return 2 * width


def block(inputs, outputs):
    return norm(inputs) + conv(3, inputs, outputs) + norm(outputs) + conv(3, outputs, outputs)


# name: network, shape of x, shape of the prediction, number of parameters
NETWORKS = {
    "mlp": (networks.mlp((6, 5, 3)), (2, 3), (3,), dense(6, 5) + dense(5, 3)),
    "linear": (networks.mlp((4, 2)), (4,), (2,), dense(4, 2)),
    "autoencoder": (
        networks.autoencoder((6, 4, 2)),
        (2, 3),
        (6,),
        dense(6, 4) + dense(4, 2) + dense(2, 4) + dense(4, 6),
    ),
    "convnet": (
        networks.convnet((9, 8), 3, channels=(2, 4)),
        (9, 8),
        (3,),
        conv(3, 1, 2) + conv(3, 2, 4) + dense(2 * 2 * 4, 3),
    ),
    "convnet of colours": (
        networks.convnet((4, 4, 3), 2, channels=(2,)),
        (4, 4, 3),
        (2,),
        conv(3, 3, 2) + dense(2 * 2 * 2, 2),
    ),
    "resnet": (
        networks.resnet((6, 5, 3), 2, channels=(4, 8), groups=2),
        (6, 5, 3),
        (2,),
        conv(3, 3, 4) + block(4, 4) + block(4, 8) + conv(1, 4, 8) + norm(8) + dense(8, 2),
    ),
    "deeper resnet": (
        networks.resnet((4, 4), 2, channels=(2, 2), blocks=2, groups=1),
        (4, 4),
        (2,),
        conv(3, 1, 2) + 4 * block(2, 2) + conv(1, 2, 2) + norm(2) + dense(2, 2),
    ),
    "lstm": (networks.lstm(3, 4, 2), (5, 3), (2,), dense(3, 16) + 4 * 16 + dense(4, 2)),
    "transformer": (
        networks.transformer(7, 3, length=6, width=4, heads=2, layers=2),
        (5,),
        (5, 3),
        7 * 4
        + 6 * 4
        + 2 * (2 * norm(4) + dense(4, 12) + dense(4, 4) + dense(4, 16) + dense(16, 4))
        + norm(4)
        + dense(4, 3),
    ),
}
each_network = pytest.mark.parametrize("name", NETWORKS)


def example(name, batch=()):
    _, shape, _, _ = NETWORKS[name]
    rng = np.random.default_rng(0)
    if name == "transformer":
        return rng.integers(0, 7, size=(*batch, *shape))
    return rng.normal(size=(*batch, *shape)).astype(np.float32)


def shapes(name):
    return jax.eval_shape(NETWORKS[name][0].init, KEY)


@functools.cache
def parameters(name):
    """Random values for all of the network's parameters, biases and scales too."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape, scale=0.5), leaf.dtype), shapes(name)
    )


@functools.cache
def compiled(name):
    return jax.jit(NETWORKS[name][0].apply)


@each_network
def test_shapes_and_number_of_parameters(name):
    network, _, shape, count = NETWORKS[name]
    assert jax.eval_shape(network.apply, shapes(name), example(name)).shape == shape
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes(name))) == count


@each_network
def test_parameters_are_plain_containers_of_arrays(name):
    def check(tree):
        if type(tree) in (dict, list, tuple):
            for child in tree.values() if isinstance(tree, dict) else tree:
                check(child)
        else:
            assert tree.dtype == jnp.float32

    check(shapes(name))


@pytest.mark.slow
@each_network
def test_vmap_is_one_example_at_a_time(name):
    batch = example(name, (2,))
    together = jax.jit(jax.vmap(NETWORKS[name][0].apply, (None, 0)))(parameters(name), batch)
    assert np.all(np.isfinite(together))
    for x, prediction in zip(batch, together, strict=True):
        alone = compiled(name)(parameters(name), x)
        np.testing.assert_allclose(prediction, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "convnet of colours", "lstm"])
def test_init_depends_on_the_key_alone(name):
    init = jax.jit(NETWORKS[name][0].init)
    first, again, other = (init(key) for key in (KEY, KEY, jax.random.key(1)))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
        # Vectors are biases and scales, which start at constants.
        assert np.any(np.asarray(a) != np.asarray(b)) == (a.ndim > 1)


@pytest.mark.slow
@each_network
def test_every_parameter_matters(name):
    network, *_ = NETWORKS[name]

    def first_moment(params):
        prediction = network.apply(params, example(name))
        return jnp.sum(prediction * jnp.arange(1.0, 1 + prediction.size).reshape(prediction.shape))

    gradient = jax.jit(jax.grad(first_moment))(parameters(name))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.any(np.abs(leaf) > 1e-6), jax.tree_util.keystr(path)


BUILDERS = {
    "mlp": lambda **k: networks.mlp((6, 3), **k),
    "autoencoder": lambda **k: networks.autoencoder((6, 2), **k),
    "convnet of colours": lambda **k: networks.convnet((4, 4, 3), 2, channels=(2,), **k),
    "resnet": lambda **k: networks.resnet((6, 5, 3), 2, channels=(4, 4), **k),
    "lstm": lambda **k: networks.lstm(3, 2, 2, **k),
    "transformer": lambda **k: networks.transformer(7, 3, length=6, width=4, layers=1, **k),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("name", BUILDERS)
def test_parameters_set_the_dtype(name, dtype):
    with jax.enable_x64(True):
        network = BUILDERS[name](dtype=dtype)
        params = jax.eval_shape(network.init, KEY)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {dtype}
        prediction = jax.eval_shape(network.apply, params, example(name))
        assert prediction.dtype == dtype


def test_mlp_is_its_formula():
    network = networks.mlp((4, 3, 2), jnp.sin)
    params, x = network.init(KEY), example("linear")
    first, last = ((np.asarray(p["kernel"]), np.asarray(p["bias"])) for p in params)
    expected = np.sin(x @ first[0] + first[1]) @ last[0] + last[1]
    np.testing.assert_allclose(network.apply(params, x), expected, rtol=1e-5)


def test_autoencoder_has_a_linear_code():
    network = networks.autoencoder((4, 2), jnp.zeros_like)
    params, x = network.init(KEY), example("linear")
    expected = x @ params["encoder"][0]["kernel"] @ params["decoder"][0]["kernel"]
    np.testing.assert_allclose(network.apply(params, x), expected, rtol=1e-5)


def test_resnet_is_residual_and_normalises():
    params = parameters("deeper resnet")
    silent = params | {"stem": params["stem"] | {"bias": jnp.zeros(2)}}
    silent["stages"] = [[unit.copy() for unit in params["stages"][0]]]
    for unit in silent["stages"][0]:
        unit["conv2"] = jax.tree.map(jnp.zeros_like, unit["conv2"])
    without, apply, x = silent | {"stages": []}, compiled("deeper resnet"), example("deeper resnet")
    prediction = apply(without, x)
    np.testing.assert_allclose(apply(silent, x), prediction, rtol=1e-6)
    # Without a bias in the stem, normalisation divides the scale of the image out.
    np.testing.assert_allclose(apply(without, 1000 * x), prediction, rtol=1e-3, atol=1e-4)


def test_lstm_is_its_formula():
    params, x = parameters("lstm"), example("lstm")
    bias = np.asarray(params["input"]["bias"])

    def sigmoid(a):
        return 1 / (1 + np.exp(-a))

    h = c = np.zeros(4)
    for row in x:
        gates = row @ np.asarray(params["input"]["kernel"]) + h @ params["recurrent"] + bias
        i, f, g, o = np.split(np.asarray(gates), 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
    expected = h @ params["output"]["kernel"] + params["output"]["bias"]
    np.testing.assert_allclose(compiled("lstm")(params, x), expected, rtol=1e-5, atol=1e-6)


def test_lstm_remembers_at_first():
    bias = networks.lstm(3, 4, 2).init(KEY)["input"]["bias"]
    np.testing.assert_array_equal(bias, np.repeat([0.0, 1.0, 0.0, 0.0], 4))


@pytest.mark.slow
def test_transformer_reads_tokens_out_of_range_as_the_nearest():
    network = networks.transformer(200, 3, length=4, width=4, heads=1, layers=1)
    params = network.init(jax.random.key(0))
    for given, nearest in (([-1, 2], [0, 2]), ([7, 200], [7, 199]), ([-300, 9999], [0, 199])):
        got, expected = (network.apply(params, jnp.array(x)) for x in (given, nearest))
        np.testing.assert_array_equal(got, expected)
    narrow = network.apply(params, jnp.array([5, 100], "int8"))  # which has no number 200
    np.testing.assert_array_equal(narrow, network.apply(params, jnp.array([5, 100])))


def test_transformer_is_causal_and_knows_positions():
    params, apply = parameters("transformer"), compiled("transformer")
    tokens = np.array([1, 4, 2, 2, 0])
    logits = apply(params, tokens)
    changed = apply(params, np.where(np.arange(5) == 3, 6, tokens))
    np.testing.assert_allclose(changed[:3], logits[:3], atol=1e-6)
    assert jnp.all(jnp.any(jnp.abs(changed[3:] - logits[3:]) > 1e-4, axis=-1))
    np.testing.assert_allclose(apply(params, tokens[:2]), logits[:2], atol=1e-6)
    # With neither positions nor other tokens to tell them apart, all predictions would be equal.
    same = apply(params, np.ones(5, int))
    assert jnp.any(jnp.abs(same[0] - same[1]) > 1e-4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: networks.mlp((3,)), "mlp: widths .3,. name no layer"),
        (lambda: networks.mlp((3, 0, 2)), "mlp: widths has a size of 0"),
        (lambda: networks.autoencoder((3,)), "at least an input and an output width"),
        (lambda: networks.convnet((8, 3), 2), "8 by 3 is too small for 2 stages; .* 4 by 4"),
        (lambda: networks.convnet((8,), 2), r"give \(H, W\) or \(H, W, C\)"),
        (lambda: networks.convnet((8, 8), 2, channels=()), "channels is empty"),
        (lambda: networks.convnet((8, 8), 0), "classes has a size of 0"),
        (lambda: networks.resnet((1, 8), 2), "too small for 2 stages; .* 2 by 2"),
        (lambda: networks.resnet((8, 8), 2, groups=3), "groups=3 does not divide"),
        (lambda: networks.resnet((8, 8), 2, blocks=0), "blocks has a size of 0"),
        (lambda: networks.lstm(0, 3, 2), "lstm: inputs has a size of 0"),
        (lambda: networks.transformer(5, 5, length=4, heads=3), "heads=3 does not divide width=64"),
        (lambda: networks.transformer(5, 5, length=0), "length has a size of 0"),
    ],
)
def test_refuses_at_construction(build, message):
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "x", "message"),
    [
        ("mlp", np.ones(7), r"x has 7 numbers and widths\[0\] is 6"),
        ("autoencoder", np.ones(5), "x has 5 numbers"),
        ("convnet", np.ones((9, 8, 1)), r"x has shape \(9, 8, 1\); give one image of shape"),
        ("resnet", np.ones((2, 6, 5, 3)), "vmap over a batch"),
        ("lstm", np.ones((5, 4)), r"give \(T, 3\)"),
        ("lstm", np.ones((0, 3)), "at least one time step"),
        ("transformer", np.ones(7, int), "T <= length = 6"),
        ("transformer", np.ones(5), "give integer tokens"),
        ("transformer", np.ones((2, 5), int), "give integer tokens"),
    ],
)
def test_refuses_when_applied(name, x, message):
    network, *_ = NETWORKS[name]
    params = jax.eval_shape(network.init, KEY)
    with pytest.raises(ValueError, match=message) as error:
        jax.eval_shape(network.apply, params, x)
    assert "\n" not in str(error.value)
