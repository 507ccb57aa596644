"""Maps and their measures against closed forms of a linear model, and the script itself."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from error_lines import one_error_line

from experiments import attribution, attribution_methods, faithfulness
from experiments.attribution import Examples, Settings
from fbackprop import networks

METHODS = attribution_methods.methods(samples=3, steps=2, epsilon=0.5, gamma=0.25)

# An image of two by two pixels, and a linear model with contributions −2, 3, 0 and 1, and bias 4.
IMAGE = np.array([[2.0, 1.0], [0.0, 0.5]], np.float32)[..., None]
WEIGHTS = np.array([[-1.0, 3.0], [5.0, 2.0]], np.float32)[..., None]
CONTRIBUTIONS = np.array([-2.0, 3.0, 0.0, 1.0])
BIAS = 4.0
VALUE = 6.0


def linear(x):
    return jnp.vdot(WEIGHTS, x) + BIAS


# Maps ---------------------------------------------------------------------------------------------


def weighed(positive, negative):
    """Contributions with those of either sign multiplied."""
    return CONTRIBUTIONS * np.where(CONTRIBUTIONS > 0, positive, negative)


CLOSED_FORMS = {
    "gradient": WEIGHTS.ravel(),
    "gradient-times-input": CONTRIBUTIONS,
    "smooth-gradient": WEIGHTS.ravel(),
    "integrated-gradients": CONTRIBUTIONS,
    "deconvnet": WEIGHTS.ravel(),
    "guided-backprop": WEIGHTS.ravel(),
    # The bias is shared out too; of z = 2 + 0.5 only 2 is.
    "lrp-epsilon": CONTRIBUTIONS * VALUE / 2.5,
    # Positive contributions count 1.25 times: −2 + 1.25 · 4 = 3.
    "lrp-gamma": weighed(1.25, 1.0) * VALUE / 3,
    # 2R over the positive ones, −R over the negative ones.
    "lrp-alpha-beta": weighed(2 * VALUE / 4, VALUE / 2 * 1.0),
}


@pytest.mark.parametrize("name", METHODS)
def test_maps_of_a_linear_model(name):
    found = METHODS[name].explain(linear, jnp.asarray(IMAGE), jax.random.key(0))
    assert found.shape == IMAGE.shape
    np.testing.assert_allclose(np.ravel(found), CLOSED_FORMS[name], rtol=1e-5, atol=1e-6)


def test_rectifiers_are_changed_in_the_networks():
    """Guided backprop passes back neither negative signals nor any where a unit is off."""
    first, last = jnp.array([[1.0, 1.0, -1.0]]), jnp.array([2.0, -1.0, 3.0])

    def network(x):
        return jnp.vdot(last, jax.nn.relu(x @ first))

    found = {
        name: METHODS[name].explain(network, jnp.ones(1), jax.random.key(0)) for name in METHODS
    }
    assert found["gradient"].tolist() == [1.0]
    assert found["deconvnet"].tolist() == [-1.0]  # 2 − 3, units that are off included
    assert found["guided-backprop"].tolist() == [2.0]


@pytest.mark.parametrize("name", ["gradient-times-input", "integrated-gradients", "lrp-gamma"])
def test_what_contributions_sum_to(name):
    expected = {"gradient-times-input": VALUE, "integrated-gradients": 2.0, "lrp-gamma": VALUE}
    assert float(METHODS[name].sums_to(linear, jnp.asarray(IMAGE))) == expected[name]


# Measures -----------------------------------------------------------------------------------------


def test_pixel_flipping_of_a_linear_model():
    """Each pixel that goes takes its contribution with it."""
    relevance = jnp.asarray(CONTRIBUTIONS.reshape(IMAGE.shape))
    order = faithfulness.falling(relevance, jax.random.key(0))
    assert order.tolist() == [1, 3, 2, 0]
    counts = np.arange(5)
    found = faithfulness.flip(linear, jnp.asarray(IMAGE), jnp.zeros_like(IMAGE), order, counts)
    assert found.deletion.tolist() == [6, 3, 2, 2, 4]
    assert found.insertion.tolist() == [4, 7, 8, 8, 6]
    # Trapezoids of a quarter's width: the mean of the inner points and of the two ends.
    assert faithfulness.area(np.asarray(found.deletion), counts) == pytest.approx(12 / 4)


def test_pixels_are_replaced_by_what_is_given():
    order, half = jnp.array([1, 3, 2, 0]), jnp.full_like(IMAGE, 0.5)
    found = faithfulness.flip(linear, jnp.asarray(IMAGE), half, order, np.array([0, 1, 4]))
    assert found.deletion.tolist() == [6, 6 - 3 * 0.5, 4 + 9 * 0.5]


def test_equal_relevance_is_ordered_at_random():
    keys = jax.random.split(jax.random.key(0), 400)
    relevance = jnp.array([0.0, 0.0, 1.0, 0.0])
    orders = np.asarray(jax.vmap(lambda key: faithfulness.falling(relevance, key))(keys))
    assert np.all(orders[:, 0] == 2)
    # Each of three pixels comes second a third of the times, by 2.4 % standard deviation.
    assert np.bincount(orders[:, 1])[[0, 1, 3]] / 400 == pytest.approx([1 / 3] * 3, abs=0.08)


def test_sensitivities_rank_by_magnitude():
    pixels = jnp.array([-3.0, 1.0])
    assert METHODS["gradient"].ranked_by(pixels).tolist() == [3, 1]
    assert METHODS["lrp-gamma"].ranked_by(pixels).tolist() == [-3, 1]


def test_rank_correlations():
    some = np.array([[1.0, 2.0, 3.0, 4.0]] * 4)
    others = np.array([[1, 4, 9, 16], [4, 3, 2, 1], [1, 3, 2, 99], [5, 5, 5, 5]], float)
    within = np.ones_like(some, bool)
    within[2, 3] = False
    found = faithfulness.rank_correlations(some, others, within)
    np.testing.assert_allclose(found, [1, -1, 0.5, np.nan])


def test_defects_are_relative():
    maps = np.array([[[1.0, 2.0]], [[-1.0, -1.0]]])
    assert faithfulness.defect(maps, np.array([4.0, -2.0])).tolist() == [0.25, 0]


# Networks -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lrp-gamma", "lrp-alpha-beta"])
def test_relevance_passes_skip_connections_and_normalisation(name):
    """What is lost is what reaches windows that are black all over, none of these images'."""
    network = networks.resnet((6, 6, 1), 4, channels=(4,), groups=2)
    images = jax.random.uniform(jax.random.key(1), (2, 6, 6, 1)) + 0.1
    examples = Examples(images, jnp.array([0, 3]), jax.random.split(jax.random.key(2)))
    params = network.init(jax.random.key(0))
    found = attribution.maps(network.apply, METHODS[name], params, examples)
    logits = attribution.logits_of(network.apply, params, images)[jnp.arange(2), examples.classes]
    assert found.shape == images.shape
    np.testing.assert_allclose(jnp.sum(found, (1, 2, 3)), logits, rtol=1e-3, atol=1e-3)


def test_redrawn_parameters():
    model = attribution.MODELS["mlp"]()
    params = model.network.init(jax.random.key(0))
    found = attribution.redrawn(model, params, 0)
    for name, expected in {"output_layer": [False, False, True], "all_layers": [True] * 3}.items():
        layers = zip(params, found[name], strict=True)
        changed = [bool(jnp.any(mine["kernel"] != other["kernel"])) for mine, other in layers]
        assert changed == expected


@pytest.mark.parametrize("name", attribution.MODELS)
def test_output_layers_end_in_the_classes(name):
    model = attribution.MODELS[name]()
    params = jax.eval_shape(model.network.init, jax.random.key(0))
    assert params[model.head]["bias"].shape == (10,)


# The script ---------------------------------------------------------------------------------------

QUICK = ["--passes", "1", "--examples", "3", "--animals", "3", "--samples", "2", "--steps", "2"]


@pytest.mark.slow
def test_a_run_leaves_table_numbers_and_figures(tmp_path, capsys):
    assert attribution.main(["--network", "mlp", *QUICK, "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    labels = [method.label for method in METHODS.values()]
    assert all(label in printed for label in labels)
    content = json.loads((tmp_path / "run" / "attribution.json").read_text())
    assert [one["method"] for one in content["methods"]] == [*labels, "the image itself", "random"]
    assert 0.3 < content["test_accuracy"] <= 1
    by_label = {one["method"]: one for one in content["methods"]}
    assert by_label["LRP-αβ"]["sum_off_by"]["upper"] < 1e-4
    assert by_label["random"]["sum_off_by"] is None
    for one in by_label.values():
        # All curves start at the same value and end at the same.
        assert one["deletion"][0] == pytest.approx(one["insertion"][-1], rel=1e-4)
        assert one["deletion"][0] == pytest.approx(by_label["random"]["deletion"][0], rel=1e-4)
        assert len(one["deletion"]) == len(content["fractions"])
    for name in ("attribution.png", "curves.png"):
        picture = (tmp_path / "run" / name).read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def test_shown_are_recognised_images_of_different_animals():
    data = attribution.datasets.animals()
    predicted = np.where(data.test_targets == 4, 4, 0)  # all but dogs are called bears
    shown = attribution.recognised(data, predicted, 5, 0)
    assert shown.classes.tolist() == [0, 4]
    few = attribution.recognised(data, data.test_targets, 2, 0)
    many = attribution.recognised(data, data.test_targets, 10, 0)
    assert many.classes.tolist() == list(range(10))
    np.testing.assert_array_equal(few.images, many.images[few.classes])


def test_nothing_recognised_is_one_line():
    data = attribution.datasets.animals()
    with pytest.raises(attribution.ExperimentError, match="--passes"):
        attribution.recognised(data, (data.test_targets + 1) % 10, 5, 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--network", "vgg"], "'vgg'"),
        (["--passes", "0"], "--passes must be greater than 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--animals", "11"], "--animals must be at most 10"),
        (["--examples", "0"], "--examples must be at least 1"),
        (["--pick", "4294967296"], "--pick must be at least 0"),
        (["--noise", "-1"], "--noise must be at least 0"),
        (["--epsilon", "nan"], "--epsilon must be at least 0"),
        (["--alpha", "0.5"], "--alpha must be at least 1"),
        (["--replacement", "white"], "'white'"),
    ],
)
def test_bad_options_are_one_line(tmp_path, capsys, options, said):
    assert attribution.main([*options, "--out", str(tmp_path / "run")]) == 2
    assert said in one_error_line(capsys)
    assert not (tmp_path / "run").exists()


def test_a_missing_data_file_is_one_line(tmp_path, capsys):
    options = ["--data-file", str(tmp_path / "none.npz"), "--out", str(tmp_path / "run")]
    assert attribution.main(options) == 1
    assert "none.npz" in one_error_line(capsys)


def test_options_reach_the_methods():
    method = attribution.methods_of(Settings(epsilon=0.0))["lrp-epsilon"]
    found = method.explain(linear, jnp.asarray(IMAGE), jax.random.key(0))
    np.testing.assert_allclose(np.ravel(found), CONTRIBUTIONS * VALUE / 2, rtol=1e-5)
