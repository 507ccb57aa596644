"""Mean-field maps against closed forms, measured signals against both, and the script itself."""

import csv
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from error_lines import one_error_line

from experiments import signals
from experiments.mean_field import MeanField, expectation, factor, mean_field, next_variance
from experiments.signals import ACTIVATIONS, Distribution, Settings, Verdict

VARIANCES = (1e-8, 0.01, 0.5, 1.0, 30.0)

# E φ(√q ξ)² and E φ'(√q ξ)² as functions of q.
CLOSED_FORMS = {
    "linear": (lambda q: q, lambda q: 1.0),
    "relu": (lambda q: q / 2, lambda q: 0.5),
    # Williams, "Computing with infinite networks", 1996.
    "erf": (
        lambda q: 2 / math.pi * math.asin(2 * q / (1 + 2 * q)),
        lambda q: 4 / math.pi / math.sqrt(1 + 4 * q),
    ),
}


def slope_tolerance(settings, spread):
    """How far the median slope over seeds may lie from that of infinite width.

    From one layer to the one before, the squared norm of δ changes by a random factor of relative
    variance ``spread``/n, about independent of the other layers': 2 for a linear layer of Gaussian
    weights, 5 for a relu, where half of the units are off. Its square root is therefore smaller by
    spread/4n nats a layer, and over L layers a random walk, whose least-squares slope has the
    variance 6/5L of that of a step. Two standard deviations of one seed are three of the median of
    three seeds, and that the examples' signals are not all alike makes them more.
    """
    relative = spread / settings.width
    deviation = math.sqrt(6 / (5 * settings.depth) * relative) / 2
    return (relative / 4 + 2 * deviation) / math.log(10)


def small(**options):
    return Settings(**({"width": 128, "depth": 16, "examples": 8, "seeds": 3} | options))


def measured(**options):
    settings = small(**options)
    return settings, list(signals.measure(settings, signals.images_of(settings)))


# The theory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_maps_agree_with_closed_forms(name, variance):
    length, squared_slope = CLOSED_FORMS[name]
    with jax.enable_x64(True):
        found = next_variance(ACTIVATIONS[name], variance, 1.7, 0.3)
        assert float(found) == pytest.approx(1.7 * length(variance) + 0.3, rel=1e-10)
        found = factor(ACTIVATIONS[name], variance, 1.7)
        assert float(found) == pytest.approx(1.7 * squared_slope(variance), rel=1e-10)


@pytest.mark.parametrize("name", ["selu", "gelu", "tanh", "sigmoid"])
def test_expectations_agree_with_a_fine_sum(name):
    """The trapezoidal rule with 400,000 points, one of them at the kink."""
    xi = np.linspace(-10, 10, 400_001)
    density = np.exp(-(xi**2) / 2) / math.sqrt(2 * math.pi) * (xi[1] - xi[0])
    with jax.enable_x64(True):
        for variance in (0.01, 1.0, 30.0):
            expected = density @ np.square(ACTIVATIONS[name](math.sqrt(variance) * xi))
            found = expectation(lambda z: ACTIVATIONS[name](z) ** 2, variance)
            assert float(found) == pytest.approx(float(expected), rel=1e-8)


def test_layers_are_followed_one_by_one():
    """A relu's variances and signals in closed form: q_l = (σ_w²/2)^(l-1) q_1, χ_l = σ_w²/2."""
    found = mean_field(ACTIVATIONS["relu"], 1.5, 3.0, 0.0, 4)
    assert found.variances == pytest.approx(1.5 ** np.arange(1, 5))
    assert found.factors == pytest.approx([1.5] * 4)
    assert found.rms == pytest.approx(1.5 ** (np.arange(4, 0, -1) / 2))


def test_critical_point_of_tanh():
    """Schoenholz et al. (2017), figure 2: σ_w² = 1.76 is critical where σ_b² = 0.05."""
    for gain, side in ((1.72, -1), (1.80, 1)):
        last = mean_field(ACTIVATIONS["tanh"], 1.0, gain, 0.05, 1000).factors[-1]
        assert side * (last - 1) > 0
        assert last == pytest.approx(1, abs=0.02)


# What is measured ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_error_signals_are_those_of_backpropagation():
    settings = small(width=5, depth=3, examples=2, bias=0.5)
    inputs = np.random.default_rng(0).standard_normal((2, 7)).astype(np.float32)
    cotangents = np.random.default_rng(1).standard_normal((2, 5)).astype(np.float32)
    network = signals.draw(jax.random.key(0), signals.normal(1.5), settings, 7)
    found = signals.error_signals(ACTIVATIONS["tanh"], network, inputs, cotangents)
    assert found.shape == (2, 3, 5)
    nets = [inputs @ network.first + network.biases[:1]]
    for weights, bias in zip(network.rest, network.biases[1:-1], strict=False):
        nets.append(np.tanh(nets[-1]) @ weights + bias[None])
    arriving = cotangents
    for layer in (2, 1, 0):
        delta = arriving @ network.rest[layer].T * (1 - np.tanh(nets[layer]) ** 2)
        np.testing.assert_allclose(found[:, layer], delta, rtol=1e-4, atol=1e-6)
        arriving = delta


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "options", "exact", "spread"),
    [
        ("linear", {"scales": (0.5,)}, math.log10(0.5), 2),
        ("linear", {"scales": (3.0,)}, math.log10(3.0), 2),
        ("relu", {"initialisations": ("he",)}, 0.0, 5),
        ("relu", {"initialisations": ("lecun",)}, math.log10(0.5) / 2, 5),
    ],
)
def test_slopes_known_in_closed_form(activation, options, exact, spread):
    options = {"initialisations": (), "scales": ()} | options
    settings, (found,) = measured(activations=(activation,), **options)
    assert found.theory_slope == pytest.approx(exact, abs=1e-9)
    assert found.slope == pytest.approx(exact, abs=slope_tolerance(settings, spread))


@pytest.mark.slow
def test_orthogonal_weights_keep_the_norm():
    _, (found,) = measured(activations=("linear",), initialisations=("orthogonal",), scales=())
    np.testing.assert_allclose(found.rms, found.rms[:, :1].repeat(16, 1), rtol=1e-5)
    assert abs(found.slope) < 1e-6


@pytest.mark.slow
def test_slopes_follow_the_theory():
    """The spread of a relu is used for all; a tanh in chaos has fewer active units than that."""
    scales = {"tanh": (1.0, 2.0), "sigmoid": (2.0,), "erf": (0.7,), "selu": (1.0,), "gelu": (1.0,)}
    for name, values in scales.items():
        options = {"initialisations": (), "scales": values, "bias": 0.1}
        settings, found = measured(activations=(name,), **options)
        for one in found:
            assert one.slope == pytest.approx(one.theory_slope, abs=slope_tolerance(settings, 5))


def test_zeros_and_quantiles_of_a_relu():
    _, (found,) = measured(activations=("relu",), initialisations=("he",), scales=())
    assert found.zeros == pytest.approx(np.full(16, 0.5), abs=0.1)
    assert np.all(found.quantiles > 0) and np.all(np.diff(found.quantiles, axis=0) > 0)


def test_slopes_are_fitted_where_float32_holds_the_signals():
    options = {"activations": ("linear",), "initialisations": ()}
    settings, found = measured(scales=(1e-3, 100.0), depth=24, **options)
    for one, exact in zip(found, (-3.0, 2.0), strict=True):
        assert not one.fitted[0] and one.fitted[-1]
        assert one.slope == pytest.approx(exact, abs=slope_tolerance(small(depth=10), 2))
        assert one.theory_slope == pytest.approx(exact, abs=1e-9)
    assert found[0].zeros[0] == 1
    assert found[0].verdict(1.0) is Verdict.VANISHING
    assert found[1].verdict(1.0) is Verdict.EXPLODING


@pytest.mark.parametrize(
    ("rms", "verdict"),
    [
        ([0.1, 1.0], Verdict.VANISHING),
        ([10.0, 1.0], Verdict.EXPLODING),
        ([0.4, 1.0], Verdict.STABLE),
        ([0.0, 1.0], Verdict.OUT_OF_RANGE),
        ([math.nan, math.inf], Verdict.OUT_OF_RANGE),
        ([0.0, 0.0], Verdict.ZERO),
    ],
)
def test_verdicts(rms, verdict):
    theory = MeanField(np.ones(2), np.ones(2))
    one = Distribution("relu", "He", np.array([rms]), np.ones((5, 2)), np.zeros(2), theory)
    assert one.verdict(1.0) is verdict


@pytest.mark.parametrize("name", signals.INITIALISATIONS)
@pytest.mark.parametrize("shape", [(64, 300), (784, 300)])
def test_variances_are_those_of_what_is_drawn(name, shape):
    initialisation = signals.INITIALISATIONS[name]
    weights = initialisation.draw(jax.random.key(0), shape)
    # The mean of N squares has a relative standard deviation of at most √(2/N), 1 % here.
    expected = initialisation.variance(*shape)
    assert float(jnp.mean(jnp.square(weights))) == pytest.approx(expected, rel=0.04)


# The script ---------------------------------------------------------------------------------------

QUICK = ["--width", "20", "--depth", "4", "--examples", "4", "--seeds", "2"]


@pytest.mark.parametrize(("data", "size"), [("digits", 64), ("animals", 784)])
def test_images_have_a_mean_square_of_one(data, size):
    images = signals.images_of(Settings(data=data))
    assert images.shape[1] == size and images.dtype == np.float32
    np.testing.assert_allclose(np.mean(images**2, axis=1), 1, rtol=1e-5)


@pytest.mark.slow
def test_a_run_leaves_table_numbers_and_figure(tmp_path, capsys):
    chosen = ["--activations", "relu", "tanh", "--initialisations", "he", "--scales", "0.5"]
    assert signals.main([*QUICK, *chosen, "--out", str(tmp_path / "run")]) == 0
    table = capsys.readouterr().out
    assert table.index("relu") < table.index("tanh") < table.index("factor of 10")
    assert table.count("σ_w = 0.5") == 2 and table.count("vanishing") >= 2
    content = json.loads((tmp_path / "run" / "signals.json").read_text())
    assert [one["activation"] for one in content["combinations"]] == ["relu"] * 2 + ["tanh"] * 2
    assert content["settings"]["width"] == 20
    with (tmp_path / "run" / "curves.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == ["1", "2", "3", "4"] * 4
    assert float(rows[0]["rms"]) == content["combinations"][0]["first_rms"]
    picture = (tmp_path / "run" / "signals.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def test_the_signals_are_of_single_precision_whatever_jax_is_set_to(tmp_path):
    chosen = ["--activations", "relu", "--initialisations", "he", "--scales", "1"]
    with jax.enable_x64(True):
        assert signals.main([*QUICK, *chosen, "--out", str(tmp_path)]) == 0


@pytest.mark.slow
def test_signals_that_are_all_zero_are_reported_not_fatal(tmp_path, capsys):
    chosen = ["--activations", "relu", "--initialisations", "--scales", "0.001"]
    # The net inputs vanish in float32, and after some 50 layers in float64 as well.
    options = [*QUICK, *chosen, "--depth", "60", "--out", str(tmp_path)]
    assert signals.main(options) == 0
    assert "all zero" in capsys.readouterr().out
    (one,) = json.loads((tmp_path / "signals.json").read_text())["combinations"]
    assert one["slope"] is None and one["zeros"] == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--activations", "swish"], "'swish'"),
        (["--initialisations", "xavier"], "'xavier'"),
        (["--depth", "1"], "--depth must be at least 2"),
        (["--width", "0"], "--width must be at least 1"),
        (["--seed", "99999999999999999999"], "--seed must be at least 0"),
        (["--examples", "2000"], "--examples must be at most"),
        (["--scales", "0"], "--scales must be from"),
        (["--scales", "nan"], "--scales must be from"),
        (["--scales", "2", "2.0"], "--scales takes each value once"),
        (["--bias", "-1"], "--bias must be at least 0"),
        (["--decades", "inf"], "--decades must be at least 0 and finite"),
        (["--activations"], "one or more --activations"),
        (["--initialisations", "--scales"], "one or more --activations"),
    ],
)
def test_bad_options_are_one_line(tmp_path, capsys, options, said):
    assert signals.main([*options, "--out", str(tmp_path / "run")]) == 2
    assert said in one_error_line(capsys)
    assert not (tmp_path / "run").exists()
