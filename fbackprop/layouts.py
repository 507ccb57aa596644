"""Layout operations on NumPy arrays that stand for values: what lies where after them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

View = np.ndarray


def reshaped(view: View, shape) -> View | None:
    out = view.reshape(shape)
    return out if out.size == 0 or np.may_share_memory(out, view) else None


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


LAYOUTS: dict[str, Callable] = {
    "transpose": lambda view, params: view.transpose(params["permutation"]),
    "reshape": lambda view, params: reshaped(view, params["new_sizes"]),
    "squeeze": lambda view, params: view.squeeze(tuple(params["dimensions"])),
    "expand_dims": lambda view, params: np.expand_dims(view, tuple(params["dimensions"])),
    "broadcast_in_dim": _broadcast,
    "slice": _sliced,
    "split": _split,
    "rev": lambda view, params: np.flip(view, tuple(params["dimensions"])),
    "copy": lambda view, params: view,
    "convert_element_type": lambda view, params: view,
}
