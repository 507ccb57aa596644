"""What a sweep's quantities cost over the gradient alone: run time and temporary memory.

    python -m experiments.benchmark quantities
    python -m experiments.benchmark quantities --networks mlp --quantities kfac kflr
    python -m experiments.benchmark quantities --torch ../with-torch/bin/python

The unit is the gradient of the same batch by `fb.value_and_grad`. Measured against it are the
sweep for a quantity alone, the sweep for the quantity and the gradient, and the same quantity by
`vmap(jax.grad)` or `vmap(jax.jacrev)`. BackPACK and Opacus, which give the gradient as well, are
measured against PyTorch's gradient. A run and its unit alternate and are compared pair by pair, and
the whole run is counted: 1.5 is half a gradient more. Memory is the compiler's account of temporary
buffers. Where results are large, the quantity and the gradient are measured a second time, into the
arrays of the last result ("reused").
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

import fbackprop as fb
from experiments.command import (
    ExperimentError,
    UsageError,
    check_names,
    prepare_folder,
    run,
    terminal,
)
from experiments.measuring import Ratio, alternate, memory_of_device
from experiments.quantity_programs import (
    NETWORKS,
    QUANTITIES,
    Case,
    build,
    by_jax,
    check,
    members,
    sweep,
)

SECONDS = 15.0  # about the longest that one program is timed, at fewer pairs than asked for

ALONE, WITH_GRADIENT, REUSED, BY_JAX = "alone", "with gradient", "reused", "vmap(grad)"
OURS = (ALONE, WITH_GRADIENT, REUSED, BY_JAX)

LARGE = 2**25  # bytes of results, from which on the C library takes fresh memory for each array


@dataclasses.dataclass(frozen=True)
class Settings:
    """Measure what the quantities of fb.sweep cost over the gradient alone."""

    networks: tuple[str, ...] = ("mlp", "mlp-256", "wide-mlp", "convnet", "transformer")
    """On which networks."""
    quantities: tuple[str, ...] = ()
    """Which quantities; none named means all."""
    repeats: int = 30
    """Pairs of runs that are timed, fewer of a program that takes long."""
    torch: Path | None = None
    """A Python interpreter that has PyTorch with BackPACK or Opacus; by default this one."""
    out: Path = Path("runs/quantities")
    """Where tables (JSON, Markdown) and figure (PNG) go; those of an earlier run are replaced."""


# --- measuring ------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """What a program takes.

    Attributes:
      time: over the gradient's; None if its buffers do not fit into memory.
      seconds: median.
      memory: temporary buffers over the gradient's; None if unknown.
    """

    time: Ratio | None
    seconds: float | None
    memory: float | None


class Bench:
    """A network whose gradient is compiled, to time other programs against."""

    def __init__(self, case: Case, repeats: int):
        self.case, self.repeats, self.problem = case, repeats, build(case)
        self.gradient = self._compiled(fb.value_and_grad(self.problem.mean_loss))

    def measure(self, quantity: str) -> dict[str, Measured]:
        """The quantity alone, with the gradient, and by JAX alone."""
        names = members(quantity, self.case)
        with jax.default_matmul_precision("highest"):
            check(names, self.case, self.problem)
        own = {name.replace("-", "_"): QUANTITIES[name] for name in names}
        with_gradient = sweep(self.problem, gradient=fb.Gradient(), **own)
        programs: dict[str, Callable | None] = {
            ALONE: sweep(self.problem, **own),
            WITH_GRADIENT: with_gradient,
            BY_JAX: by_jax(quantity, self.problem),
        }
        found = {who: self._against_gradient(f) for who, f in programs.items() if f is not None}
        result = jax.eval_shape(with_gradient, self.problem.params, self.problem.batch)
        if sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(result)) > LARGE:
            found[REUSED] = self._against_gradient(with_gradient, reuse=True)
        return found

    def _compiled(self, function: Callable):
        return jax.jit(function).lower(self.problem.params, self.problem.batch).compile()

    def _against_gradient(self, function: Callable, reuse: bool = False) -> Measured:
        program, given = self._compiled(function), (self.problem.params, self.problem.batch)
        sizes, unit = (p.memory_analysis() for p in (program, self.gradient))
        memory = sizes.temp_size_in_bytes / max(unit.temp_size_in_bytes, 1)
        if sizes.temp_size_in_bytes + sizes.output_size_in_bytes > memory_of_device() / 2:
            return Measured(None, None, memory)
        last = None
        if reuse:
            last = program(*given)
            into = jax.jit(lambda *given: function(*given[:2]), donate_argnums=2, keep_unused=True)
            program = into.lower(*given, last).compile()

        def execute(side: int):
            nonlocal last
            if side:
                jax.block_until_ready(self.gradient(*given))
            elif reuse:
                last = jax.block_until_ready(program(*given, last))
            else:
                jax.block_until_ready(program(*given))

        execute(1)
        pairs = alternate(execute, 1)
        affordable = int(SECONDS / pairs[0][0])
        if affordable:  # else that one was long enough
            pairs = alternate(execute, min(self.repeats, affordable))
        return Measured(Ratio.of(*pairs), statistics.median(pairs[0]), memory)


# --- PyTorch, in an interpreter of its own --------------------------------------------------------


def find_torch(given: Path | None, console: Console) -> str | None:
    """The interpreter that has PyTorch; None, and a line that says why, if there is none.

    Raises:
      UsageError: the interpreter that was given is none.
    """
    if given is not None:
        python = shutil.which(given.expanduser())
        if python is None:
            raise UsageError(f"--torch: {given} is not an interpreter that can be run")
        return python
    if all(importlib.util.find_spec(name) for name in ("torch", "backpack")):
        return sys.executable
    console.print(
        "BackPACK and Opacus are left out: not in this interpreter, and no --torch names another."
    )
    return None


def measure_torch(
    python: str, case: Case, quantities: Sequence[str], repeats: int
) -> dict[str, dict[str, Measured]]:
    """For each quantity what BackPACK and Opacus take, by their names.

    They run in a process of their own: two pools of threads would wait on each other's cores.

    Raises:
      ExperimentError: that process failed.
    """
    asked = {
        "family": case.family,
        "sizes": case.sizes,
        "batch": case.batch,
        "quantities": list(quantities),
        "repeats": repeats,
        "seconds": SECONDS,
        "threads": os.cpu_count(),
    }
    script = Path(__file__).with_name("torch_quantities.py")
    # A script's folder comes first among those of modules, and would hide some of PyTorch's.
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    answer = subprocess.run(
        [python, str(script), json.dumps(asked)],
        capture_output=True,
        text=True,
        env=environment,
    )
    if answer.returncode:
        said = answer.stderr.strip().splitlines() or ["it said nothing"]
        raise ExperimentError(f"{python} cannot measure PyTorch: {said[-1]}")
    return {
        quantity: {
            rival: Measured(Ratio.of(*pairs), statistics.median(pairs[0]), None)
            for rival, pairs in rivals.items()
        }
        for quantity, rivals in json.loads(answer.stdout).items()
    }


# --- showing --------------------------------------------------------------------------------------

Results = dict[str, dict[str, dict[str, Measured]]]
"""By network, quantity and who computes it."""

HEADERS = (
    "quantity",
    ALONE,
    WITH_GRADIENT,
    "memory",
    "ms",
    REUSED,
    BY_JAX,
    "memory",
    "ms",
    "PyTorch",
    "ms",
)


def cells(quantity: str, measured: Mapping[str, Measured]) -> list[str]:
    """A row under `HEADERS`; of PyTorch's rivals the fastest."""
    alone, both, reused, jax_ = (measured.get(who) for who in OURS)
    rivals = {who: m for who, m in measured.items() if who not in OURS}
    name, rival = min(rivals.items(), key=lambda x: x[1].seconds or 0, default=("", None))
    return [
        quantity,
        _times(alone),
        *(_times(both), _memory(both), _milliseconds(both), _times(reused)),
        *(_times(jax_), _memory(jax_), _milliseconds(jax_)),
        f"{name} {_times(rival)}".strip(),
        _milliseconds(rival),
    ]


def _times(measured: Measured | None) -> str:
    if measured is None:
        return ""
    if measured.time is None:
        return "–"
    return measured.time.said(2 if measured.time.median < 10 else 1)


def _memory(measured: Measured | None) -> str:
    return "" if measured is None or measured.memory is None else f"{measured.memory:.2f}"


def _milliseconds(measured: Measured | None) -> str:
    return "" if measured is None or measured.seconds is None else f"{1e3 * measured.seconds:.1f}"


def title(network: str, rows: Mapping[str, Mapping[str, Measured]]) -> str:
    """The network's name, its batch and what its gradients take."""
    units: dict[str, list[float]] = {}
    for measured in rows.values():
        for who, m in measured.items():
            framework = "fbackprop" if who in OURS else "PyTorch"
            if m.time:
                units.setdefault(framework, []).append(1e3 * m.time.reference)
    said = ", ".join(f"{who} {statistics.median(times):.1f} ms" for who, times in units.items())
    return f"{network}: batch {NETWORKS[network].batch}; a gradient takes {said}"


def lines_of(rows: Mapping[str, Mapping[str, Measured]]) -> list[tuple[str, ...]]:
    """The headers, then a row per quantity, without columns that have nothing in them."""
    columns = zip(HEADERS, *(cells(*row) for row in rows.items()), strict=True)
    return list(zip(*(column for column in columns if any(column[1:])), strict=True))


def table_of(network: str, rows: Mapping[str, Mapping[str, Measured]]) -> Table:
    """Times and memory over the gradient's."""
    table = Table(title=title(network, rows), box=None, title_justify="left", collapse_padding=True)
    headers, *below = lines_of(rows)
    for k, header in enumerate(headers):
        table.add_column(header, justify="right" if k else "left", no_wrap=k == 0, overflow="fold")
    for line in below:
        table.add_row(*line)
    return table


def markdown(results: Results) -> str:
    """The same tables for the documentation."""
    lines: list[str] = []
    for network, rows in results.items():
        headers, *below = ("| " + " | ".join(line) + " |" for line in lines_of(rows))
        rule = "|---" + "|--:" * (headers.count("|") - 2) + "|"
        lines += [f"**{title(network, rows)}**", "", headers, rule, *below, ""]
    return "\n".join(lines)


# Okabe and Ito's colours are told apart with any colour vision; the markers help in print.
STYLES: dict[str, dict[str, Any]] = {
    ALONE: {"color": "#0072B2", "marker": "o", "markerfacecolor": "white"},
    WITH_GRADIENT: {"color": "#0072B2", "marker": "o"},
    REUSED: {"color": "#009E73", "marker": "P"},
    BY_JAX: {"color": "#E69F00", "marker": "s"},
    "BackPACK": {"color": "#D55E00", "marker": "D"},
    "Opacus": {"color": "#CC79A7", "marker": "^"},
    "Opacus ghost": {"color": "#CC79A7", "marker": "v", "markerfacecolor": "white"},
}


def draw(results: Results, path: Path) -> None:
    """Run times over the gradient's as points with their quartiles, a panel per network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    heights = [len(rows) + 0.6 for rows in results.values()]
    figure, panels = plt.subplots(
        len(results), 1, figsize=(8, 1.4 + 0.34 * sum(heights) + 0.35 * len(results)),
        sharex=True, squeeze=False, height_ratios=heights,
    )  # fmt: skip
    handles: dict[str, Any] = {}
    for panel, (network, rows) in zip(panels[:, 0], results.items(), strict=True):
        for y, measured in enumerate(rows.values()):
            for k, (who, m) in enumerate(measured.items()):
                if m.time is None:
                    continue
                ratio, at = m.time, y + 0.11 * (k - (len(measured) - 1) / 2)
                error = [[ratio.median - ratio.lower], [ratio.upper - ratio.median]]
                handles[who] = panel.errorbar(
                    ratio.median, at, xerr=error, markersize=5, linestyle="", **STYLES[who]
                )
        panel.axvline(1.0, color="0.5", linewidth=1)
        panel.set_yticks(range(len(rows)), list(rows))
        panel.set_ylim(len(rows) - 0.4, -0.6)
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        panel.grid(axis="x", alpha=0.3)
        panel.set_title(f"{network}, batch {NETWORKS[network].batch}", loc="left", fontsize=10)
    panels[-1, 0].set_xlabel("run time / that of the gradient alone, in the same framework")
    ordered = [who for who in STYLES if who in handles]
    figure.legend(
        [handles[who] for who in ordered], ordered,
        loc="outside upper center", ncols=4, frameon=False, fontsize=9,
    )  # fmt: skip
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=150)
    plt.close(figure)


# --- the script -----------------------------------------------------------------------------------


def _chosen(settings: Settings) -> dict[str, list[str]]:
    """The quantities to measure on each network."""
    known = (*QUANTITIES, "everything")
    if not settings.networks:
        raise UsageError("--networks takes one or more networks")
    for what, given, choices in (
        ("network", settings.networks, tuple(NETWORKS)),
        ("quantity", settings.quantities, known),
    ):
        check_names(what, given, choices)
    if settings.repeats < 1:
        raise UsageError("--repeats must be at least 1")
    wanted = settings.quantities or known
    chosen = {n: [q for q in NETWORKS[n].quantities if q in wanted] for n in settings.networks}
    chosen = {network: names for network, names in chosen.items() if names}
    if not chosen:
        raise UsageError(
            f"none of {', '.join(wanted)} is measured on {', '.join(settings.networks)}"
        )
    return chosen


FILES = "quantities.json", "quantities.md", "quantities.png"


def script(settings: Settings) -> int:
    chosen = _chosen(settings)
    console = terminal()
    python = find_torch(settings.torch, console)
    prepare_folder(settings.out, FILES)
    results: Results = {}
    columns = (TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=sum(map(len, chosen.values())))
        for network, quantities in chosen.items():
            case = NETWORKS[network]
            progress.update(bar, description=f"{network}: PyTorch" if python else network)
            rivals = measure_torch(python, case, quantities, settings.repeats) if python else {}
            bench, rows = Bench(case, settings.repeats), results.setdefault(network, {})
            for quantity in quantities:
                progress.update(bar, description=f"{network}: {quantity}")
                rows[quantity] = bench.measure(quantity) | rivals.get(quantity, {})
                write(results, settings.out / "quantities.json")
                progress.advance(bar)
            console.print(table_of(network, rows), "")
    (settings.out / "quantities.md").write_text(markdown(results), encoding="utf-8")
    draw(results, settings.out / "quantities.png")
    console.print(f"written: {settings.out}/{', '.join(FILES)}")
    return 0


def write(results: Results, path: Path) -> None:
    """As JSON, what was measured so far."""

    def plain(measured: Measured) -> dict:
        ratio = measured.time and dataclasses.asdict(measured.time)
        return {"time": ratio, "seconds": measured.seconds, "memory": measured.memory}

    measured = {
        network: {q: {who: plain(m) for who, m in row.items()} for q, row in rows.items()}
        for network, rows in results.items()
    }
    versions = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    versions["malloc"] = os.environ.get("GLIBC_TUNABLES", "")  # huge pages make large results cheap
    path.write_text(json.dumps({"versions": versions, "measured": measured}, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    return run(Settings, script, arguments, "quantities")
