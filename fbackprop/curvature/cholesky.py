"""Solving with positive semi-definite matrices that may be singular."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jax.scipy.linalg import cho_factor, cho_solve

from fbackprop.sites import wide


def floor(matrix) -> jax.Array:
    """The least damping of matrices (…, n, n), max(n · ε, ε^¾) times the largest diagonal element.

    A Cholesky factor needs n · ε. Along what is singular a solution has errors of ε / damping,
    relative to the right-hand side: with ε^¾ these are ε^¼.
    """
    n, matrix = matrix.shape[-1], wide(matrix)
    largest = jnp.max(jnp.abs(jnp.diagonal(matrix, axis1=-2, axis2=-1)), axis=-1)
    eps = jnp.finfo(matrix.dtype).eps
    return max(n * eps, eps**0.75) * jnp.where(largest > 0, largest, 1)


def damped(matrix, damping) -> jax.Array:
    """``matrix + damping I``, the damping not below the floor; matrices (…, n, n), dampings (…)."""
    matrix = wide(matrix)
    damping = jnp.maximum(jnp.asarray(damping, matrix.dtype), floor(matrix))
    eye = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
    return matrix + jnp.multiply.outer(damping, eye)


# Under vmap one after the other: batched factorizations that run side by side can exhaust the
# threads of a CPU client before JAX 0.12, which then waits for ever.


@sequential_vmap
def factor(matrix, damping) -> jax.Array:
    """The lower Cholesky factor of a damped matrix, for `solve`."""
    return cho_factor(damped(matrix, damping), lower=True)[0]


@sequential_vmap
def solve(factored, vector) -> jax.Array:
    """The solution for a right-hand side (n,) or (n, k)."""
    return cho_solve((factored, True), vector)


@sequential_vmap
def eigen(matrix) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, those that are but rounding errors set to zero, and eigenvectors as columns."""
    values, vectors = jnp.linalg.eigh(matrix)
    least = len(matrix) * jnp.finfo(matrix.dtype).eps * values[-1]
    return jnp.where(values > least, values, 0), vectors


@jax.jit  # traced once for factors of one shape
def inverse(matrices, dampings) -> jax.Array:
    """The inverses of damped matrices, (g, n, n) with dampings (g,), one after the other."""
    if len(matrices) == 1:  # without a loop, which takes longer to trace
        return _inverse(matrices[0], dampings[0])[None]
    return jax.vmap(_inverse)(matrices, dampings)


def _inverse(matrix, damping):
    factored = factor(matrix, damping)
    return solve(factored, jnp.eye(len(factored), dtype=factored.dtype))
