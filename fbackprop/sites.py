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
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fbackprop.passes import pull_function
from fbackprop.separate import Use, untaken
from fbackprop.table import Rules


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
        return contract("nxtgo,nctgo->nc", wide(met), wide(self.b))


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


# --- sites of single primitives -------------------------------------------------------------------


def site_of(use: Use, met, signals, weight_shape) -> Site:
    """The site of a use of a weight.

    Args:
      use: the use.
      met: what the weight met there, (n, *loops, *operand).
      signals: the error signals of the result, (n, c, *loops, *result).
      weight_shape: the weight's, with the axes of stacked loops.
    """
    site = _MAKERS[use.eqn.primitive.name](use, met, signals, tuple(weight_shape))
    site.use, site.met = use, met
    return site


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


def row_added(site: Site, size: int) -> np.ndarray | None:
    """Which element of the bias is added to each (g, o) of what a site's weight gives.

    Args:
      site: of a use with a bias.
      size: how many elements the bias has.

    Returns:
      (g, o), in which every element occurs once; None where that is not so, or not in all places.
    """
    use, bias = site.use, site.use.bias
    if site.is_lookup or bias.stacked != tuple(loop.stacked for loop in use.loops):
        return None
    elements = bias.element_of([loop.length for loop in use.loops], size)
    maker = _MAKERS[use.eqn.primitive.name]
    b = maker(use, site.met, elements[None, None], site.layout.shape).b  # as error signals lie
    g, _, o = site.layout.sizes
    once = b.size == size and np.array_equal(np.sort(b, axis=None), np.arange(size))
    return b.reshape(g, o) if b.shape == (1, 1, 1, g, o) and once else None


def whole(signals) -> Site:
    """The site of a weight used without structure, from its gradients (n, c, *shape)."""
    n, c, *shape = signals.shape
    size = math.prod(shape)
    layout = Layout(tuple(shape), (1, 1, size), ((0,), (1,), (2,)))
    one = jnp.ones((1, 1, 1, 1, 1), signals.dtype)
    return Site(Dense(one), signals.reshape(n, c, 1, 1, size), layout)


def _group(x, lead: int, *groups):
    """The axes of `x` after the first `lead` gathered into groups, each of them one axis."""
    shape, axes = x.shape, [axis for group in groups for axis in group]
    x = x.transpose(*range(lead), *axes)
    return x.reshape(*shape[:lead], *(math.prod(shape[a] for a in group) for group in groups))


def _loops(use: Use) -> tuple[list[int], list[int]]:
    """Which of the loops around a use share the weight, and which have one per iteration."""
    shared = [i for i, loop in enumerate(use.loops) if not loop.stacked]
    return shared, [i for i, loop in enumerate(use.loops) if loop.stacked]


def _product(use: Use, met, signals, weight_shape) -> Site:
    """Of `dot_general`: the weight's axes are batch (g), contracted (i) and kept (o)."""
    eqn, w = use.eqn, use.operand
    contracted, batch = eqn.params["dimension_numbers"]
    x_aval, w_aval = eqn.in_avals[1 - w], eqn.in_avals[w]
    kept = [
        [d for d in range(aval.ndim) if d not in (*contracted[side], *batch[side])]
        for side, aval in ((w, w_aval), (1 - w, x_aval))
    ]
    shared, stacked = _loops(use)
    n_loops, n_batch = len(use.loops), len(batch[w])
    starts = (n_batch, n_batch + len(kept[0])) if w == 0 else (n_batch + len(kept[1]), n_batch)
    at = [[start + k for k in range(len(dims))] for start, dims in zip(starts, kept, strict=True)]

    def axes(dims, lead):
        return [lead + n_loops + d for d in dims]

    a = _group(
        met, 1,
        [1 + i for i in shared] + axes(kept[1], 1),
        [1 + i for i in stacked] + axes(batch[1 - w], 1),
        axes(contracted[1 - w], 1),
    )  # fmt: skip
    b = _group(
        signals, 2,
        [2 + i for i in shared] + axes(at[1], 2),
        [2 + i for i in stacked] + axes(range(n_batch), 2),
        axes(at[0], 2),
    )  # fmt: skip
    s = len(stacked)
    groups = (
        (*range(s), *(s + d for d in batch[w])),
        tuple(s + d for d in contracted[w]),
        tuple(s + d for d in kept[0]),
    )
    return Site(Dense(a[:, None]), b, Layout(weight_shape, weight_shape, groups))


def _lookup(use: Use, met, signals, weight_shape) -> Site:
    """Of whole rows, by `gather` or `dynamic_slice`: indices stand for one-hot activations."""
    eqn = use.eqn
    shared, stacked = _loops(use)
    s, n_loops = len(stacked), len(use.loops)
    size = weight_shape[s]
    is_slice = eqn.primitive.name == "dynamic_slice"
    indices = met if is_slice else met[..., 0]  # (n, *loops, *places)
    is_met = indices != untaken(indices.dtype) if use.branches else True
    if is_slice or eqn.params["mode"] == lax.GatherScatterMode.CLIP:
        indices = jnp.clip(indices, 0, size - 1)
    inside = (indices >= 0) & (indices < size) & is_met
    indices = jnp.where(inside, indices, size).astype(jnp.int32)
    places = range(n_loops, indices.ndim - 1)
    rows = range(n_loops + len(places), signals.ndim - 2)
    a = _group(indices, 1, [1 + i for i in (*shared, *places)], [1 + i for i in stacked])
    b = _group(
        signals, 2,
        [2 + i for i in (*shared, *places)],
        [2 + i for i in stacked],
        [2 + i for i in rows],
    )  # fmt: skip
    groups = (tuple(range(s)), (s,), tuple(range(s + 1, len(weight_shape))))
    return Site(OneHot(a[:, None], size), b, Layout(weight_shape, weight_shape, groups))


class _Convolution(Site):
    """Of a convolution's kernel: activations are patches, cut out only for what needs them."""

    is_lookup = False
    use: Use

    def __init__(self, use: Use, met, signals, weight_shape):
        self.use, self.met, self.signals = use, met, signals
        eqn = use.eqn
        numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
        shared, stacked = _loops(use)
        s, lead = len(stacked), 2 + len(use.loops)
        batch, feature, *space = numbers.out_spec
        # The features of the result are those of the groups, one group after the other.
        shape = list(signals.shape)
        shape[lead + feature : lead + feature + 1] = [groups, shape[lead + feature] // groups]
        after = [lead + d + (d > feature) for d in (batch, *space)]
        b = _group(
            signals.reshape(shape), 2,
            [2 + i for i in shared] + after,
            [2 + i for i in stacked] + [lead + feature],
            [lead + feature + 1],
        )  # fmt: skip
        out, into, *window = numbers.rhs_spec
        split = list(weight_shape)
        split[s + out : s + out + 1] = [groups, weight_shape[s + out] // groups]
        places = (
            (*range(s), s + out),
            tuple(s + d + (d > out) for d in (*window, into)),
            (s + out + 1,),
        )
        self.b, self.layout = b, Layout(weight_shape, tuple(split), places)

    @functools.cached_property
    def a(self):
        return self._patches(examples_first=True)

    @functools.cached_property
    def rows(self):
        return self._patches(examples_first=False)

    def some(self, first, size: int) -> Site:
        """Patches are cut for them alone."""
        met, signals = (lax.dynamic_slice_in_dim(x, first, size) for x in (self.met, self.signals))
        return _Convolution(self.use, met, signals, self.layout.shape)

    def _patches(self, examples_first: bool) -> Dense:
        eqn, (shared, stacked) = self.use.eqn, _loops(self.use)
        image = [1 + len(self.use.loops) + d for d in eqn.params["dimension_numbers"].lhs_spec]
        batch, feature, *space = image
        stacked, shared = [1 + i for i in stacked], [1 + i for i in shared]
        lead = [0, *stacked] if examples_first else stacked
        rest = shared if examples_first else [0, *shared]
        x = self.met.transpose(*lead, feature, *rest, batch, *space)
        n, groups = len(self.met), eqn.params["feature_group_count"]
        stacks = math.prod(self.met.shape[i] for i in stacked)
        window = math.prod(_window(eqn))
        x = _patches(x, len(lead), eqn)
        size = self.met.shape[feature] // groups
        if examples_first:
            x = x.reshape(n, stacks, window, groups, size, -1)
            return Dense(*_without_ones(_group(x, 1, [1, 3], [2, 4], [5]), "ngft"))
        x = x.reshape(stacks, window, groups, size, n, -1)
        return Dense(*_without_ones(_group(x, 0, [0, 2], [1, 3], [4], [5]), "gfnt"))

    def total(self, shares):
        """By the convolution's own backward rule on the whole batch: no patches."""
        eqn = self.use.eqn
        lead = 1 + len(self.use.loops)
        ct = over_columns(self.signals, shares)
        shared, stacked = _loops(self.use)
        numbers = eqn.params["dimension_numbers"]
        at_x, at_out = numbers.lhs_spec[0], numbers.out_spec[0]
        x = _fold(self.met, [1 + i for i in stacked], [0, *(1 + i for i in shared)], lead, at_x)
        ct = _fold(ct, [1 + i for i in stacked], [0, *(1 + i for i in shared)], lead, at_out)

        def kernel(x, ct):
            blank = jnp.zeros(eqn.in_avals[1].shape, eqn.in_avals[1].dtype)
            return pull_function(Rules(), lambda k: eqn.bind(x, k), [blank], [ct])[0]

        if not stacked:
            return kernel(x, ct)
        return lax.map(lambda pair: kernel(*pair), (x, ct)).reshape(self.layout.shape)


def _without_ones(x, axes: str):
    """An array without its axis g if that is of length one, and its axes."""
    if x.shape[axes.index("g")] > 1:
        return x, axes
    return lax.squeeze(x, [axes.index("g")]), axes.replace("g", "")


def _fold(x, stacked: list[int], batch: list[int], lead: int, at: int):
    """Batch axes folded into the axis `at` of an image, stacked ones into one in front, if any."""
    image = list(range(lead, x.ndim))
    order = [*stacked, *image[:at], *batch, *image[at:]]
    shape = [math.prod(x.shape[i] for i in stacked)] if stacked else []
    shape += [x.shape[i] for i in image]
    folded = math.prod(x.shape[i] for i in batch)
    shape[len(shape) - len(image) + at] *= folded
    return x.transpose(order).reshape(shape)


def _window(eqn) -> list[int]:
    return [eqn.in_avals[1].shape[d] for d in eqn.params["dimension_numbers"].rhs_spec[2:]]


def _patches(x, at: int, eqn):
    """What a convolution's window sees: (…, *space) to (…, *places), with axes of the window.

    These go to `at`. One axis of space is done after the other, and the places stay last, so that
    long runs of memory are copied.
    """
    params, window = eqn.params, _window(eqn)
    for k in reversed(range(len(window))):
        axis = x.ndim - len(window) + k
        low, high = params["padding"][k]
        padding = [(0, 0, 0)] * x.ndim
        padding[axis] = (low, high, params["lhs_dilation"][k] - 1)
        x = lax.pad(x, jnp.zeros((), x.dtype), padding)
        places = eqn.out_avals[0].shape[params["dimension_numbers"].out_spec[2 + k]]
        stride, dilation = params["window_strides"][k], params["rhs_dilation"][k]
        span = (places - 1) * stride + 1
        starts = [dilation * offset for offset in range(window[k])]
        x = jnp.stack([lax.slice_in_dim(x, i, i + span, stride, axis) for i in starts], at)
    return x


jax.tree_util.register_pytree_node(
    _Convolution,
    lambda site: ((site.met, site.signals), (site.use, site.layout.shape)),
    lambda static, arrays: _Convolution(static[0], arrays[0], arrays[1], static[1]),
)

_MAKERS: dict[str, Callable] = {
    "dot_general": _product,
    "gather": _lookup,
    "dynamic_slice": _lookup,
    "conv_general_dilated": _Convolution,
}
