"""Layout: primitives that move, repeat or drop elements without computing on them."""

from __future__ import annotations

import numpy as np
from jax import lax

from fbackprop.program import primitive, sharding_of
from fbackprop.table import joint, row


def _reshape(ct, eqn):
    aval, order = eqn.in_avals[0], eqn.params["dimensions"]
    if order is None:
        return lax.reshape(ct, aval.shape, out_sharding=sharding_of(aval))
    # The operand was transposed first.
    ct = lax.reshape(ct, [aval.shape[d] for d in order], out_sharding=sharding_of(aval, order))
    return lax.transpose(ct, np.argsort(order))


row("reshape", _reshape)
row("squeeze", lambda ct, eqn: lax.expand_dims(ct, eqn.params["dimensions"]))
row("rev", lambda ct, eqn: lax.rev(ct, eqn.params["dimensions"]))
row("transpose", lambda ct, eqn: lax.transpose(ct, np.argsort(eqn.params["permutation"])))


@joint("broadcast_in_dim")
def _broadcast_in_dim(ct, eqn):
    aval, dims = eqn.in_avals[0], eqn.params["broadcast_dimensions"]
    # Axes that are new, and axes of size one that were stretched.
    stretched = [d for d, n in zip(dims, aval.shape, strict=True) if n == 1 and ct.shape[d] != 1]
    new = [d for d in range(ct.ndim) if d not in dims]
    summed = lax.reduce_sum(ct, tuple(new + stretched))
    ct = lax.reshape(summed, aval.shape) if stretched else summed
    return (ct, *(None,) * (len(eqn.inputs) - 1))


@joint("tile")
def _tile(ct, eqn):
    aval, reps = eqn.in_avals[0], eqn.params["reps"]
    blocks = [n for pair in zip(reps, aval.shape, strict=True) for n in pair]
    axes = [d for i in range(aval.ndim) for d in (None, i)]
    ct = lax.reshape(ct, blocks, out_sharding=sharding_of(aval, axes))
    return lax.reduce_sum(ct, tuple(range(0, 2 * aval.ndim, 2)))


@joint("slice")
def _slice(ct, eqn):
    shape, p = eqn.in_avals[0].shape, eqn.params
    strides = p["strides"] or (1,) * len(shape)
    # The last element taken need not be the last that the limits allow.
    ends = [
        0 if n == 0 else start + (n - 1) * step + 1
        for start, n, step in zip(p["start_indices"], ct.shape, strides, strict=True)
    ]
    config = [
        (start if n else 0, size - (end if n else 0), step - 1)
        for start, end, size, step, n in zip(
            p["start_indices"], ends, shape, strides, ct.shape, strict=True
        )
    ]
    return lax.pad(ct, lax.full_like(ct, 0, shape=()), config)


def _pad_operand(ct, eqn):
    config = eqn.params["padding_config"]
    zero = lax.full_like(ct, 0, shape=())
    ct = lax.pad(ct, zero, [(-low, -high, 0) for low, high, _ in config])
    return lax.slice(ct, (0,) * ct.ndim, ct.shape, [inner + 1 for _, _, inner in config])


def _pad_value(ct, eqn):
    every = tuple(range(ct.ndim))
    return lax.sub(lax.reduce_sum(ct, every), lax.reduce_sum(_pad_operand(ct, eqn), every))


row("pad", _pad_operand, _pad_value)


@joint("concatenate")
def _concatenate(ct, eqn):
    axis = eqn.params["dimension"]
    return lax.split(ct, [aval.shape[axis] for aval in eqn.in_avals], axis)


@joint("split")
def _split(cts, eqn):
    return lax.concatenate(cts, eqn.params["axis"])


@joint("stack")
def _stack(ct, eqn):
    return primitive("unstack").bind(ct, axis=eqn.params["axis"])


@joint("unstack")
def _unstack(cts, eqn):
    axis = eqn.params["axis"]
    return lax.concatenate([lax.expand_dims(ct, (axis,)) for ct in cts], axis)
