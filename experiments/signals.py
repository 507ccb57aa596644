"""How error signals vanish or explode over depth, for activations and initialisations.

A fully connected network of L layers of one width, at its initialisation, and the error signals
δ_l = ∂E/∂z_l of its net inputs, read from one backward sweep for each example of a batch of real
images. The cotangents of its linear outputs are drawn from N(0, 1), so nothing about a loss
interferes. Beside what is measured stands what mean-field theory says of infinite width. A run
leaves in its folder

    signals.json    every option, and each combination's slopes, sizes and verdict
    curves.csv      sizes and quantiles of the signals of each layer
    signals.png     the same as a grid of panels, with the theory

Slopes are in decades per layer in the direction of the sweep: negative ones vanish. They are fitted
to log₁₀ of the root mean square over examples and units, in the layers where that lies within what
float32 can hold.

Index legend: K seeds, B examples, L layers, n units, Q quantiles.
"""

import csv
import dataclasses
import enum
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.nn import initializers
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fbackprop as fb
from experiments import command, datasets, report
from experiments.command import UsageError
from experiments.looks import LOOKS
from experiments.mean_field import Activation, MeanField, mean_field

ActivationName = Literal["linear", "relu", "selu", "gelu", "tanh", "erf", "sigmoid"]
InitialisationName = Literal["glorot", "lecun", "he", "orthogonal"]

ACTIVATIONS: dict[ActivationName, Activation] = {
    "linear": lambda z: z,
    "relu": jax.nn.relu,
    "selu": jax.nn.selu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "tanh": jnp.tanh,
    "erf": jax.lax.erf,
    "sigmoid": jax.nn.sigmoid,
}

FILES = "signals.json", "curves.csv", "signals.png"
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

# Root mean squares that a fit takes: within float32's range by a margin for the smaller and larger
# entries that they are made of, of which some would else be zero or infinite.
SMALLEST, LARGEST = 1e-33, 1e34


class Initialisation(NamedTuple):
    """How weights are drawn.

    ``draw`` takes a key and a shape (fan_in, fan_out); ``variance`` is that of its entries.
    """

    label: str
    draw: Callable[[jax.Array, tuple[int, int]], jax.Array]
    variance: Callable[[int, int], float]


INITIALISATIONS: dict[InitialisationName, Initialisation] = {
    "glorot": Initialisation("Glorot", initializers.glorot_uniform(), lambda n, m: 2 / (n + m)),
    "lecun": Initialisation("LeCun", initializers.lecun_normal(), lambda n, m: 1 / n),
    "he": Initialisation("He", initializers.he_normal(), lambda n, m: 2 / n),
    "orthogonal": Initialisation(
        "orthogonal", initializers.orthogonal(), lambda n, m: 1 / max(n, m)
    ),
}


def normal(scale: float) -> Initialisation:
    """Weights from N(0, scale²/fan_in): σ_w itself."""
    draw = initializers.variance_scaling(scale**2, "fan_in", "normal")
    return Initialisation(f"σ_w = {scale:g}", draw, lambda n, m: scale**2 / n)


class Network(NamedTuple):
    """What is drawn from one seed.

    Attributes:
        first: the weights from the N inputs to the first layer, (N, n).
        rest: those from each layer to the next, the last ones to the outputs, (L, n, n).
        biases: of the layers, then of the outputs, (L + 1, n).
    """

    first: jax.Array
    rest: jax.Array
    biases: jax.Array


class Verdict(enum.Enum):
    """What becomes of the signals on their way from the last layer to the first."""

    VANISHING = "vanishing"
    STABLE = "stable"
    EXPLODING = "exploding"
    ZERO = "all zero"
    OUT_OF_RANGE = "out of float32's range"


@dataclasses.dataclass(frozen=True)
class Distribution:
    """The error signals of one combination.

    Attributes:
        activation: its name.
        initialisation: its label.
        rms: over examples and units, for each seed and layer, in float64, (K, L).
        quantiles: of |δ| over all seeds, examples and units where δ is finite and not 0, (Q, L);
            NaN where there are none.
        zeros: the fraction of δ that is exactly 0, (L,).
        theory: what mean-field theory says.
    """

    activation: ActivationName
    initialisation: str
    rms: np.ndarray
    quantiles: np.ndarray
    zeros: np.ndarray
    theory: MeanField

    @property
    def fitted(self) -> np.ndarray:
        """The layers that slopes are fitted to: where float32 holds the signals of each seed."""
        return np.all((self.rms > SMALLEST) & (self.rms < LARGEST), axis=0)

    @property
    def slopes(self) -> np.ndarray:
        """Decades per layer in the direction of the sweep, for each seed, (K,)."""
        shown = np.where(self.fitted, self.rms, 1.0)
        return np.array([slope(decades, self.fitted) for decades in np.log10(shown)])

    @property
    def slope(self) -> float:
        """The median of `slopes`; NaN if they cannot be fitted."""
        return float(np.median(self.slopes))

    @property
    def theory_slope(self) -> float:
        """That of the theory, fitted to the same layers."""
        return slope(self.theory.decades, self.fitted)

    @property
    def median_rms(self) -> np.ndarray:
        """The median of ``rms`` over seeds, (L,)."""
        return np.median(self.rms, axis=0)

    def verdict(self, decades: float) -> Verdict:
        """Stable if all layers together change the signals by no more than so many decades."""
        if not np.any(self.rms):  # dead units, or net inputs too small for float32
            return Verdict.ZERO
        change = self.slope * self.rms.shape[1]
        if np.isnan(change):
            return Verdict.OUT_OF_RANGE
        if abs(change) <= decades:
            return Verdict.STABLE
        return Verdict.EXPLODING if change > 0 else Verdict.VANISHING


@dataclasses.dataclass(frozen=True)
class Settings:
    """Plot the distribution of error signals over depth, beside mean-field theory."""

    activations: tuple[ActivationName, ...] = ("linear", "relu", "selu", "gelu", "tanh", "sigmoid")
    """Activation functions, a row of panels each."""
    initialisations: tuple[InitialisationName, ...] = ("glorot", "lecun", "he", "orthogonal")
    """Initialisations of the weights, a column of panels each."""
    scales: tuple[float, ...] = (0.5, 3.0)
    """Further columns: weights from N(0, scale²/fan_in)."""
    bias: float = 0.0
    """Standard deviation of the biases."""
    depth: int = 50
    """Layers with an activation; linear outputs come on top."""
    width: int = 300
    """Units of each layer, and outputs."""
    data: Literal["digits", "animals"] = "digits"
    """Whose images are the inputs, each scaled to a mean square of 1."""
    examples: int = 32
    """How many of them."""
    seeds: int = 3
    """From how many seeds to draw networks, images and cotangents of the outputs."""
    seed: int = 0
    """The first of them."""
    decades: float = 1.0
    """Signals that all layers together change by no more than this are called stable."""
    out: Path = Path("runs/signals")
    """Where the files go; those of an earlier run are replaced."""


def validate(settings: Settings) -> None:
    """Check what the types of the options leave open.

    Raises:
        UsageError: a number is out of its range, or there is nothing to measure.
    """
    command.check_seeds(settings.seed, settings.seeds)
    for name, least in {"depth": 2, "width": 1, "examples": 1, "seeds": 1}.items():
        if getattr(settings, name) < least:
            raise UsageError(f"--{name} must be at least {least}")
    if not all(1e-3 <= scale <= 100 for scale in settings.scales):
        raise UsageError("--scales must be from 0.001 to 100")
    for name in ("bias", "decades"):
        if not 0 <= getattr(settings, name) < np.inf:
            raise UsageError(f"--{name} must be at least 0 and finite")
    if not settings.activations or not (settings.initialisations or settings.scales):
        raise UsageError("name one or more --activations, and --initialisations or --scales")
    for name in ("activations", "initialisations", "scales"):
        values = getattr(settings, name)
        if len(set(values)) < len(values):
            raise UsageError(f"--{name} takes each value once")


def images_of(settings: Settings) -> np.ndarray:
    """The images that examples are drawn from, flat, each with a mean square of 1, (images, N).

    Raises:
        UsageError: there are fewer than the examples asked for.
    """
    images = {"digits": datasets.digits, "animals": datasets.animals}[settings.data]().train_inputs
    if settings.examples > len(images):
        raise UsageError(f"--examples must be at most {len(images)}, the images of {settings.data}")
    flat = images.reshape(len(images), -1)
    return flat / np.sqrt(np.mean(flat**2, axis=1, keepdims=True))


def chosen(settings: Settings) -> list[Initialisation]:
    """The initialisations in the order of the panels."""
    named = [INITIALISATIONS[name] for name in settings.initialisations]
    return named + [normal(scale) for scale in settings.scales]


def draw(key: jax.Array, initialisation: Initialisation, settings: Settings, size: int) -> Network:
    """A network for inputs of ``size`` entries."""
    width, depth = settings.width, settings.depth
    for_first, for_rest, for_biases = jax.random.split(key, 3)
    return Network(
        initialisation.draw(for_first, (size, width)),
        jax.vmap(lambda one: initialisation.draw(one, (width, width)))(
            jax.random.split(for_rest, depth)
        ),
        settings.bias * jax.random.normal(for_biases, (depth + 1, width)),
    )


def outputs(activation: Activation, network: Network, inputs: jax.Array) -> jax.Array:
    """The linear outputs (n,) for one example (N,); the net inputs on the way are named."""

    def layer(net: jax.Array, following: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        weights, bias = following
        return activation(checkpoint_name(net, "net")) @ weights + bias, None

    first = inputs @ network.first + network.biases[0]
    return jax.lax.scan(layer, first, (network.rest, network.biases[1:]))[0]


@functools.partial(jax.jit, static_argnums=0)
def error_signals(
    activation: Activation, network: Network, inputs: jax.Array, cotangents: jax.Array
) -> jax.Array:
    """δ of all net inputs, (B, L, n), for examples (B, N) and cotangents of the outputs (B, n)."""

    def of_one(x: jax.Array, cotangent: jax.Array) -> jax.Array:
        model = functools.partial(outputs, activation, network)
        return fb.error_signals(model, x, cotangent=cotangent)["net"]

    return jax.vmap(of_one)(inputs, cotangents)


def measure(settings: Settings, images: np.ndarray) -> Iterator[Distribution]:
    """The signals of every combination, one initialisation after the other.

    A seed's images and cotangents are the same for all combinations, its network is the same for
    all activations.
    """
    samples = [_sample(settings, images, seed) for seed in seeds_of(settings)]
    for initialisation in chosen(settings):
        networks = [
            draw(jax.random.key(seed), initialisation, settings, images.shape[1])
            for seed in seeds_of(settings)
        ]
        for name in settings.activations:
            activation = ACTIVATIONS[name]
            pairs = zip(networks, samples, strict=True)
            found = [error_signals(activation, network, *sample) for network, sample in pairs]
            theory = theory_of(activation, initialisation, settings, images.shape[1])
            signals = np.stack([np.asarray(signal) for signal in found])
            yield distribution(name, initialisation.label, signals, theory)


def theory_of(
    activation: Activation, initialisation: Initialisation, settings: Settings, size: int
) -> MeanField:
    """What mean-field theory says for inputs of ``size`` entries with a mean square of 1.

    Entries of orthogonal matrices are taken as independent ones of the same variance.
    """
    width, bias = settings.width, settings.bias**2
    first = size * initialisation.variance(size, width) + bias
    gain = width * initialisation.variance(width, width)
    return mean_field(activation, first, gain, bias, settings.depth)


def distribution(
    activation: ActivationName, initialisation: str, signals: np.ndarray, theory: MeanField
) -> Distribution:
    """What there is to say of signals of shape (K, B, L, n)."""
    squares = np.square(signals, dtype=np.float64)  # those of float32 may lie out of its range
    rms = np.sqrt(np.mean(squares, axis=(1, 3)))
    sizes = np.abs(np.moveaxis(signals, 2, 0)).reshape(signals.shape[2], -1)
    quantiles = np.stack([_quantiles(layer) for layer in sizes], axis=1)
    return Distribution(
        activation, initialisation, rms, quantiles, np.mean(sizes == 0, axis=1), theory
    )


def slope(decades: np.ndarray, among: np.ndarray) -> float:
    """The least-squares slope of ``decades`` (L,) toward the first layer, NaN without two layers.

    Args:
        decades: log₁₀ of a size in each layer.
        among: which layers count, (L,) of bool.
    """
    layers = np.flatnonzero(among)
    if len(layers) < 2:
        return float("nan")
    centred = layers - layers.mean()
    return float(-(centred @ decades[layers]) / (centred @ centred))


def seeds_of(settings: Settings) -> range:
    """The seeds, one after another."""
    return range(settings.seed, settings.seed + settings.seeds)


def print_table(console: Console, found: Sequence[Distribution], decades: float) -> None:
    """A line for each combination, those of an activation together."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for header in ("activation", "initialisation"):
        table.add_column(header)
    for header in ("slope", "mean field", "first rms", "last rms", "zeros"):
        table.add_column(header, justify="right", overflow="fold")
    table.add_column("signals are")
    for before, one in zip([None, *found], found, strict=False):
        new = before is None or before.activation != one.activation
        if new and before:
            table.add_row()
        table.add_row(
            one.activation if new else "",
            one.initialisation,
            *(_signed(value) for value in (one.slope, one.theory_slope)),
            *(f"{one.median_rms[layer]:.2e}" for layer in (0, -1)),
            f"{one.zeros.mean():.1%}",
            one.verdict(decades).value,
        )
    console.print(table)
    depth = found[0].rms.shape[1]
    console.print(
        f"\nSlopes in decades per layer toward the first; stable are signals that {depth} layers"
        f" change by no more than a factor of {10**decades:g}.",
        soft_wrap=True,
    )


def write(folder: Path, settings: Settings, found: Sequence[Distribution]) -> None:
    """Write the numbers."""
    content = {
        "settings": dataclasses.asdict(settings),
        "versions": {"jax": jax.__version__, "device": jax.devices()[0].device_kind},
        "combinations": [_summary(one, settings.decades) for one in found],
    }
    report.write_json(folder / "signals.json", content)
    header = ("activation", "initialisation", "layer", "rms", "mean_field_rms", "zeros")
    with (folder / "curves.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow((*header, *(f"quantile_{q:g}" for q in QUANTILES)))
        for one in found:
            sizes = np.stack([one.median_rms, one.theory.rms, one.zeros, *one.quantiles], 1)
            for layer, values in enumerate(sizes.tolist(), start=1):
                writer.writerow((one.activation, one.initialisation, layer, *values))


def plot(path: Path, found: Sequence[Distribution]) -> None:
    """Draw a panel for each combination: activations downward, initialisations across."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = list(dict.fromkeys(one.activation for one in found))
    columns = list(dict.fromkeys(one.initialisation for one in found))
    size = 1.0 + 1.75 * len(columns), 1.1 + 1.35 * len(rows)
    with plt.rc_context(LOOKS):
        figure, panels = plt.subplots(
            *(len(rows), len(columns)), figsize=(max(size[0], 4.5), size[1]),
            squeeze=False, sharex=True, layout="constrained",
        )  # fmt: skip
        for one in found:
            _draw(panels[rows.index(one.activation), columns.index(one.initialisation)], one)
        for panel, label in zip(panels[0], columns, strict=True):
            panel.set_title(label.replace("σ_w", r"$\sigma_w$"), fontsize=9)
        for panel, label in zip(panels[:, 0], rows, strict=True):
            panel.set_ylabel(f"{label}\n|δ|")
        for panel in panels[-1]:
            panel.set_xlabel("layer")
        legends = (panel.get_legend_handles_labels() for panel in panels.flat)
        handles, labels = max(legends, key=lambda legend: len(legend[1]))
        ncols = 5 if len(columns) > 2 else 2
        figure.legend(handles, labels, loc="outside upper center", ncols=ncols, frameon=False)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def script(settings: Settings) -> int:
    """Measure, print, write; the status is 0 whatever becomes of the signals."""
    validate(settings)
    images = images_of(settings)
    command.prepare_folder(settings.out, FILES)
    console = command.terminal()
    total = len(settings.activations) * len(chosen(settings))
    bar = track(
        measure(settings, images),
        "error signals",
        total=total,
        console=console,
        disable=not console.is_terminal,
    )
    with jax.enable_x64(False):  # what is measured is what float32 makes of them
        found = sorted(bar, key=lambda one: settings.activations.index(one.activation))
    print_table(console, found, settings.decades)
    write(settings.out, settings, found)
    plot(settings.out / "signals.png", found)
    console.print(f"written: {settings.out}/{', '.join(FILES)}", soft_wrap=True)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    return command.run(Settings, script, arguments)


def _sample(settings: Settings, images: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A seed's images (B, N) and cotangents of the outputs (B, n)."""
    random = np.random.default_rng(seed)
    inputs = images[random.choice(len(images), settings.examples, replace=False)]
    cotangents = random.standard_normal((settings.examples, settings.width), np.float32)
    return inputs, cotangents


def _signed(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:+z.4f}"


def _quantiles(sizes: np.ndarray) -> np.ndarray:
    known = sizes[(sizes > 0) & np.isfinite(sizes)]
    return np.quantile(known, QUANTILES) if known.size else np.full(len(QUANTILES), np.nan)


def _summary(one: Distribution, decades: float) -> dict[str, Any]:
    return {
        "activation": one.activation,
        "initialisation": one.initialisation,
        "slope": one.slope,
        "slopes_of_seeds": one.slopes.tolist(),
        "mean_field_slope": one.theory_slope,
        "layers_fitted": int(one.fitted.sum()),
        "first_rms": float(one.median_rms[0]),
        "last_rms": float(one.median_rms[-1]),
        "zeros": float(one.zeros.mean()),
        "verdict": one.verdict(decades).value,
    }


def _draw(panel: Any, one: Distribution) -> None:
    """Quantiles of |δ|, its root mean square and that of the theory, over the layers."""
    layers = np.arange(1, one.rms.shape[1] + 1)
    curves = np.stack([one.median_rms, one.theory.rms, *one.quantiles])
    # What float32 can hold and a little more, so that a theory far from it does not set the axis.
    drawable = (curves > 1e-50) & (curves < 1e50)
    if not drawable.any():
        panel.text(0.5, 0.5, "out of range", transform=panel.transAxes, ha="center")
        return
    rms, theory, lowest, lower, median, upper, highest = np.where(drawable, curves, np.nan)
    panel.fill_between(layers, lowest, highest, color="#0072B2", alpha=0.18, lw=0, label="5–95 %")
    panel.fill_between(layers, lower, upper, color="#0072B2", alpha=0.35, lw=0, label="25–75 %")
    panel.plot(layers, median, color="#0072B2", lw=1, label="median")
    panel.plot(layers, rms, color="#D55E00", lw=1.5, label="root mean square")
    panel.plot(layers, theory, "k--", lw=1, label="mean field")
    panel.set_yscale("log")
    height, edge = (0.96, "top") if one.slope > 0 else (0.04, "bottom")  # away from the curves
    label = _signed(one.slope).replace("-", "−")
    panel.text(0.97, height, label, transform=panel.transAxes, ha="right", va=edge, fontsize=7)


if __name__ == "__main__":
    command.leave(main())
