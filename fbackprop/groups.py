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

from fbackprop.program import known_length
from fbackprop.sites import (
    Dense,
    Layout,
    OneHot,
    Site,
    contract,
    form,
    inner,
    inner_all,
    over_columns,
    scatter,
    turned_factor,
    wide,
    with_one,
)

# How many numbers of formed gradients are held at a time.
BLOCK = 2**18


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
        if self._cost_of_comparing > self._cost_of_forming:
            return self._in_blocks(lambda each, shares: (None, formed_norms(each)))[1]
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
            if site.places == 1 or site.is_lookup:
                return self.layout.restore(_squares(site.a, site.b, shares))

        squares, _ = self._in_blocks(lambda each, s: (formed_squares(each, s), None), shares)
        return self.layout.restore(squares)

    def dots(self, other: Group):
        """⟨·, ·⟩ with the gradients of the same group in other examples, (n, c, m, d)."""
        pairs = list(itertools.product(self.members, other.members))
        compared = sum(
            _product((*p.site.b.shape[:4], *q.site.b.shape[:3]))
            for p, q in pairs
            if known_length(p.site.places) > 1 or p.site.is_lookup
        )
        formed = _product((*self._shape, *self.layout.sizes))
        if compared > formed:
            return formed_dots(self.each(), other.each())
        total: Any = 0.0
        for p, q in pairs:
            (a, b), (c, d) = p.factors, q.factors
            total += jnp.sum(inner_all(a, c) * inner_all(b, d), axis=(2, 5, 6))
        return total

    # --- forming a few gradients at a time

    def _in_blocks(self, function: Callable, shares=None):
        """What is made of the gradients, formed for a block of examples at a time.

        Args:
          function: of gradients (k, c, g, i, o) and their shares (k, c), to an array to be summed
            over the blocks or None, and an array with a leading axis of examples or None.
          shares: (n, c).
        """
        n, c = self._shape
        shares = jnp.ones((n, c)) if shares is None else shares
        activations = (known_length(p.site.activations) for p in self.members)
        held = max(c * _product(self.layout.sizes), *activations)
        size = _divisor(n, max(BLOCK // max(held, 1), 1))

        def block(first):
            sites = [placed.site.some(first, size) for placed in self.members]
            each = self._sum([form(site.a, site.b) for site in sites])
            return function(each, lax.dynamic_slice_in_dim(shares, first, size))

        if size == n:
            return block(0)

        def step(total, first):
            summed, own = block(first)
            return jax.tree.map(jnp.add, total, summed), own

        shapes, _ = jax.eval_shape(block, 0)
        start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, own = lax.scan(step, start, jnp.arange(0, n, size))
        return total, jax.tree.map(lambda x: x.reshape(n, *x.shape[2:]), own)

    @property
    def cost_of_norm(self) -> float:
        """Multiplications per example and column for a norm."""
        return min(self._cost_of_comparing, self._cost_of_forming)

    @property
    def _cost_of_comparing(self) -> float:
        """The same if places are compared with places."""
        total = 0.0
        for p, q in itertools.product(self.members, self.members):
            g, i, o = p.site.layout.sizes
            compared = o + (1 if p.site.is_lookup and q.site.is_lookup else i)
            total += _product((p.site.places, q.site.places, g, compared))
        return total

    @property
    def _cost_of_forming(self) -> float:
        """The same if the gradient is formed."""
        return sum(cost_of_forming(placed.site) for placed in self.members)


def turned(group: Group, u_a, u_b, with_bias: bool = False) -> Group:
    """The group with the gradients' axes i and o turned: U_Aᵀ gradient U_B, of axes (g, i, o).

    Args:
      u_a, u_b: orthonormal columns, (g, i, i) and (g, o, o); None leaves an axis as it is.
      with_bias: whether a bias is one row more, met by an activation of 1.
    """
    g, i, o = group.layout.sizes
    sizes = g, i + with_bias, o
    layout = Layout(sizes, sizes, ((0,), (1,), (2,)))
    members = []
    for weight, site, swapped in group.members:
        of_a, of_b = (u_b, u_a) if swapped else (u_a, u_b)
        b = site.b if of_b is None else contract("nctgo,goh->nctgh", site.b, of_b)
        own = layout if not swapped else Layout(*(_exchanged(sizes),) * 2, layout.groups)
        a = with_one(site.a) if with_bias else site.a
        members.append(Placed(weight, Site(turned_factor(a, of_a), b, own), swapped))
    return Group(members)


def _exchanged(sizes):
    g, i, o = sizes
    return g, o, i


def cost_of_forming(site: Site) -> float:
    """Multiplications per example and column to form a gradient and square it."""
    places = 1 if site.is_lookup else known_length(site.places)
    return _product(site.layout.sizes) * (2 + places)


def _product(lengths: Sequence) -> int:
    return math.prod(map(known_length, lengths))


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`."""
    return next(k for k in range(min(n, most), 0, -1) if n % k == 0)


def _squares(a: Dense | OneHot, b, shares):
    """Of single outer products those of the factors.

    Of lookups, places of one row add up before they are squared; each then counts its part.
    """
    if isinstance(a, Dense):
        b2 = over_columns(wide(b) ** 2, shares)
        return contract(a.term(f="i") + ",ntgo->gio", wide(a.x) ** 2, b2)
    same = inner(a, a)
    sums = contract("nztug,ncugo->nctgo", same, wide(b))
    parts = jnp.maximum(jnp.sum(same, axis=3), 1)[..., None]
    return scatter(a, over_columns(sums**2 / parts, shares))


# --- gradients that are formed --------------------------------------------------------------------


def formed_dots(x, y):
    """⟨·, ·⟩ of gradients (n, c, …) and (m, d, …), (n, c, m, d)."""
    x, y = wide(x), wide(y)
    size = math.prod(x.shape[2:])
    left, right = (z.reshape(*z.shape[:2], size) for z in (x, y))
    return contract("ncf,mdf->ncmd", left, right)


def formed_norms(x):
    """Squared norms of gradients (n, c, …), (n, c)."""
    return jnp.sum(wide(x) ** 2, axis=tuple(range(2, x.ndim)))


def formed_squares(x, shares):
    """Σₙ𝒸 shares[n, c] · gradient² of gradients (n, c, …)."""
    shares = wide(shares).reshape(*shares.shape, *(1,) * (x.ndim - 2))
    return jnp.sum(wide(x) ** 2 * shares, axis=(0, 1))
