"""What to keep between the two passes: save what is dear to compute again, recompute the rest.

The rules say which values the backward sweep reads. Each can be kept, or computed again from
others by cheap equations (elementwise arithmetic, comparisons, changes of layout). The fewest
bytes that suffice are a minimum cut of the program's graph between the values that must be kept
if anything is (arguments and results of dear equations) and those that the sweep reads. The same
formulation serves activation checkpointing in compilers (Zheng et al. 2020, "AOTAutograd"'s
min-cut partitioner; Ford and Fulkerson 1956 for the theorem).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable

import numpy as np

from fbackprop.program import Equation, Program, Var, bodies, known_length, program_of

# Primitives that cost about as much as reading their operands.
CHEAP = frozenset(
    """
    abs add add_any and broadcast_in_dim ceil clamp complex conj convert_element_type copy div
    eq floor ge gt imag integer_pow iota is_finite le lt max min mul ne neg not
    one_minus_square or pad real reshape rev round select_n sign slice split square squeeze stack
    stop_gradient sub tile transpose unstack xor concatenate
    """.split()
)


def cheap(eqn: Equation) -> bool:
    """Whether to compute an equation again rather than keep its results."""
    if eqn.primitive.name == "jit":
        return all(cheap(e) for e in program_of(eqn.params["jaxpr"]).equations)
    return eqn.primitive.name in CHEAP and not eqn.has_effects


def recomputable(policy: Callable | None, program: Program) -> Callable[[Equation], bool]:
    """Which equations of a program its backward half may run again.

    Cheap ones; where a checkpoint policy saves some of them, all but those. A loop or branch that
    holds an equation to be saved runs once, and keeps what it must for that.
    """
    if policy is None or not any(_holds_saved(eqn, policy) for eqn in program.equations):
        return cheap
    return all_but_saved(policy)


def all_but_saved(policy: Callable | None) -> Callable[[Equation], bool]:
    """Everything may be run again, save effects and what the checkpoint policy saves."""
    return lambda eqn: not (eqn.has_effects or (policy and _holds_saved(eqn, policy)))


def _holds_saved(eqn: Equation, policy: Callable) -> bool:
    if _saves(policy(eqn.primitive, *eqn.in_avals, **eqn.params)):
        return True
    return any(_holds_saved(e, policy) for body in bodies(eqn) for e in body.equations)


def _saves(decision) -> bool:
    """Policies answer with a boolean or with one of JAX's markers for save and recompute."""
    return decision if isinstance(decision, bool) else "Recompute" not in repr(decision)


def nbytes(v: Var) -> int:
    return math.prod(map(known_length, v.aval.shape)) * getattr(v.aval.dtype, "itemsize", 4)


def choose(
    program: Program,
    wanted: Iterable[Var],
    free: Collection[Var],
    recompute: Callable[[Equation], bool] = cheap,
) -> list[Var]:
    """The variables to keep so that all `wanted` can be had in the backward pass.

    Args:
      program: the forward pass.
      wanted: variables that the backward sweep reads.
      free: variables that cost nothing to keep, such as those that live on anyway.
      recompute: which equations may be run again.

    Returns:
      Variables of least total size (with free ones only where they are used), in program order.
    """
    producer = {v: e for e in program.equations for v in e.outputs}
    given = {v for v, _ in program.constants}
    network = _Network()
    stack, seen = [v for v in wanted if v not in given], set()
    for v in stack:
        network.connect((v, "out"), "sink", np.inf)
    while stack:
        v = stack.pop()
        if v in seen:
            continue
        seen.add(v)
        # One unit per variable breaks ties in favour of fewer arrays.
        network.connect((v, "in"), (v, "out"), 0 if v in free else nbytes(v) + 1)
        eqn = producer.get(v)
        if v in free or eqn is None or not recompute(eqn):
            network.connect("source", (v, "in"), np.inf)
            continue
        for u in eqn.inputs:
            if isinstance(u, Var) and u not in given:
                network.connect((u, "out"), (v, "in"), np.inf)
                stack.append(u)
    near_sink = network.minimum_cut("source", "sink")
    kept = [v for v in seen if (v, "out") in near_sink and (v, "in") not in near_sink]
    order = {v: i for i, v in enumerate(program.inputs)}
    order |= {v: len(order) + i for i, v in enumerate(producer)}
    return sorted(kept, key=order.__getitem__)


def steps_between(program: Program, kept: Collection[Var], wanted: Iterable[Var]) -> list[Equation]:
    """The equations, in order, that compute `wanted` from `kept` and the constants."""
    known = set(kept) | {v for v, _ in program.constants}
    missing = {v for v in wanted if v not in known}
    steps = []
    for eqn in reversed(program.equations):
        if missing.isdisjoint(eqn.outputs):
            continue
        steps.append(eqn)
        missing.difference_update(eqn.outputs)
        missing.update(v for v in eqn.inputs if isinstance(v, Var) and v not in known)
    if missing:
        raise AssertionError(f"the plan keeps too little: {len(missing)} values cannot be had")
    return steps[::-1]


class _Network:
    """A flow network, for one minimum cut by shortest augmenting paths (Dinic 1970)."""

    def __init__(self):
        self.capacity: dict = {}

    def connect(self, a, b, capacity):
        forward = self.capacity.setdefault(a, {})
        forward[b] = forward.get(b, 0) + capacity
        self.capacity.setdefault(b, {}).setdefault(a, 0)

    def minimum_cut(self, source, sink) -> set:
        """The nodes on the sink's side of the minimum cut that is nearest to the sink."""
        if source in self.capacity and sink in self.capacity:
            while level := self._levels(source, sink):
                edges = {a: list(out) for a, out in self.capacity.items()}
                tried = dict.fromkeys(edges, 0)
                while self._augment(source, sink, level, edges, tried):
                    pass
        reach, queue = {sink}, deque([sink])
        while queue:
            b = queue.popleft()
            for a in self.capacity.get(b, ()):
                if a not in reach and self.capacity[a][b] > 0:
                    reach.add(a)
                    queue.append(a)
        return reach

    def _levels(self, source, sink) -> dict | None:
        level, queue = {source: 0}, deque([source])
        while queue:
            a = queue.popleft()
            for b, capacity in self.capacity[a].items():
                if capacity > 0 and b not in level:
                    level[b] = level[a] + 1
                    queue.append(b)
        return level if sink in level else None

    def _augment(self, source, sink, level, edges, tried) -> bool:
        """Push flow along one shortest path, found depth first without recursion.

        Of each node the first edges, as many as it has `tried`, lead nowhere any more.
        """
        path = [source]
        while path[-1] != sink:
            a = path[-1]
            while tried[a] < len(edges[a]):
                b = edges[a][tried[a]]
                if self.capacity[a][b] > 0 and level.get(b) == level[a] + 1:
                    path.append(b)
                    break
                tried[a] += 1
            else:
                path.pop()
                if not path:
                    return False
                tried[path[-1]] += 1
        hops = list(zip(path, path[1:], strict=False))
        flow = min(self.capacity[a][b] for a, b in hops)
        for a, b in hops:
            self.capacity[a][b] -= flow
            self.capacity[b][a] += flow
        return True
