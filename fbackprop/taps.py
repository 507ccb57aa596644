"""Taps: places in a program at which a sweep can be read.

``tap(x, nudge)`` is `x`, and in the backward sweep the nudge's cotangent is the one that `x` has
there. A program whose equations are tapped takes nudges as further inputs and returns what it
computed as further outputs; swept as it stands, it gives the cotangents that arrive at results and
leave to operands. Calls stay calls and loops stay loops: their bodies are tapped, and in a scan
nudges and values are stacked along its iterations. So nothing of the sweep is done a second way,
and nothing is kept beyond what is read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
from jax import lax

from fbackprop.bodies import checkpoint_body, scan_body
from fbackprop.program import (
    TAP,
    Equation,
    Program,
    Var,
    blank,
    evaluate,
    interpret,
    is_inexact,
    memoized,
    program_of,
    scalar,
    scan_counts,
    shaped,
    trace_jaxpr,
    zeros,
)
from fbackprop.rules.calls import Cond, Inline, Remat
from fbackprop.rules.loops import Scan
from fbackprop.table import MissingRule, Rules, written_rule

Mask = tuple[bool, ...]
Where = Callable[[Equation], bool] | None


class Reading(NamedTuple):
    """What belongs to one equation: nudges to be passed, values noted or cotangents read.

    Attributes:
      operands, results: one entry each, None where there is none.
      bodies: for each program that the equation holds, the readings of its tapped equations.
    """

    operands: tuple
    results: tuple
    bodies: tuple[list[Reading], ...]


class Tapped(NamedTuple):
    """An equation that is read.

    Attributes:
      eqn: the equation.
      kept: whether it is read itself, or holds what is.
      operands, results: which of them have a cotangent to be read.
      bodies: plans for the programs that it holds, if anything in them is read.
    """

    eqn: Equation
    kept: bool
    operands: Mask
    results: Mask
    bodies: tuple[Plan, ...]


class Plan:
    """Where to tap a program.

    Attributes:
      program: what is tapped.
      steps: for each equation how it is tapped, or None.
      outputs: which outputs carry a derivative.
    """

    def __init__(self, rules: Rules, program: Program, active: Mask, where: Where):
        self.program = program
        self.steps: list[Tapped | None] = []
        live = {v for v, a in zip(program.inputs, active, strict=True) if a and is_inexact(v.aval)}
        for eqn in program.equations:
            mask = tuple(isinstance(v, Var) and v in live for v in eqn.inputs)
            try:
                step, outs = _tapped(rules, eqn, mask, where)
            except MissingRule as error:
                raise error.seen_from(eqn) from None
            live.update(v for v, a in zip(eqn.outputs, outs, strict=False) if a)
            self.steps.append(step)
        self.outputs = tuple(isinstance(v, Var) and v in live for v in program.outputs)

    @property
    def tapped(self) -> list[Tapped]:
        return [step for step in self.steps if step is not None]

    def nudges(self, lead: tuple[int, ...] = ()) -> list[Reading]:
        """Zeros for all taps, within loops of these lengths."""

        def of(avals, mask):
            pairs = zip(avals, mask, strict=True)
            return tuple(lax.broadcast(zeros(aval), lead) if m else None for aval, m in pairs)

        def reading(step: Tapped) -> Reading:
            around = (*lead, step.eqn.params["length"]) if _is_scan(step.eqn) else lead
            return Reading(
                of(step.eqn.in_avals, step.operands),
                of(step.eqn.out_avals, step.results),
                tuple(body.nudges(around) for body in step.bodies),
            )

        return [reading(step) for step in self.tapped]

    def run(self, values: Sequence, nudges: list[Reading]) -> tuple[list, list[Reading]]:
        """Trace the tapped program on values and nudges; returns its outputs and what is noted."""
        steps, remaining, notes = iter(self.steps), iter(nudges), []

        def apply(eqn, operands):
            step = next(steps)
            if step is None:
                return eqn.stage(*operands)
            outs, note = _run(step, operands, next(remaining))
            notes.append(note)
            return outs

        return interpret(self.program, values, apply), notes

    @functools.cached_property
    def traced(self):
        """The tapped program, and the structure of what it notes.

        Its closed jaxpr: inputs and the leaves of the nudges, to outputs and the leaves of notes.
        """
        leaves, nudges = jax.tree.flatten(jax.eval_shape(self.nudges))
        n = len(self.program.inputs)
        notes_structure = None

        def flat(*values):
            nonlocal notes_structure
            outs, notes = self.run(values[:n], jax.tree.unflatten(nudges, values[n:]))
            leaves, notes_structure = jax.tree.flatten(notes)
            return [*outs, *leaves]

        jaxpr = trace_jaxpr(flat, [*self.program.in_avals, *map(shaped, leaves)])
        return jaxpr, notes_structure


@memoized
def plan(program: Program, rules: Rules, active: Mask, where: Where) -> Plan:
    """How to tap a program of these active inputs where `where` says so, or everywhere."""
    return Plan(rules, program, active, where)


def is_named(eqn: Equation) -> bool:
    """Whether `jax.ad_checkpoint.checkpoint_name` named a value here."""
    return eqn.primitive.name == "name"


def _tapped(rules: Rules, eqn: Equation, active: Mask, where: Where):
    """How to tap an equation, None for not at all, and which results carry a derivative."""
    kept = where is None or bool(where(eqn))
    bodies, outs = _bodies(rules, eqn, active, where)
    if not any(body.tapped for body in bodies):
        bodies = ()
        moving = any(active)
        outs = rules.of(eqn).active_outputs(rules, eqn, active) if moving else ()
    if kept and is_named(eqn):  # has an error signal, even if it depends on no argument
        outs = tuple(map(is_inexact, eqn.out_avals))
    if not (kept or bodies):
        return None, outs
    passes_on = kept and any(outs)
    operands = tuple(a and passes_on for a in active)
    results = tuple(outs) if kept and any(outs) else (False,) * len(eqn.outputs)
    return Tapped(eqn, kept, operands, results, bodies), outs


# --- equations that hold programs ----------------------------------------------------------------


def _is_scan(eqn: Equation) -> bool:
    return isinstance(written_rule(eqn), Scan)


def _bodies(rules: Rules, eqn: Equation, active: Mask, where: Where):
    """Plans for the programs of an equation that one can look into; its active results."""
    rule = written_rule(eqn)
    if isinstance(rule, Inline):
        body = plan(program_of(eqn.params[rule.jaxpr]), rules, active, where)
        return (body,), body.outputs
    if isinstance(rule, Cond):
        programs = map(program_of, eqn.params["branches"])
        bodies = tuple(plan(program, rules, active[1:], where) for program in programs)
        return bodies, tuple(map(any, zip(*(body.outputs for body in bodies), strict=True)))
    if isinstance(rule, Scan):
        return _scan_body(rules, eqn, active, where)
    return (), ()


def _scan_body(rules: Rules, eqn: Equation, active: Mask, where: Where):
    """The plan once activity has gone round: a fixed point on the carry."""
    n_consts, n_carry = scan_counts(eqn.params)
    n = n_consts + n_carry
    while True:
        body = plan(program_of(eqn.params["jaxpr"]), rules, active, where)
        carry = tuple(
            a or b for a, b in zip(active[n_consts:n], body.outputs[:n_carry], strict=True)
        )
        if carry == active[n_consts:n]:
            return (body,), (*carry, *body.outputs[n_carry:])
        active = (*active[:n_consts], *carry, *active[n:])


def _run(step: Tapped, operands: Sequence, nudges: Reading) -> tuple[list, Reading]:
    eqn = step.eqn
    # From the last to the first, so that the sweep adds their cotangents from the first on.
    operands = _tap(operands[::-1], nudges.operands[::-1])[::-1]
    outs, notes = _apply(step, operands, nudges.bodies)
    outs = _tap(outs, nudges.results)
    if not step.kept:
        return outs, Reading((None,) * len(operands), (None,) * len(outs), notes)
    return outs, Reading(_arrays(operands, eqn.in_avals), _arrays(outs, eqn.out_avals), notes)


def _tap(values: Iterable, nudges: Iterable) -> list:
    pairs = zip(values, nudges, strict=True)
    return [x if nudge is None else TAP.bind(x, nudge) for x, nudge in pairs]


def _arrays(values: Sequence, avals: Sequence) -> tuple:
    """Literals may be Python numbers: those as arrays."""
    pairs = zip(values, avals, strict=True)
    return tuple(x if hasattr(x, "shape") else scalar(x, aval) for x, aval in pairs)


def _apply(step: Tapped, operands: Sequence, nudges: Sequence[list[Reading]]):
    """Run an equation, its bodies tapped; returns its results and what the bodies note."""
    eqn, rule = step.eqn, written_rule(step.eqn)
    if not step.bodies:
        return eqn.stage(*operands), ()
    jaxprs, structures = zip(*(body.traced for body in step.bodies), strict=True)
    leaves = [jax.tree.leaves(nudge) for nudge in nudges]
    with eqn.context():
        if isinstance(rule, Scan):
            found = scan_body(eqn, jaxprs[0], operands, each=leaves[0])
        elif isinstance(rule, Cond):
            found = _switch(eqn, jaxprs, operands, leaves)
        elif isinstance(rule, Remat):
            found = checkpoint_body(eqn, jaxprs[0], [*operands, *leaves[0]])
        else:
            assert isinstance(rule, Inline)
            found = rule.run(eqn, jaxprs[0], [*operands, *leaves[0]])
    outs, rest = found[: len(eqn.outputs)], iter(found[len(eqn.outputs) :])
    notes = (jax.tree.unflatten(s, [next(rest) for _ in range(s.num_leaves)]) for s in structures)
    return outs, tuple(notes)


def _switch(eqn: Equation, jaxprs: Sequence, operands: Sequence, nudges: Sequence[list]) -> list:
    """The branch taken notes what it computes; for the others zeros stand."""
    index, *operands = operands
    programs, n = list(map(program_of, jaxprs)), len(eqn.outputs)

    def branch(k):
        def run(operands, nudges):
            found = evaluate(programs[k], [*operands, *nudges[k]])
            notes = [[blank(aval) for aval in program.out_avals[n:]] for program in programs]
            notes[k] = found[n:]
            return [*found[:n], *(x for note in notes for x in note)]

        return run

    return lax.switch(index, list(map(branch, range(len(programs)))), list(operands), list(nudges))
