r"""Curvature of the batch's loss, but for its Kronecker factors.

The generalised Gauss-Newton matrix of the mean loss is $\frac1N \sum_n J_n^T H_n J_n$, with the
Jacobian of example n's prediction and the Hessian of its loss there (Schraudolph 2002).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fbackprop.columns import HessianRoot, LossGradient, Outputs, labels
from fbackprop.piecewise import refuse_curvature
from fbackprop.quantities.base import Quantity


def _signed(gradients):
    """What each example's column counts in the mean: (N, C)."""
    return gradients.shares[:, None] * gradients.signs


def _each_squared(gradients, shares):
    """Σ𝒸 shares[n, c] gradient² for every example, (N, *leaf)."""
    return jax.tree.map(
        lambda x: jnp.einsum("nc...,nc->n...", x**2, shares.astype(x.dtype)), gradients.each()
    )


class _Diagonal(Quantity):
    """The diagonal of Σ columns · columnsᵀ, of the mean loss or of each example's own."""

    per_example: bool

    @property
    def scales(self):
        return not self.per_example

    @property
    def over(self):
        return "examples" if self.per_example else "sum"

    def extract(self, gradients):
        if self.per_example:
            return _each_squared(gradients, gradients.signs)
        return gradients.squares(_signed(gradients))


@dataclasses.dataclass(frozen=True)
class GGNDiagonal(_Diagonal):
    r"""Diagonal of the Gauss-Newton matrix, a pytree like the parameters.

    $$\frac1N \sum_{nc} (J_n^T s_{nc})^2$$

    Attributes:
      samples: None for all columns $s_{nc}$ of a root of the loss's Hessian, which is exact; else
        how many random ones stand for them, with the same expectation.
      per_example: whether to return each example's own diagonal, leaves (N, *leaf).
    """

    samples: int | None = None
    per_example: bool = False

    @property
    def columns(self):
        return HessianRoot(self.samples)


@dataclasses.dataclass(frozen=True)
class FisherDiagonal(_Diagonal):
    r"""Diagonal of the Fisher information, a pytree like the parameters.

    $$\frac1N \sum_n E_{y \sim p(y|x_n)} \Bigl(\frac{\partial\ell_n}{\partial\theta}\Bigr)^2$$

    The loss is taken for a negative log-likelihood. With labels drawn from the model this is an
    unbiased estimate; with the data's own labels it is the "empirical Fisher", which is not
    (Kunstner, Balles and Hennig 2019).

    Attributes:
      samples: how many labels to draw for each example.
      label: ``label(key, prediction)`` draws one; None, or "model", for a loss of `fb.losses`.
      empirical: whether to use the data's labels instead.
      per_example: whether to return each example's own diagonal, leaves (N, *leaf).
    """

    samples: int = 1
    label: Callable | None = None
    empirical: bool = False
    per_example: bool = False

    def __post_init__(self):
        if self.empirical and (self.label is not None or self.samples != 1):
            raise ValueError("empirical=True takes the data's labels: leave out samples=, label=")
        super().__post_init__()

    @property
    def columns(self):
        return LossGradient() if self.empirical else labels(self.samples, self.label)


@dataclasses.dataclass(frozen=True)
class HessianDiagonal(_Diagonal):
    r"""Diagonal of the loss's Hessian for a model that is piecewise linear in each parameter.

    There it is the Gauss-Newton diagonal, negative curvature of the loss included: ReLU and leaky
    networks, max pooling, bias and scale. It is not for models in which a parameter passes through
    a curved function (tanh, softmax, normalisation) or meets itself again (recurrence, attention,
    weights used in two layers): `extract` refuses them and names the line. A function with a rule
    of its own (`jax.custom_jvp`, `jax.custom_vjp`) has the derivatives that its rule says.

    Attributes:
      per_example: whether to return each example's own diagonal, leaves (N, *leaf).

    Raises:
      ValueError: for a model that is not piecewise linear in each parameter.
    """

    per_example: bool = False
    columns = HessianRoot()

    def extract(self, gradients):
        refuse_curvature(gradients.model, len(jax.tree.leaves(gradients.params)))
        return super().extract(gradients)


@dataclasses.dataclass(frozen=True)
class GGNBlock(Quantity):
    r"""The dense block of the Gauss-Newton matrix for every leaf: (P, P) for a leaf of P elements.

    $\frac1N \sum_n J_n^T H_n J_n$, rows and columns in the order of the flattened leaf. For tests
    and small layers: it forms N · C gradients and a matrix of P² elements.

    Attributes:
      samples: as of `GGNDiagonal`.
    """

    samples: int | None = None
    scales = True

    @property
    def columns(self):
        return HessianRoot(self.samples)

    def extract(self, gradients):
        def block(x):
            flat = x.reshape(*x.shape[:2], math.prod(x.shape[2:]))
            shares = _signed(gradients).astype(x.dtype)
            return jnp.einsum("ncp,nc,ncq->pq", flat, shares, flat)

        return jax.tree.map(block, gradients.each())


@dataclasses.dataclass(frozen=True)
class Gram(Quantity):
    r"""Inner products of the Jacobian's rows, (N, C, N, C).

    $$\langle \partial z_{nc}/\partial\theta, \partial z_{md}/\partial\theta \rangle$$

    This is the empirical neural tangent kernel (Jacot, Gabriel and Hongler 2018), for
    C elements of the flattened prediction. The Jacobian is not formed.

    Attributes:
      weighted: whether the rows are those of $\sqrt{w_n} S_n^T J_n$ instead, with a root
        $S_n S_n^T = H_n$ of the loss's Hessian and the example's weight in the loss (1/N for a
        mean): then the non-zero eigenvalues of the matrix are those of the Gauss-Newton matrix.
        C is the number of columns of the root, one less than the classes for
        `losses.softmax_cross_entropy`. Where a loss is concave, its columns are zero.
      per_leaf: whether to return a pytree like the parameters with each leaf's part.
    """

    weighted: bool = False
    per_leaf: bool = False
    over = "pairs"

    @property
    def scales(self):
        return self.weighted

    @property
    def columns(self):
        return HessianRoot() if self.weighted else Outputs()

    def extract(self, gradients):
        dots = gradients.dots(per_leaf=self.per_leaf)
        if not self.weighted:
            return dots
        root = jnp.sqrt(gradients.counts)
        return jax.tree.map(lambda x: _on_both_sides(x, root), dots)


def _on_both_sides(x, root):
    root = root.astype(x.dtype)
    return x * root[:, :, None, None] * root[None, None]


@dataclasses.dataclass(frozen=True)
class JacobianNorms(Quantity):
    r"""Squared norms of the Jacobian's rows, (N, C).

    $$\lVert \partial z_{nc}/\partial\theta \rVert^2$$

    Attributes:
      per_leaf: whether to return a pytree like the parameters, each leaf's norms for itself.
    """

    per_leaf: bool = False
    columns = Outputs()
    over = "examples"

    def extract(self, gradients):
        return gradients.norms(self.per_leaf)
