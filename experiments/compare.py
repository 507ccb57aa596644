"""Optimizers on one problem, each with its best setting, under one budget.

Every optimizer takes the same number of passes over the data (or of steps) with the same number of
settings, each from the same seeds. A run leaves in its folder

    config.json     every option as it was resolved, and the versions of the libraries
    curves.csv      every record of every setting and seed, written as each optimizer ends
    search.csv      how every setting ended
    summary.json    how each optimizer did with its best setting, and when it reached the target
    curves.png      losses and score of the best settings against steps, seconds and work
    search.png      how every setting ended
"""

import dataclasses
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import optax
from rich.console import Console

from experiments import (
    command,
    cost,
    figures,
    outcome,
    report,
    search,
    tasks,
    training,
)
from experiments.command import UsageError
from experiments.optimizers import OPTIMIZERS, Optimizer, OptimizerName, Setting
from experiments.outcome import Outcome
from experiments.progress import ProgressDisplay
from experiments.tasks import Task
from experiments.training import Parts, Schedule


@dataclasses.dataclass(frozen=True)
class Settings:
    """Compare optimizers on one problem, each with the best of its settings."""

    problem: tasks.ProblemName = "digits-mlp"
    """What to train."""
    optimizers: tuple[OptimizerName, ...] = (
        "sgd",
        "momentum",
        "adam",
        "muon",
        "lbfgs",
        "kfac",
    )
    """Which optimizers to run, in this order."""
    passes: float | None = None
    """Passes over the training part, the same for all; without it, what suits the problem."""
    steps: int | None = None
    """Steps, the same for all, in place of passes."""
    seeds: int = 3
    """From how many seeds to train with each setting."""
    seed: int = 0
    """The first of them, and that of the split of the data and of the random search."""
    search: Literal["grid", "random"] = "grid"
    """Where the settings come from: evenly spaced, or drawn, in the logarithm."""
    trials: int = 9
    """Settings of each optimizer, at most; with two hyper-parameters, their combinations."""
    learning_rates: tuple[float, ...] | None = None
    """In place of each optimizer's own range: a grid, or the ends of what is drawn from."""
    dampings: tuple[float, ...] | None = None
    """The same for the damping."""
    batch_size: int | None = None
    """Examples in a step of the methods that take small batches."""
    large_batch: int | None = None
    """Examples in a step of those that need large ones: L-BFGS, Gauss-Newton and its like."""
    target: float | None = None
    """Training loss to reach; without it, where the best first-order method ended."""
    records: int = 40
    """About how many points a curve has."""
    evaluated: int = 2048
    """Examples of each part whose loss is recorded, at most."""
    memory: float = 2.0
    """GiB that a search may take; if all runs at once take more, it goes through them in chunks."""
    data_file: Path | None = None
    """An .npz with the animals, in place of the one that comes with the experiments."""
    out: Path = Path("runs")
    """The folder of all runs."""
    name: str | None = None
    """The folder of this run inside it; without it, one named after the problem."""
    overwrite: bool = False
    """Write into a folder that holds a run already."""


POSITIVE = (
    "passes",
    "steps",
    "seeds",
    "trials",
    "learning_rates",
    "dampings",
    "batch_size",
    "large_batch",
    "records",
    "evaluated",
    "memory",
)


def validate(settings: Settings) -> None:
    """Check what the types of the options leave open.

    Raises:
        UsageError: a number is out of its range, or two options contradict each other.
    """
    for name in POSITIVE:
        value = getattr(settings, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not 0 < number < float("inf"):
                raise UsageError(f"--{name.replace('_', '-')} must be greater than 0 and finite")
    if settings.passes is not None and settings.steps is not None:
        raise UsageError("--passes and --steps say the same in two ways; leave one out")
    if settings.target is not None and not abs(settings.target) < float("inf"):
        raise UsageError("--target must be finite")
    command.check_seeds(settings.seed, settings.seeds)
    if not settings.optimizers or len(set(settings.optimizers)) < len(settings.optimizers):
        raise UsageError("--optimizers takes one or more optimizers, each of them once")
    searched = {key for chosen in settings.optimizers for key in OPTIMIZERS[chosen].ranges}
    for name in ("learning_rates", "dampings"):
        values, option = getattr(settings, name), f"--{name.replace('_', '-')}"
        if values is None:
            continue
        if not values or len(set(values)) < len(values):
            raise UsageError(f"{option} takes one or more numbers, each of them once")
        if name.removesuffix("s") not in searched:
            raise UsageError(f"{option} concerns none of these optimizers")
    most = max(len(settings_of(settings, OPTIMIZERS[o])) for o in settings.optimizers)
    if most > settings.trials:
        raise UsageError(
            f"--learning-rates and --dampings make {most} settings of one optimizer: with "
            f"--trials {most} the others have as many"
        )
    tasks.check_data_file(settings.problem, settings.data_file)


def schedule_of(settings: Settings, task: Task, optimizer: Optimizer) -> Schedule:
    """The optimizer's batches and records, within the budget that is the same for all."""
    examples = len(task.train[0])
    sizes = {
        "small": settings.batch_size or task.budget.small,
        "large": settings.large_batch or task.budget.large,
    }
    size = min(examples, sizes[optimizer.data])
    passes = settings.passes or task.budget.passes
    steps = settings.steps or max(1, round(passes * examples / size))
    return Schedule(size, training.stops(steps, settings.records))


def settings_of(settings: Settings, optimizer: Optimizer) -> list[Setting]:
    """The settings to try of an optimizer."""
    given = {"learning_rate": settings.learning_rates, "damping": settings.dampings}
    chosen = {name: values for name, values in given.items() if values and name in optimizer.ranges}
    if settings.search == "random":
        ends = {name: (min(values), max(values)) for name, values in chosen.items()}
        optimizer = optimizer._replace(ranges=optimizer.ranges | ends)  # type: ignore[operator]
        return search.drawn(optimizer, settings.trials, settings.seed)
    if not chosen:
        return search.grid(optimizer, settings.trials)
    # The trials that are left go to what was not given.
    rest = {name: ends for name, ends in optimizer.ranges.items() if name not in chosen}
    count = 1
    for values in chosen.values():
        count *= len(values)
    grid = search.grid(optimizer._replace(ranges=rest), max(1, settings.trials // count))
    return [one | other for one in search.product(chosen) for other in grid]


def compare(settings: Settings, task: Task, folder: Path, console: Console) -> list[Outcome]:
    """Search with each optimizer in turn, writing into ``folder``; returns what came of each.

    One that does not fit into memory is left out.

    Raises:
        ExperimentError: none of them fits.
    """
    parts = training.parts_of(task, settings.evaluated)
    outcomes: list[Outcome] = []
    with ProgressDisplay(console) as display:
        for name in settings.optimizers:
            try:
                outcomes.append(run(settings, task, parts, name, display))
            except search.TooLarge as error:
                display.finish(f"{OPTIMIZERS[name].label} is left out: {error}")
                continue
            report.write(folder, outcomes, target(settings, outcomes))
            display.finish(report.line(outcomes[-1]))
    if not outcomes:
        raise command.ExperimentError("no optimizer was run")
    figures.curves(folder / "curves.png", outcomes, target(settings, outcomes), task.score_name)
    figures.search(folder / "search.png", outcomes)
    return outcomes


def run(
    settings: Settings, task: Task, parts: Parts, name: OptimizerName, display: ProgressDisplay
) -> Outcome:
    """Search with one optimizer, and time it with the best of its settings."""
    optimizer = OPTIMIZERS[name]
    schedule = schedule_of(settings, task, optimizer)
    tried, seeds = settings_of(settings, optimizer), seeds_of(settings)
    starts = training.starts(task, schedule, seeds)
    display.begin(optimizer.label)
    found = search.search(
        task,
        optimizer,
        tried,
        starts,
        schedule,
        parts,
        memory=settings.memory * 2**30,
        started=display.started,
        recorded=display.recorded,
    )
    display.measuring()
    best = tried[outcome.best_setting(found)]
    first = jax.tree.map(lambda leaf: leaf[0], starts)
    spent = cost.measure(task, optimizer, best, schedule, parts, first)
    return Outcome(name, tried, seeds, schedule, found, spent, task.score_rises)


def seeds_of(settings: Settings) -> list[int]:
    """The seeds, one after another."""
    return list(range(settings.seed, settings.seed + settings.seeds))


def target(settings: Settings, outcomes: Sequence[Outcome]) -> float:
    """The training loss to reach."""
    return outcome.target_of(outcomes) if settings.target is None else settings.target


def configuration(settings: Settings, task: Task) -> dict[str, Any]:
    """What one needs to know to repeat the run."""
    params = jax.eval_shape(task.init, jax.random.key(0))
    schedules = {
        name: schedule_of(settings, task, OPTIMIZERS[name]) for name in settings.optimizers
    }
    return {
        "settings": dataclasses.asdict(settings),
        "tried": {name: settings_of(settings, OPTIMIZERS[name]) for name in settings.optimizers},
        "steps": {name: schedule.steps for name, schedule in schedules.items()},
        "batch_sizes": {name: schedule.batch_size for name, schedule in schedules.items()},
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "examples": {"train": len(task.train[0]), "test": len(task.test[0])},
        "score": task.score_name,
        "precision": task.precision,
        "device": jax.devices()[0].device_kind,
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "optax": optax.__version__,
        },
    }


def script(settings: Settings) -> int:
    """Compare the optimizers and report; the status is 0 even if one of them diverged."""
    validate(settings)
    console = command.terminal()
    task = tasks.build(settings.problem, seed=settings.seed, data_file=settings.data_file)
    folder = report.make_folder(
        settings.out, settings.name, settings.problem, overwrite=settings.overwrite
    )
    with jax.enable_x64(task.precision == "float64"):
        report.write_json(folder / "config.json", configuration(settings, task))
        try:
            outcomes = compare(settings, task, folder, console)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"what was measured is in {folder}") from None
    report.print_results(console, outcomes, target(settings, outcomes), task.score_name)
    console.print(f"written to {folder}", soft_wrap=True)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    return command.run(Settings, script, arguments)


if __name__ == "__main__":
    command.leave(main())
