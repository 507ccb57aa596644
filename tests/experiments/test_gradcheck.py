"""The cross-check finds agreement where there is agreement, and only there."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from error_lines import one_error_line

import fbackprop as fb
from experiments import gradcheck


@pytest.mark.slow
def test_gradients_agree_in_every_precision(capsys):
    assert gradcheck.main(["--networks", "mlp"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if " yes" in line]
    assert [line[:2] for line in lines] == [["mlp", name] for name in gradcheck.TOLERANCES]


@pytest.mark.parametrize("name", ["autoencoder", "lstm"])
def test_gradients_of_other_networks_agree(name):
    rows = gradcheck.check(name, "float32")
    assert rows and all(row.agrees for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", gradcheck.CASES)
def test_every_case_has_a_scalar_loss_in_its_precision(name):
    loss, params = gradcheck.problem(gradcheck.CASES[name](), jnp.dtype("bfloat16"), seed=0)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    value = jax.eval_shape(loss, params)
    assert value.shape == () and value.dtype == jnp.bfloat16


def test_every_network_is_a_case():
    defaults = gradcheck.Settings()
    assert set(defaults.networks) == set(gradcheck.CASES)
    assert set(defaults.precisions) == set(gradcheck.TOLERANCES)


def test_a_wrong_gradient_is_found(monkeypatch, capsys):
    check_grads = fb.check_grads

    def slightly_off(*arguments, **options):
        report = check_grads(*arguments, **options)
        first = dataclasses.replace(report.rows[0], max_rel_error=2e-12)
        return dataclasses.replace(report, rows=(first, *report.rows[1:]))

    monkeypatch.setattr(fb, "check_grads", slightly_off)
    options = ["--networks", "mlp", "--precisions", "float64", "--every-parameter"]
    assert gradcheck.main(options) == 1
    assert capsys.readouterr().out.count(" NO") == 1


def test_unknown_network_is_one_line(capsys):
    assert gradcheck.main(["--networks", "perceptron"]) == 2
    error = capsys.readouterr().err
    assert "'perceptron'" in error and error.count("\n") == 1


def test_a_seed_out_of_range_is_one_line(capsys):
    assert gradcheck.main(["--seed", "-1"]) == 2
    assert "--seed must be from 0" in one_error_line(capsys)
