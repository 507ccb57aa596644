"""Reductions, cumulative operations and sorting."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax

from fbackprop.program import is_inexact, trace, type_of
from fbackprop.sweep import backward, forward
from fbackprop.table import Rules, joint, row

# --- reductions ---------------------------------------------------------------------------------


def _put_back(ct, eqn):
    """Stretch a reduced array over the axes that were reduced."""
    shape, axes = eqn.in_avals[0].shape, eqn.params["axes"]
    kept = tuple(d for d in range(len(shape)) if d not in axes)
    return lax.broadcast_in_dim(ct, shape, kept)


row("reduce_sum", _put_back)


def _reduce_extremum(ct, x, out, eqn):
    """The places that attain the extremum share its cotangent equally."""
    where = lax.convert_element_type(lax.eq(x, _put_back(out, eqn)), ct.dtype)
    count = lax.reduce_sum(where, tuple(eqn.params["axes"]))
    return lax.mul(_put_back(lax.div(ct, count), eqn), where)


row("reduce_max", _reduce_extremum)
row("reduce_min", _reduce_extremum)


@joint("reduce_prod")
def _reduce_prod(ct, x, eqn):
    """Each factor's cotangent is the product of all others: of those before and those after."""
    axes = sorted(eqn.params["axes"])
    kept = [d for d in range(x.ndim) if d not in axes]
    flat = lax.transpose(x, (*kept, *axes))
    shape = flat.shape
    flat = lax.reshape(flat, (*shape[: len(kept)], int(np.prod(shape[len(kept) :]))))
    last = len(kept)
    others = lax.mul(_products_before(flat, last), _products_before(flat, last, reverse=True))
    others = lax.transpose(lax.reshape(others, shape), np.argsort((*kept, *axes)))
    return lax.mul(_put_back(ct, eqn), others)


def _products_before(x, axis, reverse=False):
    """Exclusive cumulative products."""
    n = x.shape[axis]
    if n == 0:
        return x
    whole = lax.cumprod(x, axis, reverse=reverse)
    pads = [(0, 0, 0)] * x.ndim
    pads[axis] = (-1, 1, 0) if reverse else (1, -1, 0)
    return lax.pad(whole, lax.full_like(x, 1, shape=()), pads)


# --- cumulative operations ----------------------------------------------------------------------


def _pull(function, x, ct):
    """Sweep a function of one array, written in rules of this table."""
    program = trace(lambda x: [function(x)], [type_of(x)])
    rules = Rules()
    _, tape = forward(rules, program, (True,), [x])
    return backward(rules, program, (True,), tape, [ct])[0]


row(
    "cumsum",
    lambda ct, eqn: lax.cumsum(ct, eqn.params["axis"], reverse=not eqn.params["reverse"]),
)


def _cumulative(combine):
    """The other cumulative operations are swept as the associative scans that they are."""

    def pullback(ct, x, eqn):
        options = {"reverse": eqn.params["reverse"], "axis": eqn.params["axis"]}
        return _pull(lambda x: lax.associative_scan(combine, x, **options), x, ct)

    return pullback


row("cumprod", _cumulative(lax.mul))
row("cummax", _cumulative(lax.max))
row("cummin", _cumulative(lax.min))
row("cumlogsumexp", _cumulative(jnp.logaddexp))


# --- sorting ------------------------------------------------------------------------------------


@joint("sort")
def _sort(cts, xs, eqn):
    """Cotangents go back along the permutation that sorted."""
    p = eqn.params
    axis, n_keys = p["dimension"], p["num_keys"]
    iota = lax.broadcasted_iota(np.int32, xs[0].shape, axis)
    *_, order = lax.sort((*xs, iota), dimension=axis, is_stable=p["is_stable"], num_keys=n_keys)
    # Sorting the order itself gives the inverse permutation, and carries the cotangents along.
    inexact = [is_inexact(aval) for aval in eqn.in_avals]
    moved = lax.sort(
        (order, *(ct for ct, i in zip(cts, inexact, strict=True) if i)), dimension=axis, num_keys=1
    )
    back = iter(moved[1:])
    return tuple(next(back) if i else None for i in inexact)
