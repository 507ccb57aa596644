"""Indexing: dynamic slices, gather and the scatters.

A gather and a scatter with mirrored dimension numbers are each other's inverse: what one reads,
the other writes.
"""

from __future__ import annotations

import math

import numpy as np
from jax import lax

from fbackprop.program import program_of, zeros
from fbackprop.table import joint, row

# --- dynamic slices -----------------------------------------------------------------------------

# Of a negative start the primitives make zero; JAX's functions count from the end, once.
CLAMPED = {"allow_negative_indices": False}


@joint("dynamic_slice")
def _dynamic_slice(ct, xs, eqn):
    start = xs[1:]
    placed = lax.dynamic_update_slice(zeros(eqn.in_avals[0]), ct, start, **CLAMPED)
    return (placed, *(None,) * len(start))


@joint("dynamic_update_slice")
def _dynamic_update_slice(ct, xs, eqn):
    _, update, *start = xs
    outside = lax.dynamic_update_slice(ct, lax.full_like(update, 0), start, **CLAMPED)
    inside = lax.dynamic_slice(ct, start, update.shape, **CLAMPED)
    return (outside, inside, *(None,) * len(start))


# --- gather ---------------------------------------------------------------------------------------


def _options(eqn) -> dict:
    names = ("indices_are_sorted", "unique_indices", "mode")
    return {name: eqn.params[name] for name in names}


def _gather_operand(ct, y, eqn):
    dn = eqn.params["dimension_numbers"]
    mirrored = lax.ScatterDimensionNumbers(
        update_window_dims=dn.offset_dims,
        inserted_window_dims=dn.collapsed_slice_dims,
        scatter_dims_to_operand_dims=dn.start_index_map,
        operand_batching_dims=dn.operand_batching_dims,
        scatter_indices_batching_dims=dn.start_indices_batching_dims,
    )
    return lax.scatter_add(zeros(eqn.in_avals[0]), y, ct, mirrored, **_options(eqn))


row("gather", _gather_operand, None)

# --- scatters -------------------------------------------------------------------------------------


def _read_back(array, indices, eqn):
    """Gather from `array` the places that the scatter `eqn` writes, in the shape of its updates."""
    dn = eqn.params["dimension_numbers"]
    mirrored = lax.GatherDimensionNumbers(
        offset_dims=dn.update_window_dims,
        collapsed_slice_dims=dn.inserted_window_dims,
        start_index_map=dn.scatter_dims_to_operand_dims,
        operand_batching_dims=dn.operand_batching_dims,
        start_indices_batching_dims=dn.scatter_indices_batching_dims,
    )
    flat = (*dn.inserted_window_dims, *dn.operand_batching_dims)
    windows = iter(eqn.in_avals[2].shape[d] for d in dn.update_window_dims)
    sizes = [1 if d in flat else next(windows) for d in range(array.ndim)]
    return lax.gather(array, indices, mirrored, sizes, fill_value=0, **_options(eqn))


def _write(operand, indices, updates, eqn, scatter):
    return scatter(operand, indices, updates, eqn.params["dimension_numbers"], **_options(eqn))


row("scatter-add", lambda ct: ct, None, lambda ct, y, eqn: _read_back(ct, y, eqn))
row("scatter-sub", lambda ct: ct, None, lambda ct, y, eqn: lax.neg(_read_back(ct, y, eqn)))


def _written(y, eqn):
    """Which update wins each place: its number, 0 where nothing is written; and the numbers."""
    updates = eqn.in_avals[2]
    windows = eqn.params["dimension_numbers"].update_window_dims
    shape = [1 if d in windows else n for d, n in enumerate(updates.shape)]
    numbers = lax.add(lax.reshape(lax.iota(np.int32, math.prod(shape)), shape), np.int32(1))
    numbers = lax.broadcast_in_dim(numbers, updates.shape, range(updates.ndim))
    blank = lax.full(eqn.in_avals[0].shape, 0, np.int32)
    return _write(blank, y, numbers, eqn, lax.scatter), numbers


def _refuse_functions(eqn) -> None:
    """Of ``x.at[i].apply(f)``, which is a scatter by name and sets no updates."""
    combine = eqn.params["update_jaxpr"]
    program = None if combine is None else program_of(combine)
    if program is not None and program.outputs != program.inputs[1:]:
        raise NotImplementedError(
            f"x.at[i].apply(f) has no derivative (called at {eqn.source}): write "
            "x.at[i].set(f(x[i]))"
        )


def _scatter_operand(ct, y, eqn):
    """Zero wherever something was written, no matter which update it was."""
    _refuse_functions(eqn)
    return _write(ct, y, zeros(eqn.in_avals[2]), eqn, lax.scatter)


def _scatter_updates(ct, y, eqn):
    read = _read_back(ct, y, eqn)
    n_windows = math.prod(eqn.in_avals[1].shape[:-1])
    if eqn.params["unique_indices"] or n_windows == 1:
        return read
    winners, numbers = _written(y, eqn)
    won = lax.eq(_read_back(winners, y, eqn), numbers)
    return lax.select(won, read, lax.full_like(read, 0))


row("scatter", _scatter_operand, None, _scatter_updates)


def _scatter_mul_updates(ct, x, y, eqn):
    if not eqn.params["unique_indices"]:
        raise NotImplementedError(
            "scatter_mul gradients with respect to its updates are only implemented if "
            f"`unique_indices=True` (called at {eqn.source})"
        )
    return _read_back(lax.mul(ct, x), y, eqn)


row(
    "scatter-mul",
    lambda ct, y, z, eqn: _write(ct, y, z, eqn, lax.scatter_mul),
    None,
    _scatter_mul_updates,
)


def _scatter_extremum(xs, out, eqn):
    """Shares of a place's cotangent: all that attain the extremum there share it equally."""
    operand, indices, updates = xs
    one, nothing = lax.full_like(updates, 1), lax.full_like(updates, 0)
    attained = lax.eq(updates, _read_back(out, indices, eqn))
    blank = lax.full_like(operand, 0)
    winners = _write(blank, indices, lax.select(attained, one, nothing), eqn, lax.scatter_add)
    stayed = lax.convert_element_type(lax.eq(operand, out), out.dtype)
    share = lax.div(lax.full_like(out, 1), lax.add(winners, stayed))
    return lax.mul(stayed, share), lax.select(attained, _read_back(share, indices, eqn), nothing)


def _scatter_extremum_operand(ct, xs, out, eqn):
    return lax.mul(ct, _scatter_extremum(xs, out, eqn)[0])


def _scatter_extremum_updates(ct, xs, out, eqn):
    return lax.mul(_read_back(ct, xs[1], eqn), _scatter_extremum(xs, out, eqn)[1])


row("scatter-max", _scatter_extremum_operand, None, _scatter_extremum_updates)
row("scatter-min", _scatter_extremum_operand, None, _scatter_extremum_updates)
