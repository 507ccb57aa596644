"""What a sweep's quantities cost over the gradient alone: run time and temporary memory.

    python -m experiments.benchmark quantities
    python -m experiments.benchmark quantities --networks mlp --quantities kfac kflr
    python -m experiments.benchmark quantities --torch ../with-torch/bin/python

The unit is the gradient of the same batch by `fb.value_and_grad`. Measured against it are the
sweep for a quantity alone, the sweep for the quantity and the gradient, and the same quantity by
`vmap(jax.grad)` or `vmap(jax.jacrev)`. BackPACK and Opacus, which give the gradient as well, are
measured against PyTorch's gradient. A run and its unit alternate and are compared pair by pair, and
the whole run is counted: 1.5 is half a gradient more. Memory is the compiler's account of temporary
buffers.
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
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

import fbackprop as fb
from experiments.command import ExperimentError, UsageError, run, terminal
from experiments.measuring import Ratio, alternate
from fbackprop import losses, networks

CHECKED = 3  # examples on which a quantity is compared with its definition before it is timed
TOLERANCE = 1e-3  # of that comparison, relative to the largest element of an array
MAX_NORM = 0.5  # clips most of the examples
SECONDS = 15.0  # about the longest that one program is timed, at fewer pairs than asked for

ALONE, WITH_GRADIENT, BY_JAX = "alone", "with gradient", "vmap(grad)"


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
    """Where the tables (JSON, Markdown) and the figure (PNG) go."""


# --- networks -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A network as both frameworks build it, and what is measured on it."""

    family: str
    sizes: Mapping[str, Any]
    batch: int
    quantities: tuple[str, ...]


class Problem(NamedTuple):
    """A model of one example, its parameters, and a batch of inputs and labels."""

    model: Callable
    params: Any
    batch: tuple[jax.Array, jax.Array]

    def loss(self, params, x, y):
        """Of one example."""
        return losses.softmax_cross_entropy(self.model(params, x), y)

    def mean_loss(self, params, batch):
        return jnp.mean(jax.vmap(self.loss, (None, 0, 0))(params, *batch))


FIRST_ORDER = (
    "example-gradients",
    "example-norms",
    "clipped-gradient",
    "second-moment",
    "variance",
    "example-dots",
)
SAMPLED = ("ggn-diagonal-sampled", "kfac")
EXACT = ("ggn-diagonal", "kflr")

NETWORKS = {
    "mlp": Case(
        "mlp",
        {"widths": (784, 512, 512, 512, 10)},
        batch=128,
        quantities=(*FIRST_ORDER, *SAMPLED, *EXACT, "everything"),
    ),
    "mlp-256": Case(
        "mlp",
        {"widths": (784, 512, 512, 512, 10)},
        batch=256,
        quantities=("example-dots", "gram"),
    ),
    "wide-mlp": Case(
        "mlp",
        {"widths": (784, 1024, 1024, 1024, 10)},
        batch=256,
        quantities=("example-norms", "clipped-gradient"),
    ),
    "convnet": Case(
        "convnet",
        {"image": (28, 28), "classes": 10, "channels": (16, 32), "kernel": 5},
        batch=64,
        quantities=(*FIRST_ORDER, *SAMPLED, *EXACT, "everything"),
    ),
    # Without the exact curvature, which has a column for nearly every word at every position.
    "transformer": Case(
        "transformer",
        {"vocabulary": 64, "length": 32, "width": 64, "heads": 4, "layers": 2},
        batch=32,
        quantities=(*FIRST_ORDER, *SAMPLED, "everything"),
    ),
}


def build(case: Case) -> Problem:
    """The network and a batch of random data."""
    key, n, sizes = jax.random.key(0), case.batch, case.sizes
    if case.family == "mlp":
        network = networks.mlp(**sizes)
        inputs = jax.random.normal(key, (n, sizes["widths"][0]))
        labels = jnp.arange(n) % sizes["widths"][-1]
    elif case.family == "convnet":
        network = convnet(**sizes)
        inputs = jax.random.normal(key, (n, *sizes["image"]))
        labels = jnp.arange(n) % sizes["classes"]
    else:
        words = sizes["vocabulary"]
        network = networks.transformer(outputs=words, **sizes)
        inputs = jax.random.randint(key, (n, sizes["length"]), 0, words)
        labels = jnp.roll(inputs, -1, axis=1)
    return Problem(network.apply, network.init(key), (inputs, labels))


def convnet(
    image: Sequence[int], classes: int, channels: Sequence[int], kernel: int
) -> networks.Network:
    """Convolutions, each with ReLU and 2×2 max pooling, and a dense layer."""
    features = (image[0] >> len(channels)) * (image[1] >> len(channels)) * channels[-1]
    kernels = [(kernel, kernel, i, o) for i, o in zip((1, *channels), channels, strict=False)]
    shapes = [*kernels, (features, classes)]
    draw = jax.nn.initializers.he_normal()

    def init(key):
        keys = jax.random.split(key, len(shapes))
        return [(draw(k, s), jnp.zeros(s[-1])) for k, s in zip(keys, shapes, strict=True)]

    def apply(params, x):
        *stages, (head, bias) = params
        x = x[None, :, :, None]
        for w, b in stages:
            dims = ("NHWC", "HWIO", "NHWC")
            x = lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dims)
            x = jax.nn.relu(x + b.reshape(1, 1, 1, -1))
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return jnp.ravel(x) @ head + bias

    return networks.Network(init, apply)


# --- quantities, and the same by JAX alone --------------------------------------------------------

QUANTITIES: dict[str, fb.Quantity] = {
    "example-gradients": fb.ExampleGradients(),
    "example-norms": fb.ExampleNorms(),
    "clipped-gradient": fb.ClippedGradient(MAX_NORM),
    "second-moment": fb.SecondMoment(),
    "variance": fb.Variance(),
    "example-dots": fb.ExampleDots(),
    "ggn-diagonal-sampled": fb.GGNDiagonal(samples=1),
    "ggn-diagonal": fb.GGNDiagonal(),
    "kfac": fb.Kronecker(samples=1),
    "kflr": fb.Kronecker(),
    "gram": fb.Gram(),
}


def members(quantity: str, case: Case) -> list[str]:
    """The quantities that are computed at once: for "everything", all that are for the network."""
    return [q for q in case.quantities if q in QUANTITIES and quantity in (q, "everything")]


def _norms(gradients):
    return sum(jnp.sum(x**2, axis=range(1, x.ndim)) for x in jax.tree.leaves(gradients))


def _clipped(gradients):
    norms = jnp.sqrt(_norms(gradients))
    scale = jnp.minimum(1, MAX_NORM / norms) / len(norms)
    return jax.tree.map(lambda x: jnp.tensordot(scale, x, 1), gradients)


def _second_moment(gradients):
    return jax.tree.map(lambda x: jnp.mean(x**2, axis=0), gradients)


def _variance(gradients):
    return jax.tree.map(lambda x: jnp.mean(x**2, axis=0) - jnp.mean(x, axis=0) ** 2, gradients)


def _dots(rows):
    """Inner products of rows that are pytrees, each of one leading axis."""
    flat = [x.reshape(len(x), -1) for x in jax.tree.leaves(rows)]
    return sum(x @ x.T for x in flat)


FROM_GRADIENTS: dict[str, Callable] = {
    "example-gradients": lambda gradients: gradients,
    "example-norms": _norms,
    "clipped-gradient": _clipped,
    "second-moment": _second_moment,
    "variance": _variance,
    "example-dots": _dots,
}


def by_jax(quantity: str, problem: Problem) -> Callable | None:
    """The quantity as a function of parameters and batch by JAX's gradients or Jacobians."""
    if quantity in FROM_GRADIENTS:
        each = jax.vmap(jax.grad(problem.loss), (None, 0, 0))
        return lambda params, batch: FROM_GRADIENTS[quantity](each(params, *batch))
    if quantity == "gram":

        def gram(params, batch):
            jacobian = _jacobian(problem, params, batch)
            n, c = jax.tree.leaves(jacobian)[0].shape[:2]
            rows = jax.tree.map(lambda x: x.reshape(n * c, *x.shape[2:]), jacobian)
            return _dots(rows).reshape(n, c, n, c)

        return gram
    return None


def _jacobian(problem: Problem, params, batch):
    return jax.vmap(jax.jacrev(problem.model), (None, 0))(params, batch[0])


# --- a benchmark of wrong numbers is worth nothing ------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Columns(fb.Quantity):
    """The gradients that a curvature's columns are sent back to, (N, C, *leaf)."""

    sent: Callable
    over = "examples"

    @property
    def columns(self):
        return self.sent

    def extract(self, gradients):
        return gradients.each()


def check(names: Sequence[str], case: Case, problem: Problem) -> None:
    """Compare quantities with their definitions, on a few examples.

    Raises:
      AssertionError: one differs.
    """
    params, batch = problem.params, jax.tree.map(lambda x: x[:CHECKED], problem.batch)
    for name in names:
        quantity, definition = QUANTITIES[name], by_jax(name, problem)
        if definition is not None:
            found = _sweep(problem, q=quantity)(params, batch)["q"]
            _compare(name, found, definition(params, batch))
            continue
        if isinstance(quantity, fb.Kronecker):
            # The factors are exact for a single example, where a weight is used but once.
            batch = jax.tree.map(lambda x: x[:1], problem.batch)
        found = _sweep(problem, q=quantity, columns=_Columns(quantity.columns))(params, batch)
        expected = _diagonal(name, problem, batch, found["columns"])
        if not isinstance(quantity, fb.Kronecker):
            _compare(name, found["q"], expected)
            continue
        blocks = jax.tree.structure(params).flatten_up_to(found["q"])
        for own, leaf in zip(blocks, jax.tree.leaves(expected), strict=True):
            if case.family == "mlp" or leaf.ndim == 1:
                _compare(name, _diagonal_of_block(*own), leaf)


def _diagonal(name: str, problem: Problem, batch, columns):
    """Of the Gauss-Newton matrix: by JAX's derivatives, or of columns that were drawn."""
    if name in SAMPLED:
        return jax.tree.map(lambda x: jnp.mean(jnp.sum(x**2, axis=1), axis=0), columns)
    predictions = jax.vmap(problem.model, (None, 0))(problem.params, batch[0])
    hessians = jax.vmap(jax.hessian(losses.softmax_cross_entropy))(predictions, batch[1])
    jacobian = _jacobian(problem, problem.params, batch)
    n = len(predictions)
    return jax.tree.map(lambda j: jnp.einsum("nc...,ncd,nd...->...", j, hessians / n, j), jacobian)


def _diagonal_of_block(block: fb.KroneckerBlock):
    a, b = (jnp.diagonal(x, axis1=1, axis2=2) if x.ndim == 3 else x for x in (block.a, block.b))
    return block.layout.restore(a[:, :, None] * b[:, None, :])


def _compare(name: str, found, expected) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = float(jnp.max(jnp.abs(b)))
        if not np.allclose(a, b, rtol=0, atol=TOLERANCE * scale + 1e-12):
            raise AssertionError(f"{name} differs from its definition")


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


def _sweep(problem: Problem, **quantities: Any) -> Callable:
    swept = fb.sweep(problem.model, losses.softmax_cross_entropy, **quantities)
    return jax.jit(lambda params, batch: swept(params, batch, key=jax.random.key(1)))


class Bench:
    """A network whose gradient is compiled, to time other programs against."""

    def __init__(self, case: Case, repeats: int):
        self.case, self.repeats, self.problem = case, repeats, build(case)
        self.gradient = self._compiled(fb.value_and_grad(self.problem.mean_loss))

    def measure(self, quantity: str) -> dict[str, Measured]:
        """The quantity alone, with the gradient, and by JAX alone."""
        names = members(quantity, self.case)
        check(names, self.case, self.problem)
        own = {name.replace("-", "_"): QUANTITIES[name] for name in names}
        programs: dict[str, Callable | None] = {
            ALONE: _sweep(self.problem, **own),
            WITH_GRADIENT: _sweep(self.problem, gradient=fb.Gradient(), **own),
            BY_JAX: by_jax(quantity, self.problem),
        }
        return {who: self._against_gradient(f) for who, f in programs.items() if f is not None}

    def _compiled(self, function: Callable):
        return jax.jit(function).lower(self.problem.params, self.problem.batch).compile()

    def _against_gradient(self, function: Callable) -> Measured:
        programs = (self._compiled(function), self.gradient)
        sizes, unit = (program.memory_analysis() for program in programs)
        memory = sizes.temp_size_in_bytes / max(unit.temp_size_in_bytes, 1)
        if sizes.temp_size_in_bytes + sizes.output_size_in_bytes > _memory_of_machine() / 2:
            return Measured(None, None, memory)

        def execute(side: int):
            jax.block_until_ready(programs[side](self.problem.params, self.problem.batch))

        execute(1)
        pairs = alternate(execute, 1)
        affordable = int(SECONDS / pairs[0][0])
        if affordable:  # else that one was long enough
            pairs = alternate(execute, min(self.repeats, affordable))
        return Measured(Ratio.of(*pairs), statistics.median(pairs[0]), memory)


def _memory_of_machine() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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
    BY_JAX,
    "memory",
    "ms",
    "PyTorch",
    "ms",
)


def cells(quantity: str, measured: Mapping[str, Measured]) -> list[str]:
    """A row under `HEADERS`; of PyTorch's rivals the fastest."""
    alone, both, jax_ = (measured.get(who) for who in (ALONE, WITH_GRADIENT, BY_JAX))
    rivals = {who: m for who, m in measured.items() if who not in (ALONE, WITH_GRADIENT, BY_JAX)}
    name, rival = min(rivals.items(), key=lambda x: x[1].seconds or 0, default=("", None))
    return [
        quantity,
        _times(alone),
        *(_times(both), _memory(both), _milliseconds(both)),
        *(_times(jax_), _memory(jax_), _milliseconds(jax_)),
        f"{name} {_times(rival)}".strip(),
        _milliseconds(rival),
    ]


def _times(measured: Measured | None) -> str:
    if measured is None:
        return ""
    if measured.time is None:
        return "–"
    digits = 2 if measured.time.median < 10 else 1
    return f"{measured.time.median:.{digits}f} ±{measured.time.spread:.{digits}f}"


def _memory(measured: Measured | None) -> str:
    return "" if measured is None or measured.memory is None else f"{measured.memory:.2f}"


def _milliseconds(measured: Measured | None) -> str:
    return "" if measured is None or measured.seconds is None else f"{1e3 * measured.seconds:.1f}"


def title(network: str, rows: Mapping[str, Mapping[str, Measured]]) -> str:
    """The network's name, its batch and what its gradients take."""
    units: dict[str, list[float]] = {}
    for measured in rows.values():
        for who, m in measured.items():
            framework = "fbackprop" if who in (ALONE, WITH_GRADIENT, BY_JAX) else "PyTorch"
            if m.time:
                units.setdefault(framework, []).append(1e3 * m.time.reference)
    said = ", ".join(f"{who} {statistics.median(times):.1f} ms" for who, times in units.items())
    return f"{network}: batch {NETWORKS[network].batch}; a gradient takes {said}"


def table_of(network: str, rows: Mapping[str, Mapping[str, Measured]]) -> Table:
    """Times and memory over the gradient's, a row per quantity."""
    table = Table(title=title(network, rows), box=None, title_justify="left", collapse_padding=True)
    for k, header in enumerate(HEADERS):
        table.add_column(header, justify="right" if k else "left", no_wrap=k == 0)
    for quantity, measured in rows.items():
        table.add_row(*cells(quantity, measured))
    return table


def markdown(results: Results) -> str:
    """The same tables for the documentation."""
    lines: list[str] = []
    for network, rows in results.items():
        lines += [f"**{title(network, rows)}**", ""]
        lines += ["| " + " | ".join(HEADERS) + " |", "|---" + "|--:" * (len(HEADERS) - 1) + "|"]
        lines += ["| " + " | ".join(cells(*row)) + " |" for row in rows.items()]
        lines += [""]
    return "\n".join(lines)


# Okabe and Ito's colours are told apart with any colour vision; the markers help in print.
STYLES: dict[str, dict[str, Any]] = {
    ALONE: {"color": "#0072B2", "marker": "o", "markerfacecolor": "white"},
    WITH_GRADIENT: {"color": "#0072B2", "marker": "o"},
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
        loc="outside upper center", ncols=len(ordered), frameon=False, fontsize=9,
    )  # fmt: skip
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=150)
    plt.close(figure)


# --- the script -----------------------------------------------------------------------------------


def _chosen(settings: Settings) -> dict[str, list[str]]:
    """The quantities to measure on each network."""
    known = (*QUANTITIES, "everything")
    for what, given, choices in (
        ("network", settings.networks, tuple(NETWORKS)),
        ("quantity", settings.quantities, known),
    ):
        unknown = [name for name in given if name not in choices]
        if unknown:
            raise UsageError(f"no {what} called '{unknown[0]}': choose from {', '.join(choices)}")
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


def script(settings: Settings) -> int:
    chosen = _chosen(settings)
    console = terminal()
    python = find_torch(settings.torch, console)
    settings.out.mkdir(parents=True, exist_ok=True)
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
    console.print(f"written: {settings.out}/quantities.json, quantities.md, quantities.png")
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
    path.write_text(json.dumps({"versions": versions, "measured": measured}, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    return run(Settings, script, arguments)
