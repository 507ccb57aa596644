"""Kronecker factors of a block of the Gauss-Newton matrix, and how they are made of sites."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fbackprop.sites import Dense, Layout, OneHot, Site, contract, most_places, wide


class Place(NamedTuple):
    """Where a weight's elements are in the leaf that it rearranges: an offset and strides.

    Attributes:
      offset: the first element's place in the flattened leaf.
      shape, strides: of the weight, the strides in elements.
      leaf: the leaf's shape.
    """

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    leaf: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many elements the leaf has."""
        return math.prod(self.leaf)

    def indices(self) -> np.ndarray:
        """The place of every element in the flattened leaf, of the weight's shape."""
        found = np.full(self.shape, self.offset)
        for axis, stride in enumerate(self.strides):
            steps = stride * np.arange(self.shape[axis])
            found += np.expand_dims(steps, [k for k in range(found.ndim) if k != axis])
        return found

    @property
    def _is_all(self) -> bool:
        """Whether the weight is the whole leaf, perhaps with its axes in another order."""
        return self.offset == 0 and math.prod(self.shape) == self.size and min(self.strides) > 0

    @property
    def _order(self) -> tuple[int, ...]:
        """The weight's axes as memory has them."""
        axes = range(len(self.shape))
        return tuple(sorted(axes, key=lambda k: (-self.strides[k], self.shape[k])))

    def take(self, leaf):
        """The weight, of its shape, from the leaf."""
        flat = leaf.reshape(-1)
        if not self.shape:
            return flat[self.offset]
        if not self._is_all:
            return flat[self.indices()]
        order = self._order
        return flat.reshape([self.shape[k] for k in order]).transpose(np.argsort(order))

    def put(self, weight):
        """The leaf, zero where the weight is not."""
        if self.shape and self._is_all:
            return weight.transpose(self._order).reshape(self.leaf)
        flat = jnp.zeros(self.size, weight.dtype).at[self.indices()].set(weight)
        return flat.reshape(self.leaf)


class BiasRow(NamedTuple):
    """A bias as the last row of the weight to whose products it is added.

    Attributes:
      leaf: which leaf of the parameters it is, or is a part of.
      place: where (g, o) are in that leaf.
    """

    leaf: int
    place: Place


class Block:
    """What a block of a matrix over one parameter's elements has: where they are.

    Attributes:
      layout: how the weight's axes are grouped into g, i and o.
      place: where the weight is in the parameter.
      bias: the bias that is one row more, if any: i counts it.
    """

    layout: Layout
    place: Place
    bias: BiasRow | None

    def arrange(self, leaf: int, leaves: Sequence) -> jax.Array:
        """The elements (g, i, o) in the leaves of a tree; the weight's is number `leaf`."""
        x = self.layout.arrange(self.place.take(leaves[leaf]))
        if self.bias is None:
            return x
        row = self.bias.place.take(leaves[self.bias.leaf])
        return jnp.concatenate([x, row[:, None]], axis=1)

    def restore(self, leaf: int, x) -> list[tuple[int, jax.Array]]:
        """Leaves, each with its number, with elements (g, i, o) in their places, zero elsewhere.

        Those of one number add up: weight and bias may be parts of one leaf.
        """
        if self.bias is None:
            return [(leaf, self.place.put(self.layout.restore(x)))]
        weight = self.place.put(self.layout.restore(x[:, :-1]))
        return [(leaf, weight), (self.bias.leaf, self.bias.place.put(x[:, -1]))]

    def indices(self) -> np.ndarray:
        """The place in the flattened parameter of every (g, i, o), a bias left out."""
        return self.layout.arrange(self.place.indices())

    def indices_among(self, starts: Sequence[int], leaf: int) -> np.ndarray:
        """The place of every (g, i, o) among all flattened leaves, which begin at `starts`."""
        own = starts[leaf] + self.indices()
        if self.bias is None:
            return own
        row = starts[self.bias.leaf] + self.bias.place.indices()
        return np.concatenate([own, row[:, None]], axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BiasBlock:
    """Stands for a bias, or a part of one, of which the block is that of the weight it is added to.

    Attributes:
      place: where it is in the parameter.
      dtype: of the block.
    """

    place: Place = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KroneckerBlock(Block):
    """A block ``A ⊗ B`` of the Gauss-Newton matrix, for (a part of) one parameter.

    The weight is seen as (g, i, o): g parts with factors of their own, i inputs and o outputs. With
    a bias there is one input more, the last, which is always 1.

    Attributes:
      a: factor of the activations, (g, i, i); or (g, i), the diagonal of one.
      b: factor of the error signals, (g, o, o).
      layout, place, bias: as of `Block`.
    """

    a: Any
    b: Any
    layout: Layout = dataclasses.field(metadata={"static": True})
    place: Place = dataclasses.field(metadata={"static": True})
    bias: BiasRow | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def dtype(self):
        return self.b.dtype

    def times(self, x) -> jax.Array:
        """The block times elements (g, i, o)."""
        x = self.a[..., None] * x if self.a.ndim == 2 else self.a @ x
        return x @ self.b

    def diagonal(self) -> jax.Array:
        """The diagonal, (g, i, o)."""
        a, b = diagonal_of(self.a), diagonal_of(self.b)
        return a[:, :, None] * b[:, None, :]

    def dense(self) -> jax.Array:
        """The parts as matrices, (g, i o, i o)."""
        product = jnp.einsum("gij,gop->giojp", matrices_of(self.a), self.b)
        g, i, o = product.shape[:3]
        return product.reshape(g, i * o, i * o)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EigenBlock(Block):
    """A block ``(U_A ⊗ U_B) diag(values) (U_A ⊗ U_B)ᵀ``.

    Attributes:
      a: eigenvectors of the activations' factor, (g, i, i); None for unit vectors.
      b: those of the error signals' factor, (g, o, o).
      values: (g, i, o).
      layout, place, bias: as of `Block`.
    """

    a: Any
    b: Any
    values: Any
    layout: Layout = dataclasses.field(metadata={"static": True})
    place: Place = dataclasses.field(metadata={"static": True})
    bias: BiasRow | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def dtype(self):
        return self.b.dtype

    def turn(self, x):
        """U_Aᵀ x U_B, of (…, g, i, o)."""
        if self.a is not None:
            x = self.a.mT @ x
        return x @ self.b

    def turn_back(self, x):
        """U_A x U_Bᵀ."""
        if self.a is not None:
            x = self.a @ x
        return x @ self.b.mT

    def times(self, x):
        """The block times elements (g, i, o)."""
        return self.turn_back(self.values * self.turn(x))

    def diagonal(self):
        """The diagonal, (g, i, o)."""
        a = self.a
        if a is None:
            a = jnp.eye(self.values.shape[1], dtype=self.dtype)[None]
        return a**2 @ self.values @ (self.b**2).mT

    def dense(self):
        """The parts as matrices, (g, i o, i o)."""
        g, i, o = self.values.shape
        basis = jnp.eye(i * o, dtype=self.values.dtype).reshape(i * o, 1, i, o)
        found = jax.vmap(self.times)(jnp.broadcast_to(basis, (i * o, g, i, o)))
        return found.swapaxes(0, 1).reshape(g, i * o, i * o)


def block_of_sites(
    sites: Sequence[Site], view, start, shares, counts, sharing: str, bias: BiasRow | None = None
) -> KroneckerBlock:
    """The block of sites that meet the same part of a weight in the same orientation.

    Args:
      sites: the sites.
      view, start: arrays that stand for the weight and for the leaf that it is a view of.
      shares: (N,), what each example counts in the mean; or one number for all.
      counts: (N, C), what each of its columns does; or one number for all.
      sharing: "expand" or "reduce".
      bias: what is added wherever the weight is used, to be one row more.
    """
    n_places = max(most_places(sites), 1)  # of none the factors are zero
    into: list[Dense | OneHot] = [site.rows for site in sites]
    if bias is not None:
        into = [_with_one(p) for p in into]
    out: list[Dense | OneHot] = [Dense(site.b) for site in sites]
    if sharing == "reduce":
        into = [Dense(sum(map(_over_places, into)) / n_places**0.5)]
        out = [Dense(sum(map(_over_places, out)))]
    a = _sum([_outer(p, shares) for p in into]) / n_places
    b = _sum([_outer(q, counts) for q in out])
    return KroneckerBlock(a, b, sites[0].layout, place_of(view, start), bias)


def is_vector(shape: Sequence[int]) -> bool:
    """Whether no more than one axis is longer than one: a bias of (C, 1, 1) is a vector, too."""
    return sum(size > 1 for size in shape) < 2


def block_without_activations(each, view, start, depth: int, shares, counts) -> KroneckerBlock:
    """The block of a weight without activations: its rows share a factor, save those of a stack."""
    shape = each.shape[2 + depth :]
    stack, rows, last = math.prod(each.shape[2 : 2 + depth]), 1, math.prod(shape)
    if not is_vector(shape):
        rows, last = math.prod(shape[:-1]), shape[-1]
    x = wide(each).reshape(*each.shape[:2], stack, rows, last).swapaxes(2, 3)
    mean = jnp.sum(jnp.broadcast_to(shares, len(each)))  # over all pieces of a batch it is one
    a = jnp.full((stack, rows), mean / rows, x.dtype)
    layout = Layout(view.shape, (stack, rows, last), ((0,), (1,), (2,)))
    return KroneckerBlock(a, _outer(Dense(x), counts), layout, place_of(view, start))


def of_whole_leaf(block: KroneckerBlock) -> KroneckerBlock:
    """A block of some rows of a leaf, a diagonal factor for them, as one of all: zero for the rest.

    So blocks are of one kind however many rows of a table a sequence takes. Others are given back.
    """
    place, (parts, _, o) = block.place, block.layout.sizes
    if place.size == math.prod(place.shape) or parts > 1 or o == 0 or place.size % o:
        return block
    at = block.indices()[0]
    rows, whole = at[:, 0] // o, np.empty(place.leaf, np.int8)
    if not np.array_equal(at, o * rows[:, None] + np.arange(o)):
        return block
    sizes = (1, place.size // o, o)
    a = jnp.zeros(sizes[:2], block.a.dtype).at[:, rows].set(block.a)
    layout = Layout(place.leaf, sizes, ((0,), (1,), (2,)))
    return KroneckerBlock(a, block.b, layout, place_of(whole, whole))


def place_of(view: np.ndarray, leaf: np.ndarray) -> Place:
    """Where a view of the array that stands for a leaf lies in it."""
    offset = view.__array_interface__["data"][0] - leaf.__array_interface__["data"][0]
    return Place(offset, view.shape, view.strides, leaf.shape)


def diagonal_block(values, view: np.ndarray, start: np.ndarray, shares=1.0) -> KroneckerBlock:
    """A diagonal block, from its values: of the shape of the weight, a view of the leaf `start`.

    The shares are those of the examples in the whole batch, if the values are of a piece of it.
    """
    layout = Layout(view.shape, (1, view.size, 1), ((0,), (1,), (2,)))
    one = jnp.sum(jnp.asarray(shares, values.dtype)).reshape(1, 1, 1)  # over all pieces
    return KroneckerBlock(values.reshape(1, view.size), one, layout, place_of(view, start))


def regular_place(indices: np.ndarray, leaf: tuple[int, ...]) -> Place | None:
    """The place whose elements have these indices, (g, o), in a leaf; None if none has."""
    g, o = indices.shape
    across = int(indices[0, 1] - indices[0, 0]) if o > 1 else 1
    down = int(indices[1, 0] - indices[0, 0]) if g > 1 else across * o
    place = Place(int(indices[0, 0]), (g, o), (down, across), leaf)
    return place if np.array_equal(place.indices(), indices) else None


def matrices_of(factor):
    """A factor (g, f, f), of which the diagonal (g, f) may be given."""
    return factor if factor.ndim == 3 else jax.vmap(jnp.diag)(factor)


def diagonal_of(factor):
    """The diagonal (g, f) of a factor, or of its diagonal."""
    if factor.ndim == 2:
        return factor
    g, f, _ = factor.shape
    return factor.reshape(g, f * f)[:, :: f + 1]


def _sum(outers: Sequence):
    """The sum of matrices (g, f, f) and of diagonals (g, f) of such."""
    if len({x.ndim for x in outers}) > 1:
        outers = [matrices_of(x) for x in outers]
    return functools.reduce(jnp.add, outers)


def _with_one(p: Dense | OneHot) -> Dense:
    """The vectors with one element more, a 1: what a bias meets where the others meet a weight."""
    assert isinstance(p, Dense)  # tables have no row for a bias
    widths = [(0, int(axis == "f")) for axis in p.axes]
    return Dense(jnp.pad(p.x, widths, constant_values=1), p.axes)


def _over_places(p: Dense | OneHot):
    """Σₜ pₜ, (n, c, 1, g, f)."""
    x = jax.nn.one_hot(p.indices, p.size) if isinstance(p, OneHot) else wide(p.ordered())
    return jnp.sum(x, axis=2, keepdims=True)


def _outer(p: Dense | OneHot, shares):
    """Σ shares pₜ pₜᵀ over examples, columns and places, (g, f, f).

    Of one-hot vectors it is diagonal: (g, f). The shares are (N,), (N, C) or one number.
    """
    if isinstance(p, OneHot):
        n, g = p.indices.shape[0], p.indices.shape[-1]
        rows = jnp.broadcast_to(
            jnp.reshape(jnp.broadcast_to(shares, n), (n, 1, 1, 1)), p.indices.shape
        )
        groups = jnp.broadcast_to(jnp.arange(g), p.indices.shape)
        return jnp.zeros((g, p.size), rows.dtype).at[groups, p.indices].add(rows, mode="drop")
    x = wide(p.x)
    if jnp.ndim(shares) == 0:  # scales what is smaller
        if x.size > p.size**2:
            return shares * _squared(x, p)
        return _squared(x * shares**0.5, p)
    sizes = dict(zip("nc", (*shares.shape, 1), strict=False))
    roots = jnp.sqrt(shares).reshape([sizes.get(axis, 1) for axis in p.axes])  # n comes before c
    return _squared(x * roots.astype(x.dtype), p)


def _squared(x, p: Dense):
    """Σ pₜ pₜᵀ for the array x of a factor, (g, f, f)."""
    if "g" in p.axes and x.shape[p.axes.index("g")] > 1:
        return contract(f"{p.term()},{p.term(f='h')}->gfh", x, x)
    others = math.prod(size for axis, size in zip(p.axes, x.shape, strict=True) if axis != "f")
    if p.axes[-1] == "f":
        return symmetric_product(x.reshape(others, p.size), 1)[None]
    rows = x.transpose([p.axes.index("f"), *(k for k, axis in enumerate(p.axes) if axis != "f")])
    return symmetric_product(rows.reshape(p.size, others), 0)[None]


def symmetric_product(x, axis: int):
    """The products of all columns (axis 1) or rows (axis 0) of a matrix with each other.

    The result is symmetric: of a large one of long products, the lower left quarter is the upper
    right one's transpose, and not computed.
    """
    size, length = x.shape[axis], x.shape[1 - axis]
    summed = ((1 - axis,), (1 - axis,)), ((), ())
    if size <= 256 or length < 2 * size:
        return lax.dot_general(x, x, summed)
    first, second = jnp.split(x, [size // 2], axis)
    across = lax.dot_general(first, second, summed)
    top = jnp.concatenate([symmetric_product(first, axis), across], 1)
    return jnp.concatenate([top, jnp.concatenate([across.T, symmetric_product(second, axis)], 1)])
