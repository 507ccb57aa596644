"""Windows: the sums and extrema over sliding windows that pooling is made of."""

from __future__ import annotations

import numpy as np
from jax import lax

from fbackprop.program import primitive
from fbackprop.table import row


def _spread(sizes, dilation):
    sizes = np.array(sizes, dtype=np.int64)
    return np.where(sizes == 0, 0, (sizes - 1) * np.array(dilation, dtype=np.int64) + 1)


def _reduce_window_sum(ct, eqn):
    """Every element gets the sum of the cotangents of the windows that it was in."""
    p = eqn.params
    shape = eqn.in_avals[0].shape
    window = _spread(p["window_dimensions"], p["window_dilation"])
    low = window - 1 - np.array([low for low, _ in p["padding"]], dtype=np.int64)
    result = _spread(ct.shape, p["window_strides"])
    high = _spread(shape, p["base_dilation"]) + window - 1 - result - low
    config = [
        (int(a), int(b), s - 1) for a, b, s in zip(low, high, p["window_strides"], strict=True)
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


def _scatter_to_selected(ct, x, eqn, select: str):
    """Every window's cotangent goes to the first element that attains its extremum."""
    p = eqn.params
    if any(d != 1 for d in p["window_dilation"]):
        raise NotImplementedError(
            "the backward rule of a window maximum or minimum is not implemented with window "
            f"dilation, got window_dilation={p['window_dilation']} (called at {eqn.source})"
        )
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


row("reduce_window_max", lambda ct, x, eqn: _scatter_to_selected(ct, x, eqn, "ge"))
row("reduce_window_min", lambda ct, x, eqn: _scatter_to_selected(ct, x, eqn, "le"))


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
