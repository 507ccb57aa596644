"""Layout operations on NumPy arrays that stand for values: what lies where after them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

View = np.ndarray


def reshaped(view: View, shape) -> View | None:
    out = view.reshape(shape)
    return out if out.size == 0 or np.may_share_memory(out, view) else None


def as_read(array: np.ndarray, params) -> np.ndarray:
    """The operand of a reshape with its axes in the order in which they are read."""
    order = params["dimensions"]
    return array if order is None else array.transpose(order)


def _sliced(view: View, params) -> View:
    strides = params["strides"] or (1,) * view.ndim
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return view[tuple(slice(*bound) for bound in bounds)]


def _broadcast(view: View, params) -> View | None:
    """Only new axes of length one leave it a rearrangement."""
    same = math.prod(params["shape"]) == view.size
    return reshaped(view, params["shape"]) if same else None


def _split(view: View, params) -> list[View]:
    ends = np.cumsum(params["sizes"])[:-1]
    return np.split(view, ends, axis=params["axis"])


def _same(view: View, params) -> View:
    return view


LAYOUTS: dict[str, Callable] = {
    "transpose": lambda view, params: view.transpose(params["permutation"]),
    "reshape": lambda view, params: reshaped(as_read(view, params), params["new_sizes"]),
    "squeeze": lambda view, params: view.squeeze(tuple(params["dimensions"])),
    "expand_dims": lambda view, params: np.expand_dims(view, tuple(params["dimensions"])),
    "broadcast_in_dim": _broadcast,
    "slice": _sliced,
    "split": _split,
    "rev": lambda view, params: np.flip(view, tuple(params["dimensions"])),
    "unstack": lambda view, params: list(np.moveaxis(view, params["axis"], 0)),
    "copy": _same,
    "convert_element_type": _same,
    "name": _same,
    "sharding_constraint": _same,
    "reshard": _same,
}

# Of several operands each has a result, the same.
ONE_TO_ONE = ("optimization_barrier", "device_put")
