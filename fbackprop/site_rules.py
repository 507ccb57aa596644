"""Site rules: for each primitive that takes a weight, the site that a use by it makes.

What the weight met and the error signals of the result are laid out as the two factors of
`fbackprop.sites`, whatever the order of the axes was in the equation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fbackprop.passes import pull_function
from fbackprop.sites import Dense, Layout, OneHot, Site, over_columns
from fbackprop.table import Rules
from fbackprop.uses import Use, untaken


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
        eqn = self.use.eqn.unchanged()
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
