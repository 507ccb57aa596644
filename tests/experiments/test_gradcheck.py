"""The cross-check finds agreement where there is agreement, and only there."""

import dataclasses

import pytest

import fbackprop as fb
from experiments import gradcheck


@pytest.mark.parametrize("precision", gradcheck.TOLERANCES)
def test_the_small_networks_agree(precision, capsys):
    options = ["--networks", "mlp", "autoencoder", "--precisions", precision]
    assert gradcheck.main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if " yes" in line] == [
        ["mlp", precision],
        ["autoencoder", precision],
    ]


@pytest.mark.parametrize("name", ["convnet", "resnet", "lstm", "transformer"])
def test_the_large_networks_agree(name):
    rows = gradcheck.check(name, "float32")
    assert rows and all(row.agrees for row in rows)


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
