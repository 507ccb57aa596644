"""Windows: the sums and extrema over sliding windows that pooling is made of."""

from __future__ import annotations

import math

import numpy as np
from jax import lax

from fbackprop.passes import pull_function
from fbackprop.program import close, primitive, sharding_of
from fbackprop.rules.reductions import reducer
from fbackprop.table import joint, row


def _spread(sizes, dilation):
    """Sizes with gaps between their elements; they may be symbols."""
    pairs = zip(sizes, dilation, strict=True)
    return [0 if size == 0 else (size - 1) * gap + 1 for size, gap in pairs]


def _reduce_window_sum(ct, eqn):
    """Every element gets the sum of the cotangents of the windows that it was in."""
    p = eqn.params
    shape = eqn.in_avals[0].shape
    window = _spread(p["window_dimensions"], p["window_dilation"])
    lows = [size - 1 - low for size, (low, _) in zip(window, p["padding"], strict=True)]
    ends = zip(
        _spread(shape, p["base_dilation"]), window, _spread(ct.shape, p["window_strides"]), lows,
        strict=True,
    )  # fmt: skip
    highs = [before + size - 1 - after - low for before, size, after, low in ends]
    config = [
        (low, high, s - 1) for low, high, s in zip(lows, highs, p["window_strides"], strict=True)
    ]
    return primitive("reduce_window_sum").bind(
        lax.pad(ct, lax.full_like(ct, 0, shape=()), config),
        window_dimensions=p["window_dimensions"],
        window_strides=p["base_dilation"],
        padding=((0, 0),) * len(shape),
        base_dilation=(1,) * len(shape),
        window_dilation=p["window_dilation"],
    )


row("reduce_window_sum", _reduce_window_sum)


def _fold(combine, operands, starts, eqn) -> list:
    """A reduction over windows, as one strided slice of the padded operands per window place."""
    p = eqn.params
    gaps = zip(p["padding"], p["base_dilation"], strict=True)
    config = [(low, high, d - 1) for (low, high), d in gaps]
    padded = [lax.pad(x, s, config) for x, s in zip(operands, starts, strict=True)]
    shape, strides = eqn.out_avals[0].shape, p["window_strides"]
    total = [lax.broadcast(s, shape) for s in starts]
    for place in np.ndindex(*p["window_dimensions"]):
        first = [int(i * d) for i, d in zip(place, p["window_dilation"], strict=True)]
        last = [i + (n - 1) * s + 1 for i, n, s in zip(first, shape, strides, strict=True)]
        total = combine(total, [lax.slice(x, first, last, strides) for x in padded])
    return total


@joint("reduce_window")
def _reduce_window(arriving, xs, eqn, rules):
    """A reduction by any function is swept as the fold that it is."""
    if 0 in eqn.out_avals[0].shape:
        return tuple(lax.full_like(x, 0) for x in xs)
    n = len(xs) // 2
    jaxpr = close(eqn.params["jaxpr"], eqn.params["consts"])
    combine = reducer(jaxpr, xs[0].ndim)
    fold = lambda *operands: _fold(combine, operands[:n], operands[n:], eqn)  # noqa: E731
    return tuple(pull_function(rules, fold, xs, arriving))


def _window_extremum(select: str, combine, worst: float):
    """Every window's cotangent goes to the first element that attains its extremum."""

    def pullback(ct, x, eqn, rules):
        if _tiles(eqn):
            return _place_in_tiles(ct, x, eqn, primitive(select))
        if all(d == 1 for d in eqn.params["window_dilation"]):
            return _scatter_to_selected(ct, x, eqn, select)
        # Select-and-scatter knows no dilated windows; in a fold, elements that tie share.
        start = lax.full_like(x, worst, shape=())
        pairs = lambda a, b: [combine(a[0], b[0])]  # noqa: E731
        fold = lambda x: _fold(pairs, [x], [start], eqn)  # noqa: E731
        return pull_function(rules, fold, [x], [ct])[0]

    return pullback


def _tiles(eqn) -> bool:
    """Whether the windows lie side by side and are small, as in most pooling."""
    p = eqn.params
    plain = (*p["window_dilation"], *p["base_dilation"])
    return (
        p["window_dimensions"] == p["window_strides"]
        and math.prod(p["window_dimensions"]) <= 64  # each place in a window is an operation
        and not any(low or high for low, high in p["padding"])
        and all(d == 1 for d in plain)
        and eqn.out_avals[0].size > 0
        and sharding_of(eqn.in_avals[0]) is None
    )


def _place_in_tiles(ct, x, eqn, select):
    """Each window's cotangent at the place of its first extremum, which `x` alone decides.

    Elementwise, and so much faster than a scatter; for many cotangents of one `x` (the columns of
    a Jacobian) the places are found once.
    """
    window, shape = eqn.params["window_dimensions"], ct.shape
    covered = lax.slice(x, (0,) * x.ndim, [n * w for n, w in zip(shape, window, strict=True)])
    tiled = covered.reshape([k for pair in zip(shape, window, strict=True) for k in pair])
    counts, places = range(0, 2 * x.ndim, 2), range(1, 2 * x.ndim, 2)
    tiled = lax.transpose(tiled, [*places, *counts]).reshape(-1, *shape)
    best, winner = tiled[0], lax.full(shape, 0, np.int32)
    for k in range(1, len(tiled)):
        keep = select.bind(best, tiled[k])
        best, winner = (
            lax.select(keep, best, tiled[k]),
            lax.select(keep, winner, lax.full_like(winner, k)),
        )
    spread = [k for n, w in zip(shape, window, strict=True) for k in (n, w)]
    number = np.arange(len(tiled), dtype=np.int32).reshape(window)
    number = lax.broadcast_in_dim(number, spread, tuple(places))
    found = lax.broadcast_in_dim(winner, spread, tuple(counts)) == number
    placed = lax.select(
        found, lax.broadcast_in_dim(ct, spread, tuple(counts)), lax.full(spread, 0, ct.dtype)
    )
    rest = [(0, n - m, 0) for n, m in zip(x.shape, covered.shape, strict=True)]
    return lax.pad(placed.reshape(covered.shape), lax.full_like(ct, 0, shape=()), rest)


def _scatter_to_selected(ct, x, eqn, select: str):
    p = eqn.params
    base = p["base_dilation"]
    if any(d != 1 for d in base):
        worst = -np.inf if select == "ge" else np.inf
        gaps = [(0, 0, d - 1) for d in base]
        x = lax.pad(x, lax.full_like(x, worst, shape=()), gaps)
    ct = primitive("select_and_scatter_add").bind(
        ct,
        x,
        select_prim=primitive(select),
        window_dimensions=p["window_dimensions"],
        window_strides=p["window_strides"],
        padding=p["padding"],
    )
    return lax.slice(ct, (0,) * ct.ndim, ct.shape, base) if any(d != 1 for d in base) else ct


row("reduce_window_max", _window_extremum("ge", lax.max, -np.inf))
row("reduce_window_min", _window_extremum("le", lax.min, np.inf))


# The two halves of a window extremum's derivative are linear in their first operand, and each is
# the other's transpose.
def _select_and_scatter_add(ct, y, eqn):
    ones = (1,) * ct.ndim
    return primitive("select_and_gather_add").bind(
        ct, y, base_dilation=ones, window_dilation=ones, **eqn.params
    )


row("select_and_scatter_add", _select_and_scatter_add, None)
row(
    "select_and_gather_add",
    lambda ct, y, eqn: _scatter_to_selected(ct, y, eqn, eqn.params["select_prim"].name),
    None,
)
