"""What is trained: a data set, a network for it, the loss to lower and the score to report."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from experiments import datasets, mazur
from experiments.command import UsageError
from fbackprop import losses, networks

Params: TypeAlias = Any  # a pytree of arrays
DatasetName = Literal["digits", "animals", "mazur", "autoencoder"]
ImagesName = Literal["digits", "animals"]
NetworkName = Literal["auto", "mlp", "convnet", "resnet"]

_HIDDEN = {"digits": (64, 32), "animals": (128, 64)}
_CODE = {"digits": (32, 8), "animals": (128, 16)}


class Task(NamedTuple):
    """A training problem; ``apply``, ``loss`` and ``score`` are for one example.

    ``score`` is what is reported of the test part under ``score_name``: the accuracy, or the mean
    squared error of a reconstruction. ``precision`` is the width of its numbers.
    """

    name: str
    init: Callable[[jax.Array], Params]
    apply: Callable[[Params, jax.Array], jax.Array]
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    score: Callable[[jax.Array, jax.Array], jax.Array]
    score_name: str
    precision: Literal["float32", "float64"]
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]

    def mean_loss(self, params: Params, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        """The loss averaged over examples, the quantity that every method lowers."""
        return jnp.mean(jax.vmap(self.loss)(self.predict(params, inputs), targets))

    def predict(self, params: Params, inputs: jax.Array) -> jax.Array:
        """The outputs for a batch, shape (N, C)."""
        return jax.vmap(self.apply, in_axes=(None, 0))(params, inputs)

    def evaluate(
        self, params: Params, inputs: jax.Array, targets: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Mean loss and mean score over examples."""
        outputs = self.predict(params, inputs)
        scores = jax.vmap(self.score)(outputs, targets)
        return jnp.mean(jax.vmap(self.loss)(outputs, targets)), jnp.mean(scores)


def build(
    dataset: DatasetName,
    *,
    network: NetworkName = "auto",
    images: ImagesName = "digits",
    seed: int = 0,
    data_file: Path | None = None,
) -> Task:
    """The task of that name.

    Args:
        dataset: ``digits`` and ``animals`` are classified, ``mazur`` is the worked example with its
            own network, ``autoencoder`` learns to reconstruct ``images``.
        network: the classifier; ``auto`` is the multilayer perceptron.
        images: what the autoencoder reconstructs.
        seed: of the split into training and test part.
        data_file: an ``.npz`` to read the animals from.

    Raises:
        UsageError: a network was asked for that the data set does not take.
        ExperimentError: the data cannot be read.
    """
    if dataset in ("mazur", "autoencoder") and network != "auto":
        raise UsageError(f"{dataset} has its own network; leave --network out")
    if dataset == "mazur":
        return _mazur()
    source: ImagesName = images if dataset == "autoencoder" else dataset
    data = datasets.digits(seed) if source == "digits" else datasets.animals(seed, data_file)
    if dataset == "autoencoder":
        return _autoencoder(data)
    return _classifier(data, "mlp" if network == "auto" else network)


def _classifier(data: datasets.Dataset, network: Literal["mlp", "convnet", "resnet"]) -> Task:
    shape, classes = data.train_inputs.shape[1:], len(data.classes)
    if network == "mlp":
        init, apply = networks.mlp((int(np.prod(shape)), *_HIDDEN[data.name], classes))
        data = _flat(data)
    else:
        make = networks.convnet if network == "convnet" else networks.resnet
        init, apply = make(shape, classes, channels=(8, 16))
    return Task(
        name=f"{data.name}-{network}",
        init=init,
        apply=apply,
        loss=losses.softmax_cross_entropy,
        score=lambda logits, label: (jnp.argmax(logits) == label).astype(jnp.float32),
        score_name="test accuracy",
        precision="float32",
        train=(data.train_inputs, data.train_targets),
        test=(data.test_inputs, data.test_targets),
    )


def _autoencoder(data: datasets.Dataset) -> Task:
    data = _flat(data)
    widths = (data.train_inputs.shape[1], *_CODE[data.name])
    init, apply = networks.autoencoder(widths)
    return Task(
        name=f"{data.name}-autoencoder",
        init=init,
        apply=apply,
        loss=losses.squared_error,
        score=lambda output, image: jnp.mean(jnp.square(output - image)),
        score_name="test error per pixel",
        precision="float32",
        train=(data.train_inputs, data.train_inputs),
        test=(data.test_inputs, data.test_inputs),
    )


def _mazur() -> Task:
    data = datasets.mazur_example()
    return Task(
        name="mazur",
        init=lambda key: mazur.initial_weights(),
        apply=mazur.outputs,
        loss=losses.squared_error,
        score=lambda output, target: jnp.max(jnp.abs(output - target)),
        score_name="largest test error",
        precision="float64",
        train=(data.train_inputs, data.train_targets),
        test=(data.test_inputs, data.test_targets),
    )


def _flat(data: datasets.Dataset) -> datasets.Dataset:
    """The same data with every image a vector."""
    return data._replace(
        train_inputs=data.train_inputs.reshape(len(data.train_inputs), -1),
        test_inputs=data.test_inputs.reshape(len(data.test_inputs), -1),
    )
