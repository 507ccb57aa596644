"""What other backward rules cost: sweeps with `rules=` against the plain sweep.

    python -m experiments.benchmark rules
    python -m experiments.benchmark rules --programs mlp lstm --repeats 100

Rules of the cost of those that they replace should cost nothing. "default" replaces every product
and every activation by itself; "sensitivity" gives activations a rule of the same arithmetic,
written anew; "feedback" sends errors back through random weights, which are further inputs. Run
time, memory and the time to trace, as ratios to `fb.value_and_grad` without rules, in one process
and in alternation.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.progress import track
from rich.table import Table

import fbackprop as fb
from experiments.command import UsageError, check_names, prepare_folder, run, terminal
from experiments.measuring import Ratio, alternate
from experiments.programs import PROGRAMS, build


@dataclasses.dataclass(frozen=True)
class Settings:
    """Compare sweeps with other rules with the plain sweep."""

    programs: tuple[str, ...] = ("mlp", "convnet", "transformer", "transformer-scanned", "lstm")
    """Which programs to differentiate."""
    repeats: int = 60
    """Pairs of runs that are timed."""
    traces: int = 5
    """Pairs of traces, each from empty caches, that are timed."""
    out: Path = Path("runs/benchmark-rules")
    """Where the table (JSON) goes; those of an earlier run are replaced."""


def _unchanged(ct, default):
    return default(ct)


def _tanh(ct, out):
    return ct * ((1 - out) * (1 + out))


def _relu(ct, x):
    return jnp.where(x > 0, ct, jnp.zeros_like(ct))


PRODUCTS = fb.Anywhere(("dot_general", "conv_general_dilated"))
ACTIVATIONS = fb.Anywhere(("tanh", "relu", "logistic", "gelu"))

RULES: dict[str, Callable[[Any], dict]] = {
    "default": lambda twins: {PRODUCTS: _unchanged, ACTIVATIONS: _unchanged},
    "sensitivity": lambda twins: {fb.Anywhere(("tanh",)): _tanh, fb.Anywhere(("relu",)): _relu},
    "feedback": fb.credit.feedback_alignment,
}
MEASURES = {"run": "run time", "temporary": "temporary memory", "trace": "trace + lower"}


def measure(name: str, rules: str, settings: Settings) -> dict[str, Ratio]:
    """The ratios for one program and one set of rules."""
    program = build(name)
    twins = jax.tree.map(
        lambda w: jax.random.normal(jax.random.key(1), w.shape, w.dtype), program.params
    )

    def lowered(side: int):
        def step(params, data, twins):
            changed = RULES[rules](twins) if side == 0 else None
            return fb.value_and_grad(lambda p: program.loss(p, data, fb.grad), rules=changed)(
                params
            )

        return jax.jit(step).lower(program.params, program.data, twins)

    compiled: list[Any] = [lowered(side).compile() for side in (0, 1)]

    def execute(side: int):
        return jax.block_until_ready(compiled[side](program.params, program.data, twins))

    execute(0), execute(1)
    temporary = [float(c.memory_analysis().temp_size_in_bytes) for c in compiled]
    return {
        "run": Ratio.of(*alternate(execute, settings.repeats)),
        "temporary": Ratio.of([temporary[0]], [temporary[1]]),
        "trace": Ratio.of(*alternate(lowered, settings.traces, fresh=True)),
    }


def script(settings: Settings) -> int:
    if not settings.programs:
        raise UsageError("--programs takes one or more programs")
    check_names("program", settings.programs, PROGRAMS)
    if min(settings.repeats, settings.traces) < 1:
        raise UsageError("--repeats and --traces must be at least 1")
    prepare_folder(settings.out, ["rules.json"])
    console = terminal()
    table = Table(title="sweep with other rules over the plain sweep", box=None)
    for heading in ("program", "rules", *MEASURES.values()):
        table.add_column(heading, no_wrap=True)
    cases = [(name, rules) for name in settings.programs for rules in RULES]
    found: dict[str, dict[str, dict]] = {}
    for name, rules in track(cases, "measuring", console=console, disable=not console.is_terminal):
        ratios = measure(name, rules, settings)
        found.setdefault(name, {})[rules] = {m: dataclasses.asdict(r) for m, r in ratios.items()}
        cells = (ratios[m].said(3) for m in MEASURES)
        table.add_row(name, rules, *cells)
    console.print(table)
    (settings.out / "rules.json").write_text(json.dumps(found, indent=2) + "\n")
    console.print(f"written: {settings.out}/rules.json")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    return run(Settings, script, given, "rules")
