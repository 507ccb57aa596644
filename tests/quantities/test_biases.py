"""Biases as one row more of the weights to whose products they are added."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive import assert_close, compiled

import fbackprop as fb
from fbackprop.kronecker import BiasBlock, Block


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


N, INTO, OUT, PLACES = 5, 3, 4, 6
loss = fb.losses.squared_error


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def plus(x, bias):
    return x + jnp.broadcast_to(bias, x.shape)


def joined(model, params, batch, **options):
    sweep = fb.sweep(model, loss, k=fb.Kronecker(vectors="joint", **options))
    return fb.KroneckerFactors(compiled(sweep)(params, batch)["k"])


def two_layers(params, x):
    first, second = params["first"], params["second"]
    h = jnp.tanh(plus(x @ first["kernel"], first["bias"]))
    product = h @ second["kernel"]
    return jnp.broadcast_to(second["bias"], product.shape) + product


def homogeneous(params, x):
    """The same model of kernels with a row more."""

    def with_one(x):
        return jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1))], axis=-1)

    return with_one(jnp.tanh(with_one(x) @ params[0])) @ params[1]


PARAMS = {
    "first": {"kernel": normal(0, INTO, OUT), "bias": normal(1, OUT)},
    "second": {"kernel": normal(2, OUT, 2), "bias": normal(3, 2)},
}
ROWS = [np.concatenate([x["kernel"], x["bias"][None]]) for x in PARAMS.values()]
VECTORS = normal(4, N, INTO), normal(5, N, 2)
SEQUENCES = normal(4, N, PLACES, INTO), normal(5, N, PLACES, 2)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("batch", [VECTORS, SEQUENCES], ids=["vectors", "sequences"])
def test_factors_are_those_of_a_kernel_with_a_row_more(batch, sharing):
    operator = joined(two_layers, PARAMS, batch, sharing=sharing)
    sweep = fb.sweep(homogeneous, loss, k=fb.Kronecker(sharing=sharing))
    expected = compiled(sweep)(ROWS, batch)["k"]
    for layer, (block,) in zip(PARAMS, expected, strict=True):
        (mine,) = operator.blocks[layer]["kernel"]
        (bias,) = operator.blocks[layer]["bias"]
        assert isinstance(bias, BiasBlock)
        assert_close(mine.a, block.a)
        assert_close(mine.b, block.b)


def test_weights_of_examples_count_in_the_row_too():
    weights = jnp.arange(1.0, N + 1)
    run = fb.sweep(two_layers, loss, k=fb.Kronecker(vectors="joint"))
    of_rows = fb.sweep(homogeneous, loss, k=fb.Kronecker())
    (mine,) = compiled(run)(PARAMS, SEQUENCES, weights=weights)["k"]["first"]["kernel"]
    (block,) = compiled(of_rows)(ROWS, SEQUENCES, weights=weights)["k"][0]
    assert_close(mine.a, block.a)
    in_pieces = fb.sweep(two_layers, loss, k=fb.Kronecker(vectors="joint"), chunk=2)
    (pieces,) = compiled(in_pieces)(PARAMS, SEQUENCES, weights=weights)["k"]["first"]["kernel"]
    assert_close(pieces.a, mine.a)


@pytest.mark.slow
def test_a_linear_model_has_its_exact_gauss_newton_matrix():
    def model(params, x):
        return x @ params["kernel"] + params["bias"]

    params = PARAMS["second"]
    batch = normal(6, N, OUT), normal(7, N, 2)
    exact = fb.GaussNewton(model, loss, params, batch).dense()
    operator = joined(model, params, batch)
    assert_close(operator.dense(), exact)
    eigen = operator.eigen()
    assert_close(eigen.dense(), exact)
    quantity = fb.Kronecker(vectors="joint").along(eigen.blocks)
    values = fb.sweep(model, loss, s=quantity)(params, batch)["s"]
    assert_close(eigen.with_values(values).dense(), exact)


def looped(params, x):
    def body(h, layer):
        return jnp.tanh(h @ layer["kernel"] + layer["bias"]), None

    return jax.lax.scan(body, x, params)[0]


def convolved(params, x):
    dims = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(
        x[None], params["kernel"], (1, 1), "VALID", dimension_numbers=dims
    )
    return jnp.tanh(y[0].transpose(2, 0, 1) + params["bias"][:, None, None])


def twice(params, x):
    first = jnp.tanh(x @ params["kernel"] + params["bias"])
    return jnp.tanh(first @ params["kernel"] + params["bias"])


def checkpointed(params, x):
    return jax.checkpoint(lambda p, x: jnp.tanh(x @ p["kernel"] + p["bias"]))(params, x)


def heads(params, x):
    """Of a kernel (I, H, O) and a bias (H, O), as attention has them."""
    product = jax.lax.dot_general(x, params["kernel"], (((1,), (0,)), ((), ())))
    return jnp.tanh(plus(product, params["bias"]))


def transposed(params, x):
    return jnp.tanh(plus((params["kernel"] @ x.T).T, params["bias"]))


MODELS = {
    "scan": (looped, {"kernel": normal(0, 2, 3, 3), "bias": normal(1, 2, 3)}, (3,)),
    "convolution": (convolved, {"kernel": normal(0, 2, 2, 3, 2), "bias": normal(1, 2)}, (4, 4, 3)),
    "twice": (twice, {"kernel": normal(0, 3, 3), "bias": normal(1, 3)}, (3,)),
    "checkpoint": (checkpointed, {"kernel": normal(0, 3, 2), "bias": normal(1, 2)}, (3,)),
    "heads": (heads, {"kernel": normal(0, 3, 2, 4), "bias": normal(1, 2, 4)}, (5, 3)),
    "transposed": (transposed, {"kernel": normal(0, 2, 3), "bias": normal(1, 2)}, (5, 3)),
}


def row_of_one_leaf(params, x):
    return jnp.tanh(plus(x @ params["both"][:-1], params["both"][-1]))


def column_of_one_leaf(params, x):
    return jnp.tanh(plus(x @ params["both"][:, 1:], params["both"][:, 0]))


def rows_of_a_loop(params, x):
    body = lambda h, both: (row_of_one_leaf({"both": both}, h), None)  # noqa: E731
    return jax.lax.scan(body, x, params["both"])[0]


def of_one_vector(params, x):
    flat = params["both"]
    h = jnp.tanh(plus(x @ flat[:6].reshape(3, 2), flat[6:8]))
    return plus(h @ flat[8:12].reshape(2, 2), flat[12:])


OF_ONE_LEAF = {
    "row": (row_of_one_leaf, {"both": normal(0, 4, 2)}, (5, 3)),
    "column": (column_of_one_leaf, {"both": normal(0, 3, 4)}, (3,)),
    "rows of a loop": (rows_of_a_loop, {"both": normal(0, 2, 4, 3)}, (3,)),
    "vector": (of_one_vector, {"both": normal(0, 14)}, (3,)),
}


def operator_of(name):
    model, params, shape = (MODELS | OF_ONE_LEAF)[name]
    inputs = normal(8, N, *shape)
    outputs = jax.vmap(model, (None, 0))(params, inputs)
    operator = joined(model, params, (inputs, jnp.zeros_like(outputs)))
    return operator, jax.tree.map(lambda x: normal(9, *x.shape), params)


@pytest.mark.parametrize("name", [*MODELS, *OF_ONE_LEAF])
def test_operators_of_joined_blocks_agree_with_their_matrix(name):
    operator, vector = operator_of(name)

    def run(operator, vector):
        ravel, inverse = operator.space.ravel, operator.inverse(0.3)
        product, diagonal = ravel(operator.matvec(vector)), ravel(operator.diagonal())
        solved, inverted = ravel(operator.solve(vector, 0.3)), ravel(inverse.matvec(vector))
        flat, matrices = ravel(vector), (operator.dense(), inverse.dense())
        return matrices, flat, product, diagonal, solved, inverted

    found = jax.device_get(compiled(run)(operator, vector))
    (matrix, inverse), flat, product, diagonal, solved, inverted = found
    assert_close(matrix, matrix.T)
    assert_close(product, matrix @ flat)
    assert_close(diagonal, np.diagonal(matrix))
    assert_close(solved, np.linalg.solve(matrix + 0.3 * np.eye(len(matrix)), flat))
    assert_close(inverted, inverse @ flat)


@pytest.mark.parametrize("name", [*MODELS, *OF_ONE_LEAF])
def test_a_bias_is_met_by_one_in_every_place(name):
    operator, vector = operator_of(name)
    blocks = jax.tree.leaves(operator.blocks, is_leaf=lambda x: isinstance(x, Block | BiasBlock))
    rows = [block for block in blocks if not isinstance(block, BiasBlock)]
    assert len(blocks) == 2 * len(rows)
    for block in rows:
        assert block.bias is not None
        assert_close(block.a[:, -1, -1], jnp.ones(len(block.a)))
    if "bias" in vector:
        matrix, size = operator.dense(), vector["bias"].size
        assert np.linalg.norm(matrix[:size, size:]) > 0


@pytest.mark.parametrize("name", MODELS)
def test_eigenvalues_corrected_are_the_matrix_in_the_factors_basis(name):
    model, params, shape = MODELS[name]
    inputs = normal(8, N, *shape)
    batch = inputs, jnp.zeros_like(jax.vmap(model, (None, 0))(params, inputs))

    def run(operator, params, batch):
        eigen = operator.eigen()
        quantity = fb.Kronecker(vectors="joint").along(eigen.blocks)
        values = fb.sweep(model, loss, s=quantity)(params, batch)["s"]
        exact = fb.GaussNewton(model, loss, params, batch)
        return [x.dense() for x in (operator, eigen, eigen.with_values(values), exact)]

    operator = joined(model, params, batch)
    matrices = jax.device_get(compiled(run)(operator, params, batch))
    kronecker, eigen, corrected, exact = matrices
    # Turned to the basis, the exact matrix has the values on its diagonal: the traces agree, and
    # the error is what is off it.
    mask = np.abs(kronecker) > 0
    assert_close(np.trace(corrected), np.trace(exact))
    error, before = (np.linalg.norm((x - exact) * mask) for x in (corrected, eigen))
    assert error <= before * (1 + 1e-9)


def test_a_row_of_a_convolution_is_met_by_ones():
    model, params, _ = MODELS["convolution"]
    inputs = normal(8, N, 4, 4, 3)
    batch = inputs, jnp.zeros((N, 2, 3, 3))
    (block,) = joined(model, params, batch).blocks["kernel"]
    with_ones = jnp.concatenate([inputs, jnp.ones((N, 4, 4, 1))], axis=-1)
    kernel = jnp.concatenate([params["kernel"], jnp.zeros((2, 2, 1, 2))], axis=2)
    larger = {"kernel": kernel, "bias": params["bias"]}
    (wide,) = joined(model, larger, (with_ones, batch[1])).blocks["kernel"]
    channels = np.arange(16).reshape(4, 4)
    assert_close(block.a[0, :-1, -1], wide.a[0][channels[:, :3].reshape(-1), channels[0, 3]])


def sum_of_two(params, x):
    return jnp.tanh(x @ params["kernel"] + x @ params["other"] + params["bias"])


def used_again(params, x):
    return jnp.tanh(x @ params["kernel"] + params["bias"]) * params["bias"]


def scaled(params, x):
    return jnp.tanh((x @ params["kernel"]) * 2.0 + params["bias"])


def read_twice(params, x):
    product = x @ params["kernel"]
    return jnp.tanh(product + params["bias"]) + product


def one_for_all(params, x):
    return jnp.tanh(x @ params["kernel"] + params["bias"][0])


def of_a_loop(params, x):
    """The kernel is the same in all iterations, the bias is not."""

    def body(h, bias):
        return jnp.tanh(h @ params["kernel"] + bias), None

    return jax.lax.scan(body, x, params["bias"].reshape(2, 3))[0]


@pytest.mark.parametrize(
    "model", [sum_of_two, used_again, scaled, read_twice, one_for_all, of_a_loop]
)
def test_what_is_added_to_anything_else_is_no_row(model):
    size = 6 if model is of_a_loop else 3
    params = {"kernel": normal(0, 3, 3), "bias": normal(1, size), "other": normal(2, 3, 3)}
    batch = normal(3, N, 3), jnp.zeros((N, 3))
    blocks = joined(model, params, batch).blocks
    assert not any(isinstance(block, BiasBlock) for block in blocks["bias"])
    assert all(block.bias is None for block in blocks["kernel"])
