"""The quadratic model of a loss around its parameters, of which steps take their length."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fbackprop.curvature.products import GaussNewton
from fbackprop.objective import Objective

# Martens and Grosse (2015, section 8) measure the curvature along a direction on a quarter. With 64
# examples single runs on digits ended orders of magnitude above the others, with 128 none did.
PART, LEAST = 8, 128


class QuadraticModel(NamedTuple):
    r"""The model of a loss on the plane of two directions $\delta_i$.

    $$M(\textstyle\sum_i w_i \delta_i) = L + (s + r)^T w + \tfrac12 w^T A w$$

    Attributes:
      value: L, the loss at the parameters, a scalar.
      slope: $s_i = g^T \delta_i$ with the loss's gradient g.
      rest: $r_i$, the same of what the updates have beyond g, of weight decay for instance.
      matrix: $A_{ij} = \delta_i^T (G + \lambda I) \delta_j$.
    """

    value: jax.Array
    slope: jax.Array
    rest: jax.Array
    matrix: jax.Array

    @classmethod
    def of(cls, objective: Objective, directions: tuple, damping, rest=None) -> QuadraticModel:
        """That of an objective; `rest` is a tree like the parameters, or None for zeros."""
        operator = GaussNewton.of(objective)
        moved = [operator.pushforward(x) for x in directions]
        packed = [_packed(x) for x in directions]
        dot = optax.tree.vdot

        def between(i, j):
            return operator.between(moved[i], moved[j]) + damping * dot(packed[i], packed[j])

        across = between(0, 1)
        matrix = jnp.array([[between(0, 0), across], [across, between(1, 1)]])
        slope = jnp.stack([operator.slope(x) for x in moved])
        beyond = jnp.zeros_like(slope)
        if rest is not None:
            rest = _packed(rest)
            beyond = jnp.stack([dot(rest, x) for x in packed])
        return cls(operator.value, slope, beyond, matrix)

    def minimum(self) -> jax.Array:
        """w at the minimum, (2,)."""
        return -_solved(self.matrix, self.slope + self.rest)

    def promised(self, weights) -> jax.Array:
        """L − M without r: by how much the loss is to fall."""
        return -(self.slope + self.matrix @ weights / 2) @ weights


def part_of(objective: Objective) -> Objective:
    """The same for one example in `PART`, or for `LEAST` if that is more; whole if it has weights.

    The slope along a direction is to be of the same examples as the curvature. Late in training a
    few examples have nearly all the loss: with their slope, but without their curvature where they
    are not in the part, a step would be far too long.
    """
    stride = min(PART, objective.n_examples // LEAST)
    if objective.weights is not None or stride < 2:
        return objective
    batch, further = jax.tree.map(lambda x: x[::stride], (objective.batch, objective.further))
    return dataclasses.replace(objective, batch=batch, further=further)


def rest_of(updates, gradient, objective: Objective):
    """What the updates have beyond the objective's gradient, or None for nothing.

    Args:
      updates: the gradient, or what other transformations have made of it.
      gradient: the gradient, if it is at hand, or None.
      objective: of all parameters, those that are not trained included.
    """
    if gradient is None:
        _, gradient = objective.of_trained(updates).value_and_gradient()
    else:
        gradient = objective.at(gradient).of_trained(updates).params
    pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(gradient), strict=True)
    return None if all(x is y for x, y in pairs) else optax.tree.sub(updates, gradient)


def _packed(tree) -> list:
    """The leaves, with all vectors as one: a product of two trees is compiled leaf by leaf."""
    leaves = jax.tree.leaves(tree)
    vectors = [jnp.ravel(x) for x in leaves if x.ndim < 2]
    return [x for x in leaves if x.ndim > 1] + ([jnp.concatenate(vectors)] if vectors else [])


def _solved(matrix, slope):
    """The solution of two equations, scaled to a unit diagonal; 0 for a row of zeros.

    A little is added to that diagonal: of equations that say the same, which two parallel
    directions make, the solution is then the least one, where it would be of rounding errors alone.
    """
    scale = jnp.sqrt(jnp.diagonal(matrix))
    scale = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
    s, t = scale * slope
    across = matrix[0, 1] * scale[0] * scale[1]
    more = 100 * jnp.finfo(matrix.dtype).eps
    rest = jnp.maximum(1 - across**2, 0) + more * (2 + more)
    return scale * jnp.stack([s - across * t + more * s, t - across * s + more * t]) / rest
