"""Groups of sites that meet the same part of a parameter: their gradients add up.

The sites of one group have the same factors, or exchanged ones (a matrix and its transpose). What
is asked of the sum of their gradients is a contraction of factors where that is cheaper than to
form the gradients; where they are formed, it is in blocks of examples, so that little is held.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fbackprop.sites import (
    Dense,
    OneHot,
    Site,
    contract,
    form,
    inner,
    inner_all,
    over_columns,
    scatter,
    wide,
)

# How many numbers of formed gradients are held at a time.
BLOCK = 2**20


class Placed(NamedTuple):
    """A site, which weight it is of, and whether its factors change places with its group's."""

    weight: int
    site: Site
    swapped: bool

    @property
    def factors(self) -> tuple[Dense | OneHot, Dense | OneHot]:
        a, b = self.site.a, Dense(self.site.b)
        return (b, a) if self.swapped else (a, b)


class Group:
    """Sites of a group, the first of which decides on the orientation.

    Attributes:
      members: the sites.
      weight: the weight of the first.
      layout: how its axes are grouped.
    """

    def __init__(self, members: Sequence[Placed]):
        self.members = list(members)
        self.weight, first, _ = members[0]
        self.layout = first.layout

    @property
    def _shape(self) -> tuple[int, int]:
        """N and C."""
        return self.members[0].site.b.shape[:2]

    def each(self):
        """The gradients, (n, c, *weight)."""
        formed = [form(placed.site.a, placed.site.b) for placed in self.members]
        return self.layout.restore(self._sum(formed))

    def _sum(self, formed: Sequence):
        pairs = zip(formed, self.members, strict=True)
        return sum(x.swapaxes(-1, -2) if placed.swapped else x for x, placed in pairs)

    def norms(self):
        """Squared norms, (n, c)."""
        if self.cost_of_comparing > self.cost_of_forming:
            return self._in_pieces(lambda each, shares: (None, formed_norms(each)))[1]
        total: Any = 0.0
        for k, p in enumerate(self.members):
            (a, b), before = p.factors, self.members[: k + 1]
            for j, (c, d) in enumerate(q.factors for q in before):
                both = jnp.sum(inner(a, c) * inner(b, d), axis=(2, 3, 4))
                total += both if j == k else 2 * both
        return total

    def squares(self, shares):
        """Σₙ𝒸 shares[n, c] · gradient², elementwise, of the weight's shape."""
        shares = wide(shares)
        if len(self.members) == 1:
            site = self.members[0].site
            if isinstance(site.a, OneHot):
                return self.layout.restore(_squares_of_lookups(site.a, site.b, shares))
            if site.places == 1:
                a2, b2 = wide(site.a.x) ** 2, over_columns(wide(site.b) ** 2, shares)
                squares = contract(site.a.term(f="i") + ",ntgo->gio", a2, b2)
                return self.layout.restore(squares)

        squares, _ = self._in_pieces(lambda each, s: (formed_squares(each, s), None), shares)
        return self.layout.restore(squares)

    def dots(self, other: Group):
        """⟨·, ·⟩ with the gradients of the same group in other examples, (n, c, m, d)."""
        pairs = list(itertools.product(self.members, other.members))
        compared = sum(
            math.prod((*p.site.b.shape[:4], *q.site.b.shape[:3]))
            for p, q in pairs
            if p.site.places > 1 or isinstance(p.site.a, OneHot)
        )
        formed = math.prod((*self._shape, *self.layout.sizes))
        if compared > formed:
            return formed_dots(self.each(), other.each())
        total: Any = 0.0
        for p, q in pairs:
            (a, b), (c, d) = p.factors, q.factors
            total += jnp.sum(inner_all(a, c) * inner_all(b, d), axis=(2, 5, 6))
        return total

    # --- forming a few gradients at a time

    def _in_pieces(self, function: Callable, shares=None):
        """What is made of the gradients, formed in pieces: one column of some examples at a time.

        Args:
          function: of gradients (k, 1, g, i, o) and their shares (k, 1), to a pytree to be summed
            over the pieces, and an array (k, 1) or None.
          shares: (n, c).

        Returns:
          the sums, and the arrays as one of shape (n, c).
        """
        n, c = self._shape
        shares = jnp.ones((n, c)) if shares is None else shares
        size = _divisor(n, max(BLOCK // max(math.prod(self.layout.sizes), 1), 1))
        factors = [(placed.site.a, placed.site.b) for placed in self.members]
        if size == n and c == 1:
            return function(self._sum([form(a, b) for a, b in factors]), shares)

        def piece(place):
            first, column = place // c * size, place % c
            cut = [(_examples(a, first, size), _cut(b, first, size, column)) for a, b in factors]
            each = self._sum([form(a, b) for a, b in cut])
            return function(each, _cut(shares, first, size, column))

        def step(sums, place):
            new, own = piece(place)
            return jax.tree.map(jnp.add, sums, new), own

        shapes, _ = jax.eval_shape(piece, 0)
        start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        sums, own = lax.scan(step, start, jnp.arange(n // size * c))
        if own is not None:
            own = own.reshape(n // size, c, size).swapaxes(1, 2).reshape(n, c)
        return sums, own

    @property
    def cost_of_comparing(self) -> float:
        """Multiplications per example and column for a norm if places are compared with places."""
        total = 0.0
        for p, q in itertools.product(self.members, self.members):
            g, i, o = p.site.layout.sizes
            dense = isinstance(p.site.a, Dense) or isinstance(q.site.a, Dense)
            total += p.site.places * q.site.places * g * (o + (i if dense else 1))
        return total

    @property
    def cost_of_forming(self) -> float:
        """Multiplications per example and column for a norm if the gradient is formed."""
        return sum(cost_of_forming(placed.site) for placed in self.members)


def cost_of_forming(site: Site) -> float:
    """Multiplications per example and column to form a gradient and square it."""
    return math.prod(site.layout.sizes) * (2 + (site.places if isinstance(site.a, Dense) else 1))


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`."""
    return next(k for k in range(min(n, most), 0, -1) if n % k == 0)


def _cut(x, first, size: int, column):
    """Some examples of one column, (k, 1, …), of an array (n, c, …)."""
    starts = (first, column, *(0 for _ in x.shape[2:]))
    return lax.dynamic_slice(x, starts, (size, 1, *x.shape[2:]))


def _examples(a: Dense | OneHot, first, size: int) -> Dense | OneHot:
    """The activations of some examples."""
    if isinstance(a, OneHot):
        return OneHot(lax.dynamic_slice_in_dim(a.indices, first, size), a.size)
    return Dense(lax.dynamic_slice_in_dim(a.x, first, size, a.axes.index("n")), a.axes)


def _squares_of_lookups(a: OneHot, b, shares):
    """Places of one row add up before they are squared; each of them then counts its part."""
    same = inner(a, a)
    sums = contract("nztug,ncugo->nctgo", same, wide(b))
    parts = jnp.maximum(jnp.sum(same, axis=3), 1)[..., None]
    return scatter(a, over_columns(sums**2 / parts, shares))


# --- gradients that are formed --------------------------------------------------------------------


def formed_dots(x, y):
    """⟨·, ·⟩ of gradients (n, c, …) and (m, d, …), (n, c, m, d)."""
    x, y = wide(x), wide(y)
    left, right = x.reshape(*x.shape[:2], -1), y.reshape(*y.shape[:2], -1)
    return contract("ncf,mdf->ncmd", left, right)


def formed_norms(x):
    """Squared norms of gradients (n, c, …), (n, c)."""
    return jnp.sum(wide(x) ** 2, axis=tuple(range(2, x.ndim)))


def formed_squares(x, shares):
    """Σₙ𝒸 shares[n, c] · gradient² of gradients (n, c, …)."""
    return jnp.einsum("nc...,nc->...", wide(x) ** 2, wide(shares))
