"""Curvature operators: products, solutions, diagonals and matrices, each against its definition."""

import re

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
import zoo
from jax.flatten_util import ravel_pytree

import fbackprop as fb
from fbackprop.curvature import cholesky, dual

CASES = [
    "mlp",
    pytest.param("tied_linear", marks=pytest.mark.slow),
    pytest.param("scanned_transformer", marks=pytest.mark.slow),
    pytest.param("conv1d_scanned", marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def gauss_newton(case):
    """The matrix by its definition, negative curvature of the loss left out; (P, P)."""
    leaves = jax.tree.leaves(naive.jacobians(case))
    j = jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in leaves], axis=2)
    x, y = case.batch

    def hessian(x, y):
        z, unravel = ravel_pytree(case.model(case.params, x))
        h = jax.hessian(lambda z: case.loss(unravel(z), y))(z)
        values, vectors = jnp.linalg.eigh(h)
        return (vectors * jnp.maximum(values, 0)[None]) @ vectors.T

    h = jax.vmap(hessian)(x, y)
    return jnp.einsum("nap,nab,nbq->pq", j, h, j) / len(j)


@pytest.mark.slow
def test_the_dual_operator_of_complex_weights_made_of_real_ones():
    """A layer of Fourier coefficients: what is read along a direction is real."""

    def model(p, x):
        f = jnp.fft.rfft(x)
        return jnp.fft.irfft(f.at[:3].multiply(p["re"] + 1j * p["im"]), n=8)

    params = {"re": jnp.array([0.5, -1.0, 0.3]), "im": jnp.array([0.1, 0.7, -0.4])}
    x, y = jnp.sin(jnp.arange(48.0)).reshape(2, 3, 8)
    rows = fb.sweep(model, fb.losses.squared_error, rows=fb.GGNRows())(params, (x, y))["rows"]
    for found, expected in behaves(rows, rows.dense()).values():
        naive.assert_close(found, expected)


@pytest.mark.slow
def test_conjugate_gradients_without_a_solution_are_nan():
    """Where the curvature is singular, for what is not in its range."""
    x = jnp.sin(jnp.arange(12.0)).reshape(3, 4)
    operator = fb.GaussNewton(jnp.dot, fb.losses.squared_error, jnp.zeros(4), (x, jnp.zeros(3)))
    inside = operator.matvec(jnp.array([1.0, -2.0, 0.5, 3.0]))
    naive.assert_close(operator.matvec(operator.solve(inside)), inside, 1e-5)
    assert jnp.all(jnp.isnan(operator.solve(jnp.arange(4.0))))
    assert jnp.all(jnp.isfinite(operator.solve(jnp.arange(4.0), damping=1e-3)))
    assert jnp.all(jnp.isfinite(operator.solve(jnp.arange(4.0), max_iterations=2)))


def test_products_of_an_objective():
    x, y = jnp.sin(jnp.arange(12.0)).reshape(3, 4), jnp.ones(3)
    problem = fb.Objective(jnp.dot, fb.losses.squared_error, jnp.ones(4), (x, y))
    for kind in (fb.GaussNewton, fb.Hessian):
        operator = kind.of(problem)
        naive.assert_close(operator.value, problem.value())
        naive.assert_close(operator.dense(), x.T @ x / 3)


def test_the_dual_solution_in_half_precision():
    """Products are rounded to the parameters' digits, so that the least damping is larger."""
    x = jax.random.normal(jax.random.key(0), (12, 40), jnp.bfloat16)
    y = jax.random.normal(jax.random.key(1), (12, 2), jnp.bfloat16)
    params = jnp.zeros((40, 2), jnp.bfloat16)
    step = fb.optim.step(lambda w, x: x @ w, fb.losses.squared_error, fb.optim.gauss_newton())
    state, losses = step.optimizer.init(params), []
    for _ in range(8):
        params, state, info = step(params, state, (x, y))
        losses.append(float(info["loss"]))
    assert losses[-1] < 1e-2 * losses[0] and max(losses[2:]) <= losses[1]


def wave(space):
    """Some vector of the space."""
    return space.unravel(jnp.sin(jnp.arange(space.size, dtype=space.dtype)))


def behaves(operator, matrix, damping=1e-2):
    """What an operator says of itself beside the same of its matrix."""
    space, v = operator.space, wave(operator.space)
    flat = space.ravel(v)
    damped = matrix + damping * jnp.eye(len(matrix))
    return {
        "matvec": (space.ravel(operator.matvec(v)), matrix @ flat),
        "solve": (space.ravel(operator.solve(v, damping)), jnp.linalg.solve(damped, flat)),
        "quadratic": (operator.quadratic(v), flat @ matrix @ flat),
        "diagonal": (space.ravel(operator.diagonal()), jnp.diagonal(matrix)),
        "trace": (operator.trace(), jnp.trace(matrix)),
        "dense": (operator.dense(), matrix),
        "symmetric": (operator.dense(), operator.dense().T),
    }


def check(results, rtol=1e-8):
    for name, (found, expected) in results.items():
        scale = np.max(np.abs(expected)) + 1e-12
        np.testing.assert_allclose(found, expected, rtol=0, atol=rtol * scale, err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_operators_of_a_model(name):
    case = zoo.CASES[name](jax.random.key(1))

    def run(params, batch):
        problem = fb.Objective(case.model, case.loss, params, batch)
        found = problem.sweep(rows=fb.GGNRows(), factors=fb.Kronecker(), blocks=fb.GGNBlock())
        matrix = gauss_newton(case)
        rows, factors = found["rows"], fb.KroneckerFactors(found["factors"])
        blocks = fb.BlockDiagonal(found["blocks"], fb.Space.of(params))
        turned = factors.eigen()
        along = problem.sweep(values=fb.Kronecker().along(turned.blocks))["values"]
        corrected = turned.with_values(along)
        products = fb.GaussNewton.of(problem)
        solved = products.solve(wave(rows.space), 1e-2, tolerance=1e-12)
        products_behave = behaves(products, matrix)
        products_behave["solve"] = (rows.space.ravel(solved), products_behave["solve"][1])
        positive = jnp.array(
            [jnp.linalg.eigvalsh(x.dense())[0] for x in (rows, factors, corrected)]
        )
        near = factors.merged().dense()
        distances = [jnp.linalg.norm(x - blocks.dense()) for x in (corrected.dense(), near)]
        behave = [
            products_behave,
            behaves(rows, matrix),
            behaves(rows.primal(), matrix),
            behaves(blocks, block_part(matrix, blocks.space)),
            behaves(factors, factors.dense()),
            behaves(turned, near),
            behaves(corrected, corrected.dense()),
        ]
        return behave, positive, distances

    behave, positive, (corrected, kronecker) = naive.compiled(run)(case.params, case.batch)
    for results in behave:
        check(results)
    assert min(positive) > -1e-12
    assert corrected <= kronecker * (1 + 1e-12)  # EKFAC's diagonal is the best in its basis


def rows_of(model, loss, params, batch):
    return fb.Objective(model, loss, params, batch).sweep(rows=fb.GGNRows())["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shapes", "convnet", "scanned_transformer"])
def test_examples_in_pieces_are_the_same_examples(name):
    case = zoo.CASES[name](jax.random.key(1))
    batch = jax.tree.map(lambda x: jnp.concatenate([x, x])[:3], case.batch)

    def moments(rows):
        return ravel_pytree((rows.total(), rows.squares()))[0]

    def run(params):
        rows = rows_of(case.model, case.loss, params, batch).rows
        return moments(rows), [rows.summed_in_pieces(moments, size) for size in (1, 2, 3)]

    whole, pieces = jax.jit(run)(case.params)
    for found in pieces:
        np.testing.assert_allclose(found, whole, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_the_matrix_over_parameters_is_formed_in_pieces(monkeypatch):
    monkeypatch.setattr(dual, "LEAST_FORMED", 0)
    x, w = jnp.sin(jnp.arange(39.0)).reshape(13, 3), jnp.ones((2, 3))
    rows = rows_of(lambda w, x: w @ x, fb.losses.squared_error, w, (x, x[:, :2]))
    expected = jnp.kron(jnp.eye(2), x.T @ x / 13)
    np.testing.assert_allclose(rows.primal().matrix, expected, atol=1e-14)


def block_part(matrix, space):
    """The blocks of the leaves."""
    places = np.repeat(np.arange(len(space.sizes)), space.sizes)
    return jnp.where(places[:, None] == places[None], matrix, 0)


def small(n=6, loss=fb.losses.softmax_cross_entropy):
    case = zoo.CASES["mlp"](jax.random.key(0))
    return fb.Objective(case.model, loss, case.params, case.batch)


def test_the_hessian():
    problem = small()
    hessian = fb.Hessian(problem.model, problem.loss, problem.params, problem.batch)
    flat, unravel = ravel_pytree(problem.params)
    expected = jax.hessian(lambda x: problem.value(unravel(x)))(flat)
    np.testing.assert_allclose(hessian.dense(), expected, atol=1e-12)


def test_negative_curvature_of_the_loss_is_left_out():
    case = zoo.CASES["several_outputs"](jax.random.key(1))
    problem = fb.Objective(case.model, case.loss, case.params, case.batch)
    expected = naive.compiled(lambda: gauss_newton(case))()
    products = naive.compiled(lambda p: fb.GaussNewton.of(problem.at(p)).dense())(case.params)
    rows = naive.compiled(lambda p: problem.at(p).sweep(rows=fb.GGNRows())["rows"].dense())
    np.testing.assert_allclose(products, expected, atol=1e-12)
    np.testing.assert_allclose(rows(case.params), expected, atol=1e-12)


@pytest.mark.slow
def test_weights_of_examples_and_a_key():
    def model(w, x, key):
        return w @ (x * jax.random.bernoulli(key, 0.5, x.shape))

    w, key = jnp.ones((2, 3)), jax.random.key(3)
    batch = jax.random.normal(key, (4, 3)), jnp.array([0, 1, 1, 0])
    problem = fb.Objective(
        model, fb.losses.softmax_cross_entropy, w, batch, weights=jnp.arange(4.0), key=key
    )
    rows = problem.sweep(rows=fb.GGNRows())["rows"]
    np.testing.assert_allclose(fb.GaussNewton.of(problem).dense(), rows.dense(), atol=1e-12)
    value, gradient = problem.value_and_gradient()
    expected = jax.value_and_grad(problem.value)(w)
    np.testing.assert_allclose(value, expected[0])
    np.testing.assert_allclose(gradient, expected[1], atol=1e-12)


@pytest.mark.slow
def test_trees_of_other_shapes_are_refused():
    problem = small()
    factors = fb.KroneckerFactors(problem.sweep(kron=fb.Kronecker())["kron"])
    v = wave(fb.Space.of(problem.params))
    turned = jax.tree.map(jnp.transpose, v)
    for operator in (factors, factors.eigen(), fb.GaussNewton.of(problem)):
        for function in (operator.matvec, operator.solve):
            with pytest.raises(ValueError, match="pass a tree like the parameters"):
                function(turned)
            with pytest.raises(ValueError, match="pass a tree like the parameters"):
                function([v])


def test_integers_have_no_curvature():
    w = {"w": jnp.ones(3), "n": jnp.array([2])}
    x = jnp.sin(jnp.arange(12.0)).reshape(4, 3)
    operator = fb.GaussNewton(
        lambda p, x: p["n"] * (p["w"] @ x), fb.losses.squared_error, w, (x, x[:, :1])
    )
    v = {"w": jnp.array([1.0, -1.0, 0.5]), "n": jnp.array([0])}
    image = operator.matvec(v)
    np.testing.assert_allclose(image["w"], 4 * x.T @ (x @ v["w"]) / 4)
    assert image["n"].tolist() == [0]
    solved = operator.solve(image | {"w": image["w"] + 0.5 * v["w"]}, 0.5)
    np.testing.assert_allclose(solved["w"], v["w"], atol=1e-5)
    single = jax.tree.map(lambda x: x.astype(jnp.float32), v)
    assert operator.solve(single, 0.5)["w"].dtype == jnp.ones(3).dtype


@pytest.mark.slow
def test_the_hessian_and_traces_of_integers():
    params = {"n": jnp.array([2]), "w": jnp.sin(jnp.arange(3.0))}
    x = jnp.cos(jnp.arange(12.0)).reshape(4, 3)

    def model(p, x):
        return p["n"] * jnp.tanh(p["w"] @ x)

    problem = model, fb.losses.squared_error, params, (x, x[:, :1])
    for operator in (fb.Hessian(*problem), fb.GaussNewton(*problem)):
        matrix = operator.dense()
        assert operator.matvec(params)["n"].dtype == params["n"].dtype
        np.testing.assert_allclose(matrix[0], 0)
        np.testing.assert_allclose(operator.trace(), jnp.trace(matrix))
        np.testing.assert_allclose(operator.trace(jax.random.key(0)), jnp.trace(matrix))
    expected = jax.hessian(lambda w: fb.Objective(*problem).value(params | {"w": w}))(params["w"])
    np.testing.assert_allclose(fb.Hessian(*problem).dense()[1:, 1:], expected, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
def test_the_dual_solution_without_curvature(damping):
    x = jnp.sin(jnp.arange(10.0)).reshape(2, 5)
    rows = rows_of(jnp.dot, lambda z, y: jnp.abs(z - y), jnp.zeros(5), (x, jnp.ones(2)))
    np.testing.assert_allclose(rows.solve(x[0], damping), x[0] / damping)
    np.testing.assert_allclose(rows.primal().solve(x[0], damping), x[0] / damping)


def test_a_traced_damping_below_zero_is_none_in_the_dual_space():
    rows = rows_of(jnp.dot, fb.losses.squared_error, jnp.zeros(5), (jnp.eye(2, 5), jnp.ones(2)))
    solve = jax.jit(lambda damping: rows.solve(jnp.ones(5), damping))
    np.testing.assert_array_equal(solve(-0.5), solve(0.0))


@pytest.mark.slow
def test_images_have_the_dtypes_of_what_they_are_of():
    """Factors of data in double precision have it, too."""
    w, x = jnp.ones((3, 2), jnp.float32), jnp.sin(jnp.arange(12.0)).reshape(4, 3)
    found = fb.Objective(lambda w, x: x @ w, fb.losses.squared_error, w, (x, x[:, :2])).sweep(
        k=fb.Kronecker(), b=fb.GGNBlock()
    )
    factors, blocks = fb.KroneckerFactors(found["k"]), fb.BlockDiagonal(found["b"], fb.Space.of(w))
    for operator in (factors, factors.eigen(), blocks):
        assert operator.matvec(w).dtype == operator.solve(w, 0.1).dtype == w.dtype
    assert (factors + factors.inverse(0.1)).matvec(w).dtype == w.dtype


@pytest.mark.slow
def test_leaves_without_elements():
    params = {"w": jnp.ones((3, 2)), "e": jnp.zeros((0, 2))}
    x = jnp.sin(jnp.arange(12.0)).reshape(4, 3)

    def model(p, x):
        return x @ p["w"] + x[:0] @ p["e"]

    def run(params):
        problem = fb.Objective(model, fb.losses.squared_error, params, (x, x[:, :2]))
        found = problem.sweep(k=fb.Kronecker(), b=fb.GGNBlock())
        factors = fb.KroneckerFactors(found["k"])
        blocks = fb.BlockDiagonal(found["b"], fb.Space.of(params))
        solved = [a.solve(factors.matvec(params), 0.5) for a in (factors, factors.eigen(), blocks)]
        return solved, factors.inverse(1.0).matvec(params), factors.trace(), factors.dense()

    solved, inverted, trace, dense = naive.compiled(run)(params)
    matrix = x.T @ x / 4
    for tree in solved:
        expected = jnp.linalg.solve(matrix + 0.5 * jnp.eye(3), matrix @ params["w"])
        np.testing.assert_allclose(tree["w"], expected, atol=1e-10)
    assert np.all(np.isfinite(inverted["w"]))
    np.testing.assert_allclose(trace, np.trace(dense))


def test_pass_through_jit_and_are_averaged_by_tree_map():
    problem = small()
    make = jax.jit(lambda p: fb.GaussNewton.of(problem.at(p)))
    v = wave(fb.Space.of(problem.params))
    once = fb.GaussNewton.of(problem).matvec(v)
    through = jax.jit(lambda operator, v: operator.matvec(v))(make(problem.params), v)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), once, through)
    rows = jax.jit(lambda p: problem.at(p).sweep(rows=fb.GGNRows())["rows"])(problem.params)
    through = jax.jit(lambda operator, v: operator.matvec(v))(rows, v)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), once, through)
    diagonals = [fb.Diagonal(jnp.array([1.0, 2.0])), fb.Diagonal(jnp.array([3.0, 4.0]))]
    mean = jax.tree.map(lambda x, y: (x + y) / 2, *diagonals)
    assert mean.diagonal().tolist() == [2.0, 3.0]


def test_sums_and_multiples():
    v, one, two = jnp.array([2.0, 6.0]), fb.Diagonal(jnp.ones(2)), fb.Diagonal(jnp.array([1.0, 3]))
    difference = two - one / 2
    assert difference.matvec(v).tolist() == [1.0, 15.0]
    assert difference.diagonal().tolist() == [0.5, 2.5]
    for nothing in (0.0 * two, jnp.zeros(()) * two):
        assert nothing.solve(v, 0.5).tolist() == [4.0, 12.0]
        assert nothing.solve(v).tolist() == [0.0, 0.0]
    assert (2 * two).solve(v, 2.0).tolist() == [0.5, 0.75]
    with pytest.raises(ValueError, match="not positive semi-definite"):
        (-1 * two).solve(v, 1.0)
    with pytest.raises(TypeError, match="unsupported operand"):
        two + 3
    a = fb.Dense(jnp.array([[2.0, 1.0], [1.0, 3.0]]), fb.Space.of(jnp.zeros(2)))
    b = fb.Diagonal(jnp.array([1.0, 5.0]))
    check(behaves(a + 0.5 * b, a.matrix + jnp.diag(jnp.array([0.5, 2.5]))), rtol=1e-5)
    check(behaves(3.0 * a, 3 * a.matrix))


@pytest.mark.slow
def test_estimates_take_operators():
    a = fb.Dense(jnp.diag(jnp.arange(1.0, 6.0)), fb.Space.of(jnp.zeros(5)))
    assert abs(a.trace(jax.random.key(0), samples=30) - 15) < 1e-6
    pairs = fb.estimators.top_eigenpairs(a, jnp.zeros(5), jax.random.key(1), 2)
    np.testing.assert_allclose(pairs.values, [5.0, 4.0], atol=1e-6)


# --- what is singular -----------------------------------------------------------------------------


def test_singular_and_undamped_solutions_are_finite():
    zero = jnp.zeros((3, 3))
    space = fb.Space.of(jnp.zeros(3))
    v = jnp.array([1.0, 2.0, 3.0])
    assert fb.Diagonal(jnp.zeros(3)).solve(v).tolist() == [0.0, 0.0, 0.0]
    assert jnp.all(jnp.isfinite(fb.Dense(zero, space).solve(v)))
    ones = jnp.ones((3, 3))  # of rank one, and v in its range
    found = fb.Dense(ones, space).solve(jnp.full(3, 3.0))
    np.testing.assert_allclose(found, jnp.ones(3), atol=1e-3)


@pytest.mark.slow
def test_a_parameter_without_curvature_and_one_example():
    def model(p, x):
        return p["used"] @ x

    params = {"used": jnp.ones((2, 3)), "unused": jnp.ones(4)}
    batch = jnp.ones((1, 3)), jnp.zeros((1, 2))
    found = fb.sweep(model, fb.losses.squared_error, k=fb.Kronecker(), g=fb.Gradient())
    out = found(params, batch)
    factors = fb.KroneckerFactors(out["k"])
    solved = factors.solve(params, 0.5)
    np.testing.assert_allclose(solved["unused"], 2.0)
    undamped = factors.solve(out["g"], 0.0)
    np.testing.assert_allclose(undamped["used"], 2 / 3 * 3 / 2 * jnp.ones((2, 3)), atol=1e-9)
    assert np.all(np.isfinite(undamped["unused"]))


@pytest.mark.slow
def test_inverse_divides_the_damping():
    case = zoo.CASES["mlp"](jax.random.key(0))
    blocks = fb.sweep(case.model, case.loss, k=fb.Kronecker())(case.params, case.batch)["k"]
    inverse = fb.KroneckerFactors(blocks).inverse(0.1)
    for (before,), (after,) in zip(
        jax.tree.leaves(blocks, is_leaf=lambda x: isinstance(x, tuple)),
        jax.tree.leaves(inverse.blocks, is_leaf=lambda x: isinstance(x, tuple)),
        strict=True,
    ):
        if before.a.ndim == 2:  # a vector, whose block is inverted exactly
            damped = before.dense()[0] + 0.1 * jnp.eye(before.place.size)
            np.testing.assert_allclose(after.dense()[0] @ damped, jnp.eye(len(damped)), atol=1e-10)
            continue
        (a,), (b,) = before.a, before.b
        pi = np.sqrt(np.trace(a) / len(a) / (np.trace(b) / len(b)))
        expected = np.linalg.inv(a + pi * np.sqrt(0.1) * np.eye(len(a)))
        np.testing.assert_allclose(after.a[0], expected, rtol=1e-9)


@pytest.mark.parametrize("vectors", ["block", "joint"])
def test_elements_that_no_prediction_depends_on(vectors):
    """Rows, elements and layers that are left out: their curvature is zero, its inverse 1/λ."""

    def model(p, x):
        x = jnp.tanh(x @ p["layers"][1] + p["positions"][1:3])
        return jnp.sum(x, axis=0) * p["scale"][1:4] @ p["out"][:3]

    shapes = {"layers": (3, 3, 3), "positions": (4, 3), "scale": (5,), "out": (4, 2), "other": (2,)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    x = jax.random.normal(jax.random.key(0), (5, 2, 3))
    kind = fb.Kronecker(vectors=vectors)
    sweep = fb.sweep(model, fb.losses.squared_error, k=kind, d=fb.GGNDiagonal())

    @jax.jit
    def solutions(params, batch):
        found, ones = sweep(params, batch), jax.tree.map(jnp.ones_like, params)
        factors = fb.KroneckerFactors(found["k"])
        solved = [factors.solve(ones, 0.1), *(factors.inverse(d).matvec(ones) for d in (0.1, 0.0))]
        return found["d"], factors.diagonal(), *solved

    exact, diagonal, solved, inverted, undamped = solutions(params, (x, jnp.zeros((5, 2))))
    without = jax.tree.map(lambda d: d == 0, exact)
    for name in params:
        zero = without[name]
        np.testing.assert_allclose(solved[name][zero], 10)
        if name != "positions":  # of which the rows share a factor, and so its damping
            np.testing.assert_allclose(inverted[name][zero], 10)
        assert jnp.all(inverted[name] > 0)
    assert not jnp.any(undamped["other"])
    naive.assert_close(diagonal["scale"], exact["scale"])


def test_inverses_of_several_matrices():
    x = jax.random.normal(jax.random.key(0), (2, 600, 700))
    matrices = x @ x.mT / 700
    found = naive.compiled(cholesky.inverse)(matrices, jnp.array([0.1, 1.0]))
    damped = matrices + jnp.array([0.1, 1.0])[:, None, None] * jnp.eye(600)[None]
    np.testing.assert_allclose(
        found @ damped, jnp.broadcast_to(jnp.eye(600), damped.shape), atol=1e-9
    )


def test_factorizations_run_one_after_the_other_under_vmap():
    """Side by side they can exhaust the threads of a client, which then waits for ever."""
    matrices, dampings = jnp.zeros((5, 3, 40, 40)), jnp.ones((5, 3))
    program = str(jax.make_jaxpr(jax.vmap(cholesky.inverse))(matrices, dampings))
    shapes = re.findall(r"\[([\d,]*)\] = cholesky", program)
    assert shapes and set(shapes) == {"40,40"}


# --- errors ---------------------------------------------------------------------------------------


def test_trees_that_do_not_fit():
    problem = small()
    operator = fb.GaussNewton.of(problem)
    with pytest.raises(ValueError, match="pass a tree like the parameters"):
        operator.matvec({"other": jnp.ones(3)})
    with pytest.raises(ValueError, match="pass a tree like the parameters"):
        fb.Diagonal(jnp.ones(3)).solve(jnp.ones(4))
    with pytest.raises(ValueError, match="pass key="):
        fb.Objective(lambda w, x, key: w, fb.losses.squared_error, 1.0, problem.batch).value()


@pytest.mark.slow
def test_a_damping_below_zero_is_refused_by_all():
    params, batch = jnp.ones(2), (jnp.eye(2), jnp.ones(2))
    found = fb.sweep(
        jnp.dot, fb.losses.squared_error, rows=fb.GGNRows(), k=fb.Kronecker(), block=fb.GGNBlock()
    )(params, batch)
    space = fb.GaussNewton(jnp.dot, fb.losses.squared_error, params, batch)
    operators = [
        space,
        found["rows"],
        found["rows"].primal(),
        fb.KroneckerFactors(found["k"]),
        fb.KroneckerFactors(found["k"]).eigen(),
        fb.BlockDiagonal(found["block"], space.space),
        fb.Diagonal(params),
        2 * fb.Diagonal(params),
    ]
    for operator in operators:
        for damping in (-1.0, jnp.nan):
            with pytest.raises(ValueError, match="must not be negative"):
                operator.solve(params, damping)


def test_sums_begin_at_zero_and_multiples_are_by_numbers():
    one, v = fb.Diagonal(jnp.array([1.0, 2.0])), jnp.ones(2)
    np.testing.assert_allclose(sum([one, one]).matvec(v), [2, 4])
    np.testing.assert_allclose((-one).matvec(v), [-1, -2])
    for wrong in (lambda: one * jnp.ones(2), lambda: np.ones(2) * one, lambda: 1 + one):
        with pytest.raises(TypeError):
            wrong()


def test_quadratic_forms_of_half_precision_are_summed_in_single():
    ones = jnp.ones(100_000, jnp.float16)
    assert float(fb.Diagonal(ones).quadratic(ones)) == 100_000
    model = lambda p, x: p * x  # noqa: E731
    batch = jnp.ones((1, 100_000), jnp.float16), jnp.zeros((1, 100_000), jnp.float16)
    operator = fb.GaussNewton(model, fb.losses.squared_error, ones, batch)
    np.testing.assert_allclose(operator.quadratic(ones), 100_000, rtol=1e-3)
