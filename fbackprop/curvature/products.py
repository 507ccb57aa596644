"""Curvature that is known by its products alone, linearised once.

The pullback of a function is linear in its cotangent, so that its own sweep is its transpose: the
map of tangents. Both read the one tape, and no product computes anything of the forward pass again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from jax.typing import ArrayLike

from fbackprop.columns import Example, hessian_map
from fbackprop.curvature.base import Curvature, conjugate_gradients
from fbackprop.curvature.dual import GGNRows
from fbackprop.curvature.space import Space
from fbackprop.objective import Objective
from fbackprop.program import is_inexact, type_of
from fbackprop.reverse import value_and_grad, vjp
from fbackprop.sites import wide


class _Products(Curvature):
    objective: Objective

    @classmethod
    def of(cls, objective: Objective) -> Self:
        """That of an objective."""
        operator = cls.__new__(cls)
        operator._linearise(objective)
        return operator

    def _linearise(self, objective: Objective) -> None:
        raise NotImplementedError

    @property
    def space(self):
        return Space.of(self.objective.params)

    def solve(
        self,
        tree: Any,
        damping: ArrayLike = 0.0,
        *,
        tolerance: float = 1e-6,
        max_iterations: int | None = None,
    ) -> Any:
        """(A + damping I)⁻¹ v by conjugate gradients.

        Args:
          tree: v.
          damping: a scalar, not below zero.
          tolerance: the residual's norm at which to stop, relative to that of v.
          max_iterations: how many products to spend at most; by default ten per dimension, and
            NaN if there was no solution by then.
        """
        return conjugate_gradients(self, tree, damping, tolerance, max_iterations)


class GaussNewton(_Products):
    r"""The generalised Gauss-Newton matrix of a batch's mean loss, by its products.

    $$G = \sum_n w_n J_n^T H_n J_n \Big/ \sum_n w_n$$

    with $J_n$ the Jacobian of the example's prediction and $H_n$ the loss's Hessian there
    (Schraudolph 2002). It is positive semi-definite for a loss that is convex in the prediction.
    Of other losses negative curvature is left out, save where the loss mixes the elements of a
    prediction of more than 128 of them: such a loss must be convex.

    Args:
      model, loss, params, batch: as of `fbackprop.sweep`.
      further, weights, key: as of `Objective`.

    Attributes:
      value: the loss, a scalar.

    Examples:
      >>> import jax.numpy as jnp, fbackprop as fb
      >>> batch = jnp.array([[1.0, 2.0]]), jnp.array(0.0)[None]
      >>> ggn = fb.GaussNewton(jnp.dot, fb.losses.squared_error, jnp.zeros(2), batch)
      >>> ggn.matvec(jnp.array([1.0, 0.0])).tolist()
      [1.0, 2.0]
    """

    def __init__(self, model: Callable, loss: Callable, params, batch, **options):
        self._linearise(Objective(model, loss, params, batch, **options))

    def _linearise(self, objective: Objective) -> None:
        objective.check()
        self.objective = objective
        examples = objective.examples()

        def predict(params):
            leaves, structure = jax.tree.flatten(objective.predict(params, examples))
            return [x for x in leaves if is_inexact(type_of(x))], structure.unflatten(leaves)

        def of_one(prediction, target, share):
            example = Example(objective.loss, prediction, target, None).of_moving()
            value, slope = value_and_grad(example.loss)(example.prediction, target)
            slope = [_weighted(share, x) for x in jax.tree.leaves(slope)]
            return _weighted(share, value), slope, Partial(_product, share, hessian_map(example))

        moving, self._pullback, predictions = vjp(predict, objective.params, has_aux=True)
        found = jax.vmap(of_one)(predictions, examples.target, examples.shares)
        values, self._slopes, self._hessians = found
        self.value = jnp.sum(values)
        blank = [jnp.zeros_like(x) for x in moving]
        _, self._pushforward = vjp(lambda ct: self._pullback(ct)[0], blank)

    def pushforward(self, tree) -> list:
        """J v, the change of every example's prediction: its leaves, with leading axes N."""
        return self._pushforward(self.space.cast(tree))[0]

    def matvec(self, tree: Any) -> Any:
        found = self._pullback(self._curved(self.pushforward(tree)))[0]
        return jax.tree.map(self._zero_if_fixed, found, self.objective.params)

    @staticmethod
    def _zero_if_fixed(image, param):
        """Integers have no derivative: theirs are zeros of their own type."""
        return image if is_inexact(type_of(param)) else jnp.zeros_like(param)

    def quadratic(self, tree):
        change = self.pushforward(tree)
        return self.between(change, change)

    def slope(self, change: list) -> jax.Array:
        """Σₙ wₙ ∇ℓₙᵀ changeₙ of a change of predictions, as of `pushforward`: gᵀv; a scalar."""
        return _inner(self._slopes, change)

    def between(self, left: list, right: list) -> jax.Array:
        """Σₙ wₙ leftₙᵀ Hₙ rightₙ of changes of predictions, as of `pushforward`; a scalar."""
        return _inner(left, self._curved(right))

    def _curved(self, change: list) -> list:
        """Each example's share of its loss's Hessian times the change of its prediction."""

        def of_one(hessian, change):
            flat, unravel = ravel_pytree(change)
            return unravel(hessian(flat).astype(flat.dtype))

        return jax.vmap(of_one)(self._hessians, change)

    def diagonal(self) -> Any:
        """The exact diagonal, by a sweep."""
        return self.objective.sweep(rows=GGNRows())["rows"].diagonal()


def _inner(left: list, right: list) -> jax.Array:
    """In single precision at least."""
    return optax.tree.vdot(*jax.tree.map(wide, (left, right)))


def _weighted(share, x):
    return share.astype(x.dtype) * x


def _product(share, hessian, v):
    return _weighted(share, hessian(v))


class Hessian(_Products):
    r"""The Hessian of a batch's mean loss, by its products. It is symmetric, and may be indefinite.

    The gradient is swept, and the sweep swept once more: that is linear, and a product repeats
    nothing of either. `solve` is for a positive definite Hessian, or enough damping to make it so.

    Args:
      model, loss, params, batch, further, weights, key: as of `GaussNewton`.

    Attributes:
      value: the loss, a scalar.
    """

    def __init__(self, model: Callable, loss: Callable, params, batch, **options):
        self._linearise(Objective(model, loss, params, batch, **options))

    def _linearise(self, objective: Objective) -> None:
        objective.check()
        self.objective = objective
        leaves, structure = jax.tree.flatten(objective.params)

        def loss(moving):
            return objective.value(structure.unflatten(_replaced(leaves, moving)))

        def slope(moving):
            value, gradient = value_and_grad(loss)(moving)
            return gradient, value

        _, self._pullback, self.value = vjp(slope, _moving(leaves), has_aux=True)

    def matvec(self, tree: Any) -> Any:
        leaves, structure = jax.tree.flatten(self.space.cast(tree))
        (images,) = self._pullback(_moving(leaves))
        return structure.unflatten(_replaced(map(jnp.zeros_like, leaves), images))


def _moving(leaves: list) -> list:
    """Those that have a derivative."""
    return [x for x in leaves if is_inexact(type_of(x))]


def _replaced(leaves: Iterable, moving: list) -> list:
    """Others in the place of those that have a derivative."""
    remaining = iter(moving)
    return [next(remaining) if is_inexact(type_of(x)) else x for x in leaves]


def _register(cls, names: tuple[str, ...]) -> None:
    def flatten(operator):
        return tuple(getattr(operator, name) for name in names), None

    def unflatten(_, children):
        operator = cls.__new__(cls)
        for name, child in zip(names, children, strict=True):
            setattr(operator, name, child)
        return operator

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)


_register(GaussNewton, ("objective", "value", "_slopes", "_hessians", "_pullback", "_pushforward"))
_register(Hessian, ("objective", "value", "_pullback"))
