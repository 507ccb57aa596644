"""Mean-field theory of a deep random network: how large its net inputs and error signals are.

The network is z₁ = W₁ᵀx + b₁, z_{l+1} = W_{l+1}ᵀφ(z_l) + b_{l+1}, its entries independent with mean
0, weights of variance σ_w²/fan_in, biases of variance σ_b². As its width grows, the net inputs of a
layer become Gaussian with mean 0 and a variance q_l, which is the same for every unit, and

    q_{l+1} = σ_w² E[φ(√q_l ξ)²] + σ_b²      ξ ~ N(0, 1)
    χ_l     = σ_w² E[φ'(√q_l ξ)²]
    E[δ_l²] = χ_l E[δ_{l+1}²]                δ_l = ∂E/∂z_l

for layers of equal width, if the weights that carry an error signal back are taken as independent
of those that made the net inputs. Going back one layer, the size of a signal changes by a factor
√χ_l, that is by ½ log₁₀ χ_l decades: it vanishes where χ_l < 1 and explodes where χ_l > 1.

Sources: Poole et al., "Exponential expressivity in deep neural networks through transient chaos",
2016 (arXiv 1606.05340), for q; Schoenholz et al., "Deep information propagation", 2017
(arXiv 1611.01232), for χ and the error signals.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fbackprop as fb

Activation = Callable[[jax.Array], jax.Array]

NODES = 200  # on each side of 0
REACH = 12.0  # standard deviations; beyond them lies less than 1e-32 of a Gaussian


class MeanField(NamedTuple):
    """What the theory says of L layers of equal width, in float64.

    Attributes:
        variances: q_l, of the net inputs, (L,).
        factors: χ_l, by which the mean squared error signal of layer l is larger than that of layer
            l + 1, (L,); after the last layer stand the outputs.
    """

    variances: np.ndarray
    factors: np.ndarray

    @property
    def decades(self) -> np.ndarray:
        """log₁₀ of the root mean square of δ_l for outputs' cotangents of variance 1, (L,)."""
        with np.errstate(divide="ignore"):  # net inputs may vanish altogether, and slopes there
            return 0.5 * np.cumsum(np.log10(self.factors)[::-1])[::-1]

    @property
    def rms(self) -> np.ndarray:
        """That root mean square itself, (L,); infinite where float64 cannot hold it."""
        with np.errstate(over="ignore"):
            return 10.0**self.decades


def expectation(function: Activation, variance: jax.Array) -> jax.Array:
    """E[function(√variance ξ)] for ξ ~ N(0, 1).

    Gauss-Legendre quadrature on each side of 0, since it is there that activations have a kink and
    their slopes a jump, which Gauss-Hermite nodes, spread over the whole line, would smear.
    Exact to ten digits for variances of up to 300, to five for 10,000, if the function bends over
    lengths of about 1.
    """
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    side = REACH * (nodes + 1) / 2
    density = REACH / 2 * weights * np.exp(-(side**2) / 2) / np.sqrt(2 * np.pi)
    points = np.concatenate([-side[::-1], side])
    return jnp.concatenate([density[::-1], density]) @ function(jnp.sqrt(variance) * points)


def next_variance(
    activation: Activation, variance: jax.Array, gain: float, bias: float
) -> jax.Array:
    """q_{l+1} of q_l; ``gain`` is σ_w² and ``bias`` σ_b²."""
    return gain * expectation(lambda z: activation(z) ** 2, variance) + bias


def factor(activation: Activation, variance: jax.Array, gain: float) -> jax.Array:
    """χ_l of q_l; ``gain`` is σ_w²."""

    def squared_slope(z: jax.Array) -> jax.Array:
        heights, pullback = fb.vjp(activation, z)
        (slopes,) = pullback(jnp.ones_like(heights))
        return slopes**2

    return gain * expectation(squared_slope, variance)


def mean_field(
    activation: Activation, first: float, gain: float, bias: float, depth: int
) -> MeanField:
    """Follow the variances from layer to layer, not only their fixed point.

    Args:
        activation: φ, elementwise.
        first: q_1.
        gain: σ_w² of all layers after the first, that of the outputs included.
        bias: σ_b².
        depth: the number L of layers with an activation.
    """
    with jax.enable_x64(True):
        variances, factors = _follow(activation, depth, first, gain, bias)
        return MeanField(np.asarray(variances), np.asarray(factors))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _follow(
    activation: Activation, depth: int, first: float, gain: float, bias: float
) -> tuple[jax.Array, jax.Array]:
    def layer(variance: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        here = variance, factor(activation, variance, gain)
        return next_variance(activation, variance, gain, bias), here

    return jax.lax.scan(layer, jnp.asarray(first), length=depth)[1]
