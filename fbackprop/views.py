"""Where in memory a weight lies: whether it rearranges a parameter, and which of its elements.

Layout operations on a parameter are run once on a NumPy array that stands for it: NumPy returns
views, and knows which elements they share. The array's contents are never touched.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fbackprop.layouts import LAYOUTS, View, reshaped
from fbackprop.passes import activity
from fbackprop.program import Program, Var
from fbackprop.sites import Layout
from fbackprop.table import Rules


class Origin(NamedTuple):
    """Where a weight comes from.

    Attributes:
      leaves: the parameters that it moves with.
      view: where it lies in the one parameter that it rearranges; None if it is computed.
    """

    leaves: frozenset[int]
    view: View | None


def origins(program: Program, rules: Rules, moving: tuple[bool, ...]):
    """The origin of each output of a program of parameters, and the arrays that stand for these."""
    flow = activity(program, rules, moving)
    inputs = [(i, v) for i, (v, m) in enumerate(zip(program.inputs, moving, strict=True)) if m]
    leaves = {i: np.empty(v.aval.shape, np.int8) for i, v in inputs}
    known = {v: Origin(frozenset([i]), leaves[i]) for i, v in inputs}
    for eqn in program.equations:
        found = [known[v] for v in eqn.inputs if isinstance(v, Var) and v in known]
        if not found:
            continue
        behind = frozenset().union(*(origin.leaves for origin in found))
        layout = LAYOUTS.get(eqn.primitive.name) if eqn.rule is None else None
        views: Any = None
        if layout and found[0].view is not None and isinstance(eqn.inputs[0], Var):
            views = layout(found[0].view, eqn.params)
        views = views if isinstance(views, list) else [views] * len(eqn.outputs)
        for v, view in zip(eqn.outputs, views, strict=True):
            if v in flow.variables:
                # A leaf has the gradients of its rearrangements, but not of one made complex.
                is_complex = jnp.issubdtype(v.aval.dtype, jnp.complexfloating)
                known[v] = Origin(behind, None if is_complex else view)
    nowhere = Origin(frozenset(), None)
    outs = [known.get(v, nowhere) if isinstance(v, Var) else nowhere for v in program.outputs]
    return outs, leaves


Run = tuple[tuple[int, int], ...]  # sizes and strides


class Memory(NamedTuple):
    """The memory that a weight's axes (g, i, o) run over; equal for equal arrangements."""

    pointer: int
    g: Run
    i: Run
    o: Run

    @property
    def exchanged(self) -> Memory:
        """That of the transpose."""
        return Memory(self.pointer, self.g, self.o, self.i)


def memory(view: View, layout: Layout) -> Memory | None:
    """The memory of a weight; None where its axes are not regular enough to say."""
    split = reshaped(view, layout.split)
    if split is None:
        return None
    runs = []
    for group in layout.groups:
        run: list[tuple[int, int]] = []
        for size, stride in ((split.shape[k], split.strides[k]) for k in group):
            if size == 1:
                continue
            if run and run[-1][1] == stride * size:
                run[-1] = (run[-1][0] * size, stride)
            else:
                run.append((size, stride))
        runs.append(tuple(run))
    return Memory(view.__array_interface__["data"][0], *runs)


def share(a: View, b: View) -> bool:
    try:
        return np.shares_memory(a, b, max_work=100_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True
