"""Our reverse mode against `jax.value_and_grad`: time, memory, tracing, compilation, size.

    python -m experiments.benchmark                    every program
    python -m experiments.benchmark gradients --programs mlp lstm --repeats 200
    python -m experiments.benchmark quantities         what else a sweep gives; see there
    python -m experiments.benchmark optimizers         what a step of fb.optim costs; see there
    python -m experiments.benchmark rules              what other backward rules cost; see there

Both are measured in this one process, in alternation, and compared pair by pair: the ratio of a
pair is little disturbed by what else the machine does. Reported are the median of the ratios and
the spread between their quartiles. Ratios below one mean that ours is faster or smaller.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import track
from rich.table import Table

import fbackprop as fb
from experiments import optimizer_benchmark, quantity_benchmark, rules_benchmark
from experiments.command import UsageError, check_names, leave, prepare_folder, run, terminal
from experiments.measuring import Ratio, alternate
from experiments.programs import PROGRAMS, Program, build


@dataclasses.dataclass(frozen=True)
class Settings:
    """Compare fbackprop with jax.value_and_grad, in one process and in alternation.

    With `quantities`, `optimizers` or `rules` as the first word, measure those of fb.sweep or
    fb.optim, or sweeps with other rules.
    """

    programs: tuple[str, ...] = tuple(PROGRAMS)
    """Which programs to differentiate."""
    repeats: int = 60
    """Pairs of runs that are timed."""
    traces: int = 7
    """Pairs of traces, each from empty caches, that are timed."""
    compilations: int = 3
    """Pairs of compilations that are timed, no more than of traces."""
    out: Path = Path("runs/benchmark")
    """Where the table (JSON) and the figure (PNG) go; those of an earlier run are replaced."""


MEASURES = {
    "run": "run time",
    "temporary": "temporary memory",
    "total": "total memory",
    "trace": "trace + lower",
    "compile": "compile",
    "hlo": "size of HLO",
}


def measure(program: Program, settings: Settings) -> dict[str, Ratio]:
    """All measures of one program."""
    libraries: tuple[tuple[Callable, Callable], ...] = (
        (fb.value_and_grad, fb.grad),
        (jax.value_and_grad, jax.grad),
    )

    def lowered(side: int):
        value_and_grad, grad = libraries[side]

        def step(params, data):
            return value_and_grad(lambda p: program.loss(p, data, grad))(params)

        return jax.jit(step).lower(program.params, program.data)

    # Each compilation needs a lowering of its own: JAX remembers what it has compiled of one.
    compiled: list[Any] = [lowered(side).compile() for side in (0, 1)]
    ready: tuple[list[Any], list[Any]] = ([], [])
    traces = alternate(lambda side: ready[side].append(lowered(side)), settings.traces, fresh=True)
    compilations = alternate(
        lambda side: ready[side].pop().compile(),
        min(settings.compilations, settings.traces),
        fresh=True,
    )

    def execute(side: int):
        return jax.block_until_ready(compiled[side](program.params, program.data))

    _check(execute(0), execute(1))
    runs = alternate(execute, settings.repeats)
    memory = [c.memory_analysis() for c in compiled]
    temporary = [float(m.temp_size_in_bytes) for m in memory]
    total = [
        float(m.temp_size_in_bytes + m.argument_size_in_bytes + m.output_size_in_bytes)
        for m in memory
    ]
    sizes = [float(c.as_text().count(" = ")) for c in compiled]
    return {
        "run": Ratio.of(*runs),
        "temporary": Ratio.of([temporary[0]], [temporary[1]]),
        "total": Ratio.of([total[0]], [total[1]]),
        "trace": Ratio.of(*traces),
        "compile": Ratio.of(*compilations),
        "hlo": Ratio.of([sizes[0]], [sizes[1]]),
    }


def _check(ours, theirs) -> None:
    """A benchmark of wrong gradients is worth nothing. Accelerators multiply with three digits."""
    tolerance = 1e-4 if jax.default_backend() == "cpu" else 1e-2
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        largest = float(np.max(np.abs(b)))
        if not np.allclose(a, b, rtol=0, atol=tolerance * largest + 1e-12, equal_nan=True):
            raise AssertionError("the gradients differ: see python -m experiments.gradcheck")


def table_of(results: dict[str, dict[str, Ratio]]) -> Table:
    """A row per program, the geometric means last."""
    table = Table(title="fbackprop over jax.value_and_grad (below 1 is better)", box=None)
    table.add_column("program", no_wrap=True)
    for title in MEASURES.values():
        table.add_column(title, justify="right", overflow="fold")
    for name, ratios in results.items():
        table.add_row(name, *(ratios[measure].said(3) for measure in MEASURES))
    means = (f"{geometric_mean(results, m):.3f}" for m in MEASURES)
    table.add_section()
    table.add_row("geometric mean", *means)
    return table


def geometric_mean(results: dict[str, dict[str, Ratio]], measure: str) -> float:
    """Over programs; programs that need no memory at all do not count."""
    values = [r[measure].median for r in results.values() if r[measure].median > 0]
    return statistics.geometric_mean(values) if values else float("nan")


def draw(results: dict[str, dict[str, Ratio]], path: Path) -> None:
    """Ratios as points with their quartiles, a panel per measure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(results)[::-1]
    shown = ["run", "temporary", "trace", "compile"]
    height = 1.2 + 0.28 * len(names)
    figure, axes = plt.subplots(1, len(shown), figsize=(12, height), sharey=True)
    for axis, measure in zip(axes, shown, strict=True):
        ratios = [results[name][measure] for name in names]
        middle = np.array([r.median for r in ratios])
        low = middle - np.array([r.lower for r in ratios])
        high = np.array([r.upper for r in ratios]) - middle
        axis.errorbar(middle, range(len(names)), xerr=[low, high], fmt="o", color="#0072B2")
        axis.axvline(1.0, color="0.5", linewidth=1)
        axis.set_title(MEASURES[measure])
        axis.set_xlabel("ours / JAX")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


FILES = "benchmark.json", "benchmark.png"


def script(settings: Settings) -> int:
    if not settings.programs:
        raise UsageError("--programs takes one or more programs")
    check_names("program", settings.programs, PROGRAMS)
    if min(settings.repeats, settings.traces, settings.compilations) < 1:
        raise UsageError("--repeats, --traces and --compilations must be at least 1")
    prepare_folder(settings.out, FILES)
    console = terminal()
    results: dict[str, dict[str, Ratio]] = {}
    bar = track(settings.programs, "measuring", console=console, disable=not console.is_terminal)
    for name in bar:
        results[name] = measure(build(name), settings)
        _write(results, settings.out / "benchmark.json")
        if not console.is_terminal:
            console.print(name, *(f"{m} {results[name][m].median:.3f}" for m in MEASURES))
    console.print(table_of(results))
    draw(results, settings.out / "benchmark.png")
    console.print(f"written: {settings.out}/{', '.join(FILES)}")
    return 0


def _write(results: dict[str, dict[str, Ratio]], path: Path) -> None:
    rows = {n: {m: dataclasses.asdict(r) for m, r in ms.items()} for n, ms in results.items()}
    versions = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    path.write_text(json.dumps({"versions": versions, "ratios": rows}, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark, which the first argument may name; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    named = {
        "quantities": quantity_benchmark.main,
        "optimizers": optimizer_benchmark.main,
        "rules": rules_benchmark.main,
    }
    if words and words[0] in named:
        return named[words[0]](words[1:])
    return run(Settings, script, words[1:] if words[:1] == ["gradients"] else words)


if __name__ == "__main__":
    leave(main())
