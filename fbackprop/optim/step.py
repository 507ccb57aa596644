"""The step that most experiments take, for any member of the family or any optax optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fbackprop.objective import Objective
from fbackprop.optim.common import complete, is_finite
from fbackprop.optim.diagonal import DiagonalState
from fbackprop.optim.factored import FactoredState
from fbackprop.optim.hessian_free import HessianFreeState
from fbackprop.optim.levenberg_marquardt import LevenbergMarquardtState
from fbackprop.optim.precondition import PreconditionState

REPORTED = ("damping", "ratio", "skipped", "iterations", "accepted")
# Those of the family, which stay finite of themselves.
STATES = (
    DiagonalState,
    FactoredState,
    HessianFreeState,
    LevenbergMarquardtState,
    PreconditionState,
)


class Step:
    """A training step, compiled: gradient, update, new parameters. See `step`."""

    def __init__(self, model: Callable, loss: Callable, optimizer, chunk: int | None):
        self.model, self.loss, self.chunk = model, loss, chunk
        if isinstance(optimizer, optax.MultiSteps):  # passes on what else it is given
            optimizer = optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)
        self.optimizer = optax.with_extra_args_support(optimizer)
        self._compiled = jax.jit(self._run)
        self._compilations = 0
        self._usual = jax.tree.structure(None)  # of the last state, in which nothing was pending

    def __call__(
        self,
        params: Any,
        state: Any,
        batch: Any,
        *further: Any,
        weights: Any = None,
        key: Any = None,
    ) -> tuple[Any, Any, dict[str, jax.Array]]:
        """One step.

        Args:
          params: the parameters.
          state: the optimizer's, of ``optimizer.init(params)`` or the last step.
          batch: a pair (inputs, targets), leading axes N.
          *further: further inputs of the model, leading axes N.
          weights: of the examples, (N,).
          key: for a model that takes one, and for quantities that sample.

        Returns:
          New parameters, new state, and a dict of scalars: the "loss" before the step, and what the
          optimizer knows of "damping", "ratio", "skipped", "iterations" and "accepted".
        """
        objective = self._objective(params, batch, further, weights, key)
        # What was completed once needs it no more: on an accelerator, to look for it would take
        # longer than many a step. Shapes are checked when they are compiled for, and weights here.
        if weights is not None or jax.tree.structure(state) != self._usual:
            objective.check()
            if weights is not None:
                objective = dataclasses.replace(objective, weights=jnp.asarray(weights, float))
            objective, state = jax.tree.map(_strongly_typed, (objective, state))
            state = complete(state, objective)
            self._usual = jax.tree.structure(state)
        return self._compiled(state, objective)

    @property
    def compilations(self) -> int:
        """For how many types and shapes of what it is given the step was compiled."""
        return self._compilations

    def init(
        self, params: Any, batch: Any, *further: Any, weights: Any = None, key: Any = None
    ) -> Any:
        """The optimizer's state, with what its first step would add: for `lax.scan`."""
        objective = self._objective(params, batch, further, weights, key)
        objective.check()
        return complete(self.optimizer.init(params), objective)

    def _objective(self, params, batch, further, weights, key) -> Objective:
        if isinstance(weights, list | tuple):
            weights = jnp.asarray(weights)
        return Objective(self.model, self.loss, params, batch, further, weights, key, self.chunk)

    def _run(self, state, objective: Objective):
        self._compilations += 1  # traced but once for each
        params = objective.params
        value, gradient = objective.value_and_gradient()

        def value_fn(params, objective=objective):  # optax hands it what else it was given
            return objective.value(params)

        updates, after = self.optimizer.update(
            gradient,
            state,
            params,
            value=value,
            grad=gradient,
            value_fn=value_fn,
            objective=objective,
        )
        new = optax.apply_updates(params, updates)
        finite = is_finite(gradient, updates)
        params, after = _kept_unless(finite, (new, after), (params, state))
        members = [node for node in jax.tree.leaves(after, is_leaf=_is_member) if _is_member(node)]
        info = {"loss": value}
        for name in REPORTED:
            found = [getattr(member, name) for member in members if hasattr(member, name)]
            if len(found) == 1:
                info[name] = found[0]
        return params, after, info


def _strongly_typed(x):
    """As what comes of a step is typed: else the second step would be compiled anew."""
    if isinstance(x, float | complex) or getattr(x, "weak_type", False):
        x = jnp.asarray(x)
        return x.astype(x.dtype)
    return x


def _kept_unless(finite, new, old):
    """The new tree, or its floating-point arrays as they were.

    The family's members see to their own, and counts go on: they are the same in all of the runs
    that a `vmap` goes through at once, so that what is done every few steps stays a branch.
    """

    def emptied(x, y):
        """What `optax.MultiSteps` has gathered goes with the update that it was for."""
        if not isinstance(x, optax.MultiStepsState):
            return y
        goes = ~finite & (x.mini_step == 0)
        kept = jax.tree.map(lambda a: jnp.where(goes, 0, a).astype(a.dtype), y.acc_grads)
        return y._replace(acc_grads=kept)

    def of_node(x, y):
        moves = not _is_member(x) and jnp.issubdtype(jnp.result_type(x), jnp.inexact)
        return jnp.where(finite, x, y) if moves else x  # a branch would copy them all

    old = jax.tree.map(emptied, new, old, is_leaf=lambda x: isinstance(x, optax.MultiStepsState))
    return jax.tree.map(of_node, new, old, is_leaf=_is_member)


def _is_member(node) -> bool:
    return isinstance(node, STATES)


def step(
    model: Callable,
    loss: Callable,
    optimizer: optax.GradientTransformation,
    *,
    chunk: int | None = None,
) -> Step:
    """The training step of a model for one example, a loss and an optimizer, compiled.

    It hands the optimizer the gradient of the batch's mean loss, and what more it may ask for by
    optax's conventions: ``value``, ``grad``, ``value_fn``, and the `Objective` that curvature is
    measured of. An update that is not finite is not made, and leaves no number in the optimizer's
    state that is not; steps are counted all the same.

    Args:
      model, loss: of one example, as of `fbackprop.sweep`.
      optimizer: any optax transformation; those of `fbackprop.optim` and chains of them included.
      chunk: how many examples to go through at a time; None for all.

    Returns:
      ``step(params, state, batch, *further, weights=None, key=None)``, see `Step.__call__`.

    Examples:
      >>> import jax.numpy as jnp, fbackprop as fb
      >>> optimizer = fb.optim.gauss_newton(damping=0.0)
      >>> step = fb.optim.step(jnp.dot, fb.losses.squared_error, optimizer)
      >>> params = jnp.zeros(2)
      >>> batch = jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]]), jnp.array([1.0, 3.0, 4.0])
      >>> params, state, info = step(params, optimizer.init(params), batch)
      >>> [round(x, 4) for x in params.tolist()], round(float(info["loss"]), 4)
      ([1.0, 2.0], 4.3333)
    """
    return Step(model, loss, optimizer, chunk)
