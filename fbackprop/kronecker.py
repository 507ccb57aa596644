"""Kronecker factors of a block of the Gauss-Newton matrix, and how they are made of sites."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fbackprop.sites import Dense, Layout, OneHot, contract, wide


class Place(NamedTuple):
    """Where a weight's elements are in the leaf that it rearranges: an offset and strides."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    size: int

    def indices(self) -> np.ndarray:
        """The place of every element in the flattened leaf, of the weight's shape."""
        steps = np.ogrid[tuple(slice(n) for n in self.shape)]
        return self.offset + sum(
            (k * stride for k, stride in zip(steps, self.strides, strict=True)),
            np.zeros(self.shape, int),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KroneckerBlock:
    """A block ``A ⊗ B`` of the Gauss-Newton matrix, for (a part of) one parameter.

    The weight is seen as (g, i, o): g parts with factors of their own, i inputs and o outputs.

    Attributes:
      a: factor of the activations, (g, i, i); or (g, i), the diagonal of one.
      b: factor of the error signals, (g, o, o).
      layout: how the weight's axes are grouped into g, i and o.
      place: where the weight is in the parameter.
    """

    a: Any
    b: Any
    layout: Layout = dataclasses.field(metadata={"static": True})
    place: Place = dataclasses.field(metadata={"static": True})

    def dense(self) -> jax.Array:
        """The block as a matrix over the flattened parameter, (P, P), zero outside this part."""
        a = self.a if self.a.ndim == 3 else jax.vmap(jnp.diag)(self.a)
        product = jnp.einsum("gij,gop->giojp", a, self.b)  # (g, i, o, j, p)
        g, i, o = self.layout.sizes
        at = self._indices().reshape(g, i * o)
        blocks = product.reshape(g, i * o, i * o)
        found = jnp.zeros((self.place.size,) * 2, blocks.dtype)
        return found.at[at[:, :, None], at[:, None, :]].set(blocks)

    def _indices(self) -> np.ndarray:
        """The place in the flattened parameter of every (g, i, o)."""
        order = [axis for group in self.layout.groups for axis in group]
        split = self.place.indices().reshape(self.layout.split)
        return split.transpose(order).reshape(self.layout.sizes)


def factors(pairs: Sequence[tuple[Dense | OneHot, Dense | OneHot]], shares, sharing: str):
    """A and B of the sites of one weight, as (activations, error signals).

    Args:
      pairs: the sites' factors.
      shares: (N, C), what each column counts in the mean.
      sharing: "expand" or "reduce".
    """
    mean = jnp.max(shares, axis=1, keepdims=True)  # of examples, for what has one column
    n_places = sum(_places(a) for a, _ in pairs)
    if sharing == "expand":
        a: Any = sum(_outer(p, mean) for p, _ in pairs) / n_places
        return a, sum(_outer(q, shares) for _, q in pairs)
    a = sum(jnp.sum(_dense(p), axis=2, keepdims=True) for p, _ in pairs) / n_places
    b = sum(jnp.sum(_dense(q), axis=2, keepdims=True) for _, q in pairs)
    return _outer(Dense(a), mean), _outer(Dense(b), shares)


def _places(p: Dense | OneHot) -> int:
    return (p.indices if isinstance(p, OneHot) else p.x).shape[2]


def _dense(p: Dense | OneHot):
    if isinstance(p, OneHot):
        return jax.nn.one_hot(p.indices, p.size)
    return wide(p.x)


def _outer(p: Dense | OneHot, shares):
    """Σ shares[n, c] pₜ pₜᵀ, (g, f, f); of one-hot vectors its diagonal, (g, f)."""
    if isinstance(p, OneHot):
        n, _, t, g = p.indices.shape
        counts = jnp.zeros((g, p.size), shares.dtype)
        rows = jnp.broadcast_to(shares[:, :, None], p.indices.shape)
        return counts.at[jnp.broadcast_to(jnp.arange(g), p.indices.shape), p.indices].add(
            rows, mode="drop"
        )
    x = wide(p.x)
    if x.shape[1] == 1:
        shares = jnp.max(shares, axis=1, keepdims=True)
    shares = shares.astype(x.dtype)
    return contract("nctgf,nctgh->gfh", x * shares[:, :, None, None, None], x)
