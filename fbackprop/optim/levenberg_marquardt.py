"""The Levenberg-Marquardt method for any loss."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fbackprop.curvature.dual import GGNRows
from fbackprop.model import check_params
from fbackprop.optim.common import (
    check_start,
    check_state,
    check_updates,
    is_finite,
    objective_of,
    scalar_like,
    zero_unless,
)
from fbackprop.optim.exact import check_space, exact_curvature, rows_of
from fbackprop.optim.reduction import Rule, adapted, reduction_ratio, slope_along

RULE = Rule(shrink=1 / 3, grow=2.0, rejected=4.0)


class LevenbergMarquardtState(NamedTuple):
    """State of `levenberg_marquardt`.

    Attributes:
      steps: how many so far, accepted or not.
      damping: λ of the next step.
      ratio: the last step's reduction of the loss over the predicted one; 1/2 where that is less
        than the loss's rounding error, but 1 if the damping exceeds the mean eigenvalue.
      accepted: whether the last step was taken.
    """

    steps: jax.Array
    damping: jax.Array
    ratio: jax.Array
    accepted: jax.Array


def levenberg_marquardt(
    damping: float = 1.0, *, space: str = "auto", curvature: GGNRows | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Exact damped Gauss-Newton steps, taken if they lower the loss; damping by the ratio.

    The step $d = -(G + \lambda I)^{-1} g$ promises $-g^T d - \tfrac12 d^T G d$. If the loss of the
    batch falls by more than 3/4 of this λ is divided by 3, by less than 1/4 doubled; if it does not
    fall, the update is zero and λ is multiplied by 4 (Levenberg 1944; Marquardt 1963; the
    thresholds of Fletcher 1971). For the full batch, or large ones.

    `fbackprop.least_squares` is the method for small dense fits to the last digit.

    Args:
      damping: λ at the start, in the units of the curvature; it soon finds its size.
      space, curvature: as of `gauss_newton`.

    Returns:
      A transformation whose `update` takes ``objective=``, an `Objective`, and may be given
      ``value=``, the loss at the parameters, and ``value_fn=``, the loss as a function of them.
    """
    check_start("levenberg_marquardt", damping)
    check_space(space)
    rows = rows_of(curvature)

    def init(params):
        check_params(params)
        return LevenbergMarquardtState(
            steps=jnp.zeros((), jnp.int32),
            damping=scalar_like(damping, params),
            ratio=scalar_like(1.0, params),
            accepted=jnp.ones((), bool),
        )

    def update(updates, state, params=None, *, objective=None, value=None, value_fn=None, **extra):
        del extra
        check_updates("levenberg_marquardt", updates, params)
        check_state("levenberg_marquardt", state, LevenbergMarquardtState)
        problem = objective_of(objective, updates, "levenberg_marquardt")
        value_fn = problem.value if value_fn is None or problem is not objective else value_fn
        value = value_fn(params) if value is None else value
        key = jax.random.fold_in(jax.random.key(0), state.steps)
        model = exact_curvature(problem, key, rows, space)
        change = optax.tree.scale(-1.0, model.solve(updates, state.damping))
        predicted = -optax.tree.vdot(updates, change) - model.quadratic(change) / 2
        after = value_fn(optax.apply_updates(params, change))
        in_one = model.space.wide
        slope = slope_along(in_one(updates), in_one(params))
        mean = model.trace() / model.space.size  # eigenvalue
        ratio = reduction_ratio(value, after, predicted, slope, lambda: state.damping > mean)
        ratio = ratio.astype(state.ratio.dtype)
        accepted = (ratio > 0) & (after <= value) & is_finite(change)
        # Below this a solution is that of more damping.
        least = jnp.finfo(ratio.dtype).eps ** 0.75 * mean
        after = LevenbergMarquardtState(
            state.steps + 1, adapted(state.damping, ratio, RULE, least), ratio, accepted
        )
        return zero_unless(accepted, change), after

    return optax.GradientTransformationExtraArgs(init, update)
