"""The quantities by their definitions: each example's gradient and Jacobian, formed by JAX."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


def example_gradients(case):
    """A pytree like the parameters, leaves (N, *leaf)."""

    def loss(params, x, y):
        return case.loss(case.model(params, x), y)

    return floats(
        jax.vmap(jax.grad(loss, allow_int=True), (None, 0, 0))(case.params, *case.batch),
        case.params,
    )


def floats(tree, like):
    """Zeros where JAX has float0, for integer leaves."""

    def one(g, p):
        return np.zeros(g.shape, jnp.result_type(p)) if g.dtype == jax.dtypes.float0 else g

    return jax.tree.map(one, tree, like)


def compiled(function):
    """`jax.jit` for what runs once: little time is spent on making it fast."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


class Definitions(NamedTuple):
    """What the others are made of, as arrays of NumPy, for which nothing more is compiled.

    Attributes:
      losses: (N,).
      gradients: the examples', leaves (N, *leaf).
      jacobians: leaves (N, C, *leaf).
      hessians: the losses' at the predictions, (N, C, C).
    """

    losses: Any
    gradients: Any
    jacobians: Any
    hessians: Any


def definitions(case) -> Definitions:
    def of(params, batch):
        own = case._replace(params=params, batch=batch)
        losses = jax.vmap(lambda x, y: case.loss(case.model(params, x), y))(*batch)
        return Definitions(losses, example_gradients(own), jacobians(own), hessians(own))

    return jax.device_get(compiled(of)(case.params, case.batch))


def mean(tree):
    """Over examples; an integer leaf, which has no gradient, stays what it is."""

    def one(x):
        return x.mean(axis=0) if jnp.issubdtype(x.dtype, jnp.inexact) else x[0]

    return jax.tree.map(one, tree)


def flat_prediction(case, params, x):
    """What of a prediction has a derivative, as a vector."""
    return ravel_pytree(divide(case.model(params, x))[0])[0]


def jacobians(case):
    """A pytree like the parameters, leaves (N, C, *leaf)."""
    x, _ = case.batch
    moving, fixed, join = divide(case.params)

    def one(x):
        return jax.jacrev(lambda moving: flat_prediction(case, join(moving, fixed), x))(moving)

    found = jax.vmap(one)(x)
    c = found[0].shape[1] if found else 0
    zeros = [
        jnp.zeros((len(jax.tree.leaves(x)[0]), c, *jnp.shape(f)), jnp.result_type(f)) for f in fixed
    ]
    return join(found, zeros)


def divide(params):
    leaves, structure = jax.tree.flatten(params)
    is_float = [jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in leaves]
    moving = [leaf for leaf, f in zip(leaves, is_float, strict=True) if f]
    fixed = [leaf for leaf, f in zip(leaves, is_float, strict=True) if not f]

    def join(moving, fixed):
        moving, fixed = iter(moving), iter(fixed)
        return jax.tree.unflatten(structure, [next(moving) if f else next(fixed) for f in is_float])

    return moving, fixed, join


def hessians(case):
    """The losses' Hessians at the predictions, (N, C, C)."""
    x, y = case.batch

    def one(x, y):
        moving, fixed, join = divide(case.model(case.params, x))
        z, unravel = ravel_pytree(moving)
        return jax.hessian(lambda z: case.loss(join(unravel(z), fixed), y))(z)

    return jax.vmap(one)(x, y)


def ggn_of_examples(case):
    """Each example's dense blocks, (N, P, P) for every leaf."""
    h = hessians(case)

    def block(j):
        flat = j.reshape(*j.shape[:2], -1)
        return jnp.einsum("ncp,ncd,ndq->npq", flat, h, flat)

    return jax.tree.map(block, jacobians(case))


def hessian_diagonal(case):
    """Of the mean loss, like the parameters."""
    flat, unravel = ravel_pytree(case.params)

    def loss(flat):
        f = lambda x, y: case.loss(case.model(unravel(flat), x), y)  # noqa: E731
        return jnp.mean(jax.vmap(f)(*case.batch))

    return unravel(jnp.diagonal(jax.hessian(loss)(flat)))


def assert_close(ours, theirs, tolerance=1e-10):
    """Equal trees and shapes; values relative to the largest of a leaf, or to 1."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    paths = jax.tree_util.tree_leaves_with_path(theirs)
    for a, (path, b) in zip(jax.tree.leaves(ours), paths, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape, path
        scale = max(1.0, float(np.max(np.abs(b), initial=0.0)))
        np.testing.assert_allclose(
            a, b, rtol=0, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path)
        )
