"""Biases: vectors that are added to all that another weight gives.

Such a vector is one more row of that weight, met by an activation of 1, and the same error signals
arrive at both. It is found by following the weight's result through layout operations to the sum,
and the other summand back to the vector, with the places of their elements.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fbackprop.layouts import LAYOUTS
from fbackprop.program import Equation, Program, Var


@dataclasses.dataclass(frozen=True, eq=False)
class Bias:
    """What is added to the result of a use of a weight.

    Attributes:
      weight: which weight it is.
      index: which of its elements is added to each of the result's, of the result's axes; of
        length one along those on which it does not depend.
      stacked: for each loop around, whether every iteration adds a vector of its own.
    """

    weight: int
    index: np.ndarray
    stacked: tuple[bool, ...] = ()

    def within(self, places: Sequence[int], stacked: tuple[bool, ...] = ()) -> Bias:
        """As the program around sees it."""
        return Bias(places[self.weight], self.index, (*stacked, *self.stacked))

    def element_of(self, lengths: Sequence[int], size: int) -> np.ndarray:
        """The element added to each of the result's, with an axis for each loop in front.

        Args:
          lengths: of the loops.
          size: how many elements the vectors of all iterations have together.
        """
        lead = [n if s else 1 for n, s in zip(lengths, self.stacked, strict=True)]
        each = np.arange(size).reshape(*lead, size // math.prod(lead))
        return each[..., self.index]


class Sums:
    """Which vectors a program adds to the results of its equations.

    Args:
      program: the program.
      is_param: whether a variable is a weight.
    """

    def __init__(self, program: Program, is_param: Callable[[Any], bool]):
        self._is_param = is_param
        self._outputs = set(v for v in program.outputs if isinstance(v, Var))
        self._readers: dict[Var, list[Equation]] = {}
        self._makers: dict[Var, Equation] = {}
        for eqn in program.equations:
            self._makers.update((v, eqn) for v in eqn.outputs)
            for v in eqn.inputs:
                if isinstance(v, Var):
                    self._readers.setdefault(v, []).append(eqn)

    def bias_of(self, eqn: Equation) -> tuple[Var, np.ndarray] | None:
        """The weight that is added to all of an equation's result, and the `index` of a `Bias`."""
        (var,) = eqn.outputs
        at = _numbered(var)
        while (reader := self._only_reader(var)) is not None and reader.primitive.name != "add":
            moved = _moved(reader, at)
            if moved is None or moved.size != at.size:
                return None
            at, (var,) = moved, reader.outputs
        if reader is None or reader.rule is not None or reader.out_avals[0].shape != at.shape:
            return None
        (other,) = (v for v in reader.inputs if v is not var)
        found = self._elements(other)
        if found is None:
            return None
        weight, elements = found
        index = np.empty(at.size, elements.dtype)
        index[at.reshape(-1)] = np.broadcast_to(elements, at.shape).reshape(-1)
        return weight, _compact(index.reshape(eqn.out_avals[0].shape))

    def _only_reader(self, var) -> Equation | None:
        readers = self._readers.get(var, [])
        return readers[0] if len(readers) == 1 and var not in self._outputs else None

    def _elements(self, var) -> tuple[Var, np.ndarray] | None:
        """The weight that a variable spreads, and the place of each of its elements in it."""
        if self._is_param(var):
            return var, _numbered(var)
        if not isinstance(var, Var) or var not in self._makers:
            return None
        maker = self._makers[var]
        found = self._elements(maker.inputs[0]) if len(maker.inputs) == 1 else None
        moved = None if found is None else _moved(maker, found[1])
        return None if found is None or moved is None else (found[0], moved)


def _numbered(var: Var) -> np.ndarray:
    return np.arange(var.aval.size, dtype=np.int32).reshape(var.aval.shape)


def _moved(eqn: Equation, array) -> np.ndarray | None:
    """What a layout operation, or a broadcast, makes of an array; None for other equations."""
    name, params = eqn.primitive.name, eqn.params
    if eqn.rule is not None or name not in LAYOUTS or name == "split":
        return None
    if name == "broadcast_in_dim":
        shape = [1] * len(params["shape"])
        for axis, size in zip(params["broadcast_dimensions"], array.shape, strict=True):
            shape[axis] = size
        return np.broadcast_to(array.reshape(shape), params["shape"])
    return LAYOUTS[name](array.copy(), params)


def _compact(index: np.ndarray) -> np.ndarray:
    """The same with axes of length one where nothing varies along them."""
    for axis in range(index.ndim):
        first = index.take([0], axis)
        if (index == first).all():
            index = first
    return index
