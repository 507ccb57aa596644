"""What a curvature is: a symmetric linear operator on pytrees like the parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.sparse.linalg import cg
from jax.typing import ArrayLike

from fbackprop.program import value_of


def check_not_negative(damping) -> None:
    """Refuse a damping that is known to be below zero, or not a number."""
    known = value_of(damping)
    if known is not None and not np.all(np.asarray(known) >= 0):
        raise ValueError(f"damping={known} must not be negative")


class Curvature:
    """A symmetric linear operator A on pytrees like the parameters; itself a pytree.

    A subclass has `matvec` and `space`, and what else it knows better than by products.

    Operators of one kind can be averaged with `jax.tree.map`, which averages what they are made
    of; ``a + b`` and ``c * a`` are the operators of those names whatever they are made of.

    Attributes:
      space: the trees that it is for.
    """

    space: Any

    def matvec(self, tree: Any) -> Any:
        """A v, for a pytree v like the parameters."""
        raise NotImplementedError

    def solve(self, tree: Any, damping: ArrayLike = 0.0) -> Any:
        """(A + damping I)⁻¹ v, for a damping not below zero.

        By conjugate gradients, unless a subclass solves exactly; A is positive semi-definite.
        """
        return conjugate_gradients(self, tree, damping)

    def quadratic(self, tree: Any) -> jax.Array:
        """vᵀ A v, a scalar."""
        wide = self.space.wide
        return optax.tree.vdot(wide(tree), wide(self.matvec(tree)))

    def dense(self) -> jax.Array:
        """The matrix over the flattened tree, (P, P). For tests and small problems."""
        space = self.space
        basis = jnp.eye(space.size, dtype=space.dtype)
        return jax.lax.map(lambda v: space.ravel(self.matvec(space.unravel(v))), basis).T

    def diagonal(self) -> Any:
        """The diagonal, a pytree like the parameters. By P products, unless a subclass knows it."""
        space = self.space
        places = jnp.arange(space.size)

        def entry(place):
            unit = jnp.zeros(space.size, space.dtype).at[place].set(1)
            return space.ravel(self.matvec(space.unravel(unit)))[place]

        return space.unravel(jax.lax.map(entry, places))

    def trace(self, key: jax.Array | None = None, samples: int = 100) -> jax.Array:
        """The trace, a scalar: exact, or with a key estimated by products with random vectors.

        Args:
          key: a `jax.random.key`.
          samples: how many products to spend; see `fbackprop.estimators.trace`.
        """
        if key is None:
            return jnp.sum(self.space.ravel(self.diagonal()))
        from fbackprop import estimators  # which is for operators, and may import them

        def multiply(v):
            return self.space.wide(self.matvec(self.space.cast(v)))  # integers, too

        like = jax.eval_shape(self.space.wide, self.space.like())
        return estimators.trace(multiply, like, key, samples=samples).value

    __array_ufunc__ = None  # NumPy's numbers leave multiples to what follows

    def __add__(self, other: Curvature) -> Curvature:
        return Sum((self, other)) if isinstance(other, Curvature) else NotImplemented

    def __radd__(self, other) -> Curvature:
        starts = isinstance(other, int) and other == 0  # as Python's `sum` does
        return self if starts else NotImplemented

    def __mul__(self, factor) -> Curvature:
        if isinstance(factor, Curvature) or jnp.shape(factor) != ():
            return NotImplemented
        return Scaled(self, factor)

    __rmul__ = __mul__

    def __neg__(self) -> Curvature:
        return -1 * self

    def __truediv__(self, factor) -> Curvature:
        return self * (1 / factor)

    def __sub__(self, other: Curvature) -> Curvature:
        return self + -1 * other


def conjugate_gradients(
    operator: Curvature, tree, damping, tolerance: float = 1e-6, max_iterations: int | None = None
) -> Any:
    """(A + damping I)⁻¹ v by products.

    Args:
      operator, tree, damping: A, v and a scalar.
      tolerance: the residual's norm at which to stop, relative to that of v.
      max_iterations: how many products to spend at most; by default ten per dimension.

    Returns:
      The solution in the dtypes of the space. NaN if that many did not bring the residual below v
      itself, unless `max_iterations` asked for what is then there: a singular matrix without
      damping has a solution for some v only.
    """
    check_not_negative(damping)
    space = operator.space

    def multiply(v):
        def damped(image, x):
            return image.astype(x.dtype) + jnp.asarray(damping, x.dtype) * x

        return jax.tree.map(damped, operator.matvec(v), v)

    v = space.wide(tree)
    solution, _ = cg(multiply, v, tol=tolerance, maxiter=max_iterations)
    if max_iterations is None:
        left = optax.tree.norm(optax.tree.sub(v, multiply(solution)))
        solved = left <= optax.tree.norm(v)
        solution = jax.tree.map(lambda x: jnp.where(solved, x, jnp.nan), solution)
    return space.cast(solution)


def _times(factor, tree):
    return jax.tree.map(lambda x: factor.astype(x.dtype) * x, tree)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sum(Curvature):
    """The sum of operators."""

    terms: tuple[Curvature, ...]

    @property
    def space(self):
        return self.terms[0].space

    def matvec(self, tree: Any) -> Any:
        return self._sum(lambda term: term.matvec(tree))

    def diagonal(self) -> Any:
        return self._sum(lambda term: term.diagonal())

    def dense(self) -> jax.Array:
        return self._sum(lambda term: term.dense())

    def _sum(self, part: Callable):
        first, *rest = map(part, self.terms)
        for x in rest:
            first = jax.tree.map(jnp.add, first, x)
        return first


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled(Curvature):
    """A multiple of an operator."""

    operator: Curvature
    factor: Any

    @property
    def space(self):
        return self.operator.space

    def matvec(self, tree: Any) -> Any:
        return optax.tree.scale(self.factor, self.operator.matvec(tree))

    def solve(self, tree: Any, damping: ArrayLike = 0.0) -> Any:
        """(A + damping I)⁻¹ v; of the operator zero, 0 without damping."""
        check_not_negative(damping)
        known = value_of(self.factor)
        if known is not None and known < 0:
            raise ValueError(
                f"{known} times a curvature is not positive semi-definite: solve A + λI"
            )
        factor = jnp.asarray(self.factor, self.space.dtype)
        is_zero, alone = factor == 0, jnp.asarray(damping, factor.dtype)
        over = 1 / jnp.where(is_zero, 1, factor)
        solved = self.operator.solve(_times(over, tree), alone * over)
        without = _times(jnp.where(alone > 0, 1 / jnp.where(alone > 0, alone, 1), 0), tree)
        return jax.tree.map(lambda x, y: jnp.where(is_zero, y, x), solved, without)

    def diagonal(self) -> Any:
        return optax.tree.scale(self.factor, self.operator.diagonal())

    def dense(self) -> jax.Array:
        return self.factor * self.operator.dense()
