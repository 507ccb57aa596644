"""Operators as matrices: of the whole tree, or of every leaf."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import block_diag
from jax.typing import ArrayLike

from fbackprop.curvature import cholesky
from fbackprop.curvature.base import Curvature, check_not_negative
from fbackprop.curvature.space import Space


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense(Curvature):
    """A symmetric positive semi-definite matrix over the flattened tree.

    Attributes:
      matrix: (P, P), rows and columns in the order of `jax.flatten_util.ravel_pytree`.
      space: the trees that it is for, as of `Space.of`.
    """

    matrix: Any
    space: Space = dataclasses.field(metadata={"static": True})

    def matvec(self, tree: Any) -> Any:
        return self.space.unravel(self.matrix @ self.space.ravel(tree))

    def solve(self, tree: Any, damping: ArrayLike = 0.0) -> Any:
        """(A + damping I)⁻¹ v by a Cholesky factor.

        The damping is raised to max(P · ε, ε^¾) times the largest diagonal element.
        """
        check_not_negative(damping)
        factored = cholesky.factor(self.matrix, damping)
        return self.space.unravel(cholesky.solve(factored, self.space.ravel(tree)))

    def diagonal(self) -> Any:
        return self.space.unravel(jnp.diagonal(self.matrix))

    def dense(self) -> jax.Array:
        return self.matrix


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockDiagonal(Curvature):
    """A matrix for every leaf: what `GGNBlock` returns, as an operator.

    Attributes:
      blocks: a pytree like the parameters, (P, P) for a leaf of P elements.
      space: the trees that it is for, as of `Space.of(params)`.
    """

    blocks: Any
    space: Space = dataclasses.field(metadata={"static": True})

    def _each(self, function, tree=None):
        blocks = jax.tree.leaves(self.blocks)
        vectors = [None] * len(blocks) if tree is None else self.space.check(tree)
        found = [
            function(b, None if v is None else v.reshape(-1))
            for b, v in zip(blocks, vectors, strict=True)
        ]
        shaped = [x.reshape(s) for x, s in zip(found, self.space.shapes, strict=True)]
        return self.space.structure.unflatten(shaped)

    def matvec(self, tree: Any) -> Any:
        return self._each(lambda block, v: block @ v, tree)

    def solve(self, tree: Any, damping: ArrayLike = 0.0) -> Any:
        """As of `Dense`, leaf by leaf."""
        check_not_negative(damping)
        return self._each(
            lambda b, v: cholesky.solve(cholesky.factor(b, damping), v).astype(v.dtype), tree
        )

    def diagonal(self) -> Any:
        return self._each(lambda block, _: jnp.diagonal(block))

    def dense(self) -> jax.Array:
        return block_diag(*jax.tree.leaves(self.blocks))
