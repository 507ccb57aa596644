"""Steps scaled by a running average of the Gauss-Newton diagonal."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from fbackprop.curvature.diagonal import Diagonal
from fbackprop.optim.common import (
    ScalarOrSchedule,
    at_step,
    check_count,
    check_damping,
    check_fraction,
    check_positive,
    check_state,
    check_updates,
    is_finite,
    objective_of,
    where,
    with_learning_rate,
    zero_unless,
)
from fbackprop.quantities import FisherDiagonal, GGNDiagonal


class DiagonalState(NamedTuple):
    """State of `diagonal_gauss_newton`.

    Attributes:
      steps: how many so far.
      mean: running average of the gradient, like the parameters.
      diagonal: running average of the diagonal, like the parameters.
      measured: how many measurements the diagonal's average is of.
      skipped: how many steps were left out because they, or the gradient, were not finite, or the
        damping was below zero.
    """

    steps: jax.Array
    mean: Any
    diagonal: Any
    measured: jax.Array
    skipped: jax.Array


def diagonal_gauss_newton(
    learning_rate: ScalarOrSchedule = 0.03,
    damping: ScalarOrSchedule = 1e-2,
    *,
    momentum: float = 0.9,
    decay: float = 0.99,
    every: int = 10,
    clip: float | None = 1.0,
    curvature: GGNDiagonal | FisherDiagonal | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Steps $-\eta \, m / (h + \lambda)$, by averages m of the gradient and h of the diagonal.

    Every few steps h takes in the Gauss-Newton diagonal of the batch (Becker and LeCun 1988); m and
    h are corrected for their start at zero. Elements of $m / (h + \lambda)$ are clipped to
    [−clip, clip], as in Sophia-G (Liu et al. 2023, algorithm 3, where $\lambda$ is a lower bound):
    where curvature is small, the step is that of sign descent.

    Args:
      learning_rate: η, a number or a schedule.
      damping: λ, a number not below zero or a schedule, in the units of the curvature.
      momentum: decay of m.
      decay: decay of h at each measurement.
      every: after how many steps the diagonal is measured.
      clip: the largest element of a step of length one; None for no bound.
      curvature: which diagonal; by default ``GGNDiagonal(samples=1)``.
      seed: of the samples, where the objective has no key.

    Returns:
      A transformation whose `update` takes ``objective=``, an `Objective`.
    """
    who = "diagonal_gauss_newton"
    check_damping(who, damping)
    check_count(who, every=every)
    check_fraction(who, momentum=momentum, decay=decay)
    if clip is not None:
        check_positive(who, clip=clip)
    quantity = GGNDiagonal(samples=1) if curvature is None else curvature
    if not isinstance(quantity, GGNDiagonal | FisherDiagonal) or quantity.per_example:
        raise TypeError(
            f"{who}: curvature={quantity!r} must be a fb.GGNDiagonal or fb.FisherDiagonal of the "
            "batch"
        )

    def init(params):
        mean, diagonal = (jax.tree.map(_blank, params) for _ in range(2))
        steps, measured, skipped = (jnp.zeros((), jnp.int32) for _ in range(3))
        return DiagonalState(steps, mean, diagonal, measured, skipped)

    def update(updates, state, params=None, *, objective=None, **extra):
        del extra
        check_updates(who, updates, params)
        check_state(who, state, DiagonalState)
        problem = objective_of(objective, updates, who)

        def measured():
            key = jax.random.fold_in(jax.random.key(seed), state.steps)
            new = problem.sweep(key, diagonal=quantity)["diagonal"]
            new = jax.tree.map(lambda x: jnp.maximum(x, 0), new)  # of a loss that is not convex
            diagonal = optax.tree.update_moment(new, state.diagonal, decay, 1)
            diagonal = optax.tree.cast_like(diagonal, state.diagonal)
            after = diagonal, state.measured + 1
            return where(is_finite(diagonal), after, before)

        before = state.diagonal, state.measured
        is_time = (state.steps % every == 0) | (state.measured == 0)
        diagonal, count = lax.cond(is_time, measured, lambda: before)
        mean = optax.tree.update_moment(updates, state.mean, momentum, 1)
        mean = optax.tree.cast_like(mean, state.mean)
        given = at_step(damping, state.steps)
        h = optax.tree.bias_correction(diagonal, decay, jnp.maximum(count, 1))
        m = optax.tree.bias_correction(mean, momentum, state.steps + 1 - state.skipped)
        step = Diagonal(h).solve(m, given)
        if clip is not None:
            step = jax.tree.map(lambda x: jnp.clip(x, -clip, clip), step)
        usable = is_finite(updates, step) & (count > 0) & (given >= 0)
        mean = where(usable, mean, state.mean)
        skipped = state.skipped + jnp.where(usable, 0, 1)
        after = DiagonalState(state.steps + 1, mean, diagonal, count, skipped)
        return zero_unless(usable, step), after

    transformation = optax.GradientTransformationExtraArgs(init, update)
    return with_learning_rate(who, transformation, learning_rate)


def _blank(param):
    """Zeros for an average; of integers, which have no gradient, too."""
    dtype = jnp.result_type(param)
    return jnp.zeros(jnp.shape(param), dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.float32)
