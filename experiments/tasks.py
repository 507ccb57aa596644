"""What is trained: a data set, a network for it, the loss to lower and the score to report.

A problem is one row of ``PROBLEMS``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from experiments import datasets, mazur, sequences, text
from experiments.command import UsageError
from experiments.datasets import Dataset
from fbackprop import losses, networks
from fbackprop.networks import Network

Params: TypeAlias = Any  # a pytree of arrays
Part: TypeAlias = tuple[np.ndarray, np.ndarray]
ProblemName = Literal[
    "digits-mlp",
    "digits-convnet",
    "digits-resnet",
    "digits-autoencoder",
    "animals-mlp",
    "animals-convnet",
    "animals-autoencoder",
    "diabetes",
    "text",
    "sequences-mlp",
    "sequences-lstm",
    "mazur",
]


class Budget(NamedTuple):
    """What suits a problem: passes over the training part, examples in a small and a large batch.

    Convolutions and large networks are slow on a CPU, so their budgets are small.
    """

    passes: float
    small: int
    large: int


class Task(NamedTuple):
    """A training problem; ``apply``, ``loss`` and ``score`` are for one example.

    The losses are those of ``fbackprop.losses`` themselves, not wrappers of them: a second-order
    method knows their curvature in closed form. ``score`` is what is reported of the test part
    under ``score_name``. ``precision`` is the width of its numbers.
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[[Params, jax.Array], jax.Array]
    loss: Callable[[Any, Any], jax.Array]
    score: Callable[[jax.Array, jax.Array], jax.Array]
    score_name: str
    train: Part
    test: Part
    budget: Budget
    precision: Literal["float32", "float64"] = "float32"

    @property
    def score_rises(self) -> bool:
        """Whether a better score is a higher one."""
        return self.score_name == "test accuracy"

    def mean_loss(self, params: Params, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        """The loss averaged over examples, the quantity that every optimizer lowers."""
        outputs = jax.vmap(self.apply, in_axes=(None, 0))(params, inputs)
        return jnp.mean(jax.vmap(self.loss)(outputs, targets))


def check_data_file(name: str, data_file: Path | None) -> None:
    """Refuse a file that no data set of that name reads.

    Raises:
        UsageError: the data come from elsewhere.
    """
    if data_file is not None and not name.startswith("animals"):
        raise UsageError(f"--data-file is of animals, and the data are {name}: leave it out")


def build(problem: ProblemName, *, seed: int = 0, data_file: Path | None = None) -> Task:
    """The task of that name.

    Args:
        problem: which row.
        seed: of the split into training and test part, or of the data where they are synthetic.
        data_file: an ``.npz`` to read the animals from.

    Raises:
        ExperimentError: the data cannot be read.
    """
    return PROBLEMS[problem](seed, data_file)


def _classifier(data: Dataset, network: Network, budget: Budget) -> Task:
    """Labels, one per example or one per position of a sequence."""
    return Task(
        *network,
        loss=losses.softmax_cross_entropy,
        score=lambda logits, label: jnp.mean(jnp.argmax(logits, -1) == label),
        score_name="test accuracy",
        train=(data.train_inputs, data.train_targets),
        test=(data.test_inputs, data.test_targets),
        budget=budget,
    )


def _digits(network: Network, seed: int, budget: Budget) -> Task:
    return _classifier(datasets.digits(seed), network, budget)


def _digits_autoencoder(seed: int) -> Task:
    data = _flat(datasets.digits(seed))
    return Task(
        *networks.autoencoder((64, 32, 8)),
        loss=losses.squared_error,
        score=lambda output, image: jnp.mean(jnp.square(output - image)),
        score_name="test error per pixel",
        train=(data.train_inputs, data.train_inputs),
        test=(data.test_inputs, data.test_inputs),
        budget=Budget(40, 128, 2048),
    )


def _deep_autoencoder(seed: int, file: Path | None) -> Task:
    """The benchmark of second-order training since Hinton and Salakhutdinov (2006), on animals.

    Pixels are probabilities, as there; Martens (2010) reports the squared error that is the score.
    """
    data = _flat(datasets.animals(seed, file))
    return Task(
        *networks.autoencoder((784, 1000, 500, 250, 30)),
        loss=losses.sigmoid_binary_cross_entropy,
        score=lambda logits, image: jnp.mean(jnp.square(jax.nn.sigmoid(logits) - image)),
        score_name="test error per pixel",
        train=(data.train_inputs, data.train_inputs),
        test=(data.test_inputs, data.test_inputs),
        budget=Budget(10, 256, 1024),
    )


def _diabetes(seed: int) -> Task:
    data = datasets.diabetes(seed)
    return Task(
        *networks.mlp((10, 32, 16, 1)),
        loss=losses.squared_error,
        score=lambda output, target: jnp.mean(jnp.square(output - target)),
        score_name="test error in variances",
        train=(data.train_inputs, data.train_targets),
        test=(data.test_inputs, data.test_targets),
        budget=Budget(60, 64, 2048),
    )


def _text() -> Task:
    """The next character at every position; the loss is summed over a window's 32."""
    data = text.characters()
    letters = len(data.classes)
    network = networks.transformer(letters, letters, length=text.LENGTH, width=32, layers=2)
    return _classifier(data, network, Budget(30, 64, 512))


def _sequences_lstm(seed: int) -> Task:
    data = sequences.sequences(seed)
    data = data._replace(
        train_inputs=data.train_inputs[..., None], test_inputs=data.test_inputs[..., None]
    )
    return _classifier(data, networks.lstm(1, 32, sequences.CLASSES), Budget(20, 128, 1024))


def _mazur() -> Task:
    data = datasets.mazur_example()
    return Task(
        init=lambda key: mazur.initial_weights(),
        apply=mazur.outputs,
        loss=losses.squared_error,
        score=lambda output, target: jnp.max(jnp.abs(output - target)),
        score_name="largest test error",
        train=(data.train_inputs, data.train_targets),
        test=(data.test_inputs, data.test_targets),
        budget=Budget(500, 1, 1),
        precision="float64",
    )


def _flat(data: Dataset) -> Dataset:
    """The same data with every image a vector."""
    return data._replace(
        train_inputs=data.train_inputs.reshape(len(data.train_inputs), -1),
        test_inputs=data.test_inputs.reshape(len(data.test_inputs), -1),
    )


PROBLEMS: dict[ProblemName, Callable[[int, Path | None], Task]] = {
    "digits-mlp": lambda seed, file: _digits(
        networks.mlp((64, 64, 32, 10)), seed, Budget(40, 128, 2048)
    ),
    "digits-convnet": lambda seed, file: _digits(
        networks.convnet((8, 8, 1), 10, channels=(8, 16)), seed, Budget(20, 128, 512)
    ),
    "digits-resnet": lambda seed, file: _digits(
        networks.resnet((8, 8, 1), 10, channels=(8, 16)), seed, Budget(10, 128, 512)
    ),
    "digits-autoencoder": lambda seed, file: _digits_autoencoder(seed),
    "animals-mlp": lambda seed, file: _classifier(
        datasets.animals(seed, file), networks.mlp((784, 128, 64, 10)), Budget(20, 256, 2048)
    ),
    "animals-convnet": lambda seed, file: _classifier(
        datasets.animals(seed, file),
        networks.convnet((28, 28, 1), 10, channels=(8, 16)),
        Budget(5, 256, 512),
    ),
    "animals-autoencoder": _deep_autoencoder,
    "diabetes": lambda seed, file: _diabetes(seed),
    "text": lambda seed, file: _text(),
    "sequences-mlp": lambda seed, file: _classifier(
        sequences.sequences(seed), networks.mlp((40, 100, 100, 10)), Budget(30, 128, 4096)
    ),
    "sequences-lstm": lambda seed, file: _sequences_lstm(seed),
    "mazur": lambda seed, file: _mazur(),
}
