"""The sweep itself: batches in pieces, weights, keys, JAX's transformations, wrong arguments."""

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
import zoo
from agreement import two_devices
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from naive import assert_close, compiled

import fbackprop as fb


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


FIRST = {
    "gradient": fb.Gradient(),
    "each": fb.ExampleGradients(),
    "clipped": fb.ClippedGradient(0.5),
    "variance": fb.Variance(),
    "noise": fb.GradientNoiseScale(),
    "dots": fb.ExampleDots(),
}
SECOND = {
    "diagonal": fb.GGNDiagonal(),
    "gram": fb.Gram(weighted=True),
    "kron": fb.Kronecker(),
    "sampled": fb.GGNDiagonal(2),
}


def case():
    return zoo.CASES["sliced_stack"](jax.random.key(0))


def swept(of, chunk=None, **quantities):
    run = fb.sweep(of.model, of.loss, chunk=chunk, **(quantities or FIRST | SECOND))
    return compiled(run)(of.params, of.batch, key=jax.random.key(1))


@pytest.fixture(scope="module")
def whole():
    with jax.enable_x64(True):
        return swept(case())


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.slow
def test_pieces_make_the_whole(whole, chunk):
    assert_close(swept(case(), chunk), whole, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [2, 9])
def test_pieces_of_other_sizes_make_the_whole(whole, chunk):
    assert_close(swept(case(), chunk), whole, 1e-12)


@pytest.mark.parametrize("vectors", ["joint", "block", "diagonal"])
def test_factors_of_vectors_in_pieces(vectors):
    of = case()._replace(
        model=lambda p, x: jnp.tanh((x @ p["w"] + p["b"]) * p["s"]),
        loss=fb.losses.squared_error,
        params={"w": W.T, "b": np.ones(2), "s": np.array([0.5, 2.0])},
        batch=(X, Y),
    )
    pieces, expected = (
        swept(of, chunk, k=fb.Kronecker(vectors=vectors))["k"] for chunk in (3, None)
    )
    assert_close(pieces, expected, 1e-12)


def test_other_quantities_do_not_change_the_draws(whole):
    alone = swept(case(), sampled=SECOND["sampled"])
    assert_close(alone["sampled"], whole["sampled"], 1e-12)


def test_a_permuted_batch_permutes(whole):
    of, order = case(), jnp.array([2, 0, 3, 1])
    permuted = of._replace(batch=jax.tree.map(lambda x: x[order], of.batch))
    found = swept(permuted, **FIRST)
    assert_close(found["gradient"], whole["gradient"], 1e-12)
    assert_close(found["each"], jax.tree.map(lambda x: x[order], whole["each"]), 1e-12)
    assert_close(found["dots"], whole["dots"][order][:, order], 1e-12)


def test_a_weight_of_zero_leaves_an_example_out():
    of = case()
    weights = jnp.array([2.0, 0.0, 2.0, 2.0])
    keep = jnp.array([0, 2, 3])
    fewer = of._replace(batch=jax.tree.map(lambda x: x[keep], of.batch))
    quantities = {k: q for k, q in (FIRST | SECOND).items() if k not in ("sampled", "gram")}
    run = compiled(fb.sweep(of.model, of.loss, **quantities))
    found, expected = run(of.params, of.batch, weights=weights), run(of.params, fewer.batch)
    for name in ("loss", "gradient", "clipped", "variance", "noise", "diagonal", "kron"):
        assert_close(found[name], expected[name], 1e-12)
    assert len(found["dots"]) == 4  # examples' own quantities are not weighted


def test_a_summed_loss_sums_gradient_and_curvature(whole):
    of = case()
    weights = jnp.array([1.0, 3.0, 0.5, 2.0])
    quantities = FIRST | {k: SECOND[k] for k in ("diagonal", "gram", "kron")}
    run = {r: fb.sweep(of.model, of.loss, reduction=r, **quantities) for r in ("sum", "mean")}
    total, mean = (compiled(run[r])(of.params, of.batch, weights=weights) for r in ("sum", "mean"))
    for name in ("loss", "gradient", "diagonal", "gram"):
        times = jax.tree.map(lambda x: x * 6.5, mean[name])
        assert_close(total[name], times, 1e-12)
    for name in ("each", "clipped", "variance", "dots"):
        assert_close(total[name], mean[name], 1e-12)
    blocks = zip(
        *(jax.tree.leaves(x["kron"], is_leaf=_is_block) for x in (total, mean)), strict=True
    )
    for a, b in blocks:
        assert_close(a.dense(), 6.5 * b.dense(), 1e-12)


def test_a_sum_over_examples_of_no_weight_is_zero():
    """As of a batch that is all padding; where the weights are known it is refused."""
    sweep = fb.sweep(linear, SQUARED, reduction="sum", g=fb.Gradient(), d=fb.GGNDiagonal())
    run = jax.jit(jax.vmap(lambda weights: sweep(W, (X, Y), weights=weights)))
    found = run(jnp.stack([jnp.zeros(4), jnp.ones(4)]))
    unweighted = jax.jit(sweep)(W, (X, Y))
    assert_close(found, jax.tree.map(lambda x: jnp.stack([jnp.zeros_like(x), x]), unweighted))


@pytest.mark.parametrize("quantity", [fb.GGNDiagonal, fb.FisherDiagonal, fb.HessianDiagonal])
def test_each_examples_curvature_is_its_own(quantity):
    run = {
        r: fb.sweep(linear, SQUARED, reduction=r, d=quantity(per_example=True))
        for r in ("sum", "mean")
    }
    key = jax.random.key(0)
    assert_close(*(run[r](W, (X, Y), key=key)["d"] for r in ("sum", "mean")))


def _is_block(x):
    return isinstance(x, fb.KroneckerBlock)


def test_the_sweep_maps_over_parameters_and_batches(whole):
    of = case()
    run = fb.sweep(of.model, of.loss, norms=fb.ExampleNorms(), diagonal=fb.GGNDiagonal())
    scales = jnp.array([1.0, 0.7])
    ensemble = jax.tree.map(lambda p: jnp.stack([p * s for s in scales]), of.params)
    found = compiled(jax.vmap(run, (0, None)))(ensemble, of.batch)
    for k, s in enumerate(scales):
        one = compiled(run)(jax.tree.map(lambda p, s=s: p * s, of.params), of.batch)
        assert_close(jax.tree.map(lambda x, k=k: x[k], found), one, 1e-12)


def test_a_quantity_can_be_differentiated():
    """The gradient of a norm: a Hessian-vector product."""
    of = zoo.CASES["mlp"](jax.random.key(0))
    norm = fb.sweep(of.model, of.loss, norms=fb.ExampleNorms())

    def ours(params):
        return norm(params, of.batch)["norms"].sum()

    def theirs(params):
        g = naive.example_gradients(of._replace(params=params))
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(g))

    expected = compiled(jax.grad(theirs))(of.params)
    assert_close(compiled(jax.grad(ours))(of.params), expected)
    assert_close(compiled(fb.grad(ours))(of.params), expected)


def test_the_clipped_sum_of_a_gradient_of_zero_can_be_differentiated():
    """A masked example has none."""
    batch = X, np.array([1, -1, 0, 1])
    clipped = fb.sweep(linear, fb.losses.softmax_cross_entropy, c=fb.ClippedGradient(0.1))

    def ours(w):
        return jnp.sum(clipped(w, batch)["c"] ** 2)

    w = np.array([[0.1, 0.2, 0.3], [0.0, -0.5, 1.0]])
    slope = (ours(w + 1e-6 * X[:2]) - ours(w - 1e-6 * X[:2])) / 2e-6
    assert_close(jnp.vdot(compiled(jax.grad(ours))(w), X[:2]), slope, 1e-6)


def test_the_weights_of_examples_can_be_differentiated():
    def of(weights):
        return fb.sweep(linear, SQUARED)(W, (X * [[1.0], [2], [3], [4]], Y), weights=weights)[
            "loss"
        ]

    weights = jnp.array([1.0, 2.0, 0.5, 1.0])
    assert_close(jax.grad(of)(weights), jax.jit(jax.grad(of))(weights))


def test_models_with_references():
    """The parameters' values go through references that the model makes and writes to."""

    def model(w, x):
        total = jax.new_ref(jnp.zeros(2))
        for row in jax.new_ref(w)[...]:
            total[...] += jnp.tanh(row * x)
        return total[...]

    def plain(w, x):
        return sum(jnp.tanh(row * x) for row in w)

    w, batch = np.array([[0.5, -1.0], [0.2, 0.7]]), (X[:, :2], Y)
    found, expected = (
        fb.sweep(f, SQUARED, g=fb.Gradient(), n=fb.ExampleNorms(), d=fb.GGNDiagonal())(w, batch)
        for f in (model, plain)
    )
    assert_close(found, expected)


@pytest.mark.parametrize(
    "index", [np.uint32(2**32 - 1), np.int64(2**33 + 1), np.int64(-(2**33)), np.uint8(200)]
)
@pytest.mark.parametrize("mode", ["clip", "fill", "slice"])
def test_lookups_with_any_index(index, mode):
    def model(table, i):
        if mode == "slice":
            return jax.lax.dynamic_index_in_dim(table, i, 0, keepdims=False)
        return jnp.take(table, i, axis=0, mode=mode)

    table = np.arange(600.0).reshape(300, 2)
    batch = np.array([index, 1], index.dtype), Y[:2]
    found = fb.sweep(model, SQUARED, each=fb.ExampleGradients())(table, batch)["each"]

    row = int(np.clip(int(index), 0, len(table) - 1))
    slope = np.where(np.arange(len(table))[:, None] == row, table[row] - 1, 0)
    # The value that fills has no row; narrow indices lose theirs under `jax.grad`.
    outside = mode == "fill" and row != int(index)
    assert_close(found[0], np.zeros_like(table) if outside else slope)


def test_without_jit_and_with_bare_arrays():
    def model(w, x):
        return jnp.tanh(w @ x)

    w, x, y = jnp.array([[0.5, -1.0]]), np.array([[1.0, 2.0], [0.0, 1.0]]), np.zeros((2, 1))
    found = fb.sweep(model, fb.losses.squared_error, each=fb.ExampleGradients())(w, (x, y))
    expected = jax.vmap(
        jax.grad(lambda w, x, y: fb.losses.squared_error(model(w, x), y)), (None, 0, 0)
    )
    assert_close(found["each"], expected(w, x, y))


def test_single_precision_stays_single():
    with jax.enable_x64(False):
        of = case()
        found = swept(of, **(FIRST | SECOND))
        for path, leaf in jax.tree_util.tree_leaves_with_path(found):
            assert leaf.dtype == jnp.float32, path


def test_half_precision_sums_its_squares_in_single():
    def model(w, x):
        return x @ w

    w, x = jnp.ones((64, 4), jnp.bfloat16), jnp.full((3, 64), 0.1, jnp.bfloat16)
    loss = fb.losses.squared_error
    run = compiled(fb.sweep(model, loss, gradient=fb.Gradient(), norms=fb.ExampleNorms()))
    found = run(w, (x, jnp.zeros((3, 4), jnp.bfloat16)))
    assert found["gradient"].dtype == jnp.bfloat16 and found["norms"].dtype == jnp.float32
    exact = run(w.astype(float), (x.astype(float), jnp.zeros((3, 4))))["norms"]
    np.testing.assert_allclose(found["norms"], exact, rtol=0.02)


# --- random models, further inputs ----------------------------------------------------------------


def dropout(params, x, mask, *, key):
    keep = jax.random.bernoulli(key, 0.5, x.shape)
    return (x * keep * mask) @ params


def test_each_example_has_its_own_key_and_further_inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    w = jax.random.normal(keys[0], (6, 2))
    x, mask = jax.random.normal(keys[1], (5, 6)), jax.random.bernoulli(keys[2], 0.8, (5, 6))
    y = jnp.ones((5, 2))
    quantities = {"each": fb.ExampleGradients(), "gradient": fb.Gradient()}
    for chunk in (None, 2):
        run = fb.sweep(dropout, fb.losses.squared_error, chunk=chunk, **quantities)
        found = compiled(run)(w, (x, y), mask, key=jax.random.key(7))
        assert_close(jnp.mean(found["each"], axis=0), found["gradient"])
        active = found["each"].any(axis=2)
        assert not (active & ~mask).any()  # masked inputs have no gradient
        assert len({tuple(row.tolist()) for row in active}) > 1  # and each example its own dropout
        if chunk is None:
            expected = found
    assert_close(found, expected)


def test_a_key_with_a_default_may_be_left_out():
    def model(w, x, key=None):
        noise = 0 if key is None else jax.random.normal(key, x.shape)
        return (x + noise) @ w

    w, x, y = jnp.ones((3, 2)), jnp.ones((4, 3)), jnp.zeros((4, 2))
    run = compiled(fb.sweep(model, fb.losses.squared_error, each=fb.ExampleGradients()))
    calm, noisy = run(w, (x, y))["each"], run(w, (x, y), key=jax.random.key(0))["each"]
    assert_close(calm, jnp.full((4, 3, 2), 3.0))
    assert len(set(noisy.reshape(4, -1).sum(1).tolist())) == 4


def test_models_may_close_over_traced_values():
    def norms(scale, w, x):
        run = fb.sweep(lambda w, x: scale * (x @ w), fb.losses.squared_error, n=fb.ExampleNorms())
        return run(w, (x, jnp.zeros((4, 2))))["n"]

    w, x, scales = jnp.ones((3, 2)), jnp.ones((4, 3)), jnp.array([1.0, 2.0])
    found = compiled(jax.vmap(norms, (0, None, None)))(scales, w, x)
    assert_close(found[1], 16 * found[0])
    slope = compiled(jax.grad(lambda s: norms(s, w, x).sum()))(1.0)
    assert_close(slope, 4 * found[0].sum())


def test_targets_may_be_absent():
    def loss(z, _):
        return jnp.sum(z**2) / 2

    w, x = jnp.ones((3, 2)), jnp.arange(6.0).reshape(2, 3)
    found = compiled(fb.sweep(lambda w, x: x @ w, loss, each=fb.ExampleGradients()))(w, (x, None))
    assert_close(found["each"], jnp.einsum("ni,no->nio", x, x @ w))


# --- wrong arguments ------------------------------------------------------------------------------


def linear(w, x):
    return w @ x


W, X, Y = np.ones((2, 3)), np.ones((4, 3)), np.ones((4, 2))
SQUARED = fb.losses.squared_error


class Own(fb.Quantity):
    """A user's, of whatever columns."""

    over = "examples"

    def __init__(self, columns=None, over="examples", extract=lambda gradients: gradients.norms()):
        self.made, self.over, self.extract = columns, over, extract

    @property
    def columns(self):
        return self.made or super().columns


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (jnp.ones((2, 2)), "pair (columns, signs)"),
        ((jnp.ones((2, 1)), None), "but are [(2, 1)]"),
        ((jnp.ones(2), None), "like the prediction, [(2,)]"),
        (([jnp.ones((1, 2))] * 2, None), "but are [(1, 2), (1, 2)]"),
        (([], None), "but are []"),
        ((jnp.ones((3, 2)), jnp.ones(2)), "signs of 3 columns must have shape (3,)"),
    ],
)
def test_columns_that_do_not_fit_are_refused(columns, words):
    run = fb.sweep(linear, SQUARED, own=Own(lambda example: columns))
    error = ValueError if isinstance(columns, tuple) else TypeError
    assert words in _raised(run, W, (X, Y), error=error)


def test_columns_of_ones_own():
    """They take the prediction's dtype, and their signs."""
    run = fb.sweep(
        linear, SQUARED, own=Own(lambda example: (jnp.eye(2, dtype=int), jnp.array([1.0, -1.0])))
    )
    np.testing.assert_allclose(run(W, (X, Y))["own"], 3 * np.ones((4, 2)))


def test_results_without_an_axis_of_examples_are_refused():
    run = fb.sweep(linear, SQUARED, own=Own(extract=lambda gradients: gradients.norms()[0]))
    assert "own: a quantity over" in _raised(run, W, (X, Y))


def test_keys_are_checked():
    run = fb.sweep(linear, SQUARED, draws=fb.GGNDiagonal(1))
    for key in (0, jax.random.split(jax.random.key(0)), np.ones(2)):
        assert "pass one key" in _raised(run, W, (X, Y), key=key, error=TypeError)
    run(W, (X, Y), key=jax.random.PRNGKey(0))


def test_no_columns_and_no_predictions():
    def one_class(w, x):
        return jnp.tanh(w) @ x

    labels = np.zeros(4, int)
    run = fb.sweep(one_class, fb.losses.softmax_cross_entropy, q=fb.Gram(weighted=True))
    assert run(W[:1], (X, labels))["q"].shape == (4, 0, 4, 0)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: fb.sweep(None, SQUARED), TypeError, "model"),
        (lambda: fb.sweep(linear, 3), TypeError, "loss"),
        (lambda: fb.sweep(linear, SQUARED, reduction="average"), ValueError, "mean"),
        (lambda: fb.sweep(linear, SQUARED, chunk=0), ValueError, "chunk=0"),
        (lambda: fb.sweep(linear, SQUARED, chunk=1.5), ValueError, "chunk"),
        (lambda: fb.sweep(linear, SQUARED, loss=fb.Gradient()), TypeError, "loss"),
        (lambda: fb.sweep(linear, SQUARED, g=fb.Gradient), TypeError, "fb.Gradient()"),
        (lambda: fb.ClippedGradient(0.0), ValueError, "max_norm"),
        (lambda: fb.Kronecker(sharing="both"), ValueError, "reduce"),
        (lambda: fb.Kronecker(label="model"), ValueError, "samples"),
        (lambda: fb.GGNDiagonal(0), ValueError, "samples"),
        (lambda: fb.GGNDiagonal(1.5), ValueError, "samples"),
        (lambda: fb.FisherDiagonal(0), ValueError, "samples"),
        (lambda: fb.GGNDiagonal(True), ValueError, "samples=True"),
        (lambda: fb.sweep(linear, SQUARED, chunk=True), ValueError, "chunk=True"),
        (lambda: fb.ClippedGradient(np.float32(-1)), ValueError, "max_norm=-1"),
        (lambda: fb.ClippedGradient(None), TypeError, "max_norm=None"),
        (lambda: fb.ClippedGradient("1"), TypeError, "max_norm='1'"),
        (lambda: fb.ClippedGradient(np.ones(2)), TypeError, "number"),
        (lambda: fb.ClippedGradient(1j), TypeError, "number"),
        (lambda: fb.ClippedGradient({}), TypeError, "number"),
        (lambda: fb.ClippedGradient(True), TypeError, "number"),
        (lambda: fb.FisherDiagonal(3, empirical=True), ValueError, "leave out samples="),
        (lambda: fb.explain_sites(linear, jnp.ones(2) * 1j, X[0]), TypeError, "complex"),
        (lambda: fb.explain_sites(linear, "w", X[0]), TypeError, "no array but 'w'"),
        (lambda: fb.sweep(linear, SQUARED)(W, (None, None)), ValueError, "holds no arrays"),
        (lambda: fb.sweep(linear, SQUARED, q=Own(over="batch")), ValueError, "q: over='batch'"),
        (lambda: fb.Kronecker(1, label="data"), ValueError, "label='data'"),
        (lambda: fb.FisherDiagonal(label="data"), ValueError, "label='data'"),
    ],
)
def test_wrong_settings_are_refused(build, error, words):
    with pytest.raises(error, match=words.replace("(", r"\(").replace(")", r"\)")) as raised:
        build()
    assert "\n" not in str(raised.value)


def _raised(run, *args, error=ValueError, **kwargs) -> str:
    with pytest.raises(error) as raised:
        run(*args, **kwargs)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_wrong_batches_are_refused():
    run = fb.sweep(linear, SQUARED, norms=fb.ExampleNorms())
    assert "pair" in _raised(run, W, X)
    assert "pair" in _raised(run, W, (X, Y, Y))
    assert "inputs: 4, targets: 3" in _raised(run, W, (X, Y[:3]))
    assert "empty" in _raised(run, W, (X[:0], Y[:0]))
    assert "scalar" in _raised(run, W, (X, 1.0))
    assert "weights" in _raised(run, W, (X, Y), weights=np.ones((4, 1)))
    assert "weights: 3" in _raised(run, W, (X, Y), weights=np.ones(3))
    assert "zero" in _raised(run, W, (X, Y), weights=np.zeros(4))
    assert "negative" in _raised(run, W, (X, Y), weights=np.array([1.0, -1.0, 1.0, 1.0]))
    assert "finite" in _raised(run, W, (X, Y), weights=np.array([1.0, np.nan, 1.0, 1.0]))
    assert "range: scale" in _raised(run, W, (X, Y), weights=np.full(4, 1e308))
    assert "real" in _raised(run, W, (X, Y), weights=np.ones(4) * 1j, error=TypeError)
    run = fb.sweep(linear, lambda z, y: (SQUARED(z, y), z), norms=fb.ExampleNorms())
    assert "is a tuple: return no more" in _raised(run, W, (X, Y), error=TypeError)
    run = fb.sweep(linear, SQUARED, own=fb.Quantity())
    assert "extract" in _raised(run, W, (X, Y), error=NotImplementedError)


def test_wrong_parameters_are_refused():
    run = fb.sweep(linear, SQUARED, norms=fb.ExampleNorms())
    assert "complex" in _raised(run, W + 1j, (X, Y), error=TypeError)
    named = fb.sweep(lambda p, x: p["w"] @ x, SQUARED, norms=fb.ExampleNorms())
    assert "['name']" in _raised(named, {"w": W, "name": "dense"}, (X, Y), error=TypeError)
    keyed = {"w": W, "key": jax.random.key(0)}
    assert "['key']" in _raised(named, keyed, (X, Y), error=TypeError)


def test_a_loss_must_be_a_scalar():
    run = fb.sweep(linear, lambda z, y: (z - y) ** 2, gradient=fb.Gradient())
    assert "(2,)" in _raised(run, W, (X, Y))
    run = fb.sweep(linear, lambda z, y: jnp.sum(z > y), gradient=fb.Gradient())
    assert "return a floating-point number" in _raised(run, W, (X, Y))


def test_predictions_without_derivatives_are_refused():
    run = fb.sweep(lambda w, x: jnp.argmax(w @ x), lambda z, y: 0.0 * z, n=fb.ExampleNorms())
    assert "int" in _raised(run, W, (X, Y), error=TypeError)


def test_curvature_of_complex_predictions_is_refused():
    def model(w, x):
        return (w @ x) * (1 + 2j)

    def loss(z, y):
        return jnp.sum(jnp.abs(z - y) ** 2)

    for quantity in (fb.GGNDiagonal(), fb.Kronecker(), fb.Gram(), fb.JacobianNorms()):
        run = fb.sweep(model, loss, q=quantity)
        assert "imaginary" in _raised(run, W, (X, Y), error=TypeError)
    assert "imaginary" in _raised(fb.GaussNewton, model, loss, W, (X, Y), error=TypeError)


def test_missing_keys_are_named():
    run = fb.sweep(linear, SQUARED, draws=fb.GGNDiagonal(1))
    assert "'draws'" in _raised(run, W, (X, Y))
    run = fb.sweep(lambda w, x, key: w @ x, SQUARED, gradient=fb.Gradient())
    assert "model takes a key" in _raised(run, W, (X, Y))


def test_strict_refuses_what_has_no_rule():
    from jax.extend.core import Primitive
    from jax.interpreters import ad, batching, mlir

    twice = Primitive("twice_of_test_sweep")
    twice.def_impl(lambda x: 2 * x)
    twice.def_abstract_eval(lambda x: x)
    ad.deflinear(twice, lambda ct: [2 * ct])
    batching.defvectorized(twice)
    mlir.register_lowering(twice, mlir.lower_fun(lambda x: 2 * x, multiple_results=False))

    def model(w, x):
        return twice.bind(w @ x)

    batch = (X, Y)
    found = fb.sweep(model, SQUARED, gradient=fb.Gradient())(W, batch)["gradient"]
    expected = fb.sweep(lambda w, x: 2 * (w @ x), SQUARED, gradient=fb.Gradient())(W, batch)
    assert_close(found, expected["gradient"])
    with pytest.raises(fb.MissingRule, match="twice_of_test_sweep"):
        fb.sweep(model, SQUARED, strict=True, gradient=fb.Gradient())(W, batch)


def test_columns_however_they_are_made():
    """Made anew whenever they are asked for; a method; one that cannot be hashed."""

    def unit(i, example):
        return jnp.eye(len(example.prediction))[i][None], None

    class Norms(fb.Quantity):
        over = "pairs"

        def extract(self, gradients):
            return gradients.norms()[:, 0]

    class Made(Norms):
        @property
        def columns(self):
            return lambda example: unit(1, example)

    class Method(Norms):
        def columns(self, example):
            return unit(1, example)

    class Direction:
        __hash__ = None

        def __call__(self, example):
            return unit(1, example)

    class Held(Norms):
        columns = Direction()

    found = fb.sweep(linear, SQUARED, a=Made(), b=Method(), c=Held())(W, (X, Y))
    for name in "abc":
        assert_close(found[name], np.sum(X**2, axis=1))


@pytest.mark.parametrize("chunk", [None, 2])
def test_what_is_extracted_is_arrays(chunk):
    class Named(fb.Quantity):
        def extract(self, gradients):
            return {"who": "text"}

    with pytest.raises(TypeError, match="q: a quantity extracts a pytree of arrays, but .* a str"):
        fb.sweep(linear, SQUARED, chunk=chunk, q=Named())(W, (X, Y))


def test_a_second_batch_that_is_none():
    for other in (X, {"x": X}, (X,)):
        run = fb.sweep(linear, SQUARED, dots=fb.ExampleDots(other=other))
        assert "dots: other must be a tuple" in _raised(run, W, (X, Y))
    assert "EigenFactors.blocks" in _raised(fb.EigenvalueCorrection, W, error=TypeError)


@pytest.mark.slow
def test_exports_with_a_symbolic_length():
    (t,) = jax.export.symbolic_shape("t")

    def model(p, x):
        return jnp.tanh(x @ p["w"] + p["b"][None]).sum(0) @ p["v"]

    shapes = {"w": (4, 3), "b": (3,), "v": (3, 2)}
    params = {name: jnp.full(shape, 0.3) for name, shape in shapes.items()}
    quantities = FIRST | {"diagonal": fb.GGNDiagonal(), "kron": fb.Kronecker()}
    sweep = jax.jit(fb.sweep(model, SQUARED, **quantities))
    types = params, (jax.ShapeDtypeStruct((3, t, 4), float), jax.ShapeDtypeStruct((3, 2), float))
    exported = jax.export.export(sweep)(*types)
    for length in (1, 6):
        batch = jnp.linspace(-1, 1, 12 * length).reshape(3, length, 4), jnp.ones((3, 2))
        found, expected = exported.call(params, batch), sweep(params, batch)
        assert_close(jax.tree.leaves(found), jax.tree.leaves(expected), 1e-12)


def test_parameters_without_gradients():
    """Nothing to differentiate: zeros of the right shapes."""
    run = fb.sweep(lambda p, x: x, SQUARED, norms=fb.ExampleNorms(), dots=fb.ExampleDots())
    found = run({}, (X, np.ones((4, 3))))
    assert found["norms"].shape == (4,) and found["dots"].shape == (4, 4)
    run = fb.sweep(lambda p, x: x + p["e"].sum(), SQUARED, **(FIRST | {"k": fb.Kronecker()}))
    assert run({"e": jnp.zeros(0)}, (X, np.ones((4, 3))))["gradient"]["e"].shape == (0,)


def test_of_one_class_and_of_no_layers():
    """No columns, no matrices."""
    one = fb.sweep(linear, fb.losses.softmax_cross_entropy, b=fb.GGNBlock(), k=fb.Kronecker())
    assert not np.any(one(W[:1], (X, np.zeros(4, int)))["b"])

    def model(stack, x):
        return jax.lax.scan(lambda h, w: (h @ w, None), x, stack)[0]

    none = fb.sweep(model, SQUARED, k=fb.Kronecker())(np.zeros((0, 3, 3)), (X, X))["k"]
    assert fb.KroneckerFactors(none).dense().shape == (0, 0)


def test_a_batch_on_an_explicit_mesh_is_refused():
    mesh = two_devices(AxisType.Explicit)
    with jax.set_mesh(mesh):
        x = jax.reshard(jnp.ones((4, 3)), P("i", None))
        with pytest.raises(ValueError, match=r"inputs are sharded over \['i'\] .*AxisType.Auto"):
            fb.sweep(jnp.dot, fb.losses.squared_error, g=fb.Gradient())(
                jnp.ones(3), (x, jnp.ones(4))
            )


def test_a_key_before_the_inputs_and_sizes_that_are_no_numbers():
    sweep = fb.sweep(lambda p, key, x: p @ x, fb.losses.squared_error, g=fb.Gradient())
    batch = jnp.ones((4, 3)), jnp.ones(4)
    with pytest.raises(TypeError, match="takes its key before its inputs"):
        sweep(jnp.ones(3), batch, key=jax.random.key(0))
    sizes = jax.export.symbolic_shape("b, 3")
    sweep = fb.sweep(jnp.dot, fb.losses.squared_error, g=fb.Gradient())
    step = jax.jit(lambda x: sweep(jnp.ones(3), (x, x[:, 0])))
    with pytest.raises(TypeError, match="inputs are b examples: a sweep is of a batch of known"):
        jax.export.export(step)(jax.ShapeDtypeStruct(sizes, jnp.float32))


def test_a_list_of_weights_may_be_traced():
    sweep = fb.sweep(jnp.dot, fb.losses.squared_error, g=fb.Gradient())
    batch = jnp.arange(12.0).reshape(4, 3), jnp.ones(4)

    def gradient(weights):
        return sweep(jnp.ones(3), batch, weights=weights)["g"]

    weights = [1.0, 0.0, 2.0, 1.0]
    np.testing.assert_allclose(jax.jit(gradient)(weights), gradient(weights), rtol=1e-6)


def test_labels_drawn_by_a_module_of_arrays():
    """Which cannot be hashed; the quantities that share it share their columns."""

    class Noisy:
        __hash__ = None
        scale = 0.5

        def __call__(self, key, z):
            return z + self.scale * jax.random.normal(key, z.shape)

    label = Noisy()
    sweep = fb.sweep(
        lambda p, x: x * p,
        lambda z, y: jnp.sum((z - y) ** 2),
        fisher=fb.FisherDiagonal(label=label),
        same=fb.FisherDiagonal(label=label),
    )
    out = sweep(jnp.ones(2), (jnp.ones((4, 2)), jnp.zeros((4, 2))), key=jax.random.key(0))
    np.testing.assert_array_equal(out["fisher"], out["same"])
    assert jnp.all(out["fisher"] > 0)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the order is the compiler's elsewhere")
@pytest.mark.slow
def test_clipping_scales_signals_in_their_own_place():
    """They are as large as the activations, which a gradient keeps as well."""
    network = fb.networks.mlp((784, 512, 512, 512, 10))
    params = network.init(jax.random.key(0))
    batch = jnp.ones((128, 784)), jnp.arange(128) % 10

    def memory(quantity):
        sweep = fb.sweep(network.apply, fb.losses.softmax_cross_entropy, q=quantity)
        compiled = jax.jit(sweep).lower(params, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(fb.ClippedGradient(1.0)) < 1.6 * memory(fb.Gradient())
