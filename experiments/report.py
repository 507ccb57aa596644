"""What a run leaves behind: its configuration, its curves as they arise, a summary, a table."""

import csv
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.command import UsageError, prepare_folder
from experiments.optimizers import OPTIMIZERS
from experiments.outcome import Outcome, Quantity, Quartiles

HYPER_PARAMETERS = ("learning_rate", "damping")
CURVES = (
    "optimizer",
    *HYPER_PARAMETERS,
    "seed",
    "step",
    "seconds",
    "gradients",
    "train_loss",
    "test_loss",
    "test_score",
)
SEARCH = ("optimizer", *HYPER_PARAMETERS, "lower", "median", "upper", "best")
QUANTITIES: tuple[Quantity, ...] = ("train_loss", "test_loss", "test_score")
FILES = ("config.json", "curves.csv", "search.csv", "summary.json", "curves.png", "search.png")


def make_folder(out: Path, name: str | None, fallback: str, *, overwrite: bool) -> Path:
    """The folder of a run, made if need be.

    Args:
        out: the folder of all runs.
        name: of this run; ``None`` takes ``fallback``, with a number if that name is taken.
        fallback: see ``name``.
        overwrite: whether a folder that exists may be written to; an earlier run's files go.

    Raises:
        UsageError: the name is taken.
        ExperimentError: the folder cannot be written to.
    """
    folder = out / (name or fallback)
    if not overwrite and name is None:
        number = 2
        while folder.exists():
            folder = out / f"{fallback}-{number}"
            number += 1
    elif not overwrite and folder.exists():
        raise UsageError(f"{folder} exists; give another --name, or --overwrite")
    prepare_folder(folder, FILES)
    return folder


def write_json(path: Path, content: Any) -> None:
    """Write ``content``, readable; NaN and infinities become ``null``, which JSON has in place."""
    path.write_text(json.dumps(_finite(content), indent=2, default=str) + "\n", encoding="utf-8")


def write(folder: Path, outcomes: Sequence[Outcome], target: float) -> None:
    """Write what is known so far: ``curves.csv``, ``search.csv`` and ``summary.json``."""
    _write_rows(folder / "curves.csv", CURVES, (row for o in outcomes for row in curve_rows(o)))
    _write_rows(folder / "search.csv", SEARCH, (row for o in outcomes for row in search_rows(o)))
    results = [summary(outcome, target) for outcome in outcomes]
    write_json(folder / "summary.json", {"target": target, "optimizers": results})


def curve_rows(outcome: Outcome) -> Iterator[tuple]:
    """A row per record of each setting and seed; no value where there is no such thing."""
    for s, setting in enumerate(outcome.settings):
        for k, seed in enumerate(outcome.seeds):
            lane = [getattr(outcome.found.curves, name)[s, k].tolist() for name in QUANTITIES]
            for step, *values in zip(outcome.schedule.stops, *lane, strict=True):
                work = step * outcome.cost.seconds, step * outcome.cost.gradients
                yield (outcome.name, *_values(setting), seed, step, *work, *values)


def search_rows(outcome: Outcome) -> Iterator[tuple]:
    """A row per setting: quartiles over seeds of the last training loss."""
    for s, setting in enumerate(outcome.settings):
        ends = (float(values[s]) for values in outcome.final)
        yield (outcome.name, *_values(setting), *ends, s == outcome.best)


def summary(outcome: Outcome, target: float) -> dict[str, Any]:
    """How an optimizer did with its best setting."""
    reached = outcome.reach(target)
    return {
        "optimizer": outcome.name,
        "setting": outcome.setting,
        "at_the_edge": outcome.at_the_edge(),
        "settings": len(outcome.settings),
        "diverged": int(sum(map(math.isinf, outcome.final.median))),
        "seeds": outcome.seeds,
        "batch_size": outcome.schedule.batch_size,
        "steps": outcome.schedule.steps,
        "step_seconds": outcome.cost.seconds,
        "step_gradients": outcome.cost.gradients,
        **{name: outcome.end(name)._asdict() for name in QUANTITIES},
        "to_target": {
            "seeds_that_reach": reached.seeds,
            "steps": reached.steps._asdict(),
            "seconds": reached.seconds._asdict(),
            "gradients": reached.gradients._asdict(),
        },
        "search": {
            "compile_seconds": outcome.found.compile_seconds,
            "seconds": outcome.found.seconds,
            "lanes": len(outcome.settings) * len(outcome.seeds),
            "lanes_at_once": outcome.found.at_once,
        },
    }


def line(outcome: Outcome) -> str:
    """What there is to say when an optimizer's search has ended."""
    found, lanes = outcome.found, len(outcome.settings) * len(outcome.seeds)
    chunks = f", {found.at_once} at once for want of memory," if found.at_once < lanes else ""
    said = (
        f"{OPTIMIZERS[outcome.name].label}: {_count(lanes, 'run')} of "
        f"{_count(outcome.schedule.steps, 'step')}{chunks} "
        f"in {found.seconds:.1f} s, compiled in {found.compile_seconds:.1f} s"
    )
    if math.isinf(outcome.final.median[outcome.best]):
        return f"{said}; no setting kept the loss finite, try others"
    if not outcome.lowered:
        return f"{said}; no setting lowered the loss, try others"
    edges = " and ".join(name.replace("_", " ") for name in outcome.at_the_edge())
    return f"{said}; at the edge of those tried: the best {edges}" if edges else said


def print_results(
    console: Console, outcomes: Sequence[Outcome], target: float, score_name: str
) -> None:
    """The table: medians over seeds, with quartiles where they matter most; two if it is narrow."""
    ended = ("rate", "damping", "training loss", "test loss", score_name)
    taken = ("steps", "seconds", "gradients", "a step")
    ends, efforts = [], []
    for outcome in outcomes:
        reached = outcome.reach(target)
        end = (
            *(_number(value) for value in _values(outcome.setting)),
            _range(outcome.end("train_loss")),
            *(_number(outcome.end(name).median) for name in QUANTITIES[1:]),
        )
        effort = (
            _number(reached.steps.median),
            _number(reached.seconds.median),
            _number(reached.gradients.median),
            _number(outcome.cost.gradients),
        )
        ends.append(end)
        efforts.append(effort)
    labels = [OPTIMIZERS[outcome.name].label for outcome in outcomes]
    table = _table(labels, (*ended, *taken), [a + b for a, b in zip(ends, efforts, strict=True)])
    unbounded = console.options.update(max_width=10_000)
    if console.measure(table, options=unbounded).maximum <= console.width:
        console.print(table)
    else:
        two = _table(labels, ended, ends), _table(labels, taken, efforts)
        console.print(two[0], "", two[1], sep="\n")
    which = f"those to a training loss of {target:.4g}"
    if math.isnan(target):
        which = "not known, since no loss was lowered that could be a target"
    console.print(
        f"Steps, seconds and gradient-equivalents are {which}; "
        "the last column is what one step is worth.",
        soft_wrap=True,
    )


def _table(labels: Sequence[str], headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A row for each of these optimizers."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("optimizer", no_wrap=True, min_width=max(map(len, labels)))
    for header in headers:
        table.add_column(header, justify="right", overflow="fold")
    for label, row in zip(labels, rows, strict=True):
        table.add_row(label, *row)
    return table


def _values(setting: Any) -> tuple[float | None, ...]:
    return tuple(setting.get(name) for name in HYPER_PARAMETERS)


def _write_rows(path: Path, header: Sequence[str], rows: Iterator[tuple]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(["" if value is None else value for value in row] for row in rows)


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.0f}" if value == int(value) else f"{value:.4g}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _range(quartiles: Quartiles) -> str:
    lower, median, upper = (f"{value:.3g}" if math.isfinite(value) else "∞" for value in quartiles)
    return median if lower == upper else f"{median} ({lower}–{upper})"


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
