"""The data: handwritten digits, animal silhouettes, Mazur's single example.

``digits`` are scikit-learn's 1,797 images of 8×8 pixels. ``animals`` are 10,000 images of 28×28
pixels, 1,000 of each of ten animals, from the PyPI package ``animal_mnist`` 0.4 by Sina Mohammadi
(MIT licence, ``experiments/data/animals.LICENSE``); 9,716 of them are distinct. ``diabetes`` are
scikit-learn's 442 patients.

Copies of one image always land on the same side of the split into training and test part.
"""

import importlib.resources
import zipfile
import zlib
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments import mazur
from experiments.command import ExperimentError

ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
TEST_FRACTION = 0.2


class Dataset(NamedTuple):
    """A data set in two parts; the first axis counts examples.

    Images have shape (N, height, width, 1) and values in [0, 1], labels are integers of shape (N,).
    ``classes`` is empty where the targets are no labels.
    """

    name: str
    classes: tuple[str, ...]
    train_inputs: np.ndarray
    train_targets: np.ndarray
    test_inputs: np.ndarray
    test_targets: np.ndarray


def digits(seed: int = 0) -> Dataset:
    """Scikit-learn's handwritten digits, in two parts drawn with ``seed``."""
    from sklearn.datasets import load_digits  # slow to import, and only needed here

    bunch = load_digits()
    classes = tuple(str(name) for name in bunch.target_names)
    return _in_two_parts("digits", classes, bunch.images, bunch.target, 16.0, seed)


def animals(seed: int = 0, file: Path | None = None) -> Dataset:
    """The animal silhouettes, in two parts drawn with ``seed``.

    Args:
        seed: which split.
        file: an ``.npz`` to read in place of the one that comes with the experiments.

    Raises:
        ExperimentError: the file is missing, unreadable, damaged or holds something else.
    """
    images, labels = _read_animals(file)
    return _in_two_parts("animals", ANIMALS, images, labels, 255.0, seed)


def diabetes(seed: int = 0) -> Dataset:
    """Ten measurements of a patient, (N, 10), and how the disease went on, (N, 1).

    Inputs and targets are standardised by the training part, which is drawn with ``seed``: an error
    of 1 is that of predicting the mean.
    """
    from sklearn.datasets import load_diabetes

    bunch = load_diabetes(scaled=False)
    inputs, targets = bunch.data, bunch.target[:, None]
    order = np.random.default_rng(seed).permutation(len(inputs))
    test, train = np.split(order, [round(TEST_FRACTION * len(inputs))])
    inputs, targets = _standardised(inputs, train), _standardised(targets, train)
    return Dataset("diabetes", (), inputs[train], targets[train], inputs[test], targets[test])


def _standardised(values: np.ndarray, train: np.ndarray) -> np.ndarray:
    """To mean 0 and variance 1 of the rows ``train``."""
    known = values[train]
    return ((values - known.mean(0)) / known.std(0)).astype(np.float32)


def mazur_example() -> Dataset:
    """The two inputs and two targets of Mazur's worked example, shapes (1, 2); no test part."""
    inputs, targets = np.array([mazur.INPUTS]), np.array([mazur.TARGETS])
    return Dataset("mazur", (), inputs, targets, inputs[:0], targets[:0])


def split(images: np.ndarray, labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The indices of training and test examples, a fifth of each class for the test.

    Identical images count as one when they are dealt out, so that none stands on both sides.
    """
    _, first, group = np.unique(
        images.reshape(len(images), -1), axis=0, return_index=True, return_inverse=True
    )
    group = group.reshape(-1)  # NumPy 2.0 gave it a second axis
    random = np.random.default_rng(seed)
    in_test = np.zeros(len(first), bool)
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels[first] == label))
        in_test[members[: round(TEST_FRACTION * len(members))]] = True
    test = in_test[group]
    return np.flatnonzero(~test), np.flatnonzero(test)


def _in_two_parts(
    name: str,
    classes: tuple[str, ...],
    images: np.ndarray,
    labels: np.ndarray,
    white: float,
    seed: int,
) -> Dataset:
    train, test = split(images, labels, seed)
    scaled = (images / white).astype(np.float32)[..., None]
    targets = labels.astype(np.int32)
    return Dataset(name, classes, scaled[train], targets[train], scaled[test], targets[test])


def _read_animals(file: Path | None) -> tuple[np.ndarray, np.ndarray]:
    source: Traversable = file or importlib.resources.files("experiments") / "data" / "animals.npz"
    mend = (
        "give another --data-file"
        if file
        else "restore it with: git checkout experiments/data/animals.npz"
    )
    try:
        with source.open("rb") as stream, np.load(stream) as archive:
            images, labels = archive["images"], archive["labels"]
    except FileNotFoundError:
        raise ExperimentError(f"the data file {source} is missing; {mend}") from None
    except KeyError:
        raise ExperimentError(f"{source} holds no 'images' and 'labels'; {mend}") from None
    except (OSError, EOFError, ValueError, TypeError, AttributeError) as error:
        raise ExperimentError(f"cannot read {source} ({_one_line(error)}); {mend}") from None
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ExperimentError(f"{source} is damaged ({_one_line(error)}); {mend}") from None
    expected = images.shape[1:] == (28, 28) and labels.shape == images.shape[:1] and len(images)
    if not expected or images.dtype != np.uint8 or not np.isin(labels, range(10)).all():
        raise ExperimentError(
            f"{source} is not (N, 28, 28) uint8 images with labels 0 to 9; {mend}"
        )
    return images, labels


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
