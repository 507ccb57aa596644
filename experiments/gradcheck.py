"""fbackprop's gradient against JAX's own and against differences, for every network.

This is ``fb.check_grads`` on six networks in three precisions. The error of a parameter's gradient
against ``jax.grad`` is max|difference| / max|gradient|, at most 1e-12 in float64, 1e-5 in float32
and eight units in the last place in bfloat16; NaNs and infinities must stand in the same places.
Against central differences, taken in float64, the library's own wider tolerances hold, save in
bfloat16, where the differences are only shown.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import fbackprop as fb
from experiments import command
from experiments.command import UsageError
from experiments.tasks import Params
from fbackprop import losses, networks
from fbackprop.check import tolerances

NetworkName = Literal["mlp", "autoencoder", "convnet", "resnet", "lstm", "transformer"]
Precision = Literal["float64", "float32", "bfloat16"]

TOLERANCES: dict[Precision, float] = {
    name: tolerances(jnp.dtype(name))[0] for name in get_args(Precision)
}
EXAMPLES, CLASSES, WORDS, LENGTH = 3, 4, 7, 5
DIFFERENCES = 4  # coordinates of each parameter at which central differences are taken


class Case(NamedTuple):
    """A network, the shape of one input (integers below ``WORDS`` if ``words``) and its loss."""

    network: networks.Network
    shape: tuple[int, ...]
    words: bool = False
    reconstructs: bool = False


class Row(NamedTuple):
    """How far the gradients of one parameter are apart."""

    network: NetworkName
    precision: Precision
    errors: fb.GradientRow

    @property
    def agrees(self) -> bool:
        """Whether the errors are within the precision's tolerances.

        In bfloat16 JAX alone is the judge: the forward pass rounds more than differences can tell.
        """
        as_jax = self.errors.max_rel_error <= TOLERANCES[self.precision]
        return as_jax and (self.precision == "bfloat16" or self.errors.ok)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Compare fbackprop's gradients with JAX's; the exit status is 0 if all agree."""

    networks: tuple[NetworkName, ...] = (
        "mlp",
        "autoencoder",
        "convnet",
        "resnet",
        "lstm",
        "transformer",
    )
    """Which networks to check."""
    precisions: tuple[Precision, ...] = ("float64", "float32", "bfloat16")
    """In which precisions."""
    every_parameter: bool = False
    """Print a row for each parameter, not only for the worst of each network."""
    seed: int = 0
    """Of the parameters and the data."""


CASES: dict[NetworkName, Callable[[], Case]] = {
    "mlp": lambda: Case(networks.mlp((6, 5, CLASSES)), (6,)),
    "autoencoder": lambda: Case(networks.autoencoder((6, 4, 2)), (6,), reconstructs=True),
    "convnet": lambda: Case(networks.convnet((8, 8, 1), CLASSES, channels=(2, 3)), (8, 8, 1)),
    "resnet": lambda: Case(
        networks.resnet((8, 8, 1), CLASSES, channels=(4, 6), groups=2), (8, 8, 1)
    ),
    "lstm": lambda: Case(networks.lstm(3, 4, CLASSES), (LENGTH, 3)),
    "transformer": lambda: Case(
        networks.transformer(WORDS, CLASSES, length=LENGTH, width=8, heads=2, layers=2),
        (LENGTH,),
        words=True,
    ),
}


def check(name: NetworkName, precision: Precision, seed: int = 0) -> list[Row]:
    """The rows of one network in one precision, one per parameter."""
    with jax.enable_x64(precision == "float64"):
        loss, params = problem(CASES[name](), jnp.dtype(precision), seed)
        rows = fb.check_grads(loss, params, samples=DIFFERENCES, seed=seed).rows
    return [Row(name, precision, errors) for errors in rows]


def problem(case: Case, dtype: Any, seed: int) -> tuple[Callable[[Params], jax.Array], Params]:
    """The mean loss over a small random batch as a function of the parameters, and those."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shape = (EXAMPLES, *case.shape)
    inputs = (
        jax.random.randint(keys[1], shape, 0, WORDS)
        if case.words
        else jax.random.normal(keys[1], shape, dtype)
    )
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), case.network.init(keys[0]))
    apply = case.network.apply
    outputs = jax.eval_shape(apply, params, inputs[0])
    # Sequence models may answer at every position: labels for whatever stands before the classes.
    labels = jax.random.randint(keys[2], (EXAMPLES, *outputs.shape[:-1]), 0, CLASSES)

    def loss(params: Params) -> jax.Array:
        predictions = jax.vmap(apply, in_axes=(None, 0))(params, inputs)
        if case.reconstructs:
            return jnp.mean(jax.vmap(losses.squared_error)(predictions, inputs))
        return jnp.mean(jax.vmap(losses.softmax_cross_entropy)(predictions, labels))

    return loss, params


def script(settings: Settings) -> int:
    """Check and print; the status is 1 if a gradient disagrees."""
    if not settings.networks or not settings.precisions:
        raise UsageError("name at least one of --networks and one of --precisions")
    if not 0 <= settings.seed < 2**32:
        raise UsageError("--seed must be from 0 to 2³² − 1")
    console = command.terminal()
    rows: list[Row] = []
    for name in settings.networks:
        for precision in settings.precisions:
            with console.status(f"{name} {precision}"):
                rows += check(name, precision, settings.seed)
    print_rows(console, rows if settings.every_parameter else worst(rows))
    wrong = sum(not row.agrees for row in rows)
    limits = ", ".join(f"{limit:g} in {name}" for name, limit in TOLERANCES.items())
    console.print(f"\n{len(rows) - wrong} of {len(rows)} gradients agree.")
    console.print(f"Relative to the largest entry, JAX's may differ by {limits}.")
    return 1 if wrong else 0


def worst(rows: Sequence[Row]) -> list[Row]:
    """Of each network and precision the row of the largest error, a disagreeing one first."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.network, row.precision), []).append(row)
    return [
        max(group, key=lambda row: (not row.agrees, row.errors.max_rel_error))
        for group in groups.values()
    ]


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """The table."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for header in ("network", "precision", "parameter", "shape"):
        table.add_column(header, overflow="fold")
    for header in ("error to JAX", "relative", "to differences", "relative"):
        table.add_column(header, justify="right", overflow="fold")
    table.add_column("agrees")
    for row in rows:
        errors = row.errors
        of_jax = (errors.max_abs_error, errors.max_rel_error)
        of_differences = (errors.fd_abs_error, errors.fd_rel_error)
        table.add_row(
            *(row.network, row.precision, escape(errors.path), str(errors.shape)),
            *(f"{error:.1e}" for error in (*of_jax, *of_differences)),
            "yes" if row.agrees else "NO",
            style=None if row.agrees else "red",
        )
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    return command.run(Settings, script, arguments)


if __name__ == "__main__":
    command.leave(main())
