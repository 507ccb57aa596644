"""Learning rules on small networks: what is measured, what it shows, what a run leaves behind."""

import json
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbackprop as fb
from experiments import credit, learning_rules, training
from experiments.credit import Settings
from experiments.learning_rules import RULES, RuleName


def one_error_line(capsys):
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


# The angle ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "degrees"),
    [
        ([1.0, 0.0], [0.0, 3.0], 90),
        ([1.0, 0.0], [2.0, 2.0], 45),
        ([1.0, 1.0, 0.0], [1.0, 0.0, 1.0], 60),
        ([1.0, 2.0], [-2.0, -4.0], 180),
        ([0.3, 0.7], [30.0, 70.0], 0),
        # An arc cosine in float32 gives 0 here.
        ([1.0, 0.0], [1.0, 1e-4], np.degrees(1e-4)),
    ],
)
def test_angles_computed_by_hand(a, b, degrees):
    found = credit.angle(jnp.array(a), jnp.array(b))
    np.testing.assert_allclose(found, degrees, rtol=1e-3, atol=1e-5)


def test_nothing_has_no_direction():
    assert jnp.isnan(credit.angle(jnp.zeros(3), jnp.ones(3)))


# What the rules do --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """Network, parameters and loss of a batch, 6–5–4–3."""
    network = learning_rules.network((6, 5, 4, 3), jnp.tanh)
    x = jax.random.normal(jax.random.key(1), (7, 6))

    def loss(params, x):
        logits = jax.vmap(network.apply, in_axes=(None, 0))(params, x)
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - logits[:, 0])

    return network, network.init(jax.random.key(0)), loss, x


def gradient(name, small):
    network, params, loss, x = small
    feedback = RULES[name].draw(network.init, jax.random.key(2))
    rules = RULES[name].rules(feedback, jax.random.key(3))
    return fb.grad(loss, rules=rules)(params, x), feedback


def by_hand(small, back, back_last):
    """The kernels' gradients if errors go back by functions of the errors behind."""
    _, params, _, x = small
    before = [x]
    for layer in params[:-1]:
        before.append(jnp.tanh(before[-1] @ layer["kernel"] + layer["bias"][None]))
    logits = before[-1] @ params[-1]["kernel"] + params[-1]["bias"][None]
    error = (jax.nn.softmax(logits) - jax.nn.one_hot(jnp.zeros(7, int), 3)) / 7
    second = back_last(error) * (1 - before[2] ** 2)
    first = back(second, error) * (1 - before[1] ** 2)
    return [h.T @ e for h, e in zip(before, (first, second, error), strict=True)]


def test_every_rule_sends_errors_back_as_its_definition_says(small):
    weights = [layer["kernel"] for layer in small[1]]
    # For each rule what stands in the place of the last two weights, and of what feeds layer 1.
    expected = {"backprop": weights[1:]}
    for name in ("feedback-alignment", "kolen-pollack"):
        expected[name] = [layer["kernel"] for layer in gradient(name, small)[1]][1:]
    magnitudes = [layer["kernel"] for layer in gradient("sign-symmetric", small)[1]]
    pairs = zip(weights, magnitudes, strict=True)
    expected["sign-symmetric"] = [jnp.sign(w) * jnp.abs(m) for w, m in pairs][1:]
    # Divided by the root of the fan-in.
    expected["sign-concordant"] = [jnp.sign(w) / len(w) ** 0.5 for w in weights][1:]
    expected["last-layer"] = [0 * w for w in weights[1:]]
    for name, (second, last) in expected.items():
        hand = by_hand(small, lambda d, e, b=second: d @ b.T, lambda e, b=last: e @ b.T)
        found = [layer["kernel"] for layer in gradient(name, small)[0]]
        for a, b in zip(found, hand, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=name)
    found, (first, second) = gradient("direct-feedback", small)
    hand = by_hand(small, lambda d, e: e @ first.T, lambda e: e @ second.T)
    for layer, b in zip(found, hand, strict=True):
        np.testing.assert_allclose(layer["kernel"], b, rtol=1e-4, atol=1e-6)


def test_rounded_errors_are_nearly_the_errors(small):
    rounded, exact = gradient("quantised", small)[0], gradient("backprop", small)[0]
    degrees = credit.kernel_angles(rounded, exact)
    assert jnp.all((0 < degrees) & (degrees < 5))


def test_rows_and_names_are_the_same():
    assert tuple(RULES) == get_args(RuleName)
    assert len({rule.colour for rule in RULES.values()}) == len(RULES)


# What it shows ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    """Short trainings on digits by rules with random feedback, and by backpropagation."""
    settings = Settings(passes=10, hidden=(64, 32), seeds=2, records=6)
    task = credit.task_of(settings)
    parts = training.parts_of(task, credit.EVALUATED)
    names = ("backprop", "feedback-alignment", "kolen-pollack")
    return {name: credit.train(name, settings, task, parts) for name in names}


def test_feedback_alignment_learns_and_its_angle_falls_below_90(digits):
    found, reference = digits["feedback-alignment"], digits["backprop"]
    accuracy = found.curve("test_accuracy").median[-1]
    assert reference.curve("test_accuracy").median[-1] - 0.03 < accuracy
    assert found.diverged == 0 and accuracy > 0.9
    start, end = found.records.gradient[:, 0], found.records.gradient[:, -1]
    assert np.all(start[:, :2] > 65)  # random feedback says nothing of the weights
    assert np.all(end[:, :2] < 85) and np.all(end[:, :2] < start[:, :2] - 5)
    np.testing.assert_allclose(found.records.gradient[..., 2], 0, atol=1e-3)
    # The cause: weights turn toward the feedback.
    assert np.all(found.records.weights[:, -1] < found.records.weights[:, 0])


def test_kolen_pollack_turns_its_feedback_too(digits):
    trained, fixed = digits["kolen-pollack"].records, digits["feedback-alignment"].records
    np.testing.assert_allclose(trained.weights[:, 0], fixed.weights[:, 0], rtol=1e-5)
    assert np.all(trained.weights[:, -1] < fixed.weights[:, -1] - 5)


def test_backpropagation_is_at_no_angle_to_itself(digits):
    records = digits["backprop"].records
    np.testing.assert_allclose(records.gradient, 0, atol=1e-3)
    assert np.isnan(records.weights).all()
    assert np.all(records.train_loss[:, -1] < records.train_loss[:, 0] / 4)


# The script ---------------------------------------------------------------------------------------


def test_a_run_leaves_table_numbers_and_figure(tmp_path, capsys):
    quick = ["--passes", "0.2", "--hidden", "8", "--seeds", "2", "--records", "4"]
    names = ["last-layer", "direct-feedback", "sign-symmetric", "quantised"]
    options = ["--rules", *names, *quick, "--activation", "relu", "--out", str(tmp_path / "run")]
    assert credit.main(options) == 0
    said = capsys.readouterr().out
    table = said[said.index("test accuracy, %") :]
    labels = [table.index(RULES[name].label) for name in names]
    assert labels == sorted(labels)
    content = json.loads((tmp_path / "run" / "digits.json").read_text())
    assert list(content["rules"]) == names and content["seeds"] == [0, 1]
    assert content["layers"] == [[64, 8], [8, 10]] and content["settings"]["activation"] == "relu"
    for rule in content["rules"].values():
        shapes = {name: np.shape(values) for name, values in rule["curves"].items()}
        lanes = 2, len(content["steps"])
        assert shapes["train_loss"] == shapes["test_accuracy"] == lanes
        assert shapes["gradient"] == (*lanes, 2) and shapes["weights"] == (*lanes, 1)
    assert content["rules"]["last-layer"]["end"]["gradient"][0] is None  # no update, no angle
    picture = (tmp_path / "run" / "digits.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def test_divergence_is_said_not_fatal(tmp_path, capsys):
    options = ["--rules", "backprop", "--activation", "relu", "--learning-rate", "1e30"]
    quick = ["--passes", "1", "--hidden", "4", "--seeds", "1", "--records", "2"]
    assert credit.main([*options, *quick, "--out", str(tmp_path)]) == 0
    assert "1 of 1 seeds diverged" in capsys.readouterr().out
    content = json.loads((tmp_path / "digits.json").read_text())
    assert content["rules"]["backprop"]["curves"]["train_loss"][0][-1] is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rules", "hebbian"], "'hebbian'"),
        (["--rules", "backprop", "backprop"], "each of them once"),
        (["--rules"], "--rules takes one or more"),
        (["--data", "letters"], "'letters'"),
        (["--hidden"], "--hidden takes"),
        (["--hidden", "8", "0"], "--hidden must be greater than 0"),
        (["--learning-rate", "nan"], "--learning-rate must be greater than 0"),
        (["--passes", "-1"], "--passes must be greater than 0"),
        (["--decay", "1"], "--decay must be a fraction"),
        (["--seed", "-1"], "--seed must be at least 0"),
    ],
)
def test_bad_options_are_one_line(tmp_path, capsys, options, said):
    assert credit.main([*options, "--out", str(tmp_path / "run")]) == 2
    assert said in one_error_line(capsys)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert credit.main(["--out", str(tmp_path / "file" / "run")]) == 1
    one_error_line(capsys)


def test_missing_data(tmp_path, capsys):
    gone = ["--data", "animals", "--data-file", str(tmp_path / "no.npz")]
    assert credit.main([*gone, "--out", str(tmp_path / "run")]) == 1
    assert "missing" in one_error_line(capsys)
