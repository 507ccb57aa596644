"""Estimates from products, against dense linear algebra of the matrices themselves."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbackprop import estimators
from fbackprop.estimators import (
    diagonal,
    log_determinant,
    spectral_density,
    top_eigenpairs,
    trace,
)

P = 10
KEYS = 300


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


def space(dtype="float64"):
    """Ten numbers in two arrays; sorted by name, "b" comes first in the flattened vector."""
    return {"w": jax.ShapeDtypeStruct((3, 2), dtype), "b": jax.ShapeDtypeStruct((4,), dtype)}


def flat(tree):
    """Trees with leading axes, (…, P)."""
    lead = tree["b"].shape[:-1]
    return np.concatenate([np.asarray(tree[k]).reshape(*lead, -1) for k in "bw"], axis=-1)


def product(matrix):
    """The matrix as a map of trees."""

    def operator(tree):
        vector = jnp.concatenate([tree["b"], tree["w"].reshape(-1)])
        image = matrix @ vector
        return {"b": image[:4], "w": image[4:].reshape(3, 2)}

    return operator


def random_symmetric(eigenvalues, seed=0):
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(len(eigenvalues),) * 2))
    return q @ np.diag(eigenvalues) @ q.T


POSITIVE = random_symmetric(np.geomspace(0.01, 10, P))
INDEFINITE = random_symmetric(np.linspace(-3, 5, P))
DIAGONAL = np.diag(np.linspace(-3, 5, P))
LOW_RANK = random_symmetric([4.0, -2.0, 1.0] + [0.0] * 7)


# --- one compiled function for each estimator and setting, of any matrix and key


@functools.cache
def compiled(estimator, *args, mapped=False, **kwargs):
    def estimate(matrix, key):
        return estimator(product(matrix), space(matrix.dtype), key, *args, **kwargs)

    return jax.jit(jax.vmap(estimate, (None, 0)) if mapped else estimate)


def assert_calibrated(found, exact):
    """Over many keys the mean is right, and the spread is what the standard errors say."""
    value, error = np.asarray(found.value), np.asarray(found.standard_error)
    spread = value.std(axis=0, ddof=1)
    assert np.all(np.abs(value.mean(axis=0) - exact) < 4 * spread / KEYS**0.5)
    np.testing.assert_allclose(np.sqrt((error**2).mean(axis=0)), spread, rtol=0.12)


# --- trace


def many(estimator, *args, **kwargs):
    return compiled(estimator, *args, mapped=True, **kwargs)


@pytest.mark.parametrize("method", ["hutch++", "hutchinson"])
def test_trace_is_unbiased_and_knows_its_error(method):
    keys = jax.random.split(jax.random.key(1), KEYS)
    found = many(trace, 12, method=method)(INDEFINITE, keys)
    assert_calibrated(found, np.trace(INDEFINITE))


def test_trace_of_low_rank_is_exact():
    """Four products sketch a range of rank three, so that nothing is left to sample."""
    found = many(trace, 12, method="hutch++")(LOW_RANK, jax.random.split(jax.random.key(1), KEYS))
    np.testing.assert_allclose(found.value, 3.0, rtol=1e-12)
    assert np.max(found.standard_error) < 1e-12


def test_trace_by_hutch_is_better_where_a_few_eigenvalues_dominate():
    keys = jax.random.split(jax.random.key(1), KEYS)
    spread = {
        method: np.std(many(trace, 12, method=method)(POSITIVE, keys).value)
        for method in ("hutch++", "hutchinson")
    }
    assert spread["hutch++"] < 0.5 * spread["hutchinson"]


def test_trace_with_more_samples_than_dimensions_is_exact():
    found = compiled(trace, 36)(INDEFINITE.astype("float32"), jax.random.key(0))
    assert found.value.dtype == found.standard_error.dtype == "float32"
    np.testing.assert_allclose(found.value, np.trace(INDEFINITE), rtol=1e-5)
    assert found.standard_error < 1e-5


# --- diagonal


def test_diagonal_is_unbiased_and_knows_its_error():
    keys = jax.random.split(jax.random.key(2), KEYS)
    found = many(diagonal, 12)(INDEFINITE, keys)
    assert jax.tree.map(jnp.shape, found.value) == {"b": (KEYS, 4), "w": (KEYS, 3, 2)}
    assert_calibrated(estimators.Estimate(*map(flat, found)), np.diag(INDEFINITE))


def test_diagonal_of_a_diagonal_matrix_is_exact():
    keys = jax.random.split(jax.random.key(2), KEYS)
    found = many(diagonal, 12)(DIAGONAL, keys)
    np.testing.assert_allclose(flat(found.value)[7], np.diag(DIAGONAL), rtol=1e-12)
    assert np.max(flat(found.standard_error)) < 1e-12


# --- eigenpairs

# Spectra that stop a Krylov space early, and what else is awkward.
SPECTRA = {
    "distinct": np.linspace(-3, 5, P),
    "of many magnitudes": np.geomspace(1e-8, 10, P),
    "negative": -np.linspace(1, 2, P),
    "zero": np.zeros(P),
    "identity": np.ones(P),
    "low rank": np.array([4.0, 2.0] + [0.0] * 8),
    "multiple": np.array([3.0] * 4 + [1.0] * 6),
    "tiny": 1e-30 * np.linspace(1, 2, P),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", SPECTRA)
def test_eigenpairs_when_the_space_is_exhausted(name, dtype):
    """As many iterations as dimensions (more are asked for) find everything."""
    spectrum = SPECTRA[name]
    matrix = random_symmetric(spectrum).astype(dtype)
    found = compiled(top_eigenpairs, 5)(matrix, jax.random.key(0))
    tolerance = 50 * np.finfo(dtype).eps * np.max(np.abs(spectrum))
    vectors = flat(found.vectors)
    assert vectors.dtype == found.values.dtype == dtype
    np.testing.assert_allclose(found.values, np.sort(spectrum)[::-1][:5], rtol=0, atol=tolerance)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(5), atol=50 * np.finfo(dtype).eps)
    images = vectors @ matrix
    np.testing.assert_allclose(images, found.values[:, None] * vectors, rtol=0, atol=tolerance)
    assert np.all(found.residuals <= tolerance)


def test_small_eigenvalues_beside_a_large_one():
    """Not taken for the end of the Krylov space: they are a millionth, well above ε."""
    spectrum = np.concatenate([np.linspace(0.5, 1.5, P - 1), [1e6]])
    matrix = jnp.asarray(random_symmetric(spectrum), jnp.float32)
    found = compiled(top_eigenpairs, 5)(matrix, jax.random.key(0))
    np.testing.assert_allclose(found.values, np.sort(spectrum)[::-1][:5], atol=0.1)


@pytest.mark.slow
def test_pairs_that_converge_and_those_that_do_not():
    """Far from all of a large space; converged pairs are what spoils the basis of a plain Lanczos.

    The fourth eigenvalue is the edge of a bulk, which takes more iterations, and its residual says
    so. All residuals are those of the vectors.
    """
    scale = jnp.concatenate([jnp.linspace(0, 1, 397), jnp.array([1e2, 1e3, 1e4])])

    @jax.jit
    @jax.vmap
    def estimate(key):
        return top_eigenpairs(lambda v: scale * v, scale, key, 4, iterations=30)

    found = estimate(jax.random.split(jax.random.key(0)))
    np.testing.assert_allclose(found.values[:, :3], [[1e4, 1e3, 1e2]] * 2, rtol=1e-12)
    identities = found.vectors @ found.vectors.swapaxes(1, 2)
    np.testing.assert_allclose(identities, [np.eye(4)] * 2, atol=1e-12)
    off = found.vectors * (scale[None, None] - found.values[..., None])
    actual = np.linalg.norm(off, axis=-1)
    np.testing.assert_allclose(found.residuals, actual, rtol=1e-6, atol=1e-11)
    assert np.all(actual[:, 3] > 1e-3)
    assert np.all(np.abs(found.values[:, 3] - 1) <= found.residuals[:, 3])


# --- spectral density and log-determinant


def density_of(matrix):
    return compiled(spectral_density, iterations=30, samples=100)(matrix, jax.random.key(4))


def test_density_of_a_diagonal_matrix_is_its_spectrum():
    """Every vector of signs has the same share of all eigenvectors, 1/P."""
    density = density_of(DIAGONAL)
    assert density.nodes.shape == density.weights.shape == (100, P)
    np.testing.assert_allclose(density.nodes, [np.diag(DIAGONAL)] * 100, atol=1e-10)
    np.testing.assert_allclose(density.weights, np.full((100, P), 0.01 / P), rtol=1e-8)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", SPECTRA)
def test_nodes_are_eigenvalues_and_weights_sum_to_one(name, dtype):
    density = density_of(random_symmetric(SPECTRA[name]).astype(dtype))
    assert density.weights.dtype == dtype
    assert np.all(density.weights >= 0)
    np.testing.assert_allclose(density.weights.sum(axis=1), 0.01, rtol=1e-5)
    distance = np.abs(np.asarray(density.nodes)[..., None] - SPECTRA[name]).min(axis=-1)
    assert np.all(distance <= 50 * np.finfo(dtype).eps * np.max(np.abs(SPECTRA[name])))


def hutchinson_error(matrix, samples):
    """The standard deviation of the mean of zᵀ A z over vectors of signs z."""
    off_diagonal = matrix - np.diag(np.diag(matrix))
    return np.sqrt(2 * np.sum(off_diagonal**2) / samples)


def test_means_over_the_spectrum():
    density = density_of(INDEFINITE)
    np.testing.assert_allclose(density.weights.sum(), 1, rtol=1e-12)
    found = density.mean(lambda x: x**3)
    cube = np.linalg.matrix_power(INDEFINITE, 3) / P
    np.testing.assert_allclose(found.standard_error, hutchinson_error(cube, 100), rtol=0.3)
    assert abs(found.value - np.trace(cube)) < 3 * found.standard_error


def test_smooth_density():
    nodes, weights = np.array([[0.0, 2.0], [1.0, 2.0]]), np.array([[0.4, 0.1], [0.3, 0.2]])
    density = estimators.SpectralDensity(jnp.array(nodes), jnp.array(weights))
    grid = np.linspace(-3, 5, 400).reshape(2, 200)
    smooth = np.asarray(density.smooth(grid, 0.3))
    assert smooth.shape == grid.shape
    np.testing.assert_allclose(np.trapezoid(smooth.ravel(), grid.ravel()), 1, rtol=1e-8)
    bells = np.exp(-((grid[..., None, None] - nodes) ** 2) / (2 * 0.09)) / np.sqrt(2 * np.pi * 0.09)
    np.testing.assert_allclose(smooth, (weights * bells).sum(axis=(-2, -1)), rtol=1e-10)


def test_mean_and_its_standard_error():
    """Of three samples, 0.5, 1.75 and 9; a node without weight does not count."""
    weights = jnp.array([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]]) / 3
    nodes = jnp.array([[0.0, 1.0], [1.0, 2.0], [3.0, jnp.inf]])
    found = estimators.SpectralDensity(nodes, weights).mean(lambda x: x**2)
    samples = [0.5, 1.75, 9.0]
    np.testing.assert_allclose(found.value, np.mean(samples), rtol=1e-12)
    np.testing.assert_allclose(found.standard_error, np.std(samples, ddof=1) / 3**0.5, rtol=1e-12)


DAMPINGS = np.array([0.1, 1.0], "float32")


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, 0, 0))
def mapped_log_determinants(matrix, key, damping):
    like = space(matrix.dtype)
    return log_determinant(product(matrix), like, key, damping=damping, iterations=12, samples=100)


def log_determinants(matrix):
    """For both dampings, each with a key of its own, (2,)."""
    keys = jax.random.split(jax.random.key(0))
    return mapped_log_determinants(matrix.astype("float32"), keys, DAMPINGS)


@pytest.mark.slow
def test_log_determinant_within_its_standard_error(optimized):
    found = log_determinants(POSITIVE)
    for damping, value, error in zip(DAMPINGS, *found, strict=True):
        values, vectors = np.linalg.eigh(POSITIVE + damping * np.eye(P))
        logarithm = vectors @ np.diag(np.log(values)) @ vectors.T
        np.testing.assert_allclose(error, hutchinson_error(logarithm, 100), rtol=0.3)
        exact = np.linalg.slogdet(POSITIVE + damping * np.eye(P))[1]
        assert abs(value - exact) < 3 * error


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in SPECTRA if np.all(SPECTRA[n] >= 0)])
def test_log_determinant_of_singular_and_diagonal_matrices(name, optimized):
    """Of diagonal matrices every sample is exact, however early the Krylov space ends."""
    found = log_determinants(np.diag(SPECTRA[name]))
    # An eigenvalue is known to a few eps · ‖A‖, and the logarithm's slope is 1/δ at most.
    tolerance = 50 * np.finfo("float32").eps * (1 + np.max(SPECTRA[name]) / 0.1)
    exact = [np.sum(np.log(SPECTRA[name] + damping)) for damping in DAMPINGS]
    np.testing.assert_allclose(found.value, exact, rtol=0, atol=tolerance)
    assert np.all(found.standard_error < tolerance)


def test_what_is_not_positive_definite_has_no_log_determinant(optimized):
    found = log_determinants(np.diag([-0.5] + [1.0] * 9))
    np.testing.assert_array_equal(np.isnan(found.value), [True, False])


# --- the interface


def everything(operator, like, key):
    """All estimates with the smallest counts, and three numbers of samples at most."""
    return {
        "hutch++": trace(operator, like, key, 3),
        "hutchinson": trace(operator, like, key, 1, method="hutchinson"),
        "diagonal": diagonal(operator, like, key, 1),
        "eigenpairs": top_eigenpairs(operator, like, key, 1),
        "density": spectral_density(operator, like, key, samples=1),
        "log determinant": log_determinant(operator, like, key, damping=1.0, samples=1),
    }


@pytest.mark.parametrize("scale", [1e-23, 1e20])
def test_errors_scale_as_the_operator_does(scale):
    """Though in single precision the squares of deviations are out of range."""
    matrix = jnp.array([[2.0, 1.0, 0.0], [1.0, 3.0, 1.0], [0.0, 1.0, 4.0]], jnp.float32)

    def relative(scale):
        product = lambda v: scale * (matrix @ v)  # noqa: E731
        return trace(product, matrix[0], jax.random.key(0), 8, method="hutchinson").standard_error

    np.testing.assert_allclose(relative(np.float32(scale)) / scale, relative(1.0), rtol=1e-5)


def test_one_dimension_and_one_sample():
    found = jax.jit(lambda key: everything(lambda v: 3.0 * v, jnp.zeros(()), key))(
        jax.random.key(0)
    )
    np.testing.assert_allclose(found["hutch++"].value, 3, rtol=1e-12)
    np.testing.assert_allclose(found["hutchinson"].value, 3, rtol=1e-12)
    np.testing.assert_allclose(found["diagonal"].value, 3, rtol=1e-12)
    np.testing.assert_allclose(found["eigenpairs"].values, [3], rtol=1e-12)
    np.testing.assert_allclose(jnp.abs(found["eigenpairs"].vectors), [1], rtol=1e-12)
    np.testing.assert_allclose(found["density"].nodes, [[3]], rtol=1e-12)
    np.testing.assert_allclose(found["density"].weights, [[1]], rtol=1e-12)
    np.testing.assert_allclose(found["log determinant"].value, np.log(4), rtol=1e-12)
    for name in ("hutch++", "hutchinson", "diagonal", "log determinant"):
        assert np.isinf(found[name].standard_error)


def test_same_key_same_estimate_of_functions_and_objects():
    keys = jax.random.split(jax.random.key(1), KEYS)
    together = many(trace, 12, method="hutchinson")(INDEFINITE, keys)
    operator = types.SimpleNamespace(matvec=product(jnp.asarray(INDEFINITE)))
    like = {"w": np.zeros((3, 2)), "b": jnp.zeros(4)}
    alone = trace(operator, like, keys[3], 12, method="hutchinson")
    np.testing.assert_allclose(alone.value, together.value[3], rtol=1e-10)
    np.testing.assert_allclose(alone.standard_error, together.standard_error[3], rtol=1e-10)


def test_estimates_keep_the_leaves_dtypes_and_calculate_in_the_widest():
    like = {"half": jnp.zeros(2, jnp.bfloat16), "single": jnp.zeros((), jnp.float32)}
    found = jax.eval_shape(lambda key: everything(lambda v: v, like, key), jax.random.key(0))
    assert found["hutch++"].value.dtype == found["density"].nodes.dtype == jnp.float32
    for tree in (found["diagonal"].value, found["eigenpairs"].vectors):
        assert {k: leaf.dtype for k, leaf in tree.items()} == {
            "half": jnp.bfloat16,
            "single": jnp.float32,
        }


def test_products_that_are_not_finite_show():
    found = compiled(top_eigenpairs, 5)(np.full((P, P), np.nan), jax.random.key(0))
    assert np.all(np.isnan(found.values))
    density = estimators.SpectralDensity(jnp.ones((1, 3)), jnp.array([[0.5, np.nan, 0.5]]))
    assert np.isnan(density.mean(jnp.log).value)


VECTOR = jnp.zeros(3, jnp.float32)


def identity(tree):
    return tree


@pytest.mark.parametrize(
    ("estimate", "error", "message"),
    [
        (lambda key: trace(identity, VECTOR, key, 0), ValueError, "trace: samples is 0; take"),
        (lambda key: trace(identity, VECTOR, key, 2), ValueError, "Hutch.. takes at least 3"),
        (lambda key: trace(identity, VECTOR, key, 2.0), TypeError, "samples is of type float"),
        (
            lambda key: jax.jit(lambda n: trace(identity, VECTOR, key, n))(3),
            TypeError,
            "give a Python integer, which jit must not trace",
        ),
        (lambda key: trace(identity, VECTOR, key, method="exact"), ValueError, "'exact'; choose"),
        (lambda key: trace(identity, {}, key), ValueError, "trace: like is empty"),
        (lambda key: trace(identity, jnp.zeros((0, 3)), key), ValueError, "like is empty"),
        (lambda key: trace(VECTOR, VECTOR, key), TypeError, "give a function from trees"),
        (
            lambda key: diagonal(identity, {"n": jnp.arange(3)}, key),
            TypeError,
            r"diagonal: like\['n'\] has dtype int64; leave out",
        ),
        (lambda key: diagonal(identity, VECTOR, key, 0), ValueError, "diagonal: samples is 0"),
        (
            lambda key: diagonal(lambda v: (v,), VECTOR, key),
            ValueError,
            r"diagonal: the operator returns .* of shapes .* the same form of tree",
        ),
        (lambda key: diagonal(lambda v: v[:2], VECTOR, key), ValueError, r"shapes \[\(2,\)\]"),
        (
            lambda key: diagonal(lambda v: 1j * v, VECTOR, key),
            TypeError,
            "the operator's result has dtype complex64",
        ),
        (lambda key: top_eigenpairs(identity, VECTOR, key, 0), ValueError, "count is 0"),
        (
            lambda key: top_eigenpairs(identity, VECTOR, key, 4),
            ValueError,
            "count is 4, but the space has dimension 3",
        ),
        (
            lambda key: top_eigenpairs(identity, VECTOR, key, 2, iterations=1),
            ValueError,
            "1 iterations cannot give 2",
        ),
        (
            lambda key: spectral_density(identity, VECTOR, key, iterations=0),
            ValueError,
            "spectral_density: iterations is 0",
        ),
        (
            lambda key: log_determinant(identity, VECTOR, key, damping=1.0, samples=0),
            ValueError,
            "log_determinant: samples is 0",
        ),
    ],
)
def test_errors_say_what_to_do(estimate, error, message):
    with pytest.raises(error, match=message) as caught:
        estimate(jax.random.key(0))
    assert "\n" not in str(caught.value)
