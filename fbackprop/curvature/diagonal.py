"""A diagonal operator."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.curvature.base import Curvature, check_not_negative
from fbackprop.curvature.space import Space


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Diagonal(Curvature):
    """The operator that scales every element: what `GGNDiagonal` and its like return, as one.

    Attributes:
      values: a pytree like the parameters.

    Examples:
      >>> import jax.numpy as jnp, fbackprop as fb
      >>> fb.Diagonal(jnp.array([1.0, 3.0])).solve(jnp.array([2.0, 4.0]), damping=1.0).tolist()
      [1.0, 1.0]
    """

    values: Any

    @property
    def space(self):
        return Space.of(self.values)

    def matvec(self, tree: Any) -> Any:
        self.space.check(tree)
        return jax.tree.map(jnp.multiply, self.values, tree)

    def solve(self, tree: Any, damping: ArrayLike = 0.0) -> Any:
        """v / (values + damping); 0 where that is 0 / 0, as the pseudo-inverse has it."""
        check_not_negative(damping)
        self.space.check(tree)

        def divided(d, v):
            total = d + jnp.asarray(damping, d.dtype)
            return jnp.where(total == 0, 0, v / jnp.where(total == 0, 1, total)).astype(v.dtype)

        return jax.tree.map(divided, self.values, tree)

    def diagonal(self) -> Any:
        return self.values

    def dense(self) -> jax.Array:
        return jnp.diag(self.space.ravel(self.values))
