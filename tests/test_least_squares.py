"""Levenberg–Marquardt: NIST's nonlinear regression problems, and what can go wrong with a fit."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbackprop.least_squares import least_squares

NIST = Path(__file__).parent / "data" / "nist_strd.txt"


def read(path):
    """{data set: {name of a row of numbers: array}}; the format is described in the file."""
    datasets = {}
    lines = (line for line in path.read_text().splitlines() if not line.startswith("#"))
    for token in " ".join(lines).split():
        if token.startswith("["):
            dataset = datasets[token[1:-1]] = {}
        elif token[0].isalpha():
            row = dataset[token] = []
        else:
            row.append(float(token))
    return {
        name: {key: np.array(row) for key, row in dataset.items()}
        for name, dataset in datasets.items()
    }


DATASETS = read(NIST)


def saturating(b, x):
    return b[0] * (1 - jnp.exp(-b[1] * x))


def decay_over_line(b, x):
    return jnp.exp(-b[0] * x) / (b[1] + b[2] * x)


def three_decays(b, x):
    return sum(b[i] * jnp.exp(-b[i + 1] * x) for i in (0, 2, 4))


def two_peaks(b, x):
    peaks = (b[i] * jnp.exp(-(((x - b[i + 1]) / b[i + 2]) ** 2)) for i in (2, 5))
    return b[0] * jnp.exp(-b[1] * x) + sum(peaks)


def cubic_over_cubic(b, x):
    return (b[0] + x * (b[1] + x * (b[2] + x * b[3]))) / (1 + x * (b[4] + x * (b[5] + x * b[6])))


def cycles(b, x):
    def cycle(cosine, sine, period):
        return cosine * jnp.cos(2 * jnp.pi * x / period) + sine * jnp.sin(2 * jnp.pi * x / period)

    return b[0] + cycle(b[1], b[2], 12) + cycle(b[4], b[5], b[3]) + cycle(b[7], b[8], b[6])


MODELS = {
    "Misra1a": saturating,
    "Chwirut2": decay_over_line,
    "Chwirut1": decay_over_line,
    "Lanczos3": three_decays,
    "Gauss1": two_peaks,
    "Gauss2": two_peaks,
    "DanWood": lambda b, x: b[0] * x ** b[1],
    "Misra1b": lambda b, x: b[0] * (1 - (1 + b[1] * x / 2) ** -2.0),
    "Kirby2": lambda b, x: (b[0] + b[1] * x + b[2] * x**2) / (1 + b[3] * x + b[4] * x**2),
    "Hahn1": cubic_over_cubic,
    "Nelson": lambda b, x: b[0] - b[1] * x[0] * jnp.exp(-b[2] * x[1]),  # of log y
    "MGH17": lambda b, x: b[0] + b[1] * jnp.exp(-x * b[3]) + b[2] * jnp.exp(-x * b[4]),
    "Lanczos1": three_decays,
    "Lanczos2": three_decays,
    "Gauss3": two_peaks,
    "Misra1c": lambda b, x: b[0] * (1 - (1 + 2 * b[1] * x) ** -0.5),
    "Misra1d": lambda b, x: b[0] * b[1] * x / (1 + b[1] * x),
    "Roszman1": lambda b, x: b[0] - b[1] * x - jnp.arctan(b[2] / (x - b[3])) / jnp.pi,
    "ENSO": cycles,
    "MGH09": lambda b, x: b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3]),
    "Thurber": cubic_over_cubic,
    "BoxBOD": saturating,
    "Rat42": lambda b, x: b[0] / (1 + jnp.exp(b[1] - b[2] * x)),
    "MGH10": lambda b, x: b[0] * jnp.exp(b[1] / (x + b[2])),
    "Eckerle4": lambda b, x: b[0] / b[1] * jnp.exp(-0.5 * ((x - b[2]) / b[1]) ** 2),
    "Rat43": lambda b, x: b[0] / (1 + jnp.exp(b[1] - b[2] * x)) ** (1 / b[3]),
    "Bennett5": lambda b, x: b[0] * (b[1] + x) ** (-1 / b[2]),
}


OBSERVATIONS = max(data["y"].size for data in DATASETS.values())


def nist_data(name):
    """Predictors (2, 250), response (250,) and which of them are observations (250,).

    The padding lets all problems of as many parameters share one compiled fit.
    """
    data = DATASETS[name]
    x = np.stack([data["x1"], data["x2"]] if name == "Nelson" else [data["x"], data["x"]])
    y = np.log(data["y"]) if name == "Nelson" else data["y"]
    missing = OBSERVATIONS - y.size
    return (
        np.pad(x, ((0, 0), (0, missing)), mode="edge"),
        np.pad(y, (0, missing)),
        np.arange(OBSERVATIONS) < y.size,
    )


def nist_residual(name):
    def residual(b, x, y, observed):
        return jnp.where(observed, MODELS[name](b, x if name == "Nelson" else x[0]) - y, 0.0)

    return residual


@functools.cache
def nist_solver(parameters):
    """A compiled fit of any of the problems with so many parameters, and their names."""
    names = [name for name in MODELS if DATASETS[name]["certified"].size == parameters]
    branches = [nist_residual(name) for name in names]

    def residual(b, index, *data):
        return jax.lax.switch(index, branches, b, *data)

    return jax.jit(functools.partial(least_squares, residual)), names


@functools.cache
def nist_fits(name):
    """Digits (2, P), cost (2,), steps (2,) and whether converged (2,), from both starts."""
    data = DATASETS[name]
    fit, names = nist_solver(data["certified"].size)
    with jax.enable_x64(True):
        fits = [
            jax.device_get(fit(data[start], names.index(name), *nist_data(name)))
            for start in ("start1", "start2")
        ]
    digits = [-np.log10(np.abs(fit.params / data["certified"] - 1) + 1e-16) for fit in fits]
    return (
        np.array(digits),
        np.array([fit.cost for fit in fits]),
        np.array([fit.steps for fit in fits]),
        np.array([fit.converged for fit in fits]),
    )


def test_nist_has_a_model_for_each_dataset():
    assert list(MODELS) == list(DATASETS)
    assert len(MODELS) == 27


@pytest.mark.parametrize("name", MODELS)
def test_nist_data_give_the_certified_residual(name):
    certified = DATASETS[name]["certified"]
    with jax.enable_x64(True):
        squares = np.sum(np.square(nist_residual(name)(certified, *nist_data(name))))
    # The absolute tolerance is for Lanczos1, whose residual is the rounding of its 14-digit data:
    # parameters certified to 11 digits cannot reproduce that.
    np.testing.assert_allclose(squares, DATASETS[name]["rss"][0], rtol=1e-10, atol=1e-19)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_nist_certified_parameters_from_both_starts(name):
    digits, cost, _, converged = nist_fits(name)
    assert np.all(converged)
    assert np.min(digits) >= 6
    np.testing.assert_allclose(2 * cost, DATASETS[name]["rss"][0], rtol=1e-9, atol=1e-22)


@pytest.mark.slow
def test_nist_takes_few_steps():
    steps = np.concatenate([nist_fits(name)[2] for name in MODELS])
    assert steps.size == 54
    assert np.median(steps) < 20
    assert np.max(steps) < 1000


def decay_residual(params, x, y):
    return params["height"] * jnp.exp(-params["rate"] * x) - y


X = np.linspace(0, 3, 12)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
def test_precision_follows_the_parameters(dtype, tolerance):
    with jax.enable_x64(True):
        x = jnp.asarray(X, dtype)
        y = 3 * jnp.exp(-0.5 * x)
        start = {"height": jnp.ones((), dtype), "rate": jnp.ones((1,), dtype)}
        fit = jax.jit(functools.partial(least_squares, decay_residual))(start, x, y)
        assert fit.converged
        assert {leaf.dtype.name for leaf in jax.tree.leaves(fit.params)} == {dtype}
        assert fit.residual.dtype == fit.cost.dtype == dtype
        assert jnp.issubdtype(fit.steps.dtype, jnp.integer) and fit.converged.dtype == bool
        assert fit.params["rate"].shape == (1,)
        np.testing.assert_allclose(fit.params["height"], 3, rtol=tolerance)
        np.testing.assert_allclose(fit.params["rate"], 0.5, rtol=tolerance)


@pytest.mark.slow
def test_half_precision_parameters():
    x = jnp.asarray(X, jnp.float32)
    start = {"height": jnp.ones((), jnp.bfloat16), "rate": jnp.ones((), jnp.bfloat16)}
    fit = least_squares(decay_residual, start, x, 3 * jnp.exp(-0.5 * x))
    assert fit.params["rate"].dtype == jnp.bfloat16
    np.testing.assert_allclose(float(fit.params["height"]), 3, rtol=0.05)


@pytest.mark.slow
def test_batch_of_fits_equals_the_fits_alone():
    """Fits of very different length in one call: the finished ones must not move on."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        truth = {"height": rng.uniform(1, 5, 200), "rate": rng.uniform(0.1, 2, 200)}
        y = truth["height"][:, None] * np.exp(-truth["rate"][:, None] * X)
        y += 0.01 * rng.normal(size=y.shape)
        start = {"height": rng.uniform(0.1, 10, 200), "rate": rng.uniform(0.01, 4, 200)}
        alone = jax.jit(lambda start, y: least_squares(decay_residual, start, X, y))
        batch = jax.jit(jax.vmap(lambda start, y: least_squares(decay_residual, start, X, y)))
        together = batch(start, y)
        assert np.all(together.converged)
        assert len(np.unique(together.steps)) > 3
        np.testing.assert_allclose(together.params["rate"], truth["rate"], atol=0.1)
        for n in range(0, 200, 20):
            one = alone(jax.tree.map(lambda leaf, n=n: leaf[n], start), y[n])
            assert one.steps == together.steps[n]
            np.testing.assert_allclose(one.params["rate"], together.params["rate"][n], rtol=1e-9)


@pytest.mark.slow
def test_result_is_consistent():
    def residual(params):
        a, (b,) = params
        return {"sphere": a - jnp.array([1.0, 2.0]), "product": (a[0] * b,)}

    fit = least_squares(residual, (jnp.array([3.0, -1.0]), [jnp.array(0.5)]))
    assert jax.tree.structure(fit.params) == jax.tree.structure((0, [0]))
    again = residual(fit.params)
    jax.tree.map(np.testing.assert_array_equal, fit.residual, again)
    squares = sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(again))
    np.testing.assert_allclose(fit.cost, squares / 2, rtol=1e-6)
    np.testing.assert_allclose(fit.params[0], [1, 2], atol=1e-3)


def test_linear_problem_is_one_step_and_its_confirmation():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        a, b = rng.normal(size=(8, 3)), rng.normal(size=8)
        expected = np.linalg.lstsq(a, b)[0]
        fit = least_squares(lambda x: a @ x - b, 10 * jnp.ones(3))
        np.testing.assert_allclose(fit.params, expected, rtol=1e-12)
        assert fit.converged and fit.steps <= 2


def rosenbrock(x):
    return jnp.array([10 * (x[1] - x[0] ** 2), 1 - x[0]])


# What can be wrong with a problem: residual, start, and what it should come to.
AWKWARD = {
    "valley": (rosenbrock, [-1.2, 1.0], [1.0, 1.0]),
    "zero start": (lambda x: x - jnp.array([3.0, 4e4]), [0.0, 0.0], [3.0, 4e4]),
    "starts at its minimum": (rosenbrock, [1.0, 1.0], [1.0, 1.0]),
    "undefined beyond a wall": (lambda x: jnp.log(x) + 2, [3.0], [np.exp(-2)]),
    "overflows": (lambda x: jnp.exp(x) - 2, [-30.0], [np.log(2)]),
    "parameter of no effect": (lambda x: x[:1] - 2, [1.0, 5.0], [2.0, 5.0]),
    "only the sum matters": (lambda x: jnp.stack([x[0] + x[1] - 2] * 3), [0.5, 0.5], [1.0, 1.0]),
    "fewer residuals than parameters": (lambda x: jnp.sum(x)[None] - 3, [2.0, 2, 2], [1.0] * 3),
    "singular at the solution": (lambda x: x**2, [1.0], [0.0]),
    "parameters of unlike scale": (
        lambda x: jnp.array([1e6 * x[0] - 3, 1e-6 * x[1] - 5, 1e3 * x[0] * x[1] * 1e-3 - 15]),
        [1e-6, 1e6],
        [3e-6, 5e6],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_problems(name):
    residual, start, solution = AWKWARD[name]
    with jax.enable_x64(True):
        fit = jax.jit(functools.partial(least_squares, residual))(jnp.array(start, float))
    assert fit.converged
    np.testing.assert_allclose(fit.params, solution, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_derivative_that_is_not_finite_is_a_rejected_step():
    """√|x − 1| is defined at 1, where the Gauss–Newton step from 3 leads; its slope is not."""
    with jax.enable_x64(True):
        fit = least_squares(lambda x: jnp.stack([jnp.sqrt(x - 1), x - 4]), jnp.array(3.0))
        assert fit.converged and jnp.isfinite(fit.params) and fit.params > 1


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_start_that_is_not_finite_is_handed_back(bad):
    start = jnp.array([2.0, 3.0])
    fit = jax.jit(lambda start, bad: least_squares(lambda x: x * bad, start))(start, bad)
    assert not fit.converged
    assert fit.steps == 0
    np.testing.assert_array_equal(fit.params, start)


@pytest.mark.slow
def test_bad_fit_leaves_its_batch_alone():
    starts = jnp.array([[-1.2, 1.0], [jnp.nan, 1.0], [0.5, 0.5]])
    fit = jax.jit(jax.vmap(functools.partial(least_squares, rosenbrock)))(starts)
    np.testing.assert_array_equal(fit.converged, [True, False, True])
    np.testing.assert_allclose(fit.params[::2], 1, rtol=1e-4)


@pytest.mark.slow
def test_a_wall_at_the_minimum_is_no_convergence():
    """The cost falls towards a wall beyond which nothing is defined: no stationary point."""
    fit = least_squares(lambda x: jnp.where(x > 1, x, jnp.nan), jnp.array(3.0), max_steps=500)
    assert not fit.converged
    assert fit.steps < 500
    np.testing.assert_allclose(fit.params, 1, rtol=1e-3)


@pytest.mark.parametrize("steps", [1, 3])
def test_stops_when_the_steps_run_out(steps):
    fit = least_squares(rosenbrock, jnp.array([-1.2, 1.0]), max_steps=steps)
    assert fit.steps == steps
    assert not fit.converged
    assert fit.cost <= jnp.sum(rosenbrock(jnp.array([-1.2, 1.0])) ** 2) / 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.slow
def test_a_singular_problem_is_solved_by_the_nearest_minimiser(dtype):
    with jax.enable_x64(True):
        start = jnp.array([100.0, 0.0], dtype)
        fit = least_squares(lambda p: jnp.ones((6, 2), dtype) @ p - jnp.arange(6.0), start)
        assert fit.converged
        np.testing.assert_allclose(fit.params, [51.25, -48.75], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_null_directions_are_left_alone(noise):
    """Of a redundant model, with and without an exact fit."""
    x = jnp.linspace(0.0, 1.0, 20)
    y = 3 * jnp.exp(-x) - noise * jnp.sin(9 * x)

    def residual(p):
        return p["a"] * p["b"] * jnp.exp(-p["c"] * x) - y

    fit = least_squares(residual, {"a": 1.0, "b": 1.0, "c": 0.5})
    assert fit.converged and fit.steps < 10
    np.testing.assert_allclose(fit.params["a"], fit.params["b"], rtol=1e-5)


@pytest.mark.parametrize("unit", [1e-30, 1e-19, 1.0, 1e19])
@pytest.mark.slow
def test_residuals_of_any_unit(unit):
    """Squares of the first and the third underflow in single precision, of the last overflow."""
    x = jnp.linspace(0, 4, 40)
    fit = least_squares(
        lambda p: p[0] * jnp.exp(-p[1] * x) - unit * 3 * jnp.exp(-0.7 * x), jnp.array([unit, 1.0])
    )
    assert fit.converged
    np.testing.assert_allclose(fit.params / jnp.array([unit, 1.0]), [3.0, 0.7], rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_steps": 0}, "max_steps is 0"),
        ({"max_steps": 2.5}, "max_steps is 2.5"),
        ({"rtol": -1.0}, "rtol is -1.0"),
        ({"atol": jnp.nan}, "atol is nan"),
        ({"atol": jnp.ones(2)}, r"atol is \[1. 1.\]"),
        ({"rtol": "x"}, "rtol is x"),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        least_squares(lambda p: p, jnp.ones(2), **settings)


@pytest.mark.slow
def test_tolerances_stop_earlier():
    def fit(rtol, atol):
        return least_squares(rosenbrock, jnp.array([-1.2, 1.0]), rtol=rtol, atol=atol)

    fits = jax.jit(jax.vmap(fit))(jnp.array([1e-4, 0.5, 1e-4]), jnp.array([0.0, 0.0, 1.0]))
    assert jnp.all(fits.converged)
    assert fits.steps[1] < fits.steps[0]
    assert fits.steps[2] < fits.steps[0]


@pytest.mark.parametrize(
    ("residual", "params", "kwargs", "message"),
    [
        (rosenbrock, jnp.array([1, 2]), {}, "params hold an array of dtype int"),
        (rosenbrock, jnp.array([1j, 2]), {}, "params hold an array of dtype complex"),
        (lambda params: jnp.ones(3), {}, {}, "params are empty"),
        (lambda params: jnp.ones(0), jnp.ones(2), {}, "the residuals are empty"),
        (lambda params: params > 0, jnp.ones(2), {}, "the residuals hold an array of dtype bool"),
        (lambda params: params * 1j, jnp.ones(2), {}, "the residuals hold .* complex"),
        (rosenbrock, jnp.ones(2), {"max_steps": 0}, "max_steps is 0; give a whole number"),
    ],
)
def test_refuses_what_it_cannot_fit(residual, params, kwargs, message):
    with pytest.raises(ValueError, match=f"least_squares: {message}") as error:
        least_squares(residual, params, **kwargs)
    assert "\n" not in str(error.value)
