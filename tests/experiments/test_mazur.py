"""The worked example agrees with the article where it should, and says so where it does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from error_lines import one_error_line
from rich.console import Console

from experiments import mazur
from experiments.mazur import Agreement


@pytest.fixture(scope="module")
def stages():
    return mazur.calculation()


@pytest.mark.parametrize(
    ("value", "published", "expected"),
    [
        (0.35, "0.35", Agreement.YES),
        (0.3549, "0.35", Agreement.YES),
        (0.3589, "0.35", Agreement.LAST_DIGIT),  # cut, not rounded
        (0.361, "0.35", Agreement.NO),
        (3.51019e-5, "0.0000351085", Agreement.NO),
        (-0.0380982365, "-0.038098237", Agreement.YES),
    ],
)
def test_agreement_is_judged_at_the_published_digits(value, published, expected):
    assert mazur.agreement(value, published) is expected


def test_every_number_of_the_first_pass_agrees(stages):
    binding = [row for rows in stages.values() for row in rows if row.binding and row.published]
    assert len(binding) == len(mazur.PUBLISHED) - 4
    rounded = [row.name for row in binding if row.agreement is Agreement.LAST_DIGIT]
    assert rounded == ["∂E o2/∂h1"]  # computed there from numbers that were rounded before
    assert {row.agreement for row in binding} == {Agreement.YES, Agreement.LAST_DIGIT}


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("δ o1", 0.1384985616),
        ("δ o2", -0.0380982365),
        ("δ h1", 0.0087713547),
        ("δ h2", 0.0099542547),
        ("∂E/∂w8", -0.0227402422),
    ],
)
def test_error_signals_and_gradients(stages, name, exact):
    (row,) = (row for rows in stages.values() for row in rows if row.name == name)
    assert row.value == pytest.approx(exact, abs=5e-11)


def test_exact_numbers_after_training_and_the_articles_own(stages):
    exact = [0.2910277737, 3.51019e-5, 0.0159136, 0.9840643]
    after = stages["After training"]
    assert [row.value for row in after] == pytest.approx(exact, rel=3e-6)
    assert {row.agreement for row in after} == {Agreement.OTHERWISE}
    assert {row.agreement for row in stages["What gives the article's"]} == {Agreement.YES}


@pytest.mark.parametrize(("published", "status"), [("0.35891", 0), ("0.36", 0), ("0.37", 1)])
def test_a_wrong_number_fails_the_run(stages, published, status):
    update = [
        row._replace(published=published) for row in stages["One update"] if row.name == "w5+"
    ]
    assert mazur.print_verdict(Console(quiet=True), {**stages, "One update": update}) == status


def test_runs_as_a_module():
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "experiments.mazur", "--decimals", "12"]
    # Into a pipe of letters that the tables have more than.
    done = subprocess.run(
        command, cwd=root, env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "0.138498561629" in done.stdout


def test_unknown_option_is_one_line(capsys):
    assert mazur.main(["--rate", "1"]) == 2
    one_error_line(capsys)


def test_decimals_out_of_range_are_one_line(capsys):
    assert mazur.main(["--decimals", "-1"]) == 2
    assert "--decimals must be from 0 to 100" in one_error_line(capsys)
