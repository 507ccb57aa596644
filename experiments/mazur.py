"""Mazur's worked example of backpropagation, every number of it beside the published one.

A network of two inputs, two hidden and two output neurons, all sigmoid, is trained on one example
by gradient descent on the squared error ½Σ(target − output)²; the two biases stay fixed. The table
follows the calculation in the order in which one does it with a pencil. The backward pass has no
formula typed in here: the forward pass names what it computes, and all numbers are read off the
record of its backward sweep, the error signals δ as the cotangents that arrived at the net inputs.

The four numbers after the first update are not those of this calculation. The table shows what
reproduces them to all digits: three follow if the hidden neurons' error signals are carried back
through output weights that are already updated, the fourth is the error one update earlier.

Source: Matt Mazur, "A Step by Step Backpropagation Example", 2015.
"""

import dataclasses
import enum
from collections.abc import Callable, Iterator, Sequence
from decimal import ROUND_HALF_EVEN, Decimal
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike
from rich.console import Console
from rich.table import Table

import fbackprop as fb
from experiments import command
from experiments.command import UsageError

INPUTS = (0.05, 0.10)
TARGETS = (0.01, 0.99)
HIDDEN_WEIGHTS = ((0.15, 0.20), (0.25, 0.30))  # w1 w2 into h1, w3 w4 into h2
OUTPUT_WEIGHTS = ((0.40, 0.45), (0.50, 0.55))  # w5 w6 into o1, w7 w8 into o2
HIDDEN_BIAS, OUTPUT_BIAS = 0.35, 0.60
RATE = 0.5
UPDATES = 10_000

PUBLISHED = {
    "net h1": "0.3775",
    "h1": "0.593269992",
    "h2": "0.596884378",
    "net o1": "1.105905967",
    "o1": "0.75136507",
    "o2": "0.772928465",
    "E o1": "0.274811083",
    "E o2": "0.023560026",
    "E": "0.298371109",
    "∂E/∂o1": "0.74136507",
    "∂o1/∂net o1": "0.186815602",
    "δ o1": "0.138498562",
    "∂E o1/∂h1": "0.055399425",
    "∂E o2/∂h1": "-0.019049119",
    "∂E/∂h1": "0.036350306",
    "∂h1/∂net h1": "0.241300709",
    "∂E/∂w5": "0.082167041",
    "∂E/∂w1": "0.000438568",
    "w1+": "0.149780716",
    "w2+": "0.19956143",
    "w3+": "0.24975114",
    "w4+": "0.29950229",
    "w5+": "0.35891648",
    "w6+": "0.408666186",
    "w7+": "0.511301270",
    "w8+": "0.561370121",
    "E, 1 update": "0.291027924",
    "E, 10000 updates": "0.0000351085",
    "o1, 10000 updates": "0.015912196",
    "o2, 10000 updates": "0.984065734",
}
"""Every number the article prints, as it prints it: the digits say how precise it claims to be."""


class Weights(NamedTuple):
    """The eight weights, ``weights[to, from]``: both fields have shape (2, 2)."""

    hidden: jax.Array
    output: jax.Array


class Row(NamedTuple):
    """One line of the calculation.

    ``published`` is the article's number for it, if it prints one; ``binding`` rows must agree.
    """

    name: str
    how: str
    value: float
    published: str | None
    binding: bool = True

    @property
    def agreement(self) -> "Agreement":
        """How the value computed here stands to the published one."""
        if self.published is None:
            return Agreement.UNPUBLISHED
        verdict = agreement(self.value, self.published)
        if verdict is Agreement.NO and not self.binding:
            return Agreement.OTHERWISE
        return verdict


class Agreement(enum.Enum):
    """How a value stands to the digits that were published."""

    UNPUBLISHED = ""
    YES = "yes"
    LAST_DIGIT = "to one unit in the last digit"
    OTHERWISE = "no: see below"
    NO = "NO"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Print Mazur's worked example of backpropagation, every number beside the published one."""

    decimals: int = 10
    """Decimals of the computed values."""


def agreement(value: float, published: str) -> Agreement:
    """Compare ``value`` with a published decimal, at the digits that were published."""
    printed = Decimal(published)
    unit = Decimal(1).scaleb(int(printed.as_tuple().exponent))
    exact = Decimal(value)
    if exact.quantize(unit, rounding=ROUND_HALF_EVEN) == printed:
        return Agreement.YES
    return Agreement.LAST_DIGIT if abs(exact - printed) <= unit else Agreement.NO


def initial_weights() -> Weights:
    """The article's weights w1 to w8, in JAX's current default precision."""
    return Weights(jnp.asarray(HIDDEN_WEIGHTS), jnp.asarray(OUTPUT_WEIGHTS))


def net_output(weights: Weights, inputs: ArrayLike = INPUTS) -> jax.Array:
    """The output neurons' net inputs, shape (2,); what it computes on the way is named."""
    net = weights.hidden @ jnp.asarray(inputs) + HIDDEN_BIAS
    hidden = checkpoint_name(jax.nn.sigmoid(checkpoint_name(net, "net h")), "h")
    return checkpoint_name(weights.output @ hidden + OUTPUT_BIAS, "net o")


def outputs(weights: Weights, inputs: ArrayLike = INPUTS) -> jax.Array:
    """The two outputs, shape (2,)."""
    return checkpoint_name(jax.nn.sigmoid(net_output(weights, inputs)), "o")


def errors(prediction: jax.Array) -> jax.Array:
    """½(target − output)² of each output neuron, shape (2,)."""
    return checkpoint_name(0.5 * jnp.square(jnp.asarray(TARGETS) - prediction), "E")


def total_error(weights: Weights) -> jax.Array:
    """The sum of the two errors."""
    return errors(outputs(weights)).sum()


def signals_of(k: int) -> dict[str, np.ndarray]:
    """The error signals of one of the two errors."""
    found = fb.error_signals(lambda weights: errors(outputs(weights))[k], initial_weights())
    return {name: np.asarray(signal) for name, signal in found.items()}


def update(weights: Weights) -> Weights:
    """One step of gradient descent at the article's rate."""
    gradient = fb.grad(total_error)(weights)
    return jax.tree.map(lambda weight, slope: weight - RATE * slope, weights, gradient)


def update_outputs_first(weights: Weights) -> Weights:
    """The step in the other order: δ of the outputs reaches h1 and h2 through w5+ to w8+.

    Not gradient descent, since the hidden weights follow no gradient, but it is what the article's
    numbers after the first update agree with.
    """
    first = fb.record(total_error)(weights)
    (gradient,) = first.gradients
    updated = weights._replace(output=weights.output - RATE * gradient.output)
    _, pullback = fb.vjp(net_output, updated)
    (slope,) = pullback(first.signals["net o"])
    return updated._replace(hidden=weights.hidden - RATE * slope.hidden)


def train(
    updates: int, step: Callable[[Weights], Weights] = update
) -> tuple[Weights, jax.Array, float]:
    """The weights after ``updates`` steps from the start, their outputs (2,) and their error."""
    repeat = jax.jit(lambda start: jax.lax.fori_loop(0, updates, lambda _, w: step(w), start))
    weights = repeat(initial_weights())
    prediction = outputs(weights)
    return weights, prediction, float(errors(prediction).sum())


def calculation() -> dict[str, list[Row]]:
    """The whole worked example in float64: the rows of each stage, in the order of the pencil."""
    with jax.enable_x64(True):
        first = jax.tree.map(np.asarray, fb.record(total_error)(initial_weights()))
        (gradient,), neuron, delta = first.gradients, first.named_values, first.signals
        of_first, of_second = (signals_of(k) for k in (0, 1))
        once, _, error_once = train(1)
        _, outputs_trained, error_trained = train(UPDATES)
        _, _, error_before = train(UPDATES - 1)
        _, _, error_article = train(1, update_outputs_first)
        _, outputs_article, _ = train(UPDATES, update_outputs_first)
        slopes = list(_by_weight(gradient, "{delta}·{source}"))
        moved = list(_by_weight(once, "{weight} − 0.5·∂E/∂{weight}"))
    return {
        "Forward": [
            *_pair("net h1", "w1·i1 + w2·i2 + b1", "net h2", "w3·i1 + w4·i2 + b1", neuron["net h"]),
            *_pair("h1", "1/(1 + exp(−net h1))", "h2", "1/(1 + exp(−net h2))", neuron["h"]),
            *_pair("net o1", "w5·h1 + w6·h2 + b2", "net o2", "w7·h1 + w8·h2 + b2", neuron["net o"]),
            *_pair("o1", "1/(1 + exp(−net o1))", "o2", "1/(1 + exp(−net o2))", neuron["o"]),
        ],
        "Error": [
            *_pair("E o1", "½(t1 − o1)²", "E o2", "½(t2 − o2)²", neuron["E"]),
            _row("E", "E o1 + E o2", first.value),
        ],
        "Error signals": [
            *_pair("∂E/∂o1", "o1 − t1", "∂E/∂o2", "o2 − t2", delta["o"]),
            *_pair(
                *("∂o1/∂net o1", "o1·(1 − o1)", "∂o2/∂net o2", "o2·(1 − o2)"),
                delta["net o"] / delta["o"],
            ),
            *_pair("δ o1", "∂E/∂o1·∂o1/∂net o1", "δ o2", "∂E/∂o2·∂o2/∂net o2", delta["net o"]),
            *_pair("∂E o1/∂h1", "δ o1·w5", "∂E o1/∂h2", "δ o1·w6", of_first["h"]),
            *_pair("∂E o2/∂h1", "δ o2·w7", "∂E o2/∂h2", "δ o2·w8", of_second["h"]),
            *_pair(
                *("∂E/∂h1", "∂E o1/∂h1 + ∂E o2/∂h1", "∂E/∂h2", "∂E o1/∂h2 + ∂E o2/∂h2"),
                delta["h"],
            ),
            *_pair(
                *("∂h1/∂net h1", "h1·(1 − h1)", "∂h2/∂net h2", "h2·(1 − h2)"),
                delta["net h"] / delta["h"],
            ),
            *_pair("δ h1", "∂E/∂h1·∂h1/∂net h1", "δ h2", "∂E/∂h2·∂h2/∂net h2", delta["net h"]),
        ],
        "Gradient": [_row(f"∂E/∂{name}", how, slope) for name, how, slope in slopes],
        "One update": [_row(f"{name}+", how, weight) for name, how, weight in moved],
        "After training": [
            _later("E, 1 update", "forward again with w1+ … w8+", error_once),
            _later("E, 10000 updates", "all of it, 10000 times", error_trained),
            _later("o1, 10000 updates", "target 0.01", outputs_trained[0]),
            _later("o2, 10000 updates", "target 0.99", outputs_trained[1]),
        ],
        "What gives the article's": [
            _later("E, 1 update", "hidden δ through w5+ … w8+", error_article),
            _later("E, 10000 updates", "the error after 9999 updates", error_before),
            _later("o1, 10000 updates", "hidden δ through w5+ … w8+", outputs_article[0]),
            _later("o2, 10000 updates", "hidden δ through w5+ … w8+", outputs_article[1]),
        ],
    }


def print_calculation(console: Console, stages: dict[str, list[Row]], decimals: int) -> None:
    """Print the rows of each stage under its name."""
    console.print("A 2-2-2 network of sigmoid neurons, one training example, gradient descent.")
    console.print("inputs   i1 = 0.05  i2 = 0.10      targets  t1 = 0.01  t2 = 0.99")
    console.print("weights  w1 = 0.15  w2 = 0.20  w3 = 0.25  w4 = 0.30  (inputs to hidden)")
    console.print("         w5 = 0.40  w6 = 0.45  w7 = 0.50  w8 = 0.55  (hidden to outputs)")
    console.print("biases   b1 = 0.35  b2 = 0.60  (fixed)      rate  0.5")
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("quantity")
    table.add_column("how")
    table.add_column("computed", justify="right", overflow="fold")
    table.add_column("published", justify="right", overflow="fold")
    table.add_column("agrees")
    for stage, rows in stages.items():
        table.add_row("")
        table.add_row(stage, style="bold")
        for row in rows:
            style = "red" if row.agreement is Agreement.NO else None
            value = f"{row.value:.{decimals}f}"
            cells = (row.name, row.how, value, row.published or "", row.agreement.value)
            table.add_row(*cells, style=style)
    console.print(table)


def print_verdict(console: Console, stages: dict[str, list[Row]]) -> int:
    """Say how many rows agree; the exit status is 1 if one of the first pass does not."""
    rows = [row for stage in stages.values() for row in stage]
    verdicts = [row.agreement for row in rows if row.binding and row.published]
    wrong = verdicts.count(Agreement.NO)
    agreeing = len(verdicts) - wrong
    console.print(
        f"\n{agreeing} of the {len(verdicts)} numbers published for the first pass agree"
        " with float64 arithmetic."
    )
    otherwise = [row for row in rows if row.agreement is Agreement.OTHERWISE]
    if otherwise:
        console.print(
            f"{len(otherwise)} published for later do not: the last rows show which other order of"
            " updating, or how many updates,\ngives them. The computed values are those of gradient"
            " descent as the first pass defines it."
        )
    return 1 if wrong else 0


def _row(name: str, how: str, value: float) -> Row:
    return Row(name, how, float(value), PUBLISHED.get(name))


def _later(name: str, how: str, value: float | jax.Array) -> Row:
    """A row after the first update, where the article need not agree."""
    return Row(name, how, float(value), PUBLISHED[name], binding=False)


def _pair(
    first: str, first_how: str, second: str, second_how: str, values: np.ndarray
) -> tuple[Row, Row]:
    """The rows of a layer's two neurons."""
    return _row(first, first_how, values[0]), _row(second, second_how, values[1])


def _by_weight(values: Weights, how: str) -> Iterator[tuple[str, str, float]]:
    """The eight entries of ``values`` with the weight's name and how one finds its number."""
    layers = (("δ h", "i", values.hidden), ("δ o", "h", values.output))
    ends = [(layer, to, source) for layer in layers for to in (0, 1) for source in (0, 1)]
    for number, ((delta, source_name, matrix), to, source) in enumerate(ends, start=1):
        formula = how.format(
            weight=f"w{number}", delta=f"{delta}{to + 1}", source=f"{source_name}{source + 1}"
        )
        yield f"w{number}", formula, float(matrix[to, source])


def script(settings: Settings) -> int:
    """Print the example; the exit status says whether the first pass agrees with the article."""
    if not 0 <= settings.decimals <= 100:
        raise UsageError("--decimals must be from 0 to 100")
    console = command.terminal()
    stages = calculation()
    print_calculation(console, stages, settings.decimals)
    return print_verdict(console, stages)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    return command.run(Settings, script, arguments)


if __name__ == "__main__":
    command.leave(main())
