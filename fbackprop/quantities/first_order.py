"""Quantities of the examples' gradients gₙ = ∂ℓₙ/∂θ, each of the example's own loss."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fbackprop.program import is_real_number, value_of
from fbackprop.quantities.base import Quantity
from fbackprop.sites import wide


def _column(tree):
    """Arrays (N, 1, …) without their axis of columns."""
    return jax.tree.map(lambda x: x[:, 0], tree)


@dataclasses.dataclass(frozen=True)
class Gradient(Quantity):
    r"""The gradient of the batch's loss, $\frac1N \sum_n g_n$: a pytree like the parameters."""

    scales = True

    def extract(self, gradients):
        return gradients.total()


@dataclasses.dataclass(frozen=True)
class ExampleGradients(Quantity):
    """Every example's gradient $g_n$: a pytree like the parameters, leaves (N, *leaf)."""

    over = "examples"

    def extract(self, gradients):
        return _column(gradients.each())


@dataclasses.dataclass(frozen=True)
class ExampleNorms(Quantity):
    r"""Squared norms $\lVert g_n \rVert^2$ of the examples' gradients, (N,).

    Without forming them (Goodfellow 2015; Rochette, Manoel and Tramel 2019).

    Attributes:
      per_leaf: whether to return a pytree like the parameters, each leaf's norms for itself.
    """

    per_leaf: bool = False
    over = "examples"

    def extract(self, gradients):
        return _column(gradients.norms(self.per_leaf))


@dataclasses.dataclass(frozen=True)
class ClippedGradient(Quantity):
    r"""Mean of the examples' gradients, each clipped to a norm: what DP-SGD adds its noise to.

    $$\frac1N \sum_n g_n \min(1, \text{max\_norm} / \lVert g_n \rVert)$$

    One backward pass serves for norms and sum (Abadi et al. 2016, algorithm 1; Li et al. 2022). A
    mean of a summed loss too, as all statistics of examples' gradients.

    Attributes:
      max_norm: positive.
      per_leaf: whether every leaf is clipped to `max_norm` for itself.
    """

    max_norm: float
    per_leaf: bool = False

    def __post_init__(self):
        if not is_real_number(self.max_norm):
            raise TypeError(f"max_norm={self.max_norm!r}: a norm to clip to must be a number")
        known = value_of(self.max_norm)
        if known is not None and not known > 0:
            raise ValueError(f"max_norm={self.max_norm}: a norm to clip to must be positive")

    def extract(self, gradients):
        norms = gradients.norms(self.per_leaf)
        return gradients.total(jax.tree.map(lambda x: self._shares(gradients, x), norms))

    def _shares(self, gradients, squared):
        longer = squared > self.max_norm**2
        # A norm of zero has no derivative, and no part in the result.
        scale = jnp.where(longer, self.max_norm / jnp.sqrt(jnp.where(longer, squared, 1)), 1.0)
        return scale * gradients.shares[:, None].astype(scale.dtype)


@dataclasses.dataclass(frozen=True)
class SecondMoment(Quantity):
    r"""Mean of the squared gradients, $\frac1N \sum_n g_n^2$ elementwise, like the parameters.

    Rounded to the parameters' dtype, in whose range the squares must be.
    """

    def extract(self, gradients):
        return gradients.squares()


@dataclasses.dataclass(frozen=True)
class Variance(Quantity):
    r"""Variance of the gradients, $\frac1N \sum_n g_n^2 - (\frac1N \sum_n g_n)^2$ elementwise.

    Both moments are rounded to the parameters' dtype: in half precision a variance below a
    hundredth of the squared mean is lost, and float16 has no room for squares of more than 65,504.
    """

    def extract(self, gradients):
        return gradients.squares(), gradients.total()

    def finish(self, found):
        # The difference of two nearly equal numbers may come out below zero.
        return jax.tree.map(lambda m2, m: jnp.maximum(m2 - m**2, 0), *found)


@dataclasses.dataclass(frozen=True)
class GradientNoiseScale(Quantity):
    r"""The simple noise scale tr(Σ) / |G|², in examples: about the batch size that is worth having.

    Σ is the covariance of the examples' gradients and G their mean (McCandlish, Kaplan, Amodei et
    al. 2018, eq. 2.9).

    Attributes:
      unbiased: whether numerator and denominator are estimated without bias from this batch of N
        (appendix A.1, with batches of N and of 1): tr Σ = N/(N−1) (m − |G|²), |G|² − tr Σ / N,
        where m is the mean of |gₙ|². The second may be negative in a batch of noise, and of one
        example the first is not a number.

    G is rounded to the parameters' dtype: in half precision a noise scale well below one is not
    exact.
    """

    unbiased: bool = False

    def extract(self, gradients):
        norms = _column(gradients.norms())
        shares = gradients.shares.astype(norms.dtype)
        return {"m": jnp.sum(norms * shares), "G": gradients.total(), "shares": jnp.sum(shares**2)}

    def finish(self, found):
        mean = sum(jnp.sum(jnp.square(wide(g))) for g in jax.tree.leaves(found["G"]))
        trace = found["m"] - mean
        if self.unbiased:  # 1/N is the sum of the squared shares
            trace = trace / (1 - found["shares"])
            mean = mean - trace * found["shares"]
        return trace / mean


@dataclasses.dataclass(frozen=True)
class ExampleDots(Quantity):
    r"""Inner products $\langle g_n, g_m \rangle$ of the examples' gradients, (N, N).

    With a second batch, (N, M): up to the learning rate this is one checkpoint's influence of
    training on example n on the loss of example m (TracIn; Pruthi et al. 2020, eq. 1).

    Attributes:
      other: the second batch, (inputs, targets) and the model's further inputs, if it has any.
    """

    other: Any = None
    over = "pairs"

    def extract(self, gradients):
        return gradients.dots(gradients.second)[:, 0, :, 0]


@dataclasses.dataclass(frozen=True)
class ErrorSignals(Quantity):
    r"""Error signals $\partial\ell_n/\partial v$ of named values, a dict of arrays (N, *value).

    Values that depend on the example are named with `jax.ad_checkpoint.checkpoint_name`; for names
    in loops, and names that occur several times, see `fbackprop.error_signals`.
    """

    over = "examples"
    names = True

    def extract(self, gradients):
        return _column(gradients.signals)
