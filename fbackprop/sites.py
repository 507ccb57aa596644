"""Sites: where a weight meets data, as pairs of activations and error signals.

The gradient of one example's column with respect to a weight is a sum over its uses, and at a use
a sum of outer products ``Σₜ aₜ bₜᵀ``, of the activations that went in with the error signals that
came back. What one wants to know of all the examples' gradients is a contraction of these two
factors, most of the time without any of those gradients being formed.

Axes, throughout:

    n, m    examples
    c, d    columns: the one gradient, or the columns of a root of the loss's Hessian
    t, u    places that share the weight: positions, pixels, time steps
    g       parts of the weight that meet a part of the data of their own: groups, stacked layers
    i, o    what goes in, what comes out (f: either)
"""

from __future__ import annotations

import collections
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def contract(axes: str, *operands):
    """`jnp.einsum` to which axes of length one do not matter.

    Axes that are neighbours wherever they occur are made one, so that a sum over examples and
    places is one product of two matrices, without a transposition.
    """
    ins, out = axes.split("->")
    terms = ins.split(",")
    sizes: dict[str, int] = {}
    for term, x in zip(terms, operands, strict=True):
        for axis, size in zip(term, x.shape, strict=True):
            sizes[axis] = sizes.get(axis, 1) if size == 1 else size
    for k, x in enumerate(operands):
        terms[k] = "".join(a for a, size in zip(terms[k], x.shape, strict=True) if size != 1)
    arrays = [x.reshape([n for n in x.shape if n != 1]) for x in operands]
    terms.append("".join(a for a in out if any(a in term for term in terms)))
    shape = [sizes[a] if a in terms[-1] else 1 for a in out]
    while pair := _inseparable(terms):
        arrays = [_merged(x, term.find(pair)) for x, term in zip(arrays, terms, strict=False)]
        terms = [term.replace(pair, pair[0]) for term in terms]
    return jnp.einsum(",".join(terms[:-1]) + "->" + terms[-1], *arrays).reshape(shape)


def _inseparable(terms: list[str]) -> str | None:
    """Two axes that are neighbours, in this order, in every term that has either."""
    for a, b in (pair for term in terms for pair in itertools.pairwise(term)):
        if all(a + b in term or not (a in term or b in term) for term in terms):
            return a + b
    return None


def _merged(x, axis: int):
    """`x` with an axis and the next as one; as it is for axis −1."""
    if axis < 0:
        return x
    both = math.prod(x.shape[axis : axis + 2])
    return x.reshape(*x.shape[:axis], both, *x.shape[axis + 2 :])


def over_columns(x, shares):
    """Σ𝒸 shares[n, c] x[n, c, …], (n, …)."""
    if x.shape[1] == 1:  # as a matrix, which XLA can overwrite
        scaled = x.reshape(len(x), math.prod(x.shape[1:])) * shares.astype(x.dtype)
        return scaled.reshape(len(x), *x.shape[2:])
    shares = shares.astype(x.dtype).reshape(*shares.shape, *(1,) * (x.ndim - 2))
    return jnp.sum(x * shares, axis=1)


def wide(x):
    """At least single precision, for sums of squares."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


# --- factors --------------------------------------------------------------------------------------


class Dense(NamedTuple):
    """A factor as an array.

    Attributes:
      x: the array.
      axes: which axis is which, in the order in which memory has them. An axis that is not there
        is of length one, as that of columns is where they do not differ.
    """

    x: Any
    axes: str = "nctgf"

    @property
    def size(self) -> int:
        return self.x.shape[self.axes.index("f")]

    @property
    def places(self) -> int:
        return self.x.shape[self.axes.index("t")] if "t" in self.axes else 1

    def term(self, **renamed: str) -> str:
        """The axes as an einsum has them, some by other letters."""
        return "".join(renamed.get(axis, axis) for axis in self.axes)

    def ordered(self):
        """The array with axes (n, c, t, g, f)."""
        kept = self.x.transpose([self.axes.index(axis) for axis in "nctgf" if axis in self.axes])
        return lax.expand_dims(kept, [k for k, axis in enumerate("nctgf") if axis not in self.axes])


class OneHot(NamedTuple):
    """A factor whose vectors each have a single one: its place is ``indices[n, 1, t, g]``.

    An index out of range stands for a vector of zeros.
    """

    indices: Any
    size: int

    @property
    def places(self) -> int:
        return self.indices.shape[2]


def inner(p: Dense | OneHot, q: Dense | OneHot):
    """⟨pₜ, qᵤ⟩ in the same example and column, (n, c, t, u, g)."""
    if isinstance(p, OneHot) and isinstance(q, OneHot):
        same = p.indices[:, :, :, None] == q.indices[:, :, None]
        return (same & (p.indices < p.size)[:, :, :, None]).astype(jnp.float32)
    if isinstance(p, OneHot) and isinstance(q, Dense):
        at = p.indices.transpose(0, 1, 3, 2)[:, :, None]  # (n, 1, 1, g, t)
        found = jnp.take_along_axis(wide(q.ordered()), at, axis=-1, mode="fill", fill_value=0)
        return found.transpose(0, 1, 4, 2, 3)
    if isinstance(q, OneHot):
        return inner(q, p).transpose(0, 1, 3, 2, 4)
    assert isinstance(p, Dense)
    return contract(f"{p.term()},{q.term(t='u')}->nctug", wide(p.x), wide(q.x))


def inner_all(p: Dense | OneHot, q: Dense | OneHot):
    """⟨pₜ, qᵤ⟩ in all pairs of examples and columns, (n, c, t, m, d, u, g)."""
    if isinstance(p, OneHot) and isinstance(q, OneHot):
        first = p.indices[:, :, :, None, None, None]
        same = (first == q.indices[None, None, None]) & (first < p.size)
        return same.astype(jnp.float32)
    if isinstance(p, OneHot) and isinstance(q, Dense):
        n, _, t, g = p.indices.shape
        at = p.indices.reshape(n * t, g)
        take = functools.partial(jnp.take, axis=-1, mode="fill", fill_value=0)
        # (g, m, d, u, n t)
        found = jax.vmap(take, in_axes=(3, 1), out_axes=0)(wide(q.ordered()), at)
        found = found.reshape(*found.shape[:-1], n, 1, t)
        return found.transpose(4, 5, 6, 1, 2, 3, 0)
    if isinstance(q, OneHot):
        return inner_all(q, p).transpose(3, 4, 5, 0, 1, 2, 6)
    assert isinstance(p, Dense)
    other = q.term(n="m", c="d", t="u")
    return contract(f"{p.term()},{other}->nctmdug", wide(p.x), wide(q.x))


def with_one(p: Dense | OneHot) -> Dense:
    """A factor with a 1 after each of its vectors."""
    assert isinstance(p, Dense)  # tables have no row for a bias
    widths = [(0, int(axis == "f")) for axis in p.axes]
    return Dense(jnp.pad(p.x, widths, constant_values=1), p.axes)


def turned_factor(p: Dense | OneHot, u) -> Dense | OneHot:
    """Uᵀ pₜ for orthonormal columns U (g, f, f); None leaves a factor as it is."""
    if u is None:
        return p
    if isinstance(p, OneHot):
        rows = u.at[jnp.arange(len(u)), p.indices].get(mode="fill", fill_value=0)
        return Dense(rows)
    grouped = p.axes if "g" in p.axes else p.axes.replace("f", "gf")
    turned = "".join("h" if axis == "f" else axis for axis in grouped)
    return Dense(contract(f"{p.axes},gfh->{turned}", p.x, u), grouped)


# --- how a weight's axes are grouped --------------------------------------------------------------


class Layout(NamedTuple):
    """A weight of any shape as an array of axes (g, i, o).

    Attributes:
      shape: its own.
      split: the same with some axes split in two, as by a reshape.
      groups: which axes of `split` make up g, i and o.
    """

    shape: tuple[int, ...]
    split: tuple[int, ...]
    groups: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(math.prod(self.split[axis] for axis in group) for group in self.groups)

    def restore(self, x):
        """An array (…, g, i, o) as (…, *shape)."""
        order = [axis for group in self.groups for axis in group]
        lead = x.shape[:-3]
        x = x.reshape(*lead, *(self.split[axis] for axis in order))
        n = len(lead)
        x = x.transpose(*range(n), *(n + int(k) for k in np.argsort(order)))
        return x.reshape(*lead, *self.shape)

    def arrange(self, x):
        """An array (…, *shape) as (…, g, i, o): the inverse of `restore`."""
        order = [axis for group in self.groups for axis in group]
        lead = x.shape[: x.ndim - len(self.shape)]
        x = x.reshape((*lead, *self.split))
        x = x.transpose((*range(len(lead)), *(len(lead) + k for k in order)))
        return x.reshape((*lead, *self.sizes))


# --- sites ----------------------------------------------------------------------------------------


class Site:
    """What the uses of a weight at one line of the model contribute to its gradient.

    Attributes:
      a: activations, a factor of one column over i.
      b: error signals, (n, c, t, g, o).
      layout: how the weight's axes are grouped.
      use: the use that it is of; None where the weight has no structure: a is 1 and b the whole
        gradient.
      met: what the weight met there, as it was.
    """

    use: Any = None
    met: Any = None

    def __init__(self, a: Dense | OneHot, b, layout: Layout):
        self._a, self.b, self.layout = a, b, layout

    @property
    def a(self) -> Dense | OneHot:
        return self._a

    @property
    def places(self) -> int:
        """T, how many places share the weight."""
        return self.b.shape[2]

    @property
    def is_lookup(self) -> bool:
        """Whether the activations are one-hot."""
        return isinstance(self._a, OneHot)

    @property
    def activations(self) -> int:
        """How many numbers they are for one example."""
        _, i, _ = self.layout.sizes
        return self.places * (1 if self.is_lookup else i)

    def some(self, first, size: int) -> Site:
        """The site of some of the examples."""
        b = lax.dynamic_slice_in_dim(self.b, first, size)
        a = self.a
        if isinstance(a, OneHot):
            return Site(
                OneHot(lax.dynamic_slice_in_dim(a.indices, first, size), a.size), b, self.layout
            )
        x = a.x
        if "n" in a.axes and x.shape[a.axes.index("n")] > 1:
            x = lax.dynamic_slice_in_dim(x, first, size, a.axes.index("n"))
        return Site(Dense(x, a.axes), b, self.layout)

    @property
    def rows(self) -> Dense | OneHot:
        """`a` in the order that suits sums over examples and places."""
        return self.a

    def total(self, shares):
        """Σₙ𝒸 shares[n, c] · gradient, of the weight's shape."""
        b = over_columns(self.b, shares)
        if isinstance(self.a, OneHot):
            return self.layout.restore(scatter(self.a, b))
        return self.layout.restore(contract(self.a.term(f="i") + ",ntgo->gio", self.a.x, b))

    def along(self, direction):
        """⟨gradient, direction⟩ for a direction of the weight's shape, (n, c)."""
        v = self.layout.arrange(direction)
        if isinstance(self.a, OneHot):
            groups = jnp.arange(len(v))
            met = v.at[groups, self.a.indices].get(mode="fill", fill_value=0)
        else:
            met = contract(self.a.term(f="i") + ",gio->nctgo", self.a.x, v)
        found = contract("nxtgo,nctgo->nc", wide(met), wide(self.b))
        return found.real  # of complex weights, made of real parameters


def _flatten(site: Site):
    a = site.a
    if isinstance(a, OneHot):
        return (a.indices, site.b), (OneHot, a.size, site.layout, site.use)
    return (a.x, site.b), (Dense, a.axes, site.layout, site.use)


def _unflatten(static, arrays) -> Site:
    kind, how, layout, use = static
    x, b = arrays
    site = Site(kind(x, how), b, layout)
    site.use = use
    return site


jax.tree_util.register_pytree_node(Site, _flatten, _unflatten)


def form(a: Dense | OneHot, b):
    """All gradients, (n, c, g, i, o), of activations and of error signals (n, c, t, g, o)."""
    if isinstance(a, OneHot):
        rows = jax.vmap(lambda at, b: _rows(at, b, a.size), (None, 0))
        return jax.vmap(rows)(a.indices[:, 0], b)
    if a.places == 1:  # broadcasting, where a product of matrices would have nothing to sum
        return a.ordered()[:, :, 0, :, :, None] * b[:, :, 0, :, None, :]
    return contract(a.term(f="i") + ",ndtgo->ndgio", a.x, b)


def _rows(indices, b, size: int):
    """The sum over t of rows b (t, g, o) at indices (t, g): (g, i, o)."""
    zeros = jnp.zeros((b.shape[1], size, b.shape[2]), b.dtype)
    groups = jnp.broadcast_to(jnp.arange(b.shape[1]), indices.shape)
    return zeros.at[groups, indices].add(b, mode="drop")


def scatter(a: OneHot, rows):
    """The sum over all examples of rows (n, t, g, o) at their indices: (g, i, o)."""
    n, t, g, o = rows.shape
    return _rows(a.indices.reshape(n * t, g), rows.reshape(n * t, g, o), a.size)


def whole(signals) -> Site:
    """The site of a weight used without structure, from its gradients (n, c, *shape)."""
    n, c, *shape = signals.shape
    size = math.prod(shape)
    layout = Layout(tuple(shape), (1, 1, size), ((0,), (1,), (2,)))
    one = jnp.ones((1, 1, 1, 1, 1), signals.dtype)
    return Site(Dense(one), signals.reshape(n, c, 1, 1, size), layout)


def most_places(sites: Sequence[Site], depth: int = 0) -> int:
    """How many places of these sites an example can meet: of the branches of a `cond`, one's.

    Args:
      sites: of uses of one weight.
      depth: in how many conditionals all of them are.
    """
    found = 0
    branches: dict = collections.defaultdict(lambda: collections.defaultdict(list))
    for site in sites:
        inside = site.use.branches[depth:]
        if inside:
            branches[inside[0][0]][inside[0][1]].append(site)
        else:
            found += site.places
    taken = ([most_places(x, depth + 1) for x in each.values()] for each in branches.values())
    return found + sum(map(max, taken))
