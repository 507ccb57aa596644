"""Damping that follows how well a quadratic model predicts the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike

GOOD, POOR = 0.75, 0.25
UNTOLD = 0.5  # leaves the damping
LARGEST = 1e12


class Rule(NamedTuple):
    """How damping is adapted.

    Attributes:
      shrink: factor where the reduction is more than `GOOD` of the predicted one.
      grow: factor where it is less than `POOR` of it.
      rejected: factor where the loss does not fall.
    """

    shrink: ArrayLike
    grow: ArrayLike
    rejected: ArrayLike


def reduction_ratio(
    before, after, predicted, slope=0.0, excess: Callable[[], Any] = lambda: False
) -> jax.Array:
    """The loss's reduction over the predicted one; −1 where the loss is not finite.

    Where the model promises no more than the loss's rounding error nothing can be told: it is
    `UNTOLD` if the loss rose by no more, and 1 if that is for too much damping: where it exceeds
    the curvature, or where the model promises a rise, as it may of a step that is not its minimum
    (of a learning rate and momentum).

    Args:
      before, after: the loss.
      predicted: its reduction.
      slope: Σ|θ ∂ℓ/∂θ|, by which multiples of ε the loss changes as parameters are rounded.
      excess: whether the damping exceeds the curvature; asked for where nothing can be told.
    """
    actual = before - after
    noise = jnp.finfo(actual.dtype).eps * (jnp.abs(before) + slope)
    told = predicted > noise
    exceeds = lax.cond(told, lambda: jnp.array(False), lambda: jnp.asarray(excess()))
    best = jnp.where((predicted < -noise) | exceeds, 1.0, UNTOLD)
    ratio = jnp.where(told, actual / jnp.where(told, predicted, 1), best)
    ratio = jnp.where(~told & (actual < -noise), -1.0, ratio)
    return jnp.where(jnp.isfinite(after) & jnp.isfinite(ratio), ratio, -1.0)


def slope_along(gradient, params) -> jax.Array:
    """Σ|θ ∂ℓ/∂θ|."""
    return optax.tree.sum(jax.tree.map(lambda g, p: jnp.sum(jnp.abs(g * p)), gradient, params))


def adapted(damping, ratio, rule: Rule, least) -> jax.Array:
    """The next damping, never zero and never beyond `LARGEST`; not below `least`, if finite."""
    factor = jnp.where(ratio > GOOD, rule.shrink, jnp.where(ratio < POOR, rule.grow, 1.0))
    factor = jnp.where(ratio > 0, factor, rule.rejected)
    smallest = jnp.finfo(damping.dtype).tiny ** 0.5
    found = jnp.clip(damping * factor.astype(damping.dtype), smallest, LARGEST)
    return jnp.maximum(found, jnp.where(jnp.isfinite(least), least, 0).astype(found.dtype))
