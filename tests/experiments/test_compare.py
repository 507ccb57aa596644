"""Tiny comparisons end to end: what a run leaves behind, and how it fails."""

import csv
import json
import math

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import compare, gauss_newton, report, tasks, training
from experiments.training import Record

TINY = ["--records", "4", "--cg-iterations", "3", "--curvature-batch", "64", "--name", "run"]
ALL = ["sgd", "momentum", "adam", "gauss-newton"]


def run(folder, *options):
    status = compare.main([*TINY, "--out", str(folder), *options])
    return status, folder / "run"


def read(folder):
    with (folder / "curves.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def json_of(path):
    def refuse(constant):
        raise ValueError(constant)

    return json.loads(path.read_text(), parse_constant=refuse)


def one_error_line(capsys):
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


@pytest.fixture
def few_animals(tmp_path):
    random = np.random.default_rng(0)
    file = tmp_path / "few.npz"
    images = random.integers(0, 256, (200, 28, 28), dtype=np.uint8)
    np.savez(file, images=images, labels=np.repeat(np.arange(10, dtype=np.uint8), 20))
    return ["--data-file", str(file)]


@pytest.mark.parametrize(
    "options",
    [
        ["--dataset", "digits", "--budget", "2"],
        ["--dataset", "digits", "--network", "convnet", "--budget", "0.2", "--methods", "adam"],
        ["--dataset", "animals", "--budget", "2", "--methods", "sgd"],
        ["--dataset", "mazur", "--budget", "20"],
        ["--dataset", "autoencoder", "--budget", "2", "--methods", "adam", "gauss-newton"],
        ["--dataset", "autoencoder", "--images", "animals", "--budget", "2", "--methods", "adam"],
    ],
    ids=["digits", "convnet", "animals", "mazur", "autoencoder", "animals autoencoder"],
)
def test_a_run_leaves_files_that_parse(options, tmp_path, few_animals, capsys):
    status, folder = run(tmp_path, *options, *few_animals)
    assert status == 0
    methods = options[options.index("--methods") + 1 :] if "--methods" in options else ALL
    rows = read(folder)
    assert list(rows[0]) == list(Record._fields)
    assert [row["method"] for row in rows if row["step"] == "0"] == methods
    for name in methods:
        losses = [float(row["train_loss"]) for row in rows if row["method"] == name]
        assert losses[-1] < losses[0]
    assert len({row["train_loss"] for row in rows if row["step"] == "0"}) == 1  # one start for all
    assert all((row["test_score"] == "") == ("mazur" in options) for row in rows)
    assert [result["method"] for result in json_of(folder / "summary.json")] == methods
    config = json_of(folder / "config.json")
    assert config["settings"]["dataset"] == options[1] and config["parameters"] > 0
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "gradient-equivalents" in capsys.readouterr().out


def test_the_seed_decides_everything_but_the_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "plot", lambda *arguments: None)  # slow, and not what is tested

    def curves(folder, *options):
        run(tmp_path / folder, "--budget", "1", "--methods", "adam", *options)
        return [dict(row, seconds="") for row in read(tmp_path / folder / "run")]

    assert curves("a") == curves("b") != curves("c", "--seed", "1")


def test_a_method_that_diverges_stops_alone(tmp_path, capsys):
    methods = ["sgd", "gauss-newton"]
    divergent = ["--budget", "2", "--learning-rate", "1e30", "--methods", *methods]
    status, folder = run(tmp_path, "--dataset", "autoencoder", *divergent)
    assert status == 0
    said = capsys.readouterr().out
    assert "sgd stopped at step" in said and "try a lower --learning-rate (it was 1e+30)" in said
    results = json_of(folder / "summary.json")
    assert [result["method"] for result in results] == methods
    assert results[0]["remark"] and results[0]["train_loss"] is None
    assert results[-1]["remark"] is None and results[-1]["train_loss"] < 10
    rows = [row for row in read(folder) if row["method"] == "sgd"]
    assert math.isfinite(float(rows[0]["train_loss"]))
    assert not math.isfinite(float(rows[-1]["train_loss"]))
    assert (folder / "curves.png").exists()


def test_a_loss_that_rises_is_remarked_on(tmp_path, capsys):
    options = ["--budget", "1", "--learning-rate", "1e30", "--methods", "sgd"]
    assert run(tmp_path, *options)[0] == 0
    assert "sgd ended with a higher loss than it started from" in capsys.readouterr().out


def test_an_interruption_keeps_what_was_written(tmp_path, capsys, monkeypatch):
    show = compare.ProgressDisplay.show

    def interrupt(display, record):
        show(display, record)
        if record.method == "adam" and record.step:
            raise KeyboardInterrupt

    monkeypatch.setattr(compare.ProgressDisplay, "show", interrupt)
    status, folder = run(tmp_path, "--dataset", "mazur", "--budget", "20")
    assert status == 130
    assert str(folder) in capsys.readouterr().err
    assert [row["method"] for row in read(folder)][-2:] == ["adam", "adam"]
    assert len(json_of(folder / "summary.json")) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dataset", "letters"], "'letters'"),
        (["--rate", "1"], "--rate"),
        (["--budget", "much"], "--budget"),
        (["--budget", "-1"], "--budget must be greater than 0"),
        (["--budget", "nan"], "--budget must be greater than 0"),
        (["--batch-size", "0"], "--batch-size must be greater than 0"),
        (["--dataset", "mazur", "--network", "mlp"], "leave --network out"),
        (["--methods", "sgd", "sgd"], "each of them once"),
        (["--methods"], "--methods takes"),
    ],
)
def test_options_that_make_no_sense(options, words, tmp_path, capsys):
    status, folder = run(tmp_path, *options)
    assert status == 2
    assert words in one_error_line(capsys)
    assert not folder.exists()


def test_a_missing_data_file(tmp_path, capsys):
    status, folder = run(tmp_path, "--dataset", "animals", "--data-file", str(tmp_path / "no.npz"))
    assert status == 1 and not folder.exists()
    assert "missing" in one_error_line(capsys)


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    status, _ = run(tmp_path / "file", "--dataset", "mazur")
    assert status == 1
    assert "give another --out" in one_error_line(capsys)


def test_a_name_that_is_taken(tmp_path, capsys):
    quick = ["--dataset", "mazur", "--budget", "2", "--methods", "sgd"]
    assert run(tmp_path, *quick)[0] == 0
    capsys.readouterr()
    assert run(tmp_path, *quick)[0] == 2
    assert "--overwrite" in one_error_line(capsys)
    assert run(tmp_path, *quick, "--overwrite")[0] == 0


def test_folders_without_a_name_are_numbered(tmp_path):
    made = [report.make_folder(tmp_path, None, "task", overwrite=False).name for _ in range(3)]
    assert made == ["task", "task-2", "task-3"]


def test_the_product_is_that_of_the_gauss_newton_matrix():
    with jax.enable_x64(True):
        task = tasks.build("mazur")
        params = task.init(jax.random.key(0))
        inputs, targets = (jnp.asarray(part) for part in task.train)
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        jacobian = jax.jacfwd(lambda flat: task.apply(unravel(flat), inputs[0]))(flat)
        vector = jnp.arange(1.0, 9.0)
        found = gauss_newton.product(task, params, inputs, targets)(unravel(vector))
        # The Hessian of half the squared error is the identity.
        expected = jacobian.T @ (jacobian @ vector)
        np.testing.assert_allclose(jax.flatten_util.ravel_pytree(found)[0], expected, rtol=1e-12)


def test_conjugate_gradients_solve_and_say_what_is_left():
    matrix = jnp.diag(jnp.array([1.0, 2.0, 5.0])) + 0.1
    target = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([3.0])}
    flat, unravel = jax.flatten_util.ravel_pytree(target)

    def multiply(vector):
        return unravel(matrix @ jax.flatten_util.ravel_pytree(vector)[0])

    for iterations, exact in ((3, True), (1, False)):
        found = gauss_newton.conjugate_gradients(multiply, target, iterations, 1e-6)
        solution, residual = (jax.flatten_util.ravel_pytree(tree)[0] for tree in found[:2])
        np.testing.assert_allclose(residual, flat - matrix @ solution, atol=1e-5)
        assert bool(jnp.linalg.norm(residual) < 1e-4) == exact
        assert found.products == iterations


def test_a_step_that_raises_the_loss_is_not_taken():
    with jax.enable_x64(True):
        task = tasks.build("mazur")
        start = jax.tree.map(lambda leaf: 30 * leaf, task.init(jax.random.key(0)))
        batch = [jnp.asarray(part) for part in task.train]
        tiny = jnp.asarray(1e-12)
        step = gauss_newton.step(task, start, tiny, *batch, iterations=20)
        after = task.mean_loss(step.params, *batch)
        assert bool(step.accepted) == bool(after < step.loss)
        if not step.accepted:
            assert step.damping == tiny * gauss_newton.REJECTED


def test_batches_visit_every_example_once_per_shuffle():
    order = training.batches(examples=10, size=4, count=5, seed=0).reshape(-1)
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    full = training.batches(examples=3, size=3, count=2, seed=0)
    assert full.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_stops_grow_to_the_last_step():
    for last in (1, 2, 7, 1000):
        stops = training.stops(last, 10, every=False)
        assert stops == sorted(set(stops)) and stops[0] == 1 and stops[-1] == last
    assert training.stops(4, 10, every=True) == [1, 2, 3, 4]
