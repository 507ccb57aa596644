"""Calls, branches and checkpoints: equations that hold programs and run them at most once."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax import lax

from fbackprop.passes import activity, pull
from fbackprop.plan import all_but_saved
from fbackprop.program import (
    CALLED,
    RECORDED_JVP,
    RECORDED_VJP,
    TAP,
    Program,
    barrier,
    blank,
    call,
    class_vjp_backward,
    class_vjp_forward,
    custom_vjp_halves,
    evaluate,
    inlined,
    is_inexact,
    memoized,
    program_of,
    zeros,
)
from fbackprop.split import Split, nonzero, spread
from fbackprop.table import Rule, Rules, register


@memoized
def _split(program: Program, rules: Rules, active) -> Split:
    """A call's inputs and outputs are its caller's: both pass to the backward half for free."""
    return Split(
        rules,
        program,
        active,
        free_inputs=(True,) * len(program.inputs),
        free_outputs=(True,) * len(program.outputs),
    )


class Inline(Rule):
    """A call whose halves run in place."""

    jaxpr = "call_jaxpr"

    def _split(self, rules, eqn, active) -> Split:
        return _split(program_of(eqn.params[self.jaxpr]), rules, active)

    def run(self, eqn, jaxpr, values, suffix="") -> list:
        """Run a half of the call as the call runs: with its results first, and perhaps others."""
        return evaluate(program_of(jaxpr), values)

    def active_outputs(self, rules, eqn, active):
        return activity(program_of(eqn.params[self.jaxpr]), rules, active).outputs

    def forward(self, rules, eqn, active, values):
        split = self._split(rules, eqn, active)
        if split.as_it_stands:
            results = eqn.bind(*values)
        else:
            results = self.run(eqn, split.forward, values)
        n = len(eqn.outputs)
        return results[:n], split.gather(values, results[:n], results[n:])

    def pullback(self, rules, eqn, active, kept, cts):
        half = self._split(rules, eqn, active).backward(nonzero(cts))
        values = [*kept, *(ct for ct in cts if ct is not None)]
        return spread(self.run(eqn, half.jaxpr, values, "_pullback"), half.reached)


class Jit(Inline):
    """A jit-ted call stays one call forward and one backward, traced once however often called."""

    jaxpr = "jaxpr"

    def run(self, eqn, jaxpr, values, suffix=""):
        return call(eqn, jaxpr, eqn.params["name"] + suffix, values, extends=not suffix)


class Annotated(Inline):
    """A call that says something of its body (where it runs, what it is): so do both halves."""

    jaxpr = "jaxpr"

    def run(self, eqn, jaxpr, values, suffix=""):
        changed = {"jaxpr": jaxpr}
        if "out_memory_spaces" in eqn.params:
            changed["out_memory_spaces"] = tuple(aval.memory_space for aval in jaxpr.out_avals)
        return eqn.bind(*values, **changed)


class Remat(Inline):
    """`jax.checkpoint`: keep the inputs and what the policy saves, compute the rest again."""

    jaxpr = "jaxpr"

    def _split(self, rules, eqn, active):
        policy = eqn.params["policy"]
        return _checkpointed(program_of(eqn.params["jaxpr"]), rules, active, policy)

    def pullback(self, rules, eqn, active, kept, cts):
        if eqn.params["prevent_cse"] and kept:
            # Keeps the compiler from finding the forward pass's values and keeping them after all.
            present = [ct for ct in cts if ct is not None]
            leaves, structure = jax.tree.flatten((kept, present))
            kept, present = structure.unflatten(barrier(leaves))
            cts = spread(present, nonzero(cts))
        return super().pullback(rules, eqn, active, kept, cts)


@memoized
def _checkpointed(program: Program, rules: Rules, active, policy) -> Split:
    if policy is not None:
        program = inlined(program)  # policies speak of single equations
    return Split(
        rules.under(policy),
        program,
        active,
        free_inputs=(True,) * len(program.inputs),
        free_outputs=(False,) * len(program.outputs),
        recompute=all_but_saved(policy),
    )


class Cond(Rule):
    """`cond` and `switch`: the branch taken forward is the branch taken backward."""

    def active_outputs(self, rules, eqn, active):
        branches = [program_of(jaxpr) for jaxpr in eqn.params["branches"]]
        masks = [activity(p, rules, active[1:]).outputs for p in branches]
        return tuple(map(any, zip(*masks, strict=True)))

    def _splits(self, rules, eqn, active) -> list[Split]:
        return [_split(program_of(j), rules, active[1:]) for j in eqn.params["branches"]]

    def forward(self, rules, eqn, active, values):
        splits = self._splits(rules, eqn, active)
        slots = _slots([[v.aval for v in s.extras] for s in splits])
        n = len(eqn.outputs)

        def branch(split, mine):
            def run(*operands):
                results = evaluate(program_of(split.forward), operands)
                extras = dict(zip(mine, results[n:], strict=True))
                filler = (
                    extras[i] if i in extras else blank(aval) for i, aval in enumerate(slots[0])
                )
                return [*results[:n], *filler]

            return run

        branches = [branch(s, mine) for s, mine in zip(splits, slots[1], strict=True)]
        index, *operands = values
        results = lax.switch(index, branches, *operands)
        passed = _passed(splits, "input", operands), _passed(splits, "output", results[:n])
        return results[:n], (index, *passed, results[n:])

    def pullback(self, rules, eqn, active, kept, cts):
        splits = self._splits(rules, eqn, active)
        slots = _slots([[v.aval for v in s.extras] for s in splits])
        index, operands, outs, extras = kept
        halves = [s.backward(nonzero(cts)) for s in splits]
        reached = tuple(map(any, zip(*(h.reached for h in halves), strict=True)))
        present = [ct for ct in cts if ct is not None]

        def branch(split, half, mine):
            def run(operands, outs, extras, present):
                values = split.gather(operands, outs, [extras[i] for i in mine])
                found = evaluate(program_of(half.jaxpr), [*values, *present])
                found = spread(found, half.reached)
                return [
                    zeros(aval) if ct is None else ct
                    for ct, aval, r in zip(found, eqn.in_avals[1:], reached, strict=True)
                    if r
                ]

            return run

        branches = [branch(*each) for each in zip(splits, halves, slots[1], strict=True)]
        found = lax.switch(index, branches, operands, outs, extras, present)
        return [None, *spread(found, reached)]


def _passed(splits: list[Split], kind: str, values) -> list:
    """Inputs or outputs of branches, None for those that no backward half reads."""
    read = {i for split in splits for place, i in split.places if place == kind}
    return [x if i in read else None for i, x in enumerate(values)]


def _slots(avals_of_branches):
    """Share places for extras between branches, of which one is taken: avals and indices."""
    shared: list = []
    places = []
    for avals in avals_of_branches:
        taken: list[int] = []
        for aval in avals:
            fits = (
                i
                for i, a in enumerate(shared)
                if i not in taken and (a.shape, a.dtype) == (aval.shape, aval.dtype)
            )
            i = next(fits, None)
            if i is None:
                i = len(shared)
                shared.append(aval)
            taken.append(i)
        places.append(taken)
    return shared, places


class CustomVJP(Rule):
    """A user's `custom_vjp`: its backward rule is the user's own."""

    def forward(self, rules, eqn, active, values):
        fwd, _ = custom_vjp_halves(eqn, active)
        return fwd(*values)

    def pullback(self, rules, eqn, active, kept, cts):
        _, bwd = custom_vjp_halves(eqn, active)
        return [
            ct if a and is_inexact(aval) else None
            for ct, a, aval in zip(bwd(kept, cts, eqn.out_avals), active, eqn.in_avals, strict=True)
        ]


class ClassPrimitive(Rule):
    """A primitive that is a user's own class: its backward rule is its author's."""

    def forward(self, rules, eqn, active, values):
        outs, residuals = class_vjp_forward(eqn, active, values)
        leaves, structure = jax.tree.flatten(residuals)
        # What is no array (which arguments move, for instance) must stay what it is under `jit`.
        arrays = [x if isinstance(x, jax.Array) else None for x in leaves]
        fixed = tuple(None if isinstance(x, jax.Array) else x for x in leaves)
        return outs, jax.tree_util.Partial(_Fixed(structure, fixed), arrays)

    def pullback(self, rules, eqn, active, kept, cts):
        found = class_vjp_backward(eqn, kept(), cts)
        return [ct if a else None for ct, a in zip(found, active, strict=True)]


class _Fixed(NamedTuple):
    """The part of a residual that is not arrays; called with those, the residual."""

    structure: Any
    leaves: tuple

    def __call__(self, arrays):
        pairs = zip(self.leaves, arrays, strict=True)
        return self.structure.unflatten(x if array is None else array for x, array in pairs)


class Tap(Rule):
    """A place to read a cotangent: nothing is computed, the nudge gets what its value gets."""

    def forward(self, rules, eqn, active, values):
        return values[:1], ()

    def pullback(self, rules, eqn, active, kept, cts):
        return [cts[0] if a else None for a in active]


class Recorded(Rule):
    """A user's custom rule that ran while the function was watched."""

    def forward(self, rules, eqn, active, values):
        return eqn.bind(*values), values[eqn.params["n_args"] + eqn.params["n_outs"] :]

    def pullback(self, rules, eqn, active, kept, cts):
        found = self._leaving(rules, eqn, kept, cts)
        found = [ct if a else None for ct, a in zip(found, active, strict=False)]
        return [*found, *(None,) * (len(eqn.inputs) - len(found))]

    def _leaving(self, rules, eqn, residuals, cts) -> list:
        """Cotangents of the arguments that were watched."""
        raise NotImplementedError


class RecordedVJP(Recorded):
    def _leaving(self, rules, eqn, residuals, cts):
        found = eqn.params["backward"](residuals, cts, eqn.out_avals)
        return [found[i] for i in eqn.params["places"]]


class RecordedJVP(Recorded):
    """The equations of the tangents, given the values, are linear: their sweep is the transpose."""

    def _leaving(self, rules, eqn, residuals, cts):
        program = eqn.params["tangents"]
        n = len(residuals)
        active = tuple(i >= n for i in range(len(program.inputs)))
        values = [*residuals, *map(zeros, program.in_avals[n:])]
        pairs = zip(cts, eqn.out_avals, strict=True)
        moving = [ct for ct, aval in pairs if is_inexact(aval)]
        return pull(rules, program, active, values, moving)[n:]


register(TAP, Tap())
register(RECORDED_JVP, RecordedJVP())
register(RECORDED_VJP, RecordedVJP())
register("call_hi_primitive", ClassPrimitive())
register("jit", Jit())
register(CALLED, Inline())
register("closed_call", Inline())
register("eval_jaxpr", Inline())
register("compute_on", Annotated())
register("xla_metadata_call", Annotated())
register("remat2", Remat())
register("cond", Cond())
register("custom_vjp_call", CustomVJP())
