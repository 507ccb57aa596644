"""Which pixels named an animal, by every attribution rule, side by side, and whether to trust them.

A small network is trained on the images of animals; then one unchanged function, from one image to
the logit of one class, is explained by ordinary gradients, by averages of gradients, and by sweeps
with other backward rules. A run leaves in its folder

    attribution.png     animals that were recognised, each with a map for every method
    curves.png          the logit as pixels are removed, or appear, in the order of each map
    attribution.json    every option, the accuracy, and the numbers behind the table and the curves

The table has three kinds of numbers, all of them over test images and for the class predicted:

- how far a map that should sum to the logit is from that (median relative difference);
- the areas between the curves of pixel flipping and those of random orders, in logits: how much
  faster the logit falls as the map's first pixels are removed, and rises as they appear. Large is
  good. The order of the image's own brightness shows what is won without knowing the network;
- rank correlations with the maps of networks with other parameters, the output layer's or all of
  them drawn anew, over the pixels of the animal. A map that explains the network is changed.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fbackprop as fb
from experiments import attribution_methods, command, datasets, faithfulness, report
from experiments.attribution_methods import CONTROLS, Kind, Method
from experiments.command import ExperimentError, UsageError
from experiments.datasets import ANIMALS, Dataset
from experiments.looks import LOOKS
from experiments.tasks import Params
from fbackprop import losses, networks
from fbackprop.networks import Network

NetworkName = Literal["mlp", "convnet", "resnet"]
Apply = Callable[[Params, jax.Array], jax.Array]

SHAPE, CLASSES = (28, 28, 1), len(ANIMALS)
FILES = "attribution.png", "curves.png", "attribution.json"
COLOURS: dict[Kind, str] = {  # of Okabe and Ito's, which colour-blind readers tell apart
    "sensitivity": "#0072B2",
    "contribution": "#E69F00",
    "relevance": "#009E73",
    "control": "black",
}
DASHES = "-", "--", ":", "-."
POINTS = 28  # of a curve of pixel flipping, besides its start
ORDERS = 4  # random ones that a curve is compared with


class Model(NamedTuple):
    """A network with rectifiers, how to train it, and the key of its output layer."""

    network: Network
    passes: float
    batch_size: int
    learning_rate: float
    head: Any


MODELS: dict[NetworkName, Callable[[], Model]] = {
    "mlp": lambda: Model(networks.mlp((784, 128, 64, CLASSES), jax.nn.relu), 20, 128, 2e-3, -1),
    "convnet": lambda: Model(
        networks.convnet(SHAPE, CLASSES, channels=(8, 16, 32)), 12, 128, 3e-3, "head"
    ),
    # It averages over the image and learns more slowly: its steps are more, and smaller batches.
    "resnet": lambda: Model(
        networks.resnet(SHAPE, CLASSES, channels=(8, 16, 32)), 8, 32, 1e-2, "head"
    ),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Show and measure which pixels named an animal, by every attribution rule."""

    network: NetworkName = "convnet"
    """What to explain; all have rectifiers, the resnet has skip connections and normalisation."""
    passes: float | None = None
    """Passes over the training part; without it, what suits the network."""
    batch_size: int | None = None
    """Examples in a step of Adam; without it, what suits the network."""
    animals: int = 6
    """Rows of the figure: one image for each of so many kinds of animals, those recognised."""
    pick: int = 0
    """Seed of which animals, and which image of each."""
    examples: int = 200
    """Test images that the numbers are taken over."""
    replacement: Literal["black", "mean"] = "black"
    """What removed pixels become: background, or those of the mean training image."""
    noise: float = 0.2
    """Of SmoothGrad: the standard deviation; white is 1."""
    samples: int = 32
    """Of SmoothGrad: noisy images."""
    steps: int = 64
    """Of integrated gradients: gradients on the way from black."""
    epsilon: float = 0.1
    """Of LRP-ε, in units of the net inputs."""
    gamma: float = 0.25
    """Of LRP-γ."""
    alpha: float = 2.0
    """Of LRP-αβ; β is α − 1."""
    data_file: Path | None = None
    """An .npz with the animals, in place of the one that comes with the experiments."""
    seed: int = 0
    """Of the split, the parameters, the order of training and the test images."""
    out: Path = Path("runs/attribution")
    """Where the files go; those of an earlier run are replaced."""


def validate(settings: Settings) -> None:
    """Check what the types of the options leave open.

    Raises:
        UsageError: a number is out of its range.
    """
    counts = {"batch_size": 1, "animals": 1, "examples": 1, "samples": 1, "steps": 1}
    for name in ("seed", "pick"):
        command.check_seeds(getattr(settings, name), 1, f"--{name}")
    for name, least in {**counts, "alpha": 1}.items():
        value = getattr(settings, name)
        if value is not None and not least <= value < np.inf:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least} and finite")
    for name in ("noise", "epsilon", "gamma"):
        if not 0 <= getattr(settings, name) < np.inf:
            raise UsageError(f"--{name} must be at least 0 and finite")
    if settings.passes is not None and not 0 < settings.passes < np.inf:
        raise UsageError("--passes must be greater than 0 and finite")
    if settings.animals > CLASSES:
        raise UsageError(f"--animals must be at most {CLASSES}, the kinds there are")


# --- the network ----------------------------------------------------------------------------------


def train(settings: Settings, model: Model, data: Dataset, console: Console) -> Params:
    """Parameters after Adam with a learning rate that falls to zero as a cosine."""
    examples = len(data.train_inputs)
    size = min(settings.batch_size or model.batch_size, examples)
    steps = max(1, round((settings.passes or model.passes) * examples / size))
    optimizer = optax.adam(optax.cosine_decay_schedule(model.learning_rate, steps))
    inputs, targets = jnp.asarray(data.train_inputs), jnp.asarray(data.train_targets)

    def loss(params: Params, x: jax.Array, labels: jax.Array) -> jax.Array:
        logits = jax.vmap(model.network.apply, in_axes=(None, 0))(params, x)
        return jnp.mean(jax.vmap(losses.softmax_cross_entropy)(logits, labels))

    @jax.jit
    def step(params: Params, state: Any, batch: np.ndarray) -> tuple[Params, Any]:
        gradient = fb.grad(loss)(params, inputs[batch], targets[batch])
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    params = model.network.init(jax.random.key(settings.seed))
    state = optimizer.init(params)
    batches = _batches(examples, size, steps, settings.seed)
    for batch in _bar(batches, f"training the {settings.network}", steps, console):
        params, state = step(params, state, batch)
    return params


def _batches(examples: int, size: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Which examples each step sees: one shuffle of them after another."""
    random = np.random.default_rng(seed)
    shuffles = -(-steps * size // examples)
    order = np.concatenate([random.permutation(examples) for _ in range(shuffles)])
    return (order[i * size : (i + 1) * size] for i in range(steps))


@functools.partial(jax.jit, static_argnums=0)
def logits_of(apply: Apply, params: Params, images: jax.Array) -> jax.Array:
    """Of images (N, H, W, C), some at a time, (N, classes)."""
    return jax.lax.map(lambda x: apply(params, x), images, batch_size=256)


def redrawn(model: Model, params: Params, seed: int) -> dict[str, Params]:
    """Parameters of which some are drawn anew: those of the output layer, or all."""
    fresh = model.network.init(jax.random.fold_in(jax.random.key(seed), 1))
    # A copy of the list or the dict, whose output layer alone is another.
    head = params.copy()
    head[model.head] = fresh[model.head]
    return {"output_layer": head, "all_layers": fresh}


# --- maps and their measures ----------------------------------------------------------------------


class Examples(NamedTuple):
    """What is explained: images (N, H, W, C), for each the class whose logit it is, and a key."""

    images: jax.Array
    classes: jax.Array
    keys: jax.Array


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured of a method over N images.

    Attributes:
      label: of the method.
      defects: relative differences of the maps' sums from what they should be, (N,); None where
        they should be nothing.
      deletion, insertion: curves, (N, K + 1), in logits.
      areas: between those and the random ones, (2, N), in logits, positive for better than random.
      correlations: rank correlations with the maps of other parameters, each (N,).
    """

    label: str
    defects: np.ndarray | None
    deletion: np.ndarray
    insertion: np.ndarray
    areas: np.ndarray
    correlations: dict[str, np.ndarray]


@functools.partial(jax.jit, static_argnums=(0, 1))
def maps(apply: Apply, method: Method, params: Params, examples: Examples) -> jax.Array:
    """A map for each example, (N, H, W, C)."""

    def one(x: jax.Array, label: jax.Array, key: jax.Array) -> jax.Array:
        return method.explain(lambda x: apply(params, x)[label], x, key)

    return jax.vmap(one)(*examples)


@functools.partial(jax.jit, static_argnums=(0, 1))
def totals(apply: Apply, sums_to: Callable, params: Params, examples: Examples) -> jax.Array:
    """What the maps of a method should sum to, (N,)."""

    def one(x: jax.Array, label: jax.Array) -> jax.Array:
        return sums_to(lambda x: apply(params, x)[label], x)

    return jax.vmap(one)(examples.images, examples.classes)


@functools.partial(jax.jit, static_argnums=0)
def curves(
    apply: Apply, params: Params, examples: Examples, relevance: jax.Array, replacement: jax.Array
) -> faithfulness.Curves:
    """Of pixel flipping by maps of relevance, (N, K + 1) each."""

    def one(x: jax.Array, label: jax.Array, key: jax.Array, pixels: jax.Array):
        order = faithfulness.falling(pixels, key)
        return faithfulness.flip(
            lambda x: apply(params, x)[label], x, replacement, order, _counts()
        )

    return jax.vmap(one)(*examples, relevance)


def measure(
    settings: Settings, model: Model, params: Params, examples: Examples, replacement: jax.Array
) -> Iterator[Result]:
    """The results of all methods, those of the controls at the end."""
    apply = model.network.apply
    others = redrawn(model, params, settings.seed)
    flipped = functools.partial(curves, apply, params, examples, replacement=replacement)
    at_random = random_curves(flipped, examples)
    for method in [*methods_of(settings).values(), *CONTROLS.values()]:
        found = maps(apply, method, params, examples)
        mine = jax.tree.map(np.asarray, flipped(relevance=method.ranked_by(found)))
        gains = at_random.deletion - mine.deletion, mine.insertion - at_random.insertion
        defects = None
        if method.sums_to is not None:
            expected = np.asarray(totals(apply, method.sums_to, params, examples))
            defects = faithfulness.defect(np.asarray(found), expected)
        correlations = {
            name: faithfulness.rank_correlations(
                np.asarray(found),
                np.asarray(maps(apply, method, other, examples)),
                np.asarray(examples.images) > 0,
            )
            for name, other in others.items()
        }
        areas = np.stack([faithfulness.area(gain, _counts()) for gain in gains])
        yield Result(method.label, defects, mine.deletion, mine.insertion, areas, correlations)


def random_curves(
    flipped: Callable[..., faithfulness.Curves], examples: Examples
) -> faithfulness.Curves:
    """The mean curves over random orders, other ones than those of the control."""

    def once(order: int) -> faithfulness.Curves:
        keys = jax.vmap(lambda key: jax.random.fold_in(key, order))(examples.keys)
        draw = functools.partial(jax.random.uniform, shape=examples.images.shape[1:])
        return flipped(relevance=jax.vmap(draw)(keys))

    drawn = [once(order) for order in range(1, 1 + ORDERS)]
    return jax.tree.map(lambda *each: np.mean(np.stack(each), axis=0), *drawn)


def methods_of(settings: Settings) -> dict[str, Method]:
    """The methods, with the options given."""
    return attribution_methods.methods(
        noise=settings.noise,
        samples=settings.samples,
        steps=settings.steps,
        epsilon=settings.epsilon,
        gamma=settings.gamma,
        alpha=settings.alpha,
    )


def _counts() -> np.ndarray:
    """How many pixels are flipped at each point of a curve."""
    return np.linspace(0, np.prod(SHAPE), POINTS + 1).round().astype(int)


# --- which images ---------------------------------------------------------------------------------


def some_of(data: Dataset, predicted: np.ndarray, count: int, seed: int) -> Examples:
    """At most ``count`` test images, drawn at random; the class explained is that predicted."""
    order = np.random.default_rng(seed).permutation(len(data.test_inputs))
    return _examples(data, predicted, order[:count], seed)


def recognised(data: Dataset, predicted: np.ndarray, count: int, seed: int) -> Examples:
    """One test image of each of ``count`` classes, all recognised, in the order of the classes.

    Raises:
        ExperimentError: there is none.
    """
    random = np.random.default_rng(seed)
    right = predicted == data.test_targets
    # Images are drawn for all classes, so that more rows show the same images and others.
    drawn = {
        label: random.choice(np.flatnonzero(right & (data.test_targets == label)))
        for label in np.unique(data.test_targets[right])
    }
    if not drawn:
        raise ExperimentError("the network recognises no test image; train it for more --passes")
    labels = np.sort(random.permutation(list(drawn))[:count])
    return _examples(data, predicted, np.array([drawn[label] for label in labels]), seed)


def _examples(data: Dataset, predicted: np.ndarray, chosen: np.ndarray, seed: int) -> Examples:
    keys = jax.random.split(jax.random.key(seed), len(chosen))
    return Examples(jnp.asarray(data.test_inputs[chosen]), jnp.asarray(predicted[chosen]), keys)


# --- what a run shows and leaves ------------------------------------------------------------------


def print_table(console: Console, results: Sequence[Result]) -> None:
    """A line for each method."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("method")
    for header in ("sum off by", "deletion", "insertion", "new output layer", "new network"):
        table.add_column(header, justify="right", overflow="fold")
    for one in results:
        table.add_row(
            one.label,
            "–" if one.defects is None else f"{np.median(one.defects):.2g}",
            *(_with_error(area) for area in one.areas),
            *(f"{np.nanmean(each):+.2f}" for each in one.correlations.values()),
        )
    console.print(table)
    console.print(
        "\nSums: median relative difference from the logit. Deletion, insertion: area between the"
        " curve of pixel flipping and that of random orders, in logits (± standard error), more is"
        " better. New layers: rank correlation with the map of a network with that drawn anew.",
        soft_wrap=True,
    )


def summary(one: Result) -> dict[str, Any]:
    """The numbers of a method."""
    defects = one.defects
    return {
        "method": one.label,
        "sum_off_by": None if defects is None else _quartiles(defects),
        **{
            f"{name}_area": {"mean": float(area.mean()), "standard_error": _standard_error(area)}
            for name, area in zip(("deletion", "insertion"), one.areas, strict=True)
        },
        "rank_correlations": {
            name: float(np.nanmean(each)) for name, each in one.correlations.items()
        },
        "deletion": one.deletion.mean(0).tolist(),
        "insertion": one.insertion.mean(0).tolist(),
    }


def plot_maps(
    path: Path, shown: Examples, columns: dict[str, np.ndarray], logits: np.ndarray
) -> None:
    """Draw the images and beside each its maps, red where positive and blue where negative.

    Args:
      path: of the figure.
      shown: R examples, a row each.
      columns: for each label of a method its maps, (R, H, W, C).
      logits: those explained, (R,).
    """
    rows = len(shown.images)
    size = 1.02 * (len(columns) + 1) + 0.9, 1.16 * rows + 0.65
    with _figure(rows, len(columns) + 1, size) as (figure, panels):
        for row, image, label, logit in zip(
            panels, np.asarray(shown.images), np.asarray(shown.classes), logits, strict=True
        ):
            row[0].imshow(image[..., 0], cmap="gray", vmin=0, vmax=1)
            row[0].set_ylabel(f"{ANIMALS[label]}\nnamed {ANIMALS[label]}", fontsize=8)
            row[0].set_xlabel(f"logit {logit:.1f}", fontsize=6, labelpad=2)
        for across, (label, found) in enumerate(columns.items(), start=1):
            panels[0, across].set_title(label.replace(" ", "\n", 1), fontsize=8)
            for panel, pixels, image in zip(
                panels[:, across], found[..., 0], np.asarray(shown.images), strict=True
            ):
                drawn = _draw_map(panel, pixels, image[..., 0])
        panels[0, 0].set_title("image", fontsize=8)
        for panel in panels.flat:
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
        bar = figure.colorbar(drawn, ax=panels, shrink=0.5, aspect=30, ticks=(-1, 0, 1), pad=0.01)
        bar.ax.set_yticklabels(("−scale", "0", "+scale"), fontsize=7)
        figure.savefig(path, dpi=200)


def plot_curves(path: Path, results: Sequence[Result], methods: Sequence[Method]) -> None:
    """Draw the mean curves of pixel flipping: of each kind of method a colour."""
    fractions = _counts() / _counts()[-1]
    with _figure(1, 2, (7.5, 3.6), sharey=True) as (figure, panels):
        for panel, name in zip(panels[0], ("deletion", "insertion"), strict=True):
            dashes = {kind: iter(DASHES) for kind in COLOURS}
            for one, method in zip(results, methods, strict=True):
                looks: dict[str, Any] = {"color": COLOURS[method.kind], "lw": 1.1}
                looks["linestyle"] = next(dashes[method.kind])
                panel.plot(fractions, getattr(one, name).mean(0), label=one.label, **looks)
            panel.set_title(name, fontsize=8)
            panel.set_xlabel("fraction of pixels, most relevant first")
        panels[0, 0].set_ylabel("logit of the class predicted")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
        figure.savefig(path, dpi=200)


def script(settings: Settings) -> int:
    """Train, explain, measure, print, write; the status is 0 whatever the maps are worth."""
    validate(settings)
    console = command.terminal()
    data = datasets.animals(settings.seed, settings.data_file)
    if settings.examples > len(data.test_inputs):
        raise UsageError(f"--examples must be at most {len(data.test_inputs)}, the test images")
    model = MODELS[settings.network]()
    command.prepare_folder(settings.out, FILES)
    apply, params = model.network.apply, train(settings, model, data, console)
    logits = np.asarray(logits_of(apply, params, jnp.asarray(data.test_inputs)))
    predicted = logits.argmax(1)
    accuracy = float(np.mean(predicted == data.test_targets))
    console.print(f"test accuracy of the {settings.network}: {accuracy:.3f}", soft_wrap=True)

    shown = recognised(data, predicted, settings.animals, settings.pick)
    if len(shown.images) < settings.animals:
        said = f"animals shown: {len(shown.images)}; of the others no test image is recognised"
        console.print(said, soft_wrap=True)
    methods = methods_of(settings)
    columns = {
        method.label: np.asarray(maps(apply, method, params, shown)) for method in methods.values()
    }
    explained = np.asarray(logits_of(apply, params, shown.images)).max(1)
    plot_maps(settings.out / "attribution.png", shown, columns, explained)

    examples = some_of(data, predicted, settings.examples, settings.seed)
    mean = data.train_inputs.mean(0) if settings.replacement == "mean" else np.zeros(SHAPE)
    replacement = jnp.asarray(mean, jnp.float32)
    measured = measure(settings, model, params, examples, replacement)
    total = len(methods) + len(CONTROLS)
    results = list(_bar(measured, "measuring the maps", total, console))
    plot_curves(settings.out / "curves.png", results, [*methods.values(), *CONTROLS.values()])
    content = {
        "settings": dataclasses.asdict(settings),
        "versions": {"jax": jax.__version__, "device": jax.devices()[0].device_kind},
        "test_accuracy": accuracy,
        "fractions": (_counts() / _counts()[-1]).tolist(),
        "methods": [summary(one) for one in results],
    }
    report.write_json(settings.out / "attribution.json", content)
    print_table(console, results)
    console.print(f"written: {settings.out}/{', '.join(FILES)}", soft_wrap=True)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    return command.run(Settings, script, arguments)


@contextmanager
def _figure(rows: int, columns: int, size: tuple[float, float], **sharing: Any):
    """A figure and its panels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(LOOKS):
        figure, panels = plt.subplots(
            rows, columns, figsize=size, squeeze=False, layout="constrained", **sharing
        )
        yield figure, panels
        plt.close(figure)


def _draw_map(panel: Any, pixels: np.ndarray, image: np.ndarray) -> Any:
    """A map in units of its largest magnitude, which stands below, over the animal's outline."""
    scale = float(np.abs(pixels).max())
    drawn = panel.imshow(pixels / (scale or 1.0), cmap="RdBu_r", vmin=-1, vmax=1)
    panel.contour(image, levels=[0.5], colors="black", linewidths=0.3, alpha=0.6)
    panel.set_xlabel(f"±{scale:.2g}", fontsize=6, labelpad=2)
    return drawn


def _bar(of: Any, label: str, total: int, console: Console) -> Any:
    """Something to go through, with a progress bar on a terminal."""
    return track(of, label, total=total, console=console, disable=not console.is_terminal)


def _with_error(values: np.ndarray) -> str:
    return f"{values.mean():+.2f} ± {_standard_error(values):.2f}"


def _standard_error(values: np.ndarray) -> float:
    return float(values.std() / np.sqrt(len(values)))


def _quartiles(values: np.ndarray) -> dict[str, float]:
    lower, median, upper = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return {"lower": lower, "median": median, "upper": upper}


if __name__ == "__main__":
    command.leave(main())
