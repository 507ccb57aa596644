"""Biases: vectors that are added to all that another weight gives.

Such a vector is one more row of that weight, met by an activation of 1, and the same error signals
arrive at both. It is found by following the weight's result through layout operations to the sum,
and the other summand back to the vector, with the places of their elements.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fbackprop.layouts import LAYOUTS, as_read
from fbackprop.program import Equation, Program, Var


@dataclasses.dataclass(frozen=True, eq=False)
class Added:
    """A variable that is added to an equation's result.

    Attributes:
      eqn: the equation.
      moves: the layout operations between its result and the sum.
      var: the variable.
      spreads: the layout operations between it and the sum.
    """

    eqn: Equation
    moves: Sequence[Equation]
    var: Var
    spreads: Sequence[Equation]

    @functools.cached_property
    def index(self) -> np.ndarray:
        """Which element is added to each of the result's, of the result's axes.

        Of length one along those on which it does not depend.
        """
        at = functools.reduce(_moved, self.moves, _numbered(self.eqn.outputs[0]))
        elements = functools.reduce(_moved, self.spreads, _numbered(self.var))
        index = np.empty(at.size, elements.dtype)
        index[at.reshape(-1)] = np.broadcast_to(elements, at.shape).reshape(-1)
        return _compact(index.reshape(self.eqn.out_avals[0].shape))


class Bias(NamedTuple):
    """What is added to the result of a use of a weight.

    Attributes:
      weight: which weight it is.
      added: how it comes to the sum.
      stacked: for each loop around, whether every iteration adds a vector of its own.
    """

    weight: int
    added: Added
    stacked: tuple[bool, ...] = ()

    def within(self, places: Sequence[int], stacked: tuple[bool, ...] = ()) -> Bias:
        """As the program around sees it."""
        return Bias(places[self.weight], self.added, (*stacked, *self.stacked))

    def element_of(self, lengths: Sequence[int], size: int) -> np.ndarray:
        """The element added to each of the result's, with an axis for each loop in front.

        Args:
          lengths: of the loops.
          size: how many elements the vectors of all iterations have together.
        """
        lead = [n if s else 1 for n, s in zip(lengths, self.stacked, strict=True)]
        each = np.arange(size).reshape(*lead, size // math.prod(lead))
        return each[..., self.added.index]


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

    def added_to(self, eqn: Equation) -> Added | None:
        """The weight that is added to all of an equation's result, and how it comes to the sum."""
        (var,) = eqn.outputs
        moves: list[Equation] = []
        while (reader := self._only_reader(var)) is not None and reader.primitive.name != "add":
            if not _is_layout(reader) or reader.out_avals[0].size != var.aval.size:
                return None
            moves.append(reader)
            (var,) = reader.outputs
        if reader is None or reader.rule is not None:
            return None
        if reader.out_avals[0].shape != var.aval.shape:
            return None
        (other,) = (v for v in reader.inputs if v is not var)
        spreads: list[Equation] = []
        while not self._is_param(other):
            maker = self._makers.get(other) if isinstance(other, Var) else None
            if maker is None or not _is_layout(maker):
                return None
            spreads.insert(0, maker)
            other = maker.inputs[0]
        return Added(eqn, moves, other, spreads)

    def _only_reader(self, var) -> Equation | None:
        readers = self._readers.get(var, [])
        return readers[0] if len(readers) == 1 and var not in self._outputs else None


def _numbered(var: Var) -> np.ndarray:
    return np.arange(var.aval.size, dtype=np.int32).reshape(var.aval.shape)


def _is_layout(eqn: Equation) -> bool:
    """Whether an equation moves the elements of its one operand, or repeats them."""
    name = eqn.primitive.name
    return eqn.rule is None and name in LAYOUTS and name not in ("split", "unstack")


def _moved(array: np.ndarray, eqn: Equation) -> np.ndarray:
    """What a layout operation, or a broadcast, makes of an array."""
    params = eqn.params
    if eqn.primitive.name == "broadcast_in_dim":
        shape = [1] * len(params["shape"])
        for axis, size in zip(params["broadcast_dimensions"], array.shape, strict=True):
            shape[axis] = size
        return np.broadcast_to(array.reshape(shape), params["shape"])
    if eqn.primitive.name == "reshape":  # of a copy, where it is no view
        return as_read(array, params).reshape(params["new_sizes"])
    return LAYOUTS[eqn.primitive.name](array, params)


def _compact(index: np.ndarray) -> np.ndarray:
    """The same with axes of length one where nothing varies along them."""
    for axis in range(index.ndim):
        first = index.take([0], axis)
        if (index == first).all():
            index = first
    return index
