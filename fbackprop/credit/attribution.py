"""Which parts of an input an answer is due to: changed gradients and averages of gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fbackprop.columns import is_count
from fbackprop.program import Literal, is_inexact, type_of
from fbackprop.reverse import grad
from fbackprop.rewrite import Anywhere, Seen

RELU6 = Anywhere(("relu6",))


def is_relu(eqn: Seen) -> bool:
    """Whether an equation is a rectifier: a function called relu, or a maximum with 0."""
    if eqn.name == "relu" and eqn.arity == 1:
        return True
    if eqn.primitive.name != "max":
        return False
    return any(isinstance(v, Literal) and jnp.ndim(v.val) == 0 and v.val == 0 for v in eqn.inputs)


def guided_backprop() -> dict:
    """Guided backpropagation: back through a rectifier only where input and signal are positive.

    Springenberg, Dosovitskiy, Brox and Riedmiller 2015, "Striving for simplicity: the all
    convolutional net", section 3.4. Rectifiers are every `relu` and `relu6`, and every maximum with
    the number zero, in whatever function or library they stand; a zero that is an array or an
    argument, as that of ``jnp.clip(x, 0)``, is not seen.
    """
    return {
        is_relu: _at_rectifier(lambda ct, out: (out > 0) & (ct > 0)),
        RELU6: _at_rectifier(lambda ct, out: (out > 0) & (out < 6) & (ct > 0)),
    }


def deconvnet() -> dict:
    """The deconvolutional network: back through a rectifier where the signal is positive.

    Zeiler and Fergus 2014, "Visualizing and understanding convolutional networks", section 2.1.
    Rectifiers are those of `guided_backprop`.
    """
    rule = _at_rectifier(lambda ct, out: ct > 0)
    return {is_relu: rule, RELU6: rule}


def _at_rectifier(passes: Callable) -> Callable:
    def rule(ct, out, eqn):
        found = jnp.where(passes(ct, out), ct, jnp.zeros_like(ct))
        literal = [isinstance(v, Literal) for v in eqn.inputs[: eqn.arity]]
        return tuple(None if is_zero else found for is_zero in literal)

    return rule


def integrated_gradients(
    f: Callable, x, baseline=None, *, steps: int = 64, rules: Mapping | None = None
):
    """Integrated gradients: ``(x − x′) ⊙ ∫₀¹ ∇f(x′ + α(x − x′)) dα``, by Gauss-Legendre quadrature.

    They sum to ``f(x) − f(x′)``, up to the quadrature (Sundararajan, Taly and Yan 2017, "Axiomatic
    attribution for deep networks", equation 1).

    Args:
      f: function of `x` to a real scalar.
      x: an array or a pytree of arrays.
      baseline: x′, like `x`; by default zeros.
      steps: how many gradients to take, one after the other.
      rules: other backward rules, as of `grad`.

    Returns:
      A pytree like `x`.
    """
    if not is_count(steps):
        raise ValueError(f"steps={steps}: give a whole number of at least one")
    if baseline is None:
        baseline = jax.tree.map(jnp.zeros_like, x)
    given, wanted = (jax.tree.map(jnp.shape, tree) for tree in (baseline, x))
    if given != wanted:
        raise ValueError(
            f"the baseline has the shapes {given}, but x {wanted}: give a baseline like x"
        )
    points, weights = _gauss_legendre(steps)
    gradient = grad(f, rules=rules)

    def step(total, at):
        alpha, weight = at
        between = jax.tree.map(lambda a, b: _mix(b, a, alpha), x, baseline)
        g = gradient(between)
        return jax.tree.map(lambda t, g: t + weight.astype(g.dtype) * g, total, g), None

    start = jax.tree.map(jnp.zeros_like, x)
    mean, _ = lax.scan(step, start, (points, weights))
    return jax.tree.map(lambda a, b, g: (a - b) * g, x, baseline, mean)


def _mix(a, b, alpha):
    return a + alpha.astype(jnp.result_type(a)) * (b - a)


def _gauss_legendre(n: int):
    """Nodes and weights on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return jnp.asarray((nodes + 1) / 2), jnp.asarray(weights / 2)


def smooth_gradient(
    f: Callable,
    x,
    key: jax.Array,
    *,
    stddev: float,
    samples: int = 32,
    rules: Mapping | None = None,
):
    """SmoothGrad: the mean gradient over noisy copies of the input.

    Smilkov et al. 2017, "SmoothGrad: removing noise by adding noise", equation 2.

    Args:
      f: function of `x` to a real scalar.
      x: an array or a pytree of arrays.
      key: a `jax.random.key`.
      stddev: of the noise, in the units of `x`.
      samples: how many copies, one after the other.
      rules: other backward rules, as of `grad`.

    Returns:
      A pytree like `x`.
    """
    if not is_count(samples):
        raise ValueError(f"samples={samples}: give a whole number of at least one")
    leaves, structure = jax.tree.flatten(x)
    gradient = grad(f, rules=rules)

    def step(total, key):
        keys = jax.random.split(key, len(leaves))
        noisy = [a + _normal(k, a, stddev) for a, k in zip(leaves, keys, strict=True)]
        return jax.tree.map(jnp.add, total, gradient(structure.unflatten(noisy))), None

    total, _ = lax.scan(step, jax.tree.map(jnp.zeros_like, x), jax.random.split(key, samples))
    return jax.tree.map(lambda t: t / samples, total)


def _normal(key, x, stddev):
    dtype = jnp.result_type(x)
    if not is_inexact(type_of(x)):
        raise TypeError(f"noise is added to floating-point inputs, but one is {dtype}")
    return jnp.asarray(stddev).astype(dtype) * jax.random.normal(key, jnp.shape(x), dtype)
