"""Where in memory a weight lies: whether it rearranges a parameter, and which of its elements.

Layout operations on a parameter are run once on a NumPy array that stands for it: NumPy returns
views, and knows which elements they share. The array's contents are never touched.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fbackprop.layouts import LAYOUTS, ONE_TO_ONE, View, reshaped
from fbackprop.passes import activity
from fbackprop.program import Program, Var, value_of
from fbackprop.sites import Layout
from fbackprop.table import Rules
from fbackprop.uses import is_lookup


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
    constants = _Constants(program)
    for eqn in program.equations:
        found = [known[v] for v in eqn.inputs if isinstance(v, Var) and v in known]
        if not found:
            continue
        if eqn.primitive.name in ONE_TO_ONE and eqn.rule is None:
            pairs = zip(eqn.inputs, eqn.outputs, strict=True)
            known.update((out, known[v]) for v, out in pairs if isinstance(v, Var) and v in known)
            continue
        behind = frozenset().union(*(origin.leaves for origin in found))
        layout = LAYOUTS.get(eqn.primitive.name) if eqn.rule is None else None
        views: Any = None
        first = eqn.inputs[0]
        view = known[first].view if isinstance(first, Var) and first in known else None
        if layout and view is not None:
            views = layout(view, eqn.params)
        elif view is not None and eqn.primitive.name == "gather" and is_lookup(eqn):
            views = _rows(view, constants.value(eqn.inputs[1]), eqn.out_avals[0].shape)
        views = views if isinstance(views, list) else [views] * len(eqn.outputs)
        for v, view in zip(eqn.outputs, views, strict=True):
            if v in flow.variables:
                # A leaf has the gradients of its rearrangements, but not of one made complex.
                is_complex = jnp.issubdtype(v.aval.dtype, jnp.complexfloating)
                known[v] = Origin(behind, None if is_complex else view)
    nowhere = Origin(frozenset(), None)
    outs = [known.get(v, nowhere) if isinstance(v, Var) else nowhere for v in program.outputs]
    return outs, leaves


class _Constants:
    """The values in a program that depend on none of its inputs, computed as they are asked for."""

    def __init__(self, program: Program):
        self._known = {v: value_of(x) for v, x in program.constants}
        self._known |= dict.fromkeys(program.inputs)
        self._makers = {v: eqn for eqn in program.equations for v in eqn.outputs}

    def value(self, v):
        """The value of a variable; None if it is not known."""
        if not isinstance(v, Var):
            return v.val
        if v not in self._known:
            eqn = self._makers[v]
            operands = [self.value(x) for x in eqn.inputs]
            outs = [None] * len(eqn.outputs)
            if not any(x is None for x in operands):
                with jax.ensure_compile_time_eval():
                    outs = eqn.bind(*operands)
            self._known.update(zip(eqn.outputs, outs, strict=True))
        return self._known[v]


def _rows(view: View, indices, shape) -> View | None:
    """What a lookup takes of a table, if the rows are known, evenly spaced and in range."""
    if indices is None or np.size(indices) == 0:
        return None
    rows = np.asarray(indices)[..., 0].reshape(-1).astype(np.int64)
    steps = np.unique(np.diff(rows))
    if len(steps) > 1 or 0 in steps or not 0 <= min(rows) <= max(rows) < len(view):
        return None
    step = int(steps[0]) if len(steps) else 1
    end = int(rows[-1]) + step
    return reshaped(view[int(rows[0]) : end if end >= 0 else None : step], shape)


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
