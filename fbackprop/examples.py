"""A batch of examples, checked."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fbackprop.program import explicit_axes, type_of, value_of


class Examples(NamedTuple):
    """Examples with a leading axis.

    Attributes:
      inputs: of the model, a tuple of pytrees; its key, if it takes one, comes last.
      target: of the loss.
      key: for columns that are drawn.
      shares: (N,), what each example counts in the mean.
    """

    inputs: tuple
    target: Any
    key: Any
    shares: Any


def examples_of(batch, further, weights, key, takes_key: bool, like=None) -> Examples:
    """A batch, checked; `like` are the inputs of another whose examples it must resemble."""
    n = size_of(batch, further, weights)
    x, y = batch
    _check_key(key)
    keys = (None, None) if key is None else jax.random.split(key, (2, n))
    inputs = (x, *further, keys[0]) if takes_key else (x, *further)
    if like is not None and one_of(inputs) != one_of(like):
        raise ValueError(
            f"an example of the second batch is {one_of(inputs)}, but one of the batch is "
            f"{one_of(like)}: both must be of the same shapes"
        )
    weights = jnp.ones(n) if weights is None else jnp.asarray(weights, float)
    return Examples(inputs, y, keys[1], weights / jnp.sum(weights))


def size_of(batch, further, weights) -> int:
    """N of a batch, checked."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        said = f"a {type(batch).__name__}"
        if isinstance(batch, tuple | list):
            said += f" of {len(batch)}"
        elif hasattr(batch, "shape"):
            said = f"an array of shape {batch.shape}"
        raise ValueError(f"a batch must be a pair (inputs, targets), but it is {said}")
    return length((*batch, *further), weights)


def one_of(inputs):
    """The types of one example's inputs."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], type_of(x).dtype), inputs)


def total_weight(weights, n: int):
    return float(n) if weights is None else jnp.sum(jnp.asarray(weights, float))


def length(trees, weights) -> int:
    """N, the length of every leading axis."""
    sizes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
        shape = jnp.shape(leaf)
        k = path[0].idx
        name = ("inputs", "targets")[k] if k < 2 else f"further inputs {k - 1}"
        name += jax.tree_util.keystr(path[1:])
        if not shape:
            raise ValueError(f"the {name} have no axis of examples: they are a scalar")
        sizes[name] = shape[0]
        if axes := explicit_axes(leaf):
            raise ValueError(
                f"the {name} are sharded over {axes} of an explicit mesh, where a sweep would have "
                "to say how all is laid out: make the mesh with axis_types=AxisType.Auto"
            )
        if not isinstance(shape[0], int):
            raise TypeError(
                f"the {name} are {shape[0]} examples: a sweep is of a batch of known size, and is "
                "exported for one"
            )
    if weights is not None:
        if isinstance(weights, list | tuple):  # traced ones are no NumPy array
            traced = any(isinstance(w, jax.Array) for w in weights)
            weights = (jnp if traced else np).asarray(weights)
        _check_weights(weights)
        sizes["weights"] = jnp.shape(weights)[0]
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise ValueError(f"the leading axes of a batch must be of one length, but are {said}")
    if not sizes:
        raise ValueError("the batch holds no arrays: their leading axes are the examples")
    if 0 in sizes.values():
        raise ValueError("the batch is empty: it must hold at least one example")
    return next(iter(sizes.values()))


def _check_key(key) -> None:
    typed = hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    raw = hasattr(key, "dtype") and key.dtype == jnp.uint32
    if key is not None and not (typed and key.shape == ()) and not (raw and key.ndim == 1):
        said = f"{key.dtype}{list(key.shape)}" if hasattr(key, "shape") else repr(key)
        raise TypeError(f"key={said}: pass one key, of jax.random.key")


def _check_weights(weights) -> None:
    dtype = weights.dtype if hasattr(weights, "dtype") else np.asarray(weights).dtype
    if not any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)):
        raise TypeError(f"weights must be real numbers, but are of dtype {dtype}")
    if jnp.ndim(weights) != 1:
        raise ValueError(f"weights must have shape (N,), but have {jnp.shape(weights)}")
    known = value_of(weights)
    if known is not None:
        dtype = jnp.result_type(float)
        with np.errstate(over="ignore"):
            known = np.asarray(known).astype(dtype)
            total = np.sum(known)
        if not np.all(np.isfinite(known)):
            raise ValueError("weights must be finite: an example counts as much as it weighs")
        if np.any(known < 0):
            raise ValueError("weights must not be negative: an example counts as much as it weighs")
        if not np.any(known):
            raise ValueError("all weights are zero: at least one example must count")
        if not jnp.finfo(dtype).tiny <= total < np.inf:
            raise ValueError(f"the sum of the weights is out of {dtype}'s range: scale them")
