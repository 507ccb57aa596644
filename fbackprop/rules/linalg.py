"""Linear algebra: solving with a triangular matrix."""

from __future__ import annotations

import numpy as np
from jax import lax
from jax.lax import linalg

from fbackprop.table import row


def _transposed(x):
    return lax.transpose(x, (*range(x.ndim - 2), x.ndim - 1, x.ndim - 2))


def _matmul(a, b):
    batch = tuple(range(a.ndim - 2))
    dims = (((a.ndim - 1,), (a.ndim - 2,)), (batch, batch))
    return lax.dot_general(a, b, dims, precision=lax.Precision.HIGHEST)


def _triangle(x, lower: bool, offset: int = 0):
    """The lower or upper triangle of `x`, `offset` diagonals inside it."""
    rows = lax.broadcasted_iota(np.int32, x.shape, x.ndim - 2)
    columns = lax.broadcasted_iota(np.int32, x.shape, x.ndim - 1)
    depth = lax.sub(rows, columns) if lower else lax.sub(columns, rows)
    return lax.select(lax.ge(depth, np.int32(offset)), x, lax.full_like(x, 0))


# --- triangular_solve ----------------------------------------------------------------------------
#
# x solves op(a) x = b, or x op(a) = b, where op may transpose and conjugate a triangular matrix.


def _right_side(ct, x, eqn):
    """The cotangent of b solves the transposed system."""
    options = {**eqn.params, "transpose_a": not eqn.params["transpose_a"]}
    return linalg.triangular_solve(x, ct, **options)


def _matrix(ct, x, out, eqn):
    """From op(a) dx = -d op(a) x: the product of the transposed system's solution with x."""
    p = eqn.params
    ct = _right_side(ct, x, eqn)
    ct = _matmul(ct, _transposed(out)) if p["left_side"] else _matmul(_transposed(out), ct)
    if p["transpose_a"]:
        ct = _transposed(ct)
    if p["conjugate_a"] and np.issubdtype(ct.dtype, np.complexfloating):
        ct = lax.conj(ct)
    return lax.neg(_triangle(ct, p["lower"], offset=int(p["unit_diagonal"])))


row("triangular_solve", _matrix, _right_side)
