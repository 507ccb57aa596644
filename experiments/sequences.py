"""Short synthetic sequences to tell apart: the recipe of MNIST-1D, written anew.

Each of ten classes is a template of twelve points. An example is its template stretched and
scaled, put somewhere in a sequence of forty points, sheared, and covered with smooth and with
white noise. Position says nothing of the class, so a network must learn shapes wherever they are.

Source: S. Greydanus and D. Kobak, "Scaling down deep learning with MNIST-1D", ICML 2024. The
templates and the numbers here are our own, so results do not compare with published ones.
"""

import numpy as np

from experiments.datasets import Dataset

CLASSES, POINTS, LENGTH = 10, 12, 40
TRAIN, TEST = 4000, 1000
SCALE = (0.7, 1.3)  # of the values
STRETCH = (12, 30)  # points that a template covers
SHEAR = 0.5  # largest slope added, over the whole sequence
SMOOTH, WHITE = 0.25, 0.05  # standard deviations of the two noises

_TEMPLATES_SEED = 1  # one fixed set of templates: the seed of the data is the caller's


def sequences(seed: int = 0, train: int = TRAIN, test: int = TEST) -> Dataset:
    """Sequences drawn with ``seed``; inputs of shape (N, 40), as many of each class as can be."""
    random = np.random.default_rng(seed)
    labels = np.arange(train + test) % CLASSES
    inputs = np.stack([_example(random, template) for template in templates()[labels]])
    order = random.permutation(train + test)
    inputs, labels = inputs[order].astype(np.float32), labels[order].astype(np.int32)
    classes = tuple(str(label) for label in range(CLASSES))
    parts = inputs[:train], labels[:train], inputs[train:], labels[train:]
    return Dataset("sequences", classes, *parts)


def templates() -> np.ndarray:
    """The shapes of the classes, (10, 12): random walks of mean zero and variance one."""
    walks = np.random.default_rng(_TEMPLATES_SEED).standard_normal((CLASSES, POINTS)).cumsum(1)
    centred = walks - walks.mean(1, keepdims=True)
    return centred / centred.std(1, keepdims=True)


def _example(random: np.random.Generator, template: np.ndarray) -> np.ndarray:
    """One sequence, shape (40,)."""
    covered = random.integers(*STRETCH)
    start = random.integers(0, LENGTH - covered + 1)
    sequence = np.zeros(LENGTH)
    places = np.linspace(0, POINTS - 1, covered)
    shape = np.interp(places, np.arange(POINTS), template)
    sequence[start : start + covered] = random.uniform(*SCALE) * shape
    sequence += random.uniform(-SHEAR, SHEAR) * np.linspace(-1, 1, LENGTH)
    sequence += SMOOTH * np.convolve(
        random.standard_normal(LENGTH + 4), np.full(5, 5**-0.5), "valid"
    )
    return sequence + WHITE * random.standard_normal(LENGTH)
