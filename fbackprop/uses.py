"""Weights, their uses (the places where one meets data), and which of those have structure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from fbackprop.biases import Bias
from fbackprop.program import UNKNOWN_LINE, Equation

Mask = tuple[bool, ...]


class Loop(NamedTuple):
    """A loop around a use: how often it runs, and whether each iteration has its own weight."""

    length: int
    stacked: bool


class Use(NamedTuple):
    """One place where a weight meets data.

    Attributes:
      eqn: the equation.
      operand: which of its operands is the weight.
      weight: which weight it is.
      loops: the loops around it, the outermost first. What the use returns and the nudges it takes
        have one leading axis for each.
      bias: the vector that is added to all of its result, if any.
      branches: the conditionals around it, the outermost first, each with the number of the branch.
      source: the line of the user's code.
    """

    eqn: Equation
    operand: int
    weight: int
    loops: tuple[Loop, ...] = ()
    bias: Bias | None = None
    branches: tuple[tuple[Equation, int], ...] = ()
    source: str = UNKNOWN_LINE

    def within(self, places: Sequence[int], loop: Callable = lambda weight: ()) -> Use:
        """As the program around sees it.

        Args:
          places: of the weights there.
          loop: the loop around the uses of a weight, if any.
        """
        bias = self.bias
        if bias is not None:
            bias = bias.within(places, tuple(around.stacked for around in loop(bias.weight)))
        loops = (*loop(self.weight), *self.loops)
        return self._replace(weight=places[self.weight], loops=loops, bias=bias)

    @property
    def nudge_shape(self) -> tuple[int, ...]:
        return (*(loop.length for loop in self.loops), *self.eqn.out_avals[0].shape)


class Weight(NamedTuple):
    """A weight in the second part: as it is, and nudged for uses without structure."""

    plain: Any
    nudged: Any


class Weights:
    """Weights, each listed once.

    Attributes:
      weights: what names each of them.
      loose: for each its uses without structure, described; it is nudged itself if there are any.
      depth: for each how many loops it comes stacked for.
    """

    def __init__(self):
        self.weights: list = []
        self.loose: list[list[str]] = []
        self.depth: list[int] = []

    def enlist(self, key, loose: list[str], depth: int = 0) -> int:
        """List a weight, with further uses if it is there already; returns its place."""
        if key not in self.weights:
            self.weights.append(key)
            self.loose.append([])
            self.depth.append(depth)
        i = self.weights.index(key)
        self.loose[i] += loose
        self.depth[i] = min(self.depth[i], depth)
        return i


def untaken(dtype):
    """What stands for an element that a branch not taken would have met: zero, or of indices none.

    Indices are `signed`, and none of them is the least of its dtype.
    """
    return jnp.iinfo(dtype).min if jnp.issubdtype(dtype, jnp.integer) else 0


def signed(indices):
    """Indices of another dtype, of at least 32 bits; what is out of a table's range stays so."""
    dtype = jnp.int64 if indices.dtype.itemsize == 8 else jnp.int32
    info = jnp.iinfo(dtype)
    if jnp.issubdtype(indices.dtype, jnp.unsignedinteger) and indices.dtype.itemsize >= 4:
        indices = jnp.minimum(indices, info.max)
    return jnp.maximum(indices.astype(dtype), info.min + 1)


# --- which uses have structure -------------------------------------------------------------------


def is_lookup(eqn: Equation) -> bool:
    """Whether a gather picks whole rows of a table.

    A `dynamic_slice` under `vmap` gives indices for all of the table's axes, of which those of a
    whole axis mean nothing, and leaves the row an axis of length one.
    """
    numbers, table = eqn.params["dimension_numbers"], eqn.in_avals[0]
    starts, collapsed = numbers.start_index_map, numbers.collapsed_slice_dims
    rank = eqn.out_avals[0].ndim
    return (
        starts[:1] == (0,)
        and (len(starts) == 1 or eqn.params["mode"] == lax.GatherScatterMode.CLIP)
        and collapsed in ((0,), ())
        and not numbers.operand_batching_dims
        and tuple(eqn.params["slice_sizes"]) == (1, *table.shape[1:])
        and numbers.offset_dims == tuple(range(rank - table.ndim + len(collapsed), rank))
    )


def is_row(eqn: Equation) -> bool:
    """Whether a dynamic slice is one whole row of a table."""
    table = eqn.in_avals[0]
    return table.ndim > 0 and tuple(eqn.params["slice_sizes"]) == (1, *table.shape[1:])


STRUCTURED: dict[str, Callable[[Equation, int], bool]] = {
    "dot_general": lambda eqn, operand: True,
    "conv_general_dilated": lambda eqn, operand: (
        operand == 1 and eqn.params["batch_group_count"] == 1
    ),
    "gather": lambda eqn, operand: operand == 0 and is_lookup(eqn),
    "dynamic_slice": lambda eqn, operand: operand == 0 and is_row(eqn),
}


LOOKUPS = ("gather", "dynamic_slice")
