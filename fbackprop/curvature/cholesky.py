"""Solving with positive semi-definite matrices that may be singular."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jax.scipy.linalg import cho_factor, cho_solve

from fbackprop.sites import wide


def floor(n: int, largest) -> jax.Array:
    """The least damping of a matrix (n, n) with this largest diagonal element.

    It is max(n · ε, ε^¾) times that. A Cholesky factor needs n · ε. Along what is singular a
    solution has errors of ε / damping, relative to the right-hand side: with ε^¾ these are ε^¼.
    """
    eps = jnp.finfo(largest.dtype).eps
    return max(n * eps, eps**0.75) * jnp.where(largest > 0, largest, 1)


# Under vmap one after the other: batched factorizations that run side by side can exhaust the
# threads of a CPU client before JAX 0.12, which then waits for ever.


@sequential_vmap
def factor(matrix, damping) -> jax.Array:
    """The lower Cholesky factor of ``matrix + damping I``, the damping raised to the floor."""
    matrix = wide(matrix)
    least = floor(len(matrix), jnp.max(jnp.abs(jnp.diagonal(matrix)), initial=0))
    damping = jnp.maximum(jnp.asarray(damping, matrix.dtype), least)
    return cho_factor(matrix + damping * jnp.eye(len(matrix), dtype=matrix.dtype), lower=True)[0]


@sequential_vmap
def solve(factored, vector) -> jax.Array:
    """The solution for a right-hand side (n,) or (n, k)."""
    return cho_solve((factored, True), vector)


@sequential_vmap
def eigen(matrix) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, those that are but rounding errors set to zero, and eigenvectors as columns."""
    values, vectors = jnp.linalg.eigh(matrix)
    least = len(matrix) * jnp.finfo(matrix.dtype).eps * jnp.max(values, initial=0)
    return jnp.where(values > least, values, 0), vectors


@jax.jit  # traced once for factors of one shape
def inverse(matrices, dampings) -> jax.Array:
    """The inverses of ``matrices + dampings I``, (g, n, n) and (g,), one after the other.

    The dampings are not raised: they are to be the `floor` at least.
    """
    if len(matrices) == 1:  # without a loop, which takes longer to trace
        return _inverse(matrices[0], dampings[0])[None]
    return jax.vmap(_inverse)(matrices, dampings)


@sequential_vmap
def _inverse(matrix, damping):
    matrix = wide(matrix)
    eye = jnp.eye(len(matrix), dtype=matrix.dtype)
    # LAPACK reads columns. A symmetric matrix is transposed for it instead of copied.
    return cho_solve(cho_factor((matrix + damping * eye).T, lower=True), eye).T
