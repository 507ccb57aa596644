"""Learning rules beside backpropagation: what they learn, and how far from the gradient they point.

One network is trained by true backpropagation and by other rules of credit assignment, from the
same initial weights and on the same batches. The angle between the update that a rule asks for and
the true gradient, both of the same fixed batch and at the rule's own weights, is measured for the
weights of each layer as training goes on. Under feedback alignment it falls below 90°, because the
forward weights turn toward the fixed random ones (Lillicrap, Cownden, Tweed and Akerman 2016,
"Random synaptic feedback weights support error backpropagation for deep learning"); so the angle
between those two is measured as well. A run leaves in its folder

    DATA.json   every option, the curves of every rule and seed, how each rule ended
    DATA.png    accuracy and angles over steps

Index legend: K seeds, R records, L layers, the outputs' included.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from rich.console import Console
from rich.table import Table

import fbackprop as fb
from experiments import command, learning_rules, report, tasks, training
from experiments.command import UsageError
from experiments.learning_rules import RULES, Draw, Feedback, LearningRule, Params, RuleName
from experiments.looks import LINES, LOOKS
from experiments.outcome import Quartiles, finite, quartiles
from experiments.progress import ProgressDisplay
from experiments.tasks import Task
from experiments.training import Parts, Schedule, Start

MOMENTUM = 0.9
ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Train one network by backpropagation and by other learning rules, and compare directions."""

    data: Literal["digits", "animals"] = "digits"
    """Whose images are learned."""
    rules: tuple[RuleName, ...] = get_args(RuleName)
    """Learning rules, in this order."""
    hidden: tuple[int, ...] | None = None
    """Units of the hidden layers; without it, 128 64 for digits and 256 128 for animals."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Of the hidden layers."""
    passes: float | None = None
    """Passes over the training part; without it, 40 for digits and 20 for animals."""
    batch_size: int = 64
    """Examples in a step."""
    learning_rate: float = 0.05
    """Of gradient descent with momentum 0.9, the same for all rules."""
    decay: float = 1e-4
    """What forward and feedback weights lose in each step under Kolen-Pollack, a fraction."""
    seeds: int = 3
    """From how many seeds to train with each rule."""
    seed: int = 0
    """The first of them, and that of the split of the data."""
    records: int = 30
    """About how many points a curve has."""
    data_file: Path | None = None
    """An .npz with the animals, in place of the one that comes with the experiments."""
    out: Path = Path("runs/credit")
    """Where the files go; those of an earlier run on the same data are replaced."""


HIDDEN_UNITS = {"digits": (128, 64), "animals": (256, 128)}
PASSES = {"digits": 40, "animals": 20}
EVALUATED = 2048  # examples of each part that are measured, at most; the test parts have fewer
TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)  # of accuracies in the figure


def validate(settings: Settings) -> None:
    """Check what the types of the options leave open.

    Raises:
        UsageError: a number is out of its range, or there is nothing to train.
    """
    for name in ("hidden", "passes", "batch_size", "learning_rate", "seeds", "records"):
        value = getattr(settings, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not 0 < number < float("inf"):
                raise UsageError(f"--{name.replace('_', '-')} must be greater than 0 and finite")
    if not 0 <= settings.decay < 1:
        raise UsageError("--decay must be a fraction per step, from 0 to below 1")
    command.check_seeds(settings.seed, settings.seeds)
    if not settings.rules or len(set(settings.rules)) < len(settings.rules):
        raise UsageError("--rules takes one or more learning rules, each of them once")
    if settings.hidden == ():
        raise UsageError("--hidden takes the units of one or more layers")
    tasks.check_data_file(settings.data, settings.data_file)


# What is trained ----------------------------------------------------------------------------------


def task_of(settings: Settings) -> Task:
    """The data with the network whose activations and outputs have names."""
    task = tasks.build(f"{settings.data}-mlp", seed=settings.seed, data_file=settings.data_file)  # type: ignore[arg-type]
    hidden = settings.hidden or HIDDEN_UNITS[settings.data]
    widths = task.train[0][0].size, *hidden, 10
    network = learning_rules.network(widths, ACTIVATIONS[settings.activation])
    return task._replace(init=network.init, apply=network.apply)


def schedule_of(settings: Settings, task: Task) -> Schedule:
    """Batches and records, the same for all rules."""
    examples = len(task.train[0])
    size = min(examples, settings.batch_size)
    passes = settings.passes or PASSES[settings.data]
    steps = max(1, round(passes * examples / size))
    return Schedule(size, training.stops(steps, settings.records))


class State(NamedTuple):
    """What a step changes."""

    params: Params
    feedback: Feedback
    momentum: Any


class Record(NamedTuple):
    """What is measured of one state; of all seeds and records, with leading axes (K, R).

    Attributes:
      train_loss: the mean over the examples measured.
      test_accuracy: a fraction.
      gradient: the angle of the rule's update to the gradient, in degrees, for each layer (L,);
        NaN where the update is zero.
      weights: the angle between the weights and what errors go back through in their place, in
        degrees, for each layer but the first, which sends no error back, (L − 1,); NaN where there
        is no such thing.
    """

    train_loss: Any
    test_accuracy: Any
    gradient: Any
    weights: Any


class Programs(NamedTuple):
    """The training with one rule as functions of one seed."""

    begin: Callable[[Start, Feedback], State]
    advance: Callable[[State, Start, Parts, Any, Any], State]
    measure: Callable[[State, Start, Parts], Record]


def programs(rule: LearningRule, task: Task, schedule: Schedule, settings: Settings) -> Programs:
    """The functions that train with a rule, to be mapped over seeds and compiled."""
    optimizer = optax.sgd(settings.learning_rate, MOMENTUM)

    def begin(start: Start, feedback: Feedback) -> State:
        return State(start.params, feedback, optimizer.init(start.params))

    def advance(state: State, start: Start, parts: Parts, since: Any, until: Any) -> State:
        batch = training.batches(start.order, parts.train, schedule)

        def step(i: jax.Array, state: State) -> State:
            rules = rule.rules(state.feedback, jax.random.fold_in(start.key, i + 1))
            _, found = fb.value_and_grad(task.mean_loss, rules=rules)(state.params, *batch(i))
            updates, momentum = optimizer.update(found, state.momentum)
            moved = rule.update(state.params, state.feedback, updates, settings.decay)
            return State(*moved, momentum)

        return lax.fori_loop(since, until, step, state)

    def measure(state: State, start: Start, parts: Parts) -> Record:
        params, feedback, _ = state
        fixed = tuple(part[: parts.seen] for part in parts.measured)
        rules = rule.rules(feedback, start.key)
        truth = fb.grad(task.mean_loss)(params, *fixed)
        found = fb.grad(task.mean_loss, rules=rules)(params, *fixed)
        curve = training.record(task, params, parts)
        gradient = kernel_angles(found, truth)
        behind = rule.backward and rule.backward(params, feedback)
        weights = kernel_angles(params, behind)[1:] if behind else gradient[1:] * jnp.nan
        return Record(curve.train_loss, curve.test_score, gradient, weights)

    return Programs(begin, advance, measure)


def angle(a: jax.Array, b: jax.Array) -> jax.Array:
    """Between two arrays as vectors, in degrees, from 0 to 180; NaN if either is zero.

    ``2 atan2(‖u − v‖, ‖u + v‖)`` of the unit vectors u and v, which unlike the arc cosine is
    accurate near 0 and 180 (Kahan 2006, "How futile are mindless assessments of roundoff in
    floating-point computation?", section 12).
    """
    u, v = a / jnp.linalg.norm(a), b / jnp.linalg.norm(b)
    return jnp.degrees(2 * jnp.arctan2(jnp.linalg.norm(u - v), jnp.linalg.norm(u + v)))


def kernel_angles(a: Params, b: Params) -> jax.Array:
    """The angle between two sets of weights in each layer, biases left out, (L,)."""
    pairs = zip(a, b, strict=True)
    return jnp.stack([angle(x["kernel"].ravel(), y["kernel"].ravel()) for x, y in pairs])


# How it went --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one rule: its records (K, R, …) after so many steps (R,), and what all of it took."""

    name: RuleName
    steps: tuple[int, ...]
    records: Record
    seconds: float

    def curve(self, quantity: str) -> Quartiles:
        """Over seeds, (R, …)."""
        values = getattr(self.records, quantity)
        if quantity == "train_loss":
            return quartiles(finite(values))
        return quartiles(values, worse="lower" if quantity == "test_accuracy" else "higher")

    @property
    def diverged(self) -> int:
        """From how many seeds the loss was lost at the end."""
        return int(np.sum(~np.isfinite(self.records.train_loss[:, -1])))

    @property
    def line(self) -> str:
        """What there is to say when training has ended."""
        lost = f"; {self.diverged} of {len(self.records.train_loss)} seeds diverged"
        said = f"{RULES[self.name].label}: {self.steps[-1]} steps in {self.seconds:.1f} s"
        return said + lost if self.diverged else said


def train(
    name: RuleName,
    settings: Settings,
    task: Task,
    parts: Parts,
    recorded: Callable[[], None] = lambda: None,
) -> Outcome:
    """Train with one rule from all seeds at once.

    Args:
        name: of the rule.
        settings: the others are not trained.
        task: what to train.
        parts: its data.
        recorded: called after each record.
    """
    began = time.perf_counter()
    schedule = schedule_of(settings, task)
    begin, advance, measure = programs(RULES[name], task, schedule, settings)
    starts = training.starts(task, schedule, seeds_of(settings))
    feedback = _drawn(RULES[name].draw, task.init, starts.key)
    state = jax.vmap(begin)(starts, feedback)
    advance = jax.jit(jax.vmap(advance, in_axes=(0, 0, None, None, None)), donate_argnums=0)
    measure = jax.jit(jax.vmap(measure, in_axes=(0, 0, None)))
    records = []
    since = 0
    for until in schedule.stops:
        state = advance(state, starts, parts, since, until)
        records.append(jax.device_get(measure(state, starts, parts)))
        since = until
        recorded()
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *records)
    return Outcome(name, schedule.stops, stacked, time.perf_counter() - began)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _drawn(draw: Draw, init: Callable[[jax.Array], Params], keys: jax.Array) -> Feedback:
    """The feedback for the key of each seed; compiled once for rules that draw it the same way."""
    return jax.vmap(lambda key: draw(init, jax.random.fold_in(key, 0)))(keys)


def seeds_of(settings: Settings) -> list[int]:
    """The seeds, one after another."""
    return list(range(settings.seed, settings.seed + settings.seeds))


def compare(settings: Settings, task: Task, console: Console) -> list[Outcome]:
    """Train with each rule in turn, writing what there is as each ends."""
    parts = training.parts_of(task, EVALUATED)
    outcomes: list[Outcome] = []
    write(settings, task, outcomes)
    with ProgressDisplay(console) as display:
        for name in settings.rules:
            display.begin(RULES[name].label)
            display.started(len(schedule_of(settings, task).stops))
            outcomes.append(train(name, settings, task, parts, display.recorded))
            write(settings, task, outcomes)
            display.finish(outcomes[-1].line)
    return outcomes


def write(settings: Settings, task: Task, outcomes: Sequence[Outcome]) -> None:
    """Write the numbers: every seed's curves, and medians over seeds at the end."""
    schedule = schedule_of(settings, task)
    sizes = [layer["kernel"].shape for layer in jax.eval_shape(task.init, jax.random.key(0))]
    content = {
        "settings": dataclasses.asdict(settings),
        "versions": {"jax": jax.__version__, "device": jax.devices()[0].device_kind},
        "layers": sizes,
        "batch_size": schedule.batch_size,
        "steps": schedule.stops,
        "seeds": seeds_of(settings),
        "rules": {outcome.name: _content(outcome) for outcome in outcomes},
    }
    report.write_json(settings.out / f"{settings.data}.json", content)


def _content(outcome: Outcome) -> dict[str, Any]:
    ends = {name: outcome.curve(name).median[-1].tolist() for name in Record._fields}
    curves = {name: values.tolist() for name, values in outcome.records._asdict().items()}
    return {"seconds": outcome.seconds, "diverged": outcome.diverged, "end": ends, "curves": curves}


def print_table(console: Console, outcomes: Sequence[Outcome]) -> None:
    """A line for each rule: accuracy at the end, angles at the start and at the end."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("rule", no_wrap=True)
    layers = outcomes[0].records.gradient.shape[-1]
    angles = [f"layer {layer}" for layer in range(1, layers + 1)]
    table.add_column("test accuracy, %", justify="right", no_wrap=True)
    for header in (*angles, "to feedback", "seconds"):
        table.add_column(header, justify="right", overflow="fold")
    for outcome in outcomes:
        gradient, weights = outcome.curve("gradient").median, outcome.curve("weights").median
        table.add_row(
            RULES[outcome.name].label,
            _percent(outcome.curve("test_accuracy")),
            *(_change(gradient[:, layer]) for layer in range(layers)),
            " ".join(f"{degrees:.0f}" for degrees in weights[-1] if not np.isnan(degrees)) or "–",
            f"{outcome.seconds:.1f}",
        )
    console.print(table)
    console.print(
        "Accuracy: median over seeds (quartiles). Layers: degrees between the rule's update and the"
        " gradient, at the start → at the end. To feedback: degrees at the end between the weights"
        " of the layers above the first and what errors go back through. Seconds: compilation,"
        " training and measurement of all seeds.",
        soft_wrap=True,
    )


def _percent(accuracy: Quartiles) -> str:
    lower, median, upper = (f"{100 * values[-1]:.1f}" for values in accuracy)
    return median if lower == upper else f"{median} ({lower}–{upper})"


def _change(degrees: np.ndarray) -> str:
    first, last = degrees[0], degrees[-1]
    return "–" if np.isnan(last) else f"{first:.0f}→{last:.0f}"


# The figure ---------------------------------------------------------------------------------------


def plot(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Draw medians over seeds as lines, quartiles as bands.

    Above, accuracy and for each hidden layer the angle of its update to the gradient; below, loss
    and for each hidden layer the angle between the weights that follow it and their feedback.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, NullLocator

    hidden = outcomes[0].records.weights.shape[-1]
    with plt.rc_context(LOOKS | LINES):
        figure, panels = plt.subplots(
            2, 1 + hidden, figsize=(2.7 * (1 + hidden), 5.2), sharex=True, layout="constrained"
        )
        _draw(panels[0, 0], outcomes, "test_accuracy")
        # On a linear axis the rules would differ least where it matters.
        panels[0, 0].set_yscale("logit", nonpositive="clip")
        panels[0, 0].set(title="test accuracy", ylim=_reach(outcomes))
        panels[0, 0].yaxis.set_major_locator(FixedLocator(TICKS))
        panels[0, 0].yaxis.set_major_formatter("{x:g}")
        panels[0, 0].yaxis.set_minor_locator(NullLocator())
        _draw(panels[1, 0], outcomes, "train_loss")
        panels[1, 0].set(title="training loss", yscale="log", xlabel="steps")
        for layer in range(hidden):
            above, below = panels[:, layer + 1]
            _draw(above, outcomes, "gradient", layer)
            _draw(below, outcomes, "weights", layer)
            above.set_title(f"layer {layer + 1}: update to gradient, °")
            below.set_title(f"layer {layer + 2}: weights to feedback, °")
            below.set_xlabel("steps")
            for panel in (above, below):
                panel.axhline(90, color="black", linewidth=0.8, linestyle="--")
                panel.set_ylim(bottom=-2)
                panel.set_yticks(range(0, 121, 30))
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
        figure.savefig(path, dpi=200)
        plt.close(figure)


def _reach(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    """The ends of the axis of accuracy, which has no place for 0 and 1."""
    medians = np.concatenate([outcome.curve("test_accuracy").median for outcome in outcomes])
    return max(0.01, float(medians.min())), min(0.998, 1 - 0.7 * (1 - float(medians.max())))


def _draw(panel: Any, outcomes: Sequence[Outcome], quantity: str, layer: int | None = None) -> None:
    for outcome in outcomes:
        rule = RULES[outcome.name]
        curves = outcome.curve(quantity)
        of_layer = curves if layer is None else (values[:, layer] for values in curves)
        lower, median, upper = of_layer
        panel.plot(
            outcome.steps, median, color=rule.colour, linestyle=rule.dashes, label=rule.label
        )
        panel.fill_between(outcome.steps, lower, upper, color=rule.colour, alpha=0.15, linewidth=0)
    panel.set_xscale("symlog", linthresh=1)  # logarithmic, with a place for the start
    panel.set_xlim(left=0)


# The script ---------------------------------------------------------------------------------------


def script(settings: Settings) -> int:
    """Train, print, write; the status is 0 even if a rule learns nothing."""
    validate(settings)
    console = command.terminal()
    task = task_of(settings)
    files = [f"{settings.data}.{ending}" for ending in ("json", "png")]
    command.prepare_folder(settings.out, files)
    try:
        outcomes = compare(settings, task, console)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the rules that ended are in {settings.out}") from None
    print_table(console, outcomes)
    plot(settings.out / f"{settings.data}.png", outcomes)
    console.print(f"written: {settings.out}/{', '.join(files)}", soft_wrap=True)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    return command.run(Settings, script, arguments)


if __name__ == "__main__":
    command.leave(main())
