"""A program cut in two: a forward half that keeps, a backward half that reads.

Calls, loops, branches and tangent programs hold programs of their own. Each is traced once into a
forward half, which returns what the backward half will need beside its own results, and into a
backward half, however often it is called. What passes between them is planned
(`fbackprop.plan`): values that the caller has anyway pass for free.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import jax

from fbackprop import passes
from fbackprop.passes import activity
from fbackprop.plan import choose, recomputable, steps_between
from fbackprop.program import (
    Equation,
    Program,
    Var,
    cotangent_aval,
    evaluate,
    holds,
    is_reference,
    program_of,
    prune,
    trace_jaxpr,
    with_outputs,
)
from fbackprop.table import Rules

Mask = tuple[bool, ...]


class Half(NamedTuple):
    """A backward half.

    Attributes:
      jaxpr: closed; kept values followed by the non-zero cotangents of the results, to the
        non-zero cotangents of the inputs.
      reached: which inputs get a cotangent.
    """

    jaxpr: object
    reached: Mask


class Split:
    """The two halves of a program for one choice of active inputs.

    Args:
      rules: the rules in force.
      program: what to cut.
      active: which inputs are differentiated.
      free_inputs: which inputs the backward half can have at no cost. In a linear program no
        active one is: it is a tangent, which the forward half has not.
      free_outputs: likewise outputs.
      invariant_inputs: which inputs are the same at each of many runs (constants of a loop);
        what depends on them alone is computed again once, outside the loop.
      unknown_inputs: which inputs the forward half must do without: the tangents of a linear
        program, whose sweep is its transpose.
      computed_outputs: which outputs the forward half must compute; by default all.
      recompute: which equations the backward half may run again; by default what is cheap, or
        what the checkpoint policy in force does not save.

    Attributes:
      forward: closed jaxpr, known inputs -> computed outputs followed by the extras.
      kept: the variables that pass from the forward to the backward half.
      places: for each of them where it comes from, ("input", i), ("output", i), ("extra", i) or
        ("invariant", variable).
      extras: those among them that are not free, and so become further results.
      as_it_stands: whether the program serves for its forward half. Not with a `custom_vjp` call
        in it: forward mode goes through the rule's forward half, and not through the function.
    """

    def __init__(
        self,
        rules: Rules,
        program: Program,
        active: Mask,
        *,
        free_inputs: Mask,
        free_outputs: Mask,
        invariant_inputs: Mask | None = None,
        unknown_inputs: Mask | None = None,
        computed_outputs: Mask | None = None,
        recompute: Callable[[Equation], bool] | None = None,
    ):
        self.rules, self.program, self.active = rules, program, active
        if rules.linear:
            free_inputs = _except(free_inputs, active)
            free_outputs = _except(free_outputs, activity(program, rules, active).outputs)
            invariant_inputs = invariant_inputs and _except(invariant_inputs, active)
        computed_outputs = computed_outputs or (True,) * len(program.outputs)
        traced = self._trace_forward(computed_outputs, unknown_inputs)
        body = program_of(traced)
        n = sum(computed_outputs)
        returned = iter(body.outputs[n:])
        self._leaves = [
            next(returned) if place is None else body.inputs[place] for place in self._references
        ]
        places = {}
        for v in _dependent_only_on(body, invariant_inputs):
            places[v] = ("invariant", v)
        for i, (v, f) in enumerate(zip(body.inputs, free_inputs, strict=True)):
            if f:
                places[v] = ("input", i)
        results = [f for f, c in zip(free_outputs, computed_outputs, strict=True) if c]
        for i, (v, f) in enumerate(zip(body.outputs[:n], results, strict=True)):
            if f and isinstance(v, Var):
                places[v] = ("output", i)
        wanted = [v for v in self._leaves if isinstance(v, Var)]
        recompute = recompute or recomputable(rules.policy, body)
        if rules.linear:
            recompute = _without_tangents(recompute, activity(body, rules, active))
        self.kept = choose(body, wanted, places, recompute)
        self.extras = [v for v in self.kept if v not in places]
        self.as_it_stands = not self.extras and not holds(program, "custom_vjp_call")
        places.update((v, ("extra", i)) for i, v in enumerate(self.extras))
        self.places = [places[v] for v in self.kept]
        self._again = steps_between(body, self.kept, wanted)
        self._body = body
        self.forward = with_outputs(traced, [*body.outputs[:n], *self.extras])
        self._backward: dict[Mask, Half] = {}

    def _trace_forward(self, computed_outputs, unknown_inputs):
        def run(*values):
            outs, tape = passes.forward(self.rules, self.program, self.active, values)
            leaves, self._tape_structure = jax.tree.flatten(tape)
            # A reference that is kept is one of the inputs, and cannot be returned.
            places = {id(x): i for i, x in enumerate(values) if is_reference(x)}
            self._references = [places.get(id(leaf)) for leaf in leaves]
            return [*outs, *(x for x in leaves if id(x) not in places)]

        traced = trace_jaxpr(run, self.program.in_avals)
        n_leaves = len(traced.out_avals) - len(computed_outputs)
        if all(computed_outputs):
            return traced
        traced, used = prune(traced, [*computed_outputs, *(True,) * n_leaves])
        if any(u and unknown for u, unknown in zip(used, unknown_inputs, strict=True)):
            raise TypeError(
                "a forward-mode rule is not linear in its tangents, so it cannot be transposed: "
                "mend the custom_jvp rule that was called here"
            )
        return traced

    def gather(self, inputs: Sequence, outputs: Sequence, extras: Sequence) -> list:
        """The kept values, from the values that the forward half was given and returned."""
        sources: dict = {"input": inputs, "output": outputs, "extra": extras}
        invariants = [v for place, v in self.places if place == "invariant"]
        if invariants:
            steps = steps_between(self._body, self._body.inputs, invariants)
            outside = Program(self._body.inputs, self._body.constants, steps, invariants)
            sources["invariant"] = dict(zip(invariants, evaluate(outside, inputs), strict=True))
        return [sources[place][i] for place, i in self.places]

    def backward(self, nonzero: Mask) -> Half:
        """The backward half, for the outputs marked in `nonzero` having a cotangent."""
        if nonzero not in self._backward:
            self._backward[nonzero] = self._trace_backward(nonzero)
        return self._backward[nonzero]

    def _trace_backward(self, nonzero: Mask) -> Half:
        again = Program(self.kept, self._body.constants, self._again, self._leaves)
        reached: Mask = ()

        def run(*values):
            nonlocal reached
            n = len(self.kept)
            tape = jax.tree.unflatten(self._tape_structure, evaluate(again, values[:n]))
            cts = spread(values[n:], nonzero)
            cts = passes.backward(self.rules, self.program, self.active, tape, cts)
            reached = tuple(ct is not None for ct in cts)
            return [ct for ct in cts if ct is not None]

        avals = [v.aval for v in self.kept]
        outs = zip(self.program.out_avals, nonzero, strict=True)
        avals += [cotangent_aval(aval) for aval, nz in outs if nz]
        jaxpr = trace_jaxpr(run, avals)
        return Half(jaxpr, reached)


def _except(mask: Mask, others: Mask) -> Mask:
    return tuple(m and not other for m, other in zip(mask, others, strict=True))


def _without_tangents(recompute: Callable[[Equation], bool], found: passes.Activity):
    """Of the equations to run again those that meet no tangent."""

    def also(eqn: Equation) -> bool:
        tangents = (v in found.variables for v in eqn.inputs if isinstance(v, Var))
        return not any(tangents) and recompute(eqn)

    return also


def spread(values: Sequence, mask: Sequence[bool]) -> list:
    """Values put where `mask` is true, None elsewhere."""
    remaining = iter(values)
    return [next(remaining) if m else None for m in mask]


def nonzero(cts: Sequence) -> Mask:
    return tuple(ct is not None for ct in cts)


def _dependent_only_on(program: Program, inputs: Mask | None) -> set[Var]:
    """Computed variables that depend on nothing but the inputs marked and on constants."""
    if inputs is None:
        return set()
    known: Collection = {v for v, i in zip(program.inputs, inputs, strict=True) if i}
    known = set(known) | {v for v, _ in program.constants}
    start = set(known)
    for eqn in program.equations:
        if not eqn.has_effects and all(v in known for v in eqn.inputs if isinstance(v, Var)):
            known.update(eqn.outputs)
    return known - start
