"""The Gauss-Newton matrix by the sites of a sweep, solved in the space of its Gram matrix."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from fbackprop.columns import HessianRoot
from fbackprop.curvature import cholesky
from fbackprop.curvature.base import Curvature, check_not_negative
from fbackprop.curvature.dense import Dense
from fbackprop.curvature.space import Space
from fbackprop.gradients import Gradients
from fbackprop.kronecker import symmetric_product
from fbackprop.quantities.base import Quantity

# A difference is divided by the damping: on every device products are in the dtype's own precision,
# of which accelerators' default would leave three digits.
full_precision = functools.partial(jax.default_matmul_precision, "highest")

# Elements of S that are formed at once, even where the matrix itself is smaller.
LEAST_FORMED = 2**22


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DualGaussNewton(Curvature):
    r"""The Gauss-Newton matrix $S^T S$, by sites; S has a row for each of N · C columns.

    Row (n, c) is $\sqrt{w_n} J_n^T s_{nc}$, with $\sum_c s_{nc} s_{nc}^T$ the loss's Hessian at
    the example's prediction and $w_n$ the example's share in the mean. S is not formed: its
    products are contractions of the sites of one sweep, without another pass through the model.

    `fbackprop.GGNRows` is the quantity that returns it.

    Attributes:
      rows: the gradients of the columns.
      factor: what the loss is, as a multiple of the mean.
    """

    rows: Gradients
    factor: jax.Array | float = 1.0

    @property
    def space(self):
        return Space.of(self.rows.params)

    @property
    def _roots(self):
        """√wₙ of the columns of positive curvature, (N, C); those of negative are left out."""
        return jnp.sqrt(self.factor * self.rows.counts)

    def across(self, tree) -> jax.Array:
        """S v, (N, C)."""
        self.space.check(tree)
        return self._roots * self.rows.along(tree)

    def back(self, columns):
        """Sᵀ u for u of shape (N, C), a pytree like the parameters."""
        return self.rows.total(self._roots * columns)

    def gram(self) -> jax.Array:
        """S Sᵀ, (N · C, N · C); its non-zero eigenvalues are the Gauss-Newton matrix's."""
        roots = self._roots
        gram = self.rows.dots() * roots[:, :, None, None] * roots[None, None]
        return gram.reshape(roots.size, roots.size)

    def matvec(self, tree: Any) -> Any:
        return self.back(self.across(tree))

    def quadratic(self, tree):
        return jnp.sum(self.across(tree) ** 2)

    def solve(self, tree: Any, damping: ArrayLike = 0.0) -> Any:
        r"""$(S^T S + \lambda I)^{-1} v$ by a Cholesky factor of the Gram matrix.

        $$x = \bigl(v - S^T (S S^T + \lambda I)^{-1} S v\bigr) / \lambda$$

        (Woodbury's identity), and twice more of what x leaves of v. That cancels for a small λ: the
        factor's is raised to √ε of the Gram matrix's largest diagonal element, which what follows
        makes good along all but smaller eigenvalues. ε is of the coarsest leaf, in whose dtype S v
        and Sᵀ u are: in bfloat16 the least damping is a sixteenth of that element.
        """
        check_not_negative(damping)
        with full_precision():
            return self._solved(tree, damping)

    def _solved(self, tree, damping):
        damping = jnp.maximum(damping, 0)  # of a schedule: what is known to be negative is refused
        gram = self.gram()
        floats = [d for d in (*self.space.dtypes, gram.dtype) if jnp.issubdtype(d, jnp.floating)]
        coarsest = max(float(jnp.finfo(d).eps) for d in floats)
        least = coarsest**0.5 * jnp.max(jnp.diagonal(gram), initial=0)
        raised = jnp.maximum(damping, least).astype(gram.dtype)
        raised = jnp.where(raised > 0, raised, 1)
        factored = cholesky.factor(gram, raised)

        def solved(v):
            s = self.across(v)
            u = cholesky.solve(factored, s.reshape(-1)).reshape(s.shape)
            return optax.tree.scale(1 / raised, optax.tree.sub(v, self.back(u)))

        tree = self.space.wide(tree)
        x = solved(tree)
        for _ in range(2):
            left = optax.tree.sub(tree, optax.tree.add_scale(self.matvec(x), damping, x))
            x = optax.tree.add(x, solved(left))
        return self.space.cast(x)

    def diagonal(self) -> Any:
        return self.rows.squares(self._roots**2)

    def trace(self, key: jax.Array | None = None, samples: int = 100) -> jax.Array:
        """The exact trace, a scalar, of the rows' norms."""
        return jnp.sum(self._roots**2 * self.rows.norms())

    def dense(self) -> jax.Array:
        return self.primal().matrix

    def primal(self) -> Dense:
        """The matrix over the flattened parameters; S is formed for some examples at a time."""
        size, (n, c) = self.space.size, self._roots.shape
        at_once = max(max(size**2 // 8, LEAST_FORMED) // max(c * size, 1), 1)

        def product(rows: Gradients):
            roots = dataclasses.replace(self, rows=rows)._roots.reshape(-1, 1)
            leaves = [x.reshape(len(roots), -1) for x in jax.tree.leaves(rows.each())]
            return symmetric_product(jnp.concatenate(leaves, axis=1) * roots, 1)

        with full_precision():
            whole = at_once >= n
            matrix = product(self.rows) if whole else self.rows.summed_in_pieces(product, at_once)
        return Dense(matrix, self.space)


@dataclasses.dataclass(frozen=True)
class GGNRows(Quantity):
    """The Gauss-Newton matrix as a `DualGaussNewton`, the operator that the Gram matrix solves.

    Attributes:
      samples: None for all columns of a root of the loss's Hessian, else how many random ones.
    """

    samples: int | None = None
    over = "pairs"
    scales = True

    @property
    def columns(self):
        return HessianRoot(self.samples)

    def extract(self, gradients):
        return DualGaussNewton(gradients)

    def scaled(self, found, scale):
        return dataclasses.replace(found, factor=scale)
