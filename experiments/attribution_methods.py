"""Maps of the pixels that an answer is due to: every one from the same function of one image.

A function takes an image x, (H, W, C), to a real number, here a logit. A map has the image's shape.
There are two kinds of them: how *sensitive* the number is to each pixel, in its units per unit of
x, and what each pixel *contributes* to it, in its units.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

import fbackprop as fb

Function: TypeAlias = Callable[[jax.Array], jax.Array]
Kind: TypeAlias = Literal["sensitivity", "contribution", "relevance", "control"]


class Method(NamedTuple):
    """A way to explain.

    Attributes:
      label: what tables and figures call it.
      explain: from a function, an image and a random key to a map.
      kind: of map; "relevance" is a contribution that a sweep of relevances finds.
      sums_to: from a function and an image to what the map should sum to; None if to nothing.
    """

    label: str
    explain: Callable[[Function, jax.Array, jax.Array], jax.Array]
    kind: Kind = "contribution"
    sums_to: Callable[[Function, jax.Array], jax.Array] | None = None

    def ranked_by(self, pixels: jax.Array) -> jax.Array:
        """What the pixels of a map rank by, the most relevant the largest.

        Of sensitivities it is the absolute value (Samek et al. 2017, section III).
        """
        return jnp.abs(pixels) if self.kind == "sensitivity" else pixels


def methods(
    *,
    noise: float = 0.2,
    samples: int = 32,
    steps: int = 64,
    epsilon: float = 0.1,
    gamma: float = 0.25,
    alpha: float = 2.0,
) -> dict[str, Method]:
    """All of them, in the order of the figure.

    Args:
      noise: standard deviation of SmoothGrad's, in units of x.
      samples: how many noisy images it averages over.
      steps: of the integral of integrated gradients, which starts from zeros.
      epsilon: of LRP-ε, in units of the pre-activations.
      gamma: of LRP-γ.
      alpha: of LRP-αβ, whose β is α − 1.
    """

    def smooth(f: Function, x: jax.Array, key: jax.Array) -> jax.Array:
        return fb.credit.smooth_gradient(f, x, key, stddev=noise, samples=samples)

    def integrated(f: Function, x: jax.Array, key: jax.Array) -> jax.Array:
        return fb.credit.integrated_gradients(f, x, steps=steps)

    alpha_beta = fb.credit.alpha_beta(alpha, alpha - 1)
    return {
        "gradient": Method("gradient", _gradient(None), "sensitivity"),
        "gradient-times-input": Method(
            "gradient × input", lambda f, x, key: x * fb.grad(f)(x), sums_to=_value
        ),
        "smooth-gradient": Method("SmoothGrad", smooth, "sensitivity"),
        "integrated-gradients": Method(
            "integrated gradients", integrated, sums_to=lambda f, x: f(x) - f(jnp.zeros_like(x))
        ),
        "deconvnet": Method("deconvnet", _gradient(fb.credit.deconvnet()), "sensitivity"),
        "guided-backprop": Method(
            "guided backprop", _gradient(fb.credit.guided_backprop()), "sensitivity"
        ),
        "lrp-epsilon": Method("LRP-ε", _relevance(fb.credit.epsilon(epsilon)), "relevance", _value),
        "lrp-gamma": Method("LRP-γ", _relevance(fb.credit.gamma(gamma)), "relevance", _value),
        "lrp-alpha-beta": Method("LRP-αβ", _relevance(alpha_beta), "relevance", _value),
    }


CONTROLS = {
    "brightness": Method("the image itself", lambda f, x, key: x, "control"),
    "random": Method("random", lambda f, x, key: jax.random.uniform(key, x.shape), "control"),
}
"""Maps that know nothing of the function."""


def _gradient(rules: Mapping | None) -> Callable[[Function, jax.Array, jax.Array], jax.Array]:
    return lambda f, x, key: fb.grad(f, rules=rules)(x)


def _relevance(rules: Mapping) -> Callable[[Function, jax.Array, jax.Array], jax.Array]:
    return lambda f, x, key: fb.credit.relevance(f, x, rules)


def _value(f: Function, x: jax.Array) -> jax.Array:
    return f(x)
