"""What a step of the Gauss-Newton family costs, beside a gradient of the same batch.

    python -m experiments.benchmark optimizers

Steps on the deep autoencoder 784-1000-500-250-30 and its mirror image, alternating with gradients
of the same batch in the same process, over whole cycles of what an optimizer does now and then; and
an exact Gauss-Newton solution on a perceptron beside `jax.jacrev` and a dense solve.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from rich.progress import track
from rich.table import Table

import fbackprop as fb
from experiments.command import UsageError, prepare_folder, run, terminal
from experiments.measuring import alternate

STEPS: dict[str, Callable[[], Any]] = {
    "adam": lambda: optax.adam(1e-3),
    "kfac": lambda: fb.optim.kfac(),
    "kfac, rate 1e-3": lambda: fb.optim.kfac(1e-3),
    "ekfac": lambda: fb.optim.ekfac(),
    "diagonal_gauss_newton": lambda: fb.optim.diagonal_gauss_newton(),
}
CYCLE = 20  # steps after which every optimizer here has done all that it does now and then
WIDTHS = (784, 1000, 500, 250, 30)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Measure steps of fb.optim beside a gradient, in one process and in alternation."""

    batch: int = 512
    """Examples of the autoencoder."""
    cycles: int = 2
    """How often 20 steps are measured."""
    solve_batch: int = 256
    """Examples of the exact solution; its perceptron has ten outputs."""
    hidden: tuple[int, ...] = (512, 512)
    """Hidden layers of the exact solution's perceptron."""
    autoencoder: tuple[int, ...] = WIDTHS
    """Widths of the encoder."""
    out: Path = Path("runs/optimizers")
    """Where the figures (JSON) go; those of an earlier run are replaced."""


def steps(settings: Settings, show: Callable) -> dict[str, dict[str, float]]:
    """For each optimizer: step over gradient in the mean, the gradient, and the first step."""
    network = fb.networks.autoencoder(settings.autoencoder)
    params = network.init(jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (settings.batch, settings.autoencoder[0]))
    loss = fb.losses.squared_error

    @jax.jit
    def gradient(params):
        return fb.Objective(network.apply, loss, params, (x, x)).value_and_gradient()

    jax.block_until_ready(gradient(params))
    found = {}
    for name in show(list(STEPS)):
        optimizer = STEPS[name]()
        step = fb.optim.step(network.apply, loss, optimizer)
        start = time.perf_counter()
        at = jax.block_until_ready(step(params, optimizer.init(params), (x, x)))
        first = time.perf_counter() - start

        def work(side: int, step=step, at=[at]):  # noqa: B006  what the steps leave behind
            if side:
                return jax.block_until_ready(gradient(at[0][0]))
            at[0] = jax.block_until_ready(step(at[0][0], at[0][1], (x, x)))

        for _ in range(CYCLE):  # past what an optimizer does at the start alone
            work(0)
        ours, gradients = alternate(work, CYCLE * settings.cycles)
        found[name] = {
            "step over gradient": float(np.mean(ours) / np.mean(gradients)),
            "usual step over gradient": float(np.median(ours) / np.median(gradients)),
            "gradient, ms": 1e3 * float(np.median(gradients)),
            "first step, s": first,
        }
    return found


def exact(settings: Settings) -> dict[str, float]:
    """The exact solution against `jax.jacrev` and a dense solve of the same rows, once each."""
    network = fb.networks.mlp((784, *settings.hidden, 10))
    params = network.init(jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (settings.solve_batch, 784))
    y = jnp.arange(settings.solve_batch) % 10
    loss = fb.losses.softmax_cross_entropy
    flat, unravel = ravel_pytree(params)

    def ours(flat, x, y):
        problem = fb.Objective(network.apply, loss, unravel(flat), (x, y))
        out = problem.sweep(rows=fb.GGNRows(), gradient=fb.Gradient())
        return ravel_pytree(out["rows"].solve(out["gradient"], 1e-2))[0]

    def theirs(flat, x, y):
        """By Woodbury's identity too: the matrix of the parameters would not fit."""
        predict = lambda f: jax.vmap(network.apply, (None, 0))(unravel(f), x)  # noqa: E731
        j = jax.jacrev(predict)(flat)
        z = predict(flat)
        h = jax.vmap(jax.hessian(loss))(z, y)
        values, vectors = jnp.linalg.eigh(h)
        roots = vectors * jnp.sqrt(jnp.maximum(values, 0))[:, None]
        s = jnp.einsum("nzc,nzp->ncp", roots, j).reshape(-1, len(flat)) / len(x) ** 0.5
        gradient = jax.grad(lambda f: jnp.mean(jax.vmap(loss)(predict(f), y)))(flat)
        gram = s @ s.T + 1e-2 * jnp.eye(len(s))
        return (gradient - s.T @ jnp.linalg.solve(gram, s @ gradient)) / 1e-2

    compiled = [jax.jit(f).lower(flat, x, y).compile() for f in (ours, theirs)]
    answers, seconds = [], []
    for function, repeats in zip(compiled, (5, 1), strict=True):
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            answer = jax.block_until_ready(function(flat, x, y))
            times.append(time.perf_counter() - start)
        answers.append(answer)
        seconds.append(float(np.median(times)))
    memory = [float(f.memory_analysis().temp_size_in_bytes) for f in compiled]
    scale = float(jnp.max(jnp.abs(answers[1])))
    return {
        "parameters": float(len(flat)),
        "difference": float(jnp.max(jnp.abs(answers[0] - answers[1]))) / scale,
        "seconds": seconds[0],
        "seconds of jacrev": seconds[1],
        "time, jacrev over ours": seconds[1] / seconds[0],
        "memory, jacrev over ours": memory[1] / memory[0],
    }


def script(settings: Settings) -> int:
    if min(settings.batch, settings.cycles, settings.solve_batch) < 1:
        raise UsageError("--batch, --cycles and --solve-batch must be at least 1")
    if min(*settings.autoencoder, *settings.hidden, 1) < 1:
        raise UsageError("--autoencoder and --hidden take widths of at least 1")
    if len(settings.autoencoder) < 2:
        raise UsageError("--autoencoder takes the widths of two layers or more")
    prepare_folder(settings.out, ["optimizers.json"])
    console = terminal()
    found = steps(
        settings,
        lambda names: track(names, "steps", console=console, disable=not console.is_terminal),
    )
    table = Table(title="steps on the autoencoder", box=None)
    for column in ("optimizer", *next(iter(found.values()))):
        table.add_column(
            column, justify="left" if column == "optimizer" else "right", overflow="fold"
        )
    for name, row in found.items():
        table.add_row(name, *(f"{value:.2f}" for value in row.values()))
    console.print(table)
    solution = exact(settings)
    console.print("exact solution:", ", ".join(f"{k} {v:.3g}" for k, v in solution.items()))
    written = {"steps": found, "exact": solution, "jax": jax.__version__}
    (settings.out / "optimizers.json").write_text(json.dumps(written, indent=2) + "\n")
    console.print(f"written: {settings.out}/optimizers.json")
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; returns its exit status."""
    return run(Settings, script, arguments, "optimizers")
