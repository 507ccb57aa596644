"""The step that most experiments take, for any member of the family or any optax optimizer."""

from __future__ import annotations

from collections.abc import Callable

import jax
import optax

from fbackprop.objective import Objective
from fbackprop.optim.common import complete, is_finite, where
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

    def __call__(self, params, state, batch, *further, weights=None, key=None):
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
        return self._compiled(complete(state, objective), objective)

    @property
    def compilations(self) -> int:
        """How often the step was compiled."""
        return self._compiled._cache_size()

    def init(self, params, batch, *further, weights=None, key=None):
        """The optimizer's state, with what its first step would add: for `lax.scan`."""
        objective = self._objective(params, batch, further, weights, key)
        return complete(self.optimizer.init(params), objective)

    def _objective(self, params, batch, further, weights, key) -> Objective:
        objective = Objective(
            self.model, self.loss, params, batch, further, weights, key, self.chunk
        )
        objective.check()
        return objective

    def _run(self, state, objective: Objective):
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
        new = optax.apply_updates(params, updates), *_parts(after)[0]
        old = params, *_parts(state)[0]
        params, *state = where(is_finite(gradient, updates), new, old)
        members, structure = _parts(after)[1:]
        info = {"loss": value}
        for name in REPORTED:
            found = [getattr(member, name) for member in members if hasattr(member, name)]
            if len(found) == 1:
                info[name] = found[0]
        return params, structure(state, members), info


def _parts(state) -> tuple[list, list, Callable]:
    """Of a state the arrays of other transformations, the states of the family's members, and how.

    The last puts the two together again.
    """
    nodes, structure = jax.tree.flatten(state, is_leaf=_is_member)
    own = [_is_member(node) for node in nodes]

    def together(others, members):
        others, members = iter(others), iter(members)
        return structure.unflatten([next(members if mine else others) for mine in own])

    others = [node for node, mine in zip(nodes, own, strict=True) if not mine]
    return others, [node for node, mine in zip(nodes, own, strict=True) if mine], together


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
    measured of. An update that is not finite is not made, and leaves the optimizer's state as it
    was, but for what the family's members note of it.

    Args:
      model, loss: of one example, as of `fbackprop.sweep`.
      optimizer: any optax transformation; those of `fbackprop.optim` and chains of them included.
      chunk: how many examples to go through at a time; None for all.

    Returns:
      ``step(params, state, batch, *further, weights=None, key=None)``, see `Step.__call__`.

    Example:
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
