"""All examples' gradients, unformed: what quantities are read off.

`Gradients` holds the sites of one sweep and how the weights come from the parameters. Where a
weight is a parameter, or a rearrangement of a part of one, its sites are the parameter's. Where it
is computed in another way (a normalised direction, the product of two adapters) its gradients are
formed and pulled back to the parameters behind it, one per example.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fbackprop.kronecker import KroneckerBlock, Place, factors
from fbackprop.passes import activity, backward, forward
from fbackprop.program import Program, Var, evaluate, inlined, is_inexact, memoized, trace
from fbackprop.separate import Separation
from fbackprop.sites import Dense, Layout, OneHot, Site, contract, inner, inner_all, wide
from fbackprop.table import Rules

# --- where in memory a weight lies ----------------------------------------------------------------
#
# Layout operations on a parameter are run once on a NumPy array that stands for it: NumPy returns
# views, and knows which elements they share. The array's contents are never touched.

View = np.ndarray


def _reshaped(view: View, shape) -> View | None:
    out = view.reshape(shape)
    return out if out.size == 0 or np.may_share_memory(out, view) else None


def _sliced(view: View, params) -> View:
    strides = params["strides"] or (1,) * view.ndim
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return view[tuple(slice(*bound) for bound in bounds)]


def _broadcast(view: View, params) -> View | None:
    """Only new axes of length one leave it a rearrangement."""
    same = math.prod(params["shape"]) == view.size
    return _reshaped(view, params["shape"]) if same else None


def _split(view: View, params) -> list[View]:
    ends = np.cumsum(params["sizes"])[:-1]
    return np.split(view, ends, axis=params["axis"])


LAYOUTS: dict[str, Callable] = {
    "transpose": lambda view, params: view.transpose(params["permutation"]),
    "reshape": lambda view, params: _reshaped(view, params["new_sizes"]),
    "squeeze": lambda view, params: view.squeeze(tuple(params["dimensions"])),
    "expand_dims": lambda view, params: np.expand_dims(view, tuple(params["dimensions"])),
    "broadcast_in_dim": _broadcast,
    "slice": _sliced,
    "split": _split,
    "rev": lambda view, params: np.flip(view, tuple(params["dimensions"])),
    "copy": lambda view, params: view,
    "convert_element_type": lambda view, params: view,
}


class Origin(NamedTuple):
    """Where a weight comes from.

    Attributes:
      leaves: the parameters that it moves with.
      view: where it lies in the one parameter that it rearranges; None if it is computed.
    """

    leaves: frozenset[int]
    view: View | None


def origins(program: Program, rules: Rules, moving: tuple[bool, ...]):
    """The origin of each output of a program of parameters, and the arrays that stand for these."""
    flow = activity(program, rules, moving)
    inputs = [(i, v) for i, (v, m) in enumerate(zip(program.inputs, moving, strict=True)) if m]
    leaves = {i: np.empty(v.aval.shape, np.int8) for i, v in inputs}
    known = {v: Origin(frozenset([i]), leaves[i]) for i, v in inputs}
    for eqn in program.equations:
        found = [known[v] for v in eqn.inputs if isinstance(v, Var) and v in known]
        if not found:
            continue
        behind = frozenset().union(*(origin.leaves for origin in found))
        layout = LAYOUTS.get(eqn.primitive.name)
        views: Any = None
        if layout and found[0].view is not None and isinstance(eqn.inputs[0], Var):
            views = layout(found[0].view, eqn.params)
        views = views if isinstance(views, list) else [views] * len(eqn.outputs)
        for v, view in zip(eqn.outputs, views, strict=True):
            if v in flow.variables:
                known[v] = Origin(behind, view)
    nowhere = Origin(frozenset(), None)
    outs = [known.get(v, nowhere) if isinstance(v, Var) else nowhere for v in program.outputs]
    return outs, leaves


def _memory(view: View, layout: Layout):
    """The memory that a weight's axes (g, i, o) run over; equal for equal arrangements."""
    split = _reshaped(view, layout.split)
    if split is None:
        return None
    pointer = view.__array_interface__["data"][0]
    groups = []
    for group in layout.groups:
        run: list[tuple[int, int]] = []
        for size, stride in ((split.shape[k], split.strides[k]) for k in group):
            if size == 1:
                continue
            if run and run[-1][1] == stride * size:
                run[-1] = (run[-1][0] * size, stride)
            else:
                run.append((size, stride))
        groups.append(tuple(run))
    g, i, o = groups
    return pointer, g, i, o


def _share(a: View, b: View) -> bool:
    try:
        return np.shares_memory(a, b, max_work=100_000)
    except np.exceptions.TooHardError:
        return True


# --- gradients -----------------------------------------------------------------------------------


class Placed(NamedTuple):
    """A site, which weight it is of, and whether its factors change places with its group's."""

    weight: int
    site: Site
    swapped: bool


class Gradients:
    """The gradients of N examples in C columns with respect to every parameter.

    Column c of example n is ``Jₙᵀ sₙ𝒸``: the Jacobian of the example's prediction, transposed,
    applied to a vector at the prediction. What these vectors are, the quantity says that asks
    (`columns`). Methods return pytrees like the parameters.

    Attributes:
      params: the parameters, a pytree.
      model: the program of one example, its parameters first.
      examples, columns: N and C.
      shares: (N,), the weight of each example in a mean over them; they sum to one.
      signs: (N, C), what column c's outer product counts in a Hessian; 1, or −1 where it is concave.
      signals: error signals of named values, (N, C, *value), by name.
    """

    def __init__(self, source: Source, model: Program, params, sites, shares, signs, signals=None):
        self.source, self.model, self.sites, self.params = source, model, list(sites), params
        self.shares, self.signs, self.signals = shares, signs, signals or {}
        self.examples, self.columns = signs.shape
        self._params = jax.tree.leaves(params)

    def _tree(self, leaves: Sequence):
        return jax.tree.unflatten(jax.tree.structure(self.params), leaves)

    @functools.cached_property
    def groups(self) -> list[list[list[Placed]] | None]:
        """For each leaf its sites in groups that meet disjoint parts of it; None where none can be.

        The sites of one group have the same factors, or exchanged ones (a matrix and its transpose).
        """
        return [self._groups(leaf) for leaf in range(len(self._params))]

    def _groups(self, leaf: int) -> list[list[Placed]] | None:
        groups: list[tuple[Any, View, list[Placed]]] = []
        for weight, site in self.sites:
            origin = self.source.origins[weight]
            if leaf not in origin.leaves:
                continue
            if origin.view is None:
                return None
            place = _memory(origin.view, site.layout)
            if place is None:
                if any(_share(origin.view, view) for _, view, _ in groups):
                    return None
                groups.append((None, origin.view, [Placed(weight, site, False)]))
                continue
            pointer, g, i, o = place
            for other, view, members in groups:
                if other in (place, (pointer, g, o, i)):
                    members.append(Placed(weight, site, other != place))
                    break
                if _share(origin.view, view):
                    return None
            else:
                groups.append((place, origin.view, [Placed(weight, site, False)]))
        return [members for _, _, members in groups]

    # --- what quantities ask

    def total(self, shares=None):
        """Σₙ𝒸 shares[n, c] · gradient.

        Args:
          shares: (N,) or (N, C), or a pytree like the parameters of such; by default each
            example's share in the mean.
        """
        per_leaf = self._per_leaf(shares)
        if per_leaf is None:
            shares = self._spread(shares)
            return self._tree(self._pull([(w, site.total(shares)) for w, site in self.sites], 0))
        found = []
        for leaf, groups in enumerate(self.groups):
            if groups is None:
                share = per_leaf[leaf].astype(self._params[leaf].dtype)
                found.append(jnp.einsum("nc...,nc->...", self._formed[leaf], share))
            else:
                sites = [placed for group in groups for placed in group]
                sums = [(placed.weight, placed.site.total(per_leaf[leaf])) for placed in sites]
                found.append(self._pull(sums, 0)[leaf])
        return self._tree(found)

    def each(self):
        """The gradients themselves, (N, C, *leaf)."""
        return self._tree(self._each)

    def norms(self):
        """Squared norms ‖gradient‖² of every leaf, (N, C)."""
        return self._tree([self._norms(leaf) for leaf in range(len(self._params))])

    def squares(self, shares=None):
        """Σₙ𝒸 shares[n, c] · gradient², elementwise; shares as of `total`, not per leaf."""
        shares = self._spread(shares)
        sums, formed = [], {}
        for leaf, groups in enumerate(self.groups):
            if groups is None:
                formed[leaf] = _weighted_squares(self._formed[leaf], shares)
            else:
                sums += [(group[0].weight, _group_squares(group, shares)) for group in groups]
        found = self._pull(sums, 0)
        return self._tree([formed.get(leaf, x) for leaf, x in enumerate(found)])

    def factors(self, sharing: str):
        """Kronecker factors of Σ shares · signs · gradient · gradientᵀ: tuples of blocks.

        For a matrix product that meets no other; see `fbackprop.Kronecker`.
        """
        shares = self.shares[:, None] * jnp.maximum(self.signs, 0)
        return self._tree(
            [self._factors(leaf, shares, sharing) for leaf in range(len(self._params))]
        )

    def dots(self, other: Gradients | None = None):
        """⟨gradient n c, gradient m d⟩ with these or other examples', of every leaf, (N, C, M, D)."""
        other = self if other is None else other
        return self._tree([self._dots(other, leaf) for leaf in range(len(self._params))])

    # --- how it is done

    @functools.cached_property
    def _each(self) -> list:
        return self._pull([(weight, site.each()) for weight, site in self.sites], 2)

    @functools.cached_property
    def _formed(self) -> list:
        """The gradients of leaves whose sites cannot be kept apart (of the others, nothing)."""
        leaves = {k for k, groups in enumerate(self.groups) if groups is None}
        wanted = [(w, s) for w, s in self.sites if self.source.origins[w].leaves & leaves]
        return self._pull([(weight, site.each()) for weight, site in wanted], 2)

    def _norms(self, leaf: int):
        groups = self.groups[leaf]
        if groups is None:
            return _sum_of_squares(self._formed[leaf])
        return sum(map(_group_norms, groups), jnp.zeros(self.signs.shape, self._wide(leaf)))

    def _dots(self, other: Gradients, leaf: int):
        mine, its = self.groups[leaf], other.groups[leaf]
        if mine is None or its is None:
            return _formed_dots(self._formed[leaf], other._formed[leaf])
        zero = jnp.zeros((*self.signs.shape, *other.signs.shape), self._wide(leaf))
        return sum(itertools.starmap(_group_dots, zip(mine, its, strict=True)), zero)

    def _factors(self, leaf: int, shares, sharing: str) -> tuple[KroneckerBlock, ...]:
        groups, param = self.groups[leaf], self._params[leaf]
        if groups is None:
            whole_leaf = np.empty(param.shape, np.int8)
            return (_rows_block(self._formed[leaf], whole_leaf, whole_leaf, 0, shares),)
        blocks = []
        for group in groups:
            weight, site, _ = group[0]
            start = self.source.leaves[leaf]
            view = self.source.origins[weight].view
            if site.is_whole:
                depth = self.source.depth[weight]
                blocks.append(_rows_block(site.each(), view, start, depth, shares))
            else:
                a, b = factors([_factors(placed) for placed in group], shares, sharing)
                blocks.append(KroneckerBlock(a, b, site.layout, _place(view, start)))
        return tuple(blocks)

    def _wide(self, leaf: int):
        return jnp.promote_types(self._params[leaf].dtype, jnp.float32)

    def _per_leaf(self, shares) -> list | None:
        if shares is None or isinstance(shares, jax.Array | np.ndarray):
            return None
        return [self._spread(x) for x in jax.tree.leaves(shares)]

    def _spread(self, shares):
        """Shares of examples, or of examples and columns, as of both."""
        shares = self.shares if shares is None else jnp.asarray(shares)
        if shares.ndim == 1:
            shares = shares[:, None]
        return jnp.broadcast_to(shares, self.signs.shape)

    # --- from weights to parameters

    def _pull(self, values: Sequence[tuple[int, Any]], lead: int) -> list:
        """Values like weights, with `lead` more axes in front, summed and pulled back to leaves."""
        cts: list = [None] * len(self.source.origins)
        for weight, value in values:
            cts[weight] = value if cts[weight] is None else cts[weight] + value
        avals = self.source.program.out_avals
        cts = [ct if ct is None else ct.astype(a.dtype) for ct, a in zip(cts, avals, strict=True)]

        def pull(cts):
            pairs = zip(self.source.pull(self._params, cts), self._params, strict=True)
            return [jnp.zeros(p.shape, p.dtype) if ct is None else ct for ct, p in pairs]

        if not values:
            shape = self.signs.shape[:lead]
            return [jnp.zeros((*shape, *p.shape), p.dtype) for p in self._params]
        for _ in range(lead):
            pull = jax.vmap(pull)
        return pull(cts)


class Source(NamedTuple):
    """How the weights come from the parameters.

    Attributes:
      program: from the leaves of the parameters to the weights.
      rules: the rules in force.
      moving: which leaves have gradients.
      origins: where each weight comes from.
      leaves: the arrays that stand for the leaves.
      depth: for each weight how many loops it comes stacked for.
    """

    program: Program
    rules: Rules
    moving: tuple[bool, ...]
    origins: list[Origin]
    leaves: dict[int, View]
    depth: list[int]

    def weights(self, params: Sequence) -> list:
        return evaluate(self.program, params)

    def pull(self, params: Sequence, cts: Sequence) -> list:
        """Cotangents of the parameters from those of the weights; None stands for zero."""
        _, tape = forward(self.rules, self.program, self.moving, params)
        return backward(self.rules, self.program, self.moving, tape, cts)


@memoized
def _source(program: Program, part: Separation, rules: Rules, moving: tuple[bool, ...]) -> Source:
    n = len(moving)
    rest = [None] * (len(program.inputs) - n)
    first = trace(lambda *params: part.prepare([*params, *rest]), program.in_avals[:n])
    first = inlined(first)
    return Source(first, rules, moving, *origins(first, rules, moving), part.depth)


def source_of(part: Separation, n_params: int) -> Source:
    """How a model's weights come from its parameters, the first inputs of its program."""
    moving = tuple(is_inexact(aval) for aval in part.program.in_avals[:n_params])
    return _source(part.program, part, part.rules, moving)


# --- groups ---------------------------------------------------------------------------------------


def _factors(placed: Placed) -> tuple[Dense | OneHot, Dense | OneHot]:
    a, b = placed.site.a, Dense(placed.site.b)
    return (b, a) if placed.swapped else (a, b)


def _group_each(group: list[Placed]):
    """The gradients of a group with respect to the weight of its first site, in that's layout."""
    first = group[0].site.layout
    total = None
    for placed in group:
        layout = placed.site.layout
        value = placed.site.each()
        if layout != first or placed.swapped:
            value = _regroup(value, layout, placed.swapped)
            value = first.restore(value)
        total = value if total is None else total + value
    return total


def _regroup(x, layout: Layout, swapped: bool):
    """An array (n, c, *shape of a weight) as (n, c, g, i, o), of the group it is in."""
    lead = x.shape[:2]
    order = [2 + k for group in layout.groups for k in group]
    x = x.reshape(*lead, *layout.split).transpose(0, 1, *order).reshape(*lead, *layout.sizes)
    return x.swapaxes(-1, -2) if swapped else x


def _group_squares(group: list[Placed], shares):
    if len(group) == 1:
        return group[0].site.squares(shares)
    return _weighted_squares(_group_each(group), shares)


def _rows_block(each, view: View, start: View, depth: int, shares) -> KroneckerBlock:
    """The block of a weight without activations: its rows share a factor, save those of a stack."""
    shape = each.shape[2:] or (1,)
    stack, rows, last = math.prod(shape[:depth]), math.prod(shape[depth:-1]), shape[-1]
    if depth == len(shape):
        stack, last = math.prod(shape), 1
    x = wide(each).reshape(*each.shape[:2], stack, rows, last).swapaxes(2, 3)
    a = jnp.full((stack, rows), 1 / rows, x.dtype)
    b = contract("nctgo,nctgp->gop", x * shares.astype(x.dtype)[:, :, None, None, None], x)
    layout = Layout(view.shape, (stack, rows, last), ((0,), (1,), (2,)))
    return KroneckerBlock(a, b, layout, _place(view, start))


def _place(view: View, leaf: View) -> Place:
    offset = view.__array_interface__["data"][0] - leaf.__array_interface__["data"][0]
    return Place(offset, view.shape, view.strides, leaf.size)


def _cost_of_inner(sites: Sequence[Site]) -> float:
    """Multiplications per example and column if places are compared with places."""
    total = 0.0
    for p, q in itertools.product(sites, sites):
        g, i, o = p.layout.sizes
        dense = isinstance(p.a, Dense) or isinstance(q.a, Dense)
        total += p.places * q.places * g * (o + (i if dense else 1))
    return total


def _cost_of_forming(sites: Sequence[Site]) -> float:
    """Multiplications per example and column if the gradient is formed."""
    total = 0.0
    for site in sites:
        g, i, o = site.layout.sizes
        total += g * i * o * (2 + (site.places if isinstance(site.a, Dense) else 1))
    return total


def _group_norms(group: list[Placed]):
    sites = [placed.site for placed in group]
    if _cost_of_inner(sites) > _cost_of_forming(sites):
        return _sum_of_squares(_group_each(group))
    total: Any = 0.0
    for k, p in enumerate(group):
        a, b = _factors(p)
        for j, q in enumerate(group[: k + 1]):
            c, d = _factors(q)
            both = jnp.sum(inner(a, c) * inner(b, d), axis=(2, 3, 4))
            total += both if j == k else 2 * both
    return total


def _group_dots(mine: list[Placed], its: list[Placed]):
    """⟨·, ·⟩ of a group's gradients in all pairs of examples, (n, c, m, d)."""
    pairs = list(itertools.product(mine, its))
    compared = sum(
        math.prod((p.site.b.shape[0], *p.site.b.shape[1:4], *q.site.b.shape[:3]))
        for p, q in pairs
        if not (p.site.is_outer and q.site.is_outer)
    )
    formed = sum(math.prod((*s.b.shape[:2], *s.layout.sizes)) for s in (p.site for p in mine))
    if compared > formed:
        return _formed_dots(_group_each(mine), _group_each(its))
    total: Any = 0.0
    for p, q in pairs:
        (a, b), (c, d) = _factors(p), _factors(q)
        total += jnp.sum(inner_all(a, c) * inner_all(b, d), axis=(2, 5, 6))
    return total


def _formed_dots(x, y):
    x, y = wide(x), wide(y)
    left, right = x.reshape(*x.shape[:2], -1), y.reshape(*y.shape[:2], -1)
    return contract("ncf,mdf->ncmd", left, right)


def _sum_of_squares(x):
    return jnp.sum(wide(x) ** 2, axis=tuple(range(2, x.ndim)))


def _weighted_squares(x, shares):
    return jnp.einsum("nc...,nc->...", wide(x) ** 2, wide(shares))
