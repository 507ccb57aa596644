"""Hessian-free optimization: conjugate gradients on products with the Gauss-Newton matrix."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from fbackprop.curvature.products import GaussNewton
from fbackprop.curvature.space import Space
from fbackprop.model import check_params
from fbackprop.optim.common import (
    check_count,
    check_fraction,
    check_start,
    check_state,
    check_updates,
    is_finite,
    objective_of,
    scalar_like,
    where,
    zero_unless,
)
from fbackprop.optim.reduction import Rule, adapted, reduction_ratio, slope_along

RULE = Rule(shrink=2 / 3, grow=3 / 2, rejected=3 / 2)  # section 4.1
PROGRESS = 5e-4  # ε of section 4.4
KEPT, SPACING = 16, 1.5  # iterates kept for backtracking, at powers of the spacing
WINDOW = 64  # the longest stretch over which progress is judged
SHORTENINGS, SHORTER = 30, 0.7  # of the line search


class HessianFreeState(NamedTuple):
    """State of `hessian_free`.

    Attributes:
      steps: how many so far.
      damping: λ of the next step.
      ratio: the last step's reduction of the loss over that predicted before it was shortened.
      iterations: products with the curvature that it spent.
      direction: the last solution of the conjugate gradients, where the next start.
    """

    steps: jax.Array
    damping: jax.Array
    ratio: jax.Array
    iterations: jax.Array
    direction: Any


def hessian_free(
    damping: float = 1.0, *, max_iterations: int = 250, warm_start: float = 0.95
) -> optax.GradientTransformationExtraArgs:
    r"""Hessian-free optimization with the Gauss-Newton matrix (Martens 2010).

    The quadratic model $q(d) = g^T d + \tfrac12 d^T (G + \lambda I) d$ is minimised by conjugate
    gradients, which start from a part of the last solution and stop when the last k iterations have
    gained less than kε of what all have (section 4.4). Of the iterates on the way the one of the
    lowest loss is taken, going back from the last (section 4.6), and shortened until the loss
    falls. λ follows the reduction ratio (section 4.1). For full batches, or large ones.

    Args:
      damping: λ at the start, in the units of the curvature.
      max_iterations: the most products with the curvature in a step.
      warm_start: the part of the last solution to start from, below one.

    Returns:
      A transformation whose `update` takes ``objective=``, an `Objective`, and may be given
      ``value=``, the loss at the parameters. An update that would not lower the loss is zero.
    """
    check_start("hessian_free", damping)
    check_count("hessian_free", max_iterations=max_iterations)
    check_fraction("hessian_free", warm_start=warm_start)

    def init(params):
        check_params(params)
        return HessianFreeState(
            steps=jnp.zeros((), jnp.int32),
            damping=scalar_like(damping, params),
            ratio=scalar_like(1.0, params),
            iterations=jnp.zeros((), jnp.int32),
            direction=Space.of(params).wide(jax.tree.map(jnp.zeros_like, params)),
        )

    def update(updates, state, params=None, *, objective=None, value=None, **extra):
        del extra
        check_updates("hessian_free", updates, params)
        check_state("hessian_free", state, HessianFreeState)
        problem = objective_of(objective, updates, "hessian_free")
        value = problem.value() if value is None else value
        value = jnp.asarray(value, state.ratio.dtype)
        operator = GaussNewton.of(problem)

        def loss(change):
            return problem.value(optax.apply_updates(params, change)).astype(state.ratio.dtype)

        # In one precision, single at least: sums of many small numbers are all there is to it.
        in_one = Space.of(params).wide

        def multiply(v):
            return optax.tree.add_scale(in_one(operator.matvec(v)), state.damping, v)

        start = optax.tree.scale(warm_start, state.direction)
        gradient = in_one(updates)
        search = conjugate_gradients(multiply, gradient, start, max_iterations)
        whole, place = _best_iterate(search, loss)
        change, after = _shortened(whole, loss, value, gradient)
        predicted = -search.values[place] + state.damping / 2 * optax.tree.vdot(whole, whole)
        slope = slope_along(gradient, in_one(params))

        def excess():
            along = operator.quadratic(updates)
            return state.damping * optax.tree.vdot(gradient, gradient) > along

        ratio = reduction_ratio(value, after, predicted, slope, excess).astype(state.ratio.dtype)
        usable = (after < value) & is_finite(change)
        found = HessianFreeState(
            steps=state.steps + 1,
            damping=adapted(state.damping, ratio, RULE, least=0.0),
            ratio=ratio,
            iterations=search.iterations,
            direction=zero_unless(is_finite(search.solution), search.solution),
        )
        return optax.tree.cast_like(zero_unless(usable, change), params), found

    return optax.GradientTransformationExtraArgs(init, update)


class Search(NamedTuple):
    """State of the conjugate gradients.

    Attributes:
      iterations: products so far.
      solution, residual, direction: of the method, like the parameters.
      square: ‖residual‖².
      models: q at the last iterations, a ring.
      iterates, values: kept on the way, and q there; a leading axis.
      kept: how many.
      done: whether to stop.
    """

    iterations: jax.Array
    solution: Any
    residual: Any
    direction: Any
    square: jax.Array
    models: jax.Array
    iterates: Any
    values: jax.Array
    kept: jax.Array
    done: jax.Array


def conjugate_gradients(multiply, gradient, start, max_iterations) -> Search:
    """Minimises ``gᵀd + ½ dᵀAd`` from `start`, for a positive definite A given by its products."""
    dot = optax.tree.vdot
    residual = optax.tree.scale(-1.0, optax.tree.add(gradient, multiply(start)))
    square = dot(residual, residual)
    dtype = square.dtype
    search = Search(
        iterations=jnp.zeros((), jnp.int32),
        solution=start,
        residual=residual,
        direction=residual,
        square=square,
        models=jnp.zeros(WINDOW, dtype).at[0].set(_quadratic(start, residual, gradient)),
        iterates=jax.tree.map(lambda x: jnp.zeros((KEPT, *x.shape), x.dtype), start),
        values=jnp.zeros(KEPT, dtype),
        kept=jnp.zeros((), jnp.int32),
        done=~(square > 0),
    )

    def step(s: Search) -> Search:
        image = multiply(s.direction)
        curvature = dot(s.direction, image)
        length = s.square / curvature
        usable = (curvature > 0) & jnp.isfinite(length)
        length = jnp.where(usable, length, 0)
        solution = optax.tree.add_scale(s.solution, length, s.direction)
        residual = optax.tree.add_scale(s.residual, -length, image)
        square = dot(residual, residual)
        direction = optax.tree.add_scale(residual, square / s.square, s.direction)
        i = s.iterations + 1
        model = _quadratic(solution, residual, gradient)
        stretch = jnp.clip(i // 10, 10, WINDOW - 1)
        before, least = s.models[(i - stretch) % WINDOW], stretch.astype(dtype) * PROGRESS
        stalled = (i > stretch) & (model < 0) & (model - before > least * model)
        done = stalled | ~usable | ~(square > 0) | (i >= max_iterations)
        due = i.astype(dtype) >= jnp.asarray(SPACING, dtype) ** s.kept
        keep = due & (s.kept < KEPT - 1) | done  # the last iterate is kept as well
        at = s.kept
        iterates = jax.tree.map(
            lambda all_, x: all_.at[at].set(jnp.where(keep, x, all_[at])), s.iterates, solution
        )
        return Search(
            iterations=i,
            solution=solution,
            residual=residual,
            direction=direction,
            square=square,
            models=s.models.at[i % WINDOW].set(model),
            iterates=iterates,
            values=s.values.at[at].set(jnp.where(keep, model, s.values[at])),
            kept=s.kept + jnp.where(keep, 1, 0),
            done=done,
        )

    return lax.while_loop(lambda s: ~s.done, step, search)


def _quadratic(solution, residual, gradient):
    """q(d) = ½ dᵀ(g − r), since Ad = −g − r."""
    return optax.tree.vdot(solution, optax.tree.sub(gradient, residual)) / 2


def _best_iterate(search: Search, loss):
    """Going back from the last iterate for as long as the loss falls; the iterate and its place."""

    def iterate(place):
        return jax.tree.map(lambda x: x[place], search.iterates)

    def better(state):
        place, value, falls = state
        before = loss(iterate(jnp.maximum(place - 1, 0)))
        falls = (place > 0) & ((before < value) | jnp.isnan(value))
        return jnp.where(falls, place - 1, place), jnp.where(falls, before, value), falls

    last = jnp.maximum(search.kept - 1, 0)
    state = last, loss(iterate(last)), last > 0
    place, _, _ = lax.while_loop(lambda s: s[2], better, state)
    return iterate(place), place


def _shortened(change, loss, value, gradient):
    """A step made shorter until the loss falls by a hundredth of what the slope promises."""
    slope = optax.tree.vdot(gradient, change)

    def goes_on(state):
        rate, after, tries = state
        enough = after <= value + 1e-2 * rate * jnp.minimum(slope, 0)
        return ~enough & (tries < SHORTENINGS)

    def shorter(state):
        rate, _, tries = state
        rate = SHORTER * rate
        return rate, loss(optax.tree.scale(rate, change)), tries + 1

    one = jnp.ones((), slope.dtype)
    rate, after, _ = lax.while_loop(goes_on, shorter, (one, loss(change), jnp.zeros((), jnp.int32)))
    return where(rate < 1, optax.tree.scale(rate, change), change), after
