"""Learning rules on small networks: what is measured, what it shows, what a run leaves behind."""

import contextlib
import io
import json
from pathlib import Path
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from error_lines import one_error_line

import fbackprop as fb
from experiments import command, credit, learning_rules
from experiments.learning_rules import RULES, RuleName

pytestmark = pytest.mark.slow  # mostly compilation


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

    @jax.jit
    def found(feedback, key):
        return fb.grad(loss, rules=RULES[name].rules(feedback, key))(params, x)

    return found(feedback, jax.random.key(3)), feedback


def by_hand(small, back, back_last):
    """The kernels' gradients if errors go back by functions of the error behind and of the last."""
    params, x = jax.tree.map(np.asarray, (small[1], small[3]))
    before = [x]
    for layer in params[:-1]:
        before.append(np.tanh(before[-1] @ layer["kernel"] + layer["bias"]))
    odds = np.exp(before[-1] @ params[-1]["kernel"] + params[-1]["bias"])
    error = (odds / odds.sum(1, keepdims=True) - np.eye(3)[:1]) / len(x)
    second = back_last(error) * (1 - before[2] ** 2)
    first = back(second, error) * (1 - before[1] ** 2)
    return [h.T @ e for h, e in zip(before, (first, second, error), strict=True)]


@pytest.mark.parametrize("name", [name for name in RULES if name != "quantised"])
def test_every_rule_sends_errors_back_as_its_definition_says(small, name):
    found, feedback = gradient(name, small)
    _, *weights = (np.asarray(layer["kernel"]) for layer in small[1])
    if name == "direct-feedback":
        first, second = map(np.asarray, feedback)
        expected = by_hand(small, lambda _, last: last @ first.T, lambda last: last @ second.T)
    else:
        drawn = [np.asarray(layer["kernel"]) for layer in feedback[1:]] or [None, None]
        instead = {
            "backprop": lambda w, b: w,
            "feedback-alignment": lambda w, b: b,
            "kolen-pollack": lambda w, b: b,
            "sign-symmetric": lambda w, b: np.sign(w) * np.abs(b),
            "sign-concordant": lambda w, b: np.sign(w) / len(w) ** 0.5,  # of the fan-in
            "last-layer": lambda w, b: 0 * w,
        }[name]
        second, last = map(instead, weights, drawn)
        expected = by_hand(small, lambda e, _: e @ second.T, lambda e: e @ last.T)
    for layer, by_definition in zip(found, expected, strict=True):
        np.testing.assert_allclose(layer["kernel"], by_definition, rtol=1e-4, atol=1e-6)


def test_rounded_errors_are_nearly_the_errors(small):
    rounded, exact = gradient("quantised", small)[0], gradient("backprop", small)[0]
    degrees = credit.kernel_angles(rounded, exact)
    assert jnp.all((0 < degrees) & (degrees < 5))


def test_rows_and_names_are_the_same():
    assert tuple(RULES) == get_args(RuleName)
    assert len({rule.colour for rule in RULES.values()}) == len(RULES)


# A run --------------------------------------------------------------------------------------------

NAMES = ["last-layer", "backprop", "feedback-alignment", "kolen-pollack"]


class Run(NamedTuple):
    """What a run left behind; of the curves, arrays with leading axes (seeds, records)."""

    folder: Path
    said: str
    content: dict
    curves: dict[str, dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A short run on digits."""
    folder, said = tmp_path_factory.mktemp("credit") / "run", io.StringIO()
    budget = ["--passes", "8", "--hidden", "64", "32", "--seeds", "2", "--records", "6"]
    with contextlib.redirect_stdout(said):
        assert credit.main(["--rules", *NAMES, *budget, "--out", str(folder)]) == 0
    content = json.loads((folder / "digits.json").read_text())
    curves = {
        name: {key: np.array(values, float) for key, values in rule["curves"].items()}
        for name, rule in content["rules"].items()
    }
    return Run(folder, said.getvalue(), content, curves)


def test_it_leaves_table_numbers_and_figure(digits):
    table = digits.said[digits.said.index("test accuracy, %") :]
    labels = [table.index(RULES[name].label) for name in NAMES]
    assert labels == sorted(labels)
    assert list(digits.content["rules"]) == NAMES and digits.content["seeds"] == [0, 1]
    assert digits.content["layers"] == [[64, 64], [64, 32], [32, 10]]
    assert digits.content["settings"]["passes"] == 8
    lanes = 2, len(digits.content["steps"])
    for curves in digits.curves.values():
        assert curves["train_loss"].shape == curves["test_accuracy"].shape == lanes
        assert curves["gradient"].shape == (*lanes, 3) and curves["weights"].shape == (*lanes, 2)
    picture = (digits.folder / "digits.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def test_feedback_alignment_learns_and_its_angle_falls_below_90(digits):
    found, reference = (digits.curves[name] for name in ("feedback-alignment", "backprop"))
    accuracy, other = (np.median(one["test_accuracy"][:, -1]) for one in (found, reference))
    assert accuracy > 0.9 and accuracy > other - 0.03
    start, end = found["gradient"][:, 0, :2], found["gradient"][:, -1, :2]
    assert np.all(start > 65)  # random feedback says nothing of the weights
    assert np.all(end < 85) and np.all(end < start - 5)
    np.testing.assert_allclose(found["gradient"][..., 2], 0, atol=1e-3)
    # The cause: weights turn toward the feedback.
    assert np.all(found["weights"][:, -1] < found["weights"][:, 0])


def test_kolen_pollack_turns_its_feedback_too(digits):
    trained, fixed = (digits.curves[n]["weights"] for n in ("kolen-pollack", "feedback-alignment"))
    np.testing.assert_allclose(trained[:, 0], fixed[:, 0], rtol=1e-5)
    assert np.all(trained[:, -1] < fixed[:, -1] - 5)


def test_backpropagation_is_at_no_angle_to_itself(digits):
    curves = digits.curves["backprop"]
    np.testing.assert_allclose(curves["gradient"], 0, atol=1e-3)
    assert np.isnan(curves["weights"]).all()
    assert np.all(curves["train_loss"][:, -1] < curves["train_loss"][:, 0] / 4)


def test_where_nothing_is_updated_there_is_no_angle(digits):
    curves = digits.curves["last-layer"]
    assert np.isnan(curves["gradient"][..., :2]).all()
    np.testing.assert_allclose(curves["gradient"][..., 2], 0, atol=1e-3)
    assert np.all(curves["train_loss"][:, -1] < curves["train_loss"][:, 0])


def test_divergence_is_said_and_drawn(tmp_path, capsys):
    lost = np.array([[2.3, np.nan], [2.3, 1.0]])
    angles = np.full((2, 2, 2), np.nan)
    records = credit.Record(lost, np.full((2, 2), 0.1), angles, angles[..., 1:])
    found = credit.Outcome("sign-concordant", (0, 4), records, 1.0)
    assert found.line.endswith("4 steps in 1.0 s; 1 of 2 seeds diverged")
    credit.print_table(command.terminal(), [found])
    assert "10.0" in capsys.readouterr().out
    credit.plot(tmp_path / "lost.png", [found])


# How it fails -------------------------------------------------------------------------------------


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
