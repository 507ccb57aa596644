"""Tiny comparisons: what a run leaves behind, what it means, and how it fails."""

import csv
import dataclasses
import io
import json
import math
import os
import re
import signal
import time
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from error_lines import one_error_line
from rich.console import Console

from experiments import compare, figures, outcome, report, search, tasks, training
from experiments.cost import Cost
from experiments.optimizers import OPTIMIZERS, Optimizer, OptimizerName
from experiments.outcome import Outcome, Quartiles
from experiments.training import Curve, Schedule
from fbackprop import losses

PLENTY = 2.0**30


def run(folder, *options):
    status = compare.main(["--out", str(folder), "--name", "run", *options])
    return status, folder / "run"


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def json_of(path):
    def refuse(constant):
        raise ValueError(constant)

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def line():
    """A task that compiles fast: a linear model, twelve examples to learn from and three others."""
    random = np.random.default_rng(0)
    inputs = random.standard_normal((15, 3)).astype(np.float32)
    targets = (inputs @ np.array([1.0, -2.0, 0.5], np.float32))[:, None] + 0.1
    return tasks.Task(
        init=lambda key: jax.random.normal(key, (3, 1)),
        apply=lambda params, x: x @ params,
        loss=losses.squared_error,
        score=lambda output, target: jnp.sum(jnp.abs(output - target)),
        score_name="test error",
        train=(inputs[:12], targets[:12]),
        test=(inputs[12:], targets[12:]),
        budget=tasks.Budget(1, 4, 12),
    )


def small_search(task, optimizer, settings, seeds, stops, batch_size=4, **options):
    options = {"memory": PLENTY} | options
    parts = training.parts_of(task, 10_000)
    schedule = Schedule(batch_size, tuple(stops))
    starts = training.starts(task, schedule, seeds)
    return search.search(task, optimizer, settings, starts, schedule, parts, **options)


# What a run leaves behind -------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_leaves_files_that_parse(tmp_path, capsys):
    names = ["adam", "kfac", "levenberg-marquardt"]
    budget = ["--steps", "6", "--trials", "4", "--seeds", "2", "--records", "4"]
    status, folder = run(tmp_path, "--problem", "diabetes", "--optimizers", *names, *budget)
    assert status == 0
    rows = rows_of(folder / "curves.csv")
    assert tuple(rows[0]) == report.CURVES
    ends = [row for row in rows if row["step"] == "6"]
    assert [row["optimizer"] for row in ends] == [n for n in names for _ in range(4 * 2)]
    starts = {(row["seed"], row["train_loss"]) for row in rows if row["step"] == "0"}
    assert len(starts) == 2  # one start for all, for each seed
    tried = rows_of(folder / "search.csv")
    assert [row["optimizer"] for row in tried if row["best"] == "True"] == names
    summary = json_of(folder / "summary.json")
    assert [result["optimizer"] for result in summary["optimizers"]] == names
    for result, size in zip(summary["optimizers"], [64, 64, 354], strict=True):
        assert result["batch_size"] == size and result["step_gradients"] > 0
        ends = result["train_loss"]
        assert ends["lower"] <= ends["median"] <= ends["upper"] < 0.6
    adam = summary["optimizers"][0]  # alone of first order, so it reaches the target, its own end
    assert adam["train_loss"]["median"] == summary["target"]
    assert adam["to_target"]["seeds_that_reach"] >= 1 and adam["to_target"]["steps"]["lower"] <= 6
    config = json_of(folder / "config.json")
    assert config["parameters"] == 897 and len(config["tried"]["kfac"]) == 4
    for figure in ("curves.png", "search.png"):
        assert (folder / figure).read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "gradient-equivalents" in said and "Levenberg–Marquardt: 8 runs of 6 steps" in said


@pytest.mark.slow
def test_what_diverges_is_said_and_drawn(tmp_path):
    lost = outcome_of("sgd", np.full((2, 3, 4), math.nan), [{"learning_rate": r} for r in (1, 2)])
    risen = outcome_of("kfac", [[[1, 2, 3]]], [{"learning_rate": 1, "damping": 1}])
    assert "no setting kept the loss finite" in report.line(lost)
    assert "no setting lowered the loss" in report.line(risen)
    report.write(tmp_path, [lost, risen], math.inf)
    result, _ = json_of(tmp_path / "summary.json")["optimizers"]
    assert result["train_loss"]["median"] is None and result["diverged"] == 2
    figures.curves(tmp_path / "curves.png", [lost, risen], math.inf, "test error")
    figures.search(tmp_path / "search.png", [lost, risen])
    figures.search(tmp_path / "search.png", [lost])  # with nothing to set the axis by
    huge = outcome_of("sgd", [[[3, 1e35], [3, 2e35]]] * 2, [{"learning_rate": r} for r in (1, 2)])
    figures.search(tmp_path / "search.png", [huge])


def test_an_interruption_keeps_what_was_written(tmp_path, capsys, monkeypatch):
    measure = compare.cost.measure

    def interrupt(task, optimizer, *rest):
        if optimizer is OPTIMIZERS["adam"]:
            raise KeyboardInterrupt
        return measure(task, optimizer, *rest)

    monkeypatch.setattr(compare.cost, "measure", interrupt)
    quick = ["--problem", "mazur", "--steps", "2", "--trials", "1", "--seeds", "1"]
    status, folder = run(tmp_path, *quick, "--optimizers", "sgd", "adam")
    assert status == 130 and str(folder) in capsys.readouterr().err
    assert {row["optimizer"] for row in rows_of(folder / "curves.csv")} == {"sgd"}


# Training and search ------------------------------------------------------------------------------


def test_a_lane_is_what_a_plain_loop_does(line):
    settings = [{"learning_rate": rate} for rate in (1e-3, 1e-1)]
    found = small_search(line, OPTIMIZERS["adam"], settings, [0, 5], (0, 1, 4), 12)
    optimizer = optax.adam(1e-1)
    params = line.init(jax.random.split(jax.random.key(5), 3)[0])
    state = optimizer.init(params)
    expected = [line.mean_loss(params, *line.train)]
    for _ in range(4):
        gradient = jax.grad(line.mean_loss)(params, *line.train)
        change, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, change)
        expected.append(line.mean_loss(params, *line.train))
    curves = jax.tree.map(lambda leaf: leaf[1, 1], found.curves)
    np.testing.assert_allclose(curves.train_loss, np.array(expected)[[0, 1, 4]], 1e-5)
    np.testing.assert_allclose(curves.test_loss[-1], line.mean_loss(params, *line.test), 1e-5)
    apart = jax.vmap(line.score)(line.test[0] @ params, line.test[1])
    np.testing.assert_allclose(curves.test_score[-1], jnp.mean(apart), 1e-5)


@pytest.mark.slow
def test_the_line_search_of_another_library_finds_what_it_needs(line):
    found = small_search(line, OPTIMIZERS["lbfgs"], [{}], [0], (0, 3), 12)
    start, end = found.curves.train_loss[0, 0]
    assert end < start / 2


@pytest.mark.slow
def test_chunks_change_nothing_but_the_memory(line):
    settings, seeds = [{"learning_rate": rate} for rate in (1e-3, 1e-2, 1e-1)], [0]
    asked = line, OPTIMIZERS["sgd"], settings, seeds, (0, 2, 9)
    records = []
    whole = small_search(*asked, started=records.append)
    single = small_search(*asked, memory=1.0, started=records.append)
    assert (whole.at_once, single.at_once) == (3, 1)
    assert records == [3, 9]
    np.testing.assert_allclose(single.curves.train_loss, whole.curves.train_loss, 1e-5)
    lanes = {"x": jnp.arange(3)}, training.Start({}, jnp.zeros((3, 0)), jnp.arange(3))
    assert [chunk[0]["x"].tolist() for chunk in search._chunks(lanes, 2)] == [[0, 1], [2, 2]]


@pytest.mark.slow
def test_what_does_not_fit_into_memory_is_left_out_and_the_rest_goes_on(
    tmp_path, capsys, monkeypatch
):
    options = ["--problem", "mazur", "--steps", "2", "--seeds", "1", "--trials", "1"]
    room = iter([PLENTY, 0, 0])
    monkeypatch.setattr(search, "memory_of_device", lambda: next(room))
    status, folder = run(tmp_path, *options, "--optimizers", "sgd", "adam")
    assert status == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Adam is left out: 1 of its runs at once take" in said and "--large-batch" in said
    summary = json_of(folder / "summary.json")
    assert [result["optimizer"] for result in summary["optimizers"]] == ["sgd"]
    status, _ = run(tmp_path, *options, "--optimizers", "sgd", "--overwrite")
    assert status == 1 and "no optimizer was run" in one_error_line(capsys)


def test_what_an_optimizer_does_now_and_then_stays_a_branch(line):
    def now_and_then(learning_rate):
        def update(gradient, count, params=None):
            factor = jax.lax.cond(count % 10 == 0, lambda: learning_rate, lambda: 0 * learning_rate)
            return jax.tree.map(lambda g: -factor * g, gradient), count + 1

        return optax.GradientTransformation(lambda params: jnp.int32(0), update)

    row = Optimizer("", now_and_then, {"learning_rate": (1, 2)}, "small", "")
    schedule = Schedule(4, (0, 20))
    train = training.trainer(line, row, schedule, lambda: True)
    lanes = {"learning_rate": jnp.ones(3)}, training.starts(line, schedule, [0, 1, 2])
    mapped = jax.jit(jax.vmap(train, in_axes=(0, 0, None)))
    text = mapped.lower(*lanes, training.parts_of(line, 100)).as_text()
    assert text.count("stablehlo.case") == 2  # this one, and whether to go on


@pytest.fixture
def _ctrl_c_raises():
    """As in a terminal: a suite that a shell runs in the background is started to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("_ctrl_c_raises")
def test_ctrl_c_ends_training_at_the_next_record(line):
    seen, rates = [], [{"learning_rate": 0.1}]

    def recorded():
        seen.append(len(seen))
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)  # long enough for the main thread to hear of it

    with pytest.raises(KeyboardInterrupt):
        small_search(line, OPTIMIZERS["sgd"], rates, [0], range(50), recorded=recorded)
    assert len(seen) == 2


def test_batches_visit_every_example_once_per_shuffle(line):
    data = jnp.arange(10), jnp.arange(10)
    ten = line._replace(train=data, init=lambda key: ())
    start = training.starts(ten, Schedule(4, (5,)), [0])
    batch = training.batches(start.order[0], data, Schedule(4, (5,)))
    order = np.concatenate([batch(step)[0] for step in range(5)])
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10].tolist() != order[10:].tolist()
    assert training.starts(ten, Schedule(10, (5,)), [0]).order.shape == (1, 0)
    assert training.batches(start.order[0], data, Schedule(10, (5,)))(3) is data


def test_stops_grow_to_the_last_step():
    for last in (1, 2, 7, 1000):
        stops = training.stops(last, 10)
        assert stops == tuple(sorted(set(stops))) and stops[0] == 0 and stops[-1] == last


def test_settings_fit_the_trials_and_the_ranges():
    plain, curved, none = (OPTIMIZERS[name] for name in ("sgd", "natural-gradient", "lbfgs"))
    assert [len(search.grid(plain, n)) for n in (1, 2, 9)] == [1, 2, 9]
    assert [len(search.grid(curved, n)) for n in (1, 2, 5, 6, 9)] == [1, 2, 4, 6, 9]
    assert search.grid(none, 9) == search.drawn(none, 9, 0) == [{}]
    low, high = plain.ranges["learning_rate"]
    rates = [setting["learning_rate"] for setting in search.grid(plain, 5)]
    assert (rates[0], rates[-1]) == (low, high)
    drawn = search.drawn(curved, 50, 0)
    assert drawn == search.drawn(curved, 50, 0) != search.drawn(curved, 50, 1)
    for name, (low, high) in curved.ranges.items():
        values = [setting[name] for setting in drawn]
        assert low <= min(values) < math.sqrt(low * high) / 3 < max(values) <= high
    given = compare.Settings(learning_rates=(0.5, 0.1, 0.2), trials=9)
    assert len(compare.settings_of(given, curved)) == 9
    assert [s["learning_rate"] for s in compare.settings_of(given, plain)] == [0.5, 0.1, 0.2]
    assert compare.settings_of(given, none) == [{}]


def test_every_optimizer_takes_its_hyper_parameters():
    assert set(OPTIMIZERS) == set(get_args(OptimizerName))
    for row in OPTIMIZERS.values():
        for setting in search.grid(row, 1):
            assert callable(row.build(**setting).update), row.label


# What it means ------------------------------------------------------------------------------------


def outcome_of(name, losses, settings):
    """An outcome with these training losses, (S, K, R), recorded after each of R − 1 steps."""
    losses = np.asarray(losses, float)
    curves = Curve(losses, losses, losses)
    schedule = Schedule(1, tuple(range(losses.shape[2])))
    seeds = list(range(losses.shape[1]))
    found = search.Found(curves, losses.shape[0] * losses.shape[1], 0.0, 0.0)
    return Outcome(name, settings, seeds, schedule, found, Cost(0.5, 0.1))


@pytest.mark.parametrize(("width", "lines"), [(160, 2), (80, 5)])
def test_numbers_of_a_narrow_table_stay_whole(width, lines):
    """There are two tables then, with an empty line between them."""
    shown = io.StringIO()
    found = outcome_of("sgd", [[[3, 0.123456]] * 2], [{"learning_rate": 0.1}])
    console = Console(file=shown, width=width)
    report.print_results(console, [found], 0.2, "largest test error")
    table = shown.getvalue().splitlines()[:-1]
    assert len(table) == lines and all(len(line) <= width for line in table)
    assert "largest test error" in table[0] and "gradients" in table[-2]


def test_the_best_setting_has_the_lowest_median_and_what_diverged_is_infinite():
    nan = math.nan
    losses = [
        [[3, 2, 1], [3, 2, 1], [3, 2, 1]],
        [[3, 0.1, 0.1], [3, 0.2, 0.2], [3, nan, nan]],  # the best: one seed of three diverged
        [[3, 0, 0], [3, nan, nan], [3, nan, nan]],
    ]
    rates = [{"learning_rate": rate} for rate in (0.1, 0.2, 0.3)]
    found = outcome_of("sgd", losses, rates)
    assert found.setting == {"learning_rate": 0.2} and found.at_the_edge() == []
    assert found.end("train_loss") == Quartiles(0.1, 0.2, math.inf)
    assert found.final.median.tolist() == [1, 0.2, math.inf]
    assert report.summary(found, 0.2)["diverged"] == 1
    assert outcome_of("sgd", losses[:2], rates[:2]).at_the_edge() == ["learning_rate"]


def test_the_median_of_an_even_number_is_the_worse_one():
    """Higher of losses and errors, lower of accuracies."""
    losses = [[[3, 1], [3, 2]]]
    found = outcome_of("sgd", losses, [{}])
    assert found.end("train_loss").median == 2 and found.end("test_score").median == 1
    found = dataclasses.replace(found, score_rises=False)
    assert found.end("test_score").median == 2


@pytest.mark.parametrize("seeds", range(1, 9))
def test_quartiles_are_as_far_from_either_end(seeds):
    for worse in ("higher", "lower"):
        lower, _, upper = outcome.quartiles(np.arange(1.0, seeds + 1), worse=worse)
        assert lower + upper == seeds + 1


@pytest.mark.parametrize("limits", [(0.0135, 0.028), (200, 290), (100, 140), (1, 99), (1e-5, 0.3)])
def test_labels_of_a_logarithmic_axis_are_where_they_say(limits):
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(2.5, 2))
    panel.plot(limits, limits)
    figures._logarithmic(panel)
    panel.set_xlim(*limits)
    figure.canvas.draw()
    shown = {}
    for which in ("major", "minor"):
        for place, tick in zip(panel.get_xticks(minor=which == "minor"),
                               panel.get_xticklabels(which=which), strict=True):  # fmt: skip
            if tick.get_text() and limits[0] <= place <= limits[1]:
                shown[tick.get_text()] = float(place)
    plt.close(figure)
    assert 2 <= len(shown) <= 8
    power = re.compile(r"\$\\mathdefault\{(?:(\d+)\\times)?10\^\{(-?\d+)\}\}\$")
    for text, place in shown.items():
        found = power.fullmatch(text)
        value = int(found[1] or 1) * 10.0 ** int(found[2]) if found else float(text)
        np.testing.assert_allclose(value, place, rtol=1e-9)


def test_what_raised_the_loss_sets_no_target():
    raised = outcome_of("sgd", [[[1, 1e20]]], [{}])
    assert math.isnan(outcome.target_of([raised])) and raised.reach(math.nan).seeds == 0
    assert outcome.target_of([raised, outcome_of("adam", [[[3, 2]]], [{}])]) == 2


def test_a_target_is_reached_at_the_first_record_below_it():
    losses = [[[4, 3, 2, 1], [4, 1, 2, 1], [4, 4, 4, 4]]]
    found = outcome_of("adam", losses, [{}])
    reached = found.reach(2)
    assert reached.seeds == 2
    assert reached.steps == Quartiles(1, 2, math.inf)
    assert reached.seconds == Quartiles(0.5, 1.0, math.inf)
    np.testing.assert_allclose(reached.gradients, (0.1, 0.2, math.inf))
    # The target is where the best first-order method ended, whatever the others did.
    lower = outcome_of("kfac", np.asarray(losses) / 10, [{}])
    assert outcome.target_of([found, lower]) == 1
    assert outcome.target_of([lower]) == 0.1


@pytest.mark.parametrize("name", get_args(tasks.ProblemName))
def test_every_problem_fits_together(name):
    task = tasks.build(name)
    with jax.enable_x64(task.precision == "float64"):
        params = jax.eval_shape(task.init, jax.random.key(0))
        few = training.parts_of(task, 2)
        point = jax.eval_shape(lambda params: training.record(task, params, few), params)
    assert all(leaf.shape == () for leaf in point)
    assert all(leaf.dtype == task.precision for leaf in point[:2])
    assert len(task.train[0]) == len(task.train[1]) and len(task.test[0]) == len(task.test[1])


# How it fails -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--problem", "letters"], "'letters'"),
        (["--rate", "1"], "--rate"),
        (["--steps", "many"], "--steps"),
        (["--steps", "0"], "--steps must be greater than 0"),
        (["--passes", "nan"], "--passes must be greater than 0"),
        (["--learning-rates", "0.1", "-1"], "--learning-rates must be greater than 0"),
        (["--dampings"], "--dampings takes one or more"),
        (["--learning-rates", "1", "1"], "each of them once"),
        (["--passes", "1", "--steps", "1"], "leave one out"),
        (["--seed", "-1"], "--seed must be"),
        (["--seed", "2147483646"], "--seed must be"),
        (["--learning-rates", "1", "2", "3", "--trials", "2"], "make 3 settings"),
        (["--optimizers", "sgd", "sgd"], "each of them once"),
        (["--optimizers"], "--optimizers takes"),
    ],
)
def test_options_that_make_no_sense(options, words, tmp_path, capsys):
    status, folder = run(tmp_path, *options)
    assert status == 2
    assert words in one_error_line(capsys)
    assert not folder.exists()


def test_a_missing_data_file(tmp_path, capsys):
    gone = ["--problem", "animals-mlp", "--data-file", str(tmp_path / "no.npz")]
    status, folder = run(tmp_path, *gone)
    assert status == 1 and not folder.exists()
    assert "missing" in one_error_line(capsys)


def test_folders_that_cannot_be_had(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file", "--problem", "mazur")[0] == 1
    assert "give another --out" in one_error_line(capsys)
    (tmp_path / "run").mkdir()
    assert run(tmp_path, "--problem", "mazur")[0] == 2
    assert "--overwrite" in one_error_line(capsys)
    (tmp_path / "run" / "search.png").write_text("of an earlier run")
    assert report.make_folder(tmp_path, "run", "", overwrite=True) == tmp_path / "run"
    assert not (tmp_path / "run" / "search.png").exists()


def test_folders_without_a_name_are_numbered(tmp_path):
    made = [report.make_folder(tmp_path, None, "task", overwrite=False).name for _ in range(3)]
    assert made == ["task", "task-2", "task-3"]
