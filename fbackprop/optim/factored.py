"""KFAC and EKFAC: steps with running averages of Kronecker factors."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from fbackprop.curvature.factors import EigenFactors, KroneckerFactors
from fbackprop.model import check_params
from fbackprop.objective import Objective
from fbackprop.optim.common import (
    Pending,
    ScalarOrSchedule,
    at_step,
    check_count,
    check_fraction,
    check_positive,
    check_rate,
    check_start,
    check_state,
    check_updates,
    complete,
    is_finite,
    objective_of,
    scalar_like,
    where,
)
from fbackprop.optim.quadratic import QuadraticModel, part_of, rest_of
from fbackprop.optim.reduction import Rule, adapted, reduction_ratio
from fbackprop.quantities import Kronecker
from fbackprop.sites import wide

# How fast damping follows the loss. Martens and Grosse take 0.95; on the autoencoder of the
# benchmark it fell throughout, and falling faster reached lower losses at every step.
OMEGA = 0.9
# Of how many examples factors are averages. Fewer make small batches diverge, more are stale: on
# the digits at batches of 128 and on the autoencoder at 512, this many was the best of those tried.
MEMORY = 2560
# So many times at the start factors are renewed in every step: curvature changes fast then.
EARLY = 5
# In a batch of so many damping is not less than the curvature's mean eigenvalue, in a larger one it
# may be less by the square of the number. With a quarter of that digits diverge at batches of 32.
SMALL = 32

SAMPLED = Kronecker(samples=1, vectors="joint")


class FactoredState(NamedTuple):
    """State of `kfac` and `ekfac`.

    Attributes:
      steps: how many so far.
      damping: λ.
      ratio: the loss's reduction over the predicted one, when it was last measured.
      velocity: the last update, like the parameters.
      measured: how many measurements the factors' averages are of.
      factors: running averages of the factors, `KroneckerFactors`.
      solver: what preconditions: factors inverted, or turned to their eigenvectors. Both are
        `Pending` before the first step.
      skipped: how many steps were left out because the update was not finite.
    """

    steps: jax.Array
    damping: jax.Array
    ratio: jax.Array
    velocity: Any
    measured: jax.Array
    factors: Any
    solver: Any
    skipped: jax.Array


@dataclasses.dataclass(frozen=True)
class Measure:
    """The factors of an objective's batch. A class, and no closure: states that hold it pickle."""

    quantity: Kronecker

    def __call__(self, objective: Objective, key) -> KroneckerFactors:
        return _measured(self.quantity, objective, key)


@dataclasses.dataclass(frozen=True)
class FirstSolver:
    """What solves with a batch's factors alone: its shapes are those of all later ones."""

    make: Callable
    measure: Measure

    def __call__(self, objective: Objective, key):
        return self.make(self.measure(objective, key), scalar_like(1.0, objective.params))


# Compiled, so that their traces are kept: the state's shapes take one, the step another. What is
# handed on is the function around it, since nothing that is jit-ted pickles.


@functools.partial(jax.jit, static_argnums=0)
def _measured(quantity: Kronecker, objective: Objective, key) -> KroneckerFactors:
    return KroneckerFactors(objective.sweep(key, factors=quantity)["factors"])


_inverse = jax.jit(KroneckerFactors.inverse)
_eigen = jax.jit(KroneckerFactors.eigen)


def _inverted(factors: KroneckerFactors, damping) -> KroneckerFactors:
    return _inverse(factors, damping)


def _turned(factors: KroneckerFactors, damping) -> EigenFactors:
    del damping
    return _eigen(factors)


class Solver(NamedTuple):
    """How averaged factors precondition.

    Attributes:
      make: ``make(factors, damping)``, of what the factors are; a function of a module.
      update: ``update(solver, objective, key)``, what was made with what it measures of the batch.
      solve: ``solve(solver, gradient, damping)``.
    """

    make: Callable
    update: Callable
    solve: Callable


def kfac(
    learning_rate: ScalarOrSchedule | None = None,
    damping: ScalarOrSchedule = 1.0,
    *,
    momentum: float = 0.9,
    decay: float | None = None,
    every: int = 5,
    adaptive: bool = True,
    norm_constraint: float | None = None,
    curvature: Kronecker | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Kronecker-factored approximate curvature (Martens and Grosse 2015).

    Running averages of the factors of every leaf's block are inverted every few steps, with the
    damping divided among them (`KroneckerFactors.inverse`), and precondition the gradient:
    Δ = −(A ⊗ B + λ)⁻¹ g. Without a learning rate the update is αΔ + μδ₀ with the last update δ₀ and
    the α, μ that minimise the quadratic model of the loss,

    $$M(\delta) = g^T \delta + \tfrac12 \delta^T (G + \lambda I) \delta$$

    (sections 6.4 and 7). With one, it is −ηΔ + momentum · δ₀. Every few steps λ is shrunk where the
    loss fell by more than 3/4 of what M had promised, and grown where it was less than 1/4 of it
    (section 6.5), but not below 32²/N² times the mean eigenvalue of the averaged factors' matrix.
    With weights, N is (Σw)²/Σw².

    M is of an eighth of the batch, or 128 examples if that is more, its slope as well as its
    curvature, with what other transformations have added to the gradient; of the whole batch where
    examples have weights. Batches of fewer than 32 say too little of the other examples: give these
    a learning rate, and ``adaptive=False``.

    Args:
      learning_rate: η, a number or a schedule; None for α and μ of the quadratic model, which
        needs no tuning.
      damping: λ at the start, in the units of the curvature; where it is not adaptive, a number or
        a schedule.
      momentum: of a step with a learning rate.
      decay: of the running averages from one renewal to the next; they start as plain means. None
        for max(0, 1 − N/2560): averages of about 2,560 examples.
      every: after how many steps factors, inverses and damping are renewed; factors and inverses
        in every step until they were measured five times, too.
      adaptive: whether λ follows the loss.
      norm_constraint: the largest −η² gᵀΔ of a step with a learning rate: longer steps are scaled
        down to it, a trust region in the model's distribution (Ba, Grosse and Martens 2017,
        section 5). None for no bound.
      curvature: which factors; by default ``Kronecker(samples=1, vectors="joint")``.
      seed: of the samples, where the objective has no key.

    Returns:
      A transformation whose `update` takes ``objective=``, an `Objective`, and should be given
      ``grad=``, the gradient as it was before other transformations, or has to compute it for α and
      μ. Its state is complete after the first update, or from the start with `Step.init`.
    """
    solver = Solver(
        make=_inverted,
        update=lambda solver, objective, key: solver,
        solve=lambda solver, gradient, damping: solver.matvec(gradient),
    )
    quantity = SAMPLED if curvature is None else curvature
    return _factored(
        "kfac", solver, quantity, learning_rate, damping, momentum, decay, every, adaptive,
        norm_constraint, seed,
    )  # fmt: skip


def ekfac(
    learning_rate: ScalarOrSchedule | None = None,
    damping: ScalarOrSchedule = 1.0,
    *,
    momentum: float = 0.9,
    decay: float | None = None,
    every: int = 20,
    adaptive: bool = True,
    norm_constraint: float | None = None,
    curvature: Kronecker | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""KFAC with the eigenvalues corrected (George et al. 2018).

    The factors' eigenvectors are a basis in which the diagonal is that of the Gauss-Newton matrix
    itself, $s = \operatorname{E}[(U_A^T G U_B)^2]$ (`EigenvalueCorrection`), where KFAC takes the
    products of the factors' eigenvalues. The damping is exact. Every few steps the factors are
    averaged and decomposed, and s measured on the batch.

    Arguments are those of `kfac`. An eigendecomposition costs about ten inverses: renew them less
    often.
    """
    quantity = SAMPLED if curvature is None else curvature

    def update(solver: EigenFactors, objective: Objective, key) -> EigenFactors:
        found = objective.sweep(key, values=quantity.along(solver.blocks))
        return solver.with_values(found["values"])

    solver = Solver(
        make=_turned,
        update=update,
        solve=lambda solver, gradient, damping: solver.solve(gradient, damping),
    )
    return _factored(
        "ekfac", solver, quantity, learning_rate, damping, momentum, decay, every, adaptive,
        norm_constraint, seed,
    )  # fmt: skip


def _factored(
    who: str, solver: Solver, quantity: Kronecker, learning_rate, damping, momentum, decay, every,
    adaptive, norm_constraint, seed,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    if adaptive:
        check_start(who, damping)
    else:
        check_positive(who, damping=damping)
    check_count(who, every=every)
    check_rate(who, learning_rate)
    check_fraction(who, momentum=momentum, **({} if decay is None else {"decay": decay}))
    if norm_constraint is not None:
        check_positive(who, norm_constraint=norm_constraint)
    if not isinstance(quantity, Kronecker):
        raise TypeError(f"{who}: curvature={quantity!r} must be a fb.Kronecker")

    measure = Measure(quantity)

    def init(params):
        check_params(params)
        structure = jax.tree.structure(params)
        return FactoredState(
            steps=jnp.zeros((), jnp.int32),
            damping=scalar_like(at_step(damping, 0), params),
            ratio=scalar_like(1.0, params),
            velocity=jax.tree.map(jnp.zeros_like, params),
            measured=jnp.zeros((), jnp.int32),
            factors=Pending(measure, structure),
            solver=Pending(FirstSolver(solver.make, measure), structure),
            skipped=jnp.zeros((), jnp.int32),
        )

    def refreshed(state: FactoredState, objective: Objective, key):
        """Whether new factors are finite, how many are averaged, their averages and the solver.

        Where they are not the rest is the old.
        """
        new = measure(objective, key)
        leaf = new.other_part(state.factors)
        if leaf is not None:
            raise ValueError(
                f"{who}: this batch meets other elements of params{leaf} than the first did: index "
                "it with an array instead of slicing it, or keep the examples' shapes as they are"
            )
        most = _memory(objective.n_effective) if decay is None else decay
        # A plain mean to begin with.
        keep = jnp.minimum(state.measured / (state.measured + 1), most)
        factors = optax.tree.update_moment(new, state.factors, keep, 1)
        made = solver.update(solver.make(factors, state.damping), objective, key)
        # Traces tell: no element of a positive semi-definite matrix exceeds its diagonal's. The
        # inverse of an infinite factor is finite.
        finite = is_finite(factors.trace(), made.trace())
        old = state.measured, state.factors, state.solver
        return finite, *where(finite, (state.measured + 1, factors, made), old)

    def update(updates, state, params=None, *, objective=None, grad=None, **extra):
        del extra
        check_updates(who, updates, params)
        check_state(who, state, FactoredState)
        problem = objective_of(objective, updates, who)
        state = complete(state, objective)
        if not adaptive:
            given = at_step(damping, state.steps)
            check_positive(who, damping=given)
            state = state._replace(damping=jnp.asarray(given, state.damping.dtype))
        part = part_of(problem)
        key = jax.random.fold_in(jax.random.key(seed), state.steps)
        is_time = state.steps % every == 0
        usable, measured, factors, made = lax.cond(
            is_time | (state.measured < jnp.minimum(EARLY, every)),
            lambda: refreshed(state, problem, key),
            lambda: (jnp.array(True), state.measured, state.factors, state.solver),
        )
        direction = solver.solve(made, jax.tree.map(wide, updates), state.damping)
        direction = optax.tree.scale(-1.0, direction)
        both = direction, state.velocity
        model = None  # with a learning rate it is needed now and then alone, by `judge`
        if learning_rate is None:
            rest = rest_of(updates, grad, objective)
            model = QuadraticModel.of(part, both, state.damping, rest)
            weights = model.minimum()
        else:
            rate = at_step(learning_rate, state.steps)
            if norm_constraint is not None:
                size = -optax.tree.vdot(updates, direction) * rate**2
                rate = rate * jnp.sqrt(jnp.minimum(1, norm_constraint / jnp.maximum(size, 1e-30)))
            weights = jnp.array([rate, momentum])
        # The last update is finite, and the model has the squares of the direction in it.
        finite = is_finite(weights, direction if model is None else model[1:])
        finite &= usable & (state.damping >= 0)
        # Through a branch: the kernel of every leaf would compute both again.
        finite, weights = where(finite, (True, weights), (False, jnp.zeros_like(weights)))

        def combined(x, y, param):
            total = weights[0] * x + weights[1] * y
            return jnp.where(finite, total, 0).astype(param.dtype)

        change = jax.tree.map(combined, *both, params)
        judged = state.damping, state.ratio
        if adaptive:

            def judge():
                expected = model or QuadraticModel.of(part, both, state.damping)
                after = part.value(optax.apply_updates(params, change))
                promised = expected.promised(weights)
                mean = factors.trace() / factors.space.size
                ratio = reduction_ratio(
                    expected.value, after, promised, excess=lambda: state.damping > mean
                ).astype(state.ratio.dtype)
                return _next(state.damping, ratio, every, mean, problem.n_effective), ratio

            judged = lax.cond(is_time & finite, judge, lambda: (state.damping, state.ratio))
        after = FactoredState(
            steps=state.steps + 1,
            damping=judged[0],
            ratio=judged[1],
            velocity=change,
            measured=measured,
            factors=factors,
            solver=made,
            skipped=state.skipped + jnp.where(finite, 0, 1),
        )
        return change, after

    return optax.GradientTransformationExtraArgs(init, update)


def _next(damping, ratio, every, mean, n_examples):
    """λ · ω or λ / ω with ω = `OMEGA` for every step since the last time (section 6.5).

    Not below the factors' matrix's mean eigenvalue times `SMALL`²/N²: the ratio is of one
    batch, and knows not what a step does to the others. Without a bound λ falls until steps fit
    their batch alone, and the sooner the fewer examples it has.
    """
    omega = jnp.asarray(OMEGA, damping.dtype) ** every
    least = (SMALL / n_examples) ** 2 * mean
    return adapted(damping, ratio, Rule(shrink=omega, grow=1 / omega, rejected=1 / omega), least)


def _memory(n_examples):
    """The decay with which averages are of about `MEMORY` examples."""
    return jnp.maximum(1 - n_examples / MEMORY, 0.0)
