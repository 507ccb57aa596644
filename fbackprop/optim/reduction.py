"""Damping that follows how well a quadratic model predicts the loss."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

GOOD, POOR = 0.75, 0.25
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


def reduction_ratio(before, after, predicted) -> jax.Array:
    """The loss's reduction over the predicted one; −1 where the loss is not finite.

    Where the model promises no reduction, or less than the loss's rounding error, it is 1 if the
    loss did not rise and −1 if it did: a step that is not the model's minimum, of a learning rate
    and momentum, may be promised a rise, and does better than that with too much damping.
    """
    actual = before - after
    noise = jnp.finfo(actual.dtype).eps * jnp.abs(before)
    ratio = jnp.where(predicted > noise, actual / jnp.where(predicted > noise, predicted, 1), 1.0)
    ratio = jnp.where((predicted <= noise) & (actual < -noise), -1.0, ratio)
    return jnp.where(jnp.isfinite(after) & jnp.isfinite(ratio), ratio, -1.0)


def adapted(damping, ratio, rule: Rule) -> jax.Array:
    """The next damping, never zero and never beyond `LARGEST`."""
    factor = jnp.where(ratio > GOOD, rule.shrink, jnp.where(ratio < POOR, rule.grow, 1.0))
    factor = jnp.where(ratio > 0, factor, rule.rejected)
    least = jnp.finfo(damping.dtype).tiny ** 0.5
    return jnp.clip(damping * factor.astype(damping.dtype), least, LARGEST)
