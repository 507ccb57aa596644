"""The networks that the benchmark of quantities runs, and each quantity by JAX alone.

Before a quantity is timed, it is compared with its definition on a few examples.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import fbackprop as fb
from fbackprop import losses, networks

CHECKED = 3  # examples on which a quantity is compared with its definition before it is timed
TOLERANCE = 1e-3  # of that comparison, relative to the largest element of an array
MAX_NORM = 0.5  # clips most of the examples


# --- networks -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A network as both frameworks build it, and what is measured on it."""

    family: str
    sizes: Mapping[str, Any]
    batch: int
    quantities: tuple[str, ...]


class Problem(NamedTuple):
    """A model of one example, its parameters, and a batch of inputs and labels."""

    model: Callable
    params: Any
    batch: tuple[jax.Array, jax.Array]

    def loss(self, params, x, y):
        """Of one example."""
        return losses.softmax_cross_entropy(self.model(params, x), y)

    def mean_loss(self, params, batch):
        return jnp.mean(jax.vmap(self.loss, (None, 0, 0))(params, *batch))


FIRST_ORDER = (
    "example-gradients",
    "example-norms",
    "clipped-gradient",
    "second-moment",
    "variance",
    "example-dots",
)
SAMPLED = ("ggn-diagonal-sampled", "kfac")
EXACT = ("ggn-diagonal", "kflr")

NETWORKS = {
    "mlp": Case(
        "mlp",
        {"widths": (784, 512, 512, 512, 10)},
        batch=128,
        quantities=(*FIRST_ORDER, *SAMPLED, *EXACT, "everything"),
    ),
    "mlp-256": Case(
        "mlp",
        {"widths": (784, 512, 512, 512, 10)},
        batch=256,
        quantities=("example-dots", "gram"),
    ),
    "wide-mlp": Case(
        "mlp",
        {"widths": (784, 1024, 1024, 1024, 10)},
        batch=256,
        quantities=("example-norms", "clipped-gradient"),
    ),
    "convnet": Case(
        "convnet",
        {"image": (28, 28), "classes": 10, "channels": (16, 32), "kernel": 5},
        batch=64,
        quantities=(*FIRST_ORDER, *SAMPLED, *EXACT, "everything"),
    ),
    # Without the exact curvature, which has a column for nearly every word at every position.
    "transformer": Case(
        "transformer",
        {"vocabulary": 64, "length": 32, "width": 64, "heads": 4, "layers": 2},
        batch=32,
        quantities=(*FIRST_ORDER, *SAMPLED, "everything"),
    ),
}


def build(case: Case) -> Problem:
    """The network and a batch of random data."""
    key, n, sizes = jax.random.key(0), case.batch, case.sizes
    if case.family == "mlp":
        network = networks.mlp(**sizes)
        inputs = jax.random.normal(key, (n, sizes["widths"][0]))
        labels = jnp.arange(n) % sizes["widths"][-1]
    elif case.family == "convnet":
        network = convnet(**sizes)
        inputs = jax.random.normal(key, (n, *sizes["image"]))
        labels = jnp.arange(n) % sizes["classes"]
    else:
        words = sizes["vocabulary"]
        network = networks.transformer(outputs=words, **sizes)
        inputs = jax.random.randint(key, (n, sizes["length"]), 0, words)
        labels = jnp.roll(inputs, -1, axis=1)
    return Problem(network.apply, network.init(key), (inputs, labels))


def convnet(
    image: Sequence[int], classes: int, channels: Sequence[int], kernel: int
) -> networks.Network:
    """Convolutions, each with ReLU and 2×2 max pooling, and a dense layer."""
    features = (image[0] >> len(channels)) * (image[1] >> len(channels)) * channels[-1]
    kernels = [(kernel, kernel, i, o) for i, o in zip((1, *channels), channels, strict=False)]
    shapes = [*kernels, (features, classes)]
    draw = jax.nn.initializers.he_normal()

    def init(key):
        keys = jax.random.split(key, len(shapes))
        return [(draw(k, s), jnp.zeros(s[-1])) for k, s in zip(keys, shapes, strict=True)]

    def apply(params, x):
        *stages, (head, bias) = params
        x = x[None, :, :, None]
        for w, b in stages:
            dims = ("NHWC", "HWIO", "NHWC")
            x = lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dims)
            x = jax.nn.relu(x + b.reshape(1, 1, 1, -1))
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return jnp.ravel(x) @ head + bias

    return networks.Network(init, apply)


# --- quantities, and the same by JAX alone --------------------------------------------------------

QUANTITIES: dict[str, fb.Quantity] = {
    "example-gradients": fb.ExampleGradients(),
    "example-norms": fb.ExampleNorms(),
    "clipped-gradient": fb.ClippedGradient(MAX_NORM),
    "second-moment": fb.SecondMoment(),
    "variance": fb.Variance(),
    "example-dots": fb.ExampleDots(),
    "ggn-diagonal-sampled": fb.GGNDiagonal(samples=1),
    "ggn-diagonal": fb.GGNDiagonal(),
    "kfac": fb.Kronecker(samples=1),
    "kflr": fb.Kronecker(),
    "gram": fb.Gram(),
}


def members(quantity: str, case: Case) -> list[str]:
    """The quantities that are computed at once: for "everything", all that are for the network."""
    return [q for q in case.quantities if q in QUANTITIES and quantity in (q, "everything")]


def _norms(gradients):
    return sum(jnp.sum(x**2, axis=range(1, x.ndim)) for x in jax.tree.leaves(gradients))


def _clipped(gradients):
    norms = jnp.sqrt(_norms(gradients))
    scale = jnp.minimum(1, MAX_NORM / norms) / len(norms)
    return jax.tree.map(lambda x: jnp.tensordot(scale, x, 1), gradients)


def _second_moment(gradients):
    return jax.tree.map(lambda x: jnp.mean(x**2, axis=0), gradients)


def _variance(gradients):
    return jax.tree.map(lambda x: jnp.mean(x**2, axis=0) - jnp.mean(x, axis=0) ** 2, gradients)


def _dots(rows):
    """Inner products of rows that are pytrees, each of one leading axis."""
    flat = [x.reshape(len(x), -1) for x in jax.tree.leaves(rows)]
    return sum(x @ x.T for x in flat)


FROM_GRADIENTS: dict[str, Callable] = {
    "example-gradients": lambda gradients: gradients,
    "example-norms": _norms,
    "clipped-gradient": _clipped,
    "second-moment": _second_moment,
    "variance": _variance,
    "example-dots": _dots,
}


def by_jax(quantity: str, problem: Problem) -> Callable | None:
    """The quantity as a function of parameters and batch by JAX's gradients or Jacobians."""
    if quantity in FROM_GRADIENTS:
        each = jax.vmap(jax.grad(problem.loss), (None, 0, 0))
        return lambda params, batch: FROM_GRADIENTS[quantity](each(params, *batch))
    if quantity == "gram":

        def gram(params, batch):
            jacobian = _jacobian(problem, params, batch)
            n, c = jax.tree.leaves(jacobian)[0].shape[:2]
            rows = jax.tree.map(lambda x: x.reshape(n * c, *x.shape[2:]), jacobian)
            return _dots(rows).reshape(n, c, n, c)

        return gram
    return None


def _jacobian(problem: Problem, params, batch):
    return jax.vmap(jax.jacrev(problem.model), (None, 0))(params, batch[0])


def sweep(problem: Problem, **quantities: Any) -> Callable:
    """A compiled sweep for some quantities, of parameters and batch."""
    swept = fb.sweep(problem.model, losses.softmax_cross_entropy, **quantities)
    return jax.jit(lambda params, batch: swept(params, batch, key=jax.random.key(1)))


# --- a benchmark of wrong numbers is worth nothing ------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Columns(fb.Quantity):
    """The gradients that a curvature's columns are sent back to, (N, C, *leaf)."""

    sent: Callable
    over = "examples"

    @property
    def columns(self):
        return self.sent

    def extract(self, gradients):
        return gradients.each()


def check(names: Sequence[str], case: Case, problem: Problem) -> None:
    """Compare quantities with their definitions, on a few examples.

    Raises:
      AssertionError: one differs.
    """
    params, batch = problem.params, jax.tree.map(lambda x: x[:CHECKED], problem.batch)
    for name in names:
        quantity, definition = QUANTITIES[name], by_jax(name, problem)
        if definition is not None:
            found = sweep(problem, q=quantity)(params, batch)["q"]
            _compare(name, found, jax.jit(definition)(params, batch))
            continue
        if isinstance(quantity, fb.Kronecker):
            # The factors are exact for a single example, where a weight is used but once.
            batch = jax.tree.map(lambda x: x[:1], problem.batch)
        found = sweep(problem, q=quantity, columns=_Columns(quantity.columns))(params, batch)
        diagonal = jax.jit(functools.partial(_diagonal, name, problem))
        expected = diagonal(batch, found["columns"])
        if not isinstance(quantity, fb.Kronecker):
            _compare(name, found["q"], expected)
            continue
        blocks = jax.tree.structure(params).flatten_up_to(found["q"])
        pairs = zip(blocks, jax.tree.leaves(expected), strict=True)
        once = [pair for pair in pairs if case.family == "mlp" or pair[1].ndim == 1]
        diagonals = jax.jit(_diagonals_of_blocks)([block for (block,), _ in once])
        _compare(name, diagonals, [leaf for _, leaf in once])


def _diagonal(name: str, problem: Problem, batch, columns):
    """Of the Gauss-Newton matrix: by JAX's derivatives, or of columns that were drawn."""
    if name in SAMPLED:
        return jax.tree.map(lambda x: jnp.mean(jnp.sum(x**2, axis=1), axis=0), columns)
    predictions = jax.vmap(problem.model, (None, 0))(problem.params, batch[0])
    hessians = jax.vmap(jax.hessian(losses.softmax_cross_entropy))(predictions, batch[1])
    jacobian = _jacobian(problem, problem.params, batch)
    n = len(predictions)
    return jax.tree.map(lambda j: jnp.einsum("nc...,ncd,nd...->...", j, hessians / n, j), jacobian)


def _diagonals_of_blocks(blocks: Sequence[fb.KroneckerBlock]) -> list:
    return [block.layout.restore(block.diagonal()) for block in blocks]


def _compare(name: str, found, expected) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = float(np.max(np.abs(b)))
        if not np.allclose(a, b, rtol=0, atol=TOLERANCE * scale + 1e-12):
            raise AssertionError(f"{name} differs from its definition")
