"""Reductions, cumulative operations, sorting and selection."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fbackprop.passes import pull_function
from fbackprop.program import evaluate, is_inexact, program_of, sharding_of, zeros
from fbackprop.table import joint, row

# --- reductions ---------------------------------------------------------------------------------


def _put_back(ct, eqn):
    """Stretch a reduced array over the axes that were reduced."""
    aval, axes = eqn.in_avals[0], eqn.params["axes"]
    kept = tuple(d for d in range(aval.ndim) if d not in axes)
    return lax.broadcast_in_dim(ct, aval.shape, kept, out_sharding=sharding_of(aval))


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


def reducer(jaxpr, ndim: int):
    """The function that combines two lists of scalars, on lists of arrays of `ndim` axes."""
    program = program_of(jaxpr)

    def combine(*pair):
        return evaluate(program, pair)

    for _ in range(ndim):
        combine = jax.vmap(combine)
    return lambda left, right: combine(*left, *right)


@joint("reduce")
def _reduce(arriving, xs, eqn, rules):
    """A reduction by any function is swept as the tree that combines halves of its operands."""
    n, axes = len(xs) // 2, sorted(eqn.params["dimensions"])
    kept = [d for d in range(xs[0].ndim) if d not in axes]
    combine = reducer(eqn.params["jaxpr"], len(kept) + 1)

    def halve(*operands):
        shape = [operands[0].shape[d] for d in kept]
        length = math.prod(operands[0].shape[d] for d in axes)
        arrays = [lax.reshape(x, (length, *shape), (*axes, *kept)) for x in operands[:n]]
        starts = [lax.broadcast(s, (1, *shape)) for s in operands[n:]]
        while arrays[0].shape[0] > 1:
            half = arrays[0].shape[0] // 2
            left = [x[:half] for x in arrays]
            right = [x[half : 2 * half] for x in arrays]
            rest = [x[2 * half :] for x in arrays]
            combined = combine(left, right)
            arrays = [lax.concatenate(pair, 0) for pair in zip(combined, rest, strict=True)]
        arrays = combine(starts, arrays) if length else starts
        return [lax.squeeze(x, (0,)) for x in arrays]

    return tuple(pull_function(rules, halve, xs, arriving))


# --- cumulative operations ----------------------------------------------------------------------


row(
    "cumsum",
    lambda ct, eqn: lax.cumsum(ct, eqn.params["axis"], reverse=not eqn.params["reverse"]),
)


def _cumulative(combine):
    """The other cumulative operations are swept as the associative scans that they are."""

    def pullback(ct, x, eqn, rules):
        options = {"reverse": eqn.params["reverse"], "axis": eqn.params["axis"]}
        scan = lambda x: [lax.associative_scan(combine, x, **options)]  # noqa: E731
        return pull_function(rules, scan, [x], [ct])[0]

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
    inexact = [is_inexact(aval) for aval in eqn.in_avals]
    lies = sharding_of(eqn.in_avals[inexact.index(True)])
    iota = lax.broadcasted_iota(np.int32, xs[0].shape, axis, out_sharding=lies)
    *_, order = lax.sort((*xs, iota), dimension=axis, is_stable=p["is_stable"], num_keys=n_keys)
    # Sorting the order itself gives the inverse permutation, and carries the cotangents along.
    moved = lax.sort(
        (order, *(ct for ct, i in zip(cts, inexact, strict=True) if i)), dimension=axis, num_keys=1
    )
    back = iter(moved[1:])
    return tuple(next(back) if i else None for i in inexact)


# --- selection ------------------------------------------------------------------------------------


def _to_selected(ct, indices, aval, axis: int):
    """Put cotangents where along an axis their elements were taken from."""
    axis %= ct.ndim
    others = tuple(d for d in range(ct.ndim) if d != axis)
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=(),
        inserted_window_dims=(axis,),
        scatter_dims_to_operand_dims=(axis,),
        operand_batching_dims=others,
        scatter_indices_batching_dims=others,
    )
    indices = lax.expand_dims(indices, (indices.ndim,))
    return lax.scatter_add(zeros(aval), indices, ct, numbers, mode="promise_in_bounds")


@joint("top_k")
def _top_k(cts, outs, eqn):
    return _to_selected(cts[0], outs[1], eqn.in_avals[0], eqn.params["axis"])


@joint("approx_top_k")
def _approx_top_k(cts, outs, eqn):
    return _to_selected(cts[0], outs[1], eqn.in_avals[0], eqn.params["reduction_dimension"])
