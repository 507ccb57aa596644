"""The benchmark: its ratios, its one-line errors, and that every program's gradient is right."""

import json

import jax
import pytest
from agreement import assert_close

import fbackprop as fb
from experiments import benchmark
from experiments.programs import PROGRAMS, build


def test_ratio_is_the_median_of_pairs():
    ratio = benchmark.Ratio.of([1.0, 4.0, 9.0], [2.0, 4.0, 6.0])
    assert (ratio.lower, ratio.median, ratio.upper, ratio.reference) == (0.75, 1.0, 1.25, 4.0)
    assert ratio.said(2) == "1.00 ±0.25"
    assert benchmark.Ratio.of([1.0], [2.0]).said(2) == "0.50"


@pytest.mark.slow
def test_writes_table_figure_and_json(tmp_path, capsys):
    quick = ["--repeats", "2", "--traces", "1", "--compilations", "1", "--out", str(tmp_path)]
    assert benchmark.main(["--programs", "normalising-flow", *quick]) == 0
    assert "geometric mean" in capsys.readouterr().out
    ratios = json.loads((tmp_path / "benchmark.json").read_text())["ratios"]
    assert set(ratios["normalising-flow"]) == set(benchmark.MEASURES)
    assert (tmp_path / "benchmark.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "word"), [(["--programs", "nope"], "nope"), (["--repeats", "0"], "--repeats")]
)
def test_wrong_options_are_one_line(arguments, word, capsys):
    assert benchmark.main(arguments) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1


@pytest.mark.slow
def test_steps_and_the_exact_solution(tmp_path):
    small = ["--batch", "8", "--cycles", "1", "--solve-batch", "6", "--hidden", "5"]
    out = ["--autoencoder", "12", "6", "--out", str(tmp_path)]
    assert benchmark.main(["optimizers", *small, *out]) == 0
    found = json.loads((tmp_path / "optimizers.json").read_text())
    assert set(found["steps"]) >= {"adam", "kfac", "ekfac"}
    assert found["exact"]["difference"] < 1e-3
    assert benchmark.main(["optimizers", "--batch", "0"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_gradients_of_every_program_agree(name):
    program = build(name)

    def gradient(grad):
        return jax.jit(grad(lambda p: program.loss(p, program.data, grad)))(program.params)

    with jax.numpy_rank_promotion("allow"):
        assert_close(gradient(fb.grad), gradient(jax.grad), scale=100)


@pytest.mark.slow
def test_other_rules_beside_the_plain_sweep(tmp_path):
    arguments = ["rules", "--programs", "lstm", "--repeats", "1", "--traces", "1"]
    assert benchmark.main([*arguments, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "rules.json").read_text())["lstm"]
    assert set(found) == {"default", "sensitivity", "feedback"}
    assert found["default"]["temporary"]["median"] == 1.0
    assert benchmark.main(["rules", "--programs", "rnn"]) == 2
