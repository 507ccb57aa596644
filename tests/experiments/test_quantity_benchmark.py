"""The benchmark of quantities: what it writes, its checks, and its one-line errors."""

import json

import jax
import jax.numpy as jnp
import pytest

from experiments import benchmark, quantity_benchmark, quantity_programs
from experiments.quantity_benchmark import ALONE, BY_JAX, REUSED, WITH_GRADIENT
from experiments.quantity_programs import NETWORKS, QUANTITIES, Case

MEASURED = ("example-norms", "kfac")
TINY = Case("mlp", {"widths": (5, 4, 3)}, 6, MEASURED)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The benchmark on a tiny network, with further arguments; returns its exit status."""
    monkeypatch.setitem(NETWORKS, "tiny", TINY)
    quick = ["quantities", "--networks", "tiny", "--repeats", "2", "--out", str(tmp_path)]
    return lambda *arguments: benchmark.main([*quick, *arguments])


def interpreter(path, script):
    """A program that stands for a Python interpreter with PyTorch."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.slow
def test_writes_tables_figure_and_json(run, tmp_path, capsys):
    answer = {"kfac": {"BackPACK": [[0.5, 0.75], [0.25, 0.25]]}}
    python = interpreter(tmp_path / "python", f"echo '{json.dumps(answer)}'")
    assert run("--torch", python) == 0
    printed = capsys.readouterr().out
    measured = json.loads((tmp_path / "quantities.json").read_text())["measured"]["tiny"]
    assert tuple(measured) == MEASURED
    assert set(measured["example-norms"]) == {ALONE, WITH_GRADIENT, BY_JAX}
    assert set(measured["kfac"]) == {ALONE, WITH_GRADIENT, "BackPACK"}
    assert measured["kfac"]["BackPACK"]["time"]["median"] == 2.5
    assert measured["kfac"][ALONE]["time"]["median"] > 0
    for table in (printed, (tmp_path / "quantities.md").read_text()):
        assert all(name in table for name in MEASURED) and "BackPACK 2.50 ±0.25" in table
    assert (tmp_path / "quantities.png").stat().st_size > 1000


def test_without_pytorch_says_so(run, monkeypatch, capsys):
    monkeypatch.setattr(quantity_benchmark.importlib.util, "find_spec", lambda name: None)
    assert run("--quantities", "example-norms") == 0
    assert "BackPACK and Opacus are left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--networks", "nope"], "nope"),
        (["--quantities", "nope"], "nope"),
        (["--repeats", "0"], "--repeats"),
        (["--torch", "nowhere/python"], "nowhere/python"),
        (["--networks", "transformer", "--quantities", "kflr"], "kflr"),
    ],
)
def test_wrong_options_are_one_line(arguments, word, capsys):
    assert benchmark.main(["quantities", *arguments]) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1


def test_failing_interpreter_is_one_line(run, tmp_path, capsys):
    python = interpreter(tmp_path / "python", "echo 'No module named torch' >&2; exit 1")
    assert run("--torch", python) == 1
    error = capsys.readouterr().err
    assert "No module named torch" in error and error.count("\n") == 1


def test_large_results_are_measured_into_the_last_ones_too(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quantity_benchmark, "LARGE", 100)
    monkeypatch.setattr(quantity_benchmark.importlib.util, "find_spec", lambda name: None)
    assert run("--quantities", "example-norms") == 0
    measured = json.loads((tmp_path / "quantities.json").read_text())["measured"]["tiny"]
    assert measured["example-norms"][REUSED]["time"]["median"] > 0
    assert REUSED in capsys.readouterr().out


@pytest.mark.slow
def test_too_large_for_memory_is_not_run(monkeypatch):
    monkeypatch.setattr(quantity_benchmark, "memory_of_device", lambda: 0)
    measured = quantity_benchmark.Bench(TINY, 1).measure("example-norms")[BY_JAX]
    assert measured.time is None and measured.memory > 0


@pytest.mark.parametrize("name", ["example-norms", "ggn-diagonal"])
def test_wrong_numbers_are_found(name, monkeypatch):
    class Doubled(type(QUANTITIES[name])):
        def finish(self, found):
            return jax.tree.map(lambda x: 2 * x, super().finish(found))

    problem = quantity_programs.build(TINY)
    quantity_programs.check([name], TINY, problem)
    quantity = QUANTITIES[name]
    doubled = Doubled(**{f: getattr(quantity, f) for f in quantity.__dataclass_fields__})
    monkeypatch.setitem(QUANTITIES, name, doubled)
    with pytest.raises(AssertionError, match=name):
        quantity_programs.check([name], TINY, problem)


def test_every_quantity_of_every_network_is_known():
    for case in NETWORKS.values():
        assert set(case.quantities) <= {*QUANTITIES, "everything"}
        assert all(quantity_programs.members(quantity, case) for quantity in case.quantities)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["mlp", "mlp-256", "convnet", "transformer"])
def test_quantities_of_every_network_are_right(network):
    case = NETWORKS[network]
    problem = quantity_programs.build(case)
    names = [name for name in case.quantities if name != "everything"]
    with jax.numpy_rank_promotion("allow"):
        quantity_programs.check(names, case, problem)


def test_pytorch_has_the_same_networks():
    pytest.importorskip("torch")
    from experiments import torch_quantities

    for name in ("mlp", "convnet", "transformer"):
        case = NETWORKS[name]
        make, inputs, labels = torch_quantities.build(
            {"family": case.family, "sizes": case.sizes, "batch": case.batch}
        )
        ours = quantity_programs.build(case)
        sizes = jax.tree.map(jnp.size, jax.tree.leaves(ours.params))
        assert sum(p.numel() for p in make().parameters()) == sum(sizes)
        assert (len(inputs), tuple(labels.shape)) == (case.batch, ours.batch[1].shape)
