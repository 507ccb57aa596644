"""What rules of linear algebra are written in: products, transposes, triangles and diagonals.

All act on the last two axes; the axes before them are a batch.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax


def is_complex(x) -> bool:
    return np.issubdtype(x.dtype, np.complexfloating)


def transposed(x):
    return lax.transpose(x, (*range(x.ndim - 2), x.ndim - 1, x.ndim - 2))


def conj(x):
    """The complex conjugate; of a real array, itself."""
    return lax.conj(x) if is_complex(x) else x


def adjoint(x):
    """The conjugate transpose."""
    return conj(transposed(x))


def matmul(a, b):
    batch = tuple(range(a.ndim - 2))
    dims = (((a.ndim - 1,), (a.ndim - 2,)), (batch, batch))
    return lax.dot_general(a, b, dims, precision=lax.Precision.HIGHEST)


def triangle(x, lower: bool, offset: int = 0):
    """The lower or upper triangle of `x`, `offset` diagonals inside it."""
    rows = lax.broadcasted_iota(np.int32, x.shape, x.ndim - 2)
    columns = lax.broadcasted_iota(np.int32, x.shape, x.ndim - 1)
    depth = lax.sub(rows, columns) if lower else lax.sub(columns, rows)
    return lax.select(lax.ge(depth, np.int32(offset)), x, lax.full_like(x, 0))


def diagonal(x):
    """The diagonals of square matrices, as vectors."""
    return lax.reduce_sum(lax.mul(x, eye_like(x)), (x.ndim - 1,))


def diagonal_matrix(d):
    """Matrices with the given diagonals."""
    shape = (*d.shape, d.shape[-1])
    stretched = lax.broadcast_in_dim(d, shape, tuple(range(d.ndim)))
    return lax.select(_on_diagonal(shape), stretched, lax.full_like(stretched, 0))


def eye_like(x):
    """The identity, in the shape and dtype of `x`."""
    return lax.convert_element_type(_on_diagonal(x.shape), x.dtype)


def _on_diagonal(shape):
    rows = lax.broadcasted_iota(np.int32, shape, len(shape) - 2)
    return lax.eq(rows, lax.broadcasted_iota(np.int32, shape, len(shape) - 1))


def imaginary(x):
    """The imaginary part as a complex array; of a real array, zeros."""
    if not is_complex(x):
        return lax.full_like(x, 0)
    part = lax.imag(x)
    return lax.complex(lax.full_like(part, 0), part)


def columns(x, start: int, stop: int):
    return lax.slice_in_dim(x, start, stop, axis=x.ndim - 1)


def rows(x, start: int, stop: int):
    return lax.slice_in_dim(x, start, stop, axis=x.ndim - 2)


def scale_columns(x, d):
    """x diag(d)."""
    return lax.mul(x, lax.broadcast_in_dim(d, x.shape, (*range(d.ndim - 1), x.ndim - 1)))


def scale_rows(d, x):
    """diag(d) x."""
    return lax.mul(lax.broadcast_in_dim(d, x.shape, tuple(range(d.ndim))), x)


def solve(a, b):
    """a⁻¹ b."""
    return jnp.linalg.solve(a, b)
