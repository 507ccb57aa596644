"""Exact Gauss-Newton steps and natural gradients, solved in the smaller of two spaces."""

from __future__ import annotations

import jax
import optax

from fbackprop.curvature.base import Curvature
from fbackprop.curvature.dual import DualGaussNewton, GGNRows
from fbackprop.objective import Objective
from fbackprop.optim.common import ScalarOrSchedule, check_damping, with_learning_rate
from fbackprop.optim.precondition import precondition_by_curvature, with_curvature

SPACES = ("auto", "primal", "dual")


def exact_curvature(objective: Objective, key, rows: GGNRows, space: str) -> Curvature:
    """The Gauss-Newton matrix of a batch, to be solved in the space of parameters or of rows."""
    found: DualGaussNewton = objective.sweep(key, rows=rows)["rows"]
    n_rows = found.rows.examples * found.rows.columns
    primal = found.space.size <= n_rows if space == "auto" else space == "primal"
    return found.primal() if primal else found


def check_space(space: str) -> None:
    if space not in SPACES:
        raise ValueError(f"space={space!r}: choose one of {', '.join(map(repr, SPACES))}")


def rows_of(curvature: GGNRows | None, samples: int | None = None) -> GGNRows:
    """What a user has given for rows, checked; by default those of `samples`."""
    if curvature is None:
        return GGNRows(samples)
    if not isinstance(curvature, GGNRows):
        raise TypeError(f"curvature={curvature!r} must be a fb.GGNRows")
    return curvature


def gauss_newton(
    learning_rate: ScalarOrSchedule = 1.0,
    damping: ScalarOrSchedule | None = None,
    *,
    space: str = "auto",
    curvature: GGNRows | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Exact Gauss-Newton steps $-\eta (G + \lambda I)^{-1} g$ on each batch.

    G is the generalised Gauss-Newton matrix of the batch's mean loss, read off one sweep
    (`GGNRows`), which for `losses.softmax_cross_entropy` and other losses whose labels follow an
    exponential family is the Fisher matrix (Martens 2020, section 9.2). With fewer parameters than
    rows, N · C, it is factored as a matrix of P² elements; else by Woodbury's identity as the Gram
    matrix of (N · C)².

    Without damping a step of length one solves linear least squares, and is Newton's for a linear
    softmax regression. Where the curvature is singular the damping is raised to what a Cholesky
    factor needs (see `DualGaussNewton.solve`). Made for full batches: on small ones the step fits
    the batch alone (Buffelli et al. 2024), and a damping that fades makes it diverge.

    Args:
      learning_rate: η, a number or a schedule.
      damping: λ, a number not below zero or a schedule, in the units of the curvature; None for a
        fifth of the batch's loss, as of `precondition_by_curvature`.
      space: "primal", "dual" or "auto", the smaller.
      curvature: which rows; by default all, ``GGNRows()``.

    Returns:
      A transformation whose `update` takes ``objective=``, an `Objective`.
    """
    return _exact("gauss_newton", learning_rate, damping, space, rows_of(curvature))


def _exact(who: str, learning_rate, damping, space: str, rows: GGNRows):
    check_space(space)
    if damping is not None:
        check_damping(who, damping)

    def measure(objective: Objective, key: jax.Array) -> Curvature:
        return exact_curvature(objective, key, rows, space)

    precondition = with_curvature(precondition_by_curvature(damping), measure)
    return with_learning_rate(who, precondition, learning_rate)


def natural_gradient(
    learning_rate: ScalarOrSchedule = 0.3,
    damping: ScalarOrSchedule = 0.1,
    *,
    space: str = "auto",
    curvature: GGNRows | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Natural gradient steps $-\eta (F + \lambda I)^{-1} g$, the Fisher matrix F by sampling.

    F is estimated on each batch from random combinations of the columns of a root of the loss's
    Hessian, one for each example (Amari 1998; Martens 2020). Arguments are those of `gauss_newton`,
    with ``curvature=GGNRows(samples=1)`` by default.
    """
    rows = rows_of(curvature, samples=1)
    return _exact("natural_gradient", learning_rate, damping, space, rows)
