"""Kronecker factors, sampled curvature and the Hessian's diagonal, by their definitions."""

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
import zoo
from jax import lax
from naive import assert_close, compiled

import fbackprop as fb
from fbackprop.columns import _signed_root


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def swept(case, key=None, **quantities):
    return compiled(fb.sweep(case.model, case.loss, **quantities))(case.params, case.batch, key=key)


def dense(blocks):
    """A leaf's matrix: the sum of its blocks."""
    return fb.KroneckerFactors(blocks).dense()


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


# --- Kronecker factors ----------------------------------------------------------------------------


def one_layer(n=5, t=3):
    """A dense layer that is shared over t positions."""

    def model(w, x):
        return jnp.tanh(x @ w).sum(0)

    batch = normal(1, n, t, 4), jnp.arange(n) % 3
    return zoo.Case(model, fb.losses.softmax_cross_entropy, normal(0, 4, 3), batch)


def activations_and_signals(case):
    """What meets the weight (N, T, I), and the columns that come back (N, C, T, O)."""
    x, y = case.batch

    def columns(x, y):
        net = x @ case.params
        j = jax.jacobian(lambda net: jnp.tanh(net).sum(0))(net)  # (z, t, o)
        values, vectors = jnp.linalg.eigh(
            jax.hessian(lambda z: case.loss(z, y))(jnp.tanh(net).sum(0))
        )
        return jnp.einsum("zc,zto->cto", vectors * jnp.sqrt(jnp.maximum(values, 0))[None], j)

    return x, jax.vmap(columns)(x, y)


@pytest.mark.slow
def test_expand_and_reduce_are_what_they_are_defined_to_be():
    case = one_layer()
    a, b = activations_and_signals(case)
    n, t = a.shape[:2]
    found = swept(case, expand=fb.Kronecker(), reduce=fb.Kronecker(sharing="reduce"))
    (block,) = found["expand"]
    assert_close(block.a[0], jnp.einsum("nti,ntj->ij", a, a) / (n * t))
    assert_close(block.b[0], jnp.einsum("ncto,nctp->op", b, b) / n)
    (block,) = found["reduce"]
    assert_close(block.a[0], jnp.einsum("ni,nj->ij", a.mean(1), a.mean(1)) / n)
    assert_close(block.b[0], jnp.einsum("nco,ncp->op", b.sum(2), b.sum(2)) / n)


@pytest.mark.slow
def test_exact_for_one_example_without_sharing():
    for name in ("mlp", "relu_net"):
        case = zoo.CASES[name](jax.random.key(0))
        case = case._replace(batch=jax.tree.map(lambda x: x[:1], case.batch))
        found = swept(case, kron=fb.Kronecker(), block=fb.GGNBlock())
        is_tuple = lambda x: isinstance(x, tuple)  # noqa: E731
        assert_close(jax.tree.map(dense, found["kron"], is_leaf=is_tuple), found["block"])


def test_exact_for_a_deep_linear_network_with_squared_error():
    case = zoo.CASES["deep_linear"](jax.random.key(0))
    found = swept(case, kron=fb.Kronecker(), block=fb.GGNBlock())
    assert_close([dense(blocks) for blocks in found["kron"]], found["block"])


def test_reduce_is_exact_for_linear_networks_with_shared_weights():
    def model(p, x):  # a convolution, then a mean over places: linear
        x = lax.conv_general_dilated(
            x[None], p["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return x.mean((0, 1, 2)) @ p["head"]

    params = {"kernel": normal(0, 3, 3, 2, 4), "head": normal(1, 4, 3)}
    case = zoo.Case(
        model, fb.losses.squared_error, params, (normal(2, 4, 6, 5, 2), normal(3, 4, 3))
    )
    found = swept(case, kron=fb.Kronecker(sharing="reduce"), block=fb.GGNBlock())
    kernel = dense(found["kron"]["kernel"])
    assert_close(kernel, found["block"]["kernel"])
    expand = dense(swept(case, kron=fb.Kronecker())["kron"]["kernel"])
    assert not np.allclose(expand, found["block"]["kernel"])


def test_a_convolution_whose_window_is_the_image_is_a_dense_layer():
    x, y = normal(0, 4, 3, 2, 2), normal(1, 4, 5)

    def convolved(w, x):
        return lax.conv_general_dilated(
            x[None], w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ).reshape(-1)

    def multiplied(w, x):
        return x.reshape(-1) @ w.reshape(-1, 5)

    w = normal(2, 3, 2, 2, 5)
    pair = []
    for model in (convolved, multiplied):
        case = zoo.Case(model, fb.losses.squared_error, w, (x, y))
        pair.append(dense(swept(case, kron=fb.Kronecker())["kron"]))
    assert_close(*pair)


def test_tables_have_a_diagonal_factor_and_tied_ones_a_block_for_each_orientation():
    def looked_up(p, tokens):
        return p[tokens].sum(0)

    def one_hot(p, tokens):
        return (jax.nn.one_hot(tokens, 4) @ p).sum(0)

    batch = jnp.array([[0, 1, 1], [3, 3, 3], [2, 0, 1]]), normal(1, 3, 2)
    cases = [
        zoo.Case(m, fb.losses.squared_error, normal(0, 4, 2), batch) for m in (looked_up, one_hot)
    ]
    (table,), (product,) = (swept(case, kron=fb.Kronecker())["kron"] for case in cases)
    assert table.a.shape == (1, 4) and product.a.shape == (1, 4, 4)
    assert_close(table.dense(), product.dense())

    def tied(p, tokens):
        return p[tokens].sum(0) @ p.T

    case = zoo.Case(tied, fb.losses.squared_error, normal(0, 4, 2), (batch[0], normal(1, 3, 4)))
    assert len(swept(case, kron=fb.Kronecker())["kron"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scanned_transformer", "sliced_stack", "lstm", "weight_norm"])
def test_factors_are_symmetric_and_positive_for_any_model(name):
    case = zoo.CASES[name](jax.random.key(0))
    found = swept(case, kron=fb.Kronecker())["kron"]
    of_leaves = jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, tuple))
    for blocks, p in zip(of_leaves, jax.tree.leaves(case.params), strict=True):
        matrix = dense(blocks)
        assert matrix.shape == (p.size, p.size)
        assert_close(matrix, matrix.T)
        assert jnp.min(jnp.linalg.eigvalsh(matrix)) > -1e-10
        assert len(blocks) < 2 or p.ndim > 1


def test_the_empirical_fisher_takes_the_datas_labels():
    case = zoo.CASES["mlp"](jax.random.key(0))
    gradients = naive.example_gradients(case)
    found = swept(case, kron=fb.Kronecker(empirical=True), fisher=fb.FisherDiagonal(empirical=True))
    bias = (
        gradients["layers"][0]["bias"] if "layers" in gradients else jax.tree.leaves(gradients)[0]
    )
    first = jax.tree.leaves(found["kron"], is_leaf=lambda x: isinstance(x, tuple))[0]
    assert_close(dense(first), jnp.einsum("ni,nj->ij", bias, bias) / zoo.N)
    squares = naive.mean(jax.tree.map(lambda g: g**2, gradients))
    assert_close(found["fisher"], squares)


def test_a_weight_of_one_row_meets_a_product_and_more():
    """A matrix of one row has the layout of what meets no product."""

    def model(p, x):
        return jnp.tanh(x @ p["w"]) * p["w"][0]

    params = {"w": normal(1, 1, 3)}
    batch = normal(2, 4, 1), normal(3, 4, 3)
    for options in ({}, {"vectors": "joint"}, {"sharing": "reduce"}):
        sweep = fb.sweep(model, fb.losses.squared_error, k=fb.Kronecker(**options), b=fb.GGNBlock())
        found = compiled(sweep)(params, batch)
        assert_close(fb.KroneckerFactors(found["k"]).dense(), found["b"]["w"])


# --- samples --------------------------------------------------------------------------------------

SAMPLES = 4000


@pytest.mark.parametrize(
    ("loss", "target"),
    [
        (fb.losses.softmax_cross_entropy, jnp.arange(3)),
        (fb.losses.squared_error, normal(3, 3, 4)),
        (fb.losses.sigmoid_binary_cross_entropy, jnp.ones((3, 4))),
        (lambda z, y: jnp.sum(jnp.cosh(z - y)) + jnp.sum(z) ** 2, normal(3, 3, 4)),
    ],
    ids=["softmax", "squared", "sigmoid", "own"],
)
def test_samples_have_the_exact_curvature_as_their_mean(loss, target):
    def model(w, x):
        return jnp.sin(x @ w)

    case = zoo.Case(model, loss, normal(0, 5, 4), (normal(1, 3, 5), target))
    quantities = {"exact": fb.GGNDiagonal(), "sampled": fb.GGNDiagonal(SAMPLES)}
    if loss.__module__ == "fbackprop.losses":
        quantities["labels"] = fb.FisherDiagonal(SAMPLES)
    found = swept(case, key=jax.random.key(0), **quantities)
    for name in quantities:
        scale = jnp.max(found["exact"])
        assert_close(found[name] / scale, found["exact"] / scale, 0.1)


@pytest.mark.slow
def test_one_sample_is_unbiased_for_masked_positions_and_soft_labels():
    """The cross-entropy's root takes the weight of a position into account."""

    def model(w, x):
        return (x @ w).reshape(2, 3)

    x = normal(1, 2, 5)
    for target in (jnp.array([[0, -1], [2, 1]]), jax.nn.softmax(normal(2, 2, 2, 3)) * 0.5):
        case = zoo.Case(model, fb.losses.softmax_cross_entropy, normal(0, 5, 6), (x, target))
        exact = naive.mean(jax.vmap(jnp.diagonal)(naive.ggn_of_examples(case))).reshape(5, 6)
        sampled = {"s": fb.GGNDiagonal(SAMPLES), "l": fb.FisherDiagonal(SAMPLES)}
        found = swept(case, jax.random.key(0), e=fb.GGNDiagonal(), **sampled)
        assert_close(found["e"], exact)
        assert_close(found["s"], exact, 0.1)
        assert_close(found["l"], exact, 0.1)


def test_labels_of_ones_own():
    case = zoo.Case(
        lambda w, x: x * w, lambda z, y: (z - y) ** 2, 2.0, (normal(1, 4), normal(2, 4))
    )
    with pytest.raises(ValueError, match="label="):
        swept(case, key=jax.random.key(0), f=fb.FisherDiagonal())
    found = swept(case, jax.random.key(0), f=fb.FisherDiagonal(label=lambda key, z: z - 0.5))
    assert_close(found["f"], jnp.mean(case.batch[0] ** 2))  # the gradient is 2 · 0.5 · x
    kron = fb.Kronecker(3, label=lambda key, z: z - 0.5)
    known = case._replace(loss=fb.losses.squared_error)
    of_model, of_loss = (
        swept(known, jax.random.key(0), f=fb.FisherDiagonal(label=label))["f"]
        for label in ("model", None)
    )
    assert_close(of_model, of_loss)
    assert_close(dense(swept(case, jax.random.key(0), k=kron)["k"])[0, 0], found["f"])


def test_labels_and_columns_see_the_whole_prediction():
    """Also what of it has no derivative."""

    class FirstRow(fb.Quantity):
        columns = staticmethod(lambda example: ({"z": jnp.eye(3)[:1]}, None))

        def extract(self, gradients):
            return gradients.total()

    case = zoo.Case(
        lambda w, x: {"best": jnp.argmax(x @ w), "z": x @ w},
        lambda z, y: fb.losses.squared_error(z["z"], y) + z["z"][z["best"]],
        normal(0, 2, 3),
        (normal(1, 4, 2), normal(2, 4, 3)),
    )
    own = fb.FisherDiagonal(label=lambda key, z: z["z"] + z["best"])
    found = swept(case, jax.random.key(0), f=own, row=FirstRow())
    x, z = case.batch[0], case.batch[0] @ case.params
    best = jnp.argmax(z, axis=1)[:, None]
    slope = -best + jax.nn.one_hot(best[:, 0], 3)  # of the two terms of the loss
    assert_close(found["f"], jnp.einsum("ni,no->io", x**2, slope**2) / 4)
    assert_close(found["row"], jnp.outer(x.mean(0), jnp.eye(3)[0]))


# --- the Hessian ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_hessians_diagonal_of_a_piecewise_linear_network():
    case = zoo.CASES["relu_net"](jax.random.key(0))
    assert_close(swept(case, h=fb.HessianDiagonal())["h"], naive.hessian_diagonal(case))
    each = swept(case, h=fb.HessianDiagonal(per_example=True))["h"]
    assert_close(naive.mean(each), naive.hessian_diagonal(case))


def test_what_is_flat_has_no_curvature():
    """A rounded value with the derivative of the value itself: a straight-through estimator."""

    def model(w, x):
        z = x @ w
        return z + jax.lax.stop_gradient(jnp.round(z) - z) + jnp.sign(z)

    case = zoo.Case(
        model, fb.losses.squared_error, normal(0, 2, 3), (normal(1, 4, 2), normal(2, 4, 3))
    )
    found = swept(case, h=fb.HessianDiagonal())["h"]
    assert_close(found, jnp.mean(case.batch[0] ** 2, axis=0)[:, None] * jnp.ones((1, 3)))


def still(w):
    return jax.lax.stop_gradient(jnp.max(w))


straight_through = jax.custom_jvp(jnp.sign)
straight_through.defjvp(lambda x, t: (straight_through(x[0]), t[0]))


@jax.custom_vjp
def clipped(x):
    return jnp.clip(x, -1, 1)


clipped.defvjp(
    lambda x: (jnp.clip(x, -1, 1), x), lambda x, ct: (jnp.where(jnp.abs(x) < 1, ct, 0.0),)
)


@jax.custom_vjp
def sine(x):
    return jnp.sin(x)


sine.defvjp(lambda x: (jnp.sin(x), jnp.cos(x)), lambda slope, ct: (slope * ct,))


@pytest.mark.parametrize(
    ("primitive", "model"),
    [
        (None, lambda w, x: x * straight_through(w)),
        (None, lambda w, x: clipped(x * w) + jax.nn.relu6(x * w) + jnp.abs(w)),
        (None, lambda w, x: x * jnp.fft.rfft(w).real[0]),
        (None, lambda w, x: jnp.tile(jnp.stack([x * w, w]), 2).max(0)[:3] + lax.cummax(w)),
        (None, lambda w, x: w * lax.while_loop(lambda s: s < 9, lambda s: 2 * s, still(w))),
        ("mul", lambda w, x: x * straight_through(w) * w),
        ("mul", lambda w, x: x * jnp.mean(jnp.abs(w)) * straight_through(w)),
        ("custom_vjp_call", lambda w, x: sine(x * w)),
        ("abs", lambda w, x: x * jnp.abs(w[0] + 1j * w[1])),
        ("sign", lambda w, x: x * jnp.sign(jnp.fft.fft(w)).real),
    ],
)
@pytest.mark.slow
def test_functions_count_for_what_their_rules_say(primitive, model):
    """And moduli of complex numbers are curved."""
    batch = (normal(1, 4, 3), normal(2, 4, 3))
    case = zoo.Case(model, fb.losses.squared_error, jnp.array([0.5, -1.0, 2.0]), batch)
    if primitive is None:
        found = swept(case, h=fb.HessianDiagonal())["h"]
        assert_close(found, naive.hessian_diagonal(case))
    else:
        with pytest.raises(ValueError, match=f"'{primitive}' at .*py:"):
            swept(case, h=fb.HessianDiagonal())


def test_a_loss_is_separable_by_its_rules():
    """A `custom_jvp` function's curvature is that of its rule, whatever its body looks like."""
    mixing = jax.custom_jvp(lambda z: z * 1.0)
    mixing.defjvp(lambda z, t: (mixing(z[0]), t[0] * jnp.sum(z[0])))
    case = zoo.Case(
        lambda w, x: w * x, lambda z, y: jnp.sum(mixing(z)), jnp.ones(3), (jnp.ones((2, 3)),) * 2
    )
    assert_close(swept(case, h=fb.GGNBlock())["h"], jnp.ones((3, 3)))


def logistic(z, target):
    mask, label = target
    return jnp.sum(mask * (jax.nn.softplus(z) - label * z))


@pytest.mark.parametrize(
    ("loss", "logits", "target"),
    [
        (fb.losses.softmax_cross_entropy, jnp.array([0.0, 0.0, -1e9]), jnp.array(1)),
        (fb.losses.softmax_cross_entropy, jnp.array([0.0, 0.0, -jnp.inf]), jnp.array(1)),
        (fb.losses.softmax_cross_entropy, jnp.array([800.0, 0.0, 0.0]), jnp.array(0)),
        (logistic, jnp.zeros(3), (jnp.array([1.0, 1.0, 0.0]), jnp.array([0.0, 1.0, 1.0]))),
        (lambda z, y: jax.nn.logsumexp(z) - z[y], jnp.zeros(3), jnp.array(2)),  # equal eigenvalues
        (lambda z, y: jnp.sum((z - y) ** 4), jnp.zeros(3), jnp.zeros(3)),
    ],
    ids=["masked", "at -inf", "saturated", "masked logistic", "uniform", "flat"],
)
@pytest.mark.slow
def test_curvature_is_differentiated_where_the_losss_is_singular(loss, logits, target):
    w = jnp.array([0.3, -0.2, 0.1])

    def model(w, x):
        return logits + jnp.where(jnp.isfinite(logits), jnp.tanh(w * x) - jnp.tanh(w), 0)

    batch = jax.tree.map(lambda x: x[None], (jnp.array(1.0), target))

    def ours(w):
        return jnp.sum(fb.sweep(model, loss, d=fb.GGNDiagonal())(w, batch)["d"] * jnp.arange(3.0))

    def dense(w):
        j = jax.jacfwd(model)(w, 1.0)
        h = jax.hessian(lambda z: loss(z, target))(model(w, 1.0))
        return jnp.einsum("ci,cd,di,i->", j, h, j, jnp.arange(3.0))

    assert_close(jax.jit(jax.grad(ours))(w), jax.grad(dense)(w))


def test_derivatives_of_a_root_of_an_indefinite_matrix():
    """Those of what is made of it: the matrix, and its positive part."""
    basis, _ = jnp.linalg.qr(normal(0, 5, 5))
    h = (basis * jnp.array([2.0, 0.5, 0.5, -0.5, -3.0])[None]) @ basis.T
    change = normal(1, 5, 5)
    change = change + change.T

    def parts(h):
        rows, signs = _signed_root(h)
        positive = jnp.where(signs[:, None] > 0, rows, 0)
        return rows.T @ (signs[:, None] * rows), positive.T @ positive

    def spectral(h, f):
        values, vectors = np.linalg.eigh(h)
        return (vectors * f(values)[None]) @ vectors.T

    _, (whole, positive) = jax.jvp(parts, (h,), (change,))
    assert_close(whole, change)
    step = 1e-6
    above, below = (
        spectral(np.asarray(h + s * change), lambda x: np.maximum(x, 0)) for s in (step, -step)
    )
    np.testing.assert_allclose(positive, (above - below) / (2 * step), atol=1e-7)


@pytest.mark.slow
def test_a_concave_loss_has_a_negative_diagonal():
    case = zoo.Case(
        lambda w, x: jax.nn.relu(x @ w[:, 0] + 2) * w[0, 1],
        lambda z, y: jnp.cos(z - y),
        normal(0, 3, 2) + 1,
        (normal(1, 4, 3) / 9, normal(2, 4)),
    )
    # As one parameter w meets itself, which is refused.
    apart = case._replace(
        model=lambda p, x: jax.nn.relu(x @ p["w"] + 2) * p["v"],
        params={"w": case.params[:, 0], "v": case.params[0, 1]},
    )
    found = swept(apart, h=fb.HessianDiagonal())["h"]
    assert_close(found, naive.hessian_diagonal(apart))
    assert found["v"] < 0


@pytest.mark.parametrize(
    ("name", "primitive"), [("mlp", "tanh"), ("low_rank", "tanh"), ("tied_linear", "dot_general")]
)
def test_curved_models_are_refused_with_the_line(name, primitive):
    case = zoo.CASES[name](jax.random.key(0))
    with pytest.raises(ValueError, match=f"'{primitive}' at .*py:") as raised:
        swept(case, h=fb.HessianDiagonal())
    assert "\n" not in str(raised.value)


# --- pairs ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_dots_with_a_second_batch_are_influences():
    case = zoo.CASES["mlp"](jax.random.key(0))
    other = (normal(5, 3, 5), jnp.array([0, 2, 1]))
    found = swept(case, dots=fb.ExampleDots(other))["dots"]
    g, h = (
        jnp.concatenate([x.reshape(len(x), -1) for x in jax.tree.leaves(tree)], axis=1)
        for tree in (
            naive.example_gradients(case),
            naive.example_gradients(case._replace(batch=other)),
        )
    )
    assert_close(found, g @ h.T)
    with pytest.raises(ValueError, match="second batch"):
        swept(case, dots=fb.ExampleDots((normal(5, 3, 6), other[1])))
    scaled = fb.sweep(
        lambda p, x, s: case.model(p, x * s), case.loss, d=fb.ExampleDots((*other, normal(6, 3)))
    )
    alike = fb.sweep(
        case.model, case.loss, d=fb.ExampleDots((other[0] * normal(6, 3)[:, None], other[1]))
    )
    ones = np.ones(len(case.batch[1]))
    assert_close(scaled(case.params, case.batch, ones)["d"], alike(case.params, case.batch)["d"])


def test_parts_of_the_gram_matrix_add_up():
    case = zoo.CASES["conv1d_scanned"](jax.random.key(0))
    found = swept(case, gram=fb.Gram(), parts=fb.Gram(per_leaf=True), norms=fb.JacobianNorms())
    assert jax.tree.structure(found["parts"]) == jax.tree.structure(case.params)
    assert_close(sum(jax.tree.leaves(found["parts"])), found["gram"])
    assert_close(jnp.einsum("ncnc->nc", found["gram"]), found["norms"])


@pytest.mark.slow
def test_many_gradients_are_formed_a_few_at_a_time(monkeypatch):
    """With room for one gradient only, the results are the same."""
    case = zoo.CASES["convnet"](jax.random.key(0))
    quantities = {
        "squares": fb.GGNDiagonal(),
        "norms": fb.JacobianNorms(),
        "moment": fb.SecondMoment(),
        "each": fb.ExampleNorms(),
    }
    expected = swept(case, **quantities)
    monkeypatch.setattr("fbackprop.groups.BLOCK", 1)
    assert_close(swept(case, **quantities), expected, 1e-12)


def test_columns_of_ones_own():
    """Rows of the Jacobian for two of the outputs only."""

    class Norms(fb.Quantity):
        over = "examples"

        @property
        def columns(self):
            return first_two

        def extract(self, gradients):
            return gradients.norms()

    def first_two(example):
        return jnp.eye(len(example.prediction))[:2], None

    case = zoo.CASES["mlp"](jax.random.key(0))
    found = swept(case, two=Norms(), all=fb.JacobianNorms())
    assert_close(found["two"], found["all"][:, :2])


# --- quantities of one's own ----------------------------------------------------------------------


def test_a_quantity_of_ones_own():
    class GradientConfusion(fb.Quantity):
        """The smallest cosine between two examples' gradients."""

        over = "pairs"

        def extract(self, gradients):
            dots = gradients.dots()[:, 0, :, 0]
            norms = jnp.sqrt(jnp.diagonal(dots))
            return jnp.min(dots / norms[:, None] / norms[None])

    case = zoo.CASES["mlp"](jax.random.key(0))
    g = jnp.concatenate(
        [x.reshape(zoo.N, -1) for x in jax.tree.leaves(naive.example_gradients(case))], axis=1
    )
    g = g / jnp.linalg.norm(g, axis=1, keepdims=True)
    assert_close(swept(case, c=GradientConfusion())["c"], jnp.min(g @ g.T))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("vectors", ["joint", "block"])
def test_an_example_takes_one_branch(sharing, vectors):
    """What the weight would have met in the others is no place: with one example, blocks are exact.

    The branches hold a table, a weight used in both of them, and one in a branch of a branch.
    """

    def model(p, x):
        return jax.lax.cond(
            x[0] > 0,
            lambda: 2 * (x @ p["w"]) + p["b"],
            lambda: jax.lax.cond(
                x[1] > 0, lambda: x @ p["w"] + p["b"], lambda: p["table"][jnp.int32(x[2])]
            ),
        )

    params = {"w": normal(0, 3, 2), "b": normal(1, 2), "table": normal(2, 4, 2)}
    quantities = {"k": fb.Kronecker(sharing=sharing, vectors=vectors), "g": fb.GGNBlock()}
    run = compiled(fb.sweep(model, fb.losses.squared_error, **quantities))
    for x in ([1.0, 2.0, 3.0], [-1.0, 2.0, 3.0], [-1.0, -2.0, 3.0]):
        found = run(params, (jnp.array([x]), normal(3, 1, 2)))
        for name in ("w", "table") + (("b",) if vectors == "block" else ()):
            blocks = fb.KroneckerFactors(found["k"][name])
            assert_close(blocks.dense(), found["g"][name])


@pytest.mark.slow
def test_lookups_in_branches():
    def model(p, i):
        return jax.lax.cond(i % 2 == 0, lambda: p["table"][i], lambda: p["other"])

    params = {"table": normal(0, 4, 2), "other": normal(1, 2)}
    batch = jnp.array([2, 2, 1, 1]), normal(2, 4, 2)
    found = fb.sweep(model, fb.losses.squared_error, k=fb.Kronecker(), e=fb.ExampleGradients())(
        params, batch
    )
    assert_close(found["k"]["table"][0].a, jnp.array([[0, 0, 0.5, 0]]))
    assert not np.any(found["e"]["table"][2:])


LOOKUPS = {
    "slice": lambda table, i: jax.lax.dynamic_index_in_dim(table, i, keepdims=False),
    "clip": lambda table, i: table.at[i].get(mode="clip", wrap_negative_indices=False),
    "fill": lambda table, i: table.at[i].get(
        mode="fill", fill_value=0, wrap_negative_indices=False
    ),
}


@pytest.mark.parametrize(
    ("index", "rows"), [(np.uint8(255), 256), (np.int8(-128), 100), (np.uint32(2**32 - 1), 100)]
)
@pytest.mark.parametrize("name", LOOKUPS)
def test_lookups_in_branches_by_the_extremes_of_their_dtypes(name, index, rows):
    def model(p, x):
        return jax.lax.cond(x["taken"], LOOKUPS[name], lambda table, i: table[1], p, x["i"])

    batch = {"i": jnp.full(2, index), "taken": jnp.array([True, False])}, jnp.zeros((2, 2))
    case = zoo.Case(model, fb.losses.squared_error, normal(0, rows, 2), batch)
    found = swept(case, each=fb.ExampleGradients(), norms=fb.ExampleNorms())
    assert_close(found["each"], naive.example_gradients(case))
    assert_close(found["norms"], jnp.sum(naive.example_gradients(case) ** 2, axis=(1, 2)))


@pytest.mark.parametrize("vectors", ["block", "diagonal"])
@pytest.mark.slow
def test_a_bias_with_axes_of_one_is_a_vector(vectors):
    def model(p, x):
        return jnp.tanh(x[None] + p).sum((1, 2)) * jnp.arange(1.0, 4.0)

    params, x = (
        jnp.array([0.1, -0.4, 0.7])[:, None, None],
        jnp.sin(jnp.arange(8.0)).reshape(2, 2, 2),
    )
    quantities = {"k": fb.Kronecker(vectors=vectors), "g": fb.GGNBlock()}
    found = fb.sweep(model, fb.losses.softmax_cross_entropy, **quantities)(
        params, (x, jnp.arange(2))
    )
    expected = found["g"] if vectors == "block" else jnp.diag(jnp.diag(found["g"]))
    np.testing.assert_allclose(fb.KroneckerFactors(found["k"]).dense(), expected, atol=1e-12)
