r"""Kronecker factors of the Gauss-Newton matrix.

A weight's block is approximated by $A \otimes B$, of activations and of error signals (Martens and
Grosse 2015; for weights that are shared, Eschenhagen et al. 2023).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fbackprop.columns import HessianRoot, LossGradient, labels
from fbackprop.kronecker import BiasBlock, EigenBlock, KroneckerBlock
from fbackprop.quantities.base import Quantity


@dataclasses.dataclass(frozen=True)
class Kronecker(Quantity):
    r"""Kronecker factors of every leaf's block: a pytree like the parameters of tuples of blocks.

    For a weight that meets $a_{nt}$ in T places and gets $b_{nct}$ back there, "expand" is

    $$A = \frac1{NT} \sum_{nt} a_{nt} a_{nt}^T, \quad B = \frac1N \sum_{nct} b_{nct} b_{nct}^T$$

    and "reduce" the same of the mean of a over its places and the sum of b (Eschenhagen et al.
    2023, eqs. 13 and 17). A leaf of which parts are used apart (the slices of a fused projection,
    the layers of a stack) has factors for each. Of the branches of a `cond` an example meets one,
    and T is the largest number of places that it can. Leaves without structure, biases among them,
    have no activations: a vector's B is its exact block, a matrix's rows share one B. A leaf of
    which a model uses a slice of rows, as of a table of positions, has a block of all its rows.
    Where a loss is concave, its curvature is left out.

    Attributes:
      samples: None for all columns of a root of the loss's Hessian (KFLR; Botev, Ritter and Barber
        2017), else how many random ones (KFAC).
      sharing: "expand" or "reduce".
      vectors: "block" for the exact block of a vector without activations, (P, P) for P elements;
        "diagonal" for its diagonal, which costs nothing to speak of; "joint" to take a bias as one
        more row of the weight to whose products it is added, met by an activation of 1 (Martens and
        Grosse 2015, section 2.1); of other vectors, and of biases in branches, the diagonal. The
        row is in the weight's block; a `BiasBlock` stands in the bias's place.
      empirical: whether to use the data's labels instead, of the gradient itself.
      label: for KFAC with labels drawn by ``label(key, prediction)``, or by "model" for a loss of
        `fb.losses`; None for random combinations of the root's columns.
    """

    samples: int | None = None
    sharing: str = "expand"
    vectors: str = "block"
    empirical: bool = False
    label: Callable | str | None = None

    def __post_init__(self):
        if self.sharing not in ("expand", "reduce"):
            raise ValueError(f'sharing={self.sharing!r}: choose "expand" or "reduce"')
        if self.vectors not in ("block", "diagonal", "joint"):
            raise ValueError(f'vectors={self.vectors!r}: choose "block", "diagonal" or "joint"')
        if self.empirical and (self.label is not None or self.samples is not None):
            raise ValueError("empirical=True takes the data's labels: leave out samples=, label=")
        if self.label is not None and self.samples is None:
            raise ValueError("label= draws labels: say how many with samples=")
        super().__post_init__()

    @property
    def columns(self) -> Any:
        if self.empirical:
            return LossGradient()
        if self.label is not None and self.samples is not None:
            return labels(self.samples, self.label)
        return HessianRoot(self.samples)

    def along(self, vectors) -> EigenvalueCorrection:
        """The second moments along eigenvectors, of the same columns as these factors."""
        return EigenvalueCorrection(vectors, self.columns)

    def extract(self, gradients):
        return gradients.factors(self.sharing, self.vectors)

    def scaled(self, found, scale):
        return jax.tree.map(
            lambda block: dataclasses.replace(block, b=block.b * jnp.asarray(scale, block.b.dtype)),
            found,
            is_leaf=lambda x: isinstance(x, KroneckerBlock),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class EigenvalueCorrection(Quantity):
    r"""The Gauss-Newton diagonal in the basis of Kronecker factors' eigenvectors.

    $$s = \frac1N \sum_{nc} \bigl(U_A^T G_{nc} U_B\bigr)^2$$

    elementwise, with $G_{nc}$ the gradient of column c (George et al. 2018, eq. 12): of all
    diagonal matrices in this basis it is the nearest to the Gauss-Newton matrix in Frobenius norm.
    Returns a pytree like the parameters of tuples of arrays (g, i, o), for
    `EigenFactors.with_values`.

    Attributes:
      vectors: a pytree like the parameters of tuples of `EigenBlock`: `EigenFactors.blocks`.
      columns: what is sent back, as of `Quantity`; by default all of the loss's Hessian.
    """

    vectors: Any
    columns: Any = HessianRoot()
    scales = True

    def __post_init__(self):
        kinds = EigenBlock | BiasBlock
        blocks = jax.tree.leaves(self.vectors, is_leaf=lambda x: isinstance(x, kinds))
        if not all(isinstance(block, kinds) for block in blocks):
            raise TypeError("vectors must be a tree of tuples of blocks, `EigenFactors.blocks`")

    def extract(self, gradients):
        return gradients.squares_along(self.vectors)
