"""SGD, momentum, Adam and Gauss-Newton on one network, from one start, for the same work.

Every method may spend the same budget of gradient-equivalents, which
:mod:`experiments.training` defines. A run leaves in its folder

    config.json     every option as it was resolved, and the versions of the libraries
    curves.csv      a line per measurement, written as training goes on
    summary.json    how each method ended
    curves.png      training loss and test score against steps, seconds and work
"""

import dataclasses
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console

from experiments import command, report, tasks, training
from experiments.command import UsageError
from experiments.progress import ProgressDisplay
from experiments.tasks import Task
from experiments.training import Method, MethodName, Record, Status


class Defaults(NamedTuple):
    """What suits a task.

    The learning rates come from grids of factors of about three: a low training loss, kept clear of
    the rates at which training diverged. Those of the animals' convolutional networks were
    taken over from the perceptron.
    """

    budget: float
    batch_size: int
    curvature_batch: int
    cg_iterations: int
    rates: dict[str, float]


_RATES = {"sgd": 0.3, "momentum": 0.03, "adam": 1e-3}
_LOWER_RATES = {"sgd": 0.1, "momentum": 0.01, "adam": 1e-3}

DEFAULTS: dict[str, Defaults] = {
    "digits-mlp": Defaults(1000, 32, 2048, 20, _RATES),
    "digits-convnet": Defaults(200, 32, 256, 20, _RATES | {"adam": 3e-3}),
    "digits-resnet": Defaults(60, 32, 256, 10, _RATES | {"adam": 3e-3}),
    "animals-mlp": Defaults(300, 64, 1024, 10, _LOWER_RATES),
    "animals-convnet": Defaults(15, 64, 256, 10, _LOWER_RATES),
    "animals-resnet": Defaults(5, 64, 256, 10, _LOWER_RATES),
    "mazur": Defaults(1000, 1, 1, 20, {"sgd": 50.0, "momentum": 0.5, "adam": 0.3}),
    "digits-autoencoder": Defaults(
        4000, 32, 512, 50, {"sgd": 0.03, "momentum": 0.01, "adam": 1e-3}
    ),
    "animals-autoencoder": Defaults(
        100, 64, 256, 30, {"sgd": 3e-3, "momentum": 1e-3, "adam": 1e-3}
    ),
}
"""By the name of the task. Convolutions are slow on a CPU, so their budgets are small."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Train one network with SGD, momentum, Adam and Gauss-Newton and compare the curves."""

    dataset: tasks.DatasetName = "digits"
    """What to learn; mazur is the worked example with its own network."""
    network: tasks.NetworkName = "auto"
    """The classifier; auto is the multilayer perceptron."""
    images: tasks.ImagesName = "digits"
    """What the autoencoder reconstructs."""
    methods: tuple[MethodName, ...] = ("sgd", "momentum", "adam", "gauss-newton")
    """Which methods to run, in this order."""
    budget: float | None = None
    """Gradients of the whole training part, or work worth as much, that each method may spend."""
    learning_rate: float | None = None
    """Of SGD, momentum and Adam alike; without it each has its own."""
    batch_size: int | None = None
    """Examples in a step of SGD, momentum and Adam."""
    curvature_batch: int | None = None
    """Examples in a step of Gauss-Newton."""
    damping: float = 1.0
    """Where Gauss-Newton's λ starts."""
    cg_iterations: int | None = None
    """Products with the curvature that a Gauss-Newton step may spend."""
    records: int = 60
    """About how many points a curve has."""
    seed: int = 0
    """Of the split, the initial parameters and the batches."""
    data_file: Path | None = None
    """An .npz with the animals, in place of the one that comes with the experiments."""
    out: Path = Path("runs")
    """The folder of all runs."""
    name: str | None = None
    """The folder of this run inside it; without it, one named after the task."""
    overwrite: bool = False
    """Write into a folder that holds a run already."""


def resolve(settings: Settings, task_name: str) -> Settings:
    """The settings with the task's defaults filled in, the learning rates excepted.

    Raises:
        UsageError: a number is out of its range.
    """
    defaults = DEFAULTS[task_name]

    def default(name: str) -> Any:
        given = getattr(settings, name)
        return getattr(defaults, name) if given is None else given

    names = ("budget", "batch_size", "curvature_batch", "cg_iterations")
    settings = dataclasses.replace(settings, **{name: default(name) for name in names})
    for name in (*names, "learning_rate", "damping", "records"):
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise UsageError(f"--{name.replace('_', '-')} must be greater than 0")
    if not settings.methods or len(set(settings.methods)) < len(settings.methods):
        raise UsageError("--methods takes one or more methods, each of them once")
    return settings


def rate(settings: Settings, task_name: str, method: MethodName) -> float | None:
    """The learning rate of a method; Gauss-Newton has none."""
    if settings.learning_rate is not None and method != "gauss-newton":
        return settings.learning_rate
    return DEFAULTS[task_name].rates.get(method)


def build_method(settings: Settings, task: Task, name: MethodName) -> Method:
    """The optimiser that resolved settings ask for."""
    examples = len(task.train[0])
    if name == "gauss-newton":
        return training.second_order(
            task,
            damping=settings.damping,
            iterations=settings.cg_iterations or 1,
            batch_size=min(examples, settings.curvature_batch or examples),
        )
    return training.first_order(
        task,
        name,
        learning_rate=rate(settings, task.name, name) or 0.0,
        batch_size=min(examples, settings.batch_size or examples),
    )


def compare(settings: Settings, task: Task, folder: Path, console: Console) -> list[report.Result]:
    """Train with each method in turn, writing into ``folder``; returns how each ended."""
    records: list[Record] = []
    results: list[report.Result] = []
    budget = settings.budget or 0.0
    evaluate = training.evaluator(task)
    with (
        report.Curves(folder) as curves,
        ProgressDisplay(console, budget, task.score_name) as display,
    ):
        for name in settings.methods:
            method = build_method(settings, task, name)
            curve: list[training.Progress] = []
            for progress in training.train(
                task,
                method,
                evaluate,
                budget=budget,
                records=settings.records,
                seed=settings.seed,
            ):
                curve.append(progress)
                curves.append(progress.record)
                records.append(progress.record)
                display.show(progress.record)
            remark = ending(method, curve)
            display.finish(name, remark)
            results.append(report.Result(curve[-1].record, curve[-1].compile_seconds, remark))
            report.write_json(folder / "summary.json", [result.as_dict() for result in results])
    report.plot(folder / "curves.png", records, task.score_name)
    return results


def ending(method: Method, curve: Sequence[training.Progress]) -> str | None:
    """What there is to say about how a method ended, in one line; nothing if all went well."""
    start, end = curve[0], curve[-1]
    where = f"{method.name} stopped at step {end.record.step}"
    if end.status is Status.NOT_FINITE:
        return f"{where}: the loss is not finite; {method.advice}"
    if end.status is Status.CONVERGED:
        return f"{where}: converged, no step lowers the loss any further"
    if end.record.train_loss > start.record.train_loss:
        return f"{method.name} ended with a higher loss than it started from; {method.advice}"
    return None


def configuration(settings: Settings, task: Task) -> dict[str, Any]:
    """What one needs to know to repeat the run."""
    with_params = jax.eval_shape(task.init, jax.random.key(0))
    return {
        "settings": dataclasses.asdict(settings),
        "learning_rates": {name: rate(settings, task.name, name) for name in settings.methods},
        "task": task.name,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(with_params)),
        "examples": {"train": len(task.train[0]), "test": len(task.test[0])},
        "precision": task.precision,
        "device": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }


def script(settings: Settings) -> int:
    """Compare the methods and report; the status is 0 even if one of them diverged."""
    console = command.terminal()
    task = tasks.build(
        settings.dataset,
        network=settings.network,
        images=settings.images,
        seed=settings.seed,
        data_file=settings.data_file,
    )
    settings = resolve(settings, task.name)
    folder = report.make_folder(
        settings.out, settings.name, task.name, overwrite=settings.overwrite
    )
    with jax.enable_x64(task.precision == "float64"):
        report.write_json(folder / "config.json", configuration(settings, task))
        try:
            results = compare(settings, task, folder, console)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"what was measured is in {folder}") from None
    report.print_results(console, results, task.score_name)
    console.print(f"written to {folder}", soft_wrap=True)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    return command.run(Settings, script, arguments)


if __name__ == "__main__":
    sys.exit(main())
