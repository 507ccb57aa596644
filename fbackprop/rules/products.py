"""Products: `dot_general` and `conv_general_dilated`, in every layout.

Both are bilinear: the cotangent of one operand is the product of the result's cotangent with the
other operand, in dimension numbers that undo the forward ones.
"""

from __future__ import annotations

import numpy as np
from jax import lax

from fbackprop.program import sharding_of
from fbackprop.table import row

# --- dot_general ----------------------------------------------------------------------------------


def _dot_pullback(ct, other, eqn, side: int):
    """Cotangent of operand `side` of a dot product, from the other operand."""
    contract, batch = eqn.params["dimension_numbers"]
    mine, its = eqn.in_avals[side], eqn.in_avals[1 - side]
    my_batch, its_batch = batch[side], batch[1 - side]
    my_contract, its_contract = contract[side], contract[1 - side]
    my_kept = [d for d in range(mine.ndim) if d not in my_batch and d not in my_contract]
    its_kept = [d for d in range(its.ndim) if d not in its_batch and d not in its_contract]

    # The result's axes are (batch, left kept, right kept): contract those that are not mine.
    n_batch = len(my_batch)
    start = n_batch + (len(my_kept) if side == 0 else 0)
    ct_contract = tuple(range(start, start + len(its_kept)))
    dims = ((ct_contract, tuple(its_kept)), (tuple(range(n_batch)), its_batch))
    preferred = eqn.params["preferred_element_type"]
    # Its axes are (batch, my kept, contracted in the other operand's order): then back to mine.
    order = np.argsort(its_contract)
    axes = [*my_batch, *my_kept, *(my_contract[i] for i in order)]
    product = lax.dot_general(
        ct,
        other,
        dims,
        precision=_transposed_precision(eqn.params["precision"], side),
        preferred_element_type=preferred,
        out_sharding=sharding_of(mine, axes),
    )
    product = lax.transpose(product, np.argsort(axes))
    return lax.convert_element_type(product, mine.dtype)


def _transposed_precision(precision, side: int):
    """Per-operand precisions follow the operands: here the cotangent stands first."""
    if isinstance(precision, tuple) and side == 1:
        return precision[::-1]
    return precision


row(
    "dot_general",
    lambda ct, y, eqn: _dot_pullback(ct, y, eqn, 0),
    lambda ct, x, eqn: _dot_pullback(ct, x, eqn, 1),
)

# --- ragged_dot_general ---------------------------------------------------------------------------
#
# The rows of the left operand come in groups, each with a right operand of its own.


def _ragged_numbers(eqn):
    """Its axes by what they do; only groups of rows have a derivative."""
    numbers, ndim = eqn.params["ragged_dot_dimension_numbers"], eqn.in_avals[0].ndim
    contract, batch = numbers.dot_dimension_numbers
    (ragged,) = numbers.lhs_ragged_dimensions
    if eqn.params["group_offset"] is not None or ragged in (*contract[0], *batch[0]):
        raise NotImplementedError(
            "the backward rule of a ragged product is implemented where its groups are of kept "
            f"rows, without group_offset (called at {eqn.source}): use lax.dot_general per group"
        )
    group = tuple(numbers.rhs_group_dimensions)
    left = [d for d in range(ndim) if d not in contract[0] and d not in batch[0]]
    right = [
        d
        for d in range(eqn.in_avals[1].ndim)
        if d not in contract[1] and d not in batch[1] and d not in group
    ]
    return contract, batch, ragged, group, left, right


def _ragged_dot(a, b, groups, eqn, dot_numbers, ragged, group, order, aval):
    p = eqn.params
    out = lax.ragged_dot_general(
        a,
        b,
        groups,
        lax.RaggedDotDimensionNumbers(dot_numbers, [ragged], group),
        precision=p["precision"],
        preferred_element_type=p["preferred_element_type"],
    )
    return lax.convert_element_type(lax.transpose(out, np.argsort(order)), aval.dtype)


def _ragged_left(ct, y, z, eqn):
    contract, batch, ragged, group, left, right = _ragged_numbers(eqn)
    n, m = len(batch[0]), len(batch[0]) + len(left)
    dot_numbers = ((range(m, ct.ndim), right), (range(n), batch[1]))
    order = [*batch[0], *left, *(contract[0][i] for i in np.argsort(contract[1]))]
    row_axis = n + left.index(ragged)
    return _ragged_dot(ct, y, z, eqn, dot_numbers, row_axis, group, order, eqn.in_avals[0])


def _ragged_right(ct, x, z, eqn):
    contract, batch, ragged, group, left, right = _ragged_numbers(eqn)
    n = len(batch[0])
    dot_numbers = ((left, range(n, n + len(left))), (batch[0], range(n)))
    order = [*group, *batch[1], *(contract[1][i] for i in np.argsort(contract[0])), *right]
    return _ragged_dot(x, ct, z, eqn, dot_numbers, ragged, [], order, eqn.in_avals[1])


row("ragged_dot_general", _ragged_left, _ragged_right, None)

# --- conv_general_dilated -------------------------------------------------------------------------
#
# A convolution is a product in which each spatial axis has three lengths: image, kernel and result.
# Spread by its dilation (the result by the stride), they satisfy
#     result = pad_low + image + pad_high - kernel + 1,
# and each pullback is a convolution again, whose paddings this equation gives.


def _lengths(eqn):
    """Spatial lengths of image, kernel and result, each spread by its dilation."""
    p, dn = eqn.params, eqn.params["dimension_numbers"]
    spreads = (p["lhs_dilation"], p["rhs_dilation"], p["window_strides"])
    avals = (*eqn.in_avals, *eqn.out_avals)
    lengths = []
    for aval, spec, spread in zip(avals, dn, spreads, strict=True):
        n = np.array([aval.shape[d] for d in spec[2:]], dtype=np.int64)
        lengths.append(np.where(n == 0, 0, (n - 1) * np.array(spread, dtype=np.int64) + 1))
    return lengths


def _turned(spec):
    """A layout with its batch and feature axes exchanged."""
    return (spec[1], spec[0], *spec[2:])


def _move_groups(x, source: int, target: int, groups: int):
    """Take `groups` blocks out of axis `source` and stack them along axis `target`."""
    block = x.shape[source] // groups
    x = lax.reshape(x, (*x.shape[:source], groups, block, *x.shape[source + 1 :]))
    axes = [d for d in range(x.ndim) if d != source]
    at = axes.index(target if target < source else target + 1)
    axes.insert(at, source)
    x = lax.transpose(x, axes)
    return lax.reshape(x, (*x.shape[:at], x.shape[at] * x.shape[at + 1], *x.shape[at + 2 :]))


def _convolve(x, kernel, low, high, specs, eqn, operand: int, **options):
    p = eqn.params
    return lax.conv_general_dilated(
        x,
        lax.convert_element_type(kernel, x.dtype),
        padding=[(int(a), int(b)) for a, b in zip(low, high, strict=True)],
        dimension_numbers=lax.ConvDimensionNumbers(*specs),
        precision=p["precision"],
        preferred_element_type=p["preferred_element_type"],
        out_sharding=sharding_of(eqn.in_avals[operand]),
        **options,
    )


def _conv_image(ct, y, eqn):
    """Cotangent of the image: the result's cotangent convolved with the kernel turned round."""
    p = eqn.params
    image_spec, kernel_spec, result_spec = p["dimension_numbers"]
    image, kernel, result = _lengths(eqn)
    low = kernel - 1 - np.array([low for low, _ in p["padding"]], dtype=np.int64)
    groups, batch_groups = p["feature_group_count"], p["batch_group_count"]
    if max(groups, batch_groups) > 1:
        y = _move_groups(y, kernel_spec[0], kernel_spec[1], max(groups, batch_groups))
    ct = _convolve(
        ct,
        lax.rev(y, kernel_spec[2:]),
        low,
        image + kernel - 1 - result - low,
        (result_spec, _turned(kernel_spec), image_spec),
        eqn,
        0,
        window_strides=p["lhs_dilation"],
        lhs_dilation=p["window_strides"],
        rhs_dilation=p["rhs_dilation"],
        feature_group_count=max(groups, batch_groups),
    )
    if batch_groups > 1:
        ct = _move_groups(ct, image_spec[1], image_spec[0], batch_groups)
    return lax.convert_element_type(ct, eqn.in_avals[0].dtype)


def _conv_kernel(ct, x, eqn):
    """Cotangent of the kernel: the image correlated with the result's cotangent."""
    p = eqn.params
    if ct.size == 0:
        return lax.full(eqn.in_avals[1].shape, 0, eqn.in_avals[1].dtype)
    image_spec, kernel_spec, result_spec = p["dimension_numbers"]
    image, kernel, result = _lengths(eqn)
    low = np.array([low for low, _ in p["padding"]], dtype=np.int64)
    ct = _convolve(
        lax.convert_element_type(x, ct.dtype),
        ct,
        low,
        result + kernel - 1 - image - low,
        (_turned(image_spec), _turned(result_spec), _turned(kernel_spec)),
        eqn,
        1,
        window_strides=p["rhs_dilation"],
        lhs_dilation=p["lhs_dilation"],
        rhs_dilation=p["window_strides"],
        feature_group_count=p["batch_group_count"],
        batch_group_count=p["feature_group_count"],
    )
    return lax.convert_element_type(ct, eqn.in_avals[1].dtype)


row("conv_general_dilated", _conv_image, _conv_kernel)
